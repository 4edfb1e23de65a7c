"""Random calls from many threads and tasks: every reply belongs to its call, whoever owned the session meanwhile."""

from __future__ import annotations

import asyncio
import contextlib
import random
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from conftest import eventually

import rpcnb
from rpcnb import errors
from rpcnb.runtime.registry import Registry

Serve = Callable[..., Any]
SECONDS = 2.5


@pytest.fixture
def busy_server(serve: Serve, registry: Registry) -> Any:
    async def later(x: int) -> int:
        await asyncio.sleep(random.choice((0, 0, 0.0005, 0.0015)))
        return x + 2

    def call_back(done: Any, x: int) -> None:
        if x % 2:
            done(x + 3)
        else:
            threading.Timer(random.choice((0.0, 0.001)), done, (x + 3,)).start()

    def slow(x: int) -> int:
        time.sleep(random.choice((0, 0.0005, 0.001, 0.003)))
        return x + 4

    def fail(x: int) -> None:
        raise ValueError(str(x))

    registry.register("plain", lambda x: x + 1)
    registry.register("later", later)
    registry.register("callback", call_back, callback=True)
    registry.register("slow", slow)
    registry.register("loop", lambda x: x + 5, run="loop")
    registry.register("fail", fail)
    registry.register("blob", lambda x: bytes([x % 251]) * (x % 70_000))
    return serve()


ADDED = {"plain": 1, "later": 2, "callback": 3, "slow": 4, "loop": 5}


def gap(rng: random.Random) -> None:
    """Pause around the hot time of one millisecond, most often not at all."""
    if rng.random() < 0.3:
        time.sleep(rng.choice((0.0004, 0.0008, 0.001, 0.0011, 0.0013, 0.002, 0.004)))


def test_stress_of_threads_with_sessions_of_their_own(busy_server: Any) -> None:
    wrong: list[object] = []
    counts: list[int] = []
    end = time.monotonic() + SECONDS

    def work(seed: int) -> None:
        rng = random.Random(seed)
        count = 0
        try:
            with rpcnb.connect(busy_server.address) as session:
                functions = {name: session.get_function(name) for name in (*ADDED, "fail", "blob")}
                while time.monotonic() < end:
                    x = rng.randrange(1 << 40)
                    name = rng.choice([*ADDED] * 3 + ["fail", "blob", "array", "deadline"])
                    count += 1
                    if name in ADDED:
                        if functions[name](x, timeout=20) != x + ADDED[name]:
                            wrong.append((name, x))
                    elif name == "fail":
                        with pytest.raises(errors.RemoteError, match=str(x)):
                            functions[name](x, timeout=20)
                    elif name == "blob":
                        if functions[name](x, timeout=20) != bytes([x % 251]) * (x % 70_000):
                            wrong.append((name, x))
                    elif name == "array":
                        local = np.full(rng.randrange(1, 20_000), x)
                        if (session.array(local, timeout=20).numpy(timeout=20) != local).any():
                            wrong.append((name, x))
                    else:
                        try:
                            if functions["slow"](x, timeout=0.0007) != x + 4:
                                wrong.append((name, x))
                        except errors.DeadlineExceeded:
                            pass
                    gap(rng)
        except BaseException as error:
            wrong.append(error)
        counts.append(count)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(40)
    assert not wrong
    assert len(counts) == 8
    assert min(counts) > 10
    eventually(lambda: busy_server.sessions == 0, "no session left")


def test_stress_of_tasks_that_share_and_cancel(busy_server: Any) -> None:
    async def one(session: Any, functions: dict[str, Any], seed: int, end: float) -> int:
        rng = random.Random(seed)
        count = 0
        while time.monotonic() < end:
            x = rng.randrange(1 << 40)
            name = rng.choice([*ADDED])
            task = asyncio.ensure_future(functions[name](x))
            if rng.random() < 0.2:
                await asyncio.sleep(rng.choice((0, 0.0005, 0.001)))
                task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                assert await task == x + ADDED[name], name
            if rng.random() < 0.3:
                await asyncio.sleep(rng.choice((0.0008, 0.001, 0.0015)))
            count += 1
        return count

    async def main() -> None:
        end = time.monotonic() + SECONDS / 2
        async with (
            await rpcnb.connect_async(busy_server.address) as first,
            await rpcnb.connect_async(busy_server.address) as second,
        ):
            tasks = []
            for index, session in enumerate((first, second)):
                functions = {name: await session.get_function(name) for name in ADDED}
                tasks += [one(session, functions, index * 100 + seed, end) for seed in range(6)]
            counts = await asyncio.wait_for(asyncio.gather(*tasks), 40)
            assert min(counts) > 3

    asyncio.run(main())


def test_stress_of_more_sessions_than_hot_workers(busy_server: Any) -> None:
    """Forty sessions in turn: beyond 32 waiting workers a session goes back to the loop at once."""
    sessions = [rpcnb.connect(busy_server.address) for _ in range(40)]
    functions = [session.get_function("plain") for session in sessions]
    rng = random.Random(4)
    for turn in range(15):
        rng.shuffle(functions)
        for index, function in enumerate(functions):
            assert function(turn * 100 + index, timeout=20) == turn * 100 + index + 1
    for session in sessions:
        session.close()
    eventually(lambda: busy_server.sessions == 0, "no session left")


def test_stress_of_the_hand_over_around_the_hot_time(busy_server: Any) -> None:
    """One session whose pauses straddle the moment at which the worker gives it back."""
    with rpcnb.connect(busy_server.address) as session:
        plain, loop = session.get_function("plain"), session.get_function("loop")
        end = time.monotonic() + 1.5
        pause = 0.0
        while time.monotonic() < end:
            pause = pause + 0.00002 if pause < 0.003 else 0.0
            waits = time.perf_counter() + pause
            while time.perf_counter() < waits:
                pass
            x = int(pause * 1e9)
            assert plain(x, timeout=20) == x + 1
            assert loop(x, timeout=20) == x + 5
