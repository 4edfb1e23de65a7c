"""One client of a server: the handshake, then a conversation that the loop or a worker drives.

Exactly one owner touches the socket at a time. The *loop* owns a connection while it shakes hands, serves quick
requests, receives bulk data, and while a request is parked (so that the client's end is noticed). A *worker* owns it
from a plain call until the session has been quiet for the hot time. Ownership passes by a job to the pool in one
direction, and by re-arming the watcher (or a call to the loop) in the other; before either, the parser has been run,
as whole packets may lie in the buffer that no poll reports.
"""

from __future__ import annotations

import contextlib
import logging
import os
import select
import socket
import struct
import sys
import threading
import time
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from rpcnb import events
from rpcnb.errors import RemoteProtocolError
from rpcnb.protocol.codes import Role
from rpcnb.protocol.endpoint import Endpoint
from rpcnb.protocol.handshake import EXTENSION, Handshake, KeyText, hello, key_text, refusal
from rpcnb.protocol.messages import Raised, encode_packet
from rpcnb.protocol.peerlimits import PeerLimits, extension
from rpcnb.protocol.proof import NONCE, WRONG_TOKEN, Challenge, Proof, new_nonce
from rpcnb.runtime.completion import is_ours
from rpcnb.runtime.local import LocalServingSession
from rpcnb.runtime.servant import Servant
from rpcnb.runtime.wellknown import keeps_state_by_thread
from rpcnb.server.lanes import ENDED, TICKET
from rpcnb.server.workers import WorkerPool
from rpcnb.transport.sockets import tune
from rpcnb.transport.spin import receiving
from rpcnb.transport.tcptable import both_ends_are_here, ends_of
from rpcnb.transport.watcher import READ, WRITE

if TYPE_CHECKING:
    from collections.abc import Callable

    from tornado.ioloop import IOLoop

    from rpcnb.protocol.codes import Limits
    from rpcnb.protocol.messages import Message
    from rpcnb.runtime.access import Gate
    from rpcnb.runtime.environment import Environment
    from rpcnb.server.lanes import Lanes
    from rpcnb.transport.refusals import Refusals
    from rpcnb.transport.watcher import EpollWatcher, LoopWatcher

__all__ = ["ClientState", "Connection", "Draining", "Host"]

log = logging.getLogger(__name__)

_PIECE = 1 << 20  # bytes per system call on the loop: a bulk copy must not keep other sessions waiting
_TURNS = 4  # system calls per turn on the loop
_GATHER = 64
# How long a worker waits for the next call of its session, so that a call after a pause need not be handed over (first
# call after 50 ms: 3.0 -> 1.7 times stock's). As SO_RCVTIMEO: a precise timer, as poll() takes for a short time, costs
# 15 us per call in a virtual machine to be programmed.
_HOT_TIME = struct.pack("ll", 0, 500_000)
_NOW: int = getattr(socket, "MSG_DONTWAIT", 0)
# What poll() says of a client that has gone: its stream's end, or worse.
_GONE: int = getattr(select, "POLLRDHUP", 0) | select.POLLHUP | select.POLLERR
_ASKED = 0.4  # seconds after which a client that asks how its session has ended is told that it has not
_SAME_PROCESS = (
    "tvm.rpc in the server's own process waits for ever when it frees a handle, as its destructors keep the "
    "interpreter from everybody: use rpcnb.connect() here, or a process of its own for the server (rpcnb serve)"
)
_LINGER = 5.0  # seconds for the last replies of a session that ends


class Host(Protocol):
    """The server, as a connection sees it."""

    name: str
    key: str
    limits: Limits
    environment: Environment
    gate: Gate
    io_loop: IOLoop
    lanes: Lanes[Any]
    refusals: Refusals
    watcher: EpollWatcher | LoopWatcher
    workers: WorkerPool

    @property
    def kernel(self) -> Callable[[Callable[[], None]], object] | None:
        """What runs functions on the notebook kernel's loop; None where there is none."""

    @property
    def features(self) -> tuple[str, ...]:
        """What its sessions have besides lanes."""

    def takes_over(self, connection: Connection) -> bool:
        """Tell whether another process serves a client that has been greeted, from now on."""

    def waits_for_place(self, go_on: Callable[[], object]) -> bool:
        """Have ``go_on`` called in a moment if a place may be free then; False: there is no hope for that."""

    def full_for(self, key: KeyText) -> bool:
        """Tell whether there is no room for a session of a client with this key."""

    @property
    def is_crowded(self) -> bool:
        """Tell whether there is no room for another connection of any kind."""

    @property
    def draining(self) -> dict[Any, Draining]:
        """What goes on running after its client has gone, by connection."""

    @property
    def kernel_busy(self) -> float | None:
        """Seconds for which a blocking cell has kept the kernel's loop from running functions; None if none does."""

    def why_full(self) -> str:
        """Return what to say to a client for whom there is no room."""

    def why_refused(self) -> str:
        """Say why no plain function can be run now; empty if one can."""

    def admits(self, text: str, *, proved: bool = False) -> bool:
        """Tell whether a client with this key text may enter; with ``proved`` it has proved the token."""

    def refuse_guess(self, connection: Connection) -> None:
        """Have a client refused that has no right to enter; maybe later, so that guessing takes long."""

    def opened(self, connection: Connection) -> None:
        """Note that a handshake has succeeded."""

    def closed_connection(self, connection: Connection) -> None:
        """Note that a connection is gone."""

    def tell(self, kind: type[Any], **facts: Any) -> None:
        """Tell the observers, if there are any."""


class Draining(NamedTuple):
    """A function that goes on running after its client has gone; a thread cannot be stopped.

    Attributes:
        function: Its name.
        peer: The client's address.
        since: ``time.monotonic()`` at which the client's end was noticed.
    """

    function: str
    peer: str
    since: float


class ClientState(NamedTuple):
    """What a client's session is doing at the server.

    Attributes:
        peer: Address of the client.
        state: ``idle``, ``busy``, ``running`` (a plain function), ``parked`` (waiting for a completion) or ``kernel``
            (waiting for the notebook's kernel, which is busy with a cell).
        function: What is in progress.
        age: Seconds a parked request has waited.
        queued: Requests behind it.
        calls: Calls that were started and overlap: number, function and age of each.
    """

    peer: str
    state: str
    function: str
    age: float
    queued: int
    calls: tuple[tuple[int, str, float], ...] = ()


class Connection:
    """One client; made by the server for every accepted socket. Methods run on the loop unless they say otherwise."""

    def __init__(self, server: Host, sock: socket.socket, address: tuple[Any, ...]) -> None:
        self.server = server
        self.sock = sock
        self.address = address
        self.peer = f"{address[0]}:{address[1]}" if address else "local"
        self.fingerprint: str = getattr(sock, "fingerprint", "")  # of the certificate that it was shown
        self.received = self.sent = 0  # bytes
        self.ends: str = getattr(sock, "ends", "") or ends_of(sock)  # as the system writes them
        self.fd = sock.fileno()
        self.since = time.monotonic()
        self.key = KeyText("", "")
        self.text = ""  # the client's key text
        self.rest = b""  # what came behind it
        self.lane = 0  # number among its session's connections; 0 opens the session, and ends it
        self.main: Connection | None = None  # a lane's session
        self.servant: Servant | None = None
        self.in_worker = False
        self.refused = False
        self.closed = False
        self.ended = False  # the client's stream has ended, or the server wants the end
        self.session_at_end: Any = None  # the session that it opened, once it has been closed
        self.deadline: Any = None  # the handshake's, then the session's timer
        self._parked_since = ("", 0.0)
        self._for_kernel = False  # what runs was given to the kernel's loop
        self._own_thread: WorkerPool | None = None
        self._handshake = Handshake(server.limits.key)
        self._challenge: Challenge | None = None  # it is to prove the token, or its session's secret
        self._proved: Callable[[], object] = lambda: None  # goes on then
        self.proof: tuple[str, str] | None = None  # what has been proved, and what proves it to the client
        tune(sock)
        if _NOW:
            # The loop asks with MSG_DONTWAIT and a worker waits in the call itself: no system call at hand-over.
            sock.setblocking(True)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, _HOT_TIME)
        self._waits = receiving(sock.recv_into)

    @property
    def facts(self) -> dict[str, Any]:
        """Who it is, for those who keep a record."""
        token = self.server.gate.token
        proved, given = self.proof is not None, "-token" in self.key.options
        entry = "open" if not token else "proof" if proved else "token" if given else "match key"
        shown: str = getattr(self.sock, "certificate", "")
        return {
            "peer": self.peer,
            "key": self.key.key,
            "entry": entry,
            "encrypted": bool(self.fingerprint),
            "certificate": shown,
        }

    def describe(self) -> ClientState:
        """Return what this client's session is doing; from any thread."""
        servant = self.servant
        assert servant is not None
        parked, running = servant.parked, servant.running
        if parked is not None:
            state, function, age = "parked", parked.name, time.monotonic() - parked.since
        elif running is not None:
            waits = self.server.kernel_busy if self._for_kernel else None
            state, function, age = "running" if waits is None else "kernel", running, waits or 0.0
        else:
            state, function, age = servant.endpoint.state.value, "", 0.0
        session = servant.session
        started = session.calls.running if isinstance(session, LocalServingSession) else []
        calls = tuple((call.id, call.name, time.monotonic() - call.since) for call in started)
        return ClientState(self.peer, state, function, age, servant.endpoint.waiting, calls)

    def waits_for_kernel(self, number: int | None) -> bool:
        """Tell whether a request, or the started call of this number, waits for the kernel's loop, or runs there."""
        servant = self.servant
        if servant is None:
            return False
        if number is None:
            return self._for_kernel and servant.running is not None
        session = servant.session
        started = session.calls.running if isinstance(session, LocalServingSession) else []
        return any(call.for_kernel for call in started if call.id == number)

    def look(self) -> None:
        """Notice that the client has gone while nobody reads.

        So it is while a worker, or the kernel, runs a function, and while much has arrived behind a parked request.
        """
        servant = self.servant
        if servant is None or self.closed:
            return
        full = servant.parked is not None and not self._wants_input(servant)
        if servant.running is not None if self.in_worker else full:
            poll = select.poll()
            poll.register(self.fd, _GONE)
            if poll.poll(0):
                self.close()

    def still_runs(self) -> str:
        """Name what of its session goes on running; empty if nothing does. From any thread."""
        servant = self.servant
        running = servant.running if servant is not None and self.in_worker else None
        if running is not None:
            return running
        session = self.session_at_end
        if isinstance(session, LocalServingSession):
            started = session.calls.in_thread
            if started is not None:
                return started.name
            cells = session.environment.cells
            if cells is not None:
                return cells.runs(session)
        return ""

    # -- handshake -----------------------------------------------------------------------------------------------

    def ready(self) -> None:
        """Take the loop's word that the socket is ready, or that a worker has given the connection back."""
        if self.servant is not None:
            with self.servant.lock:  # a worker that is giving it back has finished with it
                owned = not self.in_worker
            if not owned:
                return
        if self.closed:
            return
        self._guarded(self._shake_hands if self.servant is None else self._serve)

    def _guarded(self, step: Callable[[], object]) -> None:
        """Perform a step on the loop; whatever it raises ends this connection alone."""
        try:
            step()
        except RemoteProtocolError as error:
            self.note_refusal(f"{self.peer}: {error}")
            self.close()
        except BaseException as error:  # SystemExit would end the loop
            log.exception("%s: connection of %s failed", self.server.name, self.peer)
            self.close()
            if is_ours(error):
                raise

    def _shake_hands(self) -> None:
        try:
            data = self.sock.recv(4096, _NOW)
        except (BlockingIOError, InterruptedError):
            self.server.watcher.arm(self.fd, READ)
            return
        except OSError:
            data = b""
        if not data:
            self.close()
            return
        if self._challenge is not None:
            self._take_proof(data)
            return
        found = self._handshake.receive_data(data)
        if isinstance(found, str):
            self.text, self.rest = found, self._handshake.rest
            self._accept(found)
        elif found is not None:
            self._refused(found)
        else:
            self.server.watcher.arm(self.fd, READ)

    def note_refusal(self, text: str) -> None:
        """Log what this client, maybe a stranger, was refused; summed up if there are many."""
        host = str(self.address[0]) if self.address else "local"
        self.server.refusals.note(host, f"{self.server.name}: {text}")

    def _refused(self, word: int) -> None:
        raise RemoteProtocolError(f"expected a client, got the word {word:#x}")

    def _accept(self, text: str) -> None:
        server = self.server
        key = KeyText.parse(text)
        if TICKET in key.options:
            (self._tell_end if ENDED in key.options else self._accept_lane)(key)
            return
        if server.gate.asks_for_proof(text):
            options = {"-rpcnb": self._extension, TICKET: server.lanes.announce(self)}
            self.challenge(str(server.gate.token), options, lambda: self._admit(key, proved=True))
            return
        self._admit(key)

    @property
    def _extension(self) -> str:
        return extension(EXTENSION, self.server.limits, "lanes", *self.server.features)

    def _admit(self, key: KeyText, *, proved: bool = False) -> None:
        """Let a client in that has the right to, as soon as there is a place."""
        server = self.server
        if not server.admits(self.text, proved=proved):
            self._refuse_guess(WRONG_TOKEN)
            return
        if not (server.full_for(key) and server.waits_for_place(lambda: self._guarded(lambda: self._enter(key)))):
            self._enter(key)

    def _refuse_guess(self, reason: str) -> None:
        self.note_refusal(f"refused {self.peer}: {reason}")
        self.server.tell(events.ConnectionRejected, peer=self.peer, reason=reason)
        self.server.refuse_guess(self)

    def _enter(self, key: KeyText) -> None:
        """Open a session, or say that there is no room."""
        if self.closed:
            return
        server = self.server
        full = self.why_full(key)
        options = {"-rpcnb": extension(EXTENSION, server.limits)} if key.features is not None else {}
        if options and not full and self.proof is None:
            options = {"-rpcnb": self._extension, TICKET: server.lanes.issue(self)}
        self.begin(key, options, full)

    # -- proofs --------------------------------------------------------------------------------------------------

    def challenge(self, secret: str, options: dict[str, str], proved: Callable[[], object]) -> None:
        """Answer the client's key, let it prove that it knows ``secret``, and go on with ``proved`` then."""
        text = self._answer({**options, NONCE: new_nonce()})
        self._challenge, self._proved = Challenge(Proof(secret, self.text, text, self.fingerprint)), proved
        if self.deadline is None:  # it has been dialled, and has waited for a client as long as that took
            self.deadline = self.server.io_loop.call_later(self.server.limits.handshake_timeout, self.close)
        self._take_proof(self.rest)

    def _take_proof(self, data: bytes) -> None:
        """Take what a client sends that is to prove something: all of it is kept for later."""
        challenge = self._challenge
        assert challenge is not None
        right = challenge.receive_data(data)
        if right is None:
            self.server.watcher.arm(self.fd, READ)
            return
        self.rest = bytes(challenge.data)
        if right:
            proof = challenge.proof
            self._challenge, self.proof = None, (proof.name, proof.answer)
            if not self.lane:
                self.server.lanes.prove(self, proof.lanes)
            self._proved()
        else:
            self._refuse_guess(WRONG_TOKEN)

    def why_full(self, key: KeyText) -> str:
        """Return what to say to a client for whom there is no room; empty if there is."""
        server = self.server
        if not server.full_for(key):
            return ""
        why = server.why_full()
        self.note_refusal(f"refused {self.peer}: {why}")
        server.tell(events.ConnectionRejected, peer=self.peer, reason="draining" if server.draining else "full")
        return f"{why}; try again later"

    def _why_not_here(self, key: KeyText) -> str:
        """Say why a stock client in this very process is not served: it would wait for ever; empty if it is none."""
        stock = key.features is None and "tvm.rpc" in sys.modules
        return _SAME_PROCESS if stock and both_ends_are_here(self.sock) else ""

    def _accept_lane(self, key: KeyText) -> None:
        """Let a further connection of a session in, if it presents the session's ticket."""
        server = self.server
        found = server.lanes.find(key)
        if found is None and server.lanes.came_late(key):
            self._send_last(refusal())
            return
        if found is None:
            self._refuse_guess("wrong session or secret")
            return
        if server.is_crowded:  # the session does without
            self.note_refusal(f"refused a lane of {self.peer}: {server.why_full()}")
            self._send_last(refusal())
            return
        main, self.lane, secret = found
        options = {"-rpcnb": extension(EXTENSION, server.limits)}
        if secret:
            self.challenge(secret, options, lambda: self._join(key, main, options))
        else:
            self._join(key, main, options)

    def _join(self, key: KeyText, main: Connection, options: dict[str, str]) -> None:
        """Become a further connection of a session."""
        self.main = main
        before = self.server.lanes.join(main, self.lane, self)
        if before is not None:
            before.close()
        self.begin(key, options, "")

    def _tell_end(self, key: KeyText) -> None:
        """Tell a client that has lost its session how that has ended, as soon as that is known."""
        server = self.server

        def tell(how: str) -> None:
            if not self.closed:
                self.send_all(hello(key_text(Role.SERVER, server.key, {ENDED: how})))
                self.close()

        if not server.lanes.when_ended(key, tell):
            self.note_refusal(f"refused {self.peer}: wrong session or secret")
            server.refuse_guess(self)
        elif not self.closed:
            server.io_loop.call_later(_ASKED, tell, "")

    def _session_of_lane(self) -> Any:
        main = self.main
        return None if main is None or main.servant is None or main.closed else main.servant.session

    def begin(self, key: KeyText, options: dict[str, str], full: str) -> None:
        """Answer the handshake and begin the conversation, here or in a process of its own."""
        self.key = key
        if self.proof is None:
            self._answer(options)
        if full or not self.server.takes_over(self):
            self.converse(full or self._why_not_here(key))

    def converse(self, full: str) -> None:
        """Serve a client that has been greeted; or tell it why there is no session for it."""
        server, key = self.server, self.key
        servant = Servant(
            Endpoint(Role.SERVER, server.limits),
            server.environment,
            name=server.name,
            on_completed=self._completed,
            on_parked=self._parked,
            route=self._route,
            refusal=full,
            why_refused=server.why_refused,
            shares=self._session_of_lane if self.lane else None,
            lane=self.lane,
        )
        servant.proof, servant.peer = self.proof, self.peer
        servant.extended = key.features is not None
        servant.endpoint.takes = PeerLimits.told_by(key.features)
        self.servant = servant
        self.refused = bool(full)  # such a connection is no session, and has the time of a handshake to hear why
        if not full:
            server.opened(self)
        if key.timeout is not None and not (self.lane or full):
            self.deadline = server.io_loop.call_later(key.timeout, self._expire, key.options["-timeout"])
        if self.rest:
            servant.endpoint.receive_data(self.rest)
        self._serve()

    def _answer(self, options: dict[str, str]) -> str:
        """Answer the client's key with ours, which is returned."""
        text = key_text(Role.SERVER, self.server.key, options)
        self.send_all(hello(text))
        return text

    def send_all(self, data: bytes) -> None:
        """Send a few bytes on a connection that has just been opened."""
        if self.sock.send(data, _NOW) != len(data):  # pragma: no cover  # an empty send buffer takes so few bytes
            raise RemoteProtocolError("expected room for the handshake")

    def refuse(self) -> None:
        """Say that it may not enter, unless it has gone meanwhile."""
        if self.closed:
            return
        if self._challenge is not None or self.proof is not None:  # it is in a conversation already
            self._guarded(lambda: self.converse(WRONG_TOKEN))
        else:
            self._send_last(refusal())

    def _send_last(self, data: bytes) -> None:
        with contextlib.suppress(OSError):
            self.sock.send(data, _NOW)
        self.close()

    # -- serving -------------------------------------------------------------------------------------------------

    def _serve(self) -> None:
        """Serve on the loop for a turn, then wait for the socket again."""
        servant = self.servant
        assert servant is not None
        copies = servant.copies
        if self._advance(servant):
            return  # another's now, who may have given it back already: not to be looked at again
        for _ in range(_TURNS):
            if self.closed or servant.more or not self._wants_input(servant):
                break
            count = self._receive(servant, _NOW)
            if count <= 0:
                break
            if self._advance(servant):
                return
        if self.closed:
            return
        self._flush()
        if servant.more or (servant.congested and not servant.output):
            self._to_loop(self.ready)  # behind what other sessions wait for
        elif servant.copies == copies or not self._heat(servant):
            self._wait_or_close()

    def _heat(self, servant: Servant) -> bool:
        """After a small copy give the session to a worker, which serves the next one at once; True if that was done.

        A copy of 64 KiB takes 50 us instead of 110 us across two CPUs, 85 us instead of 95 us on one.
        """
        waits = self.ended or servant.over or servant.output or servant.parked is not None or servant.endpoint.bulk_left
        if waits or not self.server.workers.may_wait():
            return False
        self.in_worker = True
        self._workers.submit(lambda: self._work(None))
        return True

    def _advance(self, servant: Servant) -> bool:
        """Perform what has arrived, and again what waited for room in the output; True once it was passed on."""
        if servant.advance():
            return True
        while servant.output and not servant.more and self._flush() and servant.endpoint.buffered:
            before = servant.endpoint.buffered
            if servant.advance():
                return True
            if servant.endpoint.buffered == before:
                break
        return False

    def _receive(self, servant: Servant, flags: int) -> int:
        """Receive once; returns the bytes, 0 at the end of the stream, -1 if there are none now."""
        endpoint = servant.endpoint
        view = endpoint.get_buffer()
        try:
            count = self.sock.recv_into(view, min(len(view), _PIECE), flags)
        except (BlockingIOError, InterruptedError):
            return -1
        except OSError:
            count = 0
        if count == 0:
            self.ended = True
            return 0
        self.received += count
        endpoint.received(count)
        return count

    def _flush(self) -> bool:
        """Send what the socket takes; any owner, and completing threads. Returns True if nothing is left."""
        servant = self.servant
        assert servant is not None
        output = servant.output
        with servant.lock:
            while output:
                buffers = output.first(_GATHER)
                try:
                    if len(buffers) == 1:
                        sent = self.sock.send(buffers[0], _NOW)
                    else:
                        sent = self.sock.sendmsg(buffers, (), _NOW)
                except (BlockingIOError, InterruptedError):
                    return False
                except OSError:
                    output.clear()
                    self.ended = True
                    return True
                self.sent += sent
                output.consume(sent)
        return True

    def _wants_input(self, servant: Servant) -> bool:
        """Read on while requests can be performed, or little is buffered behind the one in progress."""
        if self.ended or servant.over:
            return False
        waits = servant.parked is not None or bool(servant.output)
        return not waits or servant.endpoint.buffered < self.server.limits.input_buffered

    def _wait_or_close(self) -> None:
        """Wait for the socket again, or end the connection if it is over; any owner that has nothing left to do."""
        servant = self.servant
        assert servant is not None
        if self.ended or servant.over:
            self._finish(servant)
            return
        events = (READ if self._wants_input(servant) else 0) | (WRITE if servant.output else 0)
        self.server.watcher.arm(self.fd, events)

    def _finish(self, servant: Servant) -> None:
        """End the session; its last replies get a moment to leave."""
        if servant.output and not self.ended:
            self.server.io_loop.call_later(_LINGER, self.close)
            self.server.watcher.arm(self.fd, WRITE)
            return
        self.close()

    # -- workers -------------------------------------------------------------------------------------------------

    def _route(self, message: Message, place: str) -> bool:
        """Pass a call to where it runs; False: here and now."""
        servant = self.servant
        assert servant is not None
        if place == "kernel":
            place = "kernel" if self.server.kernel is not None else "thread"
        if self.in_worker == (place == "thread") and place != "kernel":
            return False
        servant.running = servant.describe(message)
        self._flush()  # finished replies must not wait for a call that may be slow
        self.in_worker = True
        self._for_kernel = place == "kernel"
        if place == "thread":
            self._workers.submit(lambda: self._work(message))
        elif place == "kernel":
            self.server.kernel(lambda: self._perform_elsewhere(message))  # type: ignore[misc]  # checked above
        else:
            self._to_loop(lambda: self._perform_on_loop(message))
        return True

    @property
    def _workers(self) -> WorkerPool:
        """What runs plain functions: a thread of the session's own where TVM's runtime keeps state for each thread."""
        if self._own_thread is None and keeps_state_by_thread():
            self._own_thread = WorkerPool("rpcnb-session", running=1, idle=None)
        return self._own_thread or self.server.workers

    def _to_loop(self, function: Any) -> None:
        """Call ``function`` on the loop; from any thread."""
        with contextlib.suppress(RuntimeError):  # the loop has been closed: so are all connections
            self.server.io_loop.asyncio_loop.call_soon_threadsafe(function)

    def _perform_on_loop(self, message: Message) -> None:
        servant = self.servant
        assert servant is not None
        self.in_worker = False
        servant.running = None
        servant.perform(message)
        self.ready()

    def _perform_elsewhere(self, message: Message) -> None:
        """Perform a call on the kernel's loop, then give the connection back."""
        servant = self.servant
        assert servant is not None
        try:
            if servant.cancelled:  # while a cell kept the kernel busy
                servant.refuse_cancelled()
            else:
                servant.perform(message)
        finally:  # an interrupt of the kernel, say
            self._flush()
            self._give_back(servant)

    def _give_back(self, servant: Servant) -> None:
        """Let the loop own the connection again; from a worker."""
        servant.running = None
        waits = not (self.ended or servant.over or servant.output or servant.parked is not None)
        # With the lock: the loop, woken by an earlier completion, must not serve between these two.
        with servant.lock:
            self.in_worker = False
            if self.closed:
                return  # its descriptor may be another connection's by now
            if waits and not servant.endpoint.buffered:
                try:
                    self.server.watcher.arm(self.fd, READ)
                    return
                except OSError:
                    pass  # closed meanwhile
        self._to_loop(self.ready)

    def _work(self, message: Message | None) -> None:
        """Own the connection in a worker: run the call, if there is one, then whatever plain calls follow at once.

        Without one, the place of a waiting worker has been taken for it.
        """
        servant = self.servant
        assert servant is not None
        hot = message is None or self.server.workers.may_wait()
        passed_on = False
        try:
            try:
                if message is not None:
                    servant.perform(message)
                    servant.running = None
                passed_on = self._keep_hot(servant, hot)
            finally:
                if hot:
                    self.server.workers.waited()
        except RemoteProtocolError as error:
            self.note_refusal(f"{self.peer}: {error}")
            self.ended = True
        except BaseException:  # SystemExit too: the connection is always given back
            log.exception("%s: connection of %s failed", self.server.name, self.peer)
            self.ended = True
        if not passed_on:
            self._give_back(servant)

    def _keep_hot(self, servant: Servant, hot: bool) -> bool:
        """Serve on in a worker; True if the connection was passed on and may be another's already."""
        endpoint, output = servant.endpoint, servant.output
        while True:
            if servant.advance():
                return True
            if servant.more:
                self._flush()
                continue
            if output and not self._flush():
                return False
            if servant.congested:
                continue
            if servant.parked is not None or servant.over or self.ended or not hot:
                return False
            if endpoint.payload_left > _PIECE:
                return False
            with servant.entered():
                if not self._serve_quickly(servant):
                    return False

    def _serve_quickly(self, servant: Servant) -> bool:
        """Wait for input in a worker, and serve calls the short way; False when the hot time or the stream is over."""
        endpoint, send = servant.endpoint, self.sock.send
        quickly = servant.call_quickly
        idle = endpoint.idle
        view = endpoint.get_buffer()[:_PIECE]
        while True:  # what is served here leaves the endpoint as it is, so the view stays good
            try:
                count = next(self._waits)(view)
            except (BlockingIOError, InterruptedError):
                return False
            except OSError:
                count = 0
            if not count:
                self.ended = True
                return False
            self.received += count
            reply, served = quickly(view, count) if idle else (b"", 0)
            if reply:
                try:
                    sent = send(reply, _NOW)
                except OSError:
                    sent = 0  # the general way finds out why
                self.sent += sent
                if sent < len(reply):
                    with servant.lock:
                        if not servant.over:  # else the session's last words are out already
                            servant.output.add([memoryview(reply)[sent:]])
                    idle = False
            if served < count:
                endpoint.received(count)
                endpoint.skip(served)
                return True
            if servant.over or servant.output.size or not idle:
                return True

    def _parked(self, function: str) -> None:
        self._parked_since = (function, time.monotonic())
        self.server.tell(events.RequestParked, peer=self.peer, function=function)

    def _completed(self) -> None:
        """A parked request got its reply, in any thread: send it at once, then let the loop go on."""
        function, since = self._parked_since
        self.server.tell(events.RequestCompleted, peer=self.peer, function=function, seconds=time.monotonic() - since)
        self._flush()
        self._to_loop(self.ready)

    # -- end -----------------------------------------------------------------------------------------------------

    def _expire(self, seconds: str) -> None:
        """The session's time is over: say so at a packet boundary, then end."""
        servant = self.servant
        if self.closed or servant is None:
            return
        with servant.lock:
            if servant.output and servant.output.first(1) and not self._flush() and not self.ended:
                self.deadline = self.server.io_loop.call_later(0.05, self._expire, seconds)
                return
            text = (
                f"RPCSessionTimeoutError: Your {float(seconds)}s session has expired, "
                'try to increase the "session_timeout" value.'
            )
            servant.output.add(encode_packet(Raised(text)))
            servant.over = True
        log.info("%s: session of %s ended after its time of %s s", self.server.name, self.peer, seconds)
        self._say_goodbye(self.server.io_loop.time() + _LINGER)

    def _say_goodbye(self, until: float) -> None:
        """Close when the last words have left: the socket may still be full of the reply before them."""
        if self.closed:
            return
        if self._flush() or self.server.io_loop.time() > until:
            self.close()
        else:
            self.deadline = self.server.io_loop.call_later(0.02, self._say_goodbye, until)

    def let_go(self) -> int:
        """Give the socket up without a word to the client; returns its descriptor, which the caller owns."""
        self.fd = -1
        return self.sock.detach()

    def forked(self) -> None:
        """In a forked child: let the client's socket go without a word; what runs here is answered by the parent."""
        self.closed = self.ended = True
        with contextlib.suppress(OSError):
            os.close(self.sock.detach())
        if self.servant is not None:
            self.servant.lock = threading.RLock()
            self.servant.over = True

    def close(self) -> None:
        """End the connection and release everything; a running plain function ends by itself, unheard."""
        if self.closed:
            return
        with self.servant.lock if self.servant is not None else contextlib.nullcontext():
            self.closed = True
            self.ended = True
        if self.deadline is not None:
            self.server.io_loop.remove_timeout(self.deadline)
        self.server.watcher.remove(self.fd)
        if self.servant is not None:
            self.session_at_end = None if self.lane else self.servant.session
            self.servant.cancel()
        # A worker may be in poll or recv on this socket: wake it; it finds the connection closed.
        with contextlib.suppress(OSError):
            self.sock.shutdown(socket.SHUT_RDWR)
        self.sock.close()
        if self._own_thread is not None:
            self._own_thread.close(0)
        self.server.closed_connection(self)
