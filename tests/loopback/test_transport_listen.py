"""Listening when descriptors run out, and connections that say nothing: of every service."""

from __future__ import annotations

import contextlib
import errno
import json
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import eventually

import rpcnb
from rpcnb.farm.messages import GREETING, encode_frame
from rpcnb.transport.listen import Acceptor
from rpcnb.transport.loopthread import LoopThread, call_in_loop


class Exhausted(socket.socket):
    """A listener whose process has no descriptors left for the next few."""

    failures = 0
    tries = 0

    def accept(self) -> tuple[socket.socket, Any]:
        self.tries += 1
        if self.failures:
            self.failures -= 1
            raise OSError(errno.EMFILE, "Too many open files")
        return super().accept()


@pytest.mark.parametrize("spares", [True, False])
@pytest.mark.parametrize("failures", [1, 3])
def test_without_descriptors_it_neither_spins_nor_stops(
    spares: bool, failures: int, caplog: pytest.LogCaptureFixture
) -> None:
    listener = Exhausted()
    listener.bind(("127.0.0.1", 0))
    listener.listen()
    listener.setblocking(False)
    listener.failures = failures
    loop = LoopThread("test")
    taken: list[socket.socket] = []
    spared: list[bool] = []

    def exhausted() -> bool:
        spared.append(True)
        return spares

    acceptor: Acceptor = call_in_loop(
        loop.io_loop,
        lambda: Acceptor(loop.io_loop, [listener], "test", lambda sock, address: taken.append(sock), exhausted),
    )
    with socket.create_connection(listener.getsockname(), 10):
        eventually(lambda: taken, "the connection")
    assert listener.tries <= failures + 2
    assert len(spared) == ((failures + 1) // 2 if spares else failures)
    pauses = failures // 2 if spares else failures
    assert [record.getMessage() for record in caplog.records] == [
        "test: cannot accept: Too many open files; trying again in a moment"
    ] * min(1, pauses), "further ones are summed up"
    caplog.clear()
    call_in_loop(loop.io_loop, acceptor.close)
    loop.stop()
    taken[0].close()


# -- as processes with few descriptors -----------------------------------------------------------------------------


@contextlib.contextmanager
def running(tmp_path: Path, *arguments: str) -> Iterator[tuple[dict[str, Any], Path]]:
    """Run ``rpcnb`` where a process may have 100 descriptors; yields what its ready file says, and its log."""
    ready, log = tmp_path / "ready.json", tmp_path / "log"
    command = f"ulimit -n 100; exec {sys.executable} -m rpcnb {' '.join(arguments)} --port 0 --ready-file {ready}"
    with log.open("w") as stderr:
        process = subprocess.Popen(["bash", "-c", command], stdout=subprocess.DEVNULL, stderr=stderr)
    try:
        eventually(ready.exists, "the ready file", 30)
        yield json.loads(ready.read_text()), log
    finally:
        process.terminate()
        process.wait()


def many(port: int, say: bytes = b"") -> contextlib.ExitStack:
    """Open 150 connections that say little or nothing."""
    stack = contextlib.ExitStack()
    for _ in range(150):
        sock = stack.enter_context(socket.create_connection(("127.0.0.1", port), 10))
        with contextlib.suppress(OSError):
            sock.sendall(say)
    return stack


def is_ended(sock: socket.socket) -> bool:
    sock.setblocking(False)
    try:
        return not sock.recv(1000)
    except BlockingIOError:
        return False
    except OSError:
        return True


@pytest.mark.parametrize("which", ["port", "web_port"])
def test_a_server_is_reached_beside_many_that_say_nothing(tmp_path: Path, which: str) -> None:
    with running(tmp_path, "serve", "--no-token", "--web-port", "0") as (info, log):
        with many(info[which]):
            for url in (f"127.0.0.1:{info['port']}", f"ws://127.0.0.1:{info['web_port']}/ws"):
                with rpcnb.connect(url, timeout=20) as session:
                    assert session.call("rpc.test.addone", 1) == 2
        assert len(log.read_text()) < 5000


FAKE = GREETING + encode_frame([5, {"key": "server:fake", "addr": ["h", 1]}])


@pytest.mark.parametrize("say", [b"", GREETING, FAKE], ids=["silent", "greeted", "telling"])
def test_a_tracker_is_reached_beside_many_that_say_nothing(tmp_path: Path, say: bytes) -> None:
    with running(tmp_path, "tracker") as (info, log):
        with many(info["port"], say):
            assert rpcnb.connect_tracker("127.0.0.1", info["port"]).summary()["queue_info"] == {}
        assert len(log.read_text()) < 5000


@pytest.mark.parametrize("which", ["port", "web_port"])
def test_a_proxy_is_reached_beside_many_that_say_nothing(tmp_path: Path, which: str) -> None:
    with (
        running(tmp_path, "proxy", "--web-port", "0") as (info, log),
        many(info[which]),
        rpcnb.Server("127.0.0.1", info["port"], key="x", is_proxy=True, silent=True) as board,
    ):
        eventually(lambda: board.registered, "the wait at the proxy", 30)
        with rpcnb.connect(f"ws://127.0.0.1:{info['web_port']}/ws", key="x", timeout=20) as session:
            assert session.call("rpc.test.addone", 1) == 2
        assert len(log.read_text()) < 5000


def test_boards_of_a_tracker_stay_beside_many_that_offer_nothing(tmp_path: Path) -> None:
    with (
        running(tmp_path, "tracker") as (info, _),
        socket.create_connection(("127.0.0.1", info["port"]), 10) as board,
    ):
        board.sendall(GREETING + encode_frame([5, {"key": "server:rpi", "addr": [None, 1]}]))
        board.sendall(encode_frame([3, "rpi", [1, "rpi:1"], None]))
        answer = GREETING + encode_frame(0) * 2
        assert b"".join(board.recv(1) for _ in answer) == answer
        with many(info["port"], FAKE):
            summary = rpcnb.connect_tracker("127.0.0.1", info["port"]).summary()
            assert "server:rpi" in [one["key"] for one in summary["server_info"]]
            assert summary["queue_info"]["rpi"] == {"free": 1, "pending": 0}
        assert not is_ended(board)
