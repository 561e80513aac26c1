"""A redis-server of one's own, and as much of its protocol as the tests speak."""
import os
import shutil
import signal
import socket
import subprocess
from pathlib import Path

from base import outcome, spawn, supervisor, wait_until


class RedisError(Exception):
    """An error reply."""


class RespClient:
    """One connection over the unix socket. Values are bytes; error replies are raised."""

    def __init__(self, path):
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.settimeout(10)
        self.socket.connect(str(path))
        self.replies = self.socket.makefile("rb")

    def close(self):
        self.replies.close()
        self.socket.close()

    def call(self, *words):
        parts = [word if isinstance(word, bytes) else str(word).encode() for word in words]
        message = b"*%d\r\n" % len(parts) + b"".join(b"$%d\r\n%s\r\n" % (len(part), part) for part in parts)
        self.socket.sendall(message)
        reply = self.reply()
        if isinstance(reply, RedisError):
            raise reply
        return reply

    def reply(self):
        line = self.replies.readline()
        if not line:
            raise ConnectionError("redis closed the connection")
        kind, rest = line[:1], line[1:-2]
        if kind == b"+":
            return rest
        if kind == b"-":
            return RedisError(rest.decode())
        if kind == b":":
            return int(rest)
        if int(rest) < 0:
            return None
        if kind == b"$":
            return self.replies.read(int(rest) + 2)[:-2]
        return [self.reply() for _ in range(int(rest))]


class Redis:
    """A redis-server on a unix socket in @directory. @aof: keeps its data over a restart. @port: listens on TCP too."""

    def __init__(self, directory, aof=False, port=0):
        self.directory, self.aof, self.port = Path(directory), aof, port
        self.socket, self.log = self.directory / "redis.sock", self.directory / "redis.log"
        self.process, self.client = None, None

    @property
    def source(self):
        return f"unix://{self.socket}"

    @property
    def tcp_source(self):
        return f"redis://127.0.0.1:{self.port}"

    def start(self):
        """Start it and wait until it answers. What the AOF has is there again."""
        # appendfsync no: the page cache survives kill -9, and no write is ever put off, as everysec may.
        argv = ["redis-server", "--port", self.port, "--bind", "127.0.0.1", "--unixsocket", self.socket,
                "--unixsocketperm", "777", "--dir", self.directory, "--logfile", self.log, "--save", "",
                "--appendonly", "yes" if self.aof else "no", "--appendfsync", "no", "--rdbcompression", "no",
                "--daemonize", "no"]
        self.process = spawn(argv, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=str(self.directory))
        supervisor.logs["redis"] = self.log
        wait_until(self.is_ready, 20, "redis-server answers")
        return self

    def is_ready(self):
        assert self.process.poll() is None, "redis-server ended at once"
        try:
            return outcome(self.cli, "PING") == b"PONG"
        except RedisError:
            return False  # LOADING

    def cli(self, *words):
        """One command. Return: the reply (bytes, int, list or None); raises RedisError for an error reply."""
        try:
            if self.client is None:
                self.client = RespClient(self.socket)
            return self.client.call(*words)
        except OSError:
            self.disconnect()
            raise

    def disconnect(self):
        if self.client is not None:
            self.client.close()
            self.client = None

    def keys(self, pattern="sfs:*"):
        """All keys that match, sorted, by SCAN."""
        found, cursor = set(), b"0"
        while True:
            cursor, part = self.cli("SCAN", cursor, "MATCH", pattern, "COUNT", 1000)
            found.update(part)
            if cursor == b"0":
                return sorted(found)

    def key_of(self, action):
        """The one key that @action adds (names are hashed, so that only watching tells)."""
        before = set(self.keys())
        action()
        added = wait_until(lambda: set(self.keys()) - before, what="a new key in Redis")
        assert len(added) == 1, f"{len(added)} keys were added"
        return added.pop()

    def clients(self):
        """CLIENT LIST as a list of dictionaries."""
        lines = self.cli("CLIENT", "LIST").decode().splitlines()
        return [dict(field.partition("=")[::2] for field in line.split(" ")) for line in lines]

    def info(self, section):
        lines = self.cli("INFO", section).decode().splitlines()
        return dict(line.partition(":")[::2] for line in lines if ":" in line)

    def is_alive(self):
        return self.process is not None and self.process.poll() is None

    def kill(self):
        """SIGKILL."""
        self.disconnect()
        self.process.kill()
        self.process.wait()
        supervisor.remove(self.process)

    def forget(self):
        """Remove what a killed server left on disk, so that it starts empty."""
        assert not self.is_alive()
        shutil.rmtree(self.directory / "appendonlydir", ignore_errors=True)

    def stop(self):
        """SIGSTOP: there, and silent."""
        os.kill(self.process.pid, signal.SIGSTOP)

    def cont(self):
        if self.is_alive():
            os.kill(self.process.pid, signal.SIGCONT)
