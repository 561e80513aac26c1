"""A change on one instance shows on the other: by path, through held descriptors, in live mappings."""
import os
import stat
import subprocess
import time

import pytest

from harness import (PYTHON, finish, get_attr, load, outcome, read_all, save, scaled, set_attr, spawn, wait_until,
                     write_all)

# Maps a file, says "ready", then waits until the mapping starts with the wanted bytes. In a process of its own: a
# mapping that lost its file ends its reader with SIGBUS.
WATCH = """
import mmap, os, sys, time
path, old, new = sys.argv[1], sys.argv[2].encode(), sys.argv[3].encode()
fd = os.open(path, os.O_RDONLY)
mapped = mmap.mmap(fd, 0, mmap.MAP_SHARED, mmap.PROT_READ)
assert mapped[:len(old)] == old, mapped[:len(old)]
print("ready", flush=True)
deadline = time.monotonic() + 20
while mapped[:len(new)] != new:
    if time.monotonic() > deadline:
        sys.exit(f"still {mapped[:len(new)]!r}")
    time.sleep(0.001)
"""


def seen(path, data, what="the new content"):
    wait_until(lambda: outcome(load, path) == data, what=f"{what} at {path}")


@pytest.fixture
def shared(pair):
    """(path on a, path on b, descriptor on b) of a session that both have in their caches."""
    a, b = pair
    save(a / "f", b"old content")
    assert load(b / "f") == b"old content"
    fd = os.open(b / "f", os.O_RDONLY)
    assert os.pread(fd, 100, 0) == b"old content"
    os.fstat(fd)
    yield a / "f", b / "f", fd
    os.close(fd)


def test_an_update_shows_by_path_and_through_a_held_descriptor(shared):
    a, b, fd = shared
    save(a, b"new, and longer than before")
    seen(b, b"new, and longer than before")
    wait_until(lambda: os.pread(fd, 100, 0) == b"new, and longer than before", what="pread")
    assert os.fstat(fd).st_size == len(b"new, and longer than before")


def test_updates_to_and_fro_all_show(pair):
    a, b = pair
    save(a / "f", b"")
    expected = b""
    for i in range(scaled(50, 10)):
        here, there = (a, b) if i % 2 else (b, a)
        seen(here / "f", expected)
        fd = os.open(here / "f", os.O_WRONLY | os.O_APPEND)
        write_all(fd, b"%d," % i)
        os.close(fd)
        expected += b"%d," % i
    seen(a / "f", expected)
    seen(b / "f", expected)


def test_a_live_mapping_shows_an_update(pair):
    a, b = pair
    save(a / "f", b"old" + b"." * 1000)
    watcher = spawn([PYTHON, "-c", WATCH, b / "f", "old", "new"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert watcher.stdout.readline() == b"ready\n"
    save(a / "f", b"new" + b"." * 1000)
    assert finish(watcher) == (0, "")


def test_a_held_descriptor_of_a_session_removed_elsewhere_is_stale(shared):
    a, b, fd = shared
    os.unlink(a)
    wait_until(lambda: outcome(os.stat, b) == "ENOENT", what="ENOENT by path")
    wait_until(lambda: outcome(os.pread, fd, 100, 0) == "ESTALE", what="ESTALE for pread")
    wait_until(lambda: outcome(os.fstat, fd) == "ESTALE", what="ESTALE for fstat")
    assert outcome(os.listdir, os.path.dirname(b)) == []


def test_a_session_made_anew_after_its_removal_elsewhere_is_the_new_one(shared):
    a, b, fd = shared
    os.unlink(a)
    save(a, b"second life")
    seen(b, b"second life")
    wait_until(lambda: outcome(os.pread, fd, 100, 0) in (b"second life", "ESTALE"), what="nothing of the first life")


def test_a_rename_shows(shared):
    a, b, fd = shared
    os.rename(a, f"{a}-new")
    seen(f"{b}-new", b"old content")
    wait_until(lambda: outcome(os.stat, b) == "ENOENT", what="the old name is gone")
    assert outcome(os.pread, fd, 100, 0) in (b"old content", "ESTALE")


def test_a_rename_over_a_session_shows_its_new_content(shared):
    a, b, fd = shared
    save(f"{a}.tmp", b"by rename")
    os.rename(f"{a}.tmp", a)
    seen(b, b"by rename")
    assert outcome(os.stat, f"{b}.tmp") == "ENOENT"
    assert outcome(os.pread, fd, 100, 0) in (b"old content", b"by rename", "ESTALE")


def test_a_touch_with_a_time_of_its_own_shows(shared):
    a, b, fd = shared
    os.utime(a, ns=(10**18, 10**18))
    wait_until(lambda: os.stat(b).st_mtime_ns == 10**18, what="mtime by path")
    wait_until(lambda: os.fstat(fd).st_mtime_ns == 10**18, what="mtime by descriptor")


def test_a_touch_shows_once_an_eighth_of_the_ttl_is_over(pair):
    a, b = pair
    save(a / "f", b"x")
    set_attr(a / "f", "user.session.ttl", "8s")
    before = os.stat(b / "f").st_mtime_ns

    def touched():
        os.utime(a / "f")
        return os.stat(b / "f").st_mtime_ns > before + 10**9

    wait_until(touched, 7, "a newer mtime on b, from touches alone")
    wait_until(lambda: abs(os.stat(a / "f").st_mtime_ns - os.stat(b / "f").st_mtime_ns) < 10**9, what="about equal")


def test_chmod_and_chown_show(shared):
    a, b, fd = shared
    os.chmod(a, 0o604)
    wait_until(lambda: stat.S_IMODE(os.stat(b).st_mode) == 0o604, what="mode by path")
    wait_until(lambda: stat.S_IMODE(os.fstat(fd).st_mode) == 0o604, what="mode by descriptor")
    os.chown(a, 12, 34)
    wait_until(lambda: (os.stat(b).st_uid, os.stat(b).st_gid) == (12, 34), what="owner")
    assert load(b) == b"old content"


def test_extended_attributes_show(shared):
    a, b, _ = shared
    set_attr(a, "user.colour", "blue")
    wait_until(lambda: outcome(get_attr, b, "user.colour") == "blue", what="the attribute on b")
    set_attr(b, "user.colour", "red")
    wait_until(lambda: outcome(get_attr, a, "user.colour") == "red", what="its change on a")
    os.removexattr(b, "user.colour")
    wait_until(lambda: outcome(get_attr, a, "user.colour") == "ENODATA", what="its removal on a")


def test_a_truncation_shows(shared):
    a, b, fd = shared
    os.truncate(a, 3)
    seen(b, b"old")
    wait_until(lambda: os.pread(fd, 100, 0) == b"old" and os.fstat(fd).st_size == 3, what="by descriptor")


def test_a_truncation_by_descriptor_and_close_shows(shared):
    a, b, fd = shared
    writer = os.open(a, os.O_WRONLY)
    os.ftruncate(writer, 0)
    os.close(writer)
    seen(b, b"")
    wait_until(lambda: os.fstat(fd).st_size == 0, what="by descriptor")


def test_a_creation_shows_after_a_negative_lookup(pair):
    a, b = pair
    for i in range(20):
        assert outcome(os.stat, b / f"f{i}") == "ENOENT"
        save(a / f"f{i}", b"here")
        seen(b / f"f{i}", b"here")


def test_directories_made_and_removed_elsewhere_show(pair):
    a, b = pair
    assert outcome(os.stat, b / "d") == "ENOENT"
    os.mkdir(a / "d")
    wait_until(lambda: os.path.isdir(b / "d"), what="the directory on b")
    save(b / "d/f", b"from b")
    seen(a / "d/f", b"from b")
    fd = os.open(b / "d", os.O_RDONLY | os.O_DIRECTORY)
    os.unlink(a / "d/f")
    wait_until(lambda: outcome(os.rmdir, a / "d") is None, what="rmdir on a")
    wait_until(lambda: outcome(os.stat, b / "d") == "ENOENT", what="gone on b")
    wait_until(lambda: outcome(save, "f", b"x", dir_fd=fd) in ("ENOENT", "ESTALE"), what="nothing can be made in it")
    os.close(fd)
    assert os.listdir(b.path) == []


def test_what_is_acknowledged_is_in_redis_when_the_call_returns(pair):
    """The other instance has never looked at these names: what it fetches is what Redis has, and nothing is polled."""
    a, b = pair
    for i in range(scaled(50, 10)):
        save(a / f"write{i}", b"w" * (1 + 37 * i))
        assert load(b / f"write{i}") == b"w" * (1 + 37 * i)

        fd = os.open(a / f"fsync{i}", os.O_CREAT | os.O_WRONLY, 0o600)
        for _ in range(3):
            write_all(fd, b"s" * 4096)
        os.fsync(fd)
        assert load(b / f"fsync{i}") == b"s" * 12288
        os.close(fd)

        save(a / f"tmp{i}", b"r" * 10000, writes=7)
        os.rename(a / f"tmp{i}", a / f"rename{i}")
        assert load(b / f"rename{i}") == b"r" * 10000

        save(a / f"gone{i}", b"x")
        os.unlink(a / f"gone{i}")
        assert outcome(os.stat, b / f"gone{i}") == "ENOENT"

        save(a / f"mode{i}", b"x")
        os.chmod(a / f"mode{i}", 0o640)
        assert stat.S_IMODE(os.stat(b / f"mode{i}").st_mode) == 0o640

        save(a / f"attr{i}", b"x")
        set_attr(a / f"attr{i}", "user.note", str(i))
        assert get_attr(b / f"attr{i}", "user.note") == str(i)


@pytest.mark.parametrize("size,writes", [(4096, 1), (8192, 2), (65536, 1), (100_000, 10), (1 << 20, 256), (3, 3)])
def test_a_save_of_several_writes_or_whole_pages_shows_after_its_close(shared, size, writes):
    a, b, _ = shared
    data = os.urandom(size)
    save(a, data, writes=writes)
    seen(b, data)


def test_a_save_of_many_writes_is_one_commit(redis, pair):
    a, _ = pair
    key = redis.key_of(lambda: save(a / "f", b"first"))

    def sequence():
        return int.from_bytes(redis.cli("GETRANGE", key, 24, 31), "little")

    before = sequence()
    data = os.urandom(50 * 4096)
    save(a / "f", data, writes=50)
    wait_until(lambda: redis.cli("STRLEN", key) > len(data), what="the commit")
    set_attr(a / "f", "user.session.ttl", "1h")  # whatever was late is in Redis now
    assert sequence() - before <= 2


def test_a_file_held_open_is_committed_after_a_bounded_time(pair):
    a, b = pair
    fd = os.open(a / "f", os.O_WRONLY | os.O_CREAT, 0o600)
    try:
        write_all(fd, b"x" * 4096)
        start = time.monotonic()
        seen(b / "f", b"x" * 4096)
        print(f"held open, it was committed after {time.monotonic() - start:.2f} s")
    finally:
        os.close(fd)


def test_reading_through_one_descriptor_sees_a_whole_version_after_lseek(shared):
    a, _, fd = shared
    save(a, b"second")

    def reread():
        os.lseek(fd, 0, os.SEEK_SET)
        return read_all(fd) == b"second"

    wait_until(reread, what="read() after lseek")


def test_version_changes_with_every_save_and_is_equal_on_both(shared):
    a, b, _ = shared
    versions = {get_attr(a, "user.session.version")}
    for i in range(5):
        save(a, b"content %d" % i)
        seen(b, b"content %d" % i)
        wait_until(lambda: get_attr(a, "user.session.version") == get_attr(b, "user.session.version"), what="equal")
        versions.add(get_attr(b, "user.session.version"))
    assert len(versions) == 6
