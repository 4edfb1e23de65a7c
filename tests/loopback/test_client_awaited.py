"""Awaited calls that take the short way: nobody sees a difference but in time."""

from __future__ import annotations

import asyncio
import sys
import threading
from collections.abc import Iterator
from typing import Any

import pytest

import rpcnb
from rpcnb import errors
from rpcnb.runtime.registry import Registry


@pytest.fixture
def gate() -> threading.Event:
    return threading.Event()


@pytest.fixture
def server(gate: threading.Event) -> Iterator[rpcnb.Server]:
    registry = Registry()
    registry.register("add", lambda a, b: a + b)
    registry.register("blocks", lambda: gate.wait(20))
    registry.register("fails", lambda: 1 // 0)
    registry.register("bytes", lambda: b"x" * 100)
    with rpcnb.Server(port=0, registry=registry, silent=True) as server:
        yield server
        gate.set()


def run(server: rpcnb.Server, use: Any) -> Any:
    async def main() -> Any:
        async with await rpcnb.connect_async(server.address) as session:
            return await asyncio.wait_for(use(session), 20)

    return asyncio.run(main())


def test_results_of_every_kind_and_errors_come_back(server: rpcnb.Server) -> None:
    async def use(session: rpcnb.AsyncSession) -> None:
        add = await session.get_function("add")
        assert await add(1, 2) == 3
        assert await add("a", "b") == "ab"
        assert await add(1 << 62, 1) == (1 << 62) + 1
        assert await (await session.get_function("bytes"))() == b"x" * 100
        with pytest.raises(errors.RemoteError, match="division"):
            await (await session.get_function("fails"))()
        with pytest.raises(errors.ArgumentError):
            await add(object(), 1)
        assert await add(3, 4) == 7

    run(server, use)


def test_calls_on_the_way_together_keep_their_results_apart(server: rpcnb.Server) -> None:
    async def use(session: rpcnb.AsyncSession) -> None:
        add = await session.get_function("add")
        assert await asyncio.gather(*(add(number, 0) for number in range(300))) == list(range(300))

    run(server, use)


def test_a_call_is_listed_while_it_is_awaited_and_can_be_cancelled(server: rpcnb.Server, gate: threading.Event) -> None:
    async def use(session: rpcnb.AsyncSession) -> None:
        blocks, add = await session.get_function("blocks"), await session.get_function("add")
        task = asyncio.ensure_future(blocks())
        await asyncio.sleep(0)  # the task begins
        (call,) = session.pending
        assert (call.function, call.state, call.moved, call.deadline) == ("blocks", "sent", 0, None)
        assert "blocks, sent" in repr(call)
        assert call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert call.state == "cancelled"
        assert not call.cancel()
        assert session.pending == []
        assert session.state == "draining"
        gate.set()
        assert await add(1, 2) == 3
        assert session.state == "ready"

    run(server, use)


def test_the_end_of_the_session_ends_it(server: rpcnb.Server) -> None:
    async def use(session: rpcnb.AsyncSession) -> None:
        blocks = await session.get_function("blocks")
        task = asyncio.ensure_future(blocks())
        await asyncio.sleep(0)  # the task begins
        (call,) = session.pending
        await session.close()
        with pytest.raises(errors.SessionClosed):
            await task
        assert call.finished is not None
        with pytest.raises(errors.SessionClosed):
            await blocks()

    run(server, use)


def test_a_server_holds_the_switch_interval_that_it_wants() -> None:
    before = sys.getswitchinterval()
    with rpcnb.Server(port=0, silent=True, switch_interval=0.0002):
        assert sys.getswitchinterval() == pytest.approx(0.0002, abs=1e-6)
    assert sys.getswitchinterval() == before
    with pytest.raises(ValueError, match="switch interval of more than 0"):
        rpcnb.Server(port=0, switch_interval=0)
