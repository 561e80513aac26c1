"""
The suite's watchdog: a process of its own which ends what a test started when the test's time is up.

It must be another process: a test that hangs inside a system call on a dead mount, or in a page fault of a mapping
(which holds Python's lock), runs neither signal handlers nor threads. It never touches a mount itself: it kills by pid
and aborts FUSE connections through /sys/fs/fuse/connections, after which every hung call returns with an error.

Commands on standard input, one a line: "arm SECONDS", "disarm", "+pid N", "-pid N", "+conn N", "-conn N". End of
file means that the suite itself is gone: what is still registered is ended too.
"""
import os
import select
import signal
import sys
import time

CONNECTIONS = "/sys/fs/fuse/connections"
GRACE_S = 40     # after the first alarm, for the teardown; then the next alarm
ALARMS_MAX = 3   # then the suite is aborted with a stack dump (faulthandler)


def end(pids, connections):
    """Kill @pids with their process groups (each leads its own), abort FUSE @connections. Never blocks, never fails."""
    for pid in sorted(pids):
        for number in (signal.SIGCONT, signal.SIGKILL):
            try:
                os.killpg(pid, number)
            except OSError:
                pass
    for connection in sorted(connections):
        try:
            fd = os.open(f"{CONNECTIONS}/{connection}/abort", os.O_WRONLY)
        except OSError:
            continue
        try:
            os.write(fd, b"1")
        except OSError:
            pass
        finally:
            os.close(fd)


class Watchdog:
    def __init__(self, parent):
        self.parent = parent
        self.deadline = None
        self.n_alarms = 0
        self.sets = {"pid": set(), "conn": set()}

    def command(self, line):
        word, _, value = line.partition(" ")
        if word == "arm":
            self.deadline, self.n_alarms = time.monotonic() + float(value), 0
        elif word == "disarm":
            self.deadline = None
        elif word[:1] == "+":
            self.sets[word[1:]].add(int(value))
        elif word[:1] == "-":
            self.sets[word[1:]].discard(int(value))

    def alarm(self):
        end(self.sets["pid"], self.sets["conn"])
        self.n_alarms += 1
        self.deadline = time.monotonic() + GRACE_S
        os.kill(self.parent, signal.SIGABRT if self.n_alarms > ALARMS_MAX else signal.SIGALRM)

    def run(self):
        pending = b""
        while True:
            wait = None if self.deadline is None else max(0.0, self.deadline - time.monotonic())
            if not select.select([0], [], [], wait)[0]:
                self.alarm()
                continue
            data = os.read(0, 65536)
            if not data:
                break
            *lines, pending = (pending + data).split(b"\n")
            for line in lines:
                self.command(line.decode())
        end(self.sets["pid"], self.sets["conn"])


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        Watchdog(int(sys.argv[1])).run()
    except ProcessLookupError:
        pass
