"""Feeds the panels: one thread per kernel, while a panel is open.

It takes events where they arrive, under a lock, looks at the living objects at most ten times a second, and gives
every panel what has changed. It never asks the kernel's loop, which stands still during a blocking cell. Per panel at
most 20 KiB a second leave (docs/design.md 10): a panel with much to tell tells it less often. The last state is
always sent.
"""

from __future__ import annotations

import json
import logging
import threading
import time
from typing import TYPE_CHECKING, Any, Protocol

from rpcnb import events
from rpcnb.client import jobs
from rpcnb.client.base import all_sessions
from rpcnb.client.session import Session
from rpcnb.errors import RpcError
from rpcnb.farm.devices import device_rows
from rpcnb.farm.dialer import known_trackers, places_in_queues
from rpcnb.farm.trackersession import TrackerSession
from rpcnb.jupyter.facts import Scope, collect, jobs_of
from rpcnb.jupyter.models import PanelModel
from rpcnb.transport.address import show_address

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["BRIDGE", "Bridge", "View"]

log = logging.getLogger(__name__)

_TICK = 0.1  # seconds between two looks
_RATE = 20 << 10  # bytes a second and panel
_BURST = 8 << 10  # bytes that a quiet panel may send at once
_OVERHEAD = 1024  # bytes of a message besides the snapshot: headers, signature
_ALIVE = 4.0  # seconds after which an unchanged snapshot is sent again: a view that hears nothing knows the kernel gone
_ASK_TRACKERS = 1.0  # seconds
_ASK_RUNNING, _ASK_IDLE = 2.0, 20.0  # seconds between two questions for jobs
_PATIENCE = 2.0


class View(Protocol):
    """What shows snapshots."""

    scope: Scope

    def show(self, snapshot: dict[str, Any]) -> bool:
        """Show this; False if nobody looks any more."""

    def tick(self, now: float) -> None:
        """Take note of the time, ``time.monotonic()``."""


class _Feed:
    """One view: what it has been shown, and what it may send."""

    def __init__(self, view: View) -> None:
        self.view = view
        self.budget = float(_BURST)
        self.shown: dict[str, Any] | None = None
        self._at = self._sent_at = time.monotonic()

    def offer(self, snapshot: dict[str, Any], now: float) -> bool:
        """Show a snapshot if it is new and there is room; False if nobody looks any more."""
        self.budget = min(_BURST, self.budget + (now - self._at) * _RATE)
        self._at = now
        if self.budget < 0 or (snapshot == self.shown and now - self._sent_at < _ALIVE):
            return True
        self._sent_at = now
        self.shown = snapshot
        self.budget -= _OVERHEAD + len(json.dumps(snapshot, default=str))
        return self.view.show({**snapshot, "now": time.time()})


class Bridge:
    """Feeds views; one per kernel."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._feeds: list[_Feed] = []
        self._thread: threading.Thread | None = None
        self._wake = threading.Event()
        self._model = PanelModel(time.time() - time.monotonic())
        self._unsubscribe: Callable[[], None] | None = None
        self._devices: list[dict[str, Any]] = []
        self._jobs: list[dict[str, Any]] = []
        self._asking = False
        self._trackers_at = self._jobs_at = 0.0
        self._changes = -1

    def add(self, view: View) -> None:
        """Feed a view until it says that nobody looks, or :meth:`remove`."""
        with self._lock:
            self._feeds = [*(feed for feed in self._feeds if feed.view is not view), _Feed(view)]
            if self._thread is None:
                self._unsubscribe = events.observers.subscribe(self._take)
                self._thread = threading.Thread(target=self._run, name="rpcnb-panels", daemon=True)
                self._thread.start()
        self._wake.set()

    def remove(self, view: View) -> None:
        """Feed it no more."""
        with self._lock:
            self._feeds = [feed for feed in self._feeds if feed.view is not view]
        self._wake.set()

    def snapshot(self, scope: Scope) -> dict[str, Any]:
        """Return what a view of this scope would show now."""
        with self._lock:
            devices, found = self._devices, self._jobs
        facts = collect(scope, self._model.epoch, devices, found)
        with self._lock:
            return self._model.snapshot(facts)

    def dismiss(self, transfer: int) -> None:
        """Take a transfer that has ended away."""
        with self._lock:
            self._model.dismiss(transfer)

    def _take(self, event: events.Event) -> None:
        with self._lock:
            self._model.update(event)

    def _run(self) -> None:
        while True:
            self._wake.wait(_TICK)
            self._wake.clear()
            with self._lock:
                feeds = list(self._feeds)
                if not feeds:
                    self._thread = None
                    if self._unsubscribe is not None:
                        self._unsubscribe()
                    return
            try:
                self._feed(feeds)
            except Exception:  # an object that changes under our eyes: look again
                log.debug("a look at the sessions failed", exc_info=True)
            time.sleep(_TICK / 4)

    def _feed(self, feeds: list[_Feed]) -> None:
        now = time.monotonic()
        self._ask_others(now)
        with self._lock:
            self._model.fades(now)
        for feed in feeds:
            if not feed.offer(self.snapshot(feed.view.scope), now):
                self.remove(feed.view)
            feed.view.tick(now)

    # -- what has to be asked ----------------------------------------------------------------------------------------

    def _ask_others(self, now: float) -> None:
        """Have trackers and servers asked in a thread of its own: they may not answer."""
        if self._asking:
            return
        trackers, servers = known_trackers(), _with_jobs()
        asks_trackers = now >= self._trackers_at and bool(trackers or self._devices)
        asks_servers = (now >= self._jobs_at or self._changes != jobs.changes()) and bool(servers or self._jobs)
        if not asks_trackers and not asks_servers:
            return
        self._asking = True

        def ask() -> None:
            try:
                self._ask(asks_trackers, asks_servers)
            finally:
                self._asking = False

        threading.Thread(target=ask, name="rpcnb-devices", daemon=True).start()

    def _ask(self, trackers: bool, servers: bool) -> None:
        now = time.monotonic()
        if trackers:
            self._trackers_at = now + _ASK_TRACKERS
            devices = [row for tracker in known_trackers() for row in _devices_of(tracker)]
            with self._lock:
                self._devices = devices
        if servers:
            self._changes = jobs.changes()
            found = [row for session in _with_jobs() for row in jobs_of(session, _PATIENCE)]
            runs = any(row["state"] == "running" for row in found)
            self._jobs_at = now + (_ASK_RUNNING if runs else _ASK_IDLE)
            with self._lock:
                self._jobs = found

    def ask_now(self) -> None:
        """Ask the known trackers for boards and servers for jobs, and wait for their answers (two seconds each)."""
        self._ask(True, True)


def _with_jobs() -> list[Session]:
    """Return the sessions whose servers may have detached jobs; one a server."""
    found = {one.peer: one for one in all_sessions() if isinstance(one, Session) and one.has_jobs}
    return [one for one in found.values() if one.state != "closed"]


def _devices_of(address: Any) -> list[dict[str, Any]]:
    """Return the rows of one tracker: its boards, and where this process waits for one."""
    where = show_address(address.host, address.port)
    rows: list[dict[str, Any]] = []
    try:
        summary = TrackerSession(address).summary(timeout=_PATIENCE)
    except (RpcError, OSError) as error:
        return [{"tracker": where, "state": "no answer", "error": str(error)}]
    for board, key, state, since, holder, limit in device_rows(summary):
        row = {"tracker": where, "board": board, "key": key, "state": state}
        rows.append({**row, "since": since, "holder": holder, "limit": limit})
    for tracker, key, place, length in places_in_queues():
        if tracker == where:
            told = f"place {place} of {length}" if place else "no place told"
            rows.append({"tracker": where, "key": key, "state": "you wait", "holder": told})
    return rows


BRIDGE = Bridge()
