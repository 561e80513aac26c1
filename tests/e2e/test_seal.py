"""What Redis holds is ciphertext, and what was tampered with does not open: EBADMSG, never garbage, never a crash."""
import os
import struct
import subprocess

import pytest

from harness import load, make_key, outcome, save, scaled, set_attr, wait_until
from server import RedisError

STATE_OFFSET = 5     # the one byte that is not authenticated (src: seal.h)
HEADER, TAG = 64, 16
CONTENT = b"the content of a session"


class Stored:
    """A session of @m whose blob in Redis is replaced from outside."""

    def __init__(self, redis, m, name="f", content=CONTENT):
        self.redis, self.path = redis, m / name
        self.key = redis.key_of(lambda: save(self.path, content))
        self.blob = redis.cli("GET", self.key)
        self.ttl = redis.cli("PTTL", self.key)

    def put(self, blob):
        """Replace the blob such that the mount has to fetch it: nothing of the former version is in any cache."""
        self.clear()
        self.redis.cli("SET", self.key, blob, "PX", self.ttl)
        # ENOENT is the answer until the daemon has heard of the change.
        return wait_until(lambda: self.read_if_there(), 10, "the mount sees the new blob")

    def clear(self):
        self.redis.cli("DEL", self.key)
        wait_until(lambda: outcome(load, self.path) == "ENOENT", 10, "the mount sees the removal")

    def read_if_there(self):
        result = outcome(load, self.path)
        return None if result == "ENOENT" else [result]

    def restored(self):
        return self.put(self.blob) == [CONTENT]


@pytest.fixture
def stored(redis, mount):
    return Stored(redis, mount())


@pytest.mark.limit(120)
def test_a_flipped_bit_in_any_byte_is_ebadmsg(stored):
    assert stored.restored(), "the blob itself opens"
    step = 1 if scaled(10) == 10 else 3
    wrong = {}
    for offset in range(0, len(stored.blob), step):
        if offset == STATE_OFFSET:
            continue
        blob = bytearray(stored.blob)
        blob[offset] ^= 1 << (offset % 8)
        if (result := stored.put(bytes(blob))) != ["EBADMSG"]:
            wrong[offset] = result
    assert wrong == {}
    assert stored.restored(), "the daemon is well"


@pytest.mark.limit(120)
def test_a_blob_cut_at_any_length_or_made_longer_is_ebadmsg(stored):
    step = 1 if scaled(10) == 10 else 3
    wrong = {}
    for size in range(1, len(stored.blob), step):
        if (result := stored.put(stored.blob[:size])) != ["EBADMSG"]:
            wrong[size] = result
    for extra in (b"\0", b"x" * 16, b"x" * 5000):
        if (result := stored.put(stored.blob + extra)) != ["EBADMSG"]:
            wrong[len(stored.blob + extra)] = result
    assert wrong == {}
    assert stored.restored()


NONSENSE = {"x": b"x", "zeros": b"\0" * 64, "ones": b"\xff" * 64, "many-zeros": b"\0" * 5000, "magic": b"SFSB",
            "huge-lengths": b"SFSB\x01\0\x40\0" + b"\xff" * 200}


@pytest.mark.parametrize("blob", NONSENSE.values(), ids=NONSENSE.keys())
def test_nonsense_is_ebadmsg(stored, blob):
    assert stored.put(blob) == ["EBADMSG"]
    assert stored.restored()


def test_another_type_of_redis_value_is_an_error_and_no_crash(redis, stored):
    stored.clear()
    redis.cli("RPUSH", stored.key, "a", "b")
    assert wait_until(stored.read_if_there, 10, "the mount sees it") in (["EBADMSG"], ["EIO"])
    redis.cli("DEL", stored.key)
    assert stored.restored()


def test_two_swapped_blobs_are_ebadmsg(redis, mount):
    m = mount()
    one, two = Stored(redis, m, "one", b"content one"), Stored(redis, m, "two", b"content two")
    assert one.put(two.blob) == ["EBADMSG"]
    assert two.put(one.blob) == ["EBADMSG"]
    assert one.put(one.blob) == [b"content one"] and two.put(two.blob) == [b"content two"]


def test_a_blob_moved_to_another_directory_is_ebadmsg(redis, mount):
    m = mount()
    os.mkdir(m / "d")
    one, two = Stored(redis, m, "f", b"content one"), Stored(redis, m, "d/f", b"content two")
    assert two.put(one.blob) == ["EBADMSG"]
    assert two.put(two.blob) == [b"content two"]


def test_old_metadata_with_new_content_is_ebadmsg(redis, mount):
    m = mount()
    stored = Stored(redis, m, content=b"old content")
    old = stored.blob
    save(m / "f", b"new content")
    new = redis.cli("GET", stored.key)
    assert new != old and len(new) == len(old)
    content = HEADER + struct.unpack_from("<I", new, 12)[0] + TAG
    mixed = {"old header and metadata": old[:content] + new[content:], "old content": new[:content] + old[content:],
             "old metadata": new[:HEADER] + old[HEADER:content] + new[content:],
             "old header": old[:HEADER] + new[HEADER:], "old content's tag": new[:-TAG] + old[-TAG:]}
    assert {what: stored.put(blob) for what, blob in mixed.items()} == {what: ["EBADMSG"] for what in mixed}
    assert stored.put(new) == [b"new content"]


def test_a_large_tampered_session_gives_no_byte_of_its_content(redis, mount):
    m = mount()
    stored = Stored(redis, m, content=b"x" * 1_000_001)
    for offset in (len(stored.blob) // 2, len(stored.blob) - 1):
        blob = bytearray(stored.blob)
        blob[offset] ^= 1
        assert stored.put(bytes(blob)) == ["EBADMSG"]
    assert stored.put(stored.blob) == [b"x" * 1_000_001]


def test_one_tampered_session_does_not_hide_the_others(redis, mount):
    m = mount()
    stored = Stored(redis, m)
    save(m / "other", b"fine")
    stored.put(stored.blob[:-1] + b"?")
    assert load(m / "other") == b"fine"
    assert "other" in os.listdir(m.path)


def test_another_key_opens_nothing(mount, work):
    a = mount("a")
    save(a / "f", CONTENT)
    b = mount("b", start=False, keyfile=make_key(work / "other-key"))
    try:
        b.start()
    except AssertionError:
        assert "key" in b.tail(), "refused at the start, with the reason"
        return
    assert outcome(load, b / "f") in ("ENOENT", "EBADMSG")
    assert outcome(os.listdir, b.path) in ([], "EBADMSG")
    assert load(a / "f") == CONTENT


def test_the_wrong_key_under_the_right_id_is_ebadmsg(mount, work):
    """Names are hashed with the key of the lowest id, contents sealed with the first of the file."""
    names, right, wrong = (os.urandom(32).hex() for _ in range(3))
    d = mount("d", keyfile=make_key(work / "key-d", names))  # first: the root's own entry is sealed by what all have
    a = mount("a", keyfile=make_key(work / "key-a", f"2:{right}\n1:{names}"))
    b = mount("b", keyfile=make_key(work / "key-b", f"1:{names}\n2:{wrong}"))
    c = mount("c", keyfile=make_key(work / "key-c", f"1:{names}\n2:{right}"))
    save(a / "f", CONTENT)
    assert outcome(load, b / "f") == "EBADMSG"
    assert load(c / "f") == CONTENT
    assert outcome(load, d / "f") in ("EBADMSG", "ENOKEY")


MARKS = {"content": b"CONTENTcontentMARKmark0123", "name": b"sess_NAMEnameMARKmark4567",
         "directory": b"dirMARKmark89ab", "attribute name": b"user.attrMARKmarkcdef",
         "attribute value": b"valueMARKmarkfedc"}


def readable_memory(pid):
    """All that the process @pid has in writable memory."""
    with open(f"/proc/{pid}/maps", encoding="ascii") as maps, open(f"/proc/{pid}/mem", "rb", 0) as memory:
        for line in maps:
            span, permissions = line.split()[:2]
            if not permissions.startswith("rw"):
                continue
            start, end = (int(part, 16) for part in span.split("-"))
            try:
                memory.seek(start)
                yield memory.read(end - start)
            except (OSError, ValueError, OverflowError):
                continue


def fill_with_marks(m):
    """Leave every mark in each place where a session can carry one; in caches, in logs of errors too."""
    directory = m / MARKS["directory"].decode()
    os.mkdir(directory)
    for i in range(20):
        path = directory / (MARKS["name"].decode() + str(i))
        save(path, MARKS["content"] * (1 + 200 * (i % 3)))
        set_attr(path, MARKS["attribute name"].decode(), MARKS["attribute value"])
        os.rename(path, f"{path}-renamed")
        save(path, MARKS["content"] * 1000, writes=10)
        outcome(os.rename, path, m / "missing" / MARKS["name"].decode())
        outcome(os.mkdir, path)
    os.listdir(directory)
    return directory


@pytest.mark.redis(aof=True)
def test_no_plaintext_is_in_redis_memory_nor_in_its_files(redis, mount, keyfile, work):
    m = mount()
    fill_with_marks(m)
    key = keyfile.read_text().strip()
    searched = {**MARKS, "key": bytes.fromhex(key), "key in hex": key.encode(), "key in HEX": key.upper().encode()}
    m.restart()
    dump = ["redis-cli", "-s", redis.socket, "--rdb", work / "dump.rdb"]
    subprocess.run(dump, check=True, capture_output=True, timeout=30)
    redis.cli("BGREWRITEAOF")
    files = [work / "dump.rdb", redis.log, *(work / "appendonlydir").iterdir()]
    assert (work / "dump.rdb").stat().st_size > 10_000
    found = [f"{what} in {path.name}" for path in files if path.exists()
             for what, mark in searched.items() if mark in path.read_bytes()]
    if os.geteuid() == 0:
        pieces = list(readable_memory(redis.process.pid))
        assert sum(map(len, pieces)) > 100_000
        found += [f"{what} in memory" for what, mark in searched.items() if any(mark in piece for piece in pieces)]
    assert found == []


def test_keys_in_redis_have_the_documented_form_and_say_nothing_of_names(redis, mount):
    m = mount()
    for name in ("a", "b" * 255, "sess_0123456789abcdef"):
        save(m / name, b"x")
    for key in redis.keys("*"):
        parts = key.split(b":")
        assert parts[:2] == [b"sfs", b"test"] and [len(part) for part in parts[2:]] == [22, 22], key


def test_logs_contain_neither_names_nor_contents_nor_keys(redis, mount, keyfile):
    m = mount()
    roots = set(redis.keys())  # a mount whose root does not open is refused
    directory = fill_with_marks(m)
    name = MARKS["name"].decode()
    for key in set(redis.keys()) - roots:  # damage everything else, so that there is something to be logged
        try:
            redis.cli("SETRANGE", key, 70, "damaged!")
        except RedisError:
            pass
    m.restart()
    for path in (directory, directory / f"{name}1", m / name):
        outcome(os.stat, path)
        outcome(load, path)
    outcome(os.listdir, m.path)
    outcome(os.listdir, directory)
    m.stop()
    log = m.log.read_bytes()
    key = keyfile.read_text().strip().encode()
    assert [what for what, mark in {**MARKS, "key": key}.items() if mark in log] == []


def test_the_key_shows_neither_in_ps_nor_in_the_environment(mount, keyfile):
    m = mount()
    key = keyfile.read_bytes().strip()
    for name in ("cmdline", "environ"):
        with open(f"/proc/{m.process.pid}/{name}", "rb") as file:
            assert key not in file.read()
