"""Who has done what at a server, as JSON lines in a file of the operator's; and the same in numbers, for Prometheus.

Both are told by the server's events. No value of a call is in them, and no token.
"""

from __future__ import annotations

import datetime
import json
import logging
import os
import threading
from collections import Counter
from dataclasses import asdict
from logging.handlers import RotatingFileHandler
from typing import TYPE_CHECKING, Any, Protocol

from rpcnb import events

if TYPE_CHECKING:
    from rpcnb.server.host import Tally

__all__ = ["Audit", "Metrics"]

log = logging.getLogger(__name__)

_BYTES, _FILES = 16 << 20, 8  # of one file, and how many older ones there are
_NAMES = {
    events.ConnectionAccepted: "opened",
    events.ConnectionEnded: "ended",
    events.ConnectionRejected: "refused",
    events.FunctionEnded: "call",
}


class _Private(RotatingFileHandler):
    """Files that only the operator can read."""

    def _open(self) -> Any:
        return open(self.baseFilename, "a", encoding="utf-8", opener=lambda path, flags: os.open(path, flags, 0o600))

    def handleError(self, record: logging.LogRecord) -> None:  # logging's name
        log.error("the audit file %s cannot be written", self.baseFilename)


class Audit:
    """Writes a server's events to a file; older ones are ``FILE.1`` to ``FILE.8``.

    Args:
        path: The file.

    Raises:
        OSError: It cannot be written.
    """

    def __init__(self, path: str) -> None:
        self._file = _Private(path, maxBytes=_BYTES, backupCount=_FILES)
        self._sessions: dict[str, int] = {}  # number of the session, by the client's address
        self._last = 0
        self._lock = threading.Lock()

    def __call__(self, event: events.Event) -> None:
        """Take an event; from any thread."""
        what = _NAMES.get(type(event))
        if what is None:
            return
        facts = asdict(event)
        peer = facts["peer"]
        with self._lock:
            if what == "opened":
                self._last += 1
                self._sessions[peer] = self._last
            number = self._sessions.pop(peer, 0) if what == "ended" else self._sessions.get(peer, 0)
        del facts["time"]
        details = facts.pop("details", {})
        now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="milliseconds")
        server = facts.pop("source")
        facts = {key: round(value, 6) if isinstance(value, float) else value for key, value in facts.items()}
        line = json.dumps({"time": now, "server": server, "event": what, "session": number, **facts, **details})
        self._file.emit(logging.makeLogRecord({"msg": line}))

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class Counted(Protocol):
    """A server, as its numbers see it."""

    tally: Tally

    @property
    def sessions(self) -> int:
        """Sessions that are open."""

    @property
    def parked(self) -> int:
        """Requests that wait for an outcome."""


class Metrics:
    """A server's numbers, as Prometheus reads them.

    Args:
        server: Whose.

    Source:
        Prometheus' exposition formats, text format 0.0.4.
    """

    def __init__(self, server: Counted) -> None:
        self._server = server
        self._sessions = 0
        self._refused: Counter[str] = Counter()
        self._received = self._sent = 0
        self._lock = threading.Lock()

    def __call__(self, event: events.Event) -> None:
        """Take an event; from any thread."""
        with self._lock:
            if isinstance(event, events.ConnectionAccepted):
                self._sessions += 1
            elif isinstance(event, events.ConnectionRejected):
                self._refused[event.reason] += 1
            elif isinstance(event, events.ConnectionEnded):
                self._received += event.received
                self._sent += event.sent

    def text(self) -> str:
        """Return them."""
        server = self._server
        calls = server.tally.copy()
        failed = sum(count for outcome, (count, _) in calls.items() if outcome not in ("ok", "cancelled"))
        with self._lock:
            refused = dict(self._refused)
            lines = [
                *_metric("sessions", "gauge", "Sessions that are open.", {"": server.sessions}),
                *_metric("sessions_opened_total", "counter", "Sessions so far.", {"": self._sessions}),
                *_metric("calls_total", "counter", "Calls that have ended.", _labelled("outcome", calls, 0)),
                *_metric("calls_seconds_total", "counter", "Seconds of these.", _labelled("outcome", calls, 1)),
                *_metric("errors_total", "counter", "Calls that have failed.", {"": failed}),
                *_metric(
                    "bytes_total",
                    "counter",
                    "Bytes of the sessions that are over.",
                    {'direction="received"': self._received, 'direction="sent"': self._sent},
                ),
                *_metric("parked", "gauge", "Requests that wait for an outcome.", {"": server.parked}),
                *_metric(
                    "refused_total",
                    "counter",
                    "Clients that were refused.",
                    {f"reason={json.dumps(reason)}": count for reason, count in refused.items()} or {"": 0},
                ),
            ]
        return "\n".join(lines) + "\n"


def _labelled(label: str, found: dict[str, tuple[int, float]], place: int) -> dict[str, float]:
    return {f"{label}={json.dumps(name)}": values[place] for name, values in found.items()} or {"": 0}


def _metric(name: str, kind: str, text: str, values: dict[str, float]) -> list[str]:
    head = [f"# HELP rpcnb_{name} {text}", f"# TYPE rpcnb_{name} {kind}"]
    return [*head, *(f"rpcnb_{name}{f'{{{label}}}' if label else ''} {value:g}" for label, value in values.items())]
