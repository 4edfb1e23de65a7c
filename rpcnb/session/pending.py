"""Calls that were submitted and are not waited for: :class:`Pending`.

::

    jobs = [session.fn.demo.sleep.submit(1.0) for _ in range(3)]     # all on the way
    jobs[0].result(timeout=5)                                        # as a concurrent.futures.Future
    await jobs[1]                                                    # or in any running loop
    concurrent.futures.wait(jobs)

A pending operation is a flow that is resumed when a reply has come, by whoever received it: a caller that is blocked
on the same session, or the I/O thread. Callbacks of the user run in the I/O thread, outside all locks.
"""

from __future__ import annotations

import asyncio
import threading
import time
from concurrent.futures import CancelledError, Future
from typing import TYPE_CHECKING, Any

from rpcnb.errors import DeadlockError
from rpcnb.net import iothread
from rpcnb.net.interrupt import Guard
from rpcnb.net.link import NO_DEADLINE, Deadline
from rpcnb.net.wire import Ticket
from rpcnb.protocol.flows import Send, Wait
from rpcnb.session.remote import FunctionNames, RemoteFunction
from rpcnb.session.watch import Watch, new_number

if TYPE_CHECKING:
    from collections.abc import Callable, Generator

    from rpcnb.protocol.flows import Flow
    from rpcnb.session.session import Session

__all__ = ["Pending", "record"]


class Pending(Future[Any]):
    """An operation on its way: a :class:`concurrent.futures.Future` that can be awaited too.

    Attributes:
        id: Number, unique in this process.
        session: Where it was submitted.
        function: What it does, for people.
        submitted: ``time.monotonic()`` of the submission; ``finished`` likewise, None before.
        deadline: ``time.monotonic()`` at which it is given up, or None.
    """

    def __init__(self, session: Session, flow: Flow[Any], function: str, timeout: float | None) -> None:
        super().__init__()
        self.id = new_number()
        self.session = session
        self.function = function
        self.submitted = time.monotonic()
        self.finished: float | None = None
        self._limit = NO_DEADLINE if timeout is None else Deadline(timeout, function)
        self.deadline = self._limit.at
        self._flow = flow
        self._tickets: list[Ticket] = []
        self._moved = 0  # bulk bytes of the tickets that are done
        self._waits_for: Ticket | None = None
        self._settled = False
        self._waiting: list[Ticket] = []  # what blocked callers wait for, each its own: a ticket wakes one
        self._lock = threading.Lock()
        self._timer: iothread.Timer | None = None
        self._watch: Watch | None = None

    @property
    def state(self) -> str:
        """``sent``, ``done``, ``failed`` or ``cancelled``."""
        if not self.done():
            return "sent"
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
        with Guard():  # an interrupt between sending and counting would tear the stream
            self.resume()
            self.session._link.settle_in_background()

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
                self.session._link.abandon(list(self._tickets))  # what else is on the way moves no user memory
                self._finish(None, error)
        self._tell_end(failure)

    def _run(self) -> None:
        link, flow = self.session._link, self._flow
        step: Any = None
        ticket, self._waits_for = self._waits_for, None
        if ticket is None:
            step = next(flow)
        while True:
            if ticket is not None:
                if ticket in self._tickets:  # its reply is the flow's now, also what that brought
                    self._tickets.remove(ticket)
                    self._moved += ticket.moved
                step = flow.send(ticket.reply) if ticket.error is None else flow.throw(ticket.error)
            while type(step) is Send:
                sent = link.send(step.request)
                self._tickets.append(sent)
                step = flow.send(sent)
            if type(step) is Wait:
                ticket = step.ticket
            else:
                ticket = link.send(step)
                self._tickets.append(ticket)
            if not link.resume_when_done(ticket, self):
                self._waits_for = ticket
                return

    def _finish(self, result: Any, error: BaseException | None) -> None:
        self.finished = time.monotonic()
        self._flow.close()
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
        with self.session._link.wire.lock:  # or a caller that begins to wait just now would sleep on
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
            self.session._link.abandon(list(self._tickets))
            self._finish(None, error)
        self._tell_end(error)
        return True

    def _tell_end(self, error: BaseException | None) -> None:
        """Tell the observers, outside the lock: one may use this operation."""
        if self._watch is not None:
            self._watch.ended(error)

    def _expire(self) -> None:
        self._give_up(self._limit.exceeded())

    # -- for users -----------------------------------------------------------------------------------------------

    def cancel(self) -> bool:
        """Give the operation up; its reply is dropped when it comes, and the session is ``draining`` until then.

        Returns:
            False if it had finished.
        """
        return self._give_up(CancelledError())

    def result(self, timeout: float | None = None) -> Any:
        """Wait for the result and return it; an interrupt leaves the operation on its way.

        Raises:
            DeadlineExceeded: ``timeout`` seconds went by; the operation goes on.
            CancelledError: It was cancelled.
        """
        self._block(timeout)
        return super().result(0)

    def exception(self, timeout: float | None = None) -> BaseException | None:
        """Wait for the end; return what it raised, or None."""
        self._block(timeout)
        return super().exception(0)

    def _block(self, timeout: float | None) -> None:
        if self.done():
            return
        if iothread.IO_THREAD.is_current():
            raise DeadlockError(f"waiting for {self.function} in the thread that would have to finish it")
        limit = NO_DEADLINE if timeout is None else Deadline(timeout, self.function)
        link, ticket = self.session._link, Ticket(None)
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

    def add_done_callback(self, fn: Callable[[Future[Any]], object]) -> None:
        """Call ``fn(pending)`` at the end, in the I/O thread."""
        super().add_done_callback(lambda pending: iothread.IO_THREAD.call(lambda: fn(pending)))

    def __await__(self) -> Generator[Any, None, Any]:
        """Wait in the running event loop; cancelling that gives the operation up."""
        return asyncio.wrap_future(self).__await__()

    @property
    def moved(self) -> int:
        """Bytes of bulk data that have moved so far."""
        return self._moved + sum(ticket.moved for ticket in list(self._tickets))

    def __repr__(self) -> str:
        age = (self.finished or time.monotonic()) - self.submitted
        return f"<Pending {self.id}: {self.function or 'operation'}, {self.state}, {age:.1f} s, {self.session.name}>"


class _Recorded(Exception):  # not an error: it carries the flow out of the method
    def __init__(self, flow: Flow[Any], what: str) -> None:
        self.flow = flow
        self.what = what


class _Recorder:
    """Stands in for an object whose method is submitted: what it would run is recorded instead."""

    _target: Any

    def __init__(self, target: Any) -> None:
        object.__setattr__(self, "_target", target)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._target, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._target, name, value)

    @property
    def session(self) -> _Recorder:
        return _Recorder(self._target.session)

    def _run(self, flow: Flow[Any], timeout: float | None, what: str) -> Any:
        raise _Recorded(flow, what)


def record(
    session: Session, operation: Callable[..., Any], args: tuple[Any, ...], options: dict[str, Any]
) -> tuple[Flow[Any], str]:
    """Return the flow that a bound method would run, and its name.

    Raises:
        TypeError: It is not a method of ``session`` or of something of it.
    """
    if isinstance(operation, FunctionNames) and operation._session is session:
        return operation._call(args), operation._prefix[:-1]
    owner = operation if isinstance(operation, RemoteFunction) else getattr(operation, "__self__", None)
    if owner is None or (owner is not session and getattr(owner, "session", None) is not session):
        raise TypeError(f"expected a method of this session or of something of it, got {operation!r}")
    if isinstance(owner, RemoteFunction):
        return session._ops.call(owner, args), owner.name
    try:
        operation.__func__(_Recorder(owner), *args, **options)  # type: ignore[attr-defined]  # a bound method
    except _Recorded as recorded:
        if operation.__name__ == "copyfrom":
            return _then(recorded.flow, owner), recorded.what
        return recorded.flow, recorded.what
    raise TypeError(f"{operation.__name__} needs no exchange with the server; call it")


def _then(flow: Flow[Any], result: Any) -> Flow[Any]:
    yield from flow
    return result
