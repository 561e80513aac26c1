"""
What harness.py stands on: the environment, the processes of a test and who ends them, polling, looking at files.

Everything that is started is known to the watchdog (watchdog.py), which ends it when a test's time is up. Environment:
SESSIONFS_BUILD (the build directory; default: build/ of this tree), SESSIONFS_TEST_SCALE (scales the load of tests).
"""
import ctypes
import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import watchdog

HERE = Path(__file__).resolve().parent
TOP = HERE.parent.parent
BUILD = Path(os.environ.get("SESSIONFS_BUILD", TOP / "build")).resolve()
PROGRAM = BUILD / "src" / "sessionfs"
CONTROL = BUILD / "src" / "ctl" / "sessionfsctl"
SCALE = float(os.environ.get("SESSIONFS_TEST_SCALE", "1"))
PYTHON = "/usr/bin/python3"  # one that other users can run as well
NOBODY = 65534
libc = ctypes.CDLL(None, use_errno=True)


class HardLimit(BaseException):
    """The test's time is up. Not an Exception, so that no `except` of a test swallows it."""


def scaled(count, least=1):
    """@count times SESSIONFS_TEST_SCALE, at least @least."""
    return max(least, int(count * SCALE))


def wait_until(predicate, seconds=20, what=""):
    """Poll until @predicate() is true; return what it gave. The last value shows in the failure."""
    deadline, pause = time.monotonic() + seconds, 0.001
    while True:
        value = predicate()
        if value:
            return value
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {seconds} s: {what or predicate} (last: {value!r})")
        time.sleep(pause)
        pause = min(pause * 1.5, 0.05)


# --- files -----------------------------------------------------------------------------------------------------------

def outcome(function, *args, **kwargs):
    """What @function returns, or the name of the errno it failed with ("ENOENT")."""
    try:
        return function(*args, **kwargs)
    except OSError as error:
        name = errno.errorcode.get(error.errno, str(error.errno))
        return "ENOTSUP" if name == "EOPNOTSUPP" else name


def save(path, data, writes=1, mode=0o600, dir_fd=None):
    """Replace the content: open(O_TRUNC), @writes write()s, close."""
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode, dir_fd=dir_fd)
    try:
        step = max(1, -(-len(data) // writes))
        for start in range(0, len(data), step):
            write_all(fd, data[start:start + step])
    finally:
        os.close(fd)


def write_all(fd, data):
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view):]


def load(path, dir_fd=None):
    """The whole content. Not open(): that sends an ioctl more."""
    fd = os.open(path, os.O_RDONLY, dir_fd=dir_fd)
    try:
        return read_all(fd)
    finally:
        os.close(fd)


def read_all(fd):
    parts = []
    while part := os.read(fd, 1 << 20):
        parts.append(part)
    return b"".join(parts)


def drop_pages(path):
    """Take the file's pages out of the kernel's cache, so that the next read asks the daemon."""
    fd = os.open(path, os.O_RDONLY)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(fd)


def get_attr(path, name):
    """An extended attribute as text, by one request (os.getxattr() asks twice for long ones)."""
    buffer = ctypes.create_string_buffer(1 << 16)
    size = libc.getxattr(os.fsencode(path), name.encode(), buffer, len(buffer))
    if size < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), str(path))
    return buffer.raw[:size].decode()


def set_attr(path, name, value, flags=0):
    os.setxattr(path, name, value.encode() if isinstance(value, str) else value, flags)


# --- processes -------------------------------------------------------------------------------------------------------

class Supervisor:
    """What the running test has started, as the watchdog knows it. One for the suite."""

    def __init__(self):
        self.process = None
        self.children, self.connections = {}, set()
        self.logs = {}  # name -> path, of the running test, for the report
        self.has_fired = self.is_reported = False

    def tell(self, line):
        if self.process is None or self.process.poll() is not None:
            self.process = subprocess.Popen([sys.executable, str(HERE / "watchdog.py"), str(os.getpid())],
                                            stdin=subprocess.PIPE, start_new_session=True)
        self.process.stdin.write(line.encode() + b"\n")
        self.process.stdin.flush()

    def add(self, process):
        self.children[process.pid] = process
        self.tell(f"+pid {process.pid}")

    def remove(self, process):
        if self.children.pop(process.pid, None):
            self.tell(f"-pid {process.pid}")

    def add_connection(self, number):
        self.connections.add(number)
        self.tell(f"+conn {number}")

    def remove_connection(self, number):
        self.connections.discard(number)
        self.tell(f"-conn {number}")

    def arm(self, seconds):
        self.has_fired = self.is_reported = False
        self.logs.clear()
        signal.signal(signal.SIGALRM, self.alarm)
        self.tell(f"arm {seconds}")
        signal.alarm(int(seconds) + 5)  # should the watchdog be gone

    def disarm(self):
        signal.alarm(0)
        self.end_children()
        self.tell("disarm")

    def alarm(self, _number, _frame):
        self.has_fired = True
        signal.alarm(watchdog.GRACE_S + 5)
        watchdog.end(self.children, self.connections)
        raise HardLimit("time is up: the test's processes were killed, its FUSE connections aborted")

    def end_children(self):
        watchdog.end(self.children, ())
        for process in list(self.children.values()):
            process.wait()
            self.remove(process)


supervisor = Supervisor()


def spawn(argv, **options):
    """subprocess.Popen, but the watchdog knows it, and neither it nor its process group outlives the test."""
    options.setdefault("stdin", subprocess.DEVNULL)
    options["start_new_session"] = True
    process = subprocess.Popen([str(word) for word in argv], **options)
    supervisor.add(process)
    return process


def finish(process, seconds=30):
    """Wait for a spawn()ed process. Return: (its exit status, its output as text)."""
    try:
        output, _ = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        watchdog.end([process.pid], ())
        raise
    supervisor.remove(process)
    return process.returncode, (output or b"").decode(errors="replace")


def run(argv, seconds=30, **options):
    return finish(spawn(argv, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, **options), seconds)


def run_python(code, *args, user=None, seconds=30):
    """Run @code in a process of its own, as @user. Return: (status, output)."""
    identity = {} if user is None else {"user": user, "group": user, "extra_groups": []}
    return run([PYTHON, "-c", code, *args], seconds, cwd="/", **identity)
