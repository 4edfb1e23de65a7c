"""Many calls of one function in windows: order, failures, all kinds of values, interrupts."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

import rpcnb
from rpcnb import errors
from rpcnb.protocol.codes import Code
from rpcnb.runtime.registry import Registry


def slowly(value: int) -> int:
    time.sleep(0.01)
    return value


@pytest.fixture
def session(serve: Callable[..., Any], registry: Registry) -> Iterator[Any]:
    async def later(value: Any) -> Any:
        return value

    def even(value: int) -> int:
        if value % 2:
            raise ValueError(f"{value} is odd")
        return value

    registry.register("echo", lambda value=None: value)
    registry.register("add", lambda a, b: a + b)
    registry.register("even", even)
    registry.register("later", later)
    registry.register("slow", slowly)
    with rpcnb.connect(serve().address) as opened:
        yield opened


@pytest.mark.parametrize("window", [1, 7, 256, 5000])
def test_results_come_in_order_at_any_window(session: Any, window: int) -> None:
    assert session.get_function("echo").map(range(3000), window=window) == list(range(3000))
    assert session.get_function("later").map(range(200), window=window) == list(range(200))


def test_values_of_all_kinds_are_mixed(session: Any) -> None:
    values = [1, 2.5, "text", None, "é" * 300, b"bytes", True, -1, "x" * 100_000, b"y" * 100_000, 7]
    assert session.get_function("echo").map(values) == values
    assert session.get_function("add").map([1, "a"], [2, "b"]) == [3, "ab"]
    assert session.get_function("echo").map([]) == []
    tensors = session.get_function("echo").map([session.array(np.arange(3)), session.array(np.arange(4))])
    assert [tensor.shape for tensor in tensors] == [(3,), (4,)]


def test_a_failing_call_leaves_the_others_right(session: Any) -> None:
    even = session.get_function("even")
    with pytest.raises(errors.RemoteError, match="1 is odd"):
        even.map(range(10))
    results = even.map(range(100), window=16, return_errors=True)
    assert results[::2] == list(range(0, 100, 2))
    assert {str(error.message) for error in results[1::2]} == {f"{number} is odd" for number in range(1, 100, 2)}
    assert even(4) == 4


def test_what_cannot_travel_is_refused_and_the_session_lives(session: Any) -> None:
    echo = session.get_function("echo")
    with pytest.raises(errors.ArgumentError):
        echo.map([1, object()])
    with pytest.raises(ValueError, match="window"):
        echo.map([1], window=0)
    assert echo.map([1, 2]) == [1, 2]


def test_what_a_map_has_taken_is_released_once_when_it_runs_out_of_time(
    serve: Callable[..., Any], registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    release = threading.Event()

    def give(number: int) -> Any:
        if number == 6:
            release.wait(30)
        return lambda: number

    registry.register("give", give)
    with rpcnb.connect(serve().address) as session:
        wire = session._link.wire
        freed: list[Any] = []
        queue = wire.queue

        def note(request: Any) -> Any:
            if getattr(request, "code", None) is Code.FREE_HANDLE:
                freed.append(request.args[0])
            return queue(request)

        monkeypatch.setattr(wire, "queue", note)
        with pytest.raises(errors.DeadlineExceeded):
            session.get_function("give").map(range(9), window=3, timeout=0.5)
        release.set()
        assert session.get_function("give")(1)() == 1
        assert session.get_function("give")(2)() == 2  # the frees ride in front of it
        assert len(freed) >= 6
        assert len(set(freed)) == len(freed)


def test_a_slow_function_in_a_map_is_interrupted_and_timed(session: Any) -> None:
    slow = session.get_function("slow")
    with pytest.raises(errors.DeadlineExceeded, match="map slow"):
        slow.map(range(30), timeout=0.05)
    timer = threading.Timer(0.1, lambda: os.kill(os.getpid(), signal.SIGINT))
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        slow.map(range(60))
    timer.join()
    assert slow(5) == 5
    assert session.get_function("echo").map(range(300)) == list(range(300))


def test_a_local_session_maps_too() -> None:
    with rpcnb.LocalSession() as local:
        assert local.get_function("rpc.test.addone").map(range(50), window=8) == list(range(1, 51))


def test_a_lost_session_ends_a_map(serve: Callable[..., Any], registry: Registry) -> None:
    registry.register("slow", slowly)
    server = serve()
    with rpcnb.connect(server.address) as session:
        slow = session.get_function("slow")
        timer = threading.Timer(0.1, server.close)
        timer.start()
        with pytest.raises(errors.SessionLost):
            slow.map(range(1000))
        timer.join()
