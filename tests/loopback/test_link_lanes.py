"""Lanes: calls that overlap, cancel and deadlines at the server, bulk beside calls, the order of what is named."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import functools
import gc
import logging
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from conftest import eventually

import rpcnb
from rpcnb import errors
from rpcnb.protocol.handshake import hello, refusal
from rpcnb.runtime.registry import Registry
from rpcnb.transport.shaper import Shaper

Serve = Callable[..., Any]


class Board:
    """Functions that tell the test what happens to them."""

    def __init__(self, registry: Registry) -> None:
        self.seen: list[str] = []
        self.kept: list[Any] = []
        self.waiting: set[int] = set()
        self.release: dict[int, asyncio.Event] = {}
        self.loop: asyncio.AbstractEventLoop | None = None
        registry.register("wait_for", self.wait_for)
        registry.register("keep", self.keep, callback=True)
        registry.register("poll", self.poll)
        registry.register("note", lambda what: self.seen.append(what))
        registry.register("add", lambda a, b: a + b)
        registry.register("fail", self.fail)
        registry.register("double", self.double)

    async def wait_for(self, number: int) -> int:
        """Answer when the test says so."""
        self.loop = asyncio.get_running_loop()
        event = self.release[number] = asyncio.Event()
        self.waiting.add(number)
        try:
            await event.wait()
        except asyncio.CancelledError:
            self.seen.append(f"cancelled {number}")
            raise
        finally:
            self.waiting.discard(number)
        return number

    def let(self, number: int) -> None:
        """Let ``wait_for(number)`` answer."""
        assert self.loop is not None
        self.loop.call_soon_threadsafe(self.release[number].set)

    def keep(self, done: Any, *args: Any) -> None:
        """Answer never, unless the test does."""
        self.kept.append(done)

    def poll(self) -> str:
        """Run until the call is cancelled."""
        self.seen.append("polling")
        give_up = time.monotonic() + 20
        while not rpcnb.cancelled():
            assert time.monotonic() < give_up
            time.sleep(0.001)
        self.seen.append("poll cancelled")
        return "cancelled"

    async def fail(self) -> None:
        """Raise."""
        raise ValueError("boom")

    async def double(self, x: Any) -> None:
        """Double an array in place, after a while."""
        await asyncio.sleep(0.02)
        x *= 2


@pytest.fixture
def board(registry: Registry) -> Board:
    return Board(registry)


@pytest.fixture
def server(serve: Serve, board: Board) -> Any:
    return serve()


@pytest.fixture
def session(server: Any) -> Iterator[rpcnb.Session]:
    with rpcnb.connect(server.address) as opened:
        yield opened


def run_async(server: Any, body: Callable[[Any], Any], **options: Any) -> None:
    """Run ``body(session)`` with an awaited session."""

    async def main() -> None:
        async with await rpcnb.connect_async(server.address, **options) as session:
            await asyncio.wait_for(body(session), 30)

    asyncio.run(main())


async def soon(condition: Callable[[], object]) -> None:
    """Await a condition."""
    give_up = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < give_up
        await asyncio.sleep(0.002)


# -- calls that overlap ------------------------------------------------------------------------------------------------


def test_a_hundred_calls_of_one_session_run_at_once(session: rpcnb.Session, board: Board) -> None:
    wait_for = session.get_function("wait_for")
    jobs = [wait_for.submit(number) for number in range(100)]
    eventually(lambda: len(board.waiting) == 100, "all calls at once")
    assert [len(one.calls) for one in session_states(session, board)] == [100]
    eventually(lambda: {job.state for job in jobs} == {"running"})
    for number in reversed(range(100)):
        board.let(number)
    assert [job.result(timeout=10) for job in jobs] == list(range(100))
    assert not session.pending


def session_states(session: rpcnb.Session, board: Board) -> list[Any]:
    """What the server says of the session's calls."""
    return [one for server in SERVERS for one in server.pending]


SERVERS: list[Any] = []


@pytest.fixture(autouse=True)
def _servers(server: Any) -> Iterator[None]:
    SERVERS.append(server)
    yield
    SERVERS.clear()


def test_calls_complete_in_any_order_and_each_gets_its_own(session: rpcnb.Session, board: Board) -> None:
    wait_for = session.get_function("wait_for")
    jobs = [wait_for.submit(number) for number in range(5)]
    eventually(lambda: len(board.waiting) == 5)
    for number in (3, 0, 4, 1, 2):
        board.let(number)
        assert jobs[number].result(timeout=10) == number
    with pytest.raises(errors.RemoteError, match="boom") as caught:
        session.get_function("fail").submit().result(timeout=10)
    assert caught.value.remote_type == "ValueError"


def test_plain_calls_go_on_beside_calls_that_wait(session: rpcnb.Session, board: Board) -> None:
    job = session.get_function("wait_for").submit(1)
    assert session.call("add", 1, 2) == 3
    assert session.get_function("add").submit(3, 4).result(timeout=10) == 7
    eventually(lambda: 1 in board.waiting)
    assert job.state == "running"
    board.let(1)
    assert job.result(timeout=10) == 1


def test_map_runs_a_window_of_calls_at_once(session: rpcnb.Session, board: Board) -> None:
    def release() -> None:
        for start in (0, 4):
            eventually(functools.partial({start, start + 3}.__le__, board.waiting))
            for number in range(start, start + 4):
                board.let(number)

    helper = threading.Thread(target=release)
    helper.start()
    assert session.get_function("wait_for").map(range(8), window=4) == list(range(8))
    helper.join()


def test_a_failing_call_of_a_map_is_its_own(session: rpcnb.Session, registry: Registry) -> None:
    async def odd(x: int) -> int:
        if x % 2 == 0:
            raise ValueError(f"even {x}")
        return x

    registry.register("odd", odd)
    found = session.get_function("odd").map(range(4), return_errors=True)
    assert found[1::2] == [1, 3]
    assert [type(one) for one in found[::2]] == [errors.RemoteError] * 2
    with pytest.raises(errors.RemoteError, match="even 0"):
        session.get_function("odd").map(range(4))


def test_a_map_out_of_time_cancels_what_runs(session: rpcnb.Session, board: Board) -> None:
    with pytest.raises(errors.DeadlineExceeded):
        session.get_function("wait_for").map(range(3), timeout=0.2)
    eventually(lambda: sorted(board.seen) == [f"cancelled {number}" for number in range(3)])


def test_awaited_calls_overlap(server: Any, board: Board) -> None:
    async def body(session: Any) -> None:
        wait_for = await session.get_function("wait_for")
        jobs = [asyncio.ensure_future(wait_for(number)) for number in range(100)]
        await soon(lambda: len(board.waiting) == 100)
        assert len(session.pending) == 100
        assert {one.state for one in session.pending} <= {"sent", "running"}
        for number in (99, 0, *range(1, 99)):
            board.let(number)
        assert await asyncio.gather(*jobs) == list(range(100))
        assert session.pending == []
        assert session.state == "ready"

    run_async(server, body)


# -- giving up ---------------------------------------------------------------------------------------------------------


def test_cancel_reaches_coroutines_callbacks_and_plain_functions(session: rpcnb.Session, board: Board) -> None:
    waits = session.get_function("wait_for").submit(1)
    kept = session.get_function("keep").submit()
    eventually(lambda: board.waiting and board.kept)
    assert not board.kept[0].cancelled
    assert waits.cancel()
    assert kept.cancel()
    eventually(lambda: board.seen == ["cancelled 1"], "CancelledError in the coroutine")
    eventually(lambda: board.kept[0].cancelled, "done.cancelled")
    board.kept[0](1)
    polls = session.get_function("poll").submit()
    eventually(lambda: "polling" in board.seen)
    assert polls.cancel()
    eventually(lambda: "poll cancelled" in board.seen, "rpcnb.cancelled()")
    for job in (waits, kept, polls):
        assert job.state == "cancelled"
        with pytest.raises(concurrent.futures.CancelledError):
            job.result(timeout=10)
    assert session.call("add", 1, 2) == 3
    eventually(lambda: session.state == "ready")


def test_a_queued_call_is_taken_back(session: rpcnb.Session, board: Board) -> None:
    note = session.get_function("note")
    polls = session.get_function("poll").submit()
    eventually(lambda: "polling" in board.seen)
    jobs = [note.submit(str(number)) for number in range(3)]
    assert jobs[1].cancel()
    eventually(lambda: session._lanes.opened, "the control lane")
    servants = [one.servant for one in SERVERS[0]._connections if not one.lane]
    eventually(lambda: servants[0]._stopped, "the cancel at the server")
    polls.cancel()
    assert jobs[2].result(timeout=10) is None
    assert [one for one in board.seen if one.isdecimal()] == ["0", "2"]


def test_a_time_limit_travels(session: rpcnb.Session, board: Board) -> None:
    with pytest.raises(errors.DeadlineExceeded, match=r"wait_for took 0\.\d+ s; its timeout is 0\.1 s") as caught:
        session.call("wait_for", 1, timeout=0.1)
    assert caught.value.elapsed >= 0.1
    eventually(lambda: "cancelled 1" in board.seen)
    with pytest.raises(errors.DeadlineExceeded):
        session.get_function("wait_for")(2, timeout=0.1)
    eventually(lambda: "cancelled 2" in board.seen)
    with pytest.raises(errors.DeadlineExceeded):
        session.get_function("poll")(timeout=0.1)
    eventually(lambda: "poll cancelled" in board.seen)
    session.timeout = 0.1
    with pytest.raises(errors.DeadlineExceeded):
        session.fn.wait_for(3)
    eventually(lambda: "cancelled 3" in board.seen)
    session.timeout = None
    assert session.call("add", 1, 2) == 3


def test_the_server_ends_calls_at_their_time_without_the_client(session: rpcnb.Session, board: Board) -> None:
    job = session.get_function("wait_for").submit(1, timeout=0.3)
    eventually(lambda: 1 in board.waiting)
    control = session._lanes.opened
    control.cancel = lambda ticket: None  # the client says nothing
    eventually(lambda: "cancelled 1" in board.seen)
    with pytest.raises((errors.DeadlineExceeded, errors.RemoteError)):
        job.result(timeout=10)


def test_an_interrupted_call_is_cancelled_at_the_server(session: rpcnb.Session, board: Board) -> None:
    wait_for = session.get_function("wait_for")

    def interrupt() -> None:
        eventually(lambda: board.waiting)
        os.kill(os.getpid(), signal.SIGINT)

    for number in range(3):  # the first opens the control lane
        helper = threading.Thread(target=interrupt)
        helper.start()
        with pytest.raises(KeyboardInterrupt):
            wait_for(number)
        helper.join()
        assert session.call("add", number, 1) == number + 1  # it need not wait for the other
        assert f"cancelled {number}" in board.seen
    eventually(lambda: session.state == "ready")


def test_awaited_calls_are_cancelled_at_the_server(server: Any, board: Board) -> None:
    async def body(session: Any) -> None:
        wait_for = await session.get_function("wait_for")
        job = asyncio.ensure_future(wait_for(1))
        await soon(lambda: board.waiting)
        assert session.pending[0].state == "running"
        job.cancel()
        with pytest.raises(asyncio.CancelledError):
            await job
        await soon(lambda: board.seen == ["cancelled 1"])
        with pytest.raises(errors.DeadlineExceeded):
            await wait_for(2, timeout=0.1)
        await soon(lambda: "cancelled 2" in board.seen)
        job = asyncio.ensure_future(session.call("poll"))  # a plain function: on the first connection
        await soon(lambda: "polling" in board.seen)
        (operation,) = session.pending
        assert operation.cancel()
        with pytest.raises(asyncio.CancelledError):
            await job
        assert operation.state == "cancelled"
        assert not operation.cancel()
        assert "cancelled" in repr(operation)
        await soon(lambda: "poll cancelled" in board.seen)
        assert await session.call("add", 1, 2) == 3

    run_async(server, body)


def test_c7_a_storm_of_cancels_leaves_the_others_right(session: rpcnb.Session, registry: Registry) -> None:
    async def echo(x: int) -> int:
        if x % 7 == 0:
            await asyncio.sleep(0.01)
        return x

    registry.register("echo", echo)
    function = session.get_function("echo")
    random = np.random.default_rng(7)
    jobs = []
    for number in range(3000):
        jobs.append(function.submit(number))
        if random.random() < 0.5:
            jobs[int(random.integers(len(jobs)))].cancel()
    for number, job in enumerate(jobs):
        if not job.cancelled():
            assert job.result(timeout=30) == number
    assert not session.pending
    eventually(lambda: session.state == "ready")
    eventually(lambda: not any(one.calls for one in session_states(session, None)))  # type: ignore[arg-type]


# -- one connection ----------------------------------------------------------------------------------------------------


def test_without_lanes_everything_works_on_one_connection(server: Any, board: Board) -> None:
    with rpcnb.connect(server.address, lanes=0) as session:
        wait_for, add = session.get_function("wait_for"), session.get_function("add")
        job, later = wait_for.submit(1), add.submit(1, 2)
        eventually(lambda: board.waiting)
        assert later.state == "sent"
        board.let(1)
        assert (job.result(timeout=10), later.result(timeout=10)) == (1, 3)
        data = np.arange(1 << 20)
        np.testing.assert_array_equal(session.array(data).numpy(), data)
        assert len(server._connections) == 1
        with pytest.raises(errors.DeadlineExceeded):
            session.call("keep", timeout=0.1)
        assert session.state == "draining"


def test_through_a_hop_everything_works_on_one_connection(server: Any, serve: Serve, board: Board) -> None:
    outer = serve()
    hop = ["rpc.Connect", "127.0.0.1", server.port, ""]
    with rpcnb.connect(outer.address, session_constructor_args=hop) as session:
        job = session.get_function("wait_for").submit(1)
        eventually(lambda: board.waiting)
        board.let(1)
        assert job.result(timeout=10) == 1
        assert session.submit(session.array, np.arange(5)).result(timeout=10).shape == (5,)
        assert len(outer._connections) == 1


def test_c5_opening_a_lane_takes_no_longer_than_the_operation_may(server: Any, board: Board) -> None:
    with contextlib.ExitStack() as stack:
        hole = stack.enter_context(socket.create_server(("127.0.0.1", 0)))  # it accepts, and says nothing
        session = stack.enter_context(rpcnb.connect(server.address))
        function = session.get_function("wait_for")
        there = session._dialer.address
        session._dialer.address = replace(there, port=hole.getsockname()[1])
        start = time.monotonic()
        with pytest.raises(rpcnb.DeadlineExceeded, match="wait_for"):
            function(1, timeout=0.3)
        with pytest.raises(rpcnb.DeadlineExceeded):
            function.submit(1, timeout=0.3).result()
        assert time.monotonic() - start < 2
        session._dialer.address = there
        job = function.submit(1)
        eventually(lambda: board.waiting)
        board.let(1)
        assert job.result(timeout=10) == 1
        assert session._lanes is not None
        assert not session._lanes.refused, "it was the operation's time that was over"


def test_a_lane_that_cannot_be_opened_is_done_without(server: Any, board: Board) -> None:
    with rpcnb.connect(server.address) as session:
        session._dialer.address = replace(session._dialer.address, port=1)  # nobody there
        job = session.get_function("wait_for").submit(1)
        eventually(lambda: board.waiting)
        board.let(1)
        assert job.result(timeout=10) == 1
        assert session._lanes is not None
        assert session._lanes.refused
        data = np.ones(5 << 20, np.uint8)
        np.testing.assert_array_equal(session.array(data).numpy(), data)


def test_a_lost_control_lane_fails_its_calls_and_is_opened_again(
    session: rpcnb.Session, server: Any, board: Board
) -> None:
    wait_for = session.get_function("wait_for")
    job = wait_for.submit(1)
    eventually(lambda: board.waiting)
    (lane,) = (one for one in server._connections if one.lane)
    server.io_loop.asyncio_loop.call_soon_threadsafe(lane.close)
    with pytest.raises(errors.SessionLost):
        job.result(timeout=10)
    again = wait_for.submit(2)
    eventually(lambda: 2 in board.waiting)
    board.let(2)
    assert again.result(timeout=10) == 2


def test_the_end_of_the_session_ends_its_lanes(server: Any, board: Board) -> None:
    session = rpcnb.connect(server.address)
    job = session.get_function("wait_for").submit(1)
    eventually(lambda: board.waiting)
    assert server.sessions == 1
    session.close()
    with pytest.raises(errors.RpcError):
        job.result(timeout=10)
    eventually(lambda: not server._connections)
    eventually(lambda: board.seen == ["cancelled 1"])


def test_a_dropped_session_ends_its_lanes(server: Any, board: Board) -> None:
    session = rpcnb.connect(server.address)
    session.get_function("add").submit(1, 2).result(timeout=10)
    session.get_function("double").submit(session.array(np.ones(3))).result(timeout=10)
    assert len(server._connections) == 2
    del session
    gc.collect()
    eventually(lambda: not server._connections)


# -- who may join ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "ticket",
    ["", "nobody.secret", "{id}", "{id}.", "{id}.wrong", "{id}.é", "{id}.{secret}x", ".{secret}", "{other}.{secret}"],
)
def test_a_guessed_session_or_secret_gets_a_mismatch(
    server: Any, ticket: str, caplog: pytest.LogCaptureFixture
) -> None:
    with rpcnb.connect(server.address) as session, rpcnb.connect(server.address) as other:
        name, secret, _ = session._lanes.ticket
        text = ticket.format(id=name, secret=secret, other=other._lanes.ticket.name)
        assert knock(server, f"client: -rpcnb=1.0 -session={text} -lane=1") == refusal()
        assert [record.getMessage()[:16] for record in caplog.records] == ["server: refused "]
        caplog.clear()
        assert name not in caplog.text
        assert session.call("add", 1, 2) == 3


@pytest.mark.parametrize("lane", ["", "0", "8", "-1", "x", "99999999999999999999"])
def test_a_lane_of_no_number_gets_a_mismatch(server: Any, lane: str, caplog: pytest.LogCaptureFixture) -> None:
    with rpcnb.connect(server.address) as session:
        ticket = ".".join(session._lanes.ticket[:2])
        assert knock(server, f"client: -rpcnb=1.0 -session={ticket} -lane={lane}") == refusal()
    caplog.clear()


def test_guesses_are_limited_like_wrong_tokens(serve: Serve, caplog: pytest.LogCaptureFixture) -> None:
    from rpcnb.protocol.codes import Limits

    server = serve(limits=Limits(auth_failures=3, exempt_loopback=False))
    with rpcnb.connect(server.address) as session:
        ticket = ".".join(session._lanes.ticket[:2])
        for _ in range(3):
            assert knock(server, "client: -session=a.b -lane=1") == refusal()
        with socket.create_connection(("127.0.0.1", server.port)) as guessing:
            guessing.sendall(hello("client: -session=a.b -lane=1"))
            eventually(lambda: server._late, "its wait")
            assert knock(server, f"client: -rpcnb=1.0 -session={ticket} -lane=1") != refusal()
            assert guessing.recv(4) == refusal()
        eventually(lambda: not server._late, "nothing that is left of it")
    caplog.clear()


def test_the_secret_is_in_no_log_and_no_repr(server: Any, board: Board, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    with rpcnb.connect(server.address, enable_logging=True) as session:
        session.get_function("double").submit(session.array(np.ones(3))).result(timeout=10)
        secret = session._lanes.ticket.secret
        shown = [repr(thing) for thing in (session, server, server.pending, session._dialer, session._link)]
        assert secret not in caplog.text + "".join(shown)


def test_a_lane_that_comes_after_the_end_is_refused_quietly(server: Any) -> None:
    session = rpcnb.connect(server.address)
    ticket = ".".join(session._lanes.ticket[:2])
    session.close()
    eventually(lambda: not server._connections)
    assert knock(server, f"client: -session={ticket} -lane=1") == refusal()


def knock(server: Any, text: str) -> bytes:
    """Present a key text; returns the server's first word."""
    with socket.create_connection((server.host, server.port), 5) as sock:
        data = text.encode()
        sock.sendall((0xFF271).to_bytes(4, "little") + len(data).to_bytes(4, "little") + data)
        return sock.recv(4, socket.MSG_WAITALL)


# -- order -------------------------------------------------------------------------------------------------------------


def test_operations_on_one_tensor_keep_their_order(session: rpcnb.Session, board: Board) -> None:
    double = session.get_function("double")
    tensor = session.empty((1 << 20,), "float32")
    source = np.arange(1 << 20, dtype="float32")
    for _ in range(3):
        up = session.submit(tensor.copyfrom, source)
        calls = [double.submit(tensor) for _ in range(3)]
        down = session.submit(tensor.numpy)
        assert down.state == "queued"
        np.testing.assert_array_equal(down.result(timeout=20), source * 8)
        assert all(job.done() for job in (up, *calls))


def test_a_blocking_operation_waits_for_submitted_ones(session: rpcnb.Session, board: Board) -> None:
    tensor = session.array(np.ones(4, "float32"))
    session.get_function("double").submit(tensor)
    np.testing.assert_array_equal(tensor.numpy(), np.full(4, 2))
    session.get_function("double").submit(tensor)
    session.get_function("double")(tensor)
    np.testing.assert_array_equal(tensor.numpy(), np.full(4, 8))
    session.get_function("keep").submit(tensor)
    with pytest.raises(errors.DeadlineExceeded):
        tensor.numpy(timeout=0.1)


def test_a_tensor_that_is_freed_while_in_use_lives_until_the_end(
    session: rpcnb.Session, registry: Registry, board: Board
) -> None:
    seen: list[float] = []

    async def look(x: Any) -> None:
        await asyncio.sleep(0.05)
        seen.append(float(x.sum()))

    registry.register("look", look)
    tensor = session.array(np.ones(1000, "float32"))
    job = session.get_function("look").submit(tensor)
    tensor.free()
    session.array(np.zeros(1000, "float32"))
    job.result(timeout=10)
    assert seen == [1000.0]
    big = session.array(np.ones(8 << 20, np.uint8))
    down = session.submit(big.numpy)
    big.free()
    assert down.result(timeout=20).sum() == 8 << 20


def test_awaited_operations_on_one_tensor_keep_their_order(server: Any, board: Board) -> None:
    async def body(session: Any) -> None:
        double = await session.get_function("double")
        tensor = await session.empty((1 << 20,), "float32")
        source = np.arange(1 << 20, dtype="float32")
        found = await asyncio.gather(tensor.copyfrom(source), double(tensor), double(tensor), tensor.numpy())
        np.testing.assert_array_equal(found[3], source * 4)

    run_async(server, body)


# -- bulk --------------------------------------------------------------------------------------------------------------

SIZE = 16 << 20


@pytest.fixture
def slow(server: Any) -> Iterator[Any]:
    """Address of a server behind a link of 20 MB/s per connection."""
    loop = server.io_loop.asyncio_loop
    shaper = Shaper(("127.0.0.1", server.port), 20e6, 0.001)
    asyncio.run_coroutine_threadsafe(shaper.start("127.0.0.1", 0), loop).result(10)
    yield f"127.0.0.1:{shaper.port}"
    loop.call_soon_threadsafe(shaper.close)


def test_calls_go_on_beside_bulk_copies(slow: str) -> None:
    data = np.random.default_rng(2).integers(0, 255, SIZE, np.uint8)
    with rpcnb.connect(slow) as session:
        tensor, other = session.empty((SIZE,), "uint8"), session.empty((SIZE,), "uint8")
        up = session.submit(tensor.copyfrom, data)
        also = session.submit(other.copyfrom, data[::-1].copy())
        for number in range(20):
            assert session.call("add", number, 1) == number + 1
        assert not up.done()
        assert not also.done()
        down = session.submit(tensor.numpy)
        assert down.state == "queued"
        assert session.state == "busy"
        np.testing.assert_array_equal(down.result(timeout=30), data)
        np.testing.assert_array_equal(other.numpy(), data[::-1])


def _has_moved(transfer: Any) -> bool:
    return bool(transfer.moved > 0)


def test_m6_a_cancelled_copy_frees_the_session_at_once(slow: str) -> None:
    data = np.ones(SIZE, np.uint8)
    with rpcnb.connect(slow) as session:
        tensor = session.empty((SIZE,), "uint8")
        for method, args in ((tensor.copyfrom, (data,)), (tensor.numpy, ())):
            transfer: Any = session.submit(method, *args)
            eventually(functools.partial(_has_moved, transfer))
            start = time.monotonic()
            assert transfer.cancel()
            assert session.call("add", 1, 2) == 3
            assert time.monotonic() - start < 0.2 * 5  # the promise, with room for a busy machine
        np.testing.assert_array_equal(tensor.copyfrom(data).numpy(), data)


def test_an_interrupted_copy_leaves_tensor_and_session(slow: str) -> None:
    data = np.ones(SIZE, np.uint8)
    with rpcnb.connect(slow) as session:
        tensor = session.array(data[: 1 << 20])
        big = session.empty((SIZE,), "uint8")
        timer = threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT))
        timer.start()
        with pytest.raises(KeyboardInterrupt):
            big.copyfrom(data)
        timer.join()
        assert not big.defined
        np.testing.assert_array_equal(tensor.numpy(), data[: 1 << 20])
        np.testing.assert_array_equal(big.copyfrom(data).numpy(), data)


def test_awaited_copies_report_and_can_be_cancelled(slow: str, server: Any) -> None:
    data = np.ones(SIZE, np.uint8)
    seen: list[tuple[int, int, str]] = []

    async def body(session: Any) -> None:
        tensor = await session.empty((SIZE,), "uint8")
        await tensor.copyfrom(data, progress=lambda one: seen.append((one.moved, one.total, one.state)))
        assert [one[0] for one in seen] == sorted(one[0] for one in seen)
        assert len(seen) > 3
        assert seen[-1] == (SIZE, SIZE, "done")
        job = asyncio.ensure_future(tensor.numpy())
        await soon(lambda: session.pending and session.pending[0].moved)
        (transfer,) = session.pending
        assert (transfer.direction, transfer.total) == ("down", SIZE)
        assert await session.call("add", 1, 2) == 3
        assert not job.done()
        job.cancel()
        with pytest.raises(asyncio.CancelledError):
            await job
        assert transfer.state == "cancelled"
        np.testing.assert_array_equal(await tensor.numpy(), data)
        with pytest.raises(errors.DeadlineExceeded):
            await tensor.numpy(timeout=0.05)
        assert await session.call("add", 1, 2) == 3

    async def main() -> None:
        async with await rpcnb.connect_async(slow) as session:
            await asyncio.wait_for(body(session), 40)

    asyncio.run(main())


def test_a_session_has_three_lanes_at_most(session: rpcnb.Session, server: Any, board: Board) -> None:
    data = np.ones(2 << 20, np.uint8)
    session.get_function("wait_for").submit(1)
    tensors = [session.empty(data.shape, "uint8") for _ in range(6)]
    jobs = [session.submit(tensor.copyfrom, data) for tensor in tensors]
    for job in jobs:
        job.result(timeout=20)
    assert {one.lane for one in server._connections} <= {0, 1, 2, 3}
    assert len(server._connections) <= 4
    eventually(lambda: board.waiting)
    board.let(1)


def test_blocking_copies_report_progress_too(slow: str) -> None:
    data = np.ones(SIZE, np.uint8)
    with rpcnb.connect(slow) as session:
        seen: list[Any] = []
        tensor = session.array(data, progress=lambda one: seen.append((one.moved, one.rate)))
        assert seen[-1][0] == SIZE
        assert len(seen) > 3
        events: list[str] = []
        session.observers.subscribe(lambda event: events.append(type(event).__name__))
        tensor.numpy()
        assert events.count("TransferStarted") == 1
        eventually(lambda: events.count("TransferFinished") == 1)
        with contextlib.suppress(errors.DeadlineExceeded):
            tensor.numpy(timeout=0.01)
        assert session.call("add", 1, 2) == 3


def test_a_small_copy_that_takes_long_becomes_a_transfer(server: Any) -> None:
    loop = server.io_loop.asyncio_loop
    shaper = Shaper(("127.0.0.1", server.port), 300e3, 0.001)
    asyncio.run_coroutine_threadsafe(shaper.start("127.0.0.1", 0), loop).result(10)
    data = np.random.default_rng(5).integers(0, 255, 320 << 10, "uint8")
    small = np.ones(1000, np.uint8)
    seen: list[str] = []
    shown: list[tuple[str, int]] = []
    with rpcnb.connect(f"127.0.0.1:{shaper.port}") as session:
        tensor, other = session.empty(data.shape, "uint8"), session.empty(small.shape, "uint8")

        def watch() -> None:
            eventually(lambda: session.pending, "the transfer")
            (transfer,) = session.pending
            shown.append((transfer.direction, transfer.total))
            assert transfer.told.wait(10), "its last report"

        thread = threading.Thread(target=watch)
        thread.start()
        tensor.copyfrom(data)
        thread.join()
        assert shown == [("up", data.nbytes)]
        assert session.pending == []
        session.observers.subscribe(lambda event: seen.append(type(event).__name__))
        other.copyfrom(small)
        assert "TransferStarted" not in seen
        assert (tensor.numpy() == data).all()
        eventually(lambda: seen.count("TransferFinished") == 1, "its end")
        assert seen.count("TransferStarted") == 1
        start = time.monotonic()
        with pytest.raises(errors.DeadlineExceeded):
            tensor.numpy(timeout=0.7)
        assert time.monotonic() - start < 1.2
        with pytest.raises(errors.DeadlineExceeded):
            tensor.numpy(timeout=0.2)
        assert session.call("add", 1, 2) == 3
        assert (tensor.numpy() == data).all()
    loop.call_soon_threadsafe(shaper.close)
