"""Every operation of the file system does what tmpfs does, to the errno."""
import ctypes
import os
import shutil
import stat
import tempfile
import threading
import time
from pathlib import Path

import pytest

from harness import HERE, NOBODY, libc, load, outcome, run_python, save, scaled, wait_until, write_all
from operations import OPERATIONS
from permissions import PERMISSIONS, SUID

AT_FDCWD, RENAME_NOREPLACE, RENAME_EXCHANGE = -100, 1, 2


@pytest.fixture
def tmpfs():
    """A directory on tmpfs, to compare with."""
    with tempfile.TemporaryDirectory(prefix="sfs-", dir="/dev/shm") as path:
        os.chmod(path, 0o755)
        yield Path(path)


def differences(operations, left, right):
    """Run each operation in a new directory of either side. Return: name -> both results, where they differ."""
    found = {}
    old_umask = os.umask(0o022)
    try:
        for operation in operations:
            results = []
            for side in (left, right):
                directory = side / operation.__name__
                directory.mkdir()
                results.append(outcome(operation, os.fsencode(directory)))
            if results[0] != results[1]:
                found[operation.__name__] = tuple(results)
    finally:
        os.umask(old_umask)
    return found


def test_every_operation_has_the_result_of_tmpfs(mount, tmpfs):
    assert differences(OPERATIONS, tmpfs, mount().path) == {}


def test_links_devices_and_fifos_are_refused_as_a_kernel_file_system_would(mount):
    m = mount()
    save(m / "file", b"x")
    refusals = {"EPERM", "ENOTSUP"}
    assert outcome(os.symlink, "file", m / "symlink") in refusals
    assert outcome(os.link, m / "file", m / "hard") in refusals
    for kind in (stat.S_IFCHR, stat.S_IFBLK, stat.S_IFIFO, stat.S_IFSOCK):
        assert outcome(os.mknod, m / "node", kind | 0o600, os.makedev(1, 3)) in refusals
    assert os.listdir(m.path) == ["file"]


def rename2(old, new, flags):
    if libc.renameat2(AT_FDCWD, os.fsencode(old), AT_FDCWD, os.fsencode(new), flags) != 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def test_rename_noreplace_keeps_what_is_there(mount):
    m = mount()
    save(m / "one", b"1")
    save(m / "two", b"2")
    assert outcome(rename2, m / "one", m / "two", RENAME_NOREPLACE) == "EEXIST"
    assert (load(m / "one"), load(m / "two")) == (b"1", b"2")
    rename2(m / "one", m / "three", RENAME_NOREPLACE)
    assert load(m / "three") == b"1"
    assert outcome(os.stat, m / "one") == "ENOENT"


def test_rename_noreplace_sees_what_the_other_instance_made(pair):
    a, b = pair
    save(a / "one", b"1")
    save(b / "two", b"2")
    wait_until(lambda: outcome(load, b / "one") == b"1", what="b sees one")
    assert outcome(rename2, a / "one", a / "two", RENAME_NOREPLACE) == "EEXIST"
    assert load(a / "one") == b"1"


def test_rename_exchange_works_or_is_refused(mount):
    m = mount()
    save(m / "one", b"1")
    save(m / "two", b"2")
    result = outcome(rename2, m / "one", m / "two", RENAME_EXCHANGE)
    assert result in (None, "EINVAL")
    assert (load(m / "one"), load(m / "two")) == ((b"1", b"2") if result else (b"2", b"1"))


def test_a_file_unlinked_while_open_stays_usable_until_it_is_closed(redis, mount):
    m = mount()
    key = redis.key_of(lambda: save(m / "f", b"before"))
    fd = os.open(m / "f", os.O_RDWR)
    os.unlink(m / "f")
    assert key not in redis.keys(), "unlink() returned, so it is gone from Redis"
    assert outcome(os.stat, m / "f") == "ENOENT"
    assert os.pread(fd, 100, 0) == b"before"
    assert os.pwrite(fd, b"after it", 0) == 8
    assert os.pread(fd, 100, 0) == b"after it"
    os.ftruncate(fd, 5)
    assert os.fstat(fd).st_size == 5
    save(m / "f", b"another")
    assert os.pread(fd, 100, 0) == b"after"
    os.close(fd)
    assert load(m / "f") == b"another"


def test_an_unlinked_open_file_never_comes_back(pair):
    a, b = pair
    fd = os.open(a / "f", os.O_RDWR | os.O_CREAT, 0o600)
    write_all(fd, b"x" * 4096)
    os.unlink(a / "f")
    write_all(fd, b"y" * 4096)
    os.fsync(fd)
    os.close(fd)
    save(a / "marker", b"m")
    wait_until(lambda: outcome(load, b / "marker") == b"m", what="the marker on b")
    assert outcome(os.stat, a / "f") == "ENOENT"
    assert outcome(os.stat, b / "f") == "ENOENT"
    assert os.listdir(b.path) == ["marker"]


def test_a_hole_reads_as_zeros_on_both_instances(pair):
    a, b = pair
    fd = os.open(a / "f", os.O_RDWR | os.O_CREAT, 0o600)
    os.pwrite(fd, b"end", 1000000)
    os.close(fd)
    expected = bytes(1000000) + b"end"
    assert load(a / "f") == expected
    wait_until(lambda: outcome(load, b / "f") == expected, what="the hole on b")


def test_statfs_answers_with_room_and_names_of_255_bytes(mount):
    result = os.statvfs(mount().path)
    assert result.f_namemax == 255
    assert result.f_bsize >= 512 and result.f_frsize >= 512


def test_odd_names_come_back_as_they_were_on_both_instances(pair):
    a, b = pair
    every_byte = bytes(value for value in range(1, 256) if value != ord("/"))
    names = {every_byte[:127], every_byte[127:], b" ", b"-rf", b"...", b"new\nline", b"\xff\xfe", b"*?[", b"x" * 255}
    for name in names:
        save(os.fsencode(a.path) + b"/" + name, name)
    assert set(os.listdir(os.fsencode(a.path))) == names
    for name in names:
        path = os.fsencode(b.path) + b"/" + name
        wait_until(lambda: outcome(load, path) == name, what=f"{name!r} on b")
    wait_until(lambda: set(os.listdir(os.fsencode(b.path))) == names, what="the names on b")


def race(a, b, n, action):
    """On either mount a thread calls @action(path) for n names, in step. Return: per name the set of both outcomes."""
    barrier, results = threading.Barrier(2, timeout=30), ([], [])

    def runner(m, into):
        for i in range(n):
            barrier.wait()
            into.append(outcome(action, m / f"name{i}"))

    threads = [threading.Thread(target=runner, args=args, daemon=True) for args in ((a, results[0]), (b, results[1]))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [sorted(map(str, both)) for both in zip(*results, strict=True)]


def test_o_excl_is_exclusive_between_instances(pair):
    def create(path):
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))

    n = scaled(300, 20)
    results = race(*pair, n, create)
    assert len(results) == n
    assert [both for both in results if both != ["EEXIST", "None"]] == []


def test_mkdir_is_exclusive_between_instances(pair):
    results = race(*pair, scaled(100, 10), os.mkdir)
    assert [both for both in results if both != ["EEXIST", "None"]] == []


def test_a_session_beyond_the_limit_is_efbig_and_the_old_content_stays(redis, mount):
    a, b = mount("a", max_session="64K"), mount("b", max_session="64K")
    key = redis.key_of(lambda: save(a / "f", b"old"))
    fd = os.open(a / "f", os.O_RDWR)
    assert outcome(os.pwrite, fd, b"x" * 100001, 0) == "EFBIG"
    assert outcome(os.pwrite, fd, b"x", 65536) == "EFBIG"
    assert outcome(os.ftruncate, fd, 65537) == "EFBIG"
    assert os.pread(fd, 100, 0) == b"old"
    os.close(fd)
    assert load(b / "f") == b"old"
    assert redis.cli("STRLEN", key) < 1024
    save(a / "f", b"y" * 65536)  # the limit itself fits
    wait_until(lambda: outcome(load, b / "f") == b"y" * 65536, what="64K on b")


def test_times_are_kept_to_the_nanosecond_and_equal_on_both_instances(pair):
    a, b = pair
    save(a / "f", b"x")
    os.utime(a / "f", ns=(1_600_000_000_123_456_789, 1_500_000_000_987_654_321))
    assert os.stat(a / "f").st_mtime_ns == 1_500_000_000_987_654_321
    wait_until(lambda: outcome(lambda: os.stat(b / "f").st_mtime_ns) == 1_500_000_000_987_654_321, what="mtime on b")


def test_a_save_moves_mtime_and_ctime_to_now(mount):
    m = mount()
    save(m / "f", b"1")
    os.utime(m / "f", ns=(10**18, 10**18))
    before = time.time_ns()
    fd = os.open(m / "f", os.O_WRONLY)
    write_all(fd, b"2")
    os.close(fd)
    status = os.stat(m / "f")
    slack = 50_000_000  # the kernel's coarse clock
    for value in (status.st_mtime_ns, status.st_ctime_ns):
        assert before - slack <= value <= time.time_ns() + slack


CHILD = "import json, sys; sys.path.insert(0, sys.argv[1]); import permissions; " \
        "print(json.dumps(permissions.run_as_other(sys.argv[2], sys.argv[3])))"


@pytest.mark.parametrize("group", [PERMISSIONS, SUID], ids=["permissions", "suid"])
def test_another_user_gets_what_tmpfs_gives(mount, tmpfs, group, work):
    """Modes, owners, default_permissions, the sticky bit; suid and sgid are lost by a write of somebody else."""
    m = mount(allow_other=True)
    for name in ("operations.py", "permissions.py"):  # the source tree may be closed to other users
        shutil.copy(HERE / name, work / name)
    results = []
    for side in (tmpfs, m.path):
        directory = side / "group"  # the root's own mode may differ
        directory.mkdir()
        os.chmod(directory, 0o755)
        group.prepare(os.fsencode(directory), NOBODY)
        status, output = run_python(CHILD, str(work), group.name, str(directory), user=NOBODY)
        assert status == 0, output
        results.append(output)
    assert results[0] == results[1]


def test_what_another_user_creates_is_his(mount):
    m = mount(allow_other=True)
    os.mkdir(m / "open")
    os.chmod(m / "open", 0o777)
    code = "import os, sys; os.umask(0); os.close(os.open(sys.argv[1], os.O_CREAT | os.O_WRONLY, 0o640))"
    status, output = run_python(code, str(m / "open" / "f"), user=NOBODY)
    assert status == 0, output
    found = os.stat(m / "open" / "f")
    assert (found.st_uid, found.st_gid, stat.S_IMODE(found.st_mode)) == (NOBODY, NOBODY, 0o640)


@pytest.mark.redis(tcp=True)
def test_tcp_and_unix_sources_share_the_sessions(redis, mount):
    a, b = mount("a"), mount("b", source=redis.tcp_source)
    save(a / "f", b"by unix")
    assert load(b / "f") == b"by unix"
    save(b / "f", b"by tcp")
    wait_until(lambda: load(a / "f") == b"by tcp", what="the change on a")
