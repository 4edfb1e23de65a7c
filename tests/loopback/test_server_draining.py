"""Functions that go on running after their clients have gone: who waits is told, and the others are served."""

from __future__ import annotations

import asyncio
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from conftest import eventually
from rawpeer import RawClient, hello, packet

import rpcnb
from rpcnb import errors
from rpcnb.protocol.codes import Code, Limits
from rpcnb.protocol.messages import CallFunc, Syscall
from rpcnb.runtime.registry import Registry

Serve = Callable[..., Any]


class Gate:
    """A registry with a plain function that blocks until it is let go."""

    def __init__(self) -> None:
        self.registry = Registry()
        self.open = threading.Event()
        self.entered = 0
        self.registry.register("block", self._block)
        self.registry.register("quick", lambda: 1)

    def _block(self) -> None:
        self.entered += 1
        self.open.wait(60)


@pytest.fixture
def gate() -> Iterator[Gate]:
    made = Gate()
    yield made
    made.open.set()


def begin(server: Any, gate: Gate) -> subprocess.Popen[bytes]:
    """Begin a call that blocks, from a process of its own."""
    before = gate.entered
    code = f"import rpcnb; rpcnb.connect({server.address!r}).get_function('block')()"
    client = subprocess.Popen([sys.executable, "-c", code])
    eventually(lambda: gate.entered > before, "the call", 30)
    return client


def abandon(server: Any, gate: Gate) -> None:
    """Begin a call that blocks, and close its session."""
    before = gate.entered
    session = rpcnb.connect(server.address, lanes=0)
    session.submit(session.get_function("block"))
    eventually(lambda: gate.entered > before, "the call")
    session.close()


def test_a_board_for_one_says_that_it_drains_and_is_handed_out_when_the_function_ends(
    serve: Serve, gate: Gate, caplog: pytest.LogCaptureFixture
) -> None:
    server = serve(registry=gate.registry, max_sessions=1)
    client = begin(server, gate)
    client.kill()
    client.wait()
    eventually(lambda: server.draining, "the server's notice", 3)
    with pytest.raises(errors.RemoteError, match=r"is draining: 'block' of .* still runs, \d+ s after"):
        rpcnb.connect(server.address)
    assert "'block' still runs: draining" in caplog.text
    gate.open.set()
    eventually(lambda: not server.draining, "the end", 3)
    with rpcnb.connect(server.address) as session:
        assert session.call("quick") == 1
    assert "'block' has ended" in caplog.text
    caplog.clear()


def test_a_started_plain_function_drains_too(serve: Serve, gate: Gate, caplog: pytest.LogCaptureFixture) -> None:
    server = serve(registry=gate.registry, max_sessions=1)
    with rpcnb.connect(server.address) as session:
        control = session._lanes.control()
        control.start(CallFunc(session.get_function("block").handle, ()), 0.0)
        eventually(lambda: gate.entered, "the call")
    eventually(lambda: server.draining, "the server's notice", 3)
    gate.open.set()
    eventually(lambda: not server.draining, "the end", 3)
    caplog.clear()


def test_abandoned_functions_take_nobodys_place(serve: Serve, gate: Gate) -> None:
    server = serve(registry=gate.registry, silent=True)
    server.workers._limit = 4  # of 256
    for _ in range(6):
        abandon(server, gate)
        eventually(lambda: server.sessions == 0, "the server's notice", 3)
    assert len(server.draining) == 6
    with rpcnb.connect(server.address) as good:
        assert good.call("quick", timeout=5) == 1
        assert [one["function"] for one in good.status()["draining"]] == ["block"] * 6
    gate.open.set()
    eventually(lambda: not server.draining, "the end", 3)


def test_beyond_a_bound_plain_functions_are_refused_and_others_served(serve: Serve, gate: Gate) -> None:
    server = serve(registry=gate.registry, silent=True, limits=Limits(draining=2))
    for _ in range(2):
        abandon(server, gate)
    eventually(lambda: len(server.draining) == 2, "the server's notice", 3)
    with rpcnb.connect(server.address) as session:
        quick = session.get_function("quick")
        with pytest.raises(errors.RemoteError, match="2 functions go on running here after their sessions, draining=2"):
            quick()
        assert session.call("ffi.Shape", 1) is not None  # runs on the loop
        gate.open.set()
        eventually(lambda: not server.draining, "the end", 3)
        assert quick() == 1


def test_a_measurement_that_is_given_up_ends(serve: Serve) -> None:
    registry = Registry()
    calls: list[float] = []

    def slow() -> None:
        calls.append(time.monotonic())
        time.sleep(0.02)

    registry.register("slow", slow)
    server = serve(registry=registry)
    with rpcnb.connect(server.address) as session:
        evaluate = session.time_evaluator("slow", session.cpu(), number=10_000)
        with pytest.raises(errors.DeadlineExceeded):
            evaluate(timeout=0.2)
        assert session.call("ffi.Shape", 1, timeout=5) is not None  # behind it
        count = len(calls)
        assert session.call("ffi.Shape", 1, timeout=5) is not None
        assert len(calls) == count < 500


def test_a_client_that_goes_with_much_behind_a_parked_call_gives_its_place_back(serve: Serve) -> None:
    registry = Registry()

    async def forever() -> None:
        await asyncio.sleep(1000)

    registry.register("forever", forever)
    server = serve(registry=registry, max_sessions=1, limits=Limits(input_buffered=1 << 16))
    look_up = packet(Syscall(Code.GET_GLOBAL_FUNC, ("forever",)))
    with RawClient((server.host, server.port)).start() as client:
        client.send(look_up)
        (handle,) = struct.unpack("<Q", client.packet()[-8:])
        client.send(packet(CallFunc(handle)))
        eventually(lambda: any(one.function == "forever" for one in server.pending), "the call")
        client.send(look_up * 2500)  # more than is buffered, and no more than the kernel takes
    eventually(lambda: server.sessions == 0, "the place")


def test_who_was_refused_holds_no_place_and_is_not_waited_for_long(
    serve: Serve, gate: Gate, caplog: pytest.LogCaptureFixture
) -> None:
    server = serve(registry=gate.registry, max_sessions=1, limits=Limits(handshake_timeout=0.5))
    with rpcnb.connect(server.address) as session, RawClient((server.host, server.port), hello("client:")) as silent:
        assert silent.greeted() == b"server:"  # it will not ask for a session
        assert (session.call("quick"), server.sessions) == (1, 1)
        session.close()
        eventually(lambda: server.sessions == 0, "the place")  # though the other is still there
        with rpcnb.connect(server.address) as other:
            assert other.call("quick") == 1
        assert silent.is_closed()
    eventually(lambda: server.sessions == 0)
    assert "server is full: max_sessions=1 are open" in caplog.text
    caplog.clear()


def test_sessions_leave_descriptors_for_who_comes_after_them(
    serve: Serve, gate: Gate, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = serve(registry=gate.registry)
    monkeypatch.setattr("rpcnb.server.server.within_descriptors", lambda most, share: 2)
    with rpcnb.connect(server.address) as one, rpcnb.connect(server.address, lanes=0) as two:
        with pytest.raises(
            errors.RemoteError, match=r"server is full: . connections are open, the limit of open files"
        ):
            rpcnb.connect(server.address)
        assert [one.submit(one.get_function("quick")).result(10), two.call("quick")] == [1, 1]  # lanes are spared first
    eventually(lambda: server.sessions == 0)
    caplog.clear()


def test_a_text_that_takes_long_holds_nobody_up(serve: Serve) -> None:
    class Slow(Exception):
        def __str__(self) -> str:
            asked.set()
            assert go_on.wait(60)
            return "slow"

    asked, go_on = threading.Event(), threading.Event()
    registry = Registry()
    registry.register("fail", lambda done: threading.Thread(target=done.error, args=(Slow(),)).start(), callback=True)
    registry.register("quick", lambda: 1, run="loop")
    server = serve(registry=registry)
    with rpcnb.connect(server.address, lanes=0) as one, rpcnb.connect(server.address) as two:
        failing = one.submit(one.get_function("fail"))
        assert asked.wait(60)
        assert two.call("quick", timeout=30) == 1
        go_on.set()
        with pytest.raises(errors.RemoteError, match="slow"):
            failing.result(60)
