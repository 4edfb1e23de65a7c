"""Sessions that have a process each, at the server: a crash, or a function that never ends, costs that session alone.

The server greets a client and hands its socket, with what has arrived behind the greeting, to a process of its own
(``rpcnb/server/sessionprocess.py``); it keeps no copy of the socket, so a client notices at once when that process
ends, and asks here why.
"""

from __future__ import annotations

import base64
import functools
import itertools
import logging
import time
from concurrent.futures import Future
from concurrent.futures import wait as wait_for
from typing import TYPE_CHECKING, Any

from rpcnb import events
from rpcnb.server.connection import ClientState, Connection
from rpcnb.server.processes import Child, Processes
from rpcnb.transport.tcptable import established
from rpcnb.transport.websocket import WebSocket

if TYPE_CHECKING:
    from collections.abc import Callable

    from rpcnb.server.host import SessionHost
    from rpcnb.server.jobs import Jobs
    from rpcnb.transport.channel import Note

__all__ = ["IsolatedSessions"]

log = logging.getLogger(__name__)

_GRACE = 0.5  # seconds that a session's process has to end by itself, once its session is over
_AFTER_LIMIT = 0.5  # seconds after a session's time limit at which its process is ended
_ANSWER = 0.25  # seconds in which processes say what they are doing
_NATIVE = ("tvm_ffi", "numpy.random", "gzip", "rpcnb.runtime.arrays", "rpcnb.runtime.timing")  # which they load
_PLACE = 0.5  # seconds that a client waits for the place of a session that is about to end


class _Session(Child):
    """One session's process."""

    def __init__(self, sessions: IsolatedSessions, connection: Connection) -> None:
        super().__init__(sessions.processes, sessions.processes.make_directory())
        self.sessions = sessions
        self.connection = connection
        self.since = time.monotonic()
        self.over = False
        self.visits = sessions.server.is_visit(connection.key)
        self.visitor = ""  # why it may only look after jobs
        self.parked = 0  # requests that wait for an outcome, while somebody observes
        self.gone = 0  # looks at which its client had gone
        self.where = connection.ends
        self.asked: dict[int, Future[list[ClientState]]] = {}
        self._waiting: list[Connection] = []  # to be handed over once it is there

    def take(self, connection: Connection) -> None:
        """Hand a connection over, once the process is there."""
        self._waiting.append(connection)
        if self.pid:
            self._hand_over()

    def begin(self) -> None:
        """It is there: tell it what to do."""
        limit = self.connection.key.timeout
        if limit is not None:
            self.later(limit + _AFTER_LIMIT, f"timeout:{limit:g}")
        self._hand_over()

    def _hand_over(self) -> None:
        waiting, self._waiting = self._waiting, []
        self.visitor = self.sessions.why_visitor(self)
        for connection in waiting:
            sock = connection.sock
            facts = {
                "key": connection.text,
                "lane": connection.lane,
                "address": list(connection.address),
                "rest": base64.b64encode(connection.rest).decode(),
                "web": sock.state() if isinstance(sock, WebSocket) else None,
                "proof": connection.proof,
                "directory": self.directory,
                "observe": bool(self.sessions.server.observers),
                "visitor": self.visitor,
            }
            self.channel.post({"open": facts}, b"", [connection.let_go()])

    def hear(self, note: Note) -> None:
        """Take what it says."""
        words, server = note.words, self.sessions.server
        if words.get("over") and not self.over:
            self.over = True
            self.connection.received, self.connection.sent = words["moved"]
            self.later(_GRACE, "closed")
            if words.get("native"):  # others will load a library too
                self.processes.warm(_NATIVE)
        elif "answer" in words:
            waits = self.asked.pop(words["answer"], None)
            if waits is not None:
                waits.set_result([_state(one) for one in words["states"]])
        elif "tally" in words:
            for outcome, (count, seconds) in words["tally"].items():
                server.tally.add(outcome, count, seconds)
        elif words.get("what") == "counts":
            self.channel.post({"answer": words["ask"], "counts": server.counts()})
        elif words.get("what") == "jobs":
            number = words["ask"]
            reply = functools.partial(self._reply, number)
            self.sessions.jobs.ask({**words["question"], "owner": self.connection}, note.data, reply)
        elif "event" in words:
            kind = getattr(events, words["event"])
            if not issubclass(kind, events.Event):
                raise TypeError(f"{words['event']} is no event")
            self.parked += {events.RequestParked: 1, events.RequestCompleted: -1}.get(kind, 0)
            server.observers.tell(kind(source=server.name, **words["facts"]))

    def _reply(self, number: int, words: dict[str, Any], data: bytes) -> None:
        if self.pid and not self.released:
            self.channel.post({"answer": number, "reply": words}, data)

    def release(self) -> None:
        """Let go of everything."""
        super().release()
        for waits in self.asked.values():
            waits.cancel()
        for connection in self._waiting:
            if connection is not self.connection:
                connection.close()

    def refused(self, why: str) -> None:
        """It could not be made."""
        self.sessions.refuse(self, why)

    def ended(self, how: str) -> None:
        """It has ended."""
        if self.over and not self.how:
            how = "closed"  # it fell while it went home
        self.sessions.note_end(self, how)


def _state(facts: dict[str, Any]) -> ClientState:
    return ClientState(**{**facts, "calls": tuple(tuple(call) for call in facts["calls"])})


class IsolatedSessions:
    """The sessions of a server that have a process each.

    Args:
        server: The server.
        processes: Where their processes are made.
        jobs: What outlives them.
        places: How many there may be at once; None for any number.
    """

    def __init__(self, server: SessionHost, processes: Processes, jobs: Jobs, places: int | None) -> None:
        self.server = server
        self.processes = processes
        self.jobs = jobs
        self._places = places
        self._numbers = itertools.count(1)
        self._sessions: dict[Connection, _Session] = {}
        self._wait_for_place: list[Callable[[], object]] = []
        self._observed = False

    def take(self, connection: Connection) -> None:
        """Have a process serve a client that has been greeted, or a lane of one's; it is told if there is none."""
        if connection.lane:
            main = connection.main
            session = self._sessions.get(main) if main is not None else None
            if session is None or session.over:
                connection.close()
                return
            self.server.forget(connection)
            session.take(connection)
            return
        try:
            if self.processes.broken:
                raise OSError(0, self.processes.broken)
            session = _Session(self, connection)
        except OSError as error:
            connection.converse(f"no process for a session: {error.strerror}; try again later")
            return
        self.server.opened(connection)
        self.server.forget(connection)
        self._sessions[connection] = session
        session.take(connection)
        self.processes.fork(session)

    def refuse(self, session: _Session, why: str) -> None:
        """Tell a client that there is no process for its session."""
        connection = session.connection
        log.warning("%s: no process for the session of %s: %s", self.server.name, connection.peer, why)
        del self._sessions[connection]
        self.server.ended_elsewhere(connection, "closed")
        self.server.adopt(connection)
        limit = self.server.limits.handshake_timeout  # to hear why
        connection.deadline = self.server.io_loop.call_later(limit, connection.close)
        connection.converse(f"no process for a session: {why}; try again later")

    def note_end(self, session: _Session, how: str) -> None:
        """Note that a session's process has ended."""
        connection = session.connection
        if how != "closed":
            log.warning("%s: the session of %s has ended: %s", self.server.name, connection.peer, how)
        del self._sessions[connection]
        self.server.ended_elsewhere(connection, how)
        self.promote()
        waiting, self._wait_for_place = self._wait_for_place, []
        for go_on in waiting:
            go_on()

    def is_open(self, connection: Connection) -> bool:
        """Tell whether a connection's session has not ended."""
        return connection in self._sessions

    @property
    def held(self) -> list[str]:
        """Jobs that run although the sessions that began them have ended."""
        return self.jobs.held(self._sessions)

    @property
    def parked(self) -> int:
        """Requests that wait for an outcome, while somebody observes."""
        return sum(session.parked for session in self._sessions.values())

    @property
    def visits(self) -> int:
        """Sessions that need no place."""
        return sum(session.visits for session in self._sessions.values())

    def why_visitor(self, session: _Session) -> str:
        """Say why a session may only look after jobs; empty if it may do all."""
        held = self.held
        if session.visits:
            lent = "this board is lent by its tracker"
            return f"{lent}, and taken by the job {held[0]!r}" if held else f"{lent}: request it there"
        if self._places is None or len(self._sessions) - self.visits + len(held) <= self._places:
            return ""
        return f"this board is taken by the job {held[0]!r}"

    def promote(self) -> None:
        """Let those do all for whom there is a place now."""
        for session in self._sessions.values():
            if session.visitor and session.pid:
                before, session.visitor = session.visitor, self.why_visitor(session)
                if session.visitor != before:
                    session.channel.post({"visitor": session.visitor})

    def when_free(self, go_on: Callable[[], object]) -> None:
        """Call ``go_on`` when a session has ended, or after a moment: one may be about to end."""
        called = False

        def once() -> None:
            nonlocal called
            if not called:
                called = True
                go_on()

        self._wait_for_place.append(once)
        self.server.io_loop.call_later(_PLACE, once)

    def pending(self) -> list[ClientState]:
        """Ask each process what it is doing; one that does not answer is in a call that lets nothing else run."""
        asked: list[tuple[_Session, Future[list[ClientState]]]] = [(one, Future()) for one in self._sessions.values()]

        def ask() -> None:
            for session, waits in asked:
                if session.pid:
                    number = next(self._numbers)
                    session.asked[number] = waits
                    session.channel.post({"ask": number, "what": "pending"})

        self.server.io_loop.add_callback(ask)
        wait_for([waits for _, waits in asked], _ANSWER)
        found = []
        for session, waits in asked:
            if waits.done() and not waits.cancelled():
                found += waits.result()
            else:
                age = time.monotonic() - session.since
                found.append(ClientState(session.connection.peer, "running", "", age, 0))
        return found

    def look(self) -> None:
        """Look after sessions; twice a second.

        Their processes tell events while somebody listens; and one that lets nothing else run cannot notice that its
        client has gone, so that is looked up.
        """
        wanted = bool(self.server.observers)
        if wanted != self._observed:
            self._observed = wanted
            for session in self._sessions.values():
                if session.pid:
                    session.channel.post({"observe": wanted})
        watched = [session for session in self._sessions.values() if session.pid and session.where and not session.over]
        if not watched:
            return
        alive = established()
        for session in watched:
            session.gone = 0 if alive is None or session.where in alive else session.gone + 1
            if session.gone > 1:
                session.kill("closed")
