"""No public object is kept alive by a cycle: what is dropped is closed, or freed, at once."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import eventually

import rpcnb
from rpcnb.runtime.registry import Registry


@pytest.fixture(autouse=True)
def _without_the_collector() -> Iterator[None]:
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.fixture
def server(registry: Registry, serve: Callable[..., Any]) -> Any:
    async def later(x: int) -> int:
        return x

    registry.register("add", lambda a, b: a + b)
    registry.register("later", later)
    return serve()


def _fails(session: Any) -> None:
    for name in ("nothing", "add"):
        with contextlib.suppress(rpcnb.errors.RpcError):
            session.call(name)


USES: dict[str, Callable[[Any], object]] = {
    "nothing": lambda session: None,
    "call": lambda session: session.call("add", 1, 2),
    "names": lambda session: session.fn.add(1, 2),
    "function": lambda session: session.get_function("add")(1, 2),
    "submit": lambda session: session.get_function("add").submit(1, 2).result(),
    "started": lambda session: [session.get_function("later").submit(n) for n in range(5)][-1].result(),
    "limit": lambda session: session.call("add", 1, 2, timeout=5),
    "cancel": lambda session: session.get_function("later").submit(1).cancel(),
    "map": lambda session: session.get_function("add").map(range(5), range(5)),
    "array": lambda session: session.array(np.arange(5)).numpy(),
    "copy": lambda session: session.submit(session.array, np.arange(1 << 20)).result(),
    "files": lambda session: (session.upload(b"x", "file"), session.download("file"), session.listdir()),
    "list": lambda session: session.list_functions(),
    "device": lambda session: (session.cpu().exist, session.cpu().sync()),
    "status": lambda session: session.status(),
    "timing": lambda session: session.time_evaluator("add", session.cpu(), number=1)(1, 2),
    "observed": lambda session: (session.observers.subscribe(str), session.call("add", 1, 2)),
    "error": _fails,
    "reconnect": lambda session: (session.call("add", 1, 2), session.reconnect()),
    "close": lambda session: session.close(),
}


@pytest.mark.parametrize("use", USES)
def test_a_session_that_is_dropped_is_closed_at_once(server: Any, use: str) -> None:
    session = rpcnb.connect(server.address)
    USES[use](session)
    dropped = weakref.ref(session)
    del session
    eventually(lambda: dropped() is None, "its end", 1)  # a thread may be leaving an operation of it
    eventually(lambda: server.sessions == 0, "the end at the server", 5)


def test_what_a_session_gives_holds_it_and_no_longer(server: Any) -> None:
    session = rpcnb.connect(server.address)
    tensor, add = session.array(np.arange(3)), session.get_function("add")
    dropped = [weakref.ref(one) for one in (session, tensor, add)]
    del session
    assert add(1, 2) == 3
    assert (tensor.numpy() == np.arange(3)).all()
    assert server.sessions == 1
    del tensor, add
    eventually(lambda: all(one() is None for one in dropped), "their end", 1)
    eventually(lambda: server.sessions == 0, "the end at the server", 5)


async def _awaited_failure(session: Any) -> None:
    for name in ("nothing", "add"):
        with contextlib.suppress(rpcnb.errors.RpcError):
            await session.call(name)


async def _awaited_array(session: Any) -> None:
    await (await session.array(np.arange(4))).numpy()


async def _awaited_late(session: Any) -> None:
    with contextlib.suppress(rpcnb.errors.RpcError):
        await session.call("later", 1, timeout=1e-6)


AWAITED: dict[str, Callable[[Any], Any]] = {
    "call": lambda session: session.call("add", 1, 2),
    "started": lambda session: session.call("later", 1),
    "files": lambda session: session.upload(b"x", "file"),
    "array": _awaited_array,
    "error": _awaited_failure,
    "late": _awaited_late,
}


@pytest.mark.parametrize("use", AWAITED)
def test_an_awaited_session_that_is_dropped_is_closed_at_once(server: Any, use: str) -> None:
    async def main() -> None:
        session = await rpcnb.connect_async(server.address)
        await AWAITED[use](session)
        dropped = weakref.ref(session)
        del session
        for _ in range(100):
            if dropped() is None:
                break
            await asyncio.sleep(0.01)
        assert dropped() is None
        for _ in range(500):
            if not server.sessions:
                break
            await asyncio.sleep(0.01)
        assert not server.sessions

    asyncio.run(main())


def test_a_trackers_board_is_given_back_at_once(registry: Registry, serve: Callable[..., Any]) -> None:
    registry.register("add", lambda a, b: a + b)
    with rpcnb.Tracker(port=0, silent=True) as tracker:
        server = serve(key="rpi", tracker_addr=("127.0.0.1", tracker.port), trust_tracker=True)
        asked = rpcnb.connect_tracker("127.0.0.1", tracker.port)
        for _ in range(3):
            session = asked.request("rpi")
            assert session.call("add", 1, 2) == 3
            del session
        eventually(lambda: server.sessions == 0)
        asked.close()
        server.close()


def test_a_library_and_its_functions_are_freed(server: Any, tmp_path: Path) -> None:
    session = rpcnb.connect(server.address)
    module = session.system_lib()
    dropped = weakref.ref(module)
    del module
    eventually(lambda: dropped() is None, "its end", 1)
    session.close()
