"""The handle table of one session: opaque numbers for things of the server.

Stock TVM's handles are addresses; a wrong one crashes its server. Ours are ``serial << 32 | tag`` with a 31-bit tag
keyed per session: a number that was never issued is told from a stale one without remembering those, and neither
reaches anything. Equal objects of a kind get equal handles and are counted, as clients expect (protocol.md 7).
"""

from __future__ import annotations

import secrets
import threading
from dataclasses import dataclass
from enum import Enum
from hashlib import blake2s
from typing import Any

from rpcnb.errors import InvalidHandle, LimitExceeded, StaleHandle
from rpcnb.values import Pointer

__all__ = ["Entry", "HandleKind", "HandleTable"]


class HandleKind(Enum):
    """What a handle names; a handle of one kind is of no use as another."""

    FUNCTION = "function"
    MODULE = "module"
    TENSOR = "tensor"
    OBJECT = "object"
    DATA = "data"
    STREAM = "stream"


@dataclass(slots=True)
class Entry:
    """A live handle: the thing, its kind, and how many references the peer owns.

    An operation that uses the thing holds it by an ordinary Python reference, so it outlives a free meanwhile.
    """

    kind: HandleKind
    thing: Any
    references: int = 1


class HandleTable:
    """Handles of one session.

    Args:
        limit: Live handles at most.
        bad_limit: Never issued handles after which :attr:`exhausted` is set.
    """

    def __init__(self, limit: int = 65536, bad_limit: int = 100) -> None:
        self._entries: dict[int, Entry] = {}
        self._by_identity: dict[tuple[HandleKind, int], int] = {}
        self._key = secrets.token_bytes(16)
        self._serial = 0
        self._lock = threading.Lock()  # the session's connections are served by several threads
        self._limit = limit
        self._bad = 0
        self._bad_limit = bad_limit
        self.entry = self._entries.get  # the hot lookup: handle -> Entry | None

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def exhausted(self) -> bool:
        """Tell whether so many invented handles came that the session should end."""
        return self._bad >= self._bad_limit

    def _tag(self, serial: int) -> int:
        digest = blake2s(serial.to_bytes(8, "little"), key=self._key, digest_size=4).digest()
        return int.from_bytes(digest, "little") & ~1

    def issue(self, kind: HandleKind, thing: Any, mark: bool = False) -> Pointer:
        """Return a handle for ``thing``, owned once more by the peer.

        ``mark`` sets its lowest bit: a function that may answer later, which rpcnb's client starts instead of calling.

        Raises:
            LimitExceeded: Too many live handles.
        """
        with self._lock:
            return self._issue(kind, thing, mark)

    def _issue(self, kind: HandleKind, thing: Any, mark: bool) -> Pointer:
        identity = (kind, id(thing))
        known = self._by_identity.get(identity)
        if known is not None:
            self._entries[known].references += 1
            return Pointer(known)
        if len(self._entries) >= self._limit:
            raise LimitExceeded(f"session holds {len(self._entries)} handles, handles={self._limit}; free some first")
        self._serial += 1
        handle = self._serial << 32 | self._tag(self._serial) | mark
        self._entries[handle] = Entry(kind, thing)
        self._by_identity[identity] = handle
        return Pointer(handle)

    def find(self, handle: int, kind: HandleKind) -> Any:
        """Return what ``handle`` names.

        Raises:
            InvalidHandle: Never issued here, or of another kind.
            StaleHandle: Freed before.
        """
        entry = self._entries.get(handle)
        if entry is None:
            raise self.unknown(handle)
        if entry.kind is not kind:
            raise InvalidHandle(f"handle {handle:#x} is a {entry.kind.value}; expected a {kind.value}")
        return entry.thing

    def unknown(self, handle: int) -> InvalidHandle:
        """Return the error for a handle that is not live, and count it if it was invented."""
        serial = handle >> 32
        if 0 < serial <= self._serial and handle & 0xFFFFFFFE == self._tag(serial):
            return StaleHandle(f"handle {handle:#x} was freed before")
        self._bad += 1
        return InvalidHandle(f"handle {handle:#x} was never issued in this session")

    def release(self, handle: int, *kinds: HandleKind) -> Entry | None:
        """Give up one reference.

        Returns:
            The entry if that was the last one, so that what it named can be freed.

        Raises:
            InvalidHandle: As :meth:`find`.
        """
        with self._lock:
            return self._release(handle, kinds)

    def _release(self, handle: int, kinds: tuple[HandleKind, ...]) -> Entry | None:
        entry = self._entries.get(handle)
        if entry is None:
            raise self.unknown(handle)
        if entry.kind not in kinds:
            names = " or ".join(kind.value for kind in kinds)
            raise InvalidHandle(f"handle {handle:#x} is a {entry.kind.value}; expected a {names}")
        entry.references -= 1
        if entry.references:
            return None
        del self._entries[handle]
        del self._by_identity[entry.kind, id(entry.thing)]
        return entry

    def clear(self) -> list[Entry]:
        """Forget everything; returns what was live."""
        entries = list(self._entries.values())
        self._entries.clear()
        self._by_identity.clear()
        return entries
