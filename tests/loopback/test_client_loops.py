"""Awaited sessions and event loops: a session belongs to the loop in which it was opened, and says so elsewhere."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine
from typing import Any

import pytest
from conftest import eventually

import rpcnb
from rpcnb import errors
from rpcnb.runtime.registry import Registry

Serve = Callable[..., Any]


@pytest.fixture
def server(serve: Serve, registry: Registry) -> Any:
    async def wait(seconds: float) -> float:
        await asyncio.sleep(seconds)
        return seconds

    registry.register("echo", lambda x: x)
    registry.register("wait", wait)
    return serve()


def elsewhere(work: Callable[[], Coroutine[Any, Any, Any]]) -> BaseException | None:
    """Run a coroutine in the loop of another thread; returns what it raises."""
    raised: list[BaseException] = []

    def run() -> None:
        try:
            asyncio.run(work())
        except Exception as error:
            raised.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    return raised[0] if raised else None


def test_a_session_in_use_is_not_opened_again_from_another_loop(server: Any) -> None:
    async def main() -> None:
        session = await rpcnb.connect_async(server.address)
        echo, wait = await session.get_function("echo"), await session.get_function("wait")
        waiting = asyncio.ensure_future(wait(0.5))
        await echo(1)
        for use in (session.reconnect, lambda: echo(1), session.status):
            error = await asyncio.to_thread(elsewhere, use)
            assert isinstance(error, errors.WrongLoop)
            assert "in which it was opened; this is" in str(error)
        assert await waiting == 0.5
        assert await echo(2) == 2
        await session.close()

    asyncio.run(main())


@pytest.mark.parametrize("lanes", [0, 3])
@pytest.mark.parametrize("how", ["close", "async with", "reconnect"])
def test_a_session_whose_loop_is_no_more_is_closed_or_opened_again_in_this_one(
    server: Any, lanes: int, how: str
) -> None:
    async def begin() -> Any:
        session = await rpcnb.connect_async(server.address, lanes=lanes)
        assert await session.call("wait", 0.01) == 0.01
        return session

    async def leave(session: Any) -> None:
        async with session:
            pass

    async def go_on(session: Any) -> None:
        with pytest.raises(errors.WrongLoop, match="which is closed"):
            await session.call("echo", 1)
        await session.reconnect()
        assert await session.call("echo", 1) == 1
        await session.close()

    session = asyncio.run(begin())
    asyncio.run({"close": session.close, "async with": leave, "reconnect": go_on}[how](*[session] * (how != "close")))
    assert session.state == "closed"
    eventually(lambda: server.sessions == 0, "the end of the session at the server")
