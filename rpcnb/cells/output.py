"""What a remote cell prints and shows, on its way to the client while the cell runs.

``sys.stdout`` and ``sys.stderr`` are stood in for while cells run: what the cell writes goes to its client, what other
threads write goes where it went before. Small pieces travel together, and a client that does not read holds the cell
up, so that endless output does not fill the memory.
"""

from __future__ import annotations

import base64
import contextvars
import json
import sys
import threading
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from contextlib import AbstractContextManager

__all__ = ["CellOutput", "current_output", "mime_json", "output_to"]

_TOGETHER = 0.02  # seconds for which printed text waits for more
_ENOUGH = 1 << 16  # characters that leave at once
_KEPT = 64 << 20  # characters kept where they cannot travel meanwhile (one connection, a hop); the rest is dropped
_OUTPUT: contextvars.ContextVar[CellOutput | None] = contextvars.ContextVar("rpcnb_cell_output", default=None)


def mime_json(data: dict[str, Any]) -> dict[str, Any]:
    """Return a MIME bundle as JSON can hold it: bytes (a PNG picture) as base64."""
    return {
        kind: base64.b64encode(value).decode() if isinstance(value, bytes) else value for kind, value in data.items()
    }


class Way(Protocol):
    """How output gets to the client."""

    @property
    def has_room(self) -> bool:
        """Tell whether the client keeps up."""

    def await_room(self) -> None:
        """Wait until it does."""

    def emit(self, data: bytes) -> None:
        """Send a piece; never waits."""


class CellOutput:
    """The output of one cell.

    Args:
        way: Takes pieces to the client while the cell runs; None where they cannot travel meanwhile.
        later: Calls a function after some seconds, in another thread.
        shield: Lets no interrupt of the cell strike meanwhile.
    """

    def __init__(
        self,
        way: Way | None,
        later: Callable[[float, Callable[[], object]], object],
        shield: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        self._way = way
        self._shield = shield
        self._later = later
        self._lock = threading.Lock()
        self._owner = 0  # the thread that holds the lock
        self._late: list[tuple[str, str]] = []  # what destructors print while it does
        self._stream = "stdout"
        self._text: list[str] = []
        self._size = 0
        self._armed = False
        self._kept_size = 0
        self.kept: list[dict[str, Any]] = []

    def write(self, stream: str, text: str) -> None:
        """Take printed text; waits while the client does not keep up."""
        if self._owner == threading.get_ident():
            self._late.append((stream, text))
            return
        self._await_room()
        with self._shield(), self._held():
            self._take_text(stream, text)
            if not self._armed:
                self._arm()

    def show(self, data: dict[str, Any], metadata: dict[str, Any]) -> None:
        """Take something that was displayed: a MIME bundle."""
        piece = {"display": mime_json(data), "metadata": metadata}
        try:
            piece = json.loads(json.dumps(piece, default=str))
        except (TypeError, ValueError, RecursionError) as error:
            piece = {"display": {"text/plain": f"cannot be shown: {error}"}, "metadata": {}}
        if self._owner == threading.get_ident():
            return  # a destructor's
        self._await_room()
        with self._shield(), self._held():
            self._send_text()
            self._send(piece)

    def flush(self) -> None:
        """Send what has been printed so far."""
        if self._owner != threading.get_ident():
            with self._shield(), self._held():
                self._send_text()

    @contextmanager
    def _held(self) -> Iterator[None]:
        """Hold the lock; what destructors print meanwhile, in this very thread, comes behind."""
        with self._lock:
            self._owner = threading.get_ident()
            try:
                yield
            finally:
                self._owner = 0
                while self._late:
                    self._take_text(*self._late.pop(0))

    def _take_text(self, stream: str, text: str) -> None:
        if stream != self._stream and self._text:
            self._send_text()
        self._stream = stream
        self._text.append(text)
        self._size += len(text)
        if self._size >= _ENOUGH:
            self._send_text()

    def _arm(self) -> None:
        if self._text:
            self._armed = True
            self._later(_TOGETHER, self._send_soon)

    def _send_soon(self) -> None:
        """In the loop's thread, which must not wait."""
        if not self._lock.acquire(blocking=False):
            self._later(_TOGETHER, self._send_soon)
            return
        try:
            self._armed = False
            if self._way is None or self._way.has_room:
                self._send_text()
            else:
                self._arm()
        finally:
            self._lock.release()

    def _await_room(self) -> None:
        if self._way is not None and not self._way.has_room:
            self._way.await_room()

    def _send_text(self) -> None:
        if self._text:
            text, self._text, self._size = "".join(self._text), [], 0
            self._send({"stream": self._stream, "text": text})

    def _send(self, piece: dict[str, Any]) -> None:
        data = json.dumps(piece)
        if self._way is not None:
            self._way.emit(data.encode())
        elif self._kept_size < _KEPT:
            self._kept_size += len(data)
            self.kept.append(piece)


class _Stand:
    """Stands in for one of Python's streams; everything but writing is the real one's."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.real: Any = getattr(sys, name)

    def write(self, text: str) -> int:
        output = _OUTPUT.get()
        if output is None:
            return int(self.real.write(text) or 0)
        output.write(self.name, text)
        return len(text)

    def writelines(self, lines: Any) -> None:
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        output = _OUTPUT.get()
        if output is None:
            self.real.flush()
        else:
            output.flush()

    def isatty(self) -> bool:
        return _OUTPUT.get() is None and bool(self.real.isatty())

    def __getattr__(self, name: str) -> Any:
        return getattr(self.real, name)


_lock = threading.Lock()
# For ever: `print` in another thread holds no reference to the stream that it writes to (before Python 3.14), so one
# that were taken away and freed meanwhile would crash the process.
_stands = [_Stand("stdout"), _Stand("stderr")]
_given_up: list[_Stand] = []
_uses = 0


def current_output() -> CellOutput | None:
    """Return the output of the cell that is running here."""
    return _OUTPUT.get()


@contextmanager
def output_to(output: CellOutput) -> Iterator[None]:
    """Let what is printed here go to ``output``; elsewhere nothing changes."""
    global _uses
    with _lock:
        _uses += 1
        if _uses == 1:
            for stand in _stands:
                stand.real = getattr(sys, stand.name)
                setattr(sys, stand.name, stand)
    token = _OUTPUT.set(output)
    try:
        yield
    finally:
        _OUTPUT.reset(token)
        with _lock:
            _uses -= 1
            if not _uses:
                for place, stand in enumerate(_stands):
                    if getattr(sys, stand.name) is stand:
                        setattr(sys, stand.name, stand.real)
                    else:  # somebody else's, who writes to ours: it must not become its own real one
                        _given_up.append(stand)
                        _stands[place] = _Stand(stand.name)
        output.flush()
