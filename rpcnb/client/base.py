"""What :class:`Session` and :class:`AsyncSession` share: identity, devices, releasing, display."""

from __future__ import annotations

import importlib
import itertools
import logging
import sys
import threading
import time
import weakref
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

from rpcnb import events, parts
from rpcnb.client.life import Life
from rpcnb.client.names import FunctionNames
from rpcnb.client.operations import Operations
from rpcnb.errors import LocalProtocolError, SessionClosed, SessionLost, SessionTimeout
from rpcnb.link.hosts import shows_as_own
from rpcnb.link.inquiry import Inquiry
from rpcnb.protocol.endpoint import State
from rpcnb.transport import forks
from rpcnb.transport.turn import Turn
from rpcnb.values import StaysHere
from rpcnb.values import device as as_device

if TYPE_CHECKING:
    from rpcnb.link.dial import SessionTicket
    from rpcnb.link.dialer import Dialer
    from rpcnb.protocol.handshake import KeyText

__all__ = ["SessionBase", "all_sessions"]

log = logging.getLogger(__name__)

_numbers = itertools.count(1)
_sessions: weakref.WeakSet[SessionBase] = weakref.WeakSet()


def all_sessions() -> list[SessionBase]:
    """Return the sessions of this process that are held by somebody, oldest first; closed ones too."""
    return sorted(_sessions.copy(), key=lambda session: session.number)


class Traffic(NamedTuple):
    """What a session's connections have carried.

    Attributes:
        requests: Requests sent.
        sent: Bytes sent, as the sockets count them.
        received: Bytes received, likewise.
    """

    requests: int
    sent: int
    received: int


class SessionBase(StaysHere):
    """A session's identity and everything that needs no exchange.

    Attributes:
        name: ``session-1``; in messages and panels.
        peer: Address of the server.
        timeout: Seconds that every operation may take unless it names its own; None for ever.
        observers: Who is told of the session's events.
        peak_bytes: Largest ``held_bytes`` so far.
        number: Of the session in this process, from 1.
        expires: ``time.monotonic()`` at which the server ends the session, or None.
    """

    _instead = "open another session there, with rpcnb.connect(...)"
    _types: tuple[Any, Any, Any, Any, Any]
    _ops: Operations  # of the connection in use: taken once by each operation, as the session may be opened again

    def __init__(
        self,
        link: Any,
        key: str,
        answer: KeyText,
        timeout: float | None = None,
        dialer: Dialer | None = None,
        lost_after: float | None = None,
    ) -> None:
        self.number = next(_numbers)
        self.name = f"session-{self.number}"
        self.peer: str = link.peer
        self.timeout = timeout
        self._key = key
        self._dialer = dialer
        self._lost_after = lost_after
        self.observers = events.Observers(events.observers)
        self._trusts_output = True if dialer is None else dialer.trust_output
        self.peak_bytes = 0
        self._pending: dict[int, Any] = {}  # operations that have not finished, by number
        self._before = Traffic(0, 0, 0)  # of connections before the session was opened again
        self._reopening = Turn()
        self._one_attaches = threading.RLock()
        self._closes = 0  # how often it has been closed: not to be attached to what was dialled before that
        self._attach(link, answer)
        _sessions.add(self)
        forks.tell(self)

    @property
    def trust_output(self) -> bool:
        """Whether what its cells put out is shown as this kernel's own: HTML and JavaScript then run as the user.

        So it is of the own demo board, of the own kernel's server, and where ``connect(trust_output=True)`` or the file
        of hosts says so; it may be set.
        """
        if self._trusts_output is None:
            assert self._dialer is not None
            self._trusts_output = not self._dialer.patient and shows_as_own(self._dialer.address)
        return self._trusts_output

    @trust_output.setter
    def trust_output(self, trusted: bool) -> None:
        self._trusts_output = trusted

    def _attach(self, link: Any, answer: KeyText) -> None:
        """Begin to use a connection that has just been opened."""
        self.peer = link.peer  # another board, perhaps, when a tracker is asked again
        self._told_end = False
        limit = 0.0 if self._dialer is None else self._dialer.key.session_timeout
        self.expires = time.monotonic() + limit if limit else None
        self._held = 0  # bytes of tensors allocated and not freed
        self._tensors = 0  # how many those are
        self._life = Life(self._lost_after)
        ticket = None if self._dialer is None else link.ticket
        lanes = self._make_lanes(ticket) if ticket else None
        if lanes is not None:
            link.on_abandoned = lanes.cancel_at
        ops = Operations(self, self._types, link, lanes, answer)
        ops.through_stock = not ops.is_rpcnb and self._dialer is not None and self._dialer.hops
        if self._dialer is not None and ticket and "isolated" in (answer.features or ()):
            inquiry = Inquiry(self._dialer.address, ticket, partial(_call_owed, weakref.ref(ops)))
            link.wire.inquire = partial(inquiry.ask, link)
            if lanes is not None:
                lanes.inquiry = inquiry
        self._ops = ops
        link.on_tick = partial(_look, weakref.ref(self))

    @property
    def _link(self) -> Any:
        """The connection in use."""
        return self._ops.link

    @property
    def _lanes(self) -> Any:
        """Its further connections, or None."""
        return self._ops.lanes

    def forked(self) -> None:
        """In a forked child: what was pending is the parent's, and locks may be held by threads that are not here."""
        self._reopening, self._one_attaches = Turn(), threading.RLock()
        for pending in list(self._pending.values()):
            pending.forked()
        self._pending.clear()

    def _make_lanes(self, ticket: SessionTicket) -> Any:
        """Return what opens the session's lanes."""
        raise NotImplementedError

    def _detach(self) -> None:
        """Give up the connections before the session is opened again; what is pending learns of it."""
        if self._dialer is None:
            raise LocalProtocolError("this session has no address to connect to")
        self._before = self.traffic
        error = SessionLost(f"{self.name} was opened again; nothing is repeated by itself")
        self._link.wire.inquire = None
        if self._lanes is not None:
            self._lanes.fail(error)
        self._link.fail(error)
        self._link.close()

    @property
    def has_jobs(self) -> bool:
        """Tell whether the server runs detached jobs: each of its sessions has a process of its own."""
        return "isolated" in (self._ops.key.features or ())

    @property
    def key(self) -> str:
        """The match key with which it was opened."""
        return self._key

    @property
    def server_key(self) -> str:
        """The key that the server says it serves."""
        return self._ops.key.key

    @property
    def is_rpcnb(self) -> bool:
        """Tell whether the server is rpcnb; else it is stock TVM."""
        return self._ops.is_rpcnb

    @property
    def state(self) -> str:
        """``ready``, ``busy``, ``draining``, ``unresponsive``, ``lost`` or ``closed``.

        ``draining``: replies to abandoned requests are owed. ``unresponsive``: the server owes something and has been
        silent for 40 s; calls go on waiting.
        """
        wire = self._link.wire
        if self._told_end:
            return "closed"
        if wire.ended is None and self._life.silent:
            return "unresponsive"
        if wire.ended is not None:
            return "closed" if isinstance(wire.ended, SessionClosed) else "lost"
        tickets = [*wire.owed, *(self._lanes.owed() if self._lanes is not None else ())]
        if not tickets:
            return "ready" if wire.endpoint.state is not State.CLOSED else "lost"
        return "draining" if all(ticket.abandoned for ticket in tickets) else "busy"

    @property
    def ended_by(self) -> BaseException | None:
        """What ended the session, if it was not ``close()``."""
        error = self._link.wire.ended
        return None if isinstance(error, SessionClosed) else error

    @property
    def timed_out(self) -> bool:
        """Tell whether the server's time limit ended the session."""
        return isinstance(self._link.wire.ended, SessionTimeout)

    @property
    def fn(self) -> Any:
        """Remote functions as attributes: ``session.fn.demo.add(1, 2)``."""
        return FunctionNames(self)

    def _tell(self, kind: type[Any], **facts: Any) -> None:
        """Tell the observers, if there are any."""
        if self.observers:
            self.observers.tell(kind(source=self.name, time=time.monotonic(), **facts))

    def _count_memory(self, nbytes: int) -> None:
        """Note that a tensor was allocated (or freed: negative)."""
        self._held += nbytes
        self._tensors += (nbytes > 0) - (nbytes < 0)
        if nbytes > 0:
            self.peak_bytes = max(self.peak_bytes, self._held)
        if self.observers and nbytes:
            kind = events.MemoryAllocated if nbytes > 0 else events.MemoryFreed
            self._tell(kind, nbytes=abs(nbytes), held=self._held)

    @property
    def allocations(self) -> int:
        """Tensors with data that this session has allocated and not freed."""
        return self._tensors

    @property
    def held_bytes(self) -> int:
        """Bytes of the server's memory that tensors of this session hold."""
        return self._held

    @property
    def traffic(self) -> Traffic:
        """What all its connections have carried so far, also those that are closed."""
        wires = [self._link.wire, *(self._lanes.wires if self._lanes is not None else ())]
        before = self._before
        return Traffic(
            before.requests + sum(wire.requests for wire in wires),
            before.sent + sum(wire.bytes_sent for wire in wires),
            before.received + sum(wire.bytes_received for wire in wires),
        )

    @property
    def can_reconnect(self) -> bool:
        """Tell whether :meth:`reconnect` has an address to open the session at."""
        return self._dialer is not None

    def panel(self) -> Any:
        """Return a live view of this session and its operations, for a notebook."""
        return parts.find("panel")("transfers", "pending", "sessions", session=self)

    def _user_of(self, thing: Any) -> Any:
        """Return a submitted operation that still needs a remote function, or None."""
        return None

    # -- devices -------------------------------------------------------------------------------------------------

    @property
    def _sess(self) -> Any:
        """Itself: TVM's scripts look there for ``CloseRPCConnection``."""
        return self

    def tvm(self) -> Any:
        """Open TVM's own ``tvm.rpc.RPCSession`` with the same server, for what wants TVM's types.

        It is a session of its own, as any client's: what this one holds is not there, and a board that serves one
        session at a time has no room for it; a tracker is asked for another board. Needs apache-tvm here.

        Raises:
            LocalProtocolError: TVM is not installed here, or its client cannot reach such a server (a WebSocket).
        """
        from rpcnb.client.stock import open_stock

        return open_stock(self._dialer)

    def device(self, kind: str | int, index: int = 0) -> Any:
        """Return a device of the server: ``session.device("cuda", 1)``, ``"cuda:1"`` or DLPack's number.

        Raises:
            ValueError: No such device name.
        """
        found = as_device(kind, index)
        return self._ops.device_type(self, found.type, found.index)

    def cpu(self, index: int = 0) -> Any:
        """Return the server's CPU."""
        return self.device("cpu", index)

    def cuda(self, index: int = 0) -> Any:
        """Return a CUDA GPU of the server."""
        return self.device("cuda", index)

    def cl(self, index: int = 0) -> Any:
        """Return an OpenCL device of the server."""
        return self.device("opencl", index)

    def vulkan(self, index: int = 0) -> Any:
        """Return a Vulkan device of the server."""
        return self.device("vulkan", index)

    def metal(self, index: int = 0) -> Any:
        """Return a Metal device of the server."""
        return self.device("metal", index)

    def rocm(self, index: int = 0) -> Any:
        """Return a ROCm GPU of the server."""
        return self.device("rocm", index)

    def ext_dev(self, index: int = 0) -> Any:
        """Return an extension device of the server."""
        return self.device("ext_dev", index)

    def hexagon(self, index: int = 0) -> Any:
        """Return a Hexagon device of the server."""
        return self.device("hexagon", index)

    def webgpu(self, index: int = 0) -> Any:
        """Return a WebGPU device of the server."""
        return self.device("webgpu", index)

    def _opened(self) -> None:
        if "numpy" in sys.modules:  # copies will come: a process that runs out of descriptors cannot import any more
            importlib.import_module("rpcnb.runtime.arrays")
        self._tell(events.SessionOpened, peer=self.peer, key=self.server_key)

    def _closing(self) -> None:
        """Tell of the end, and of what was still allocated."""
        if self._link.wire.ended is None and self._held:
            log.debug("%s closes with %d tensors, %d bytes, allocated", self.name, self._tensors, self._held)
        with self._one_attaches:
            self._closes += 1
        if not self._told_end:
            self._told_end = True
            reason = self._link.wire.ended
            self._tell(events.SessionClosed, peer=self.peer, reason="" if reason is None else str(reason))

    def __repr__(self) -> str:
        kind = "rpcnb" if self.is_rpcnb else "stock TVM"
        key = f", key {self.server_key!r}" if self.server_key else ""
        return f"<{type(self).__name__} {self.name}: {self.peer}{key}, {kind}, {self.state}>"


def _call_owed(operations: weakref.ref[Operations]) -> str:
    """Name the call that has been owed for longest; empty if none is."""
    ops = operations()
    if ops is None:
        return ""
    owed = [*ops.link.wire.tickets, *(() if ops.lanes is None else ops.lanes.owed())]
    return next(filter(None, (ops.name_of(one.called) for one in owed)), "")


def _look(session: weakref.ref[SessionBase]) -> None:
    """Look after a session, unless it has been dropped."""
    found = session()
    if found is not None:
        found._life.look(found)
