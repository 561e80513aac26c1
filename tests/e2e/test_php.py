"""The main job: PHP servers on two instances share a session, an instance dies and comes back, and nothing is lost."""
import http.client
import json
import os
import re
import socket
import time

import pytest

from harness import PROGRAM, TOP, free_port, outcome, run, scaled, spawn, wait_until

EXAMPLE = TOP / "examples" / "php"
N_REQUESTS = 1000
PAUSE_S = 0.02   # between two requests, says the specification
CART_MAX = 40


class PhpServer:
    """`php -S` with the example's script; session.save_path is the only setting that differs from a stock PHP."""

    def __init__(self, m, work):
        self.mount, self.port, self.log = m, free_port(), work / f"php-{m.path.name}.log"
        with open(self.log, "wb") as log:
            self.process = spawn(["php", "-d", f"session.save_path={m / 'php'}", "-S", f"127.0.0.1:{self.port}",
                                  EXAMPLE / "session.php"], stdout=log, stderr=log, cwd="/")
        wait_until(self.is_listening, 20, "php -S listens")

    def is_listening(self):
        assert self.process.poll() is None, self.log.read_text()
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", self.port)) == 0

    def get(self, query, cookie):
        """Return: (HTTP status, decoded body, cookie afterwards)."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)
        try:
            connection.request("GET", f"/?{query}", headers={"Cookie": cookie} if cookie else {})
            response = connection.getresponse()
            body = response.read()
            for value in response.headers.get_all("Set-Cookie") or []:
                cookie = re.match(r"PHPSESSID=[^;]+", value)[0]
            return response.status, json.loads(body) if response.status == 200 else body, cookie
        finally:
            connection.close()


class Client:
    """One cookie. Asks the other server when one answers 503, as a load balancer does. Checks every answer."""

    def __init__(self, servers):
        self.servers, self.cookie = servers, None
        self.n_counted = self.n_retried = 0
        self.ids = []

    def get(self, turn, query):
        for attempt in range(len(self.servers)):
            server = self.servers[(turn + attempt) % len(self.servers)]
            status, body, cookie = server.get(query, self.cookie)
            if status == 200:
                self.cookie = cookie
                return body
            assert status == 503, (status, body)
            self.n_retried += 1
        raise AssertionError("no server answers")

    def count(self, turn):
        is_login = turn % 25 == 24
        answer = self.get(turn, f"do={'login' if is_login else 'count'}&flash=message{turn}")
        self.n_counted += 1
        expected_cart = list(range(max(1, self.n_counted - CART_MAX + 1), self.n_counted + 1))
        assert answer["is_new"] is (self.n_counted == 1), f"request {turn}: the session was not found"
        assert answer["count"] == self.n_counted, f"request {turn}: a count was lost"
        assert answer["flash"] == (f"message{turn - 1}" if turn else None), f"request {turn}"
        assert answer["cart"] == expected_cart and answer["is_cart_whole"], f"request {turn}: the cart"
        if self.ids and not is_login:
            assert answer["id"] == self.ids[-1], f"request {turn}: another session"
        if not self.ids or answer["id"] != self.ids[-1]:
            self.ids.append(answer["id"])


@pytest.fixture
def servers(pair, work):
    a, b = pair
    os.mkdir(a / "php")
    wait_until(lambda: os.path.isdir(b / "php"), what="the directory on b")
    return [PhpServer(m, work) for m in pair]


@pytest.mark.limit(150)
def test_a_client_that_alternates_between_two_servers_loses_nothing_though_one_instance_is_killed(pair, servers):
    a, b = pair
    client = Client(servers)
    count = scaled(N_REQUESTS, 60)
    killed, back = count // 2, count // 2 + max(10, count // 50)
    for turn in range(count):
        if turn == killed:
            a.kill9(unmount=False)  # the dead mount stays, as it does in the field
        if turn == back:
            assert client.n_retried > 0, "the killed instance was asked meanwhile"
            a.start()
            retried_before = client.n_retried
        client.count(turn)
        time.sleep(PAUSE_S)
    assert client.n_retried == retried_before, "since its return the instance serves again"
    assert client.n_counted == count and len(client.ids) == 1 + count // 25

    # Of all the ids only the last is a session: session_regenerate_id(true) removed the others, everywhere.
    for m in pair:
        wait_until(lambda: os.listdir(m / "php") == [f"sess_{client.ids[-1]}"], what=f"one session on {m.path.name}")
    assert client.get(count, "do=logout") == {"destroyed": True}
    for m in pair:
        wait_until(lambda: outcome(os.listdir, m / "php") == [], what=f"no session on {m.path.name}")

    # What PHP complained of is only the dead mount.
    complaints = [line for server in servers for line in server.log.read_text().splitlines()
                  if re.search(r"Warning|Notice|Fatal|Deprecated", line)]
    assert [line for line in complaints if "Transport endpoint" not in line and "session_start" not in line] == []


def test_a_logout_on_one_server_is_a_logout_on_the_other(servers):
    client = Client(servers)
    for turn in range(4):
        client.count(turn)
        time.sleep(PAUSE_S)
    assert client.get(0, "do=logout") == {"destroyed": True}
    time.sleep(PAUSE_S)
    for turn in (1, 0):
        status, answer, _ = servers[turn].get("do=count", None)
        assert status == 200 and answer["is_new"]
    _, answer, _ = servers[1].get("do=count", client.cookie)
    assert answer["is_new"] and answer["count"] == 1


def test_many_clients_each_keep_their_own_session(servers):
    clients = [Client(servers) for _ in range(scaled(20, 5))]
    for turn in range(scaled(20, 5)):
        for client in clients:
            client.count(turn)
        time.sleep(PAUSE_S)
    assert len({client.ids[-1] for client in clients}) == len(clients)


def test_the_example_runs(work):
    if not PROGRAM.exists():
        pytest.fail(f"{PROGRAM} is missing: build first, or set SESSIONFS_BUILD")
    environment = {**os.environ, "SESSIONFS": str(PROGRAM), "PORT": str(free_port()), "TMPDIR": str(work)}
    result = run(["sh", EXAMPLE / "run.sh", "30"], 50, env=environment)
    assert result[0] == 0, result[1]
    assert "nothing was lost" in result[1]
    assert list(work.iterdir()) == [], "it cleans up after itself"
