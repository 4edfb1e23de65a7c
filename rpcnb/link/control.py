"""The control lane: calls that overlap, and cancels, on a connection of their own.

:class:`Control` starts calls at an rpcnb server (``rpcnb.start``), collects their outcomes (``rpcnb.next``, always on
the way) and cancels. :class:`Route` is the way of one operation: a call of a function that may answer later goes over
the control lane, everything else over a link. Both serve the sync and the async session.

Source:
    docs/design.md 1; the server's side is ``rpcnb/runtime/overlap.py``.
"""

from __future__ import annotations

import itertools
import logging
from functools import partial
from typing import TYPE_CHECKING, Any

from rpcnb.errors import RemoteProtocolError, RpcError
from rpcnb.link.wire import Ticket
from rpcnb.protocol import flows
from rpcnb.protocol.codes import Code
from rpcnb.protocol.flows import Send, Wait, undo
from rpcnb.protocol.messages import CallFunc, InitServer, Raised, Syscall
from rpcnb.protocol.records import CANCEL, CANCEL_AT, NEXT, START, Emitted, read_records

if TYPE_CHECKING:
    import asyncio
    import socket
    from collections.abc import Callable, Iterable, Iterator

    from rpcnb.link.dial import SessionTicket
    from rpcnb.protocol.flows import Flow, SendCalls
    from rpcnb.protocol.messages import Reply, Request
    from rpcnb.transport.turn import Turn

__all__ = ["CONTROL_LANE", "Control", "LanesBase", "Route", "StartedTicket", "look_up_control", "may_answer_later"]

log = logging.getLogger(__name__)

_NAMES = (START, NEXT, CANCEL, CANCEL_AT)
CONTROL_LANE = 1
_BULK_LANES = (2, 3)
_GRACE = 0.5  # seconds after its time at which the server ends a call whose client has not cancelled it
_MOST_POLLS = 16  # on the way at once
_BEHIND = (0.001, 0.003, 0.01)  # seconds between polls behind a burst of starts
_AT_ONCE = 512  # requests that one cancel names


def may_answer_later(request: object) -> bool:
    """Tell whether a request calls a function that an rpcnb server has marked so (the handle's lowest bit)."""
    return type(request) is CallFunc and bool(request.handle & 1)


def look_up_control() -> Flow[dict[str, int]]:
    """Initialize a lane and look its functions up, all on the way at once."""
    opened = yield Send(InitServer(()))
    tickets = []
    for name in _NAMES:
        tickets.append((yield Send(Syscall(Code.GET_GLOBAL_FUNC, (name,)))))  # noqa: PERF401  # it cannot yield
    flows.result_of((yield Wait(opened)))
    found = {}
    for name, ticket in zip(_NAMES, tickets, strict=True):
        values = flows.result_of((yield Wait(ticket)))
        if not (len(values) == 1 and isinstance(values[0], int) and values[0]):
            raise RemoteProtocolError(f"expected the function {name} on a lane, got {values!r}")
        found[name] = int(values[0])
    return found


class StartedTicket(Ticket):
    """The outcome that is owed for a call that was started.

    Attributes:
        number: The call's number on the wire.
        begun: The server has answered the start.
        on_begun: Called then.
        on_output: Called with each part of what the call puts out.
    """

    __slots__ = ("begun", "control", "number", "on_begun", "on_output")

    def __init__(self, request: Request, number: int, control: Control) -> None:
        super().__init__(request)
        self.number = number
        self.begun = False
        self.control = control
        self.on_begun: Callable[[], object] | None = None
        self.on_output: Callable[[bytes], object] | None = None

    def owed_at(self, sock: socket.socket) -> tuple[socket.socket | None, int | None]:
        """Return its control lane and its number."""
        return self.control.link.wire.sock, self.number


class Control:
    """One session's control lane.

    Args:
        link: A connection of the session that nothing else uses.
        functions: Handles of the server's functions, by name.
        numbers: Gives the session's calls their numbers.
        on_end: Called with the error when the lane is lost.

    Attributes:
        answers: Polls that were answered: the server lives.
        ended: What ended it; None while it is of use.
    """

    def __init__(
        self, link: Any, functions: dict[str, int], numbers: Iterator[int], on_end: Callable[[RpcError], object]
    ) -> None:
        self.link = link
        self._functions = functions
        self._on_end = on_end
        self._numbers = numbers
        self._calls: dict[int, StartedTicket] = {}
        self.answers = 0
        self._polls = 0  # on the way
        self._asks = False  # it will be seen in a moment whether another is needed
        self._started = 0  # ordinal of the last start
        self._behind = 0  # ordinal of the last poll
        self.ended: RpcError | None = None
        self._ask()

    def start(
        self, request: CallFunc, seconds: float, on_output: Callable[[bytes], object] | None = None
    ) -> StartedTicket:
        """Start a call; returns the ticket of its outcome.

        Args:
            request: The call.
            seconds: Its time limit at the server; 0 for none.
            on_output: Called with each part of what it puts out, until nobody waits for it any more.

        Raises:
            ArgumentError: A value cannot travel; nothing was sent.
            SessionLost: The lane has ended.
        """
        ticket = StartedTicket(request, next(self._numbers), self)
        ticket.on_output = on_output
        self._calls[ticket.number] = ticket
        if self.ended is not None:  # looked at after that: whoever ends the lane now finds the call
            self._calls.pop(ticket.number, None)
            raise self.ended.again()
        limit = float(seconds + _GRACE if seconds else 0)
        arguments = (ticket.number, limit, int(request.handle), *request.args)
        try:
            begun = self.link.send(CallFunc(self._functions[START], arguments))
        except BaseException:
            self._calls.pop(ticket.number, None)
            raise
        self._started = begun.ordinal
        operation = _Begun(self, ticket, begun)
        if self.link.resume_when_done(begun, operation):
            operation.resume()
        self.link.settle_in_background()
        if not self._asks:
            # The poll on the way gives way to the start; another behind the burst saves a round trip, and some more
            # after it those of the outcomes that come a little later. On a fast link the answers come before.
            self._asks = True
            self.link.soon(_BEHIND[0], partial(self._ask_behind, 0, self.answers))
        return ticket

    def cancel(self, ticket: StartedTicket) -> None:
        """End a call early; its outcome is dropped when it comes."""
        with self.link.wire.lock:  # its outcome may be coming just now
            if ticket.done and ticket.reply is not None and not (ticket.taken or ticket.abandoned):
                self.link.garbage.extend(undo(ticket.request, ticket.reply))  # type: ignore[arg-type]  # a call's
            ticket.abandoned = True
            if ticket.done:
                return
            ticket.waker = None
        self._tell(CallFunc(self._functions[CANCEL], (ticket.number,)))

    def cancel_at(self, lane: int, ordinals: list[int]) -> None:
        """End requests of another connection early."""
        for start in range(0, len(ordinals), _AT_ONCE):
            self._tell(CallFunc(self._functions[CANCEL_AT], (lane, *ordinals[start : start + _AT_ONCE])))

    def _tell(self, request: CallFunc) -> None:
        try:
            self.link.send(request).abandoned = True
            self.link.settle_in_background()
        except RpcError:
            log.debug("nothing is to be cancelled any more: the lane has ended")

    def settle(self, ticket: StartedTicket, reply: Reply | None, error: Exception | None = None) -> None:
        """Give a call its outcome."""
        with self.link.wire.lock:
            if self._calls.pop(ticket.number, None) is None:
                return
            if reply is not None and ticket.abandoned:
                self.link.garbage.extend(undo(ticket.request, reply))  # type: ignore[arg-type]  # a call's
            ticket.reply, ticket.error = reply, error
            ticket.done = True
            waker, ticket.waker = ticket.waker, None
        if waker is not None:
            waker()

    # -- the poll --------------------------------------------------------------------------------------------------

    def _ask_behind(self, step: int, answers: int) -> None:
        self._asks = False
        if self.ended is not None or self._polls >= _MOST_POLLS or (step and self.answers != answers):
            return
        if step or self._behind < self._started:
            self._ask()
            if step + 1 < len(_BEHIND):
                self.link.soon(_BEHIND[step + 1], partial(self._ask_behind, step + 1, self.answers))

    def _ask(self) -> None:
        try:
            ticket = self.link.send(CallFunc(self._functions[NEXT], ()))
        except RpcError as error:
            self._end(error)
            return
        self._polls += 1
        self._behind = ticket.ordinal
        poll = _Poll(self, ticket)
        if self.link.resume_when_done(ticket, poll):
            poll.resume()
        self.link.settle_in_background()

    def take(self, poll: Ticket) -> None:
        """Take the outcomes that a poll has brought, and ask again."""
        self._polls -= 1
        poll.taken = True
        if poll.error is not None:
            self._end(poll.error)  # type: ignore[arg-type]  # a wire's
            return
        try:
            values = flows.call_result(flows.result_of(poll.result()))
            records = read_records(values if isinstance(values, bytes) else b"?", self.link.wire.endpoint.limits)
        except RpcError as error:
            self._end(error)
            return
        self.answers += 1
        if not self._polls:
            self._ask()
        for number, reply in records:
            ticket = self._calls.get(number)
            if isinstance(reply, Emitted):
                if ticket is not None and ticket.on_output is not None and not ticket.abandoned:
                    self._hand_over(ticket, reply.data)
            elif ticket is not None:
                self.settle(ticket, reply)

    def _hand_over(self, ticket: StartedTicket, data: bytes) -> None:
        """Give a call part of its output; what cannot be read ends that call, and no other."""
        assert ticket.on_output is not None
        try:
            ticket.on_output(data)
        except Exception as error:
            known = isinstance(error, RpcError)
            self.settle(ticket, None, error if known else RemoteProtocolError(f"expected output of a call: {error}"))

    def _end(self, error: RpcError) -> None:
        if self.ended is not None:
            return
        self.ended = error.again()
        self._on_end(error)
        self.link.fail(error)  # nobody polls it any more
        for ticket in list(self._calls.values()):
            self.settle(ticket, None, error.again())

    def owed(self) -> list[StartedTicket]:
        """Return the tickets of calls that somebody waits for."""
        return [ticket for ticket in list(self._calls.values()) if not ticket.abandoned]

    def close(self) -> None:
        """End the lane."""
        self._on_end = lambda _: None
        self.link.close()


class LanesBase:
    """The further connections of one session, opened when they are first needed.

    Args:
        ticket: What they present.
        most: How many there may be.
        name: Of the session, for messages.
        lock: Held while a lane is being opened: a thread's, or an event loop's.
    """

    def __init__(self, ticket: SessionTicket, most: int, name: str, lock: Turn | asyncio.Lock) -> None:
        self._lock = lock
        self.ticket = ticket
        self.most = most
        self.name = name
        self.numbers = itertools.count(1)  # of calls; a lane that is opened again goes on with them
        self.control_lane: Control | None = None
        self.bulk_links: list[Any] = []
        self.wires: list[Any] = []  # of every lane there has been: what they have carried counts
        self.inquiry: Any = None  # finds out how the session has ended, where somebody knows
        self.refused = False  # they cannot be opened: do without
        self.closed = False

    @property
    def opened(self) -> Control | None:
        """The control lane, if it is open."""
        control = self.control_lane
        return None if control is None or control.ended is not None else control

    @property
    def missing_bulk(self) -> int:
        """Number of the bulk lane that should be opened; 0 if those that are open will do."""
        self.bulk_links = [link for link in self.bulk_links if link.wire.ended is None]
        if self.refused or self.closed or len(self.bulk_links) >= min(self.most - 1, len(_BULK_LANES)):
            return 0
        if any(not link.wire.busy for link in self.bulk_links):
            return 0
        taken = {link.lane for link in self.bulk_links}
        return next(lane for lane in _BULK_LANES if lane not in taken)

    def least_busy(self) -> Any:
        """Return the bulk lane with the least to do, or None."""
        return min(self.bulk_links, key=lambda link: len(link.wire.tickets), default=None)

    def control_lost(self, error: RpcError) -> None:
        """Forget a control lane that has ended; the next call that needs it opens another."""
        log.info("%s has lost its control lane: %s", self.name, error)

    def failed(self, error: RpcError) -> None:
        """Do without lanes."""
        self.refused = True
        log.info("%s does without lanes: %s", self.name, error)

    def owed(self) -> list[Ticket]:
        """Return the tickets of users' operations that are owed on lanes."""
        control = self.opened
        return [
            *(ticket for link in list(self.bulk_links) for ticket in list(link.wire.tickets)),
            *(() if control is None else control.owed()),
        ]

    def links(self) -> list[Any]:
        """Return the open connections."""
        control = self.opened
        return [*self.bulk_links, *([] if control is None else [control.link])]

    def opened_link(self, link: Any) -> None:
        """Note a further connection."""
        self.wires.append(link.wire)
        if self.inquiry is not None:
            link.wire.inquire = partial(self.inquiry.ask, link)

    def cancel_at(self, lane: int, ordinals: list[int]) -> None:
        """Cancel requests of a connection at the server, without waiting: the control lane may have to be opened."""
        if self.opened is not None:
            self.opened.cancel_at(lane, ordinals)
        else:
            self._do_soon(lambda control: control.cancel_at(lane, ordinals))

    def open_soon(self) -> None:
        """Open the control lane without waiting for it."""
        if not self._lock.locked():
            self._do_soon(lambda _: None)

    def _do_soon(self, use: Callable[[Control], object]) -> None:
        """Open the control lane in the background and use it; nothing happens where there can be none."""
        raise NotImplementedError

    def fail(self, error: RpcError) -> None:
        """End all lanes with the session, which was lost."""
        self.closed = True
        for link in self.links():
            link.fail(error)

    def close_again(self) -> None:
        """Close what was opened while all was being closed."""
        if self.closed:
            self.close()

    def close(self) -> None:
        """End all lanes."""
        self.closed = True
        if self.opened is not None:
            self.opened.close()
        for link in self.bulk_links:
            link.close()


class _Poll:
    """What happens when the server has answered a poll."""

    __slots__ = ("_control", "_ticket")

    def __init__(self, control: Control, ticket: Ticket) -> None:
        self._control = control
        self._ticket = ticket

    def resume(self) -> None:
        self._control.take(self._ticket)


class _Begun:
    """What happens when the server has answered a start."""

    __slots__ = ("_begun", "_control", "_ticket")

    def __init__(self, control: Control, ticket: StartedTicket, begun: Ticket) -> None:
        self._control = control
        self._ticket = ticket
        self._begun = begun

    def resume(self) -> None:
        begun = self._begun
        begun.taken = True
        self._ticket.begun = True
        if begun.error is not None:
            self._control.settle(self._ticket, None, begun.error)
        elif isinstance(begun.reply, Raised):
            self._control.settle(self._ticket, begun.reply)
        elif self._ticket.on_begun is not None:
            self._ticket.on_begun()


class Route:
    """The way of one operation's requests.

    Args:
        link: The connection of everything but started calls.
        control: The control lane, where there is one; else everything goes over ``link``.
        seconds: Tells how much of the operation's time is left; 0 for no limit.
        on_output: Called with each part of what a started call puts out.
    """

    __slots__ = ("control", "link", "on_output", "seconds")

    def __init__(
        self,
        link: Any,
        control: Control | None,
        seconds: Callable[[], float],
        on_output: Callable[[bytes], object] | None = None,
    ) -> None:
        self.link = link
        self.control = control
        self.seconds = seconds
        self.on_output = on_output

    def send(self, request: Request) -> Ticket:
        """Send a request; returns its ticket."""
        if self.control is not None and may_answer_later(request):
            return self.control.start(request, self.seconds(), self.on_output)  # type: ignore[arg-type]  # a call
        ticket: Ticket = self.link.send_soon(request) if type(request) is CallFunc else self.link.send(request)
        return ticket

    def send_calls(self, step: SendCalls) -> list[Ticket]:
        """Send many calls of one function in one go."""
        tickets: list[Ticket] = self.link.send_calls(step.handle, step.calls)
        return tickets

    def resume_when_done(self, ticket: Ticket, operation: Any) -> bool:
        """Have ``operation.resume()`` called when ``ticket`` is done; True if it is done already."""
        link = ticket.control.link if isinstance(ticket, StartedTicket) else self.link
        found: bool = link.resume_when_done(ticket, operation)
        return found

    def abandon(self, tickets: Iterable[Ticket]) -> None:
        """Give up an operation's tickets, at the server too where it understands."""
        plain = []
        for ticket in tickets:
            if isinstance(ticket, StartedTicket):
                ticket.control.cancel(ticket)
            else:
                plain.append(ticket)
        self.link.abandon(plain)
