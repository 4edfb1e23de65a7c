"""Copies and files on their way: :class:`Transfer`, a :class:`~rpcnb.client.pending.Pending` that counts bytes.

::

    transfer = session.submit(tensor.copyfrom, array, progress=lambda t: print(t.moved, t.total))
    transfer.rate, transfer.seconds_left
    transfer.cancel()
    transfer.result()
"""

from __future__ import annotations

import contextvars
import threading
import time
from typing import TYPE_CHECKING, Any

from rpcnb import events, parts
from rpcnb.client.pending import Pending, Work
from rpcnb.link import iothread

if TYPE_CHECKING:
    from collections.abc import Callable

    from rpcnb.client.moving import Moving
    from rpcnb.client.owner import Owner

__all__ = ["Measured", "Transfer"]

_SMOOTHING = 0.3  # of the rate, per report


class Measured:
    """Bytes on their way, counted, with their rate; tells the observers and the user's callback.

    Attributes:
        direction: ``up`` to the server, or ``down``.
        what: A tensor's shape and type, or a file's name.
        rate: Bytes a second, smoothed over some reports; 0 at first.
    """

    TICK = 0.1  # seconds between two reports
    id: int
    session: Any
    submitted: float

    def _measure(self, moving: Moving, progress: Callable[[Any], object] | None) -> None:
        self.direction, self.what, self._moving = moving.direction, moving.what, moving
        self.rate = 0.0
        self._progress = progress
        self._context = contextvars.copy_context()  # what it prints goes to the cell that gave it
        self._reported = -1
        self._last = (self.submitted, 0)

    @property
    def total(self) -> int:
        """Bytes in all, 0 while unknown."""
        return self._moving.total

    def _outcome(self) -> str | None:
        """Return None while it goes on, an empty text if it ended well, else why it ended."""
        raise NotImplementedError

    def _count(self) -> int:
        """Return the bytes counted so far."""
        raise NotImplementedError

    @property
    def moved(self) -> int:
        """Bytes that have moved so far; never less than reported before, all of them once it is done."""
        if self.total and self._outcome() == "":
            return self.total
        return min(self._count(), self.total) if self.total else self._count()

    @property
    def seconds_left(self) -> float | None:
        """Seconds it will take at this rate; None while nobody knows."""
        return (self.total - self.moved) / self.rate if self.rate and self.total else None

    def _report_start(self) -> None:
        self._tell_observers(events.TransferStarted)

    def _report(self) -> None:
        now, moved, outcome = time.monotonic(), self.moved, self._outcome()
        before, counted = self._last
        if now > before:
            rate = (moved - counted) / (now - before)
            self.rate = rate if not self.rate else self.rate + _SMOOTHING * (rate - self.rate)
        self._last = (now, moved)
        if outcome is None and moved == self._reported:
            return
        self._reported = moved
        if outcome is None:
            self._tell_observers(events.TransferProgress)
        else:
            self._tell_observers(events.TransferFinished, error=outcome)
        if self._progress is not None:
            self._context.run(self._progress, self)

    def _tell_observers(self, kind: type[Any], **facts: Any) -> None:
        self.session._tell(
            kind,
            transfer=self.id,
            what=self.what,
            direction=self.direction,
            moved=self.moved,
            total=self.total,
            **facts,
        )


class Transfer(Measured, Pending):
    """Bytes on their way, submitted or waited for.

    Attributes:
        told: Set after the last report.
    """

    def __init__(
        self,
        session: Owner,
        work: Work,
        timeout: float | None,
        moving: Moving,
        progress: Callable[[Transfer], object] | None,
    ) -> None:
        Pending.__init__(self, session, work, timeout)
        self._measure(moving, progress)
        self.told = threading.Event()
        self.add_done_callback(lambda _: self._report_end())

    def start(self) -> None:
        """Send the first request; called once, by the session."""
        self._report_start()
        super().start()
        if not self.done():
            iothread.IO_THREAD.call_at(time.monotonic() + self.TICK, self._tick)

    def adopt(self, *begun: Any) -> None:
        """Go on with a flow that its caller has begun; called instead of :meth:`start`."""
        self._report_start()
        super().adopt(*begun)
        if not self.done():
            iothread.IO_THREAD.call_at(time.monotonic() + self.TICK, self._tick)

    @property
    def state(self) -> str:
        """As :attr:`Pending.state`, and ``copying`` once bytes move."""
        state = super().state
        return "copying" if state == "sent" and self.moved else state

    @property
    def total(self) -> int:
        """Bytes in all, 0 while unknown."""
        return self._moving.total

    def _outcome(self) -> str | None:
        if not self.done():
            return None
        if self.cancelled():
            return "cancelled"
        error = self.exception(0)
        return "" if error is None else str(error)

    def _count(self) -> int:
        return self._bytes_moved()

    def panel(self) -> Any:
        """Return a live view of this transfer, for a notebook."""
        return parts.find("panel")("transfers", pending=self)

    def _report_end(self) -> None:
        try:
            self._report()
        finally:
            self.told.set()

    def _tick(self) -> None:
        """In the I/O thread: report, and come again unless it is over (then the done callback reports)."""
        if self.done():
            return
        self._report()
        iothread.IO_THREAD.call_at(time.monotonic() + self.TICK, self._tick)

    def __repr__(self) -> str:
        size = f"{self.moved} of {self.total}" if self.total else f"{self.moved}"
        return f"<Transfer {self.id}: {self.direction} {self.what}, {size} bytes, {self.state}, {self.session.name}>"
