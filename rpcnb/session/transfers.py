"""Copies and files on their way: :class:`Transfer`, a :class:`~rpcnb.session.pending.Pending` that counts bytes.

::

    transfer = session.submit(tensor.copyfrom, array, progress=lambda t: print(t.moved, t.total))
    transfer.rate, transfer.seconds_left
    transfer.cancel()
    transfer.result()
"""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING, Any, NamedTuple

from rpcnb import events
from rpcnb.net import iothread
from rpcnb.session.pending import Pending, Work

if TYPE_CHECKING:
    from collections.abc import Callable

    from rpcnb.session.session import Session

__all__ = ["BULK", "Moving", "Transfer", "describe_transfer"]

BULK = 1 << 20  # bytes from which a copy travels on a lane of its own, where there are lanes
_TICK = 0.1  # seconds between two reports
_SMOOTHING = 0.3  # of the rate, per report


class Moving(NamedTuple):
    """What moves.

    Attributes:
        direction: ``up`` to the server, or ``down``.
        what: A tensor's shape and type, or a file's name.
        total: Bytes, 0 while unknown (a file that is downloaded).
    """

    direction: str
    what: str
    total: int


def describe_transfer(operation: Callable[..., Any], args: tuple[Any, ...]) -> Moving | None:
    """Say what a session's operation moves; None if it moves nothing in bulk."""
    name = getattr(operation, "__name__", "")
    owner = getattr(operation, "__self__", None)
    if name in ("numpy", "copyfrom") and hasattr(owner, "nbytes"):
        assert owner is not None
        return Moving("down" if name == "numpy" else "up", f"{owner.shape} {owner.dtype}", owner.nbytes)
    if name == "array" and args and hasattr(args[0], "nbytes"):
        return Moving("up", f"{tuple(args[0].shape)} {args[0].dtype}", args[0].nbytes)
    if name == "upload" and args:
        return _describe_upload(*args)
    if name == "download" and args:
        return Moving("down", str(args[0]), 0)
    return None


def _describe_upload(data: Any, target: str | None = None) -> Moving:
    if isinstance(data, (bytes, bytearray, memoryview)):
        return Moving("up", target or "bytes", len(data))
    path = os.fspath(data)
    return Moving("up", target or os.path.basename(path), os.path.getsize(path) if os.path.exists(path) else 0)


class Transfer(Pending):
    """Bytes on their way.

    Attributes:
        direction: ``up`` to the server, or ``down``.
        what: A tensor's shape and type, or a file's name.
        total: Bytes in all, 0 while unknown.
        rate: Bytes a second, smoothed over some reports; 0 at first.
    """

    def __init__(
        self,
        session: Session,
        work: Work,
        timeout: float | None,
        moving: Moving,
        progress: Callable[[Transfer], object] | None,
    ) -> None:
        super().__init__(session, work, timeout)
        self.direction, self.what, self.total = moving
        self.rate = 0.0
        self._progress = progress
        self._reported = -1
        self._last = (self.submitted, 0)
        self.add_done_callback(lambda _: self._report())

    def start(self) -> None:
        """Send the first request; called once, by the session."""
        self._tell(events.TransferStarted)
        super().start()
        if not self.done():
            iothread.IO_THREAD.call_at(time.monotonic() + _TICK, self._tick)

    @property
    def state(self) -> str:
        """``sent``, ``copying`` once bytes move, ``done``, ``failed`` or ``cancelled``."""
        state = super().state
        return "copying" if state == "sent" and self.moved else state

    @property
    def moved(self) -> int:
        """Bytes that have moved so far; never less than reported before, all of them once it is done."""
        if self.total and self.done() and not self.cancelled() and self.exception(0) is None:
            return self.total
        return min(super().moved, self.total) if self.total else super().moved

    @property
    def seconds_left(self) -> float | None:
        """Seconds it will take at this rate; None while nobody knows."""
        return (self.total - self.moved) / self.rate if self.rate and self.total else None

    def _tick(self) -> None:
        """In the I/O thread: report, and come again unless it is over (then the done callback reports)."""
        if self.done():
            return
        self._report()
        iothread.IO_THREAD.call_at(time.monotonic() + _TICK, self._tick)

    def _report(self) -> None:
        now, moved, done = time.monotonic(), self.moved, self.done()
        before, counted = self._last
        if now > before:
            rate = (moved - counted) / (now - before)
            self.rate = rate if not self.rate else self.rate + _SMOOTHING * (rate - self.rate)
        self._last = (now, moved)
        if not done and moved == self._reported:
            return
        self._reported = moved
        if done:
            error = None if self.cancelled() else self.exception(0)
            reason = "cancelled" if self.cancelled() else "" if error is None else str(error)
            self._tell(events.TransferFinished, error=reason)
        else:
            self._tell(events.TransferProgress)
        if self._progress is not None:
            self._progress(self)

    def _tell(self, kind: type[Any], **facts: Any) -> None:
        self.session._tell(
            kind,
            transfer=self.id,
            what=self.what,
            direction=self.direction,
            moved=self.moved,
            total=self.total,
            **facts,
        )

    def __repr__(self) -> str:
        size = f"{self.moved} of {self.total}" if self.total else f"{self.moved}"
        return f"<Transfer {self.id}: {self.direction} {self.what}, {size} bytes, {self.state}, {self.session.name}>"
