"""The event-driven server on a tornado loop.

::

    @rpcnb.register_func("demo.add")
    def add(a, b):
        return a + b

    with rpcnb.Server(port=0) as server:
        rpcnb.connect(server.address).get_function("demo.add")(1, 2)

Any number of clients at once; silent, slow, broken or hostile ones leave the others untouched. ``async def`` and
callback functions run on the server's loop and may answer later; plain functions run in workers. A long C call that
holds the GIL stalls every server in its process: ``isolate=True`` gives each session one of its own.
"""

from __future__ import annotations

import hmac
import logging
import os
import time
import weakref
from collections import deque
from typing import TYPE_CHECKING, Any

from rpcnb import parts
from rpcnb.errors import AccessDenied
from rpcnb.protocol.codes import Limits
from rpcnb.protocol.secret import Secret
from rpcnb.runtime.access import Gate, Guesses, check_token, new_token
from rpcnb.runtime.libraries import load_at_start
from rpcnb.runtime.tvmruntime import NEVER
from rpcnb.server.audit import Audit, Metrics
from rpcnb.server.connection import ClientState, Connection
from rpcnb.server.host import SessionHost
from rpcnb.server.isolated import IsolatedSessions
from rpcnb.server.isolation import Isolation
from rpcnb.server.jobs import Jobs
from rpcnb.server.processes import Processes
from rpcnb.transport import interval
from rpcnb.transport.address import is_loopback, parse_address, show_address, tracker_pair
from rpcnb.transport.halfopen import HalfOpen, within_descriptors
from rpcnb.transport.listen import Acceptor, listen
from rpcnb.transport.loopthread import LoopThread, call_in_loop
from rpcnb.transport.tls import ServerTls
from rpcnb.transport.tlsfiles import Tls

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable, Sequence
    from types import TracebackType

    from tornado.ioloop import IOLoop

    from rpcnb.cells.runners import Runner
    from rpcnb.protocol.handshake import KeyText
    from rpcnb.runtime.registry import Registry

__all__ = ["Server", "all_servers"]

log = logging.getLogger(__name__)

_LOOK = 0.5  # seconds
_SHORTEST = 22  # characters of a token that others than this machine may try: 128 bits
_LATE = 8  # clients of one address that wait for being refused; of more the first is told at once
_MOST_VISITS = 8  # sessions at once that need no place: they only look after jobs
_MOST_CONNECTIONS = 1 << 20  # at once

_servers: weakref.WeakSet[Server] = weakref.WeakSet()


def all_servers() -> list[Server]:
    """Return the servers of this process that are open, in no order."""
    return [server for server in _servers.copy() if not server.closed]


class Server(SessionHost):
    """An RPC server; it listens when the constructor returns.

    Args:
        host: Address to listen on. Beyond loopback a token is always needed; one is made if none is given.
        port: First port to try; 0 for any free one.
        port_end: Ports up to this one, exclusive, are tried when ``port`` is taken.
        is_proxy: ``host`` and ``port`` are those of a proxy: nothing listens here, the server dials out and keeps a
            connection waiting there.
        tracker_addr: Host and port (a pair, or ``"host:port"``) of a tracker that hands this server out, one session at
            a time (``max_sessions`` may say more). Clients then come with the match keys it gives them, not with
            ``key``.
        key: Key that clients must name.
        load_library: Libraries to load at start: paths, or TVM's text with ``:`` between them. What they register
            with apache-tvm-ffi may be called.
        custom_addr: Address that others should use to reach this server; shown in what is to be pasted.
        silent: Log at level DEBUG instead of INFO.
        no_fork: TVM's keyword; processes of sessions are ``isolate``.
        server_init_callback: Called once before the server listens.
        reuse_addr: TVM's keyword; the address is always reusable after an earlier server's end.
        token: Text that clients must present; None: none on loopback, a fresh one beyond; False: none at all.
        session: Makes the session that serves a client, instead of ``LocalServingSession``.
        max_sessions: Sessions at once; None for any number.
        limits: What clients may ask for.
        allow_native: Let clients load and link compiled libraries although there is no token.
        expose_ffi: Let clients call every global function of apache-tvm-ffi.
        trusted_paths: Let file names leave a session's directory, as in stock TVM.
        insecure: Allow to listen beyond loopback without a token.
        run: Where plain functions run unless their registration says otherwise: ``thread``, ``loop``, or ``kernel``
            (the event loop in which the server was made; ``thread`` if there was none).
        registry: Functions to serve; the global registry by default.
        ffi_names: Globals of apache-tvm-ffi that clients may call besides the harmless ones.
        loop: A running tornado IOLoop to live on; by default one in a daemon thread of its own.
        web_port: Listen for WebSockets too, at path ``/ws`` of this port; 0 for any free one.
        allow_origin: Host names under which browsers and hubs may reach the WebSocket, besides numbers and our own.
        trust_tracker: A match key that the tracker (or proxy) hands out is enough; else a client needs the token too.
        allow_exec: Let clients run Python source here: full trust. True runs it in a thread; or a
            :class:`~rpcnb.cells.runners.Runner`.
        isolate: Serve each session in a process of its own: a crash, or a function that never ends, costs that session
            alone. In a script, under ``if __name__ == "__main__":``, as each process imports the script for its
            functions; not in a notebook. :class:`rpcnb.Isolation` says more: modules, limits.
        runtime: TVM's runtime, which Relax models and its GPU drivers need: ``"auto"`` loads that of an installed
            apache-tvm at the start, a path that file; ``"none"`` never. By default when a library needs it.
        tls: Speak TLS on ``port``: True with a certificate of this user's own, which is made at the first time and
            known by its fingerprint; :class:`rpcnb.Tls` names others.
        plain_port: With ``tls``: listen without it too, on this port, for peers that know no TLS (TVM's); 0 for any
            free one.
        audit: File in which each session, call, upload and refusal is noted, as JSON lines without values.
        switch_interval: Seconds after which a thread that computes in Python lets the server go on, for the process and
            as long as the server is open; None leaves Python's 5 ms. With 0.0003 calls take less than 0.5 ms beside a
            busy main thread, which pays for each of them with a hand-over.

    Attributes:
        host: Where it listens (or the proxy is).
        port: Likewise; the real one.
        web_port: Likewise, of WebSockets; None if there is none.
        plain_port: Likewise, without TLS beside ``port`` with it.
        token: What clients must present, or None.
        observers: Who is told of its events.

    Raises:
        OSError: No port of the range is free.
        AccessDenied: Beyond loopback without a token, or source of clients who have none, without ``insecure``.
    """

    def __init__(
        self,
        host: str = "127.0.0.1",
        port: int = 9090,
        port_end: int = 9199,
        is_proxy: bool = False,
        tracker_addr: tuple[str, int] | str | None = None,
        key: str = "",
        load_library: str | Sequence[str] | None = None,
        custom_addr: str | None = None,
        silent: bool = False,
        no_fork: bool = True,
        server_init_callback: Callable[[], object] | None = None,
        reuse_addr: bool = True,
        *,
        token: str | bool | None = None,
        session: Callable[..., Any] | None = None,
        max_sessions: int | None = None,
        limits: Limits | None = None,
        allow_native: bool = False,
        expose_ffi: bool = False,
        trusted_paths: bool = False,
        insecure: bool = False,
        run: str = "thread",
        registry: Registry | None = None,
        ffi_names: frozenset[str] = frozenset(),
        loop: IOLoop | None = None,
        web_port: int | None = None,
        allow_origin: Sequence[str] = (),
        trust_tracker: bool = False,
        allow_exec: bool | Runner = False,
        isolate: bool | Isolation = False,
        switch_interval: float | None = None,
        runtime: str | None = None,
        tls: bool | Tls = False,
        plain_port: int | None = None,
        audit: str | None = None,
    ) -> None:
        if switch_interval is not None and switch_interval <= 0:
            raise ValueError(f"expected a switch interval of more than 0 s, got {switch_interval}")
        if not key.isprintable() or any(letter.isspace() for letter in key):
            raise ValueError(f"expected a key without white space, got {key!r}")
        self.custom_addr = custom_addr
        if tls and (is_proxy or (tracker_addr and plain_port is None)):
            raise ValueError(
                "tls= is for clients that dial here; who comes through a tracker speaks without it: plain_port=PORT"
            )
        if plain_port is not None and not tls:
            raise ValueError("plain_port= is for a server with tls=; without it port is plain")
        if is_proxy:
            tracker_addr = None  # the proxy registers it; TVM's takes the address too, and does nothing with it
        self._proxy = parse_address(host, port) if is_proxy else None
        token = Secret(token) if isinstance(token, str) else token
        self.token = self._choose_token(host if self._proxy is None else self._proxy.host, token, insecure)
        if allow_exec and (self.token is None or trust_tracker) and not insecure:
            raise AccessDenied(
                "without a token anybody here could run code as this user; insecure=True (--insecure) allows that"
            )
        # With a tracker or a proxy one session at a time, as in TVM: whoever got the board has it alone.
        self.max_sessions = 1 if max_sessions is None and (tracker_addr or is_proxy) else max_sessions
        if trust_tracker and not (tracker_addr or is_proxy):
            raise ValueError("trust_tracker=True needs a tracker (tracker_addr=) or a proxy (is_proxy=True)")
        limits = limits or Limits()
        gate = Gate(
            key,
            self.token,
            tracked=bool(tracker_addr),
            trusts_tracker=trust_tracker,
        )
        powers: dict[str, Any] = {
            "native": bool(self.token) or allow_native,
            "expose_ffi": expose_ffi,
            "trusted_paths": trusted_paths,
            "default_run": run,
            "local_session": session,
            "runtime": runtime or "",
        }
        if runtime not in (None, NEVER) and not powers["native"]:
            raise AccessDenied("TVM's runtime runs native code for clients: give a token, or allow_native=True")
        if registry is not None:
            powers["registry"] = registry
        if allow_exec and not isolate:
            from rpcnb.cells.cells import Cells
            from rpcnb.cells.runners import Worker

            powers["cells"] = Cells(Worker() if allow_exec is True else allow_exec)
        self._own_loop = LoopThread("rpcnb-server") if loop is None else None
        io_loop: IOLoop = loop if loop is not None else self._own_loop.io_loop  # type: ignore[union-attr]  # one is set
        super().__init__(key, io_loop, gate, limits, logging.DEBUG if silent else logging.INFO, powers)
        watched: bool | None = None  # each call is told, or they are counted, or neither
        self._audit: Audit | None = None
        self.metrics: Metrics | None = None
        if audit is not None or web_port is not None:
            watched = audit is not None
            self.watch_calls(each=watched)
        self._guesses = Guesses(time.monotonic, self.limits.auth_failures)
        self._late: dict[str, deque[Connection]] = {}
        self._half_open: HalfOpen[Connection] = HalfOpen(
            lambda connection: connection.close(),
            self.limits.half_open,
            self.limits.half_open_per_address,
            self.limits.exempt_loopback,
        )
        self._listeners: list[socket.socket] = []
        self._plain_listeners: list[socket.socket] = []
        self._acceptors: list[Acceptor] = []
        self._tls: ServerTls | None = None
        self._web: Any = None
        self._registration: Any = None
        self._dial_out: Any = None
        self._processes: Processes | None = None
        self._isolated: IsolatedSessions | None = None
        self._jobs: Jobs | None = None
        try:
            self.environment.ffi_names = ffi_names
            libraries = load_library.split(":") if isinstance(load_library, str) else [*(load_library or ())]
            if isolate:
                if registry is not None or session is not None:
                    raise ValueError("isolate=True: registry= and session= stay in this process; see rpcnb.Isolation")
                given = Isolation(main=True) if isolate is True else isolate
                options = given.options(self, bool(allow_exec), libraries, switch_interval, watched)
                self._processes = Processes(self.name, self.io_loop, options)
                whose = self.token or f"no token, key {key}"
                self._jobs = Jobs(self._processes, whose, self.io_loop, limits, self._job_ended)
                self._isolated = IsolatedSessions(self, self._processes, self._jobs, self.max_sessions)
            else:
                load_at_start(self.environment, libraries)
            if audit is not None:
                self._audit = Audit(audit)
                self.observers.subscribe(self._audit)
            if server_init_callback is not None:
                server_init_callback()
            if tls:
                self._tls = ServerTls(self.io_loop, Tls() if tls is True else tls, self._tls_failed)
            if not is_proxy:
                self._listeners = listen(host, port, port_end)
            if plain_port is not None:
                self._plain_listeners = listen(host, plain_port, plain_port + 1)
            self.host, self.port = (
                (self._proxy.host, self._proxy.port)
                if self._proxy is not None
                else (host, int(self._listeners[0].getsockname()[1]))
            )
            tracker = None if tracker_addr is None else tracker_pair(tracker_addr)
            call_in_loop(self.io_loop, lambda: self._start(web_port, allow_origin, tracker))
        except BaseException:
            for listener in (*self._listeners, *self._plain_listeners):
                listener.close()
            if self._processes is not None:
                self._processes.close()
                self._processes.wait()
            if self._own_loop is not None:
                self._own_loop.stop()
            raise
        _servers.add(self)
        self._switch_interval = switch_interval
        if switch_interval is not None:
            interval.hold(switch_interval)
        log.log(self.log_level, "%s %s %s", self.name, "dials" if is_proxy else "listens on", self.address)

    @staticmethod
    def _choose_token(host: str, token: str | bool | None, insecure: bool) -> str | None:
        if isinstance(token, str):
            if len(token) < _SHORTEST and not (is_loopback(host) or insecure):
                raise AccessDenied(
                    f"a token of {len(token)} characters can be guessed; expected {_SHORTEST} or more: leave it out, "
                    "and one is made"
                )
            return check_token(token)
        if is_loopback(host):
            return new_token() if token else None
        if token is False:
            if not insecure:
                raise AccessDenied(
                    f"a server on {host} without a token is open to everybody; insecure=True (--insecure) allows it"
                )
            return None
        return new_token()

    # -- on the loop ---------------------------------------------------------------------------------------------

    def _start(
        self,
        web_port: int | None,
        allow_origin: Sequence[str],
        tracker: tuple[str, int] | None,
    ) -> None:
        self._begin()
        if self._processes is not None:
            self._processes.listen()
        if web_port is not None:
            self._open_web(web_port, allow_origin)
        admit = self._admit if self._tls is None else self._admit_encrypted
        self._acceptors = [
            Acceptor(self.io_loop, listeners, self.name, function, self._half_open.drop_oldest)
            for listeners, function in ((self._listeners, admit), (self._plain_listeners, self._admit))
        ]
        if tracker is not None:
            port = self.port if self.plain_port is None else self.plain_port
            self._registration = parts.find("registration")(self, tracker, port, self.max_sessions or 1)
        if self._proxy is not None:
            self._dial_out = parts.find("dial out")(self, self._proxy)

    def _admit(self, sock: socket.socket, address: tuple[Any, ...]) -> None:
        try:
            connection = Connection(self, sock, address)
        except OSError:
            sock.close()
            return
        host = str(address[0])
        if not self._half_open.admits(host):
            self.refusals.note(host, f"{self.name}: refused {connection.peer}: too many unfinished handshakes")
            connection.closed = True
            sock.close()
            return
        self._half_open.add(connection, host)
        self._connections[connection] = None
        self.watcher.add(connection.fd, connection.ready)
        connection.deadline = self.io_loop.call_later(self.limits.handshake_timeout, self._handshake_over, connection)

    def _admit_encrypted(self, sock: socket.socket, address: tuple[Any, ...]) -> None:
        assert self._tls is not None
        try:
            plain = self._tls.wrap(sock, address)
        except OSError:
            return
        self._admit(plain, address)

    def _tls_failed(self, address: tuple[Any, ...], why: str) -> None:
        """Note that a client has not come through the TLS handshake."""
        self.refusals.note(str(address[0]), f"{self.name}: refused {address[0]}:{address[1]}: no TLS ({why})")

    def _open_web(self, port: int, allow_origin: Sequence[str]) -> None:
        from rpcnb.server.web import WebPort

        names = [*allow_origin, *([self.custom_addr] if self.custom_addr else [])]
        host = self.host if self._proxy is None else "127.0.0.1"
        self.metrics = Metrics(self)
        self.observers.subscribe(self.metrics)
        self.watch_calls(each=False)
        self._web = WebPort(
            host, port, self._admit, names, (), self.name, self.limits, self.refusals, self._tell_metrics
        )

    def _tell_metrics(self, token: str, host: str) -> tuple[str | None, float]:
        """Return the numbers for whoever knows the token; None for others, and the seconds after which they hear so."""
        assert self.metrics is not None
        if self.token and not hmac.compare_digest(token.encode(), self.token.encode()):
            exempt = self.limits.exempt_loopback and is_loopback(host)
            return None, 0.0 if exempt else self._guesses.note(host)
        return self.metrics.text(), 0.0

    def _handshake_over(self, connection: Connection) -> None:
        if connection.servant is None or connection.refused:
            log.debug("%s: %s did not finish its handshake in time", self.name, connection.peer)
            connection.close()

    def admits(self, text: str, *, proved: bool = False) -> bool:
        """Tell whether a client with this key text may enter; with ``proved`` it has proved the token."""
        if self._jobs is not None and self._jobs.any and self.gate.lets_visit(text, proved=proved):
            return True
        return self.gate.admits(text, proved=proved)

    def is_visit(self, key: KeyText) -> bool:
        """Tell whether a client may look after jobs only, and needs no place."""
        return self.gate.is_visit(key)

    def refuse_guess(self, connection: Connection) -> None:
        """Refuse a client that has no right to enter: the later, the more often its address has tried."""
        host = str(connection.address[0]) if connection.address else ""
        exempt = not host or (self.limits.exempt_loopback and is_loopback(host))
        delay = 0.0 if exempt else self._guesses.note(host)
        if not delay:
            connection.refuse()
            return
        late = self._late.setdefault(host, deque())
        late.append(connection)
        self._half_open.forget(connection)  # an address must not be kept out by those who wait here
        if len(late) > _LATE:
            late.popleft().refuse()
        self.io_loop.call_later(delay, self._refuse_late, host, connection)

    def _refuse_late(self, host: str, connection: Connection) -> None:
        connection.refuse()
        late = self._late[host]
        if connection in late:
            late.remove(connection)
        if not late:
            del self._late[host]

    @property
    def pending(self) -> list[ClientState]:
        """What each client's session is doing: its state, the function in progress and its age, requests behind it."""
        found = super().pending
        return found if self._isolated is None else [*found, *self._isolated.pending()]

    def _look(self) -> None:
        super()._look()
        if self._isolated is not None:
            self._isolated.look()

    def _hook(self, name: str) -> None:
        if not self.isolated:  # else the session's process does
            super()._hook(name)

    @property
    def parked(self) -> int:
        """Requests that wait for an outcome; those of processes of their own are known while somebody observes."""
        own = sum(one.servant is not None and one.servant.parked is not None for one in list(self._connections))
        return own + (0 if self._isolated is None else self._isolated.parked)

    @property
    def full(self) -> bool:
        """Tell whether there is no room for a session; those count of which something still runs."""
        most = self.max_sessions
        visits = 0 if self._isolated is None else self._isolated.visits
        return self.is_crowded or (most is not None and self._sessions - visits + len(self.draining) >= most)

    def full_for(self, key: KeyText) -> bool:
        """Tell whether there is no room for a session of a client with this key."""
        if self._isolated is not None and self.is_visit(key):
            return self.is_crowded or self._isolated.visits >= _MOST_VISITS
        return self.full

    @property
    def is_crowded(self) -> bool:
        """Tell whether more connections would leave none of the process's descriptors for others."""
        return len(self._connections) - len(self._half_open) >= within_descriptors(_MOST_CONNECTIONS, 0.6)

    def why_full(self) -> str:
        """Return what to say to a client for whom there is no room."""
        if self.is_crowded:
            return f"server is full: {len(self._connections)} connections are open, the limit of open files is near"
        if not self.draining:
            return f"server is full: max_sessions={self.max_sessions} are open"
        one = min(self.draining.values(), key=lambda one: one.since)
        age = time.monotonic() - one.since
        return f"server is draining: {one.function!r} of {one.peer} still runs, {age:.0f} s after its session"

    def opened(self, connection: Connection) -> None:
        """Note that a handshake has succeeded."""
        self._half_open.forget(connection)
        if connection.deadline is not None:
            self.io_loop.remove_timeout(connection.deadline)
            connection.deadline = None
        if self._registration is not None and not (connection.lane or self.is_visit(connection.key)):
            self._registration.opened(connection.key.key, connection.peer, connection.key.timeout)
        super().opened(connection)

    def _never_opened(self, connection: Connection) -> None:
        """Note that a connection is gone that never was a session."""
        self._half_open.forget(connection)

    @property
    def _drain_level(self) -> int:
        """At which it is logged that something still runs: where nobody else gets the board meanwhile, as a warning."""
        return self.log_level if self.max_sessions is None else logging.WARNING

    def _drains(self, connection: Connection) -> None:
        """Note that a session is over, of which something still runs."""
        if self._registration is not None:
            self._registration.changed()

    def _place_is_free(self, connection: Connection) -> None:
        """Note that a session has ended, and nothing of it runs any more."""
        if self._dial_out is not None:
            self._dial_out.ended()  # while a job runs, for who looks after it
        if self._registration is None:
            return
        if self._jobs is not None and self._jobs.of(connection):
            self._registration.changed()  # it is taken until that job has ended
        else:
            self._registration.ended(connection.key.key)

    # -- isolation -----------------------------------------------------------------------------------------------

    @property
    def jobs(self) -> list[str]:
        """Names of the detached jobs that run although the sessions that began them have ended."""
        return [] if self._isolated is None else self._isolated.held

    @property
    def isolated(self) -> bool:
        """Tell whether each session has a process of its own."""
        return self._processes is not None

    @property
    def features(self) -> tuple[str, ...]:
        """What its sessions have besides lanes."""
        return ("isolated",) if self.isolated else ()

    def takes_over(self, connection: Connection) -> bool:
        """Tell whether another process serves a client that has been greeted, from now on."""
        if self._isolated is None:
            return False
        self._isolated.take(connection)
        return True

    def _job_ended(self, owner: Any) -> None:
        """Note that a detached job has ended: the place of the session that began it may be free now."""
        if self._closed:
            return
        if self._isolated is not None:
            self._isolated.promote()
        if owner is not None and not self._is_taken(owner):
            self._place_is_free(owner)

    def _is_taken(self, connection: Connection) -> bool:
        """Tell whether the place of a session is not free, although it has ended: a job of it runs."""
        assert self._isolated is not None
        return self._isolated.is_open(connection) or bool(self._jobs is not None and self._jobs.of(connection))

    def waits_for_place(self, go_on: Callable[[], object]) -> bool:
        """Have ``go_on`` called in a moment if a place may be free then; False: there is no hope for that."""
        if self._isolated is None or self.is_crowded:
            return False
        self._isolated.when_free(go_on)
        return True

    def forget(self, connection: Connection) -> None:
        """Look after a connection no more: it is another process's."""
        self._half_open.forget(connection)
        super().forget(connection)

    # -- for users -----------------------------------------------------------------------------------------------

    @property
    def address(self) -> str:
        """``host:port`` to connect to; with TLS ``rpcs://host:port#sha256=...``."""
        address = show_address(self.host, self.port)
        return address if self._tls is None else f"rpcs://{address}#{self.fingerprint}"

    @property
    def web_port(self) -> int | None:
        """Port of the WebSocket; None if there is none."""
        port: int | None = None if self._web is None else self._web.port
        return port

    @property
    def plain_port(self) -> int | None:
        """Port without TLS beside the one with it; None if there is none."""
        return int(self._plain_listeners[0].getsockname()[1]) if self._plain_listeners else None

    @property
    def fingerprint(self) -> str | None:
        """Fingerprint of its certificate, ``sha256=...``; None if it speaks no TLS."""
        return None if self._tls is None else f"sha256={self._tls.fingerprint}"

    def open_web_port(self, port: int = 0, allow_origin: Sequence[str] = ()) -> None:
        """Listen for WebSockets too, from now on; arguments as ``web_port`` and ``allow_origin`` of the class."""
        if self._web is None:
            call_in_loop(self.io_loop, lambda: self._open_web(port, allow_origin))
        else:
            self._web.allow(allow_origin)

    @property
    def whereabouts(self) -> dict[str, Any]:
        """Where it is, as a run file says it; without the token."""
        found: dict[str, Any] = {"host": self.host, "port": self.port, "pid": os.getpid(), "key": self.key}
        for name in ("web_port", "plain_port", "fingerprint"):
            if getattr(self, name) is not None:
                found[name] = getattr(self, name)
        return found

    @property
    def registered(self) -> bool:
        """Tell whether a tracker has it in its list, or it waits at its proxy."""
        registration, dial_out = self._registration, self._dial_out
        return (registration is not None and registration.connected) or (dial_out is not None and dial_out.waiting)

    def panel(self) -> Any:
        """Return a live view of this server and its clients, for a notebook."""
        return parts.find("panel")("servers", server=self)

    def close(self) -> None:
        """Stop listening, end all sessions, and return when everything is released. Idempotent."""
        if self._closed:
            return
        self._closed = True
        if self._switch_interval is not None:
            interval.release(self._switch_interval)
        call_in_loop(self.io_loop, self._stop)
        if self.environment.cells is not None:
            self.environment.cells.runner.close()
        if self._processes is not None:
            self._processes.wait()
        self.workers.close(1.0)
        if self._own_loop is not None:
            self._own_loop.stop()
        if self._audit is not None:
            self._audit.close()
        log.log(self.log_level, "%s on %s closed", self.name, self.address)

    terminate = close  # TVM's word

    def forked(self) -> None:
        """In a child that a function has forked: clients, listeners and the loop are the parent's."""
        web = [] if self._web is None else self._web.listeners
        for listener in (*self._listeners, *self._plain_listeners, *web):
            listener.close()
        if self._tls is not None:
            self._tls.forked()
        if self._processes is not None:
            self._processes.forked()
        if self._jobs is not None:
            self._jobs.forked()
        super().forked()

    def _stop(self) -> None:
        for part in (self._registration, self._dial_out, self._web, *self._acceptors):
            if part is not None:
                part.close()
        if self._jobs is not None:
            self._jobs.close()
        if self._processes is not None:
            self._processes.close()
        super()._stop()
        if self._tls is not None:
            self._tls.close()

    def __enter__(self) -> Server:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        state = "closed" if self._closed else f"{self._sessions} sessions"
        key = f", key {self.key!r}" if self.key else ""
        return f"<Server {self.address}{key}, token {'set' if self.token else 'none'}, {state}>"
