"""Races at the client, found by stepping the real code through its interleavings (tests/explorer.py)."""

from __future__ import annotations

import contextlib
import threading
from collections import deque
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from explorer import explore

from rpcnb.client import pending
from rpcnb.client.pending import Pending, Work
from rpcnb.errors import DeadlineExceeded, RpcError
from rpcnb.link import control, order
from rpcnb.link.control import Control, StartedTicket
from rpcnb.link.order import Order
from rpcnb.link.wire import Ticket
from rpcnb.protocol.codes import Limits
from rpcnb.protocol.flows import Flow
from rpcnb.protocol.messages import CallFunc, Return
from rpcnb.protocol.records import CANCEL, CANCEL_AT, NEXT, START, write_record
from rpcnb.values import Pointer

FUNCTIONS = {START: 11, NEXT: 13, CANCEL: 15, CANCEL_AT: 17}
Threads = tuple[list[Callable[[], object]], Callable[[], object]]


class Lane:
    """A control lane's link, whose replies come when the test says so."""

    def __init__(self) -> None:
        self.wire: Any = SimpleNamespace(lock=threading.RLock(), sock=None, ended=None, behind=lambda tickets: "")
        self.wire.endpoint = SimpleNamespace(limits=Limits())
        self.garbage: deque[Any] = deque()
        self.sent: list[Ticket] = []
        self.ready: deque[Any] = deque()

    def send(self, request: Any) -> Ticket:
        if self.wire.ended is not None:
            raise self.wire.ended.again()
        ticket = Ticket(request)
        self.sent.append(ticket)
        return ticket

    send_soon = send

    def resume_when_done(self, ticket: Ticket, operation: Any) -> bool:
        with self.wire.lock:
            if ticket.done:
                return True
            ticket.waker = lambda: self.ready.append(operation)
            return False

    def settle_in_background(self) -> None:
        pass

    def soon(self, seconds: float, function: Callable[[], object]) -> None:
        pass

    def abandon(self, tickets: Any) -> None:
        for ticket in tickets:
            ticket.abandoned = True

    def answer(self, ticket: Ticket, reply: Any = None, error: Any = None) -> None:
        """Settle a ticket as a wire does, and resume as whoever received the reply does."""
        with self.wire.lock:
            if ticket.done:
                return
            ticket.reply, ticket.error, ticket.done = reply, error, True
            waker = ticket.waker
        if waker is not None:
            waker()
        while self.ready:
            try:
                operation = self.ready.popleft()
            except IndexError:
                return
            operation.resume()

    def fail(self, error: Any) -> None:
        """End it."""
        with self.wire.lock:
            self.wire.ended = self.wire.ended or error
        for ticket in list(self.sent):
            self.answer(ticket, error=error.again())

    def poll(self) -> Ticket:
        """The oldest poll that is not answered."""
        return next(one for one in self.sent if one.request.handle == FUNCTIONS[NEXT] and not one.done)  # type: ignore[union-attr]


def count() -> Iterator[int]:
    number = 0
    while True:
        number += 1
        yield number


# -- started calls ---------------------------------------------------------------------------------------------------


def a_call_ends_while_it_is_cancelled() -> Threads:
    """Its outcome, which brings a handle, comes while its caller gives it up."""
    lane = Lane()
    made = Control(lane, FUNCTIONS, count(), lambda _: None)
    ticket = made.start(CallFunc(5), 0.0)
    outcome = write_record(ticket.number, Return((68, Pointer(99))))

    def check() -> None:
        assert ticket.done or any(one.request.handle == FUNCTIONS[CANCEL] for one in lane.sent)  # type: ignore[union-attr]
        released = [request for request in lane.garbage if request.args and request.args[0] == 99]
        assert len(released) == 1, f"the handle that nobody waits for was released {len(released)} times"

    return [lambda: lane.answer(lane.poll(), Return((66, outcome))), lambda: made.cancel(ticket)], check


def test_what_a_cancelled_call_brought_is_released_once() -> None:
    assert explore(a_call_ends_while_it_is_cancelled, [control], bound=2, beyond=100) > 100


def the_lane_is_lost_while_calls_are_started() -> Threads:
    """Every call that could be started gets an outcome, also when the lane answers nonsense just then."""
    lane = Lane()
    lost: list[Any] = []
    made = Control(lane, FUNCTIONS, count(), lost.append)
    tickets: list[StartedTicket] = []

    def start() -> None:
        with contextlib.suppress(RpcError):  # told at once
            tickets.append(made.start(CallFunc(5), 0.0))

    def check() -> None:
        assert len(lost) == 1
        assert all(ticket.done for ticket in tickets), "a call waits for ever"

    return [start, start, lambda: lane.answer(lane.poll(), Return((66, b"nonsense")))], check


def test_no_call_waits_for_a_lane_that_is_lost() -> None:
    assert explore(the_lane_is_lost_while_calls_are_started, [control], bound=1, beyond=300) > 100


# -- submitted operations --------------------------------------------------------------------------------------------


class Timers:
    """Stands in for the I/O thread: what it should do later is done by a thread of the scenario."""

    def __init__(self) -> None:
        self.due: list[Callable[[], object]] = []

    def call_at(self, at: float, function: Callable[[], object]) -> Any:
        self.due.append(function)
        return SimpleNamespace(cancel=lambda: None)

    def call(self, function: Callable[[], object]) -> None:
        function()

    def is_current(self) -> bool:
        return False


def operations(timers: Timers, lane: Lane) -> Any:
    ops = SimpleNamespace(link=lane, lanes=None, order=Order())
    session = SimpleNamespace(name="session-1", peer="x", observers=(), _pending={}, _ops=ops)

    def flow() -> Flow[Any]:
        reply = yield CallFunc(5)
        return reply

    def submit(timeout: float | None = None) -> Pending:
        return Pending(session, Work(ops, flow(), "f", frozenset({7})), timeout)

    return SimpleNamespace(ops=ops, session=session, submit=submit)


@pytest.fixture
def timers(monkeypatch: pytest.MonkeyPatch) -> Timers:
    made = Timers()
    monkeypatch.setattr("rpcnb.link.iothread.IO_THREAD", made)
    return made


def test_an_operation_whose_time_is_over_at_its_start_lets_later_ones_begin(timers: Timers) -> None:
    def scenario() -> Threads:
        timers.due.clear()
        lane = Lane()
        made = operations(timers, lane)
        first = made.submit(10.0)

        def expire() -> None:
            for function in list(timers.due):
                function()

        def check() -> None:
            expire()
            assert isinstance(first.exception(0), DeadlineExceeded)
            for ticket in lane.sent:
                lane.answer(ticket, Return((1, 1)))
            assert made.ops.order.last == {}, "a later operation on the same thing would wait for ever"
            assert made.session._pending == {}

        return [first.start, expire], check

    assert explore(scenario, [pending, order], bound=2, beyond=200) > 100


def test_an_operation_ends_once_and_lets_the_next_begin(timers: Timers) -> None:
    def scenario() -> Threads:
        lane = Lane()
        made = operations(timers, lane)
        first, second = made.submit(), made.submit()
        first.start()
        cancelled: list[bool] = []

        def answer() -> None:
            lane.answer(lane.sent[0], Return((1, 1)))

        def check() -> None:
            assert first.done()
            assert cancelled == [first.cancelled()]
            for ticket in list(lane.sent):
                lane.answer(ticket, Return((1, 2)))
            assert second.done(), "the second operation waits for ever"
            assert made.ops.order.last == {}

        return [answer, lambda: cancelled.append(first.cancel()), second.start], check

    assert explore(scenario, [pending, order], bound=1, beyond=300) > 100
