"""The default source: a private redis-server, started on demand, shared by the instances of one directory."""
import os
import shutil
import signal
import socket
import stat

import pytest

from command import Command, processes_of
from harness import NOBODY, RedisError, RespClient, load, outcome, save, unmount_lazily, wait_until

ROOT_ONLY = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")


@pytest.fixture
def sessionfs(work):
    command = Command(work)
    yield command
    for pid in processes_of(work):  # a test may have stopped a server
        os.kill(pid, signal.SIGCONT)
    report = command.clean_up()
    if report:
        pytest.fail(f"sanitizer report:\n{report}", pytrace=False)


class State:
    """The state directory of a private server."""

    def __init__(self, path, sessionfs):
        self.path, self.sessionfs = path, sessionfs
        self.source = f"local:{path}"
        self.socket = path / "redis.sock"

    def mount(self, name="m", options="ttl=1h"):
        directory = self.sessionfs.directory(name)
        self.sessionfs(self.source, directory, "-o", options).works()
        return directory

    def pid(self):
        """The server's pid, 0 if there is none: who listens on the socket."""
        with socket.socket(socket.AF_UNIX) as client:
            try:
                client.connect(str(self.socket))
            except OSError:
                return 0
            return int.from_bytes(client.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)[:4], "little")

    def call(self, *words):
        client = RespClient(self.socket)
        try:
            return client.call(*words)
        finally:
            client.close()

    def answers(self):
        try:
            return outcome(self.call, "PING") == b"PONG"
        except (RedisError, ConnectionError):
            return False

    def is_stopped(self):
        return not processes_of(self.path) and not self.socket.exists()


@pytest.fixture
def state(work, sessionfs):
    return State(work / "st", sessionfs)


def mode(path):
    return stat.S_IMODE(os.stat(path).st_mode)


def test_a_mountpoint_alone_is_enough(sessionfs, work):
    path = sessionfs.directory()
    sessionfs(path).works()
    state = State(work / "xdg" / "sessionfs", sessionfs)
    assert mode(state.path) == 0o700
    assert mode(state.socket) == 0o600
    assert mode(state.path / "key") == 0o600
    save(path / "s", b"hello")
    assert load(path / "s") == b"hello"
    sessionfs.terminate(path)
    assert state.is_stopped()


@pytest.mark.parametrize("source", ["sessionfs", "none", "", "local"])
def test_the_first_column_of_fstab_may_say_nothing(sessionfs, work, source):
    path = sessionfs.directory()
    sessionfs(source, path).works()
    assert (work / "xdg" / "sessionfs" / "redis.sock").exists()
    sessionfs.terminate(path)
    sessionfs.leaves_nothing()


def test_the_server_is_private_and_keeps_its_data(state, sessionfs):
    path = state.mount()
    config = {name: state.call("CONFIG", "GET", name)[1] for name in ("port", "appendonly", "appendfsync", "save", "unixsocketperm")}
    assert config == {"port": b"0", "appendonly": b"yes", "appendfsync": b"everysec", "save": b"", "unixsocketperm": b"600"}
    sessionfs.terminate(path)


def test_instances_share_one_server_and_the_last_stops_it(state, sessionfs):
    first, second = state.mount("a"), state.mount("b")
    pid = state.pid()
    save(first / "s", b"shared")
    assert load(second / "s") == b"shared"
    sessionfs.terminate(first)
    assert state.pid() == pid
    assert load(second / "s") == b"shared"
    sessionfs.terminate(second)
    assert state.is_stopped()


def test_sessions_outlive_the_server(state, sessionfs):
    path = state.mount()
    for i in range(20):
        save(path / f"s{i}", b"%d" % i)
    sessionfs.terminate(path)
    assert state.is_stopped()
    state.mount()
    assert [load(path / f"s{i}") for i in range(20)] == [b"%d" % i for i in range(20)]
    sessionfs.terminate(path)


def test_two_directories_are_two_servers(state, sessionfs, work):
    other = State(work / "other", sessionfs)
    first, second = state.mount("a"), other.mount("b")
    assert state.pid() != other.pid()
    save(first / "s", b"x")
    assert outcome(load, second / "s") == "ENOENT"
    sessionfs.terminate(first)
    assert other.pid()
    sessionfs.terminate(second)


def test_the_kill_of_one_instance_does_not_touch_the_server(state, sessionfs):
    first, second = state.mount("a"), state.mount("b")
    pid = state.pid()
    save(first / "s", b"x")
    sessionfs.kill9(first)
    assert state.pid() == pid
    assert load(second / "s") == b"x"
    sessionfs.terminate(second)
    wait_until(state.is_stopped, what="the server is stopped, and the guardian of the killed one has gone")
    unmount_lazily(first)


def test_the_kill_of_the_last_instance_leaves_a_server_that_is_used_again(state, sessionfs):
    path = state.mount()
    pid = state.pid()
    save(path / "s", b"x")
    sessionfs.kill9(path)
    assert state.pid() == pid
    unmount_lazily(path)
    state.mount()
    assert state.pid() == pid
    assert load(path / "s") == b"x"
    sessionfs.terminate(path)
    assert state.is_stopped()


def test_instances_that_start_at_once_share_one_server(state, sessionfs):
    paths = [sessionfs.directory(f"m{i}") for i in range(6)]
    started = [sessionfs.start(state.source, path) for path in paths]
    for process in started:
        out, err = process.communicate(timeout=50)
        assert (process.returncode, out, err) == (0, b"", b"")
    sessionfs.learn_connections()
    servers = [pid for pid, words in processes_of(state.path).items() if words.startswith("redis-server")]
    assert servers == [state.pid()]
    save(paths[0] / "s", b"x")
    assert {load(path / "s") for path in paths} == {b"x"}
    ends = [(path, sessionfs.pid(path)) for path in paths]
    for _, pid in ends:
        os.kill(pid, signal.SIGTERM)
    for path, pid in ends:
        sessionfs.wait_ended(path, pid)
    assert state.is_stopped()


def test_a_server_that_dies_is_started_again(state, sessionfs):
    path = state.mount(options="ttl=1h,timeout=300ms")
    save(path / "s", b"before")
    pid = state.pid()
    os.kill(pid, signal.SIGKILL)
    wait_until(lambda: state.pid() not in (0, pid) and state.answers(), 20, "another server")
    wait_until(lambda: outcome(save, path / "t", b"after") is None, 20, "a save")
    assert load(path / "t") == b"after"
    sessionfs.terminate(path)
    assert state.is_stopped()


def test_a_stale_socket_is_no_obstacle(state, sessionfs):
    path = state.mount()
    pid = state.pid()
    sessionfs.kill9(path)
    unmount_lazily(path)
    os.kill(pid, signal.SIGKILL)
    wait_until(lambda: not state.pid(), 10, "the server is dead")
    assert state.socket.exists()
    state.mount()
    save(path / "s", b"x")
    sessionfs.terminate(path)
    assert state.is_stopped()


def test_a_busy_server_is_waited_for(state, sessionfs):
    first = state.mount("a")
    second = sessionfs.directory("b")
    pid = state.pid()
    os.kill(pid, signal.SIGSTOP)
    process = sessionfs.start(state.source, second, "-o", "timeout=5s")
    wait_until(lambda: len([p for p, words in processes_of(sessionfs.work).items() if str(second) in words]) == 2, 10,
               "parent and daemon")
    os.kill(pid, signal.SIGCONT)
    _, err = process.communicate(timeout=40)
    assert (process.returncode, err) == (0, b"")
    sessionfs.learn_connections()
    sessionfs.terminate(second)
    sessionfs.terminate(first)
    assert state.is_stopped()


# --- failures: one line, status 1, nothing left ----------------------------------------------------------------------

def test_ending_the_command_while_it_waits_leaves_nothing(state, sessionfs):
    path = state.mount()
    sessionfs.kill9(path)
    unmount_lazily(path)
    server = state.pid()
    os.kill(server, signal.SIGSTOP)
    process = sessionfs.start(state.source, path)
    wait_until(lambda: len([p for p, words in processes_of(sessionfs.work).items() if str(path) in words]) == 2, 10,
               "parent and daemon")
    process.send_signal(signal.SIGTERM)
    # The last user stops the server; that it can, once it runs again, is the server's own matter.
    os.kill(server, signal.SIGCONT)
    _, err = process.communicate(timeout=40)
    assert process.returncode in (0, 1), err
    assert err.count(b"\n") == (1 if process.returncode else 0), err
    wait_until(lambda: str(path) not in sessionfs.mounts(), 30, "no mount is left")
    sessionfs.leaves_nothing()


def test_a_start_that_fails_stops_the_server_it_started(state, sessionfs, work):
    sessionfs(state.source, sessionfs.directory(), "-o", f"keyfile={work}/nokey").fails(1, f"{work}/nokey")
    sessionfs.leaves_nothing()
    assert state.is_stopped()


def test_a_start_that_fails_does_not_stop_the_server_of_others(state, sessionfs, work):
    path = state.mount("a")
    pid = state.pid()
    sessionfs(state.source, sessionfs.directory("b"), "-o", f"keyfile={work}/nokey").fails(1, f"{work}/nokey")
    assert state.pid() == pid
    save(path / "s", b"x")
    sessionfs.terminate(path)


def test_a_wide_open_key(state, sessionfs):
    path = state.mount()
    sessionfs.terminate(path)
    os.chmod(state.path / "key", 0o644)
    sessionfs(state.source, path).fails(1, state.path / "key", "chmod 600")
    sessionfs.leaves_nothing()


def test_sessions_without_their_key(state, sessionfs):
    path = state.mount()
    save(path / "s", b"x")
    sessionfs.terminate(path)
    os.rename(state.path / "key", state.path / "elsewhere")
    sessionfs(state.source, path).fails(1, state.path / "key", "restore")
    sessionfs.leaves_nothing()
    os.rename(state.path / "elsewhere", state.path / "key")
    state.mount()
    assert load(path / "s") == b"x"
    sessionfs.terminate(path)


def test_a_path_too_long_for_a_socket(sessionfs, work):
    long = work / ("d" * 100)
    sessionfs(f"local:{long}", sessionfs.directory()).fails(1, "107", "shorter")
    assert not long.exists()
    sessionfs.leaves_nothing()


def test_a_directory_that_others_can_enter(state, sessionfs):
    state.path.mkdir(mode=0o755)
    (state.path / "something").touch()
    sessionfs(state.source, sessionfs.directory()).fails(1, state.path, "chmod 700")
    assert mode(state.path) == 0o755
    sessionfs.leaves_nothing()


@ROOT_ONLY
def test_a_directory_of_somebody_else(state, sessionfs):
    state.path.mkdir(mode=0o700)
    os.chown(state.path, NOBODY, NOBODY)
    sessionfs(state.source, sessionfs.directory()).fails(1, state.path, "another user")
    sessionfs.leaves_nothing()


def test_a_directory_that_cannot_be_made(sessionfs, work):
    (work / "file").touch()
    sessionfs(f"local:{work}/file/st", sessionfs.directory()).fails(1, f"{work}/file/st")
    sessionfs(f"local:{work}/file", sessionfs.directory()).fails(1, f"{work}/file")
    sessionfs.leaves_nothing()


def test_damaged_data(state, sessionfs):
    path = state.mount()
    sessionfs.terminate(path)
    (state.path / "appendonlydir" / "appendonly.aof.manifest").write_text("garbage\n")
    sessionfs(state.source, path).fails(1, state.path, "redis.log")
    sessionfs.leaves_nothing()


@ROOT_ONLY
def test_redis_server_is_not_installed(state, sessionfs):
    program = os.path.realpath(shutil.which("redis-server"))
    script = f'mount --bind /dev/null {program} && exec "$0" "$@"'
    prefix = ["unshare", "--mount", "--propagation", "private", "sh", "-c", script]
    result = sessionfs(state.source, sessionfs.directory(), prefix=prefix)
    if "unshare" in result.err:
        pytest.skip("no mount namespaces here")
    result.fails(1, "redis-server is not installed", "apt-get install redis-server")
    sessionfs.leaves_nothing()


def test_the_mountpoint_is_wrong_and_no_server_is_started(state, sessionfs, work):
    sessionfs(state.source, work / "none").fails(1, "does not exist")
    assert not state.path.exists()
    sessionfs.leaves_nothing()
