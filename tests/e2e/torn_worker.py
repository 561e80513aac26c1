"""
Writers and readers of checksummed sessions, for test_torn.py and others. Run as a program:

    torn_worker.py write DIRECTORY LOCKS PREFIX COUNT STYLE SECONDS SEED MAX_WRITES
        -> {"last": {name: [size, sha256]}, "saves": n}
    torn_worker.py read DIRECTORY LOCKS PREFIXES COUNT locked|unlocked SECONDS SEED
        -> {"reads": n, "overlapped": n, "violations": [text]}

A payload of 48 bytes and more is: its length and its sequence number (8 bytes each), SHA-256 of these and the body, the
body. A smaller one is a row of bytes that its length and its first byte determine.
"""
import errno
import fcntl
import hashlib
import json
import os
import random
import struct
import sys
import time

HEADER = 48
SIZES = [1, 2, 17, 47, 48, 200, 2000, 4095, 4096, 4097, 8192]


def payload(size, seq, rng):
    if size < HEADER:
        return tiny(size, seq & 0xff)
    body = rng.randbytes(size - HEADER)
    head = struct.pack("<QQ", size, seq)
    return head + hashlib.sha256(head + body).digest() + body


def tiny(size, first):
    return bytes((first + i * (7 + size)) & 0xff for i in range(size))


def check(data):
    """Return: the sequence number, -1 where the payload is too small to have one, or None if the checksum fails."""
    if len(data) < HEADER:
        return -1 if data and data == tiny(len(data), data[0]) else None
    size, seq = struct.unpack_from("<QQ", data)
    if size != len(data) or hashlib.sha256(data[:16] + data[HEADER:]).digest() != data[16:HEADER]:
        return None
    return seq


def any_size(rng):
    """Mostly small, sometimes up to 4 MiB: an unlocked reader of a large one overlaps with its take-over more often."""
    kind = rng.random()
    if kind < 0.4:
        return rng.choice(SIZES)
    if kind < 0.75:
        return int(2 ** rng.uniform(0, 12))
    return int(2 ** rng.uniform(12, 16 if kind < 0.96 else 22))


def write_parts(fd, data, n_writes):
    step = max(1, -(-len(data) // n_writes))
    for start in range(0, len(data), step):
        part = memoryview(data)[start:start + step]
        while part:
            part = part[os.write(fd, part):]


def save(directory, name, data, n_writes, style):
    """@style: "trunc" (open with O_TRUNC), "ftruncate" (afterwards), "rename" (a new file, renamed over)"""
    path = os.path.join(directory, name)
    target = path + ".tmp" if style == "rename" else path
    flags = os.O_WRONLY | os.O_CREAT | (os.O_TRUNC if style != "ftruncate" else 0)
    fd = os.open(target, flags, 0o600)
    try:
        if style == "ftruncate":
            os.ftruncate(fd, 0)
        write_parts(fd, data, n_writes)
    finally:
        os.close(fd)
    if style == "rename":
        os.rename(target, path)


def lock_of(locks, name):
    return os.open(os.path.join(locks, name), os.O_RDWR | os.O_CREAT, 0o600)


def write(directory, locks, prefix, count, style, seconds, seed, max_writes):
    rng, deadline, seq, last = random.Random(seed), time.monotonic() + seconds, 0, {}
    names = [f"{prefix}{i}" for i in range(count)]
    locked = {name: lock_of(locks, name) for name in names}
    while time.monotonic() < deadline:
        for name in names:  # the first round fills them all
            if seq >= count:
                name = rng.choice(names)
            seq += 1
            data = payload(any_size(rng), seq, rng)
            n_writes = min(len(data), int(max_writes ** rng.random()) if rng.random() < 0.7 else 1)
            fcntl.flock(locked[name], fcntl.LOCK_EX)
            save(directory, name, data, n_writes, style)
            fcntl.flock(locked[name], fcntl.LOCK_UN)
            last[name] = [len(data), hashlib.sha256(data).hexdigest()]
    return {"last": last, "saves": seq}


class Reader:
    def __init__(self, directory, locks, is_locked):
        self.directory, self.locks, self.is_locked = directory, locks, is_locked
        self.locked, self.newest = {}, {}
        self.n_reads = self.n_overlapped = 0
        self.violations = []

    def look(self, name, with_version):
        """One read of @name: open, fstat, read all, close."""
        fd = os.open(os.path.join(self.directory, name), os.O_RDONLY)
        try:
            before = self.identity(fd, with_version)
            parts = []
            while part := os.read(fd, 1 << 20):
                parts.append(part)
            data = b"".join(parts)
            if not data and name not in self.newest:
                return  # created, and not written yet
            seq = check(data)
            self.n_reads += 1
            if seq is None:
                after = self.identity(fd, with_version)
                self.judge(name, before, after, f"checksum of {len(data)} bytes, begins {data[:16].hex()}")
            elif 0 <= seq < self.newest.get(name, 0):
                self.violations.append(f"{name}: version {seq} after {self.newest[name]}: it went back")
            else:
                self.newest[name] = max(seq, self.newest.get(name, 0))
        finally:
            os.close(fd)

    @staticmethod
    def identity(fd, with_version):
        status = os.fstat(fd)
        version = os.getxattr(fd, "user.session.version").decode() if with_version else None
        return status.st_mtime_ns, status.st_size, version

    def judge(self, name, before, after, what):
        if before != after and not self.is_locked:
            self.n_overlapped += 1
        else:
            self.violations.append(f"{name}: {what}; {before} -> {after}")

    def read(self, name, with_version):
        try:
            self.look(name, with_version)
        except OSError as error:
            # ESTALE: a descriptor of what a rename on the other instance has replaced meanwhile.
            if error.errno == errno.ESTALE and not self.is_locked:
                self.n_overlapped += 1
            elif error.errno != errno.ENOENT or name in self.newest:
                self.violations.append(f"{name}: {error}")

    def run(self, names, seconds, seed):
        rng, deadline = random.Random(seed), time.monotonic() + seconds
        while time.monotonic() < deadline and len(self.violations) < 20:
            name = rng.choice(names)
            if self.is_locked:
                if name not in self.locked:
                    self.locked[name] = lock_of(self.locks, name)
                fcntl.flock(self.locked[name], fcntl.LOCK_SH)
            self.read(name, rng.random() < 0.5)
            if self.is_locked:
                fcntl.flock(self.locked[name], fcntl.LOCK_UN)
        return {"reads": self.n_reads, "overlapped": self.n_overlapped, "violations": self.violations}


def main(words):
    directory, locks, prefix, count, style = words[1], words[2], words[3], int(words[4]), words[5]
    if words[0] == "write":
        print(json.dumps(write(directory, locks, prefix, count, style, float(words[6]), int(words[7]), int(words[8]))))
    else:
        names = [f"{each}{i}" for each in prefix.split(",") for i in range(count)]
        reader = Reader(directory, locks, style == "locked")
        print(json.dumps(reader.run(names, float(words[6]), int(words[7]))))


if __name__ == "__main__":
    main(sys.argv[1:])
