"""Detached jobs, at the server: work that outlives the session that began it.

Each has a process of its own and a directory (see jobrecords.py). They belong to the server's token: whoever has it
finds them, on another day and from another machine. Finished ones are kept for a week, and as long as there is room.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import re
import signal
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rpcnb.errors import LimitExceeded
from rpcnb.server.jobrecords import CANCELLED, DONE, FAILED, RUNNING, Records, fresh_facts
from rpcnb.server.processes import Child

if TYPE_CHECKING:
    from collections.abc import Callable, Container

    from tornado.ioloop import IOLoop

    from rpcnb.protocol.codes import Limits
    from rpcnb.server.processes import Processes
    from rpcnb.transport.channel import Note

    Answer = Callable[[dict[str, Any], bytes], object]

__all__ = ["Jobs", "state_directory"]

log = logging.getLogger(__name__)

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_KEPT = 7 * 86400.0  # seconds after its end
_PART = 4 << 20  # bytes of one answer
_WAIT = 20.0  # seconds for which a question for more output waits
_STOP = 5.0  # seconds after an interrupt at which a job that was cancelled is killed
_LEAVE = 2.0  # seconds that a job has to end by itself, once its result is there
_MOST_ERROR = 1 << 17  # characters of an error's text, and of its traceback
_TOGETHER = 2.0  # seconds before the server's end in which jobs that were killed have ended with it
_KILLS = ("signal:SIGTERM", "signal:SIGKILL")


def state_directory() -> Path:
    """Return where what outlives a server is kept; it need not exist."""
    chosen = os.environ.get("RPCNB_STATE_DIR")
    if chosen:
        return Path(chosen)
    base = os.environ.get("XDG_STATE_HOME")
    return (Path(base) if base else Path.home() / ".local" / "state") / "rpcnb"


def _told(facts: dict[str, Any], *, whole: bool = True) -> dict[str, Any]:
    """Return what a client is told of a job; among all of them in few words."""
    told = {name: value for name, value in facts.items() if name not in ("source", "kept", "server")}
    if not whole:
        error = facts["error"]
        brief = error and {**error, "text": error["text"][:500], "traceback": ""}
        told |= {"files": facts["files"][:20], "error": brief}
    return told


class _Job(Child):
    """One job's process, and what is known of it."""

    def __init__(self, jobs: Jobs, facts: dict[str, Any], data: bytes, answer: Answer, owner: object) -> None:
        super().__init__(jobs.processes, None)
        self.owner = owner
        self._jobs = jobs
        self.facts = facts
        self.root = jobs.records.root / facts["name"]
        self._data = data
        self._answer: Answer | None = answer
        self._asked: list[Callable[[], object]] = []  # who waits for more output, or the end
        self._pipe: int | None = None
        self._began = False  # it can be interrupted
        self._cancelled = False
        self.end: dict[str, Any] = {}  # how it has ended, as far as is known: state, error, how

    def begin(self) -> None:
        """It is there: tell it what to do."""
        if self.how:  # it was cancelled meanwhile
            self._say({"job": _told(self.facts)})
            return
        reading, writing = os.pipe()
        os.set_blocking(reading, False)
        self._pipe = reading
        self.processes.io_loop.add_handler(reading, self._on_output, self.processes.io_loop.READ)
        words = {name: self.facts[name] for name in ("name", "function", "source")}
        self.channel.post({"job": {**words, "directory": str(self.root)}}, self._data, [writing])
        self._data = b""
        self._say({"job": _told(self.facts)})

    def _say(self, words: dict[str, Any]) -> None:
        answer, self._answer = self._answer, None
        if answer is not None:
            answer(words, b"")

    def _on_output(self, *_: Any) -> None:
        assert self._pipe is not None
        try:
            data = os.read(self._pipe, 1 << 16)
        except BlockingIOError:
            return
        if data:
            self._keep(data)
        else:
            self._close_pipe()

    def _close_pipe(self) -> None:
        pipe, self._pipe = self._pipe, None
        if pipe is not None:
            self.processes.io_loop.remove_handler(pipe)
            os.close(pipe)

    def _keep(self, data: bytes) -> None:
        """Append to its output, of which the end is kept."""
        most = self._jobs.limits.job_output
        path = self.root / "output"
        try:
            with open(path, "ab") as file:
                file.write(data)
            self.facts["output"] += len(data)
            if path.stat().st_size > 2 * most:
                with open(path, "rb") as file:
                    file.seek(-most, os.SEEK_END)
                    rest = file.read()
                path.with_suffix(".new").write_bytes(rest)
                os.replace(path.with_suffix(".new"), path)
        except OSError as error:
            log.warning("the output of the job %s cannot be kept: %s", self.facts["name"], error.strerror)
        self.tell()

    def when_more(self, go_on: Callable[[], object]) -> None:
        """Call ``go_on`` when there is more output, at the end, or after a while."""
        called = False

        def once() -> None:
            nonlocal called
            if not called:
                called = True
                go_on()

        self._asked.append(once)
        self.processes.io_loop.call_later(_WAIT, once)

    def tell(self) -> None:
        """Tell who waits."""
        asked, self._asked = self._asked, []
        for go_on in asked:
            go_on()

    def hear(self, note: Note) -> None:
        """Take what it says."""
        if "began" in note.words:
            self._began = True
        elif "done" in note.words:
            told = note.words["done"]
            error = told and {name: str(told[name])[:_MOST_ERROR] for name in ("type", "text", "traceback")}
            self.end = {"state": FAILED if error else DONE, "error": error}
            self.later(_LEAVE, "closed")  # what it has started may hold it

    def cancel(self) -> None:
        """Interrupt it, and kill it if that does not help; or at once, if its function has not been called yet."""
        self._cancelled = True
        if self._began:
            self.processes.tell_zygote({"kill": self.pid, "signal": signal.SIGINT})
            self.later(_STOP, "cancelled")
        else:
            self.kill("cancelled")

    def refused(self, why: str) -> None:
        """It could not be made."""
        self._jobs.never_began(self)
        self._say({"error": f"no process for the job: {why}; try again later"})
        self.tell()

    def release(self) -> None:
        """Let go of everything; what it has printed last is read."""
        while self._pipe is not None:
            before = self._pipe
            with contextlib.suppress(OSError):
                data = os.read(before, 1 << 16)
                if data:
                    self._keep(data)
                    continue
            self._close_pipe()
        super().release()

    def ended(self, how: str) -> None:
        """Its process has ended."""
        self.end = {"ended": time.time(), **(self.end or {"state": FAILED, "how": how})}
        if self._cancelled and self.end["state"] == FAILED:
            self.end |= {"state": CANCELLED, "how": ""}
        self._jobs.look_at(self)

    def told(self) -> None:
        """Its end is known: say so to all who wait."""
        self._say({"job": _told(self.facts)})
        self.tell()


class Jobs:
    """The jobs of a server's token.

    Args:
        processes: Where their processes are made.
        name: What they belong to: they are found again under the same one.
        io_loop: The server's loop.
        limits: How many there may be, and how much they may keep.
        on_end: Called with the owner of one that has ended: the session that began it.
    """

    def __init__(
        self, processes: Processes, name: str, io_loop: IOLoop, limits: Limits, on_end: Callable[[Any], object]
    ) -> None:
        self.processes = processes
        self.limits = limits
        self._io_loop = io_loop
        self._on_end = on_end
        root = state_directory() / "jobs" / hashlib.sha256(name.encode()).hexdigest()[:20]
        self.records = Records(root, limits.job_bytes)
        self._running: dict[str, _Job] = {}
        self._ended: dict[str, dict[str, Any]] = {facts["name"]: facts for facts in self.records.find()}  # oldest first
        self._make_room()

    def _make_room(self, newest: str = "") -> None:
        """Drop those that ended long ago, and the oldest where there is no room for all; the newest one stays."""
        now = time.time()
        for name, facts in list(self._ended.items()):
            full = len(self._ended) + len(self._running) > self.limits.jobs or self._kept() > self.limits.job_bytes
            if (full and name != newest) or now - facts["ended"] > _KEPT:
                self._drop(name)

    def _kept(self) -> int:
        return sum(int(facts["kept"]) for facts in self._ended.values())

    def _drop(self, name: str) -> None:
        self._ended.pop(name, None)
        self.records.drop(name)

    @property
    def any(self) -> bool:
        """Tell whether there are some, running or not."""
        return bool(self._running or self._ended)

    def held(self, sessions: Container[Any]) -> list[str]:
        """Return the names of those that run although the session that began them is none of ``sessions``."""
        return [name for name, job in self._running.items() if job.owner not in sessions]

    def of(self, owner: object) -> list[str]:
        """Return the names of those that run and that this session has begun."""
        return [name for name, job in self._running.items() if job.owner is owner]

    def never_began(self, job: _Job) -> None:
        """Note that there is no process for one."""
        self._running.pop(job.facts["name"], None)
        self.records.drop(job.facts["name"])

    def look_at(self, job: _Job) -> None:
        """See in a thread what one has left whose process has ended: there may be many files; then note its end."""

        def look() -> None:
            left = self.records.left(job.facts["name"])
            with contextlib.suppress(RuntimeError):  # the loop is closed
                self._io_loop.add_callback(self._note_end, job, left)

        threading.Thread(target=look, name="rpcnb-job", daemon=True).start()

    def _note_end(self, job: _Job, left: dict[str, Any]) -> None:
        """Keep what is known of one that has ended."""
        facts, name = job.facts, job.facts["name"]
        if self._running.get(name) is not job:  # the server has been closed meanwhile
            return
        del self._running[name]
        facts |= job.end | left
        self.records.write(facts)
        self._ended[name] = facts
        self._make_room(name)
        self._on_end(job.owner)
        job.told()

    # -- what clients ask --------------------------------------------------------------------------------------------

    def ask(self, words: dict[str, Any], data: bytes, answer: Answer) -> None:
        """Do what a client asks; ``answer`` gets words and bytes, now or later."""
        try:
            way: Callable[[dict[str, Any], bytes, Answer], object] = {
                "start": self._start,
                "list": self._list,
                "state": self._state,
                "output": self._output,
                "read": self._read,
                "cancel": self._cancel,
                "forget": self._forget,
            }[words["op"]]
            way(words, data, answer)
        except (LookupError, ValueError, TypeError, LimitExceeded, OSError) as error:
            answer({"error": str(error.args[0] if isinstance(error, LookupError) and error.args else error)}, b"")

    def _facts(self, words: dict[str, Any]) -> dict[str, Any]:
        name = words["name"]
        if name in self._running:
            return self._running[name].facts
        if name in self._ended:
            return self._ended[name]
        known = ", ".join([*self._ended, *self._running]) or "none"
        raise LookupError(f"no job {name!r}; there are {known}")

    def _start(self, words: dict[str, Any], data: bytes, answer: Answer) -> None:
        name = words["name"]
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            raise ValueError(f"expected a job's name of letters, digits, '.', '_' and '-', got {str(name)[:80]!r}")
        if name in self._running or name in self._ended:
            raise ValueError(f"there is a job {name!r} already ({self._facts(words)['state']}); forget() it first")
        if len(self._running) >= self.limits.jobs:
            raise LimitExceeded(f"{len(self._running)} jobs are running, jobs={self.limits.jobs}")
        if self.processes.broken:
            raise OSError(self.processes.broken)
        facts = fresh_facts(name, str(words.get("function") or ""), words.get("source"))
        self.records.make(facts)
        job = _Job(self, facts, data, answer, words.get("owner"))
        self._running[name] = job
        self._make_room()
        self.processes.fork(job)

    def _list(self, words: dict[str, Any], data: bytes, answer: Answer) -> None:
        found = [*self._ended.values(), *(job.facts for job in self._running.values())]
        answer({"jobs": [_told(facts, whole=False) for facts in found]}, b"")

    def _state(self, words: dict[str, Any], data: bytes, answer: Answer) -> None:
        facts = self._facts(words)
        job = self._running.get(facts["name"])
        if words.get("until_end") and job is not None:
            job.when_more(lambda: answer({"job": _told(facts)}, b""))
        else:
            answer({"job": _told(facts)}, b"")

    def _output(self, words: dict[str, Any], data: bytes, answer: Answer) -> None:
        """Return output from an offset on; with ``wait`` there is some, or the job has ended, or time went by."""
        facts, at = self._facts(words), int(words["at"])
        job = self._running.get(facts["name"])
        if words.get("wait") and job is not None and at >= facts["output"]:
            job.when_more(lambda: self._output({**words, "wait": False}, data, answer))
            return
        path = self.records.root / facts["name"] / "output"
        kept = path.stat().st_size if path.exists() else 0
        at = max(at, facts["output"] - kept)
        found = b""
        if kept:
            with open(path, "rb") as file:
                file.seek(at - (facts["output"] - kept))
                found = file.read(_PART)
        answer({"job": _told(facts), "at": at}, found)

    def _read(self, words: dict[str, Any], data: bytes, answer: Answer) -> None:
        facts, at = self._facts(words), int(words["at"])
        root = self.records.root / facts["name"]
        path = root / "result" if words["file"] is None else root / "files" / str(words["file"])
        inside = path.resolve().is_relative_to((root / "files").resolve())
        if words["file"] is not None and not (inside and path.is_file()):
            why = facts["left_out"] or f"it has {facts['files'][:20]}"
            raise LookupError(f"the job {facts['name']!r} has no file {words['file']!r}; {why}")
        with open(path, "rb") as file:
            file.seek(max(0, at))
            answer({"job": _told(facts), "size": path.stat().st_size}, file.read(_PART))

    def _cancel(self, words: dict[str, Any], data: bytes, answer: Answer) -> None:
        facts = self._facts(words)
        job = self._running.get(facts["name"])
        if job is None:
            answer({"job": _told(facts), "cancelled": False}, b"")
            return
        job.cancel()

        def tell() -> None:
            if facts["state"] == RUNNING:
                job.when_more(tell)  # it is killed before long
            else:
                answer({"job": _told(facts), "cancelled": facts["state"] == CANCELLED}, b"")  # it may just have ended

        tell()

    def _forget(self, words: dict[str, Any], data: bytes, answer: Answer) -> None:
        facts = self._facts(words)
        if facts["name"] in self._running:
            raise ValueError(f"the job {facts['name']!r} is running; cancel() it first")
        self._drop(facts["name"])
        answer({}, b"")

    def close(self) -> None:
        """The server ends: what runs ends with it, and the reason is kept; on the loop."""
        now = time.time()
        for job in self._running.values():
            job.facts |= {"ended": now, **(job.end or {"state": FAILED, "how": "restart"})}
            self._ended[job.facts["name"]] = job.facts
        for facts in self._ended.values():
            if facts["how"] in _KILLS and now - facts["ended"] < _TOGETHER:  # by whoever stops all processes at once
                facts["how"] = "restart"
            if now - facts["ended"] < _TOGETHER:
                self.records.write(facts)
        self._running.clear()
        self.records.close()

    def forked(self) -> None:
        """In a forked child of the server: the jobs are the parent's."""
        self._running.clear()
        self.records.forked()
