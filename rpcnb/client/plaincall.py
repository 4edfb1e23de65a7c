"""Submitted calls with plain arguments, the commonest, at a fifth of the cost of the general way.

No flow, no order to keep (nothing is named), no time limit and no observers: a packet, a ticket, and the future.
Whatever is not that plain is a :class:`~rpcnb.client.pending.Pending` made by ``Session.submit``; users see no
difference.
"""

from __future__ import annotations

import threading
import time
from concurrent.futures import CancelledError
from concurrent.futures._base import FINISHED, RUNNING
from typing import TYPE_CHECKING, Any

from rpcnb.client.pending import Pending, fresh
from rpcnb.client.watch import new_number
from rpcnb.protocol import flows
from rpcnb.protocol.shortcut import NOT_PLAIN
from rpcnb.transport.deadline import NO_DEADLINE

if TYPE_CHECKING:
    import socket

    from rpcnb.client.owner import Owner
    from rpcnb.client.remote import RemoteFunction
    from rpcnb.link.wire import Ticket

__all__ = ["PlainCall"]


class PlainCall(Pending):
    """A call on its way; made by :meth:`RemoteFunction.submit`."""

    ticket: Ticket  # set by the link before anything can arrive
    finished = None
    deadline = None
    runs_cell = False
    _limit = NO_DEADLINE
    _timer = None
    _watch = None
    _hold = None
    _before = 0
    _moved = 0
    _tickets = ()  # type: ignore[assignment]  # its one ticket moves no bulk data
    _owed = ()  # type: ignore[assignment]  # likewise

    def __init__(self, session: Owner, function: RemoteFunction, packet: bytes) -> None:
        # Not the base's: its condition takes longer than the rest, and is made when somebody asks for it.
        self._made: threading.Condition | None = None
        self._state = RUNNING
        self._result: Any = None
        self._exception: BaseException | None = None
        self._waiters: list[Any] = []
        self._done_callbacks: list[Any] = []
        self.id = new_number()
        self.session = session
        self.function = function.name
        self.keeps = function
        self.submitted = time.monotonic()
        self._settled = False
        self._waiting = []
        self._lock = threading.RLock()
        self._ops = function.ops
        self._link = function.ops.link
        session._pending[self.id] = self
        try:
            self._link.submit_call(packet, function.handle, self)
        except BaseException:
            del session._pending[self.id]
            raise

    @property
    def _condition(self) -> threading.Condition:  # type: ignore[override]  # the base has an attribute
        with self._link.wire.lock:
            if self._made is None:
                self._made = threading.Condition()
            return self._made

    def _new_condition(self) -> None:
        self._made = None

    def done(self) -> bool:
        """Tell whether it has ended."""
        return self._state != RUNNING  # an attribute: no lock is needed to look

    def result(self, timeout: float | None = None) -> Any:
        """Wait for the result and return it; as :meth:`Pending.result`."""
        self._block(timeout)
        if self._state != FINISHED:
            raise CancelledError
        if self._exception is not None:
            raise fresh(self._exception)
        return self._result

    def owed_at(self) -> tuple[socket.socket | None, int | None]:
        """Return the session's connection: replies come in order."""
        return self._link.wire.sock, None

    def resume(self) -> None:
        """Take the reply; called by whoever received it, outside the lock."""
        with self._lock:
            if self._settled:
                return
            ticket = self.ticket
            result, error = ticket.value, None
            ticket.taken = True
            if result is NOT_PLAIN:
                try:
                    result = self._ops.wrap(flows.call_result(flows.result_of(ticket.result())))
                except Exception as failure:
                    result, error = None, failure
            self._finish(result, error)

    def _finish(self, result: Any, error: BaseException | None) -> None:
        self.finished = time.monotonic()
        self.keeps = None
        self.session._pending.pop(self.id, None)
        with self._link.wire.lock:
            asked = self._made is not None
            if not asked and not isinstance(error, CancelledError):
                self._result, self._exception = result, error
                self._state = FINISHED
            self._settled = True
            waiting = self._waiting
            if waiting and not asked:
                self._wake()
        if isinstance(error, CancelledError):
            self._become_cancelled()
        elif asked:
            if error is None:
                self.set_result(result)
            else:
                self.set_exception(error)
        if waiting and asked:
            with self._link.wire.lock:
                self._wake()

    def _wake(self) -> None:
        for ticket in self._waiting:
            ticket.done = True
            if ticket.waker is not None:
                ticket.waker()

    def _abandon(self) -> None:
        self._link.abandon([self.ticket])
