"""
What the tests import: mounts of sessionfs, and what base.py (processes, polling, files) and server.py (Redis) have.
"""
import json
import os
import re
import shutil
import signal
import socket
import subprocess
from pathlib import Path

import watchdog
from base import (BUILD, CONTROL, HERE, NOBODY, PROGRAM, PYTHON, SCALE, TOP, HardLimit, drop_pages, finish, get_attr,
                  libc, load, outcome, read_all, run, run_python, save, scaled, set_attr, spawn, supervisor, wait_until,
                  write_all)
from server import Redis, RedisError, RespClient

__all__ = ["BUILD", "CONTROL", "HERE", "NOBODY", "PROGRAM", "PYTHON", "SCALE", "TOP", "HardLimit", "Mount", "Redis",
           "RedisError", "RespClient", "drop_pages", "finish", "free_port", "get_attr", "libc", "load", "make_key",
           "mount_devices", "outcome", "read_all", "remove_tree", "requests_during", "run", "run_python", "save",
           "scaled", "set_attr", "spawn", "supervisor", "unmount_lazily", "wait_until", "write_all"]

START_S = 30  # how long a daemon may take to be ready; sanitizers are slow
END_S = 30    # and to end after SIGTERM
REPORTS = re.compile(r"ERROR: AddressSanitizer|runtime error:|WARNING: ThreadSanitizer|LeakSanitizer")


def mount_devices():
    """What is mounted: path -> minor number of the device (for FUSE: the connection). Touches no mount."""
    found = {}
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        fields = line.split(" ")
        path = re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), fields[4])
        found[path] = int(fields[2].partition(":")[2])
    return found


def unmount_lazily(path):
    """Take @path out of the tree whatever its state, as often as it is mounted."""
    for _ in range(8):
        minor = mount_devices().get(str(path))
        if minor is None:
            return
        if libc.umount2(os.fsencode(path), 2 | 8) != 0:  # MNT_DETACH | UMOUNT_NOFOLLOW
            subprocess.run(["fusermount3", "-uz", str(path)], capture_output=True, timeout=20, check=False)
    raise AssertionError(f"cannot unmount {path}")


def make_key(path, text=None):
    """A key file with mode 0600; a new random key unless @text is given."""
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    os.write(fd, (text or os.urandom(32).hex()).encode() + b"\n")
    os.close(fd)
    return path


class Mount:
    """One instance: a daemon in the foreground and its mountpoint. Options are those of -o; True for a bare word."""

    def __init__(self, work, name, source, user=None, **options):
        self.path, self.log = Path(work) / name, Path(work) / f"{name}.log"
        self.source, self.user, self.options = source, user, options
        self.process, self.connection = None, None
        self.is_expected_dead = True
        self.problems = []

    def __truediv__(self, name):
        return self.path / name

    def argv(self):
        options = ",".join(key if value is True else f"{key}={value}" for key, value in self.options.items())
        return [str(PROGRAM), self.source, str(self.path), "-o", options, "-f"]

    def environment(self):
        environment = dict(os.environ)
        for name in ("ASAN_OPTIONS", "TSAN_OPTIONS", "UBSAN_OPTIONS"):
            environment[name] = ":".join(filter(None, [environment.get(name), "print_stacktrace=1"]))
        return environment

    def start(self):
        """Start the daemon and wait until the mount answers."""
        assert PROGRAM.exists(), f"{PROGRAM} is missing: build first, or set SESSIONFS_BUILD"
        unmount_lazily(self.path)
        self.path.mkdir(exist_ok=True)
        identity = {}
        if self.user is not None:
            os.chown(self.path, self.user, self.user)
            identity = {"user": self.user, "group": self.user, "extra_groups": []}
        with open(self.log, "ab") as log:
            self.process = spawn(self.argv(), stdout=log, stderr=log, cwd="/", env=self.environment(), **identity)
        supervisor.logs[self.path.name] = self.log
        self.is_expected_dead = False
        wait_until(self.is_mounted_or_over, START_S, f"{self.path} is mounted")
        if self.process.poll() is not None:
            self.is_expected_dead = self.process.returncode >= 0  # it refused to start: this report is enough
            raise AssertionError(f"the daemon ended with {self.process.returncode}: {self.tail()}")
        os.statvfs(self.path)
        return self

    def is_mounted_or_over(self):
        minor = mount_devices().get(str(self.path))
        if minor is not None and self.connection is None:
            self.connection = minor
            supervisor.add_connection(minor)
        return minor is not None or self.process.poll() is not None

    def is_mounted(self):
        return str(self.path) in mount_devices()

    def tail(self, n_lines=60):
        lines = self.log.read_text(errors="replace").splitlines() if self.log.exists() else []
        return "\n".join(lines[-n_lines:])

    def ended(self, seconds=END_S):
        """Wait until the daemon has ended. Return: its exit status."""
        self.is_expected_dead = True
        status = self.process.wait(seconds)
        supervisor.remove(self.process)
        self.forget_connection()
        return status

    def forget_connection(self):
        if self.connection is not None:
            supervisor.remove_connection(self.connection)
            self.connection = None

    def stop(self):
        """SIGTERM: the clean end. Fails unless it exits with 0 and leaves no mount behind."""
        self.process.send_signal(signal.SIGTERM)
        status = self.ended()
        assert status == 0, f"exit status {status} after SIGTERM: {self.tail()}"
        assert not self.is_mounted(), "still mounted after SIGTERM"

    def kill9(self, unmount=True):
        """SIGKILL; the dead mount is taken away unless @unmount is false."""
        self.is_expected_dead = True
        self.process.kill()
        self.ended()
        if unmount:
            unmount_lazily(self.path)

    def restart(self):
        self.stop()
        return self.start()

    def status(self):
        return json.loads(get_attr(self.path, "user.session.status"))

    def requests(self):
        return self.status()["requests"]

    def is_alive(self):
        return self.process is not None and self.process.poll() is None

    def end(self, has_server=True):
        """End it in any state, leave nothing behind. Return: what was wrong, as a list of texts."""
        name = self.path.name
        if self.process and self.process.poll() is not None and not self.is_expected_dead and not supervisor.has_fired:
            self.problems.append(f"{name}: the daemon died by itself, status {self.process.returncode}: {self.tail()}")
        if self.is_alive():
            self.process.send_signal(signal.SIGTERM)
            try:
                status = self.process.wait(END_S if has_server else 5)
                if status != 0:
                    self.problems.append(f"{name}: exit status {status} after SIGTERM: {self.tail()}")
            except subprocess.TimeoutExpired:
                if has_server:
                    self.problems.append(f"{name}: still there {END_S} s after SIGTERM: {self.tail()}")
                watchdog.end([self.process.pid], [] if self.connection is None else [self.connection])
                self.process.wait()
        if self.process:
            supervisor.remove(self.process)
        self.forget_connection()
        unmount_lazily(self.path)
        # After the hard limit all was killed by us.
        return ([] if supervisor.has_fired else self.problems) + self.sanitizer_reports()

    def sanitizer_reports(self):
        lines = self.log.read_text(errors="replace").splitlines() if self.log.exists() else []
        first = next((i for i, line in enumerate(lines) if REPORTS.search(line)), None)
        if first is None:
            return []
        return [f"{self.path.name}: sanitizer report:\n" + "\n".join(lines[first:first + 200])]


def requests_during(mount, action):
    """The requests, by name, that @action costs; those of reading the counters are taken off."""
    mount.requests()  # the root's attributes are fresh from here on
    first, second = mount.requests(), mount.requests()
    action()
    third = mount.requests()
    cost = {name: third.get(name, 0) - 2 * second.get(name, 0) + first.get(name, 0) for name in third}
    return {name: count for name, count in cost.items() if count}


def remove_tree(work):
    """Unmount whatever is mounted below @work, then remove it. Nothing is removed through a mount."""
    for path in sorted(mount_devices(), reverse=True):
        if path.startswith(f"{work}/"):
            unmount_lazily(path)
    shutil.rmtree(work, ignore_errors=True)


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
