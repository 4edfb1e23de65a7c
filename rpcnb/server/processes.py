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
from typing import TYPE_CHECKING, Any

from rpcnb.errors import IsolationFailed
from rpcnb.server.cgroup import MemoryGroups
from rpcnb.server.zygote import ONE_THREAD
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


class Child:
    """One process; subclasses say what it is for. Methods run on the loop.

    Args:
        processes: Where it is made.
        directory: What it may leave there is removed after its end; None: nothing is.

    Attributes:
        pid: Its number; 0 before it is there.
        how: Why the server is ending it; empty if it is not.
    """

    def __init__(self, processes: Processes, directory: str | None) -> None:
        self.processes = processes
        self.directory = directory
        self.pid = 0
        self.how = ""
        self.released = False
        self.group: Path | None = None  # that bounds its memory
        self._timers: list[Any] = []
        ours, self.theirs = socket.socketpair()
        self.channel = Channel(ours)

    def begin(self) -> None:
        """It is there: tell it what to do."""

    def hear(self, note: Note) -> None:
        """Take what it says."""

    def refused(self, why: str) -> None:
        """It could not be made."""

    def ended(self, how: str) -> None:
        """It has ended: ``closed``, ``signal:SIGSEGV``, ``exit:3``, or why the server has ended it."""

    def forked(self, pid: int) -> None:
        """Note that it is there."""
        self.pid = pid
        self.theirs.close()
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
        self.theirs.close()
        self.channel.close()
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
        self._groups = MemoryGroups.open(options["memory"]) if options["memory"] else None
        self.directory = tempfile.mkdtemp(prefix="rpcnb-server-")
        self._options = {**options, "grouped": self._groups is not None, "directory": self.directory}
        self._numbers = itertools.count(1)
        self._forking: dict[int, Child] = {}  # by number of the request
        self._children: dict[int, Child] = {}  # by process
        self._closed = False
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
                env={**os.environ, **ONE_THREAD},
                stdin=subprocess.DEVNULL,
                start_new_session=True,  # Ctrl-C is meant for the server
            )
        channel = Channel(ours)
        try:
            ours.settimeout(_START)
            channel.send(self._options)
            _await(channel, "ready", _ENDED)
            self._check(channel)
            ours.settimeout(None)
        except BaseException as error:
            channel.close()
            self._end_zygote()
            if isinstance(error, OSError):
                raise IsolationFailed(f"{_ENDED}: {error}") from None
            raise
        self._zygote = channel

    @staticmethod
    def _check(channel: Channel) -> None:
        """Import the operator's modules once, in a process that does nothing else."""
        ours, theirs = socket.socketpair()
        trial = Channel(ours)
        ours.settimeout(_START)
        try:
            with theirs:
                channel.send({"fork": 0, "check": True}, b"", [theirs.fileno()])
                _await(channel, "forked", _ENDED)
            _await(trial, "ready", "a module of --load has ended the process that imported it")
        finally:
            trial.close()
        _await(channel, "ended", _ENDED)

    def listen(self) -> None:
        """Begin to work; on the loop."""
        self._zygote.listen(self.io_loop, self._hear, self._zygote_ended)

    def tell_zygote(self, words: dict[str, Any]) -> None:
        """Ask the zygote for something."""
        if not self.broken and not self._closed:
            self._zygote.post(words)

    def fork(self, child: Child) -> None:
        """Have a process made."""
        number = next(self._numbers)
        self._forking[number] = child
        self._zygote.post({"fork": number}, b"", [child.theirs.detach()])

    def make_directory(self) -> str:
        """Return a fresh directory for what a process may leave.

        Raises:
            OSError: There is no room.
        """
        return tempfile.mkdtemp(prefix="session-", dir=self.directory)

    def _hear(self, note: Note) -> None:
        words = note.words
        if "forked" in words:
            child = self._forking.pop(words["forked"])
            self._children[words["pid"]] = child
            if self._groups is not None:
                with contextlib.suppress(OSError):
                    child.group = self._groups.make()
                    self._groups.put(child.group, words["pid"])
            child.forked(words["pid"])
        elif "failed" in words:
            child = self._forking.pop(words["failed"])
            child.release()
            child.refused(words["why"])
        elif "ended" in words and words["ended"] in self._children:
            self._note_end(self._children.pop(words["ended"]), words["status"])

    def _note_end(self, child: Child, status: int) -> None:
        child.release()
        used_up = child.group is not None and MemoryGroups.remove(child.group)
        child.ended(child.how or ("memory" if used_up else _how(status)))

    def _zygote_ended(self) -> None:
        """All processes have ended with it; another is started."""
        if self._closed:
            return
        self.broken = _ENDED
        log.error("%s: %s; all its sessions have ended with it", self.name, _ENDED)
        forking, self._forking = list(self._forking.values()), {}
        for child in forking:
            child.release()
            child.refused(_ENDED)
        children, self._children = list(self._children.values()), {}
        for child in children:
            self._note_end(child, signal.SIGKILL)
        threading.Thread(target=self._start_again, name="rpcnb-zygote", daemon=True).start()

    def _start_again(self) -> None:
        self._process.wait()
        try:
            os.makedirs(self.directory, exist_ok=True)
            self._start()
        except (IsolationFailed, OSError) as error:
            self.broken = str(error)
            log.exception("%s: no sessions any more", self.name)
            return

        def go_on() -> None:
            self.broken = ""
            self.listen()

        self.io_loop.add_callback(go_on)

    @property
    def children(self) -> list[Child]:
        """Those that are there, oldest first."""
        return list(self._children.values())

    def forked(self) -> None:
        """In a forked child of the server's process: what is open to processes is the parent's."""
        for channel in [self._zygote, *(child.channel for child in [*self._forking.values(), *self.children])]:
            with contextlib.suppress(OSError):
                os.close(channel.sock.detach())

    def close(self) -> None:
        """End all processes; on the loop."""
        self._closed = True
        for child in [*self._forking.values(), *self._children.values()]:
            child.release()
        self._zygote.close()

    def wait(self) -> None:
        """Return when all processes have ended; the loop need not run any more."""
        self._end_zygote()
        shutil.rmtree(self.directory, ignore_errors=True)

    def _end_zygote(self) -> None:
        try:
            self._process.wait(_CLOSE)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


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
