"""Servers that stop answering, sessions that are lost, and opening them again."""

from __future__ import annotations

import asyncio
import json
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import eventually

import rpcnb
from rpcnb import errors, events
from rpcnb.client import life
from rpcnb.runtime import overlap
from rpcnb.runtime.registry import Registry

Serve = Callable[..., Any]

BOARD = """
import sys
from rpcnb.command.main import main
from rpcnb.runtime import overlap
overlap.POLL_SECONDS = 0.2
sys.exit(main(sys.argv[1:]))
"""


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Seconds instead of minutes."""
    monkeypatch.setattr(overlap, "POLL_SECONDS", 0.2)
    monkeypatch.setattr(life, "SILENT_AFTER", 1.0)
    monkeypatch.setattr(life, "OPEN_CONTROL_AFTER", 0.1)


@pytest.fixture
def board(tmp_path: Path) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A demo board in a process of its own, which answers polls soon."""
    ready = tmp_path / "ready.json"
    command = [sys.executable, "-c", BOARD, "serve", "--demo", "--port", "0", "--no-token", "--ready-file", str(ready)]
    command.append("--shared-state")  # what stops is the process that serves
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, text=True)
    try:
        eventually(ready.exists, "the board", 30)
        found = json.loads(ready.read_text())
        yield process, f"{found['host']}:{found['port']}"
    finally:
        process.send_signal(signal.SIGCONT)
        process.terminate()
        process.wait()


def test_c4_a_stopped_server_is_unresponsive_and_comes_back(
    board: tuple[subprocess.Popen[str], str], impatient: None
) -> None:
    process, address = board
    seen: list[str] = []
    with rpcnb.connect(address) as session:
        sleep = session.get_function("demo.sleep")
        sleep.submit(0.01).result(timeout=10)
        session.observers.subscribe(
            lambda event: seen.append(event.state) if isinstance(event, events.SessionStateChanged) else None
        )
        process.send_signal(signal.SIGSTOP)
        start = time.monotonic()
        with pytest.raises(errors.DeadlineExceeded) as caught:
            session.call("demo.add", 1, 2, timeout=0.3)
        assert 0.3 <= caught.value.elapsed < 2
        eventually(lambda: session.state == "unresponsive", "that nothing was heard")
        assert time.monotonic() - start > 0.9
        job = session.get_function  # lookups wait
        pending = session.submit(job, "demo.add")
        process.send_signal(signal.SIGCONT)
        assert pending.result(timeout=10)(3, 4) == 7
        eventually(lambda: session.state == "ready")
        assert session.call("demo.add", 5, 6) == 11
        eventually(lambda: "unresponsive" in seen and seen[-1] == "ready")


def test_c4_the_awaited_session_sees_it_too(board: tuple[subprocess.Popen[str], str], impatient: None) -> None:
    process, address = board

    async def main() -> None:
        async with await rpcnb.connect_async(address) as session:
            sleep = await session.get_function("demo.sleep")
            await sleep(0.01)
            process.send_signal(signal.SIGSTOP)
            job = asyncio.ensure_future(session.call("demo.add", 1, 2))
            give_up = time.monotonic() + 10
            while session.state != "unresponsive":
                assert time.monotonic() < give_up
                await asyncio.sleep(0.01)
            process.send_signal(signal.SIGCONT)
            assert await asyncio.wait_for(job, 10) == 3
            while session.state != "ready":
                assert time.monotonic() < give_up
                await asyncio.sleep(0.01)

    asyncio.run(main())


def test_lost_after_ends_a_session_that_hears_nothing(
    board: tuple[subprocess.Popen[str], str], impatient: None
) -> None:
    process, address = board
    with rpcnb.connect(address, lost_after=0.5) as session:
        sleep = session.get_function("demo.sleep")
        sleep.submit(0.01).result(timeout=10)
        job = sleep.submit(30)
        process.send_signal(signal.SIGSTOP)
        with pytest.raises(errors.SessionLost, match=r"has said nothing for 0\.\d s"):
            job.result(timeout=10)
        assert session.state == "lost"
        with pytest.raises(errors.SessionLost):
            session.call("demo.add", 1, 2)


def test_a_server_that_works_for_long_is_not_unresponsive(serve: Serve, registry: Registry, impatient: None) -> None:
    done = threading.Event()
    registry.register("work", lambda: done.wait(20))
    with rpcnb.connect(serve().address) as session:
        job = session.get_function("work").submit()
        eventually(lambda: session._lanes is not None and session._lanes.opened, "the control lane")
        heard = session._lanes.opened.answers
        eventually(lambda: session._lanes.opened.answers > heard + 8)  # 1.6 s of polls
        assert session.state == "busy"
        done.set()
        assert job.result(timeout=10) is True


def test_a_busy_stock_server_is_not_unresponsive(impatient: None, serve: Serve, registry: Registry) -> None:
    done = threading.Event()
    registry.register("work", lambda: done.wait(20))
    with rpcnb.connect(serve().address, extensions=False) as session:
        work = session.get_function("work")
        job = work.submit()
        before = time.monotonic()
        eventually(lambda: time.monotonic() - before > 1.5)
        assert life.unheard_by_tcp(session._link.wire.sock) > 0.9  # nothing was said: TCP's probes come after 20 s
        done.set()
        assert job.result(timeout=10) is True
        eventually(lambda: session.state == "ready")


def test_reconnect_opens_the_session_again_under_its_name(serve: Serve, registry: Registry) -> None:
    registry.register("echo", lambda x: x)

    async def wait() -> None:
        await asyncio.sleep(30)

    registry.register("wait", wait)
    server = serve()
    seen: list[str] = []
    with rpcnb.connect(server.address) as session:
        session.observers.subscribe(lambda event: seen.append(type(event).__name__))
        name, echo, module = session.name, session.get_function("echo"), session.system_lib()
        tensor = session.array(np.ones(4))
        job = session.get_function("wait").submit()
        assert session.call("echo", 1) == 1
        session.reconnect()
        assert (session.name, session.state) == (name, "ready")
        with pytest.raises(errors.SessionLost, match="opened again"):
            job.result(timeout=10)
        sent = session._link.wire.requests
        stale: list[Callable[[], object]] = [
            lambda: echo(1),
            lambda: echo(1, timeout=5),
            lambda: echo.submit(1).result(timeout=5),
            lambda: echo.map([1]),
            lambda: tensor.numpy(),
            lambda: tensor.copyfrom(np.zeros(4)),
            lambda: module.get_function("f"),
        ]
        for use in stale:
            with pytest.raises(errors.StaleHandle, match="before session-"):
                use()
        again = session.get_function("echo")
        with pytest.raises(errors.StaleHandle):
            again(tensor)
        for thing in (echo, module, tensor):
            thing.free()
        assert session._link.wire.requests - sent <= 2  # one look-up, and the well-known one of the module
        assert again(2) == 2
        assert session.call("echo", 3) == 3
        assert session.held_bytes == 0
        assert seen.count("SessionOpened") == 1
    eventually(lambda: not server._connections)


def test_a_lost_session_is_opened_again(serve: Serve, registry: Registry) -> None:
    registry.register("echo", lambda x: x)
    first = serve()
    session = rpcnb.connect(first.address)
    session.submit(session.array, np.ones(2 << 20, np.uint8)).result(timeout=10)
    first.close()
    with pytest.raises(errors.SessionLost):
        session.call("echo", 1)
    assert session.state == "lost"
    with pytest.raises(errors.ConnectFailed, match="refused"):
        session.reconnect(timeout=5)
    second = serve(port=first.port)
    session.reconnect()
    assert session.call("echo", 2) == 2
    session.close()
    assert second.port == first.port


def test_an_awaited_session_is_opened_again(serve: Serve, registry: Registry) -> None:
    registry.register("echo", lambda x: x)
    server = serve()

    async def main() -> None:
        async with await rpcnb.connect_async(server.address) as session:
            echo = await session.get_function("echo")
            tensor = await session.array(np.ones(4))
            await session.reconnect()
            with pytest.raises(errors.StaleHandle):
                await echo(1)
            with pytest.raises(errors.StaleHandle):
                await tensor.numpy()
            assert await session.call("echo", 2) == 2

    asyncio.run(main())


def test_a_local_session_cannot_be_opened_again() -> None:
    with rpcnb.LocalSession() as session, pytest.raises(errors.LocalProtocolError, match="no address"):
        session.reconnect()


@pytest.mark.parametrize("extensions", [True, False])
def test_c5_the_end_of_an_idle_session_is_seen_without_using_it(serve: Serve, extensions: bool) -> None:
    server = serve()
    with rpcnb.connect(server.address, extensions=extensions) as session:
        assert session.call("rpc.test.addone", 1) == 2
        server.close()
        eventually(lambda: session.state == "lost", "the loss", 4)
        with pytest.raises(errors.SessionLost):
            session.call("rpc.test.addone", 1)


def test_the_end_of_an_idle_sessions_time_is_seen_too(serve: Serve) -> None:
    with rpcnb.connect(serve().address, session_timeout=0.3) as session:
        eventually(lambda: session.state == "lost", "the end", 4)
        assert isinstance(session.ended_by, errors.SessionTimeout)
