"""Who receives for everyone: the role is handed from caller to caller and to the I/O thread, and no reply is forgotten.

The real link, wire and endpoints, stepped through their interleavings (tests/explorer.py); the socket, the poll and the
network are stand-ins.
"""

from __future__ import annotations

import _thread
import contextlib
import os
import select
from collections.abc import Callable
from itertools import repeat
from typing import Any

import pytest
from explorer import explore

from rpcnb.errors import DeadlineExceeded, SessionClosed, SessionLost
from rpcnb.link import iothread, link, wire
from rpcnb.link.interrupt import Guard
from rpcnb.link.link import Link
from rpcnb.link.wire import Ticket, Wire
from rpcnb.protocol.codes import Role
from rpcnb.protocol.endpoint import Endpoint
from rpcnb.protocol.messages import CallFunc, InitServer, Raised, Return, Shutdown
from rpcnb.protocol.shortcut import NOT_PLAIN
from rpcnb.transport.deadline import NO_DEADLINE, Deadline

ECHO = 5  # a handle
INTEGER = 1  # the type of its results
Threads = tuple[list[Callable[[], object]], Callable[[], object]]


class Bell:
    """Lets somebody wait, for a while, until something may have changed."""

    def __init__(self) -> None:
        self._lock = _thread.allocate_lock()
        self._lock.acquire()

    def ring(self) -> None:
        if self._lock.locked():
            self._lock.release()

    def wait(self) -> bool:
        return self._lock.acquire(timeout=1)


class Board:
    """A server that answers calls of ECHO when the network lets it, as the socket of its client."""

    def __init__(self) -> None:
        self.server = Endpoint(Role.SERVER)
        self.arrived = b""
        self.closed = False
        self.bell = Bell()  # for the pump
        self.network = Bell()
        self.number, self._other = os.pipe()  # for polls

    # what a wire needs of a socket

    def send(self, data: Any, flags: int = 0) -> int:
        if self.closed:
            raise BrokenPipeError
        self.server.receive_data(bytes(data))
        self.network.ring()
        return len(data)

    def sendmsg(self, buffers: Any, extra: Any = (), flags: int = 0) -> int:
        return self.send(b"".join(buffers))

    def recv_into(self, buffer: Any, nbytes: int = 0, flags: int = 0) -> int:
        if not self.arrived and not self.closed:
            raise BlockingIOError
        count = min(len(buffer), len(self.arrived))
        buffer[:count] = self.arrived[:count]
        self.arrived = self.arrived[count:]
        return count

    def receive_in_a_moment(self, buffer: Any) -> int:
        """As a socket that waits a little."""
        if not self.arrived and not self.closed:
            self.bell.wait()
        return self.recv_into(buffer)

    def setsockopt(self, *_: Any) -> None:
        pass

    def fileno(self) -> int:
        return self.number

    def close(self) -> None:
        self.closed = True
        self.network.ring()

    def release(self) -> None:
        """Give the numbers back; the wire is done with them."""
        if self.number >= 0:
            os.close(self.number)
            os.close(self._other)
            self.number = -1

    __del__ = release

    # the network

    def answer(self, calls: int) -> None:
        """Answer so many calls, one after the other, as long as the client is there."""
        while calls and not self.closed:
            message = self.server.next_message()
            if message is None:
                self.network.wait()
                continue
            if isinstance(message, Shutdown):
                return
            assert isinstance(message, CallFunc)
            assert message.handle == ECHO
            self.arrived += b"".join(self.server.send(Return((INTEGER, *message.args))))
            self.bell.ring()
            background().bell.ring()
            calls -= 1

    def hang_up(self) -> None:
        self.closed = True
        self.bell.ring()
        background().bell.ring()


class Poll:
    """Stands in for ``select.poll``, of one board."""

    def __init__(self, board: Board) -> None:
        self.board = board
        self.wake = -1

    def register(self, what: Any, events: int) -> None:
        if isinstance(what, int):
            self.wake = what

    def modify(self, what: Any, events: int) -> None:
        pass

    def poll(self, limit: float) -> list[tuple[int, int]]:
        while True:
            found = []
            if self.board.arrived or self.board.closed:
                found.append((self.board.fileno(), select.POLLIN))
            if self.wake in select.select([self.wake], [], [], 0)[0]:
                found.append((self.wake, select.POLLIN))
            if found or not limit or not self.board.bell.wait():
                return found


class Background:
    """Stands in for the I/O thread."""

    def __init__(self) -> None:
        self.bell = Bell()
        self.links: list[Link] = []
        self.watched: set[Link] = set()
        self.callers = 0

    def adopt(self, one: Link) -> None:
        self.links.append(one)
        self.bell.ring()

    def call_at(self, when: float, function: Callable[[], object]) -> None:
        pass  # looking again is for servers of another kind

    def run(self) -> None:
        """Be the I/O thread, until all callers are done."""
        while self.callers:
            self.step()
            self.bell.wait()
        self.step()

    def step(self) -> None:
        for one in list(self.links):
            if not one.step_in_background():
                self.links.remove(one)

    def caller(self, function: Callable[[], object]) -> Callable[[], object]:
        """Count a thread, whose end ends this one."""
        self.callers += 1

        def run() -> None:
            try:
                function()
            finally:
                self.callers -= 1
                self.bell.ring()

        return run


def background() -> Background:
    found = iothread.IO_THREAD
    assert isinstance(found, Background)
    return found


def made_link(monkeypatch: pytest.MonkeyPatch, in_receive: bool) -> tuple[Link, Board]:
    """Make a link to a board of its own."""
    board = Board()
    monkeypatch.setattr(iothread, "IO_THREAD", Background())
    monkeypatch.setattr(select, "poll", lambda: Poll(board))
    endpoint = Endpoint(Role.CLIENT)
    line = Wire(board, endpoint, "board")  # type: ignore[arg-type]  # as far as a wire needs a socket
    line.wait_in_receive = lambda: None  # type: ignore[method-assign]
    line.waits = repeat(board.receive_in_a_moment) if in_receive else None
    line.queue(InitServer())
    line.flush()
    assert isinstance(board.server.next_message(), InitServer)
    board.arrived = b"".join(board.server.send(Return()))
    line.fill()
    assert not line.tickets
    made = Link(line)
    signal = made._signal

    def signal_and_ring() -> None:
        signal()
        board.bell.ring()

    made._signal = signal_and_ring  # type: ignore[method-assign]
    return made, board


def value_of(ticket: Ticket | Any) -> Any:
    if not isinstance(ticket, Ticket):
        return ticket
    reply = ticket.result()
    assert not isinstance(reply, Raised)
    return reply.values[1]  # type: ignore[union-attr]


def call(made: Link, value: int, deadline: Deadline = NO_DEADLINE, guard: Guard | None = None) -> None:
    """Call ECHO, the short way if it is open."""
    answer = made.call(ECHO, (value,)) if guard is None and deadline is NO_DEADLINE else NOT_PLAIN
    if answer is NOT_PLAIN:
        answer = made.exchange(CallFunc(ECHO, (value,)), deadline, guard or Guard())
    assert value_of(answer) == value


class Operation:
    """A pending operation, as far as a link knows one."""

    def __init__(self, made: Link, value: int) -> None:
        self.ticket = made.send_soon(CallFunc(ECHO, (value,)))
        self.value: Any = None
        self.link = made
        self.resumed = 0

    def submit(self) -> None:
        if self.link.resume_when_done(self.ticket, self):
            self.resume()
        else:
            self.link.settle_in_background()

    def resume(self) -> None:
        self.resumed += 1
        self.value = value_of(self.ticket)


def end(made: Link, board: Board) -> None:
    """Nothing is owed, nobody sleeps, nobody has the role."""
    background().step()
    assert not made.wire.tickets, "a reply is owed for ever"
    assert not made._sleepers
    assert not made._pumping
    made.close()
    board.release()


@pytest.mark.parametrize("in_receive", [False, True])
def test_two_callers_and_the_io_thread_forget_no_reply(monkeypatch: pytest.MonkeyPatch, in_receive: bool) -> None:
    def scenario() -> Threads:
        made, board = made_link(monkeypatch, in_receive)
        behind = background()
        callers = [behind.caller(lambda: call(made, 1)), behind.caller(lambda: call(made, 2))]
        return [*callers, lambda: board.answer(2), behind.run], lambda: end(made, board)

    assert explore(scenario, [link], bound=0, beyond=400) > 400


def test_what_is_submitted_is_resumed_once_whoever_receives_its_reply(monkeypatch: pytest.MonkeyPatch) -> None:
    def scenario() -> Threads:
        made, board = made_link(monkeypatch, True)
        behind = background()
        operations: list[Operation] = []

        def submit() -> None:
            operations.append(Operation(made, 3))
            operations[0].submit()

        def check() -> None:
            end(made, board)
            assert [(one.resumed, one.value) for one in operations] == [(1, 3)]

        callers = [behind.caller(lambda: call(made, 1)), behind.caller(submit)]
        return [*callers, lambda: board.answer(2), behind.run], check

    assert explore(scenario, [link], bound=0, beyond=400) > 400


def test_the_explorer_finds_a_role_that_is_not_handed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Link, "_find_successor", lambda self: False)
    with pytest.raises(AssertionError, match=r"nobody can go on|does not come to an end|is owed for ever"):
        test_two_callers_and_the_io_thread_forget_no_reply(monkeypatch, False)


def test_who_is_out_of_time_asks_what_it_waits_for_while_replies_come(monkeypatch: pytest.MonkeyPatch) -> None:
    def scenario() -> Threads:
        made, board = made_link(monkeypatch, False)
        tickets = [made.send(CallFunc(ECHO, (value,))) for value in range(3)]
        board.answer(3)
        said: list[str] = []

        def check() -> None:
            assert said[0] in ("", "board has not answered an earlier CallFunc yet, behind which this waits")
            end(made, board)

        return [lambda: said.append(made.wire.behind(tickets[2:])), made.step_in_background], check

    assert explore(scenario, [wire], bound=1, beyond=100) > 100


class Interrupted(Guard):
    """A user presses stop as soon as the caller waits."""

    def wait(self, waits: Callable[[float], Any], seconds: float) -> Any:
        raise KeyboardInterrupt

    def poll(self, poller: Any, seconds: float) -> list[tuple[int, int]]:
        raise KeyboardInterrupt


@pytest.mark.parametrize("how", ["interrupted", "out of time"])
def test_who_gives_up_leaves_the_role_to_others(monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    def scenario() -> Threads:
        made, board = made_link(monkeypatch, False)
        behind = background()

        def gives_up() -> None:
            with contextlib.suppress(KeyboardInterrupt, DeadlineExceeded):  # the reply may have been quicker
                if how == "interrupted":
                    call(made, 1, guard=Interrupted())
                else:
                    call(made, 1, deadline=Deadline(-1.0, "call"))

        callers = [behind.caller(gives_up), behind.caller(lambda: call(made, 2))]
        return [*callers, lambda: board.answer(2), behind.run], lambda: end(made, board)

    assert explore(scenario, [link], bound=0, beyond=400) > 400


def test_everybody_learns_of_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    def scenario() -> Threads:
        made, board = made_link(monkeypatch, True)
        behind = background()
        learnt: list[int] = []

        def caller(number: int) -> Callable[[], object]:
            def run() -> None:
                with pytest.raises(SessionLost):
                    call(made, number)
                learnt.append(number)

            return behind.caller(run)

        def check() -> None:
            assert sorted(learnt) == [1, 2]
            end(made, board)

        return [caller(1), caller(2), board.hang_up, behind.run], check

    assert explore(scenario, [link], bound=0, beyond=400) > 400


def test_a_link_is_closed_while_others_call(monkeypatch: pytest.MonkeyPatch) -> None:
    def scenario() -> Threads:
        made, board = made_link(monkeypatch, False)
        behind = background()

        def caller() -> None:
            with contextlib.suppress(SessionClosed):
                call(made, 1)

        return [behind.caller(caller), behind.caller(made.close), lambda: board.answer(1), behind.run], lambda: end(
            made, board
        )

    assert explore(scenario, [link], bound=0, beyond=400) > 400
