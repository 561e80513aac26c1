"""One version or another, never a mixture: checksummed saves in 1 to 1,000 writes, readers on both sides."""
import hashlib
import json
import os
import random
import subprocess

import pytest

import torn_worker
from harness import HERE, PYTHON, finish, load, outcome, save, scaled, spawn, wait_until

N_FILES = 200  # of each writer; with few, unlocked readers of large sessions overlap with every second save


def worker(*words):
    return spawn([PYTHON, HERE / "torn_worker.py", *words], stdout=subprocess.PIPE)


def results(workers, seconds):
    found = []
    for process in workers:
        status, output = finish(process, seconds + 60)
        assert status == 0, output
        found.append(json.loads(output))
    return found


def fight(a, b, work, style, seconds):
    """
    A writer on either instance, each with its own sessions; on either instance an unlocked reader of what the other one
    writes and a reader of what its own writes - unlocked for renames, under the writer's lock for saves in place, which
    within an instance are as visible as in any file system.
    """
    own = "unlocked" if style == "rename" else "locked"
    max_writes = scaled(1000, 50)
    writers = [worker("write", m.path, work, prefix, N_FILES, style, seconds, seed, max_writes)
               for m, prefix, seed in ((a, "a", 1), (b, "b", 2))]
    readers = [worker("read", m.path, work, prefix, N_FILES, locked, seconds, seed)
               for m, prefix, locked, seed in ((a, "b", "unlocked", 3), (b, "a", "unlocked", 4), (a, "a", own, 5),
                                               (b, "b", own, 6))]
    wrote, read = results(writers, seconds), results(readers, seconds)
    for counts in read:
        print(style, {name: counts[name] for name in ("reads", "overlapped")})
    print(style, "saves:", [counts["saves"] for counts in wrote])
    return wrote, read


@pytest.mark.limit(120)
@pytest.mark.parametrize("style", ["trunc", "ftruncate", "rename"])
def test_readers_on_both_sides_see_one_version_or_another(pair, work, style):
    a, b = pair
    locks = work / "locks"
    locks.mkdir()
    wrote, read = fight(a, b, locks, style, max(3, scaled(8)))

    for counts in read:
        assert counts["violations"] == []
        assert counts["overlapped"] <= max(2, counts["reads"] // 500)
    assert sum(counts["reads"] for counts in read) > 0

    for counts in wrote:
        for name, (size, digest) in counts["last"].items():
            for m in pair:
                wait_until(lambda: is_version(m / name, size, digest), what=f"the last {name} on {m.path.name}")
            assert torn_worker.check(load(a / name)) is not None


def is_version(path, size, digest):
    data = outcome(load, path)
    return len(data) == size and hashlib.sha256(data).hexdigest() == digest


@pytest.mark.parametrize("size", [1, 100, 4096, 65536, 1 << 20, 4 << 20])
def test_every_number_of_writes_gives_the_same_content_elsewhere(pair, size):
    a, b = pair
    rng = random.Random(size)
    seq = 1
    for n_writes in (1, 2, 10, 100, 1000):
        for style in ("trunc", "ftruncate", "rename"):
            seq += 1
            data = torn_worker.payload(size, seq, rng)
            torn_worker.save(a.path, "f", data, min(size, n_writes), style)
            wait_until(lambda: outcome(load, b / "f") == data, what=f"{size} bytes in {n_writes} writes, {style}")


def test_a_cold_reader_of_a_save_that_just_ended_sees_all_of_it_or_nothing(pair):
    """Nobody but the writer knew these sessions. Their last part is committed just after close(): half is a mixture."""
    a, b = pair
    rng = random.Random(7)
    for i in range(scaled(100, 20)):
        data = torn_worker.payload(rng.choice([100, 5000, 50_000]), i + 1, rng)
        save(a / f"f{i}", data, writes=rng.choice([2, 5, 20]))
        seen = []

        def is_whole():
            seen.append(outcome(load, b / f"f{i}"))
            return seen[-1] == data

        wait_until(is_whole, what=f"the whole of f{i} on b")
        assert [len(each) for each in seen if each not in (b"", "ENOENT", data)] == []


def test_an_old_version_stays_visible_until_a_long_save_ends(pair):
    """A save of which each part ends on a page boundary shows nothing of itself before its end."""
    a, b = pair
    save(a / "f", b"old")
    assert load(b / "f") == b"old"
    parts = [os.urandom(4096) for _ in range(6)]
    fd = os.open(a / "f", os.O_WRONLY | os.O_TRUNC)
    try:
        for part in parts:
            os.write(fd, part)
            assert load(b / "f") in (b"old", b"".join(parts))
    finally:
        os.close(fd)
    wait_until(lambda: load(b / "f") == b"".join(parts), what="the new version")
