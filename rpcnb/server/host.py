"""What serves sessions on a loop: a server, or the process of one isolated session."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from typing import TYPE_CHECKING, Any

from rpcnb import events
from rpcnb.runtime.completion import is_ours
from rpcnb.runtime.environment import Environment
from rpcnb.runtime.tasks import spawn_on
from rpcnb.server.connection import ClientState, Connection, Draining
from rpcnb.server.lanes import Lanes
from rpcnb.server.workers import WorkerPool
from rpcnb.transport import forks
from rpcnb.transport.kernel import BUSY_AFTER, KernelLoop
from rpcnb.transport.refusals import Refusals
from rpcnb.transport.watcher import make_watcher
from rpcnb.values import StaysHere

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable

    from tornado.ioloop import IOLoop

    from rpcnb.protocol.codes import Limits
    from rpcnb.protocol.handshake import KeyText
    from rpcnb.runtime.access import Gate

__all__ = ["SessionHost"]

log = logging.getLogger(__name__)

_LOOK = 0.5  # seconds


class Tally:
    """Calls that have ended, by outcome: how many, and their seconds; from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._found: dict[str, tuple[int, float]] = {}

    def add(self, outcome: str, count: int, seconds: float) -> None:
        """Count some."""
        with self._lock:
            before = self._found.get(outcome, (0, 0.0))
            self._found[outcome] = before[0] + count, before[1] + seconds

    def take(self) -> dict[str, tuple[int, float]]:
        """Return all, and begin anew."""
        with self._lock:
            found, self._found = self._found, {}
        return found

    def copy(self) -> dict[str, tuple[int, float]]:
        """Return all so far."""
        with self._lock:
            return dict(self._found)


class SessionHost(StaysHere):
    """Connections, their sessions and what these share, on a loop.

    Args:
        key: Key of the server.
        io_loop: Where connections are served.
        gate: Decides who may enter.
        limits: What clients may ask for.
        log_level: Of the usual: who comes and goes.
        powers: Further facts of the sessions' :class:`~rpcnb.runtime.environment.Environment`.
    """

    def __init__(
        self, key: str, io_loop: IOLoop, gate: Gate, limits: Limits, log_level: int, powers: dict[str, Any]
    ) -> None:
        self.name = f"server:{key}" if key else "server"
        self.key = key
        self.io_loop = io_loop
        self.gate = gate
        self.limits = limits
        self.log_level = log_level
        self.kernel = KernelLoop.running(self._waits_for_kernel)
        self.workers = WorkerPool("rpcnb")
        self.lanes: Lanes[Connection] = Lanes()
        self.observers = events.Observers(events.observers)
        self.refusals = Refusals(log, time.monotonic)
        self.draining: dict[Connection, Draining] = {}
        self.tally = Tally()
        self._tells_calls = False
        self._connections: dict[Connection, None] = {}  # in order of arrival
        self._sessions = 0
        self._closed = False
        asyncio_loop = io_loop.asyncio_loop
        self.environment = Environment(
            limits=limits,
            spawn=lambda awaitable, done: spawn_on(asyncio_loop, awaitable, done),
            run_in_thread=self.workers.submit,
            run_in_kernel=self.kernel,
            later=self._later,
            status=self._status,
            **powers,
        )
        self._install_constructors()

    def _install_constructors(self) -> None:
        from rpcnb.server.hop import connect_constructor
        from rpcnb.server.popen import popen_constructor

        self.environment.constructors |= {"rpc.Connect": connect_constructor, "rpc.PopenSession": popen_constructor}

    # -- on the loop ---------------------------------------------------------------------------------------------

    def _begin(self) -> None:
        """Begin to look after connections."""
        self.watcher = make_watcher(self.io_loop)
        forks.tell(self)
        self.io_loop.call_later(_LOOK, self._look)

    def adopt(self, connection: Connection) -> None:
        """Take a connection that was not accepted here: dialled, or handed over."""
        self._connections[connection] = None
        self.watcher.add(connection.fd, connection.ready)

    @property
    def features(self) -> tuple[str, ...]:
        """What its sessions have besides lanes."""
        return ()

    def forget(self, connection: Connection) -> None:
        """Look after a connection no more: it is another process's."""
        if connection.deadline is not None:
            self.io_loop.remove_timeout(connection.deadline)
            connection.deadline = None
        self._connections.pop(connection, None)
        self.watcher.remove(connection.fd)

    def ended_elsewhere(self, connection: Connection, how: str) -> None:
        """Note that the session of a connection, in a process of its own, has ended."""
        for lane in self.lanes.leave(connection, how):
            lane.close()
        self._note_end(connection, how)
        if not self._closed:
            self._place_is_free(connection)

    def takes_over(self, connection: Connection) -> bool:
        """Tell whether another process serves a client that has been greeted, from now on."""
        return False

    def waits_for_place(self, go_on: Callable[[], object]) -> bool:
        """Have ``go_on`` called in a moment if a place may be free then; False: there is no hope for that."""
        return False

    def admits(self, text: str, *, proved: bool = False) -> bool:
        """Tell whether a client with this key text may enter; with ``proved`` it has proved the token."""
        return False

    def refuse_guess(self, connection: Connection) -> None:
        """Refuse a client that has no right to enter."""
        connection.refuse()

    @property
    def full(self) -> bool:
        """Tell whether there is no room for a session."""
        return False

    def is_visit(self, key: KeyText) -> bool:
        """Tell whether a client may look after jobs only, and needs no place."""
        return False

    def full_for(self, key: KeyText) -> bool:
        """Tell whether there is no room for a session of a client with this key."""
        return self.full

    @property
    def is_crowded(self) -> bool:
        """Tell whether more connections would leave none of the process's descriptors for others."""
        return False

    def why_full(self) -> str:
        """Return what to say to a client for whom there is no room."""
        return ""

    def why_refused(self) -> str:
        """Say why no plain function can be run now; empty if one can."""
        count, most = len(self.draining), self.limits.draining
        if count < most:
            return ""
        return f"{count} functions go on running here after their sessions, draining={most}; try again later"

    def opened(self, connection: Connection) -> None:
        """Note that a handshake has succeeded."""
        if connection.lane:
            return
        self._sessions += 1
        log.log(self.log_level, "%s: session of %s opened", self.name, connection.peer)
        self.tell(events.ConnectionAccepted, **connection.facts)
        self._hook("tvm.rpc.server.start")

    def closed_connection(self, connection: Connection) -> None:
        """Note that a connection is gone."""
        if self._connections.pop(connection, connection) is connection:
            return
        for lane in self.lanes.leave(connection):
            lane.close()
            connection.received += lane.received
            connection.sent += lane.sent
        if connection.servant is None or connection.refused:
            self._never_opened(connection)
            return
        if connection.lane:
            return
        self._note_end(connection)
        self._hook("tvm.rpc.server.shutdown")
        running = "" if self._closed else connection.still_runs()
        if not running:
            self._place_is_free(connection)
            return
        told = "%s: the session of %s is over, %r still runs: draining"
        log.log(self._drain_level, told, self.name, connection.peer, running)
        self.draining[connection] = Draining(running, connection.peer, time.monotonic())
        self.workers.write_off(len(self.draining))
        self._drains(connection)

    def _note_end(self, connection: Connection, how: str = "closed") -> None:
        """Note that a session has ended."""
        self._sessions -= 1
        seconds, moved = time.monotonic() - connection.since, (connection.received, connection.sent)
        self.tell(
            events.ConnectionEnded, peer=connection.peer, how=how, seconds=seconds, received=moved[0], sent=moved[1]
        )
        log.log(self.log_level, "%s: session of %s ended", self.name, connection.peer)

    def _never_opened(self, connection: Connection) -> None:
        """Note that a connection is gone that never was a session."""

    @property
    def _drain_level(self) -> int:
        """At which it is logged that something still runs."""
        return self.log_level

    def _drains(self, connection: Connection) -> None:
        """Note that a session is over, of which something still runs."""

    def _place_is_free(self, connection: Connection) -> None:
        """Note that a session has ended, and nothing of it runs any more."""

    def _look(self) -> None:
        """Look after clients whose sockets nobody reads, and after what still runs; twice a second."""
        self.refusals.sweep()
        for connection in list(self._connections):
            connection.look()
        for connection, one in list(self.draining.items()):
            if not connection.still_runs():
                seconds = time.monotonic() - one.since
                told = "%s: %r has ended, %.1f s after its session"
                log.log(self._drain_level, told, self.name, one.function, seconds)
                del self.draining[connection]
                self.workers.write_off(len(self.draining))
                self._place_is_free(connection)
        if not self._closed:
            self.io_loop.call_later(_LOOK, self._look)

    def watch_calls(self, *, each: bool) -> None:
        """Have calls of functions counted from now on, and with ``each`` told."""
        self._tells_calls |= each
        self.environment.on_call = self._note_call

    def _note_call(self, peer: str, function: str, seconds: float, outcome: str, details: dict[str, Any]) -> None:
        """Note that a call has ended; in any thread."""
        self.tally.add(outcome, 1, seconds)
        if self._tells_calls:
            facts = {"peer": peer, "function": function, "seconds": seconds, "outcome": outcome, "details": details}
            self.tell(events.FunctionEnded, **facts)

    def tell(self, kind: type[Any], **facts: Any) -> None:
        """Tell the observers, if there are any."""
        if self.observers:
            self.observers.tell(kind(source=self.name, time=time.monotonic(), **facts))

    def _later(self, seconds: float, function: Callable[[], object]) -> Callable[[], object]:
        """Call ``function`` on the loop after some seconds; from any thread. Returns what cancels that."""
        loop = self.io_loop.asyncio_loop
        timers: list[asyncio.TimerHandle] = []
        cancelled = False

        def arm() -> None:
            if not cancelled:
                timers.append(loop.call_later(seconds, lambda: None if cancelled else function()))

        def cancel() -> None:
            nonlocal cancelled
            cancelled = True
            with contextlib.suppress(RuntimeError):  # the loop has been closed
                for timer in timers:
                    loop.call_soon_threadsafe(timer.cancel)

        with contextlib.suppress(RuntimeError):
            loop.call_soon_threadsafe(arm)
        return cancel

    def _hook(self, name: str) -> None:
        entry = self.environment.registry.get(name)
        if entry is not None:
            try:
                entry.call()
            except BaseException as error:  # SystemExit would end the loop
                log.exception("%s: hook %s failed", self.name, name)
                if is_ours(error):
                    raise

    def forked(self) -> None:
        """In a child that a function has forked: clients and the loop are the parent's."""
        self._closed = True
        for connection in list(self._connections):
            connection.forked()
        self.watcher.forked()
        self.io_loop.asyncio_loop.stop()  # if it is this very thread's: it must not serve the parent's clients

    def _stop(self) -> None:
        """End all connections."""
        for connection in list(self._connections):
            connection.close()
        self.watcher.close()

    # -- for users -----------------------------------------------------------------------------------------------

    @property
    def pending(self) -> list[ClientState]:
        """What each client's session is doing: its state, the function in progress and its age, requests behind it."""
        return [
            connection.describe()
            for connection in list(self._connections)
            if connection.servant is not None and not connection.lane
        ]

    @property
    def kernel_busy(self) -> float | None:
        """Seconds for which a blocking cell has kept a function with ``run="kernel"`` waiting; None if none does."""
        since = None if self.kernel is None else self.kernel.busy_since
        return None if since is None else time.monotonic() - since

    def _waits_for_kernel(self, address: object, number: int | None) -> bool:
        """Tell whether the client at ``address`` waits for a function on the kernel's loop."""
        return any(
            connection.waits_for_kernel(number)
            for connection in list(self._connections)
            if connection.address == address
        )

    def _status(self, say: Callable[[dict[str, Any]], object]) -> None:
        """Say how the server is; where functions run on the kernel's loop, once it is known whether that is busy."""
        said = False

        def tell() -> None:
            nonlocal said
            if not said:
                said = True
                busy = self.kernel_busy
                say({"state": "READY" if busy is None else "BUSY", "kernel_busy": busy, **self.counts()})

        if self.kernel is None or self.environment.default_run != "kernel":
            tell()
        else:
            self.kernel(lambda: self.io_loop.add_callback(tell))
            self.io_loop.call_later(BUSY_AFTER + 0.05, tell)

    def counts(self) -> dict[str, Any]:
        """Return what is open, and what still runs."""
        now = time.monotonic()
        still = [{"function": one.function, "seconds": now - one.since} for one in self.draining.values()]
        return {"sessions": self.sessions, "draining": still}

    @property
    def sessions(self) -> int:
        """Sessions that are open."""
        return self._sessions

    @property
    def closed(self) -> bool:
        """Tell whether it has been closed."""
        return self._closed
