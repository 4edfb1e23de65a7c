"""The process of one isolated session: forked from the zygote, it serves the connections that the server hands over.

::

    server -> here   {"job": facts}, a parcel and a pipe   instead of all others: see jobprocess.py
                     {"open": facts} and a socket     the client, greeted; then its lanes
                     {"ask": n, "what": "pending"}    -> {"answer": n, "states": [...]}
                     {"observe": bool}, {"visitor": why it may only look after jobs}
    here -> server   {"over": true, "native": it has loaded compiled code}, {"event": kind, "facts": {...}}
                     {"ask": n, "what": "counts"}     -> {"answer": n, "counts": {...}}
                     {"ask": n, "what": "jobs", "question": words}, data -> {"answer": n, "reply": words}, data
"""

from __future__ import annotations

import atexit
import base64
import contextlib
import itertools
import logging
import os
import select
import signal
import socket
import sys
import threading
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from rpcnb import events
from rpcnb.protocol.codes import Limits
from rpcnb.protocol.handshake import KeyText
from rpcnb.runtime.access import Gate
from rpcnb.runtime.backend import ffi_global_names
from rpcnb.runtime.libraries import load_at_start
from rpcnb.runtime.registry import REGISTRY
from rpcnb.server.cgroup import NO_MEMORY
from rpcnb.server.connection import Connection
from rpcnb.server.host import SessionHost
from rpcnb.server.modules import load_modules
from rpcnb.server.rehearsal import rehearse
from rpcnb.transport import interval
from rpcnb.transport.keepalive import KeepAlive
from rpcnb.transport.loopthread import LoopThread, call_in_loop
from rpcnb.transport.terminal import PrintableFormatter
from rpcnb.transport.websocket import WebSocket

if TYPE_CHECKING:
    from collections.abc import Callable

    from rpcnb.cells.runners import MainThread
    from rpcnb.transport.channel import Channel, Note

__all__ = ["run_session"]

log = logging.getLogger(__name__)

_LOOP = "rpcnb-session"
_BROKEN = 71  # exit code
_COUNTING = 1.0  # seconds between two words of how many calls there were
_TRIAL = 10  # seconds in which a session must be there that is given enough memory
_ROOM = 32 << 20  # bytes that a session needs to work with: a few threads and buffers
_POWERS = ("native", "expose_ffi", "trusted_paths", "default_run", "runtime")


class _HandedOver(Connection):
    """A connection that the server has greeted: its key text is known, and what came behind it."""

    def __init__(self, host: SessionProcess, sock: Any, facts: dict[str, Any]) -> None:
        super().__init__(host, sock, tuple(facts["address"]))
        self.rest = base64.b64decode(facts["rest"])
        self.lane = facts["lane"]
        self.proof = None if facts["proof"] is None else tuple(facts["proof"])

    def _answer(self, options: dict[str, str]) -> str:
        """Nothing: the server did."""
        return ""


class SessionProcess(SessionHost):
    """Serves one session and its lanes.

    Args:
        options: The server's.
        channel: To the server.
        runner: Where remote cells run; None where there are none.
    """

    def __init__(self, options: dict[str, Any], channel: Channel, runner: MainThread | None) -> None:
        self.channel = channel
        self.over = threading.Event()
        self._refusal = ""
        self._main: Connection | None = None
        self._answers: dict[int, Callable[[Note], object]] = {}
        self._numbers = itertools.count(1)
        self._unsubscribe: Callable[[], None] | None = None
        self._loop = LoopThread(_LOOP)
        powers: dict[str, Any] = {name: options[name] for name in _POWERS}
        if runner is not None:
            from rpcnb.cells.cells import Cells

            powers["cells"] = Cells(runner)
        limits = Limits(**options["limits"])
        gate = Gate(options["key"], None)
        powers["jobs"] = self._ask_jobs
        super().__init__(options["key"], self._loop.io_loop, gate, limits, logging.DEBUG, powers)
        self._options = options
        self._counts = False  # what was counted is about to be told
        if options["watched"] is not None:
            self.watch_calls(each=options["watched"])

    def load(self) -> str:
        """Import the operator's modules; returns why that failed, in one line."""
        options = self._options
        try:
            before = ffi_global_names()
            self.environment.ffi_names = load_modules(options["load"], options["main"], before)
            self.environment.ffi_names |= frozenset(options["ffi_names"])
            load_at_start(self.environment, options["load_library"])
            if options["session"]:
                entry = REGISTRY.get(options["session"])
                if entry is None:
                    raise LookupError(
                        f"no session constructor is registered as {options['session']!r}; load its module with --load"
                    )
                self.environment.local_session = entry.call
        except BaseException as error:  # a module may exit
            lines = str(error).splitlines() or [""]
            kind = type(error).__name__
            self._refusal = lines[0] if isinstance(error, LookupError) else f"{kind}: {lines[0]}".rstrip(": ")
        return self._refusal

    def begin(self, first: Note) -> None:
        """Serve what the server hands over."""
        call_in_loop(self.io_loop, lambda: self._start(first))

    def _start(self, first: Note) -> None:
        self._begin()
        self._keep_alive = KeepAlive()
        self._hear(first)
        self.channel.listen(self.io_loop, self._hear, self._alone)

    def forked(self) -> None:
        """In a child that a function has forked: the server talks to its parent."""
        with contextlib.suppress(OSError):
            os.close(self.channel.sock.detach())
        super().forked()

    def _alone(self) -> None:
        """The server has gone."""
        os._exit(NO_MEMORY if self.channel.out_of_memory else 0)

    def _hear(self, note: Note) -> None:
        words = note.words
        if "open" in words:
            self._open(words["open"], note.descriptors[0])
        elif "answer" in words:
            take = self._answers.pop(words["answer"], None)
            if take is not None:
                take(note)
        elif "ask" in words:
            states = [state._asdict() for state in self.pending]
            self.channel.post({"answer": words["ask"], "states": states})
        elif "observe" in words:
            self._observe(words["observe"])
        elif "visitor" in words:
            self.environment.visitor = words["visitor"]

    def _open(self, facts: dict[str, Any], descriptor: int) -> None:
        """Go on with a client where the server has stopped."""
        sock: Any = socket.socket(fileno=descriptor)
        if facts["web"] is not None:
            sock = WebSocket.resumed(sock, facts["web"])
            self._keep_alive.add(sock)
        self.environment.directory, self.environment.visitor = facts["directory"], facts["visitor"]
        connection = _HandedOver(self, sock, facts)
        key = KeyText.parse(facts["key"])
        if connection.lane:
            main = self._main
            if main is None or main.closed:
                sock.close()
                return
            connection.main = main
            before = self.lanes.join(main, connection.lane, connection)
            if before is not None:
                before.close()
        else:
            self._main = connection
            self.lanes.issue(connection)
            self._observe(facts["observe"])
        self.adopt(connection)
        connection.begin(key, {}, self._refusal)
        if self._refusal:  # it has the time of a handshake to hear why
            self.io_loop.call_later(self.limits.handshake_timeout, connection.close)

    def _never_opened(self, connection: Connection) -> None:
        if connection is self._main:
            self._end()

    def _place_is_free(self, connection: Connection) -> None:
        self._end()

    def _drains(self, connection: Connection) -> None:
        self._end()

    def _note_call(self, *facts: Any) -> None:
        super()._note_call(*facts)
        if not self._counts:
            self._counts = True
            self.io_loop.add_callback(self.io_loop.call_later, _COUNTING, self._tell_counts)

    def _tell_counts(self) -> None:
        self._counts = False
        self.channel.post({"tally": self.tally.take()})

    def _end(self) -> None:
        main = self._main
        moved = (0, 0) if main is None else (main.received, main.sent)
        self._tell_counts()
        self.channel.post({"over": True, "native": "tvm_ffi" in sys.modules, "moved": moved})
        self.over.set()

    def _observe(self, wanted: bool) -> None:
        if self._unsubscribe is not None:
            self._unsubscribe()
        self._unsubscribe = self.observers.subscribe(self._report) if wanted else None

    def _report(self, event: events.Event) -> None:
        """Tell the server's observers what happens here; who comes and goes they know."""
        if isinstance(event, (events.ConnectionAccepted, events.ConnectionEnded)):
            return
        facts = asdict(event)
        del facts["source"]  # it is the server's there
        self.io_loop.add_callback(self.channel.post, {"event": type(event).__name__, "facts": facts})

    def _ask(self, words: dict[str, Any], data: bytes, take: Callable[[Note], object]) -> None:
        """Ask the server; from any thread."""

        def ask() -> None:
            number = next(self._numbers)
            self._answers[number] = take
            self.channel.post({"ask": number, **words}, data)

        self.io_loop.add_callback(ask)

    def _status(self, say: Callable[[dict[str, Any]], object]) -> None:
        """Say how the server is, not this process."""
        known = {"state": "READY", "kernel_busy": None}
        self._ask({"what": "counts"}, b"", lambda note: say({**known, **note.words["counts"]}))

    def _ask_jobs(self, words: dict[str, Any], data: bytes, answer: Callable[[dict[str, Any], bytes], object]) -> None:
        self._ask({"what": "jobs", "question": words}, data, lambda note: answer(note.words["reply"], note.data))

    @property
    def _drain_level(self) -> int:
        return logging.DEBUG


def run_session(options: dict[str, Any], channel: Channel, *, check: bool) -> int:
    """Serve one session; returns the exit code. With ``check`` only say whether its modules can be imported."""
    handler = logging.StreamHandler()
    handler.setFormatter(PrintableFormatter("%(levelname)s %(name)s: %(message)s"))
    logging.basicConfig(handlers=[handler])
    logging.getLogger().setLevel(options["log_level"])
    with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:
        file.write("1000")
    _limit(options)
    interval.hold(options["switch_interval"])
    threading.excepthook = _fail_in_one_line
    for name in ("asyncio", "tornado.application"):
        logging.getLogger(name).addFilter(_ends_without_memory)
    runner = None
    if options["allow_exec"]:
        from rpcnb.cells.runners import MainThread

        runner = MainThread()  # this thread has nothing else to do
    if check:
        why = _try(options, channel, runner)
        channel.send({"failed": why} if why else {"ready": True})
        _leave()
        return 0
    process = SessionProcess(options, channel, runner)
    note = _first_note(process, channel)
    if note is None:
        return 0
    if "job" in note.words:
        from rpcnb.server.jobprocess import run_job

        why = process.load()
        code = run_job(process.environment, channel, note, bool(options["allow_exec"]), process.limits.job_bytes, why)
        _leave()
        return code
    signal.signal(signal.SIGINT, signal.default_int_handler)
    process.load()
    process.begin(note)
    if runner is not None:
        runner.run(process.over.wait)
    else:
        process.over.wait()
    _leave()
    return 0


def _first_note(process: SessionProcess, channel: Channel) -> Note | None:
    """Wait for what is to be done; meanwhile do what a session would wait for."""
    if not select.select([channel.sock], [], [], 0)[0]:  # nobody waits
        rehearse(process.io_loop)
    return channel.receive()


def _ends_without_memory(record: logging.LogRecord) -> bool:
    """End where the loop itself had no memory, instead of logging that: it would find none the next time either."""
    if record.exc_info and isinstance(record.exc_info[1], MemoryError):
        os._exit(NO_MEMORY)
    return True


def _try(options: dict[str, Any], channel: Channel, runner: MainThread | None) -> str:
    """Say why a session cannot be had here: for its modules, or as the operator gives it too little memory."""
    if not options["memory"]:
        return SessionProcess(options, channel, runner).load()
    logging.disable()
    used = int(options["memory"])
    try:
        signal.alarm(_TRIAL)  # a thread without memory may never say that it has started
        process = SessionProcess(options, channel, runner)
        signal.alarm(0)
        why = process.load()
        if why:
            return why
        signal.alarm(_TRIAL)
        rehearse(process.io_loop)
        used = _data_bytes()
    except (MemoryError, RuntimeError, OSError):  # no thread, say
        pass
    if options["grouped"] or used + _ROOM <= options["memory"]:
        return ""
    return (
        f"--memory {options['memory'] >> 20}M is too little: a session has {used >> 20} MiB before it does anything, "
        f"and needs {_ROOM >> 20} MiB more to work with"
    )


def _data_bytes() -> int:
    """Return the bytes that count for RLIMIT_DATA."""
    with contextlib.suppress(OSError), open("/proc/self/status") as file:
        return next((int(line.split()[1]) << 10 for line in file if line.startswith("VmData:")), 0)
    return 0


def _fail_in_one_line(failed: threading.ExceptHookArgs) -> None:
    """End with the loop: a function has closed what it needs, say. Other threads are users'."""
    if failed.thread is None or failed.thread.name != _LOOP:
        threading.__excepthook__(failed)
        return
    if isinstance(failed.exc_value, MemoryError):
        os._exit(NO_MEMORY)
    log.error("the process %d of a session ends: its loop has failed: %s", os.getpid(), failed.exc_value)
    os._exit(_BROKEN)


def _leave() -> None:
    """Let the modules end what they have begun; without waiting for threads."""
    with contextlib.suppress(BaseException):
        atexit._run_exitfuncs()


def _limit(options: dict[str, Any]) -> None:
    """Bound what this process may use."""
    import resource

    if options["cpu_time"]:
        seconds = int(options["cpu_time"])
        _set_limit(resource.RLIMIT_CPU, seconds, seconds + 1)
    if options["memory"] and not options["grouped"]:
        _set_limit(resource.RLIMIT_DATA, options["memory"], options["memory"])


def _set_limit(which: int, soft: int, hard: int) -> None:
    """Bound something, within what this process has been given itself."""
    import resource

    most = resource.getrlimit(which)[1]
    if most != resource.RLIM_INFINITY:
        soft, hard = min(soft, most), min(hard, most)
    resource.setrlimit(which, (soft, hard))
