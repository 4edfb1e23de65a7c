"""A sync session's link: the caller that waits owns the socket.

Among the threads of a session one at a time is the *pump*: it polls, sends and receives for everyone, and settles
tickets as replies come. Others sleep until their ticket is settled or they are woken to be the pump. When the pump
leaves (its reply came, a deadline, an interrupt), the role passes to a sleeper, or to the I/O thread while anything
is owed. A background loop for every call would cost 2.5 to 5 times as much (performance.md 3).
"""

from __future__ import annotations

import _thread
import contextlib
import os
import select
import selectors
import time
from collections import deque
from functools import partial
from typing import TYPE_CHECKING, Any

from rpcnb.errors import DeadlineExceeded, DeadlockError
from rpcnb.link import iothread
from rpcnb.link.interrupt import TICK, Guard
from rpcnb.link.look import LookAgain
from rpcnb.link.wire import Ticket, Wire, stop_waiting
from rpcnb.protocol.shortcut import NOT_PLAIN, write_call
from rpcnb.transport import forks
from rpcnb.transport.deadline import FOREVER, NO_DEADLINE, Deadline
from rpcnb.transport.kernel import refuse_deadlock

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from rpcnb.errors import RpcError
    from rpcnb.link.dial import SessionTicket
    from rpcnb.protocol.messages import Request

__all__ = ["Link"]

_LOOK_EVERY = 1.0  # seconds
_SOON = 0.02  # seconds that waiting in the receiving call takes at most
_TOGETHER = 32  # requests that wait for a reply to leave together
_NESTED = "a signal's handler, callback or finalizer may submit() here, or use a session of its own"


class Link:
    """A sync session's way to its server over one socket.

    Args:
        wire: The connection.
    """

    quick = True  # there is a short way for plain calls

    def __init__(self, wire: Wire) -> None:
        self.wire = wire
        self.peer = wire.peer
        self.garbage = wire.garbage
        self.lane = 0  # number among its session's connections
        self.ticket: SessionTicket | None = None  # what further connections of its session present
        # Told of calls that were given up in the middle, to cancel them at the server.
        self.on_abandoned: Callable[[int, list[int]], object] | None = None
        self.on_tick: Callable[[], object] | None = None  # called ten times a second
        # Pending operations whose reply has come; resumed by whoever received it, outside the lock.
        self.ready: deque[Any] = deque()
        self._pumping = False
        self._pumper = 0  # the thread that pumps, or did last
        self._adopted = False
        self._let_go = False  # a caller has pumped meanwhile: the I/O thread need not watch a link with nothing owed
        self._sleepers: deque[_thread.LockType] = deque()
        self._wake_reader, self._wake_writer = os.pipe()
        os.set_blocking(self._wake_reader, False)
        os.set_blocking(self._wake_writer, False)
        wire.wait_in_receive()
        if wire.is_stock:
            wire.on_more = LookAgain(wire, self.soon, self.settle_in_background).more
        self._poll = select.poll()
        self._poll.register(wire.sock, select.POLLIN)
        self._poll.register(self._wake_reader, select.POLLIN)
        self._polls_write = False
        self._look_at = 0.0  # when an idle connection is looked at again
        self._keep_alive: Callable[[float], object] | None = getattr(wire.sock, "keep_alive", None)  # a WebSocket's
        forks.tell(self)

    # -- sending -----------------------------------------------------------------------------------------------

    def send(self, request: Request) -> Ticket:
        """Queue ``request``, frees of finalizers in front of it, and send what the socket takes."""
        wire = self.wire
        if wire.is_in_step():
            raise self._nested()
        with wire.lock:
            if self.garbage:
                wire.queue_garbage()
            ticket = wire.queue(request)
            blocked = not wire.flush() if len(wire.out) == 1 or not self._pumping else True
            if blocked:
                self._watch_writability()
        return ticket

    def send_soon(self, request: Request) -> Ticket:
        """Queue ``request``; while replies are owed it leaves with others, at the latest with the next reply."""
        wire = self.wire
        if wire.is_in_step():
            raise self._nested()
        with wire.lock:
            if self.garbage:
                wire.queue_garbage()
            alone = not wire.tickets
            ticket = wire.queue(request)
            if (alone or len(wire.out) >= _TOGETHER) and not wire.flush():
                self._watch_writability()
        return ticket

    def submit_call(self, packet: bytes, handle: int, operation: Any) -> None:
        """Send a plain call soon, as ``operation.ticket``; whoever receives its reply calls ``operation.resume()``."""
        wire = self.wire
        if wire.is_in_step():
            raise self._nested()
        with Guard():
            with wire.lock:
                if self.garbage:
                    wire.queue_garbage()
                alone = not wire.tickets
                ticket = operation.ticket = wire.queue_call(packet, handle)
                ticket.waker = partial(self.ready.append, operation)
                if (alone or len(wire.out) >= _TOGETHER) and not wire.flush():
                    self._watch_writability()
                adopt = not (self._pumping or self._adopted) and wire.ended is None
                if adopt:
                    self._adopted = True
            if adopt or wire.ended is not None:
                iothread.IO_THREAD.adopt(self)

    def soon(self, seconds: float, function: Callable[[], object]) -> None:
        """Call ``function`` in the I/O thread after some time."""
        iothread.IO_THREAD.call_at(time.monotonic() + seconds, function)

    def _watch_writability(self) -> None:
        """Something could not be sent at once: whoever polls must watch for writability. Lock held."""
        if self._pumping:
            self._signal()
        elif self._adopted:
            iothread.IO_THREAD.adopt(self)

    def send_calls(self, handle: int, calls: list[tuple[Any, ...]]) -> list[Ticket]:
        """Queue calls of one function, and send what the socket takes."""
        wire = self.wire
        if wire.is_in_step():
            raise self._nested()
        with wire.lock:
            wire.queue_garbage()
            tickets = wire.queue_calls(handle, calls)
            if not wire.flush():
                self._watch_writability()
        return tickets

    def _signal(self) -> None:
        with contextlib.suppress(BlockingIOError, OSError):
            os.write(self._wake_writer, b"\0")

    # -- waiting -----------------------------------------------------------------------------------------------

    def exchange(self, request: Request, deadline: Deadline, guard: Guard) -> Ticket:
        """Send ``request`` and wait for its reply; returns the settled ticket.

        Raises:
            ArgumentError: A value cannot travel; nothing was sent.
            DeadlineExceeded: The operation's time is over; the reply stays owed.
            KeyboardInterrupt: The user interrupted; likewise.
            DeadlockError: This very thread waits for another reply of this connection already.
        """
        wire = self.wire
        if wire.is_in_step():
            raise self._nested()
        self._refuse_nested_wait()
        with wire.lock:
            if self.garbage:
                wire.queue_garbage()
            ticket = wire.queue(request)
            if self._pumping:
                if len(wire.out) != 1 or not wire.flush():
                    self._signal()
                blocked = None
            else:
                self._pump_here()
                blocked = not wire.flush()
        try:
            if blocked is not None:
                self._pump(ticket, blocked, deadline, guard)
            if not ticket.done:
                self.wait(ticket, deadline, guard)
        except BaseException as error:
            if isinstance(error, DeadlineExceeded):
                error.explain(wire.behind([ticket]))
            self.abandon([ticket])
            raise
        return ticket

    def call(self, handle: int, args: tuple[Any, ...]) -> Any:
        """Make a plain call the short way, if nothing else is on the link and all arguments are plain.

        Returns:
            The plain result, or the settled ticket of any other; NOT_PLAIN when nothing has been sent and the general
            way must be taken.
        """
        packet = write_call(handle, args)
        if packet is None:
            return NOT_PLAIN
        wire = self.wire
        if wire.is_in_step():
            return NOT_PLAIN  # the general way refuses it
        with Guard() as guard:
            with wire.lock:
                if self._pumping or wire.tickets or wire.out or wire.garbage or wire.ended is not None:
                    return NOT_PLAIN
                ticket = wire.send_call(packet, handle)
                self._pump_here()
            try:
                if wire.waits is not None and not (wire.out or ticket.done):
                    value = self._receive_value(wire, next(wire.waits))
                    if value is not NOT_PLAIN:
                        return value
                self._pump(ticket, bool(wire.out), NO_DEADLINE, guard)
                if not ticket.done:
                    self.wait(ticket, NO_DEADLINE, guard)
            except BaseException:
                self.abandon([ticket])
                raise
            return ticket if ticket.value is NOT_PLAIN else ticket.value

    def _receive_value(self, wire: Wire, receive: Callable[..., int]) -> Any:
        """Wait a moment for a plain result, the commonest of all replies; NOT_PLAIN unless that was all."""
        view = wire.endpoint.get_buffer()
        try:
            count = receive(view)
        except (BlockingIOError, InterruptedError):
            return NOT_PLAIN
        except OSError as error:
            with wire.lock:
                wire.lost(error)
            return NOT_PLAIN
        except BaseException:  # a foreign signal handler's
            self._leave()
            raise
        with wire.lock:
            if wire.ended is not None:
                return NOT_PLAIN
            value = wire.take_value(view, count)
            if value is NOT_PLAIN or wire.tickets or wire.out or self._sleepers or self.ready:
                return NOT_PLAIN
            self._pumping = False
            return value

    def wait(self, ticket: Ticket, deadline: Deadline, guard: Guard) -> None:
        """Return when ``ticket`` is done.

        Raises:
            DeadlineExceeded: The operation's time is over; the reply stays owed.
            KeyboardInterrupt: The user interrupted; likewise.
            DeadlockError: This very thread waits for another reply of this connection already.
        """
        while not ticket.done:
            if self.wire.is_in_step():
                raise self._nested()
            self._refuse_nested_wait()
            with self.wire.lock:
                if ticket.done:
                    return
                gate = None
                if self._pumping or self.wire.ended is not None:  # nothing comes any more: nobody becomes a pump
                    gate = _thread.allocate_lock()
                    gate.acquire()
                    ticket.waker = lambda gate=gate: gate.locked() and gate.release()
                    self._sleepers.append(gate)
                else:
                    self._pump_here()
                    if ticket.request is None:  # of a pending operation, which may end without any reply
                        ticket.waker = self._signal
            if gate is not None:
                if self.wire.ended is not None:
                    self._resume_ready()  # an operation that learns of the end
                self._sleep(ticket, gate, deadline, guard)
            else:
                self._pump(ticket, bool(self.wire.out), deadline, guard)

    def _pump_here(self) -> None:
        """Let this thread pump from now on. Lock held."""
        self._pumping = True
        self._pumper = _thread.get_ident()
        self._let_go = self._adopted

    def _nested(self) -> DeadlockError:
        """Return what refuses a signal's handler or a finalizer that asks in the middle of a step of its own thread."""
        return DeadlockError(f"{self.peer}: this thread is in the middle of another operation; {_NESTED}")

    def _refuse_nested_wait(self) -> None:
        """Refuse to wait inside a wait: the outer one receives for everyone, and it stands still meanwhile."""
        if self._pumping and self._pumper == _thread.get_ident():
            raise DeadlockError(f"{self.peer}: this thread waits for another reply of this connection; {_NESTED}")

    def _pump(self, ticket: Ticket, blocked: bool, deadline: Deadline, guard: Guard) -> None:
        """Move bytes for everyone until ``ticket`` is done, then pass the role on."""
        wire, poll = self.wire, self._poll
        leaving = True
        try:
            if not blocked and wire.waits is not None and len(wire.tickets) == 1 and deadline.allows(_SOON):
                self._receive_reply(wire, ticket, next(wire.waits))
                blocked = bool(wire.out)
            while not ticket.done and wire.ended is None:
                if self.ready:
                    self._resume_ready()
                    with wire.lock:
                        if wire.out:  # what they have sent must not wait for the next reply, which there may not be
                            blocked = not wire.flush()
                    guard.check()
                    continue
                if blocked != self._polls_write:
                    self._polls_write = blocked
                    poll.modify(wire.sock, select.POLLIN | select.POLLOUT if blocked else select.POLLIN)
                ready = guard.poll(poll, FOREVER if deadline.at is None else deadline.left())
                if not ready and not poll.poll(0):
                    self._refuse_deadlock(ticket)
                with wire.lock:
                    for fd, events in ready:
                        if fd == self._wake_reader:
                            with contextlib.suppress(BlockingIOError):
                                os.read(fd, 4096)
                        elif events != select.POLLOUT:
                            wire.fill()
                    if wire.out:
                        blocked = not wire.flush()
                    elif ticket.done and not wire.tickets and not self._sleepers:
                        self._pumping = leaving = False  # nothing is owed and nobody waits: the common end
                        break
                    else:
                        blocked = False
                if guard.hits:
                    guard.check()
        finally:
            if leaving:  # not _pumping: another thread may have the role by now
                self._leave()
            if self.ready:
                self._resume_ready()
                self.settle_in_background()  # what they have sent: nobody pumps any more

    def _receive_reply(self, wire: Wire, ticket: Ticket, receive: Callable[..., int]) -> None:
        """Wait a moment for the only reply that is owed, in the receiving call itself; then take all of it that came.

        A poll before each receiving call costs 2 us, and on two CPUs the wake-up that trying saves.
        """
        if not wire.endpoint.idle:  # else the view may be the memory of somebody who gives it up meanwhile
            return
        view = wire.endpoint.get_buffer()
        try:
            count = receive(view)
        except (BlockingIOError, InterruptedError):
            return
        except OSError as error:
            with wire.lock:
                wire.lost(error)
            return
        with wire.lock:
            if wire.ended is None:
                wire.take(count)
                while not ticket.done and wire.ended is None and wire.fill():
                    pass

    def _refuse_deadlock(self, ticket: Ticket) -> None:
        """Refuse to wait in a notebook's kernel for this very kernel; called when nothing has come for a while."""
        if not ticket.done:
            refuse_deadlock(*ticket.owed_at(self.wire.sock))

    def _resume_ready(self) -> None:
        """Go on with pending operations whose reply has come; without the lock."""
        while self.ready:
            try:
                operation = self.ready.popleft()
            except IndexError:
                return  # another thread was quicker
            operation.resume()

    def resume_when_done(self, ticket: Ticket, operation: Any) -> bool:
        """Have ``operation.resume()`` called when ``ticket`` is done; True if it is done already."""
        with self.wire.lock:
            if ticket.done:
                return True
            ticket.waker = lambda: self.ready.append(operation)
            return False

    def _sleep(self, ticket: Ticket, gate: _thread.LockType, deadline: Deadline, guard: Guard) -> None:
        """Sleep until the ticket is settled or this thread should pump."""
        staying = False
        try:
            while not guard.wait(lambda limit: gate.acquire(timeout=limit), min(deadline.left(), TICK * 4)):
                self._refuse_deadlock(ticket)
            staying = True
        finally:
            with self.wire.lock:
                ticket.waker = None
                handed = gate not in self._sleepers  # the pump has given us its role
                if not handed:
                    self._sleepers.remove(gate)
            if handed and (ticket.done or not staying):
                self._hand_on()

    def _leave(self) -> None:
        """Give up the pump's role; someone must have it while anything is owed."""
        with self.wire.lock:
            self._pumping = False
            adopt = self._find_successor()
        if adopt:
            iothread.IO_THREAD.adopt(self)

    def _hand_on(self) -> None:
        """Pass on the pump's role that was handed to this thread, unless another has taken it meanwhile."""
        with self.wire.lock:
            adopt = not self._pumping and self._find_successor()
        if adopt:
            iothread.IO_THREAD.adopt(self)

    def _find_successor(self) -> bool:
        """Wake a sleeper to be the pump; True if there is none and the I/O thread must take over. Lock held."""
        wire = self.wire
        if not self._sleepers and not wire.tickets and not wire.out:
            return False
        if self._wake_a_sleeper() or not wire.busy or self._adopted or wire.ended is not None:
            return False
        self._adopted = True
        return True

    def _wake_a_sleeper(self) -> bool:
        while self._sleepers:
            gate = self._sleepers.popleft()
            if gate.locked():
                gate.release()
                return True
        return False

    def abandon(self, tickets: Iterable[Any]) -> None:
        """Give up an operation's tickets; what is owed is received and dropped in the background."""
        calls = stop_waiting(self.wire, tickets)
        self.settle_in_background()
        if calls and self.on_abandoned is not None:
            self.on_abandoned(self.lane, calls)

    def settle_in_background(self) -> None:
        """Have the I/O thread receive what is owed unless someone pumps already."""
        with self.wire.lock:
            adopt = self.wire.busy and not self._pumping and not self._adopted and self.wire.ended is None
            if adopt:
                self._adopted = True
            forgotten = self.ready and (not self._adopted or self.wire.ended is not None)
        if adopt or forgotten:
            iothread.IO_THREAD.adopt(self)

    # -- in the I/O thread ---------------------------------------------------------------------------------------

    def step_in_background(self) -> int:
        """Move bytes if nobody pumps; returns the selector events to wait for, 0 to let the link go."""
        events = self._step()
        if self.ready:
            self._resume_ready()
            events = events or self._step()  # what they sent
        return events

    def _step(self) -> int:
        with self.wire.lock:
            wire = self.wire
            if not (self._pumping or wire.ended is not None):
                wire.fill()
                blocked = wire.ended is None and not wire.flush()
                # It stays watched with nothing owed, so that the next submitted call needs no word to this thread.
                self._adopted = wire.ended is None and (wire.busy or not self._let_go)
            else:
                self._adopted = False
            if not self._adopted:
                self._let_go = False
                return 0
            return selectors.EVENT_READ | (selectors.EVENT_WRITE if blocked else 0)

    def housekeeping(self) -> None:
        """Look after the session, and send the frees that finalizers noted."""
        if self.on_tick is not None:
            self.on_tick()
        self._look_for_end()
        if self._keep_alive is not None and self.wire.ended is None:
            self._keep_alive(time.monotonic())
        if not self.garbage and not self.wire.out:
            return
        with self.wire.lock:
            if self._pumping:
                return  # they ride in front of its next request
            self.wire.queue_garbage()
            self.wire.flush()
        self.settle_in_background()

    def _look_for_end(self) -> None:
        """See, now and then, whether an idle connection has ended: nobody polls it, and a user should not find out."""
        now = time.monotonic()
        if now < self._look_at:
            return
        self._look_at = now + _LOOK_EVERY
        with self.wire.lock:
            if not (self._pumping or self._adopted or self.wire.tickets) and self.wire.ended is None:
                self.wire.fill()

    # -- end -----------------------------------------------------------------------------------------------------

    def fail(self, error: RpcError) -> None:
        """End the connection with ``error`` for everybody who waits."""
        with self.wire.lock:
            if self.wire.ended is None:
                self.wire.fail(error)
                self._signal()
        self._resume_ready()

    def conclude(self, error: RpcError) -> None:
        """Tell everybody who waits why the connection was lost; from any thread."""
        with self.wire.lock:
            self.wire.conclude(error)
            if self._wake_writer >= 0:
                self._signal()
        self._resume_ready()

    def close(self) -> None:
        """Say goodbye and close; idempotent, never waits."""
        with self.wire.lock:
            self.garbage.clear()
            self.wire.shutdown()
            if self._wake_writer >= 0:
                self._signal()
                if not self._pumping:
                    self._close_pipe()
        self._resume_ready()  # pending operations learn that the session is closed
        iothread.IO_THREAD.watched.discard(self)

    def forked(self) -> None:
        """In a forked child: this connection is the parent's; who waits for it learns that."""
        self._pumping = self._adopted = False
        self._sleepers.clear()
        if self._wake_writer >= 0:
            self._close_pipe()
        self.wire.forked()

    def _close_pipe(self) -> None:
        os.close(self._wake_reader)
        os.close(self._wake_writer)
        self._wake_writer = -1

    def __del__(self) -> None:
        if getattr(self, "_wake_writer", -1) >= 0:
            self._close_pipe()
