"""Numbered cases of pipelining, copies and waiting: C8, C9, C11, M3, M4, M5, M7."""

from __future__ import annotations

import asyncio
import resource
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from conftest import eventually

import rpcnb
from rpcnb import errors
from rpcnb.command.board import DemoBoard
from rpcnb.link.iothread import IO_THREAD
from rpcnb.runtime.registry import Registry
from rpcnb.server.connection import Connection
from rpcnb.transport.shaper import Shaper

Serve = Callable[..., Any]
WAYS = pytest.mark.parametrize("options", [{}, {"lanes": 0}, {"extensions": False}], ids=["lanes", "one", "stock"])


def shaped(server: Any, rate: float, latency: float) -> tuple[int, Callable[[], object]]:
    """Put a slow link before a server; returns its port and what ends it."""
    loop = server.io_loop.asyncio_loop
    shaper = Shaper(("127.0.0.1", server.port), rate, latency)
    asyncio.run_coroutine_threadsafe(shaper.start("127.0.0.1", 0), loop).result(10)
    return shaper.port, lambda: loop.call_soon_threadsafe(shaper.close)


@WAYS
def test_c8_late_replies_are_drained_and_the_following_calls_are_right(
    serve: Serve, registry: Registry, options: dict[str, Any]
) -> None:
    registry.register("echo", lambda x: x)

    def late(x: int) -> int:
        time.sleep(0.05)
        return -x

    registry.register("late", late)
    with rpcnb.connect(serve().address, **options) as session:
        echo, function = session.get_function("echo"), session.get_function("late")
        for number in range(5):
            with pytest.raises(errors.DeadlineExceeded):
                function(number + 1, timeout=0.01)
        assert [echo(number) for number in range(1000)] == list(range(1000))


@WAYS
def test_c9_one_failure_among_a_hundred_calls_is_its_own(
    serve: Serve, registry: Registry, options: dict[str, Any]
) -> None:
    def plain(x: int) -> int:
        if x == 37:
            raise ValueError("thirty-seven")
        return x

    async def awaited(x: int) -> int:
        return plain(x)

    registry.register("plain", plain)
    registry.register("awaited", awaited)
    with rpcnb.connect(serve().address, **options) as session:
        for name in ("plain", "awaited"):
            function = session.get_function(name)
            jobs = [function.submit(number) for number in range(100)]
            for number, job in enumerate(jobs):
                if number == 37:
                    with pytest.raises(errors.RemoteError, match="thirty-seven"):
                        job.result(timeout=10)
                else:
                    assert job.result(timeout=10) == number


def test_c11_a_wait_in_the_thread_that_would_have_to_end_it_is_refused(serve: Serve, registry: Registry) -> None:
    registry.register("echo", lambda x: x)

    def slowly(x: int) -> int:
        time.sleep(0.1)
        return x

    registry.register("slow", slowly)
    found: list[Any] = []
    with rpcnb.connect(serve().address) as session:
        echo, slow = session.get_function("echo"), session.get_function("slow")

        def wait(_: Any) -> None:
            start = time.monotonic()
            try:
                slow.submit(2).result()
            except errors.DeadlockError:
                found.append(time.monotonic() - start)

        echo.submit(1).add_done_callback(wait)
        eventually(lambda: found, "the refusal")
        thread = threading.Thread(target=lambda: found.append(slow.submit(3).result()))
        thread.start()
        thread.join(10)
        assert found[1] == 3
        assert not IO_THREAD.is_current()


@pytest.mark.parametrize("way", ["up", "down"])
def test_m3_a_copy_takes_little_memory_beyond_its_data(serve: Serve, way: str) -> None:
    nbytes = 256 << 20
    data = np.ones(nbytes, np.uint8)
    with rpcnb.connect(serve().address) as session:
        tensor = session.empty((nbytes,), "uint8")
        tensor.view((1 << 20,)).copyfrom(data[: 1 << 20])
        session.submit(tensor.copyfrom, data).result()  # the server's memory is there, and the lanes
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        if way == "up":
            tensor.copyfrom(data)
        else:
            tensor.numpy(data)
        grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) << 10
    assert grown < 32 << 20  # both ends are in this process, 16 MiB each


def test_m4_a_slow_link_is_used_well(serve: Serve) -> None:
    server = serve()
    port, end = shaped(server, 10e6, 0.05)
    data = np.random.default_rng(4).integers(0, 255, 10_000_000, np.uint8)
    with rpcnb.connect("127.0.0.1", port) as session:
        tensor = session.empty(data.shape, "uint8")
        session.submit(tensor.copyfrom, data).result()
        start = time.monotonic()
        tensor.copyfrom(data)
        took = time.monotonic() - start
        np.testing.assert_array_equal(tensor.numpy(), data)
    end()
    assert took < 3  # 1.1 s at the link's rate: a wait of a round trip for each part would take 5 s


def test_m5_a_slow_reader_fills_no_memory_and_disturbs_nobody(serve: Serve, registry: Registry) -> None:
    registry.register("echo", lambda x: x)
    registry.register("blob", lambda: bytes(1 << 20))
    server = serve()
    port, end = shaped(server, 100e3, 0.001)
    with rpcnb.connect("127.0.0.1", port) as slow, rpcnb.connect(server.address) as other:
        blob, echo = slow.get_function("blob"), other.get_function("echo")
        jobs = [blob.submit() for _ in range(64)]
        eventually(lambda: any(one.queued or one.state != "idle" for one in server.pending), "the reader's jam")
        for number in range(500):
            assert echo(number) == number
        most = max(one.servant.output.size for one in list(server._connections) if one.servant is not None)
        assert most < 8 << 20
        for job in jobs:
            job.cancel()
    end()


def test_m7_calls_go_on_during_a_large_copy() -> None:
    nbytes = 32 << 20  # 0.7 s over this link; how fast calls are meanwhile is benchmarks.mixed's to say
    data = np.ones(nbytes, np.uint8)
    with DemoBoard("50M,1ms") as board, rpcnb.connect(board.address, key="demo") as session:
        add, tensor = session.get_function("demo.add"), session.empty((nbytes,), "uint8")
        session.submit(tensor.copyfrom, data).result()
        calls = 0
        for operation in ((tensor.copyfrom, data), (tensor.numpy, data)):
            transfer = session.submit(*operation)
            before = calls
            while not transfer.done():
                assert add(calls, 1) == calls + 1
                calls += 1
            assert calls - before > 3  # it did not wait for the copy
            transfer.result()


def test_an_abandoned_submitted_call_costs_nothing(serve: Serve, registry: Registry) -> None:
    registry.register("echo", lambda x: x)
    with rpcnb.connect(serve().address) as session:
        echo = session.get_function("echo")
        for number in range(2000):
            echo.submit(number)
        eventually(lambda: not session.pending, "the end of the forgotten")
        assert echo(1) == 1
        assert not session._link.wire.tickets


def test_with_depth_one_nothing_is_sent_behind_a_request(serve: Serve, registry: Registry) -> None:
    async def later(x: int) -> int:
        await asyncio.sleep(0.001)
        return x

    registry.register("later", later)
    registry.register("echo", lambda x: x)
    server = serve()
    data = np.arange(1 << 18)
    with rpcnb.connect(server.address, extensions=False, depth=1) as session:
        function, echo = session.get_function("later"), session.get_function("echo")
        wire = session._link.wire
        most = 0
        jobs = [function.submit(number) for number in range(50)]
        tensor = session.submit(session.array, data)
        while not all(job.done() for job in jobs):
            with wire.lock:
                most = max(most, len(wire.tickets) - len(wire.held))
        assert [job.result() for job in jobs] == list(range(50))
        assert most == 1
        np.testing.assert_array_equal(tensor.result(timeout=10).numpy(), data)
        assert function.map(range(20)) == list(range(20))
        assert echo.map(range(20)) == list(range(20))
        up = session.submit(tensor.result().copyfrom, data)
        assert session.submit(tensor.result().numpy).cancel()
        up.cancel()
        assert [echo(number) for number in range(5)] == list(range(5))

    async def main() -> None:
        async with await rpcnb.connect_async(server.address, extensions=False, depth=1) as session:
            function = await session.get_function("later")
            assert await asyncio.gather(*[function(number) for number in range(20)]) == list(range(20))

    asyncio.run(main())


def test_requests_behind_a_jam_are_served_when_it_ends(
    serve: Serve, registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The output drains in the very moment after it was found full: requests that waited for that must not be left."""
    real, calls = Connection._flush, [0]

    def sometimes(self: Connection) -> bool:
        calls[0] += 1
        if calls[0] % 2 and self.servant is not None and self.servant.output:
            return False
        return real(self)

    monkeypatch.setattr(Connection, "_flush", sometimes)
    registry.register("blob", lambda nbytes: bytes(nbytes))
    data = np.arange(40 << 20, dtype=np.uint8)
    with rpcnb.connect(serve().address) as session:
        tensor = session.array(data)
        for _ in range(3):
            np.testing.assert_array_equal(session.submit(tensor.numpy).result(timeout=20), data)
        blob = session.get_function("blob")
        assert [len(one) for one in blob.map([3 << 20] * 8)] == [3 << 20] * 8
