"""Directories: listing under change, a hundred thousand sessions, subdirectories, renames, removals."""
import os
import random
import subprocess
import threading
import time

import pytest

from harness import PYTHON, finish, load, outcome, run_python, save, scaled, spawn, wait_until

MANY, MANY_LEAST = 100_000, 20_000
CREATE_S = 45  # a slow machine stops creating then; MANY_LEAST must be there

# Creates name%06d for first, first + 2, ... below the end, until its time is up; prints how many it made.
CREATOR = """
import os, sys, time
directory, first, end, seconds = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4])
root, deadline, count = os.open(directory, os.O_RDONLY | os.O_DIRECTORY), time.monotonic() + seconds, 0
for i in range(first, end, 2):
    fd = os.open(f"name{i:06}", os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600, dir_fd=root)
    os.write(fd, b"%d" % i)
    os.close(fd)
    count += 1
    if time.monotonic() > deadline:
        break
print(count)
"""


def create_many(directory, count):
    """By two processes. Return: the set of the names made."""
    creators = [spawn([PYTHON, "-c", CREATOR, directory, first, count, CREATE_S], stdout=subprocess.PIPE,
                      stderr=subprocess.STDOUT) for first in range(2)]
    names = set()
    for first, creator in enumerate(creators):
        status, output = finish(creator, CREATE_S + 60)
        assert status == 0, output
        names.update(f"name{i:06}" for i in range(first, first + 2 * int(output), 2))
    return names


@pytest.mark.limit(200)
def test_a_hundred_thousand_sessions_in_one_directory_are_all_listed_on_both_instances(pair):
    a, b = pair
    count = scaled(MANY, 1000)
    names = create_many(a.path, count)
    print(f"created {len(names)} of {count}")
    assert len(names) >= min(count, scaled(MANY_LEAST, 1000))
    for m in pair:
        start = time.monotonic()
        listed = os.listdir(m.path)
        print(f"listed on {m.path.name} in {time.monotonic() - start:.2f} s")
        assert len(listed) == len(names), "each of them once"
        assert set(listed) == names
    for name in random.Random(1).sample(sorted(names), scaled(500, 50)):
        assert load(b / name) == str(int(name[4:])).encode()


def test_a_listing_with_attributes_shows_sizes_and_types_on_a_cold_instance(pair):
    a, b = pair
    for i in range(100):
        save(a / f"f{i}", b"x" * i)
        os.mkdir(a / f"d{i}")
    entries = {entry.name: entry for entry in os.scandir(b.path)}
    assert len(entries) == 200
    for i in range(100):
        assert entries[f"f{i}"].is_file() and entries[f"f{i}"].stat().st_size == i
        assert entries[f"d{i}"].is_dir()


class Churn:
    """Threads that create, rename and remove sessions named "churn..." until they are told to stop."""

    def __init__(self, *mounts):
        self.stop, self.errors, self.n_changes = threading.Event(), [], 0
        self.threads = [threading.Thread(target=self.run, args=(m,), daemon=True) for m in mounts]

    def run(self, m):
        try:
            for i in range(1_000_000):
                if self.stop.is_set():
                    return
                path = m / f"churn-{m.path.name}{i % 50}"
                save(path, b"x")
                os.rename(path, f"{path}-renamed")
                os.unlink(f"{path}-renamed")
                self.n_changes += 3
        except OSError as error:
            self.errors.append(error)

    def __enter__(self):
        for thread in self.threads:
            thread.start()
        return self

    def __exit__(self, *_):
        self.stop.set()
        for thread in self.threads:
            thread.join()


def test_readdir_is_stable_while_others_create_rename_and_remove(pair):
    a, b = pair
    stable = create_many(a.path, scaled(2000, 100))
    with Churn(*pair) as churn:
        for _ in range(scaled(10, 3)):
            for m in pair:
                listed = [name for name in os.listdir(m.path) if not name.startswith("churn")]
                assert len(listed) == len(stable), "each of them once"
                assert set(listed) == stable
    assert churn.errors == [] and churn.n_changes > 0
    wait_until(lambda: set(os.listdir(b.path)) == set(os.listdir(a.path)) == stable, what="nothing else stays")


def test_a_directory_stream_can_be_rewound(mount):
    m = mount()
    names = create_many(m.path, 500)
    fd = os.open(m.path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        assert set(os.listdir(fd)) == names
        os.unlink(m / "name000000")
        assert set(os.listdir(fd)) == names - {"name000000"}
    finally:
        os.close(fd)


def test_removing_all_while_listing_leaves_nothing(mount):
    m = mount()
    create_many(m.path, scaled(2000, 200))
    with os.scandir(m.path) as entries:
        for entry in entries:
            os.unlink(entry.path)
    assert os.listdir(m.path) == []


def test_the_same_name_in_two_directories_is_two_sessions(pair):
    a, b = pair
    for directory in ("", "one", "one/two"):
        if directory:
            os.mkdir(a / directory)
        save(a / directory / "name", directory.encode() + b"!")
    for directory in ("", "one", "one/two"):
        assert load(b / directory / "name") == directory.encode() + b"!"
    assert sorted(os.listdir(b / "one")) == ["name", "two"]
    os.unlink(b / "one" / "name")
    wait_until(lambda: outcome(load, a / "one/name") == "ENOENT", what="gone on a")
    assert load(a / "name") == b"!" and load(a / "one/two/name") == b"one/two!"


def test_a_renamed_directory_keeps_what_is_in_it_and_moves_no_session(redis, pair):
    a, b = pair
    os.makedirs(a / "old/sub")
    for i in range(200):
        save(a / f"old/f{i}", b"%d" % i)
    save(a / "old/sub/deep", b"deep")
    assert load(b / "old/f7") == b"7"
    before = set(redis.keys())
    os.rename(a / "old", a / "new")
    after = set(redis.keys())
    assert len(before - after) <= 1 and len(after - before) <= 1, "only the directory's own entry moves"
    assert load(a / "new/sub/deep") == b"deep"
    assert outcome(os.stat, a / "old") == "ENOENT"
    wait_until(lambda: outcome(load, b / "new/f7") == b"7", what="the new name on b")
    wait_until(lambda: outcome(load, b / "old/f7") == "ENOENT", what="the old name is gone on b")
    wait_until(lambda: len(os.listdir(b / "new")) == 201, what="all of it is listed on b")


def test_rmdir_of_an_empty_directory_removes_it_on_both(pair):
    a, b = pair
    os.mkdir(a / "d")
    save(a / "d/f", b"x")
    assert os.listdir(b / "d") == ["f"]
    assert outcome(os.rmdir, b / "d") == "ENOTEMPTY"
    os.unlink(a / "d/f")
    wait_until(lambda: outcome(os.rmdir, b / "d") is None, what="rmdir on b")
    wait_until(lambda: outcome(os.stat, a / "d") == "ENOENT", what="gone on a")
    os.mkdir(a / "d")
    assert os.listdir(a / "d") == [], "a new directory is empty"


def test_rmdir_refuses_what_only_the_other_instance_has_filled(pair):
    a, b = pair
    os.mkdir(a / "d")
    assert os.listdir(a / "d") == []
    save(b / "d/f", b"x")
    assert outcome(os.rmdir, a / "d") == "ENOTEMPTY"
    assert load(a / "d/f") == b"x"


def test_paths_may_be_deep(mount):
    m = mount()
    path = m.path
    for i in range(20):
        path = path / f"level{i}"
        os.mkdir(path)
    save(path / "f", b"deep")
    status, output = run_python("import sys; print(open(sys.argv[1]).read())", str(path / "f"))
    assert (status, output.strip()) == (0, "deep")
