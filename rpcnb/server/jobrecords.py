"""What is kept of detached jobs on disk, so that it outlives their server.

A directory for each token, in it one for each job: ``job.json`` (what is known of it), ``output`` (what it has
printed), ``result`` (a parcel) and ``files``. Several servers may have one token: each holds a lock, whose name its
jobs' records say, and leaves alone what belongs to another that lives.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import secrets
import shutil
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rpcnb.transport.runfiles import write_atomically

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["CANCELLED", "DONE", "FAILED", "RUNNING", "Records", "fresh_facts"]

RUNNING, DONE, FAILED, CANCELLED = STATES = ("running", "done", "failed", "cancelled")
_ERROR = ("type", "text", "traceback")
_LOCK, _NEW, _DROPPED = ".server-", ".new-", ".dropped-"
_LEFT = 60.0  # seconds after which what was begun in the directory is nobody's
_MOST_NAMES = 1000  # files that a record names
_MOST_TEXT = 1 << 18  # characters of their names


def fresh_facts(name: str, function: str, source: str | None) -> dict[str, Any]:
    """Return what is known of a job that begins now."""
    return {
        "name": name,
        "function": function,
        "source": source,
        "state": RUNNING,
        "since": time.time(),
        "ended": None,
        "error": None,
        "how": "",
        "output": 0,
        "result": 0,
        "files": [],
        "left_out": "",
        "kept": 0,
    }


class Records:
    """The jobs of one server, in the directory of its token.

    Args:
        root: That directory; made with the first job.
        most: Bytes that a job may leave.
    """

    def __init__(self, root: Path, most: int) -> None:
        self.root = root
        self._most = most
        self._lock: int | None = None
        self._own = ""

    def _claim(self) -> str:
        """Return under which name this server holds its jobs."""
        if self._lock is None:
            self.root.mkdir(parents=True, exist_ok=True, mode=0o700)
            self._own = f"{_LOCK}{secrets.token_hex(8)}"
            self._lock = os.open(self.root / self._own, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            fcntl.flock(self._lock, fcntl.LOCK_EX)
        return self._own

    def close(self) -> None:
        """Hold them no more."""
        lock, self._lock = self._lock, None
        if lock is not None:
            with contextlib.suppress(OSError):
                (self.root / self._own).unlink()
            os.close(lock)

    def forked(self) -> None:
        """In a forked child of the server: the jobs are the parent's."""
        lock, self._lock = self._lock, None
        if lock is not None:
            os.close(lock)

    # -- of before -----------------------------------------------------------------------------------------------

    def find(self) -> list[dict[str, Any]]:
        """Take over the records of servers that have ended, oldest first; what ran there has ended with them."""
        found: list[dict[str, Any]] = []
        with self._dead_servers() as is_dead:
            for path in sorted(self.root.glob("*")):
                if path.name.startswith((_NEW, _DROPPED)) and time.time() - path.stat().st_mtime > _LEFT:
                    _remove(path)  # the server that began that has ended meanwhile
                elif not path.name.startswith(".") and path.is_dir():
                    facts = _read(path)
                    if is_dead(facts.get("server", "")):
                        facts["server"] = self._claim()
                        if not facts["kept"]:  # nobody has looked at it
                            facts |= self.left(path.name)
                        self.write(facts)
                        found.append(facts)
        return sorted(found, key=lambda facts: (facts["ended"], facts["name"]))

    @contextlib.contextmanager
    def _dead_servers(self) -> Iterator[Any]:
        """Give what tells whether a server has ended; meanwhile no other one can take over what it has left."""
        held: dict[str, int | None] = {}

        def is_dead(name: str) -> bool:
            if name not in held:
                try:
                    held[name] = os.open(self.root / name, os.O_RDWR | os.O_CLOEXEC) if name else -1
                except FileNotFoundError:
                    held[name] = -1
                except OSError:
                    held[name] = None
                lock = held[name]
                if lock is not None and lock >= 0:
                    try:
                        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    except OSError:
                        os.close(lock)
                        held[name] = None
            return held[name] is not None

        try:
            yield is_dead
        finally:
            for name, lock in held.items():
                if lock is not None and lock >= 0:
                    with contextlib.suppress(OSError):
                        (self.root / name).unlink()
                    os.close(lock)

    # -- one job's -----------------------------------------------------------------------------------------------

    def make(self, facts: dict[str, Any]) -> Path:
        """Make a job's directory.

        Raises:
            ValueError: Another server with this token has a job of that name.
            OSError: There is no room.
        """
        facts["server"] = self._claim()
        root = self.root / str(facts["name"])
        new = self.root / f"{_NEW}{secrets.token_hex(8)}"
        new.mkdir(mode=0o700)
        try:
            write_atomically(new / "job.json", facts)
            new.rename(root)
        except OSError:
            shutil.rmtree(new, ignore_errors=True)
            if root.exists():
                raise ValueError(
                    f"another server with the same token has a job {facts['name']!r}: choose another name, "
                    "or give each server a token of its own"
                ) from None
            raise
        return root

    def write(self, facts: dict[str, Any]) -> None:
        """Keep what is known of a job; that there is no room for it is no reason to fail."""
        with contextlib.suppress(OSError):
            write_atomically(self.root / str(facts["name"]) / "job.json", facts)

    def drop(self, name: str) -> None:
        """Keep nothing of a job; its name is free at once, what it has left, perhaps much, is removed in a thread."""
        dropped = self.root / f"{_DROPPED}{secrets.token_hex(8)}"
        try:
            (self.root / name).rename(dropped)
        except FileNotFoundError:
            return
        except OSError:
            dropped = self.root / name
        _remove(dropped)

    def left(self, name: str) -> dict[str, Any]:
        """See what a job has left, and do not keep its files where they are too much; from any thread."""
        root = self.root / name
        kept, left_out = _size(root), ""
        if kept > self._most:
            shutil.rmtree(root / "files", ignore_errors=True)
            left_out = f"the files of the job {name!r} had {kept} bytes and were not kept: job_bytes={self._most}"
            kept = _size(root)
        result = root / "result"
        with contextlib.suppress(OSError):
            return {
                "kept": kept,
                "left_out": left_out,
                "result": result.stat().st_size if result.exists() else 0,
                "files": list(_names(root / "files")),
            }
        return {"kept": kept, "left_out": left_out}


def _read(path: Path) -> dict[str, Any]:
    """Return a job's record; one that cannot be read says so."""
    facts = fresh_facts(path.name, "", None)
    with contextlib.suppress(OSError):
        facts["since"] = path.stat().st_mtime
    try:
        found = json.loads((path / "job.json").read_text())
        for name, value in facts.items():
            told = found.get(name, value)
            if value is not None and not isinstance(told, (int, float) if name == "since" else type(value)):
                raise TypeError(f"{name} is {told!r}")
            facts[name] = told
        error = facts["error"]
        if facts["state"] not in STATES or not (error is None or all(type(error[name]) is str for name in _ERROR)):
            raise TypeError(f"{facts['state']}, {error!r}")
        facts["server"] = str(found.get("server", ""))
        facts["name"] = path.name
        if not isinstance(facts["ended"], (int, float)):
            facts |= {"state": FAILED, "how": "restart", "ended": facts["since"]}
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        since = facts["since"]
        facts = fresh_facts(path.name, "", None) | {"state": FAILED, "how": "record", "since": since, "ended": since}
    return facts


def _files(root: Path) -> Iterator[Path]:
    for directory, _, names in os.walk(root):
        for name in names:
            yield Path(directory) / name


def _size(root: Path) -> int:
    """Return the bytes that a directory takes on disk: files may have holes."""
    total = 0
    for path in _files(root):
        with contextlib.suppress(OSError):
            total += path.lstat().st_blocks * 512
    return total


def _names(files: Path) -> Iterator[str]:
    """Name the files that a job has left, as many as a client is told."""
    chars = 0
    found = sorted(str(path.relative_to(files)) for path in _files(files) if path.is_file())
    for name in [name for name in found if not Path(name).name.startswith(".")][:_MOST_NAMES]:
        chars += len(name)
        if chars > _MOST_TEXT:
            return
        yield name


def _remove(path: Path) -> None:
    threading.Thread(target=shutil.rmtree, args=(path, True), name="rpcnb-remove", daemon=True).start()
