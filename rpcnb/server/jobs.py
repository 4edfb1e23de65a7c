"""Detached jobs, at the server: work that outlives the session that began it.

Each has a process of its own and a directory: ``job.json`` (what is known of it), ``output`` (what it has printed),
``result`` (a parcel) and ``files``. They belong to the server's token: whoever has it finds them, on another day and
from another machine. Finished ones are kept for a week, and as long as there is room.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import re
import shutil
import signal
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rpcnb.errors import LimitExceeded
from rpcnb.server.processes import Child
from rpcnb.transport.runfiles import write_atomically

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
_RUNNING = "running"


def state_directory() -> Path:
    """Return where what outlives a server is kept; it need not exist."""
    chosen = os.environ.get("RPCNB_STATE_DIR")
    if chosen:
        return Path(chosen)
    base = os.environ.get("XDG_STATE_HOME")
    return (Path(base) if base else Path.home() / ".local" / "state") / "rpcnb"


def _told(facts: dict[str, Any], *, whole: bool = True) -> dict[str, Any]:
    """Return what a client is told of a job; among all of them in few words."""
    told = {name: value for name, value in facts.items() if name not in ("source", "kept")}
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
        self.root = jobs.root / facts["name"]
        self._data = data
        self._answer: Answer | None = answer
        self._asked: list[Callable[[], object]] = []  # who waits for more output, or the end
        self._pipe: int | None = None
        self._cancelled = False
        self._outcome: tuple[str, dict[str, Any] | None] | None = None  # told before its end: state and error

    def begin(self) -> None:
        """It is there: tell it what to do."""
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
        if "done" in note.words:
            self._outcome = ("failed", note.words["done"]) if note.words["done"] else ("done", None)

    def cancel(self) -> None:
        """Interrupt it; kill it if that does not help."""
        self._cancelled = True
        with contextlib.suppress(OSError):
            os.kill(self.pid, signal.SIGINT)
        self.later(_STOP, "cancelled")

    def refused(self, why: str) -> None:
        """It could not be made."""
        self._jobs.forget_running(self)
        shutil.rmtree(self.root, ignore_errors=True)
        self._say({"error": f"no process for the job: {why}; try again later"})

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
        """It has ended."""
        self._jobs.forget_running(self)
        if self._outcome is not None:
            self.facts["state"], self.facts["error"] = self._outcome
        else:
            self.facts |= {"state": "failed", "how": how}
        if self._cancelled and self.facts["state"] == "failed":
            self.facts |= {"state": "cancelled", "how": ""}
        self._jobs.note_end(self.facts, self.owner)
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
        self.root = state_directory() / "jobs" / hashlib.sha256(name.encode()).hexdigest()[:20]
        self._running: dict[str, _Job] = {}
        self._ended: dict[str, dict[str, Any]] = {}  # oldest first
        self._find()

    def _find(self) -> None:
        """Find those of before; whose server has ended while they ran, have ended with it."""
        found = []
        for path in self.root.glob("*/job.json"):
            with contextlib.suppress(OSError, ValueError, KeyError):
                facts = json.loads(path.read_text())
                if facts["state"] == _RUNNING:
                    facts |= {"state": "failed", "how": "restart", "ended": facts["since"]}
                    write_atomically(path, facts)
                found.append((facts["ended"], facts["name"], facts))
        for _, name, facts in sorted(found, key=lambda one: one[:2]):
            self._ended[name] = facts
        self._make_room()

    def _make_room(self) -> None:
        """Drop those that ended long ago, and the oldest where there is no room for all."""
        now = time.time()
        for name, facts in list(self._ended.items()):
            full = len(self._ended) + len(self._running) > self.limits.jobs or self._kept() > self.limits.job_bytes
            if full or now - facts["ended"] > _KEPT:
                self._drop(name)

    def _kept(self) -> int:
        return sum(int(facts["kept"]) for facts in self._ended.values())

    def _drop(self, name: str) -> None:
        self._ended.pop(name, None)
        shutil.rmtree(self.root / name, ignore_errors=True)

    def held(self, sessions: Container[Any]) -> list[str]:
        """Return the names of those that run although the session that began them is none of ``sessions``."""
        return [name for name, job in self._running.items() if job.owner not in sessions]

    def of(self, owner: object) -> list[str]:
        """Return the names of those that run and that this session has begun."""
        return [name for name, job in self._running.items() if job.owner is owner]

    def forget_running(self, job: _Job) -> None:
        """Note that one runs no more."""
        self._running.pop(job.facts["name"], None)

    def note_end(self, facts: dict[str, Any], owner: Any) -> None:
        """Keep what is known of one that has ended."""
        root = self.root / facts["name"]
        facts["ended"] = time.time()
        with contextlib.suppress(OSError):
            facts["kept"] = sum(path.stat().st_size for path in root.rglob("*") if path.is_file())
            facts["result"] = (root / "result").stat().st_size if (root / "result").exists() else 0
            files = root / "files"
            names = (str(path.relative_to(files)) for path in files.rglob("*") if path.is_file())
            facts["files"] = sorted(name for name in names if not Path(name).name.startswith("."))[:1000]
            write_atomically(root / "job.json", facts)
        self._ended[facts["name"]] = facts
        self._make_room()
        self._on_end(owner)

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
        root = self.root / name
        root.mkdir(parents=True, mode=0o700)
        facts: dict[str, Any] = {
            "name": name,
            "function": str(words.get("function") or ""),
            "source": words.get("source"),
            "state": _RUNNING,
            "since": time.time(),
            "ended": None,
            "error": None,
            "how": "",
            "output": 0,
            "result": 0,
            "files": [],
            "kept": 0,
        }
        try:
            write_atomically(root / "job.json", facts)
            job = _Job(self, facts, data, answer, words.get("owner"))
        except BaseException:
            shutil.rmtree(root, ignore_errors=True)
            raise
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
        path = self.root / facts["name"] / "output"
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
        root = self.root / facts["name"]
        path = root / "result" if words["file"] is None else root / "files" / str(words["file"])
        inside = path.resolve().is_relative_to((root / "files").resolve())
        if words["file"] is not None and not (inside and path.is_file()):
            raise LookupError(f"the job {facts['name']!r} has no file {words['file']!r}; it has {facts['files'][:20]}")
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
            if facts["state"] == _RUNNING:
                job.when_more(tell)  # it is killed before long
            else:
                answer({"job": _told(facts), "cancelled": facts["state"] == "cancelled"}, b"")  # it may just have ended

        tell()

    def _forget(self, words: dict[str, Any], data: bytes, answer: Answer) -> None:
        facts = self._facts(words)
        if facts["name"] in self._running:
            raise ValueError(f"the job {facts['name']!r} is running; cancel() it first")
        self._drop(facts["name"])
        answer({}, b"")

    def close(self) -> None:
        """The server ends: what runs ends with it, and the reason is kept; on the loop."""
        for job in list(self._running.values()):
            job.facts |= {"state": "failed", "how": "restart"}
            self.note_end(job.facts, None)
        self._running.clear()
