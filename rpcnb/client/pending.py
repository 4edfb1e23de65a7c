"""Calls that were submitted and are not waited for: :class:`Pending`.

::

    sleep = session.get_function("demo.sleep")
    jobs = [sleep.submit(1.0) for _ in range(3)]                     # all on the way
    jobs[0].result(timeout=5)                                        # as a concurrent.futures.Future
    await jobs[1]                                                    # or in any running loop
    concurrent.futures.wait(jobs)

A pending operation is a flow that is resumed when a reply has come, by whoever received it: a caller that is blocked
on the same session, or the I/O thread. Callbacks of the user run in the I/O thread, outside all locks.
"""

from __future__ import annotations

import asyncio
import contextvars
import threading
import time
from collections import deque
from concurrent.futures import CancelledError, Future
from concurrent.futures._base import FINISHED
from typing import TYPE_CHECKING, Any, NamedTuple

from rpcnb import parts
from rpcnb.client.watch import Watch, new_number
from rpcnb.errors import DeadlineExceeded, DeadlockError, ForkedSession, RpcError
from rpcnb.link import iothread
from rpcnb.link.control import Route, StartedTicket
from rpcnb.link.interrupt import Guard
from rpcnb.link.order import moves_data, release_when_drained
from rpcnb.link.wire import Ticket
from rpcnb.protocol.flows import Send, SendCalls, Wait
from rpcnb.transport.deadline import NO_DEADLINE, Deadline
from rpcnb.values import StaysHere

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable, Generator

    from rpcnb.client.moving import Moving
    from rpcnb.client.owner import Owner
    from rpcnb.link.order import Hold
    from rpcnb.link.running import Unfinished
    from rpcnb.protocol.flows import Flow

__all__ = ["Pending", "Work"]


class Pending(StaysHere, Future[Any]):
    """An operation on its way: a :class:`concurrent.futures.Future` that can be awaited too.

    Attributes:
        id: Number, unique in this process.
        session: Where it was submitted.
        function: What it does, for people.
        submitted: ``time.monotonic()`` of the submission; ``finished`` likewise, None before.
        deadline: ``time.monotonic()`` at which it is given up, or None.
    """

    _instead = "pass on its result(), or submit it with a session that is opened there"

    def __init__(self, session: Owner, work: Work, timeout: float | None) -> None:
        super().__init__()
        self.id = new_number()
        self.session: Any = session
        function = work.what
        self.function = function
        self.submitted = time.monotonic()
        self.finished: float | None = None
        self._limit = NO_DEADLINE if timeout is None else Deadline(timeout, function)
        self.deadline = self._limit.at
        self._flow = work.flow
        self.keeps = work.keeps
        self._work = work._replace(keeps=None)
        self._ops = work.ops
        self._link: Any = work.ops.link
        self._route: Route | None = None
        self._hold: Hold | None = None
        self._before = 0  # operations that must end first
        self._tickets: deque[Ticket] = deque()
        self._owed: list[Ticket] = []  # given up, and moving bytes still
        self._moved = 0  # bulk bytes of the tickets that are done
        self._waits_for: Ticket | None = None
        self._settled = False
        self._waiting: list[Ticket] = []  # what blocked callers wait for, each its own: a ticket wakes one
        self._lock = threading.RLock()
        self._timer: iothread.Timer | None = None
        self._watch: Watch | None = None

    @property
    def runs_cell(self) -> bool:
        """Tell whether it is a remote cell."""
        return self._work.on_output is not None

    @property
    def state(self) -> str:
        """``queued``, ``sent``, ``running``, ``draining``, ``done``, ``failed`` or ``cancelled``.

        ``queued``: behind an operation that names the same thing. ``running``: an rpcnb server has begun it.
        ``draining``: given up, and something of it is still on the way.
        """
        if not self.done():
            if self._before:
                return "queued"
            tickets = list(self._tickets)
            begun = tickets and isinstance(tickets[-1], StartedTicket) and tickets[-1].begun
            return "running" if begun else "sent"
        if self._owed and self._hold is not None and not self._hold.released:
            return "draining"
        if self.cancelled():
            return "cancelled"
        return "failed" if self.exception(0) is not None else "done"

    # -- driving -------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Send the first request; called once, by the session."""
        self.set_running_or_notify_cancel()
        if self.session.observers:
            self._watch = Watch(self.session, self.function, self.id)
        self.session._pending[self.id] = self
        if self.deadline is not None:
            self._timer = iothread.IO_THREAD.call_at(self.deadline, self._expire)
        try:
            self._choose_way()  # it may open a lane, which can be interrupted
        except DeadlineExceeded as error:
            self._give_up(error)
        except BaseException as error:
            self._finish(None, error)
            raise
        if self._settled:
            return  # its time was over before anything was sent
        with Guard():  # an interrupt between sending and counting would tear the stream
            self._hold, before = self._ops.order.enter(self._work.names, self._work.queued)
            with self._lock:
                self._before = sum(hold.then(self._one_ended) for hold in before)
                waits = self._before > 0
            if self._settled:
                self._hold.release()  # its time was over just now, when there was nothing to release yet
            elif not waits:
                self._begin()

    def adopt(self, link: Any, begun: Unfinished, deadline: Deadline, since: float, watch: Watch | None) -> None:
        """Go on with a flow that its caller has begun; called instead of :meth:`start`."""
        self.set_running_or_notify_cancel()
        self._watch, self._link, self._limit, self.deadline = watch, link, deadline, deadline.at
        self.submitted = since
        self.session._pending[self.id] = self
        if self.deadline is not None:
            self._timer = iothread.IO_THREAD.call_at(self.deadline, self._expire)
        self._route = Route(link, None, self._seconds_left)
        self._hold, _ = self._ops.order.enter(self._work.names, False)
        self._tickets = begun.tickets
        with self._lock:
            self._waits_for = begun.ticket
            done = link.resume_when_done(begun.ticket, self)
        if done:
            self.resume()
        with Guard():
            link.settle_in_background()

    def _choose_way(self) -> None:
        lanes = self._ops.lanes
        control = None
        if lanes is not None:
            if self._work.bulk:
                self._link = lanes.bulk(self._limit) or self._link
            elif self._work.may_overlap:
                control = lanes.control(self._limit)
        self._route = Route(self._link, control, self._seconds_left, self._work.on_output)

    def _seconds_left(self) -> float:
        return 0.0 if self.deadline is None else max(0.001, self.deadline - time.monotonic())

    def _one_ended(self) -> None:
        with self._lock:
            self._before -= 1
            waits = self._before > 0
        if not waits:
            self._begin()

    def _begin(self) -> None:
        if self._watch is not None:
            self._watch.sent()
        with Guard():
            self.resume()
            self._link.settle_in_background()

    def resume(self) -> None:
        """Run the flow until it waits for a reply that has not come; whoever received the last one calls this."""
        with self._lock:
            if self._settled:
                return
            try:
                self._run()
                return
            except StopIteration as end:
                failure = None
                self._finish(end.value, None)
            except BaseException as error:
                failure = error
                self._abandon()  # what else is on the way moves no user memory
                self._finish(None, error)
        self._tell_end(failure)

    def _run(self) -> None:
        route, flow, tickets = self._route, self._flow, self._tickets
        assert route is not None
        step: Any = None
        ticket, self._waits_for = self._waits_for, None
        if ticket is None:
            step = next(flow)
        while True:
            if ticket is not None:
                ticket.taken = True  # its reply is the flow's now, also what that brought
                while tickets and tickets[0].taken:
                    self._moved += tickets.popleft().moved
                step = flow.send(ticket.reply) if ticket.error is None else flow.throw(ticket.error)
            while isinstance(step, (Send, SendCalls)):
                if isinstance(step, Send):
                    tickets.append(route.send(step.request))
                    step = flow.send(tickets[-1])
                else:
                    sent = route.send_calls(step)
                    tickets.extend(sent)
                    step = flow.send(sent)
            if type(step) is Wait:
                ticket = step.ticket
            else:
                ticket = route.send(step)
                tickets.append(ticket)
                if self._watch is not None and isinstance(ticket, StartedTicket):
                    ticket.on_begun = self._watch.running
            if not route.resume_when_done(ticket, self):
                self._waits_for = ticket
                return

    def _finish(self, result: Any, error: BaseException | None) -> None:
        self.finished = time.monotonic()
        self._flow.close()
        self.keeps = None
        self.session._pending.pop(self.id, None)
        if self._timer is not None:
            self._timer.cancel()
        if error is None:
            super().set_result(result)
        elif isinstance(error, CancelledError):
            self._become_cancelled()
        else:
            super().set_exception(error)
        self._moved += sum(ticket.moved for ticket in self._tickets)
        self._tickets.clear()
        self._route = None  # it holds this operation, and so may these:
        self._done_callbacks: list[Any] = []
        with self._link.wire.lock:  # or a caller that begins to wait just now would sleep on
            self._settled = True
            for ticket in self._waiting:
                ticket.done = True
                if ticket.waker is not None:
                    ticket.waker()

    def _become_cancelled(self) -> None:
        """A running future cannot be cancelled in the standard library; ours can."""
        with self._condition:
            self._state = "CANCELLED_AND_NOTIFIED"
            self._condition.notify_all()
            for waiter in self._waiters:
                waiter.add_cancelled(self)
        self._invoke_callbacks()  # type: ignore[attr-defined]  # the standard library's, not in its stub

    def _give_up(self, error: BaseException) -> bool:
        with self._lock:
            if self._settled:
                return False
            with Guard():  # it may tell the server; and an interrupt half way would leave it neither given up nor not
                self._abandon()
                self._finish(None, error)
        self._tell_end(error)
        return True

    def _abandon(self) -> None:
        tickets = [ticket for ticket in self._tickets if not ticket.taken]
        self._owed = [ticket for ticket in tickets if moves_data(ticket)]
        if self._route is not None:
            self._route.abandon(tickets)

    def _tell_end(self, error: BaseException | None) -> None:
        """Tell the observers, outside the lock: one may use this operation."""
        if self._watch is not None:
            self._watch.ended(error)
        self._let_go()

    def _let_go(self) -> None:
        """Let later operations on the same things begin, once nothing of this one is on the way."""
        if self._hold is not None:
            release_when_drained(self._hold, self._link, self._owed)

    def _expire(self) -> None:
        error = self._limit.exceeded()
        error.explain(self._link.wire.behind(list(self._tickets)))
        self._give_up(error)

    def forked(self) -> None:
        """In a forked child: the operation is the parent's; locks may be held by threads that are not here."""
        self._lock = threading.RLock()
        self._new_condition()
        self._settled = True
        self._timer = None
        self._waiting, self._done_callbacks, self._waiters = [], [], []
        self._exception = ForkedSession(
            f"{self.function} was submitted before a fork; it goes on in the parent process"
        )
        self._state = FINISHED

    def _new_condition(self) -> None:
        self._condition = threading.Condition()

    def _refuse_nesting(self) -> None:
        """Refuse what a signal's handler or a finalizer asks in the middle of a step of its own thread."""
        if self._lock._is_owned():  # type: ignore[attr-defined]  # not in the stub
            raise DeadlockError(f"{self.function}: this thread is in the middle of a step of it")

    # -- for users -----------------------------------------------------------------------------------------------

    def cancel(self) -> bool:
        """Give the operation up; its reply is dropped when it comes, and the session is ``draining`` until then.

        Returns:
            False if it had finished.
        """
        self._refuse_nesting()
        return self._give_up(CancelledError())

    def result(self, timeout: float | None = None) -> Any:
        """Wait for the result and return it; an interrupt leaves the operation on its way.

        Raises:
            DeadlineExceeded: ``timeout`` seconds went by; the operation goes on.
            CancelledError: It was cancelled.
        """
        self._block(timeout)
        if self._exception is not None:
            raise fresh(self._exception)
        return super().result(0)

    def exception(self, timeout: float | None = None) -> BaseException | None:
        """Wait for the end; return what it raised, anew each time, or None."""
        self._block(timeout)
        error = super().exception(0)
        return None if error is None else fresh(error)

    def _block(self, timeout: float | None) -> None:
        if self.done():
            return
        if iothread.IO_THREAD.is_current():
            raise DeadlockError(f"waiting for {self.function} in the thread that would have to finish it")
        limit = NO_DEADLINE if timeout is None else Deadline(timeout, self.function)
        link, ticket = self._link, _End(self)
        with Guard() as guard:
            with link.wire.lock:
                if self._settled:
                    return
                self._waiting.append(ticket)
            try:
                link.wait(ticket, limit, guard)
            finally:
                with link.wire.lock:
                    self._waiting.remove(ticket)

    def owed_at(self) -> tuple[socket.socket | None, int | None]:
        """Return which connection owes what it waits for, and the number if that is a started call."""
        waits = self._waits_for
        return (None, None) if waits is None else waits.owed_at(self._link.wire.sock)

    def add_done_callback(self, fn: Callable[[Future[Any]], object]) -> None:
        """Call ``fn(pending)`` at the end, in the I/O thread; what it prints goes to the cell that asked for this."""
        context = contextvars.copy_context()
        super().add_done_callback(lambda pending: iothread.IO_THREAD.call(lambda: context.run(fn, pending)))

    def __await__(self) -> Generator[Any, None, Any]:
        """Wait in the running event loop; cancelling that gives the operation up."""
        return asyncio.wrap_future(self).__await__()

    def panel(self) -> Any:
        """Return a live view of this operation, for a notebook."""
        return parts.find("panel")("pending", pending=self)

    @property
    def moved(self) -> int:
        """Bytes of bulk data that have moved so far."""
        return self._bytes_moved()

    def _bytes_moved(self) -> int:
        return self._moved + sum(ticket.moved for ticket in list(self._tickets))

    def __repr__(self) -> str:
        age = (self.finished or time.monotonic()) - self.submitted
        return f"<Pending {self.id}: {self.function or 'operation'}, {self.state}, {age:.1f} s, {self.session.name}>"


class _End(Ticket):
    """What waits for the end of an operation."""

    __slots__ = ("_operation",)

    def __init__(self, operation: Pending) -> None:
        super().__init__(None)
        self._operation = operation

    def owed_at(self, sock: socket.socket) -> tuple[socket.socket | None, int | None]:
        """Return what the operation waits for."""
        return self._operation.owed_at()


def fresh(error: BaseException) -> BaseException:
    """Return what to raise for an exception that is kept: ours anew each time, so that no frames gather on it."""
    return error.again() if isinstance(error, RpcError) else error.with_traceback(None)


class Work(NamedTuple):
    """What an operation does.

    Attributes:
        ops: The connection's operations, which made the flow.
        flow: How.
        what: For people.
        names: Handles that it names, for the order of operations.
        may_overlap: It calls a function that may answer later.
        bulk: It moves so much data that it should not keep other operations waiting.
        queued: It is one request on the first connection.
        moving: The data that it moves, if any.
        keeps: A remote function that must not be released before the server has begun.
        on_output: Called with each part of what the call puts out while it runs.
    """

    ops: Any
    flow: Flow[Any]
    what: str
    names: frozenset[int] = frozenset()
    may_overlap: bool = False
    bulk: bool = False
    queued: bool = False
    moving: Moving | None = None
    keeps: Any = None
    on_output: Callable[[bytes], object] | None = None
