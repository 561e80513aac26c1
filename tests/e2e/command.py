"""
The command line as a user runs it: into the background, with one line on standard error when it fails.

A daemon in the background is nobody's child, so Command finds what belongs to a test by its working directory, which is
fresh for each test and stands in the command line, or is where the process is.
"""
import json
import os
import signal
import subprocess
from pathlib import Path

from harness import CONTROL, PROGRAM, get_attr, mount_devices, spawn, supervisor, unmount_lazily, wait_until

START_S, END_S = 50, 30
PASSWORD = "SESSIONFS_REDIS_PASSWORD"


class Result:
    """How a command ended."""

    def __init__(self, argv, status, out, err):
        self.argv, self.status, self.out, self.err = argv, status, out, err

    def __repr__(self):
        return f"{self.argv} -> {self.status}\nstdout: {self.out}stderr: {self.err}"

    def fails(self, status, *parts):
        """It failed with @status and said why in exactly one line, which has all of @parts."""
        name = Path(self.argv[0]).name
        assert self.status == status, self
        assert self.out == "", self
        assert self.err.endswith("\n") and self.err.count("\n") == 1, self
        assert self.err.startswith(f"{name}: "), self
        for part in parts:
            assert str(part).lower() in self.err.lower(), f"{part!r} is not in {self}"
        return self

    def works(self):
        assert (self.status, self.err) == (0, ""), self
        return self


def execute(argv, seconds=START_S, **options):
    argv = [str(word) for word in argv]
    process = spawn(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options)
    out, err = process.communicate(timeout=seconds)
    supervisor.remove(process)
    return Result(argv, process.returncode, out.decode(errors="replace"), err.decode(errors="replace"))


def processes_of(work):
    """The living processes that have @work in their command line or are in it: pid -> command line."""
    found = {}
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        try:
            words = (entry / "cmdline").read_bytes().split(b"\0")
            place = os.readlink(entry / "cwd")
            state = (entry / "stat").read_bytes().rpartition(b") ")[2][:1]
        except OSError:
            continue
        if state not in (b"Z", b"X") and (f"{work}/" in f"{place}/" or any(os.fsencode(work) in word for word in words)):
            found[int(entry.name)] = b" ".join(words).decode(errors="replace")
    return found


def is_over(pid):
    """All of its threads have ended, and given up what the process held, whether somebody has waited for it or not."""
    try:
        state = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b") ")[2][:1]
        return state in (b"Z", b"X") and len(os.listdir(f"/proc/{pid}/task")) == 1
    except OSError:
        return True


class Command:
    """Runs the program for one test."""

    def __init__(self, work):
        self.work, self.connections = Path(work), set()

    def environment(self, changes):
        environment = {**os.environ, "XDG_STATE_HOME": str(self.work / "xdg"), **(changes or {})}
        if changes is None or PASSWORD not in changes:
            environment.pop(PASSWORD, None)
        for name in ("ASAN_OPTIONS", "TSAN_OPTIONS", "UBSAN_OPTIONS"):  # a daemon's standard error goes nowhere
            environment[name] = ":".join(filter(None, [environment.get(name), f"log_path={self.work}/sanitizer"]))
        return environment

    def argv(self, *args):
        assert PROGRAM.exists(), f"{PROGRAM} is missing: build first, or set SESSIONFS_BUILD"
        return [PROGRAM, *args]

    def __call__(self, *args, env=None, prefix=(), cwd="/", seconds=START_S, **options):
        """Run it until the parent returns."""
        result = execute([*prefix, *self.argv(*args)], seconds, env=self.environment(env), cwd=str(cwd), **options)
        result.argv = result.argv[len(prefix):]
        self.learn_connections()
        return result

    def start(self, *args, env=None, cwd="/", **options):
        """The same, not waited for."""
        return spawn(self.argv(*args), env=self.environment(env), cwd=str(cwd), stdout=subprocess.PIPE,
                     stderr=subprocess.PIPE, **options)

    def ctl(self, *args):
        return execute([CONTROL, *args], 30, env=self.environment(None))

    def mounts(self):
        return [path for path in mount_devices() if f"{path}/".startswith(f"{self.work}/")]

    def learn_connections(self):
        for path, minor in mount_devices().items():
            if path.startswith(f"{self.work}/") and minor not in self.connections:
                self.connections.add(minor)
                supervisor.add_connection(minor)

    def directory(self, name="m"):
        path = self.work / name
        path.mkdir(exist_ok=True)
        return path

    def pid(self, path):
        return json.loads(get_attr(path, "user.session.status"))["pid"]

    def wait_ended(self, path, pid):
        """The daemon @pid is gone, and its mount with it."""
        wait_until(lambda: pid not in processes_of(self.work), END_S, f"the daemon of {path} has ended")
        assert str(path) not in mount_devices()

    def terminate(self, path, number=signal.SIGTERM):
        pid = self.pid(path)
        os.kill(pid, number)
        self.wait_ended(path, pid)

    def kill9(self, path):
        """The daemon dies, its dead mount stays."""
        pid = self.pid(path)
        os.kill(pid, signal.SIGKILL)
        wait_until(lambda: is_over(pid), END_S, "the daemon is dead")

    def leaves_nothing(self, but=()):
        """No mount and no process of this test, but those of the pids @but."""
        assert self.mounts() == []
        wait_until(lambda: not set(processes_of(self.work)) - set(but), END_S, "no process is left")

    def clean_up(self):
        """Return: what sanitizers had to say."""
        for path in self.mounts():
            try:
                os.kill(self.pid(path), signal.SIGTERM)
            except (OSError, ValueError):
                pass
            unmount_lazily(path)
        try:
            wait_until(lambda: not processes_of(self.work), 15, "the end of what the test started")
        except AssertionError:
            for pid in processes_of(self.work):
                os.kill(pid, signal.SIGKILL)
        for minor in self.connections:
            supervisor.remove_connection(minor)
        return "".join(path.read_text(errors="replace") for path in self.work.glob("sanitizer*"))
