"""Ordinary users mount through fusermount3; uid=, gid= and umask= change what programs see."""
import os
import shutil
import stat
import subprocess

import pytest

from harness import NOBODY, PROGRAM, load, make_key, outcome, run_python, save, wait_until

SAVE = "import sys; open(sys.argv[1], 'w').write(sys.argv[2])"
LOAD = "import os, sys; print(open(sys.argv[1]).read(), os.stat(sys.argv[1]).st_uid)"


@pytest.fixture
def user_key(work):
    """A key file of the ordinary user, and /dev/fuse open to him, as distributions have it."""
    if os.geteuid() != 0:
        pytest.skip("only root can become another user")
    fusermount = shutil.which("fusermount3")
    if not fusermount or not os.stat(fusermount).st_mode & stat.S_ISUID:
        pytest.skip("fusermount3 is missing or has lost its suid bit")
    code = "import os, sys; sys.exit(not os.access(sys.argv[1], os.X_OK))"
    status, output = run_python(code, str(PROGRAM), user=NOBODY)
    if status != 0:
        pytest.skip(f"an ordinary user cannot execute {PROGRAM} {output}")
    mode = stat.S_IMODE(os.stat("/dev/fuse").st_mode)
    os.chmod("/dev/fuse", 0o666)
    path = make_key(work / "user-key")
    os.chown(path, NOBODY, NOBODY)
    yield path
    os.chmod("/dev/fuse", mode)


def test_an_ordinary_user_mounts_and_shares_sessions_with_root(mount, user_key, work):
    his = mount("his", user=NOBODY, keyfile=user_key)
    copy = make_key(work / "root-key", user_key.read_text().strip())
    ours = mount("ours", keyfile=copy)
    assert run_python(SAVE, str(his / "f"), "by an ordinary user", user=NOBODY) == (0, "")
    assert load(ours / "f") == b"by an ordinary user"
    assert os.stat(ours / "f").st_uid == NOBODY
    save(ours / "g", b"by root")
    os.chmod(ours / "g", 0o644)
    wait_until(lambda: run_python(LOAD, str(his / "g"), user=NOBODY) == (0, "by root 0\n"), what="root's in his mount")
    assert outcome(os.listdir, his.path) == "EACCES", "without allow_other it is his alone"


def test_an_ordinary_users_mount_ends_cleanly(mount, user_key, work):
    his = mount("his", user=NOBODY, keyfile=user_key)
    assert run_python(SAVE, str(his / "f"), "x" * 8192, user=NOBODY) == (0, "")
    his.stop()
    ours = mount("ours", keyfile=make_key(work / "root-key", user_key.read_text().strip()))
    assert load(ours / "f") == b"x" * 8192


def test_an_ordinary_user_unmounts_by_fusermount(mount, user_key):
    his = mount("his", user=NOBODY, keyfile=user_key)
    his.is_expected_dead = True
    result = subprocess.run(["fusermount3", "-u", str(his.path)], user=NOBODY, group=NOBODY, extra_groups=[], cwd="/",
                            capture_output=True, timeout=30, check=False)
    assert result.returncode == 0, result.stderr
    assert his.ended() == 0
    assert not his.is_mounted()


def test_a_key_file_that_others_can_read_is_refused(mount, work):
    key = make_key(work / "loose")
    os.chmod(key, 0o644)
    m = mount("m", start=False, keyfile=key)
    with pytest.raises(AssertionError):
        m.start()
    assert m.process.returncode == 1
    assert len(m.tail().splitlines()) == 1 and "loose" in m.tail(), m.tail()
    assert not m.is_mounted()


def test_uid_gid_and_umask_change_what_this_mount_shows_and_nothing_else(mount):
    shown = mount("shown", uid=1234, gid=2345, umask="077")
    plain = mount("plain")
    save(plain / "f", b"x")
    os.chmod(plain / "f", 0o664)
    os.mkdir(plain / "d", 0o755)
    for name in ("f", "d"):
        status = os.stat(shown / name)
        assert (status.st_uid, status.st_gid) == (1234, 2345)
        # Whether a file shows 0600 or 0700 (libfuse's own way) is open; the umask's bits are not.
        assert (status.st_mode & 0o077, status.st_mode & 0o600) == (0, 0o600)
    save(shown / "g", b"made here")
    assert os.stat(shown / "g").st_uid == 1234
    wait_until(lambda: outcome(load, plain / "g") == b"made here", what="the session in the plain mount")
    assert os.stat(plain / "g").st_uid == os.geteuid(), "its creator's"
    assert stat.S_IMODE(os.stat(plain / "f").st_mode) == 0o664


def test_the_creator_of_a_session_owns_it_on_every_instance(mount):
    a, b = mount("a", allow_other=True), mount("b", allow_other=True)
    os.mkdir(a / "d")
    os.chmod(a / "d", 0o777)
    wait_until(lambda: outcome(lambda: stat.S_IMODE(os.stat(b / "d").st_mode)) == 0o777, what="the directory on b")
    assert run_python(SAVE, str(a / "d/f"), "x", user=NOBODY) == (0, "")
    wait_until(lambda: outcome(lambda: os.stat(b / "d/f").st_uid) == NOBODY, what="the owner on b")
    assert run_python(LOAD, str(b / "d/f"), user=NOBODY) == (0, f"x {NOBODY}\n")
