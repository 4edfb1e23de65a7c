"""Event-driven stock servers, which do not look at their input while a request is parked: everything is answered."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from parkedpeer import SlowMemory, parked_server

import rpcnb
from rpcnb import errors
from rpcnb.link.dialer import Dialer
from rpcnb.runtime.environment import Environment
from rpcnb.runtime.registry import Registry


@pytest.fixture
def address() -> Iterator[str]:
    registry = Registry()

    async def wait(x: Any = 7) -> Any:
        await asyncio.sleep(0.03)
        return x

    async def never() -> None:
        await asyncio.sleep(60)

    registry.register("wait", wait)
    registry.register("never", never)
    registry.register("echo", lambda x: x, run="loop")
    with parked_server(Environment(registry=registry, local_session=SlowMemory)) as found:
        yield found


@pytest.fixture
def session(address: str) -> Iterator[rpcnb.Session]:
    with rpcnb.connect(address) as found:
        assert not found.is_rpcnb
        yield found


def test_requests_behind_a_parked_one_are_answered(session: rpcnb.Session) -> None:
    wait = session.get_function("wait")
    pending = wait.submit(1)
    assert session.get_function("echo", timeout=5)(2, timeout=5) == 2
    assert pending.result(5) == 1
    assert [one.result(5) for one in [wait.submit(i) for i in range(5)]] == [*range(5)]
    assert wait.map(range(5), timeout=5) == [*range(5)]
    assert session.state == "ready"  # nobody waits for what made it look


def test_a_call_after_one_that_was_given_up_is_answered(session: rpcnb.Session) -> None:
    wait, echo = session.get_function("wait"), session.get_function("echo")
    with pytest.raises(errors.DeadlineExceeded):
        wait(timeout=0.005)
    assert echo(1, timeout=5) == 1


def test_copies_that_complete_later_are_answered(session: rpcnb.Session) -> None:
    data = np.arange(300_000, dtype="int32")
    tensors = [session.array(data + i, timeout=5) for i in range(3)]
    copies = [session.submit(tensor.numpy) for tensor in tensors]
    assert all(np.array_equal(copy.result(5), data + i) for i, copy in enumerate(copies))
    del tensors  # their frees ride in front of the next request
    session.cpu().sync(timeout=5)
    assert session.array([1.0], timeout=5).numpy(timeout=5) == [1.0]


def test_awaited_requests_together_are_answered(address: str) -> None:
    async def use() -> list[Any]:
        async with await rpcnb.connect_async(address) as session:
            wait = await session.get_function("wait")
            return await asyncio.gather(*[wait(i, timeout=5) for i in range(4)], session.call("echo", 9, timeout=5))

    assert asyncio.run(use()) == [0, 1, 2, 3, 9]


def test_who_waits_behind_a_silent_request_is_told(session: rpcnb.Session) -> None:
    never = session.get_function("never").submit()
    with pytest.raises(errors.DeadlineExceeded, match="has not answered an earlier CallFunc yet"):
        session.get_function("echo", timeout=0.1)
    with pytest.raises(errors.DeadlineExceeded, match="behind which this waits"):
        session.submit(session.get_function, "echo", timeout=0.1).result(5)
    assert never.cancel()


def test_a_browser_gets_one_request_at_a_time() -> None:
    dialer: Any = Dialer
    assert dialer(None, None, ("rpc.WasmSession", b""), 3).depth == 1
    assert dialer(None, None, ("rpc.WasmSession", b""), 3, depth=4).depth == 4
    assert dialer(None, None, (), 3).depth is None
