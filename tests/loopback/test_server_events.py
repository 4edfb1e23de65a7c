"""What observers of sessions and servers are told, and what a server says of its clients."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from conftest import eventually

import rpcnb
from rpcnb import errors, events
from rpcnb.runtime.registry import Registry

Serve = Callable[..., Any]


def names(seen: list[events.Event]) -> list[str]:
    return [type(event).__name__ for event in seen if type(event) is not events.SessionStateChanged]


@pytest.fixture
def functions(registry: Registry) -> Registry:
    async def later(seconds: float) -> float:
        await asyncio.sleep(seconds)
        return seconds

    def fail() -> None:
        raise ValueError("boom")

    registry.register("add", lambda a, b: a + b)
    registry.register("later", later)
    registry.register("fail", fail)
    return registry


def test_a_session_tells_of_its_calls(serve: Serve, functions: Registry) -> None:
    seen: list[events.Event] = []
    with rpcnb.connect(serve().address) as session:
        add = session.get_function("add")
        assert add(1, 2) == 3
        session.observers.subscribe(seen.append)
        assert add(1, 2) == 3
        with pytest.raises(errors.RemoteError):
            session.call("fail")
        with pytest.raises(errors.DeadlineExceeded):
            session.call("later", 0.5, timeout=0.05)
        assert add.submit(3, 4).result() == 7
    assert names(seen) == [
        *("CallSent", "CallFinished"),
        *("CallSent", "CallFailed"),
        *("CallSent", "CallCancelled"),
        *("CallQueued", "CallSent", "CallFinished"),
        "SessionClosed",
    ]
    first, last = seen[0], seen[-1]
    assert isinstance(first, events.CallSent)
    assert first.function == "add"
    assert first.source == session.name
    assert isinstance(last, events.SessionClosed)
    assert last.reason == ""


def test_an_async_session_tells_of_its_calls(serve: Serve, functions: Registry) -> None:
    seen: list[events.Event] = []

    async def main() -> None:
        async with await rpcnb.connect_async(serve().address) as session:
            session.observers.subscribe(seen.append)
            assert await session.call("add", 1, 2) == 3
            with pytest.raises(errors.RemoteError):
                await session.call("fail")

    asyncio.run(main())
    assert names(seen) == ["CallSent", "CallFinished", "CallSent", "CallFailed", "SessionClosed"]


def test_a_session_keeps_account_of_its_memory(serve: Serve) -> None:
    seen: list[events.Event] = []
    with rpcnb.connect(serve().address) as session:
        session.observers.subscribe(seen.append)
        one = session.empty((100,), "float32")
        two = session.array(np.zeros(50, "int8"))
        assert session.held_bytes == 450
        one.free()
        assert session.held_bytes == 50
        assert session.peak_bytes == 450
        del two
        assert session.held_bytes == 0
    memory = [event for event in seen if isinstance(event, (events.MemoryAllocated, events.MemoryFreed))]
    assert [(type(event).__name__, event.nbytes, event.held) for event in memory] == [
        ("MemoryAllocated", 400, 400),
        ("MemoryAllocated", 50, 450),
        ("MemoryFreed", 400, 50),
        ("MemoryFreed", 50, 0),
    ]


def test_all_sessions_and_servers_can_be_observed(serve: Serve, functions: Registry) -> None:
    seen: list[events.Event] = []
    unsubscribe = events.observers.subscribe(seen.append)
    try:
        server = serve(key="k")
        with rpcnb.connect(server.address, key="k") as session:
            assert session.call("later", 0.01) == 0.01
        eventually(lambda: server.sessions == 0)
    finally:
        unsubscribe()
    assert {"ConnectionAccepted", "SessionOpened", "RequestParked", "RequestCompleted", "SessionClosed"} <= set(
        names(seen)
    )
    (done,) = [event for event in seen if isinstance(event, events.RequestCompleted)]
    assert done.function == "later"
    assert done.seconds >= 0.005


def test_a_server_tells_whom_it_rejects(serve: Serve, caplog: pytest.LogCaptureFixture) -> None:
    seen: list[events.Event] = []
    server = serve(key="k", max_sessions=1)
    server.observers.subscribe(seen.append)
    with pytest.raises(errors.KeyMismatch):
        rpcnb.connect(server.address, key="other")
    with rpcnb.connect(server.address, key="k"), pytest.raises(errors.RemoteError, match="full"):
        rpcnb.connect(server.address, key="k")
    rejected = [event.reason for event in seen if isinstance(event, events.ConnectionRejected)]
    assert rejected == ["wrong key or token", "full"]
    caplog.clear()


def test_a_server_says_what_its_clients_wait_for(serve: Serve, functions: Registry) -> None:
    release = threading.Event()
    functions.register("block", lambda: release.wait(20))
    server = serve()
    with rpcnb.connect(server.address, lanes=0) as session, rpcnb.connect(server.address) as other:
        add, block = session.get_function("add"), other.get_function("block")
        parked = session.get_function("later").submit(0.4)
        queued = add.submit(1, 2)
        running = block.submit()
        eventually(lambda: {one.state for one in server.pending} == {"parked", "running"})
        states = {one.state: one for one in server.pending}
        assert states["parked"].function == "later"
        assert states["parked"].age >= 0
        assert states["running"].function == "block"
        eventually(lambda: next(one.queued for one in server.pending if one.state == "parked") == 1)
        release.set()
        assert (parked.result(), queued.result(), running.result()) == (0.4, 3, True)
        eventually(lambda: {one.state for one in server.pending} == {"idle"})
