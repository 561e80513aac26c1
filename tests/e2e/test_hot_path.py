"""What the kernel answers alone, proven by the daemon's own request counters (design.md, section 4)."""
import fcntl
import mmap
import os
import time

import pytest

from harness import load, requests_during, save, write_all

FRESH_S = 0.9   # entry and attribute timeouts are a second at least when the time to live is long
SIZES = [200, 2000, 65536, 350_000, 2 << 20]


def php_like_read(path, size):
    """open, fstat, flock, read, close: what a request of PHP does."""
    fd = os.open(path, os.O_RDWR)
    try:
        assert os.fstat(fd).st_size == size
        fcntl.flock(fd, fcntl.LOCK_EX)
        assert len(os.pread(fd, size, 0)) == size
    finally:
        os.close(fd)


def measured(mount, prime, action):
    """
    The requests of @action, measured right after @prime().

    The kernel trusts attributes for a second or two: when the machine stalled longer than that, it says nothing.
    """
    for _ in range(20):
        os.stat(mount.path)
        prime()
        start = time.monotonic()
        cost = requests_during(mount, action)
        if time.monotonic() - start < FRESH_S:
            return cost
    raise AssertionError("the machine is too slow to measure within the kernel's timeouts")


def filled(mount, size, name="f"):
    path = mount / name
    save(path, os.urandom(size))
    for _ in range(3):  # once the commit is over, nothing of it is cold
        php_like_read(path, size)
        os.stat(path)
    return path


@pytest.mark.parametrize("size", SIZES)
def test_a_cached_session_is_read_without_any_request(mount, size):
    m = mount()
    path = filled(m, size)
    assert measured(m, lambda: php_like_read(path, size), lambda: php_like_read(path, size)) == {}


def test_a_hundred_reads_of_a_cached_session_cost_no_request(mount):
    m = mount()
    path = filled(m, 2000)
    assert measured(m, lambda: php_like_read(path, 2000), lambda: [php_like_read(path, 2000) for _ in range(100)]) == {}


def test_stat_of_a_cached_session_costs_no_request(mount):
    m = mount()
    path = filled(m, 2000)
    assert measured(m, lambda: os.stat(path), lambda: os.stat(path)) == {}


def test_a_session_that_the_other_instance_wrote_is_hot_after_its_first_read(pair):
    a, b = pair
    save(a / "f", b"x" * 2000)
    assert load(b / "f") == b"x" * 2000
    path = b / "f"
    assert measured(b, lambda: php_like_read(path, 2000), lambda: php_like_read(path, 2000)) == {}


def test_an_mmap_of_a_cached_session_is_read_without_any_request(mount):
    m = mount()
    path = filled(m, 65536)

    def read_mapped():
        fd = os.open(path, os.O_RDONLY)
        try:
            with mmap.mmap(fd, 65536, mmap.MAP_SHARED, mmap.PROT_READ) as mapped:
                assert len(mapped[:]) == 65536
        finally:
            os.close(fd)

    assert measured(m, read_mapped, read_mapped) == {}


def test_ten_whole_saves_are_ten_write_requests_and_one_getxattr_at_most(mount):
    m = mount()
    path = filled(m, 2000)
    fd = os.open(path, os.O_RDWR)
    try:
        cost = measured(m, lambda: os.pwrite(fd, b"0" * 2000, 0),
                        lambda: [os.pwrite(fd, b"%d" % i * 2000, 0) for i in range(10)])
    finally:
        os.close(fd)
    assert cost.pop("getxattr", 0) <= 1, "security.capability is not asked for with every write"
    cost.pop("total")
    assert cost == {"write": 10}
    assert load(path) == b"9" * 2000


def test_the_first_stat_after_a_save_is_one_getattr_and_the_second_none(mount):
    m = mount()
    path = filled(m, 2000)
    fd = os.open(path, os.O_RDWR)
    try:
        first = measured(m, lambda: os.pwrite(fd, b"1" * 2000, 0), lambda: os.fstat(fd))
        assert first == {"getattr": 1, "total": 1}
        assert measured(m, lambda: os.fstat(fd), lambda: os.fstat(fd)) == {}
    finally:
        os.close(fd)


def test_a_save_by_o_trunc_is_one_setattr_and_one_write(mount):
    m = mount()
    path = filled(m, 2000)
    cost = measured(m, lambda: php_like_read(path, 2000), lambda: save(path, b"2" * 2000))
    # The kernel asks for security.capability before either: the reply to SETATTR makes it forget what it knew.
    assert cost.pop("getxattr", 0) <= 2
    cost.pop("total")
    assert cost == {"setattr": 1, "write": 1}


def test_neither_open_nor_flush_nor_release_nor_locks_reach_the_daemon(mount):
    m = mount()
    path = filled(m, 2000)
    before = m.requests()
    for _ in range(20):
        fd = os.open(path, os.O_RDWR)
        fcntl.flock(fd, fcntl.LOCK_EX)
        fcntl.lockf(fd, fcntl.LOCK_EX)
        write_all(fd, b"x" * 2000)
        os.close(fd)
    after = m.requests()
    for name in ("open", "flush", "release", "setlk", "setlkw", "getlk"):
        assert after.get(name, 0) - before.get(name, 0) == 0, name


def test_a_cold_read_of_a_small_session_is_one_lookup_and_one_read(pair):
    a, b = pair
    for i in range(25):
        save(a / f"f{i}", b"x" * 2000)
    php_like_read(b / "f0", 2000)  # the kernel learns that open and flush are not for the daemon
    names = iter(range(1, 25))
    cost = measured(b, lambda: None, lambda: php_like_read(b / f"f{next(names)}", 2000))
    assert cost.get("lookup") == 1 and cost.get("read") == 1
    assert cost["total"] <= 3, cost
