"""Processes that the zygote forks for a server, as the server sees them: started, heard, ended, released.

Token and listening sockets stay in the server, which never becomes one of them. They contain crashes; they are no
sandbox: they are the same user's.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from typing import TYPE_CHECKING, Any

from rpcnb.errors import IsolationFailed
from rpcnb.server.cgroup import NO_MEMORY, MemoryGroups
from rpcnb.server.zygote import ONE_THREAD, SOON_ASLEEP
from rpcnb.transport.backoff import Backoff
from rpcnb.transport.channel import Channel

if TYPE_CHECKING:
    from pathlib import Path

    from tornado.ioloop import IOLoop

    from rpcnb.transport.channel import Note

__all__ = ["Child", "Processes"]

log = logging.getLogger(__name__)

_START = 120.0  # seconds for the zygote to import what it needs, and for the operator's modules
_CLOSE = 3.0  # seconds for all processes to end
_ENDED = "the process that makes those of sessions has ended"
_LOOK = 0.01  # seconds between two looks at whether what was killed has ended
_PAUSE = 0.02  # seconds that a session that begins has the machine for itself, before the next one is prepared


class _Forked:
    """A process that the zygote has been asked for.

    Raises:
        OSError: There are no descriptors left.

    Attributes:
        channel: To it.
        theirs: Its end of that; closed once it is there.
        pid: Its number; 0 before it is there.
        group: What bounds its memory.
        child: What it is for; None while it is the spare one.
    """

    def __init__(self) -> None:
        ours, self.theirs = socket.socketpair()
        self.channel = Channel(ours)
        self.pid = 0
        self.group: Path | None = None
        self.child: Child | None = None

    @property
    def is_alive(self) -> bool:
        """Tell whether it has not ended; the zygote may not have told yet."""
        try:
            return self.channel.sock.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT) != b""
        except BlockingIOError:
            return True
        except OSError:
            return False

    def release(self) -> None:
        """Let go of everything."""
        self.theirs.close()
        self.channel.close()


class Child:
    """What a process is for, said by subclasses. Methods run on the loop.

    Args:
        processes: Where it is made.
        directory: What it may leave there is removed after its end; None: nothing is.

    Attributes:
        pid: The process's number; 0 before it is there.
        channel: To the process, once it is there.
        how: Why the server is ending it; empty if it is not.
    """

    channel: Channel

    def __init__(self, processes: Processes, directory: str | None) -> None:
        self.processes = processes
        self.directory = directory
        self.pid = 0
        self.how = ""
        self.released = False
        self._timers: list[Any] = []

    def begin(self) -> None:
        """It is there: tell it what to do."""

    def hear(self, note: Note) -> None:
        """Take what it says."""

    def refused(self, why: str) -> None:
        """It could not be made."""

    def ended(self, how: str) -> None:
        """It has ended: ``closed``, ``signal:SIGSEGV``, ``exit:3``, or why the server has ended it."""

    def forked(self, process: _Forked) -> None:
        """Note that it is there."""
        self.pid, self.channel = process.pid, process.channel
        self.channel.listen(self.processes.io_loop, self._heard, lambda: None)
        self.begin()
        if self.how:
            self.kill(self.how)

    def _heard(self, note: Note) -> None:
        """Take what it says; foreign code may run there, and say anything."""
        try:
            self.hear(note)
        except Exception as error:
            log.warning("%s: the process %d said what it should not: %s", self.processes.name, self.pid, error)
            self.kill("closed")
        for descriptor in note.descriptors:  # it is to send none
            os.close(descriptor)

    def later(self, seconds: float, how: str) -> None:
        """End it after some seconds, if it has not ended by itself."""
        self._timers.append(self.processes.io_loop.call_later(seconds, self.kill, how))

    def kill(self, how: str) -> None:
        """End it."""
        self.how = self.how or how
        if self.pid:
            self.processes.tell_zygote({"kill": self.pid})

    def release(self) -> None:
        """Let go of everything."""
        self.released = True
        for timer in self._timers:
            self.processes.io_loop.remove_timeout(timer)
        if self.directory is not None:  # it may be large
            remove = threading.Thread(
                target=shutil.rmtree, args=(self.directory, True), name="rpcnb-remove", daemon=True
            )
            remove.start()


class Processes:
    """The zygote, and what it has forked.

    Args:
        name: Of the server, for messages.
        io_loop: The server's loop.
        options: What processes need (``Isolation.options``).

    Raises:
        IsolationFailed: The operator's modules cannot be imported; the text is one line.
    """

    def __init__(self, name: str, io_loop: IOLoop, options: dict[str, Any]) -> None:
        self.name = name
        self.io_loop = io_loop
        self.broken = ""  # why there is no zygote
        self._warm: tuple[str, ...] = ()  # modules that sessions have needed: those to come find them imported
        self._groups = MemoryGroups.open(options["memory"]) if options["memory"] else None
        self.directory = tempfile.mkdtemp(prefix="rpcnb-server-")
        self._options = {**options, "grouped": self._groups is not None, "directory": self.directory}
        self._numbers = itertools.count(1)
        self._forking: dict[int, _Forked] = {}  # by number of the request
        self._forked: dict[int, _Forked] = {}  # by process
        self._spare: _Forked | None = None  # what the next session need not wait for
        self._closed = False
        self._closing = threading.Event()
        self._left: set[int] = set()  # processes that there were when it was closed
        self._again: threading.Thread | None = None  # starts another zygote
        try:
            self._start()
        except BaseException:
            shutil.rmtree(self.directory, ignore_errors=True)
            raise

    # -- the zygote ----------------------------------------------------------------------------------------------

    def _start(self) -> None:
        """Start the zygote and wait until it is ready; it also tries whether the modules can be imported."""
        ours, theirs = socket.socketpair()
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "rpcnb.server.zygote", str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                env={**SOON_ASLEEP, **os.environ, **ONE_THREAD},
                stdin=subprocess.DEVNULL,
                start_new_session=True,  # Ctrl-C is meant for the server
            )
        channel = Channel(ours)
        try:
            ours.settimeout(_START)
            channel.send(self._options)
            preload = ", ".join(self._options["preload"])
            _await(channel, "ready", f"a module of --preload ({preload}) has ended it" if preload else _ENDED)
            self._check(channel)
            ours.settimeout(None)
        except BaseException as error:
            channel.close()
            self._end_zygote()
            if isinstance(error, OSError):
                raise IsolationFailed(f"{_ENDED}: {error}") from None
            raise
        self._zygote = channel

    def _check(self, channel: Channel) -> None:
        """Import the operator's modules once, in a process that does nothing else."""
        ours, theirs = socket.socketpair()
        trial = Channel(ours)
        ours.settimeout(_START)
        try:
            with theirs:
                channel.send({"fork": 0, "check": True}, b"", [theirs.fileno()])
                _await(channel, "forked", _ENDED)
            _await(trial, "ready", self._why_no_trial())
        finally:
            trial.close()
        _await(channel, "ended", _ENDED)

    def _why_no_trial(self) -> str:
        memory, load = self._options["memory"], ", ".join(map(str, self._options["load"]))
        why = [f"a module of --load ({load}) has ended the process that imported it"] if load else []
        why += [f"--memory {memory >> 20}M is too little for a session"] if memory else []
        return ", or ".join(why) or "the process that tries whether there can be sessions has ended"

    def listen(self) -> None:
        """Begin to work; on the loop."""
        self._zygote.listen(self.io_loop, self._hear, self._zygote_ended)
        if self._warm:
            self.tell_zygote({"warm": self._warm})
        self._prepare()

    def tell_zygote(self, words: dict[str, Any]) -> None:
        """Ask the zygote for something."""
        if not self.broken and not self._closed:
            self._zygote.post(words)

    def fork(self, child: Child) -> None:
        """Have a process made, or take the spare one."""
        process, self._spare = self._spare, None
        try:
            if process is None or not process.is_alive:
                process = self._ask_for_one()
        except OSError as error:
            child.release()
            child.refused(str(error.strerror))
            return
        process.child = child
        if process.pid:
            child.forked(process)
        self.io_loop.call_later(_PAUSE, self._prepare)

    def _ask_for_one(self) -> _Forked:
        process = _Forked()
        number = next(self._numbers)
        self._forking[number] = process
        self._zygote.post({"fork": number}, b"", [process.theirs.detach()])
        return process

    def _prepare(self) -> None:
        """Have a process made that is ready when the next session begins: that takes ten times as long as the rest."""
        if self._spare is None and not self._closed and not self.broken:
            with contextlib.suppress(OSError):  # who needs one is told
                self._spare = self._ask_for_one()

    def warm(self, modules: tuple[str, ...]) -> None:
        """Let the processes to come have these modules imported."""
        if modules != self._warm:
            self._warm = modules
            self.tell_zygote({"warm": modules})

    def _warmed(self) -> None:
        """Replace the process that waits for a session: it is from before the import, unless it is made just now."""
        spare = self._spare
        if spare is not None and spare.pid:
            self._spare = None
            self.tell_zygote({"kill": spare.pid})
            self._prepare()

    def make_directory(self) -> str:
        """Return a fresh directory for what a process may leave.

        Raises:
            OSError: There is no room.
        """
        return tempfile.mkdtemp(prefix="session-", dir=self.directory)

    def _hear(self, note: Note) -> None:
        words = note.words
        if "forked" in words:
            process = self._forking.pop(words["forked"])
            process.pid = words["pid"]
            self._forked[process.pid] = process
            if self._groups is not None:
                with contextlib.suppress(OSError):
                    process.group = self._groups.make()
                    self._groups.put(process.group, process.pid)
            if process.child is not None:
                process.child.forked(process)
        elif "failed" in words:
            self._note_failure(self._forking.pop(words["failed"]), words["why"])
        elif "warmed" in words:
            self._warmed()
        elif "ended" in words and words["ended"] in self._forked:
            self._note_end(self._forked.pop(words["ended"]), words["status"])

    def _note_failure(self, process: _Forked, why: str) -> None:
        process.release()
        if process is self._spare:
            self._spare = None
        if process.child is not None:
            process.child.release()
            process.child.refused(why)

    def _note_end(self, process: _Forked, status: int) -> None:
        process.release()
        if process is self._spare:
            self._spare = None
        used_up = process.group is not None and MemoryGroups.remove(process.group)
        used_up |= self._options["memory"] is not None and os.waitstatus_to_exitcode(status) == NO_MEMORY
        child = process.child
        if child is not None:
            child.release()
            child.ended(child.how or ("memory" if used_up else _how(status)))

    def _zygote_ended(self) -> None:
        """All processes have ended with it, and what they have left is; another zygote is started."""
        if self._closed:
            return
        self.broken = _ENDED
        log.error("%s: %s; all its sessions have ended with it", self.name, _ENDED)
        forking, self._forking = list(self._forking.values()), {}
        for process in forking:
            self._note_failure(process, _ENDED)
        forked, self._forked = self._forked, {}
        for process in forked.values():
            self._note_end(process, signal.SIGKILL)
        self._again = threading.Thread(target=self._start_again, args=({*forked},), name="rpcnb-zygote", daemon=True)
        self._again.start()

    def _start_again(self, left: set[int]) -> None:
        self._process.wait()
        _kill_sessions(left)
        backoff = Backoff()
        while not self._closing.is_set():
            try:
                os.makedirs(self.directory, exist_ok=True)
                self._start()
            except (IsolationFailed, OSError) as error:
                if self.broken != str(error):  # once, not at every try
                    self.broken = str(error)
                    log.error("%s: no sessions until this is mended: %s", self.name, error)
                self._closing.wait(backoff.next())
                continue
            if self._closing.is_set():
                self._zygote.close()
                return
            with contextlib.suppress(RuntimeError):  # the loop is closed
                self.io_loop.add_callback(self._go_on)
            return

    def _go_on(self) -> None:
        if self._closed:
            self._zygote.close()
            return
        log.warning("%s: there are processes for sessions again", self.name)
        self.broken = ""
        self.listen()

    def forked(self) -> None:
        """In a forked child of the server's process: what is open to processes is the parent's."""
        for channel in [
            self._zygote,
            *(process.channel for process in [*self._forking.values(), *self._forked.values()]),
        ]:
            with contextlib.suppress(OSError):
                os.close(channel.sock.detach())

    def close(self) -> None:
        """End all processes; on the loop."""
        self._closed = True
        self._closing.set()
        self._left = {*self._forked}
        for process in [*self._forking.values(), *self._forked.values()]:
            process.release()
            if process.child is not None:
                process.child.release()
        self._zygote.close()

    def wait(self) -> None:
        """Return when all processes have ended; the loop need not run any more."""
        if self._again is not None:
            self._again.join(_CLOSE)
            self._process.kill()  # a module may never be imported
            self._again.join()
        self._end_zygote()
        if self._left:  # the zygote looks after what they have left, but it may have been killed
            _kill_sessions(self._left)
        shutil.rmtree(self.directory, ignore_errors=True)

    def _end_zygote(self) -> None:
        try:
            self._process.wait(_CLOSE)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def _kill_sessions(leaders: set[int]) -> None:
    """Kill what is left of sessions (in the system's sense) whose leaders have ended."""
    until = time.monotonic() + _CLOSE  # one that waits for a device cannot be killed
    while time.monotonic() < until:
        found = False
        for word in os.listdir("/proc"):
            if word.isdecimal():
                with contextlib.suppress(OSError):
                    if os.getsid(int(word)) in leaders and not _is_dead(word):
                        os.kill(int(word), signal.SIGKILL)
                        found = True
        if not found:
            return
        time.sleep(_LOOK)


def _is_dead(pid: str) -> bool:
    """Tell whether nobody has taken note of a process's end yet."""
    with open(f"/proc/{pid}/stat") as file:
        return file.read().rpartition(")")[2].split()[0] in "ZX"


def _await(channel: Channel, word: str, otherwise: str) -> None:
    note = channel.receive()
    if note is None or word not in note.words:
        raise IsolationFailed(note.words.get("why") or note.words["failed"] if note is not None else otherwise)


def _how(status: int) -> str:
    """Say how a process has ended, as clients are told."""
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        if number == signal.SIGXCPU:
            return "cpu"
        with contextlib.suppress(ValueError):
            return f"signal:{signal.Signals(number).name}"
        return f"signal:{number}"
    code = os.WEXITSTATUS(status)
    return "closed" if code == 0 else f"exit:{code}"
