"""The command line: what it accepts, how it starts and ends, and every way in which a start can fail."""
import json
import os
import shutil
import signal
import subprocess
from pathlib import Path

import pytest

from command import PASSWORD, Command, processes_of
from harness import NOBODY, PROGRAM, free_port, load, make_key, mount_devices, outcome, save, unmount_lazily, wait_until

ROOT_ONLY = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
PRIVATE = ["unshare", "--mount", "--propagation", "private", "sh", "-c"]  # a mount namespace of its own


def private_works():
    return subprocess.run([*PRIVATE, "mount -t tmpfs none /mnt"], capture_output=True, timeout=30, check=False).returncode == 0


@pytest.fixture
def sessionfs(work):
    """The program; whatever it left is ended after the test."""
    command = Command(work)
    yield command
    report = command.clean_up()
    if report:
        pytest.fail(f"sanitizer report:\n{report}", pytrace=False)


@pytest.fixture
def remote(redis, keyfile, sessionfs):
    """remote(...) mounts the test's Redis on a directory and returns that."""

    def mount(name="m", options="", source=None, env=None, flags=()):
        path = sessionfs.directory(name)
        extra = f",{options}" if options else ""
        sessionfs(source or redis.source, path, "-o", f"namespace=test,keyfile={keyfile}{extra}", *flags, env=env).works()
        return path

    return mount


# --- usage -----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("flag", ["-h", "--help"])
def test_help_goes_to_standard_output(sessionfs, flag):
    result = sessionfs(flag).works()
    assert result.out.startswith("usage: sessionfs [SOURCE] MOUNTPOINT")
    for word in ("ttl=", "namespace=", "keyfile=", "l1_size=", "max_session=", "connections=", "timeout=", "uid=", "gid=",
                 "umask=", "allow_other", PASSWORD, "redis://", "unix://", "local"):
        assert word in result.out


@pytest.mark.parametrize("flag", ["-V", "--version"])
def test_version(sessionfs, flag):
    assert sessionfs(flag).works().out.startswith("sessionfs 0.")


@pytest.mark.parametrize("args, part", [
    ((), "mountpoint is missing"),
    (("redis://localhost",), "mountpoint is missing"),
    (("a", "b", "c"), "too many arguments"),
    (("-x", "M"), "-x"),
    (("--nonsense", "M"), "--nonsense"),
    (("M", "-o"), "-o needs a value"),
    (("M", "-c"), "-c needs a value"),
    (("M", "-o", "nonsense"), "nonsense"),
    (("M", "-o", "nonsense=1"), "nonsense=1"),
    (("M", "-o", "ttl=0"), "1s to 3650d"),
    (("M", "-o", "ttl=-5s"), "1s to 3650d"),
    (("M", "-o", "ttl=1h30"), "1s to 3650d"),
    (("M", "-o", "ttl=9999999999999999999999d"), "1s to 3650d"),
    (("M", "-o", "namespace=a/b"), "namespace=a/b"),
    (("M", "-o", f"namespace={'n' * 65}"), "1 to 64"),
    (("M", "-o", "l1_size=1K"), "1M to 1T"),
    (("M", "-o", "max_session=1G"), "511M"),
    (("M", "-o", "l1_size=2M,max_session=2M"), "l1_size"),
    (("M", "-o", "connections=0"), "1 to 256"),
    (("M", "-o", "connections=257"), "1 to 256"),
    (("M", "-o", "timeout=1h"), "10ms to 5m"),
    (("M", "-o", "uid=root"), "uid=root"),
    (("M", "-o", "umask=9"), "octal"),
    (("M", "-o", "allow_other=1"), "takes no value"),
    (("M", "-o", "password=hunter2"), PASSWORD),
    (("ftp://h", "M"), "redis://"),
    (("redis://:hunter2@h:0", "M"), "port"),
    (("redis://:hunter2@h/x", "M"), "database"),
    (("redis://:hunter2%@h", "M"), "%25"),
    (("unix://relative", "M"), "must start with a /"),
    (("local:", "M"), "directory is missing"),
])
def test_bad_usage_is_one_line_and_status_2(sessionfs, args, part):
    path = sessionfs.directory()
    result = sessionfs(*[str(path) if arg == "M" else arg for arg in args]).fails(2, part)
    assert "hunter2" not in result.err
    sessionfs.leaves_nothing()


# --- failures of a start: one line, status 1, nothing left -----------------------------------------------------------

def test_no_redis_on_the_socket(sessionfs, keyfile, work):
    sessionfs(f"unix://{work}/no.sock", sessionfs.directory(), "-o", f"keyfile={keyfile}").fails(1, f"{work}/no.sock")
    sessionfs.leaves_nothing()


def test_no_redis_on_the_port(sessionfs, keyfile):
    port = free_port()
    sessionfs(f"redis://127.0.0.1:{port}", sessionfs.directory(), "-o", f"keyfile={keyfile}").fails(1, port)
    sessionfs.leaves_nothing()


def test_a_host_that_does_not_exist(sessionfs, keyfile):
    sessionfs("redis://no-such-host.invalid", sessionfs.directory(), "-o", f"keyfile={keyfile}").fails(1, "no-such-host.invalid")
    sessionfs.leaves_nothing()


def test_what_answers_is_no_redis(sessionfs, keyfile, work):
    code = ("import socket,sys\ns=socket.socket(socket.AF_UNIX)\ns.bind(sys.argv[1])\ns.listen(64)\nprint(flush=True)\n"
            "while 1:\n c=s.accept()[0]\n c.recv(99)\n c.sendall(b'220 smtp ready\\r\\n')\n")
    server = subprocess.Popen(["/usr/bin/python3", "-c", code, f"{work}/other.sock"], stdout=subprocess.PIPE)
    try:
        server.stdout.readline()
        sessionfs(f"unix://{work}/other.sock", sessionfs.directory(), "-o", f"keyfile={keyfile}").fails(1, "other.sock")
        sessionfs.leaves_nothing(but=[server.pid])
    finally:
        server.kill()
        server.wait(30)
        server.stdout.close()


def test_a_silent_redis_is_given_up(sessionfs, redis, keyfile):
    redis.stop()
    sessionfs(redis.source, sessionfs.directory(), "-o", f"keyfile={keyfile},timeout=300ms").fails(1, redis.socket)
    redis.cont()
    sessionfs.leaves_nothing(but=[redis.process.pid])


@pytest.mark.parametrize("env", [None, {PASSWORD: "wrong"}])
def test_a_missing_or_wrong_password(sessionfs, redis, keyfile, env):
    redis.cli("CONFIG", "SET", "requirepass", "right")
    sessionfs(redis.source, sessionfs.directory(), "-o", f"keyfile={keyfile}", env=env).fails(1, "password")
    sessionfs.leaves_nothing(but=[redis.process.pid])


def test_a_remote_source_without_a_key_is_told_how_to_make_one(sessionfs, redis):
    sessionfs(redis.source, sessionfs.directory()).fails(1, "openssl rand -hex 32 > ", "chmod 600", "keyfile=")
    sessionfs.leaves_nothing(but=[redis.process.pid])


@pytest.mark.parametrize("text", ["", "zz" * 32, "ab" * 31, "ab" * 33, "1:" + "ab" * 16, "0:" + "ab" * 32])
def test_a_key_file_without_a_good_key(sessionfs, redis, work, text):
    path = make_key(work / "bad", text or "\n")
    result = sessionfs(redis.source, sessionfs.directory(), "-o", f"keyfile={path}").fails(1, path)
    assert "abab" not in result.err and "zzzz" not in result.err
    sessionfs.leaves_nothing(but=[redis.process.pid])


def test_a_key_file_that_is_missing(sessionfs, redis, work):
    sessionfs(redis.source, sessionfs.directory(), "-o", f"keyfile={work}/nokey").fails(1, f"{work}/nokey")
    sessionfs.leaves_nothing(but=[redis.process.pid])


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o644, 0o620, 0o602])
def test_a_key_file_that_others_can_reach(sessionfs, redis, keyfile, mode):
    os.chmod(keyfile, mode)
    sessionfs(redis.source, sessionfs.directory(), "-o", f"keyfile={keyfile}").fails(1, keyfile, "chmod 600")
    sessionfs.leaves_nothing(but=[redis.process.pid])


@pytest.mark.parametrize("mode", [0o600, 0o400])
def test_a_strict_key_file_is_fine(sessionfs, redis, keyfile, mode):
    os.chmod(keyfile, mode)
    path = sessionfs.directory()
    sessionfs(redis.source, path, "-o", f"keyfile={keyfile}").works()
    sessionfs.terminate(path)


def test_the_mountpoint_is_missing(sessionfs, redis, keyfile, work):
    sessionfs(redis.source, work / "none", "-o", f"keyfile={keyfile}").fails(1, f"{work}/none", "mkdir")
    assert not (work / "none").exists()
    sessionfs.leaves_nothing(but=[redis.process.pid])


def test_the_mountpoint_is_a_file(sessionfs, redis, keyfile, work):
    (work / "file").touch()
    sessionfs(redis.source, work / "file", "-o", f"keyfile={keyfile}").fails(1, f"{work}/file", "not a directory")
    sessionfs.leaves_nothing(but=[redis.process.pid])


def test_the_mountpoint_is_not_empty(sessionfs, redis, keyfile):
    path = sessionfs.directory()
    (path / ".hidden").touch()
    sessionfs(redis.source, path, "-o", f"keyfile={keyfile}").fails(1, path, "not empty")
    sessionfs.leaves_nothing(but=[redis.process.pid])


def test_the_mountpoint_is_a_mount_already(sessionfs, remote, redis, keyfile):
    path = remote()
    sessionfs(redis.source, path, "-o", f"keyfile={keyfile}").fails(1, path, "mounted")
    save(path / "s", b"still served")
    sessionfs.terminate(path)
    sessionfs.leaves_nothing(but=[redis.process.pid])


def test_the_mountpoint_is_a_dead_mount(sessionfs, remote, redis, keyfile):
    path = remote()
    sessionfs.kill9(path)
    sessionfs(redis.source, path, "-o", f"keyfile={keyfile}").fails(1, path, "fusermount3 -u", "transport endpoint is not connected")
    assert subprocess.run(["fusermount3", "-u", path], timeout=30, check=False).returncode == 0  # as it said
    sessionfs.leaves_nothing(but=[redis.process.pid])
    sessionfs(redis.source, path, "-o", f"keyfile={keyfile}").works()
    sessionfs.terminate(path)


def test_the_mountpoint_is_a_mount_that_hangs(sessionfs, remote, redis, keyfile):
    path = remote()
    pid = sessionfs.pid(path)
    os.kill(pid, signal.SIGSTOP)
    try:
        sessionfs(redis.source, path, "-o", f"keyfile={keyfile}").fails(1, path, "busy")
    finally:
        os.kill(pid, signal.SIGCONT)
    sessionfs.terminate(path)


@ROOT_ONLY
def test_no_dev_fuse(sessionfs, redis, keyfile):
    if not private_works():
        pytest.skip("no mount namespaces here")
    script = 'mount -t tmpfs none /dev && exec "$0" "$@"'
    sessionfs(redis.source, sessionfs.directory(), "-o", f"keyfile={keyfile}", prefix=[*PRIVATE, script]).fails(1, "/dev/fuse", "modprobe fuse")
    sessionfs.leaves_nothing(but=[redis.process.pid])


@ROOT_ONLY
def test_a_user_may_not_mount_on_what_is_not_his(sessionfs, redis, work):
    path = sessionfs.directory()
    key = make_key(work / "nobodys")
    os.chown(key, NOBODY, NOBODY)
    sessionfs(redis.source, path, "-o", f"keyfile={key}", user=NOBODY, group=NOBODY, extra_groups=[]).fails(1, path, "directory of your own")
    sessionfs.leaves_nothing(but=[redis.process.pid])


@ROOT_ONLY
def test_a_user_without_access_to_dev_fuse(sessionfs, redis, work):
    if os.stat("/dev/fuse").st_mode & 0o006:
        pytest.skip("everybody may open /dev/fuse here")
    path = sessionfs.directory()
    os.chown(path, NOBODY, NOBODY)
    key = make_key(work / "nobodys")
    os.chown(key, NOBODY, NOBODY)
    sessionfs(redis.source, path, "-o", f"keyfile={key}", user=NOBODY, group=NOBODY, extra_groups=[]).fails(1, "/dev/fuse", "permission denied")
    sessionfs.leaves_nothing(but=[redis.process.pid])


@ROOT_ONLY
def test_a_container_that_may_not_mount(sessionfs, redis, keyfile):
    prefix = ["setpriv", "--bounding-set", "-sys_admin"]
    sessionfs(redis.source, sessionfs.directory(), "-o", f"keyfile={keyfile}", prefix=prefix).fails(1, "CAP_SYS_ADMIN", "--cap-add SYS_ADMIN")
    sessionfs.leaves_nothing(but=[redis.process.pid])


@pytest.mark.parametrize("flags", [(), ("-f",)])
def test_the_line_is_the_same_in_the_foreground(sessionfs, keyfile, work, flags):
    sessionfs(f"unix://{work}/no.sock", sessionfs.directory(), "-o", f"keyfile={keyfile}", *flags).fails(1, "no.sock")
    sessionfs.leaves_nothing()


def test_ending_the_command_while_it_starts_leaves_nothing(sessionfs, redis, keyfile):
    redis.stop()
    process = sessionfs.start(redis.source, sessionfs.directory(), "-o", f"keyfile={keyfile},timeout=5s")
    wait_until(lambda: len(set(processes_of(sessionfs.work)) - {redis.process.pid}) == 2, 10, "parent and daemon")
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=40)
    assert process.returncode == 1, err
    assert err.count(b"\n") == 1, err
    redis.cont()
    sessionfs.leaves_nothing(but=[redis.process.pid])


# --- the configuration file ------------------------------------------------------------------------------------------

@pytest.mark.parametrize("text, part", [
    ("", "not JSON at line 1"),
    ("{\n\"ttl\": }", "not JSON at line 2"),
    ("[]", "one JSON object"),
    ('{"tll": 5}', 'member "tll": unknown'),
    ('{"ttl": true}', 'member "ttl": must be a string or a number'),
    ('{"ttl": "soon"}', 'member "ttl": must be 1s to'),
    ('{"connections": 1000}', 'member "connections": must be 1 to 256'),
    ('{"namespace": 5}', 'member "namespace": must be a string'),
    ('{"source": "redis://:hunter2@h:x"}', 'member "source": the port'),
])
def test_a_bad_configuration_names_file_member_and_reason(sessionfs, work, text, part):
    (work / "c.json").write_text(text)
    result = sessionfs("-c", work / "c.json", sessionfs.directory()).fails(1, f"{work}/c.json: ", part)
    assert "hunter2" not in result.err
    sessionfs.leaves_nothing()


def test_a_configuration_that_is_missing(sessionfs, work):
    sessionfs("-c", work / "none.json", sessionfs.directory()).fails(1, f"{work}/none.json", "no such file")


def test_a_configuration_says_everything(sessionfs, redis, keyfile, work):
    redis.cli("CONFIG", "SET", "requirepass", "right")
    path = sessionfs.directory()
    config = {"source": redis.source, "mountpoint": str(path), "password": "right", "keyfile": str(keyfile),
              "namespace": "file", "ttl": "1h", "connections": 2}
    (work / "c.json").write_text(json.dumps(config))
    (work / "c.json").chmod(0o600)
    sessionfs("-c", work / "c.json").works()
    assert json.loads(sessionfs.ctl("status", "--json", path).works().out)["namespace"] == "file"
    save(path / "s", b"x")
    assert 3590 <= int(os.getxattr(path / "s", "user.session.ttl")) <= 3600
    sessionfs.terminate(path)


def test_options_win_over_the_configuration(sessionfs, redis, keyfile, work):
    path = sessionfs.directory()
    config = {"source": "unix:///nowhere", "mountpoint": "/nowhere", "keyfile": str(keyfile), "ttl": "1h", "namespace": "file"}
    (work / "c.json").write_text(json.dumps(config))
    sessionfs(redis.source, path, "-c", work / "c.json", "-o", "ttl=2h").works()
    assert json.loads(sessionfs.ctl("status", "--json", path).works().out)["namespace"] == "file"
    save(path / "s", b"x")
    assert 7190 <= int(os.getxattr(path / "s", "user.session.ttl")) <= 7200
    sessionfs.terminate(path)


# --- passwords -------------------------------------------------------------------------------------------------------

@pytest.mark.redis(tcp=True)
@pytest.mark.parametrize("way", ["source", "environment", "file"])
def test_a_password_works_and_shows_nowhere(sessionfs, redis, remote, work, way):
    secret = "p%40ss:w/rd" if way != "source" else "p@ss:w/rd"
    redis.cli("CONFIG", "SET", "requirepass", secret)
    if way == "source":
        path = remote(source=redis.tcp_source.replace("//", "//:p%40ss%3Aw%2Frd@"))
    elif way == "environment":
        path = remote(env={PASSWORD: secret})
    else:
        (work / "c.json").write_text(json.dumps({"password": secret}))
        (work / "c.json").chmod(0o600)
        path = remote(flags=("-c", work / "c.json"))
    save(path / "s", b"x")
    process = Path(f"/proc/{sessionfs.pid(path)}")
    seen = {
        "ps": (process / "cmdline").read_bytes(),
        "environ": (process / "environ").read_bytes(),
        "mounts": Path("/proc/self/mountinfo").read_bytes(),
        "status": sessionfs.ctl("status", "--json", path).works().out.encode(),
    }
    for where, text in seen.items():
        assert b"p@ss" not in text and b"p%40ss" not in text, where
    sessionfs.terminate(path)


@pytest.mark.redis(tcp=True)
def test_the_password_of_a_user(sessionfs, redis, remote, keyfile):
    redis.cli("ACL", "SETUSER", "me", "on", ">secret", "~*", "&*", "+@all")
    redis.cli("CONFIG", "SET", "requirepass", "other")
    source = redis.tcp_source.replace("//", "//me@")
    sessionfs(source, sessionfs.directory(), "-o", f"keyfile={keyfile}", env={PASSWORD: "other"}).fails(1, "password")
    path = remote(source=source, env={PASSWORD: "secret"})
    save(path / "s", b"x")
    sessionfs.terminate(path)


# --- alive -----------------------------------------------------------------------------------------------------------

def test_the_mount_answers_when_the_command_returns(sessionfs, remote):
    path = remote()
    assert os.statvfs(path).f_namemax == 255
    save(path / "s", b"hello")
    assert load(path / "s") == b"hello"
    sessionfs.terminate(path)


def test_the_daemon_stands_alone(sessionfs, remote):
    path = remote()
    pid = sessionfs.pid(path)
    assert os.getsid(pid) == pid
    assert os.readlink(f"/proc/{pid}/cwd") == "/"
    assert [os.readlink(f"/proc/{pid}/fd/{fd}") for fd in range(3)] == ["/dev/null"] * 3
    limits = Path(f"/proc/{pid}/limits").read_text()
    assert next(line for line in limits.splitlines() if line.startswith("Max core file size")).split()[4:6] == ["0", "0"]
    sessionfs.terminate(path)


def test_inherited_descriptors_are_closed(sessionfs, redis, keyfile, work):
    path = sessionfs.directory()
    with open(work / "inherited", "w", encoding="ascii") as file:
        sessionfs(redis.source, path, "-o", f"keyfile={keyfile}", pass_fds=[file.fileno()]).works()
    pid = sessionfs.pid(path)
    targets = [outcome(os.readlink, f"/proc/{pid}/fd/{fd}") for fd in os.listdir(f"/proc/{pid}/fd")]
    assert f"{work}/inherited" not in targets
    sessionfs.terminate(path)


def test_relative_paths_are_those_of_the_caller(sessionfs, redis, keyfile, work):
    path = sessionfs.directory()
    sessionfs(redis.source, "m", "-o", f"keyfile={keyfile.name}", cwd=work).works()
    save(path / "s", b"x")
    sessionfs.terminate(path)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_with_all_saved(sessionfs, remote, number):
    path = remote()
    for i in range(50):
        save(path / f"s{i}", b"%d" % i)
    fd = os.open(path / "open", os.O_WRONLY | os.O_CREAT, 0o600)
    os.write(fd, b"o" * 4096)
    os.close(fd)
    sessionfs.terminate(path, number)
    assert remote() == path
    assert [load(path / f"s{i}") for i in range(50)] == [b"%d" % i for i in range(50)]
    assert load(path / "open") == b"o" * 4096
    sessionfs.terminate(path)


def test_fusermount_ends_it_with_all_saved(sessionfs, remote, redis):
    path = remote()
    save(path / "s", b"saved")
    pid = sessionfs.pid(path)
    assert subprocess.run(["fusermount3", "-u", path], timeout=30, check=False).returncode == 0
    sessionfs.wait_ended(path, pid)
    sessionfs.leaves_nothing(but=[redis.process.pid])
    remote()
    assert load(path / "s") == b"saved"
    sessionfs.terminate(path)


def test_it_does_not_care_about_a_hangup_or_a_lost_pipe(sessionfs, remote):
    path = remote()
    pid = sessionfs.pid(path)
    for number in (signal.SIGHUP, signal.SIGPIPE):
        os.kill(pid, number)
    save(path / "s", b"x")
    assert sessionfs.pid(path) == pid
    sessionfs.terminate(path)


def test_in_the_foreground_it_logs_and_ends_with_0(sessionfs, redis, keyfile):
    path = sessionfs.directory()
    process = sessionfs.start(redis.source, path, "-o", f"keyfile={keyfile}", "-f")
    wait_until(lambda: str(path) in mount_devices(), 30, "the mount")
    sessionfs.learn_connections()
    os.statvfs(path)
    assert sessionfs.pid(path) == process.pid
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=30)
    assert process.returncode == 0, err
    assert out == b""
    assert b"sessionfs: info: " in err and str(path).encode() in err
    assert str(path) not in mount_devices()


# --- options at work -------------------------------------------------------------------------------------------------

def test_read_only(sessionfs, remote):
    path = remote(options="ro")
    assert outcome(save, path / "s", b"x") == "EROFS"
    sessionfs.terminate(path)


def test_owner_and_mode_as_programs_see_them(sessionfs, remote):
    path = remote(options="uid=33,gid=34,umask=0077")
    save(path / "s", b"x", mode=0o666)
    st = os.stat(path / "s")
    assert (st.st_uid, st.st_gid, st.st_mode & 0o077) == (33, 34, 0)
    sessionfs.terminate(path)


def test_namespaces_are_apart(sessionfs, remote):
    first, second = remote("a"), remote("b", options="namespace=other")
    save(first / "s", b"x")
    assert outcome(load, second / "s") == "ENOENT"
    assert os.listdir(second) == []
    sessionfs.terminate(first)
    sessionfs.terminate(second)


@pytest.mark.parametrize("option, least, most", [("ttl=90", 85, 90), ("ttl=2h", 7195, 7200), ("ttl=none", None, None)])
def test_the_time_to_live_of_new_sessions(sessionfs, remote, option, least, most):
    path = remote(options=option)
    save(path / "s", b"x")
    value = os.getxattr(path / "s", "user.session.ttl").decode()
    assert value == "none" if least is None else least <= int(value) <= most
    sessionfs.terminate(path)


def test_sessions_larger_than_max_session(sessionfs, remote):
    path = remote(options="max_session=64K")
    save(path / "fits", b"x" * 65536)
    assert outcome(save, path / "s", b"x" * 65537) == "EFBIG"
    sessionfs.terminate(path)


def test_the_mount_shows_its_source(sessionfs, remote, redis):
    path = remote()
    lines = [line for line in Path("/proc/self/mounts").read_text().splitlines() if f" {path} " in line]
    assert lines[0].split()[:3] == [redis.source, str(path), "fuse.sessionfs"]
    assert "default_permissions" in lines[0]
    sessionfs.terminate(path)


# --- mount(8) --------------------------------------------------------------------------------------------------------

@ROOT_ONLY
@pytest.mark.parametrize("how", ["mount", "fstab"])
def test_mount_and_fstab(sessionfs, redis, keyfile, work, how):
    if not private_works() or not shutil.which("mount.fuse3"):
        pytest.skip("no mount namespaces, or no mount.fuse3 here")
    path, tools = sessionfs.directory(), "/usr/local/sbin"  # in the PATH that mount(8) gives its helpers
    options = f"keyfile={keyfile},ttl=1h,_netdev,nofail,noauto,nodev,x-systemd.automount"
    (work / "fstab").write_text(f"{redis.source} {path} fuse.sessionfs {options} 0 0\n")
    mount = f"mount -t fuse.sessionfs {redis.source} {path} -o {options}" if how == "mount" else f"mount -T {work}/fstab {path}"
    script = f"""
        set -e
        mount -t tmpfs none {tools}
        cp {PROGRAM} {tools}/sessionfs
        PATH={tools}:/usr/sbin:/usr/bin:/sbin:/bin {mount}
        printf hello > {path}/s
        cat {path}/s
        umount {path}
    """
    result = subprocess.run([*PRIVATE, script], capture_output=True, text=True, timeout=50, check=False,
                            env=sessionfs.environment(None))
    assert (result.returncode, result.stdout, result.stderr) == (0, "hello", "")
    sessionfs.leaves_nothing(but=[redis.process.pid])


# --- sessionfsctl ----------------------------------------------------------------------------------------------------

def test_the_status_of_a_mount(sessionfs, remote, redis):
    path = remote()
    save(path / "s", b"x")
    status = json.loads(sessionfs.ctl("status", "--json", path).works().out)
    assert status["mountpoint"] == str(path)
    assert status["source"] == redis.source
    assert status["namespace"] == "test"
    assert status["version"].startswith("0.")
    assert status["uptime_s"] >= 0
    assert status["requests"]["total"] >= status["requests"]["write"] >= 1
    assert status["l2"]["up"] is True
    assert status["l2"]["commands"] >= status["l2"]["writes"] >= 1
    assert {"invalidations", "reads", "reconnects", "errors"} <= set(status["l2"])
    assert status["l1"]["entries"] >= 1
    text = sessionfs.ctl("status", path).works().out
    assert f"{status['pid']}" in text and "requests.total" in text
    sessionfs.terminate(path)


def test_the_time_to_live_of_a_file(sessionfs, remote):
    path = remote()
    save(path / "s", b"x")
    assert sessionfs.ctl("ttl", path / "s", "7d").works().out == ""
    assert 604790 <= int(sessionfs.ctl("ttl", path / "s").works().out) <= 604800
    sessionfs.ctl("ttl", path / "s", "none").works()
    assert sessionfs.ctl("ttl", path / "s").works().out == "none\n"
    sessionfs.ctl("ttl", path / "s", "soon").fails(1, "soon", "30m")
    sessionfs.terminate(path)


def test_what_sessionfsctl_cannot_do_is_one_line(sessionfs, work):
    (work / "file").touch()
    sessionfs.ctl("status", work).fails(1, "not the mountpoint of a sessionfs")
    sessionfs.ctl("ttl", work / "file").fails(1, "not a session of a sessionfs")
    sessionfs.ctl("ttl", work / "none").fails(1, "no such file")
    for args in ((), ("nonsense",), ("status",), ("status", "a", "b"), ("ttl",), ("-x",), ("ttl", "--json", "f")):
        sessionfs.ctl(*args).fails(2, "sessionfsctl -h")
    assert sessionfs.ctl("-h").works().out.startswith("usage: sessionfsctl")
    assert sessionfs.ctl("-V").works().out.startswith("sessionfsctl 0.")


def test_the_status_of_a_dead_mount(sessionfs, remote):
    path = remote()
    sessionfs.kill9(path)
    sessionfs.ctl("status", path).fails(1, "fusermount3 -u")
    unmount_lazily(path)
