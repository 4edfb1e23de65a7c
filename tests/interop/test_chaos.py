"""C3: a connection that is cut, frozen, delayed or drips at byte ``k``: a right value or a typed error, in time.

Between every client and every server stands the relay of ``tests/loopback/chaos.py``. Stock's own weaknesses are not
looked at: its client has no time limits and ends its process on some cuts, so it runs in children of its child; its
server serves one at a time.
"""

from __future__ import annotations

import asyncio
import functools
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from conftest import eventually

import rpcnb
from rpcnb.errors import RpcError
from rpcnb.runtime.registry import Registry

sys.path.insert(0, str(Path(__file__).parents[1] / "loopback"))

from chaos import HARMLESS, LOSSES, ChaosRelay, Plan, plans

if TYPE_CHECKING:
    from stock_peer import Peer

pytest_plugins = ("stock_peer",)
pytestmark = [pytest.mark.timeout(240)]

LIMIT = 10.0  # seconds for connecting, and for each operation
SHORT = 0.4  # of a connection that freezes: all operations run into it
SPARE = 10.0  # seconds beyond a limit that a loaded machine may need
EVERY = 260  # bytes: the handshake, init, and the first packets
DATA = bytes(range(256)) * 20
ARRAY = np.arange(700, dtype="int32")


# -- what the clients do ---------------------------------------------------------------------------------------------


def job(address: str, key: str, limit: float) -> None:
    """Call, copy, upload and download with our client; a wrong value is an AssertionError."""
    with rpcnb.connect(address, key=key, timeout=limit) as session:
        session.timeout = limit
        assert session.call("rpc.test.addone", 41) == 42
        tensor = session.array(ARRAY)
        assert (tensor.numpy() == ARRAY).all()
        session.upload(DATA, "file")
        assert session.download("file") == DATA


async def awaited_job(address: str, key: str, limit: float) -> None:
    """Do as :func:`job`, awaited."""
    async with await rpcnb.connect_async(address, key=key, timeout=limit) as session:
        session.timeout = limit
        assert await session.call("rpc.test.addone", 41) == 42
        tensor = await session.array(ARRAY)
        assert (await tensor.numpy() == ARRAY).all()
        await session.upload(DATA, "file")
        assert await session.download("file") == DATA


def job_on_lanes(address: str, key: str, limit: float) -> None:
    """Do what opens the control lane and a bulk lane; what goes over a lane that is lost may fail, typed."""
    with rpcnb.connect(address, key=key, timeout=limit) as session:
        session.timeout = limit
        later = session.get_function("later")
        big = np.arange(1 << 20, dtype="int32")
        tensor = session.empty(big.shape, "int32")
        copy = session.submit(tensor.copyfrom, big)
        pending = [later.submit(x) for x in range(5)]
        for x, one in enumerate(pending):
            assert one.result() == x
        copy.result()
        assert (tensor.numpy() == big).all()
        assert session.call("rpc.test.addone", 41) == 42


def stock_job(port: int, key: str) -> str:
    """Do as :func:`job` with a stock client in a child of this child; returns how it ended."""
    child = os.fork()
    if not child:
        os._exit(_stock_client(port, key))
    give_up = time.monotonic() + LIMIT
    while not (ended := os.waitpid(child, os.WNOHANG))[0]:
        if time.monotonic() > give_up:
            os.kill(child, 9)
            os.waitpid(child, 0)
            return "hangs"
        time.sleep(0.002)
    code = os.waitstatus_to_exitcode(ended[1])
    return {0: "right", 1: "error", 2: "wrong"}.get(code, "aborted")


def _stock_client(port: int, key: str) -> int:
    from stock_peer import tvm

    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # what it says when it aborts
    try:
        remote = tvm().rpc.connect("127.0.0.1", port, key)
        good = remote.get_function("rpc.test.addone")(41) == 42
        tensor = tvm().runtime.tensor(ARRAY, remote.cpu())
        good = good and (tensor.numpy() == ARRAY).all()
        remote.upload(bytearray(DATA), "file")
        good = good and bytes(remote.download("file")) == DATA
    except Exception:
        return 1
    return 0 if good else 2


# -- what must come of it --------------------------------------------------------------------------------------------


def right_or_typed(run: Callable[[], object], plan: Plan, limit: float) -> str:
    """Run a job under a plan; returns ``right`` or the name of its typed error."""
    started = time.monotonic()
    try:
        run()
        came = "right"
    except RpcError as error:
        came = type(error).__name__
    except BaseException as error:
        raise AssertionError(f"expected a right value or an error of rpcnb under {plan}") from error
    spent = time.monotonic() - started
    assert spent < limit + SPARE, f"took {spent:.1f} s under {plan}"
    return came


@pytest.fixture
def board(serve: Callable[..., Any], registry: Registry) -> Any:
    """Our server."""

    async def later(x: int) -> int:
        await asyncio.sleep(0.001)
        return x

    registry.register("later", later)
    return serve(key="chaos")


@pytest.fixture
def relay(board: Any) -> Iterator[ChaosRelay]:
    """A relay in front of our server."""
    with ChaosRelay(("127.0.0.1", board.port)) as made:
        yield made


def try_all(
    relay: ChaosRelay, run: Callable[[str, str, float], object], todo: Iterator[Plan], key: str, limit: float = LIMIT
) -> Counter[str]:
    """Run a job under each plan; returns how often each outcome came."""
    came: Counter[str] = Counter()
    for plan in todo:
        relay.begin(plan)
        came[right_or_typed(lambda: run(relay.address, key, limit), plan, limit)] += 1
    relay.begin(None)
    run(relay.address, key, LIMIT)  # the server serves as before
    return came


def undisturbed(relay: ChaosRelay, run: Callable[[str, str, float], object], key: str) -> Counter[tuple[int, str]]:
    """Return what a job's connections carry when they are left alone."""
    relay.begin(None)
    run(relay.address, key, LIMIT)
    return Counter({place: total for place, total in relay.seen.items() if total})


JOBS = {"blocking": job, "awaited": lambda *args: asyncio.run(awaited_job(*args)), "lanes": job_on_lanes}


@pytest.mark.parametrize("name", JOBS)
def test_c3_a_cut_ends_in_a_value_or_a_typed_error(name: str, board: Any, relay: ChaosRelay, caplog: Any) -> None:
    run = JOBS[name]
    seen = undisturbed(relay, run, "chaos")
    every, sampled = {"blocking": (EVERY, 60), "awaited": (60, 30), "lanes": (0, 12)}[name]
    with rpcnb.connect(board.address, key="chaos") as other:
        addone = other.get_function("rpc.test.addone")

        def beside(address: str, key: str, limit: float) -> None:
            assert addone(1, timeout=LIMIT) == 2  # others are served meanwhile
            run(address, key, limit)

        came = try_all(relay, beside, plans(LOSSES, seen, every, sampled, 3), "chaos")
        assert addone(1, timeout=LIMIT) == 2
    assert sum(came.values()) - came["right"] > 10  # the cuts have cut something
    eventually(lambda: board.sessions == 0, "no session left")
    caplog.clear()


@pytest.mark.parametrize("name", JOBS)
def test_c3_a_frozen_connection_ends_in_a_typed_error_in_time(
    name: str, board: Any, relay: ChaosRelay, caplog: Any
) -> None:
    run = JOBS[name]
    seen = undisturbed(relay, run, "chaos")
    sampled = 2 if name == "lanes" else 5  # of each direction of each connection
    try_all(relay, run, plans(("freeze",), seen, 0, sampled, 5), "chaos", SHORT)
    eventually(lambda: board.sessions == 0, "no session left")
    caplog.clear()


@pytest.mark.parametrize("name", JOBS)
def test_c3_delays_and_single_bytes_change_nothing(name: str, relay: ChaosRelay) -> None:
    run = JOBS[name]
    seen = undisturbed(relay, run, "chaos")
    came = try_all(relay, run, plans(HARMLESS, seen, 0, 15, 7), "chaos")
    assert set(came) == {"right"}


_FRESH: list[Any] = []


def fresh_stock_server() -> int:
    """Start another stock server; the one of before is ended: after a cut it may never serve again. Runs in a child."""
    from stock_peer import _SERVERS, start_stock_server

    while _FRESH:
        _FRESH.pop().terminate()
    port = start_stock_server("stock")
    _FRESH.append(_SERVERS.pop())
    return port


@pytest.mark.stock
def test_c3_our_client_with_a_stock_server(stock_servers: Peer) -> None:
    with ChaosRelay(("127.0.0.1", stock_servers.run(fresh_stock_server))) as relay:
        seen = undisturbed(relay, job, "stock")
        assert set(try_all(relay, job, plans(HARMLESS, seen, 0, 4, 13), "stock")) == {"right"}
    todo = [*plans(LOSSES, seen, 0, 4, 11), *plans(("freeze",), seen, 0, 1, 17)]
    came: Counter[str] = Counter()
    for plan in todo:
        with ChaosRelay(("127.0.0.1", stock_servers.run(fresh_stock_server))) as relay:
            relay.begin(plan)
            limit = SHORT if plan.kind == "freeze" else LIMIT
            came[right_or_typed(functools.partial(job, relay.address, "stock", limit), plan, limit)] += 1
    assert came["right"] < len(todo)


@pytest.mark.stock
def test_c3_a_stock_client_with_our_server(stock: Peer, board: Any, relay: ChaosRelay, caplog: Any) -> None:
    assert stock.run(stock_job, relay.port, "chaos") == "right"
    seen = Counter({place: total for place, total in relay.seen.items() if total})
    came: Counter[str] = Counter()
    with rpcnb.connect(board.address, key="chaos") as other:
        for plan in plans(LOSSES, seen, 0, 25, 19):
            relay.begin(plan)
            came[stock.run(stock_job, relay.port, "chaos")] += 1
            assert other.call("rpc.test.addone", 1, timeout=LIMIT) == 2
        for plan in plans(HARMLESS, seen, 0, 5, 23):
            relay.begin(plan)
            assert stock.run(stock_job, relay.port, "chaos") == "right", plan
    assert not came["wrong"]
    assert came["right"] < 50
    eventually(lambda: board.sessions == 0, "no session left")
    caplog.clear()


@pytest.mark.stock
def test_c3_a_stock_client_with_a_stock_server(stock: Peer, stock_port: int) -> None:
    with ChaosRelay(("127.0.0.1", stock_port)) as relay:
        assert stock.run(stock_job, relay.port, "stock") == "right"
        for plan in plans(HARMLESS, Counter({place: n for place, n in relay.seen.items() if n}), 0, 3, 29):
            relay.begin(plan)
            assert stock.run(stock_job, relay.port, "stock") == "right", plan
