"""Fixtures of the end to end tests. Whatever a test starts is gone when it ends, also when it failed or hung."""
import os
import subprocess
import tempfile
from pathlib import Path

import pytest

import watchdog
from harness import Mount, Redis, free_port, make_key, remove_tree, supervisor

LIMIT_S = 60


def pytest_configure(config):
    config.addinivalue_line("markers", f"limit(seconds): the test's hard limit ({LIMIT_S} s unless said)")
    config.addinivalue_line("markers", "redis(aof=False, tcp=False): how the test's redis-server runs")


def pytest_sessionstart(session):
    if session.config.option.collectonly:
        return
    if not os.path.exists("/dev/fuse"):
        pytest.exit("no /dev/fuse here: nothing can be mounted", returncode=77)
    if os.geteuid() == 0 and not os.path.ismount(watchdog.CONNECTIONS):
        subprocess.run(["mount", "-t", "fusectl", "none", watchdog.CONNECTIONS], capture_output=True, check=False)


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item, call):
    """Put the ends of the logs into the report of a failure; a test that ran into its limit has failed."""
    report = (yield).get_result()
    if supervisor.has_fired and not supervisor.is_reported:
        supervisor.is_reported = True
        if report.passed:  # HardLimit met another exception on its way through pytest, and was lost
            report.outcome, report.longrepr = "failed", "ran into its hard limit"
    if report.failed:
        for name, path in supervisor.logs.items():
            if path.exists():
                lines = path.read_text(errors="replace").splitlines()
                report.sections.append((f"log of {name}", "\n".join(lines[-60:])))


@pytest.fixture(autouse=True)
def hard_limit(request):
    """No test runs longer than its limit, not even one that hangs in a system call on a dead mount."""
    marker = request.node.get_closest_marker("limit")
    supervisor.arm(marker.args[0] if marker else LIMIT_S)
    yield
    supervisor.disarm()


@pytest.fixture
def work(hard_limit):
    """A directory with a short name (a unix socket's path has 108 bytes at most)."""
    path = Path(tempfile.mkdtemp(prefix="sfs-", dir="/tmp"))
    path.chmod(0o755)
    yield path
    remove_tree(path)


@pytest.fixture
def keyfile(work):
    return make_key(work / "key")


@pytest.fixture
def redis(request, work):
    """A running redis-server; the marker redis(...) says how."""
    marker = request.node.get_closest_marker("redis")
    options = dict(marker.kwargs) if marker else {}
    port = free_port() if options.get("tcp") else 0
    server = Redis(work, aof=options.get("aof", False), port=port)
    server.start()
    yield server
    server.cont()
    if server.is_alive():
        server.kill()


@pytest.fixture
def mount(redis, keyfile, work):
    """mount("a", ttl="1h", ...) starts an instance; instances made so share the namespace unless told otherwise."""
    mounts = []

    def make(name=None, start=True, source=None, user=None, **options):
        options = {"namespace": "test", "keyfile": keyfile, **options}
        made = Mount(work, name or f"m{len(mounts)}", source or redis.source, user, **options)
        mounts.append(made)
        return made.start() if start else made

    yield make
    redis.cont()
    problems = [problem for made in mounts for problem in made.end(redis.is_alive())]
    if problems:
        pytest.fail("\n".join(problems), pytrace=False)


@pytest.fixture
def pair(mount):
    """Two instances of one namespace."""
    return mount("a"), mount("b")
