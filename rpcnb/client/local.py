"""A session with this process: the same API without a socket."""

from __future__ import annotations

import queue
import threading
from collections import deque
from typing import TYPE_CHECKING, Any

from rpcnb.client.session import Session
from rpcnb.errors import RpcError
from rpcnb.link.interrupt import TICK
from rpcnb.link.wire import Ticket, Wire, stop_waiting
from rpcnb.protocol import flows
from rpcnb.protocol.codes import Role
from rpcnb.protocol.endpoint import Endpoint
from rpcnb.protocol.handshake import EXTENSION, KeyText
from rpcnb.protocol.messages import CallFunc
from rpcnb.protocol.shortcut import NOT_PLAIN
from rpcnb.runtime.environment import Environment
from rpcnb.runtime.eventdriven import create_event_driven_server
from rpcnb.transport import forks

if TYPE_CHECKING:
    from rpcnb.link.interrupt import Guard
    from rpcnb.protocol.messages import Request
    from rpcnb.protocol.sequence import Buffer
    from rpcnb.transport.deadline import Deadline

__all__ = ["LocalSession"]


class _Pipe:
    """Stands in the socket's place: what the client sends goes to the event handler's thread."""

    def __init__(self, inbox: queue.SimpleQueue[bytes | None]) -> None:
        self._inbox = inbox

    def send(self, data: Buffer, flags: int = 0) -> int:
        self._inbox.put(bytes(data))
        return len(data)

    def sendmsg(self, buffers: list[Buffer], ancillary: tuple[Any, ...] = (), flags: int = 0) -> int:
        return self.send(b"".join(buffers))

    def recv_into(self, view: memoryview, nbytes: int = 0, flags: int = 0) -> int:
        raise BlockingIOError

    def detach(self) -> int:
        return -1

    def close(self) -> None:
        self._inbox.put(None)


class _LocalLink:
    """The way to an event handler in a thread of its own, so that any wait can be interrupted."""

    quick = False  # there is no short way for plain calls

    def __init__(self, environment: Environment) -> None:
        self._inbox: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self.peer = "this process"
        self.wire = Wire(_Pipe(self._inbox), Endpoint(Role.CLIENT), self.peer)  # type: ignore[arg-type]  # a socket's stand-in
        self.garbage = self.wire.garbage
        self._ready: deque[Any] = deque()
        self._handler = create_event_driven_server(self._deliver, "local", "client:", environment=environment)
        self._handler.servant.extended = True
        self._thread = threading.Thread(target=self._serve, name="rpcnb-local", daemon=True)
        self._thread.start()
        forks.tell(self)

    def forked(self) -> None:
        """In a forked child, where the handler's thread is not: let it learn that."""
        self._inbox = queue.SimpleQueue()
        self.wire.forked()

    def _serve(self) -> None:
        while (data := self._inbox.get()) is not None:
            self._handler(data, 3)
        self._handler.servant.cancel()

    def _deliver(self, data: Buffer) -> int:
        with self.wire.lock:
            if self.wire.ended is None:
                self.wire.endpoint.receive_data(data)
                self.wire.settle()
        self._resume_ready()
        return len(data)

    def _resume_ready(self) -> None:
        while self._ready:
            self._ready.popleft().resume()

    def resume_when_done(self, ticket: Ticket, operation: Any) -> bool:
        with self.wire.lock:
            if ticket.done:
                return True
            ticket.waker = lambda: self._ready.append(operation)
            return False

    def settle_in_background(self) -> None:
        """Nothing is to be done: the handler's thread delivers."""

    def send(self, request: Request) -> Ticket:
        with self.wire.lock:
            self.wire.queue_garbage()
            ticket = self.wire.queue(request)
            self.wire.flush()
        return ticket

    send_soon = send

    def call(self, handle: int, args: tuple[Any, ...]) -> Any:
        return NOT_PLAIN  # there is no short way

    def exchange(self, request: Request, deadline: Deadline, guard: Guard) -> Ticket:
        ticket = self.send(request)
        try:
            self.wait(ticket, deadline, guard)
        except BaseException:
            self.abandon([ticket])
            raise
        return ticket

    def send_calls(self, handle: int, calls: list[tuple[Any, ...]]) -> list[Ticket]:
        tickets = [self.send(CallFunc(handle, args)) for args in calls]
        for ticket in tickets:
            ticket.value = NOT_PLAIN
        return tickets

    def wait(self, ticket: Ticket, deadline: Deadline, guard: Guard) -> None:
        gate = threading.Lock()
        gate.acquire()
        with self.wire.lock:
            if ticket.done:
                return
            ticket.waker = gate.release
        while not guard.wait(lambda limit: gate.acquire(timeout=limit), min(deadline.left(), TICK)):
            pass

    def abandon(self, tickets: list[Any]) -> None:
        stop_waiting(self.wire, tickets)

    def housekeeping(self) -> None:
        if self.garbage:
            with self.wire.lock:
                self.wire.queue_garbage()
                self.wire.flush()

    def close(self) -> None:
        with self.wire.lock:
            self.garbage.clear()
            self.wire.shutdown()
        self._resume_ready()


class LocalSession(Session):
    """A session with the functions, modules and memory of this process.

    Args:
        native: Let it load compiled libraries; it is this process's own user who asks.
    """

    def __init__(self, *, native: bool = True) -> None:
        link = _LocalLink(Environment(native=native))
        super().__init__(link, "", KeyText("server", "", {"-rpcnb": EXTENSION}))
        try:
            self._run(lambda _: flows.initialize(), None, "init")
        except RpcError:
            self.close()
            raise
