"""What a panel shows, as plain data: facts are folded in, and a snapshot comes out.

No Jupyter and no sockets here. :meth:`PanelModel.update` takes events; :meth:`PanelModel.snapshot` takes the rows that
``rpcnb.jupyter.facts`` has read off the living objects, adds what only events tell (latencies, how transfers ended),
and returns JSON. Times are seconds since the epoch, so that the browser counts ages by itself and an unchanged state
makes an unchanged snapshot.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import Any

from rpcnb import events

__all__ = ["MOST_ROWS", "Facts", "PanelModel", "cut"]

MOST_ROWS = 50  # per section; the rest is a count (docs/design.md 10)
_LATENCIES = 16
_FADES = 2.0  # seconds for which a finished transfer is still shown
_BRIEF = 0.3  # seconds: who was quicker is not shown after its end
_MOST_FAILED = 8
_LONGEST = 200  # letters of a text
# What operations are called that are no calls of the user's functions: their latencies are not shown.
_NOT_CALLS = {
    "attribute",
    "cell",
    "copy",
    "copy_from",
    "copy_to",
    "create_stream",
    "download",
    "empty",
    "free_stream",
    "get_function",
    "import_module",
    "init",
    "job",
    "jobs",
    "link",
    "list_cells",
    "list_functions",
    "list_variables",
    "listdir",
    "load_module",
    "map",
    "numpy",
    "remove",
    "set_stream",
    "status",
    "sync",
    "system_lib",
    "time_evaluator",
    "upload",
    "variable",
}


@dataclass
class Facts:
    """The rows of all sections at one moment, as read off the living objects."""

    transfers: list[dict[str, Any]] = field(default_factory=list)
    pending: list[dict[str, Any]] = field(default_factory=list)
    jobs: list[dict[str, Any]] = field(default_factory=list)
    sessions: list[dict[str, Any]] = field(default_factory=list)
    devices: list[dict[str, Any]] = field(default_factory=list)
    servers: list[dict[str, Any]] = field(default_factory=list)


class PanelModel:
    """Folds events into what no object remembers.

    Args:
        epoch: Seconds since the epoch at ``time.monotonic() == 0``.
    """

    def __init__(self, epoch: float) -> None:
        self.epoch = epoch
        self._latencies: dict[str, deque[float]] = {}
        self._started: dict[int, float] = {}
        self._ended: dict[int, dict[str, Any]] = {}

    def update(self, event: events.Event) -> bool:
        """Take an event; returns whether the panel has something new to show."""
        if isinstance(event, events.CallFinished):
            if event.call in self._started or event.function.split(" ")[0] in _NOT_CALLS:
                return True  # a copy, or a look-up
            self._latencies.setdefault(event.source, deque(maxlen=_LATENCIES)).append(event.seconds)
        elif isinstance(event, events.TransferStarted):
            self._started[event.transfer] = event.time
        elif isinstance(event, events.TransferFinished):
            self._transfer_ended(event)
        elif isinstance(event, events.SessionClosed):
            self._latencies.pop(event.source, None)
        elif isinstance(event, (events.CallSent, events.TransferProgress)):
            return False
        return True

    def _transfer_ended(self, event: events.TransferFinished) -> None:
        began = self._started.get(event.transfer, event.time)
        while len(self._started) > MOST_ROWS * 4:
            del self._started[next(iter(self._started))]
        if not event.error and event.time - began < _BRIEF:
            return
        self._ended[event.transfer] = {
            "id": event.transfer,
            "way": event.direction,
            "what": cut(event.what),
            "session": event.source,
            "moved": event.moved,
            "total": event.total,
            "state": event.error and (event.error if event.error == "cancelled" else "failed"),
            "ended": self.epoch + event.time,
            **({"error": cut(event.error)} if event.error not in ("", "cancelled") else {}),
        }
        failed = [number for number, row in self._ended.items() if row["state"]]
        for number in failed[:-_MOST_FAILED]:
            del self._ended[number]

    def dismiss(self, transfer: int) -> None:
        """Forget a transfer that has ended."""
        self._ended.pop(transfer, None)

    def fades(self, now: float) -> bool:
        """Tell whether a finished transfer is still to be taken away; ``now`` is ``time.monotonic()``."""
        self._ended = {
            number: row
            for number, row in self._ended.items()
            if row["state"] or self.epoch + now - row["ended"] < _FADES
        }
        return any(not row["state"] for row in self._ended.values())

    def snapshot(self, facts: Facts) -> dict[str, Any]:
        """Return what a panel shows now.

        Sections have ``rows`` and ``more``, the number of rows beyond :data:`MOST_ROWS`.
        """
        live = {row["id"] for row in facts.transfers}
        ended = [{**row, "state": row["state"] or "done"} for row in self._ended.values() if row["id"] not in live]
        sessions = [{**row, "latencies": self._of(row["name"])} for row in facts.sessions]
        return {
            "transfers": _capped([*facts.transfers, *ended]),
            "pending": _capped(facts.pending),
            "jobs": _capped(facts.jobs),
            "sessions": _capped(sessions),
            "devices": _capped(facts.devices),
            "servers": _capped(facts.servers),
        }

    def _of(self, session: str) -> list[float]:
        """Return the last latencies in milliseconds, with three digits."""
        return [float(f"{seconds * 1000:.3g}") for seconds in self._latencies.get(session, ())]


def cut(text: str) -> str:
    """Return a text that is not too long for a row: it may come from a server."""
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}…"


def _capped(rows: list[dict[str, Any]]) -> dict[str, Any]:
    return {"rows": rows[:MOST_ROWS], "more": max(0, len(rows) - MOST_ROWS)}
