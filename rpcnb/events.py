"""Facts told to observers.

::

    unsubscribe = session.observers.subscribe(print)      # or server.observers, or rpcnb.events.observers for all
    ...
    unsubscribe()

The core states what has happened; it does not know who listens, and a listener cannot break a call: one that raises
is logged and removed. Observers are called in the thread where the fact came about, and must be quick. Nobody
listening costs one look at a list.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

    Observer = Callable[["Event"], object]

__all__ = [
    "CallCancelled",
    "CallFailed",
    "CallFinished",
    "CallSent",
    "ConnectionAccepted",
    "ConnectionEnded",
    "ConnectionRejected",
    "Event",
    "FunctionEnded",
    "MemoryAllocated",
    "MemoryFreed",
    "Observers",
    "RequestCompleted",
    "RequestParked",
    "SessionClosed",
    "SessionOpened",
    "TransferFinished",
    "TransferProgress",
    "TransferStarted",
    "observers",
]

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """Something that happened.

    Attributes:
        source: Name of the session or server.
        time: ``time.monotonic()`` of this process.
    """

    source: str
    time: float


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionOpened(Event):
    """A client's session was opened with ``peer``, serving ``key``."""

    peer: str
    key: str


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionClosed(Event):
    """A client's session ended; ``reason`` is empty if its user closed it."""

    peer: str
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionStateChanged(Event):
    """A client's session went from state ``before`` to ``state``; looked at ten times a second."""

    peer: str
    state: str
    before: str


@dataclass(frozen=True, slots=True, kw_only=True)
class _Call(Event):
    call: int
    function: str


@dataclass(frozen=True, slots=True, kw_only=True)
class CallSent(_Call):
    """An operation is on its way."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CallQueued(_Call):
    """An operation was submitted; it may have to wait for others that name the same things."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CallRunning(_Call):
    """An rpcnb server has begun a call that may answer later."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CallFinished(_Call):
    """An operation ended well after ``seconds``."""

    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class CallFailed(_Call):
    """An operation ended with ``error`` after ``seconds``."""

    seconds: float
    error: str


@dataclass(frozen=True, slots=True, kw_only=True)
class CallCancelled(_Call):
    """An operation was given up after ``seconds``: cancelled, interrupted, or its time was over."""

    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class _Transfer(Event):
    transfer: int
    what: str
    direction: str
    moved: int
    total: int


@dataclass(frozen=True, slots=True, kw_only=True)
class TransferStarted(_Transfer):
    """Bytes begin to move ``up`` or ``down``."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TransferProgress(_Transfer):
    """``moved`` of ``total`` bytes have moved; at most ten a second."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TransferFinished(_Transfer):
    """A transfer ended; ``error`` is empty if it ended well."""

    error: str


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryAllocated(Event):
    """A session holds ``nbytes`` more of its server's memory, ``held`` in all."""

    nbytes: int
    held: int


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryFreed(Event):
    """A session holds ``nbytes`` less of its server's memory, ``held`` in all."""

    nbytes: int
    held: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ConnectionAccepted(Event):
    """A server has let a client in: a session, no lanes.

    Attributes:
        peer: Address of the client.
        key: What it has named.
        entry: How it has shown its right: ``proof``, ``token`` (in clear), ``match key`` of a tracker, ``open`` to all.
        encrypted: It speaks TLS.
        certificate: Fingerprint of the certificate that it has shown; empty for none.
    """

    peer: str
    key: str = ""
    entry: str = "open"
    encrypted: bool = False
    certificate: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class ConnectionEnded(Event):
    """A session of a server is over.

    Attributes:
        peer: Address of the client.
        how: ``closed``; or how its process has ended, as of :class:`~rpcnb.SessionCrashed`.
        seconds: For which it was there.
        received: Bytes of the client, on the session's connections.
        sent: Bytes to it.
    """

    peer: str
    how: str
    seconds: float
    received: int
    sent: int


@dataclass(frozen=True, slots=True, kw_only=True)
class FunctionEnded(Event):
    """A client's call of a server's function has ended; told by servers that keep a record (``audit=``).

    Attributes:
        peer: Address of the client.
        function: Its name.
        seconds: That it took.
        outcome: ``ok``, ``cancelled``, or the type of its error.
        details: What it was about: name and SHA-256 of a file that was uploaded, or of a cell's source; no values.
    """

    peer: str
    function: str
    seconds: float
    outcome: str
    details: dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class ConnectionRejected(Event):
    """A server refused the client ``peer``."""

    peer: str
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestParked(Event):
    """A server waits for the completion of what ``peer`` asked: ``function``."""

    peer: str
    function: str


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestCompleted(Event):
    """A parked request got its reply after ``seconds``."""

    peer: str
    function: str
    seconds: float


class Observers:
    """Who listens to one source.

    Args:
        parent: Observers that are told too.
    """

    __slots__ = ("_list", "_parent")

    def __init__(self, parent: Observers | None = None) -> None:
        self._list: tuple[Observer, ...] = ()
        self._parent = parent

    def __bool__(self) -> bool:
        return bool(self._list) or (self._parent is not None and bool(self._parent._list))

    def subscribe(self, observer: Observer) -> Callable[[], None]:
        """Tell ``observer`` of every event from now on; returns what ends that."""
        self._list = (*self._list, observer)

        def unsubscribe() -> None:
            self._list = tuple(one for one in self._list if one is not observer)

        return unsubscribe

    def tell(self, event: Event) -> None:
        """Tell everybody of ``event``; one who raises is logged and removed."""
        for observer in self._list:
            try:
                observer(event)
            except (Exception, SystemExit):  # noqa: PERF203  # one's trouble is not another's, nor the end of a loop
                log.exception("an observer failed on %s and is removed", type(event).__name__)
                self._list = tuple(one for one in self._list if one is not observer)
        if self._parent is not None:
            self._parent.tell(event)


observers = Observers()
