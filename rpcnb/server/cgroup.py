"""Bounding the memory of a session's process and of everything that it starts, where the system has delegated that.

Source:
    Linux, Documentation/admin-guide/cgroup-v2.rst (memory.max, memory.events; no processes in inner groups).
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

__all__ = ["NO_MEMORY", "MemoryGroups"]

NO_MEMORY = 72  # exit code of a process that has used up what it may and has noticed that itself

_ROOT = Path("/sys/fs/cgroup")


class MemoryGroups:
    """Control groups for processes, one each; made by :meth:`open`."""

    def __init__(self, base: Path, nbytes: int) -> None:
        self._base = base
        self._nbytes = nbytes
        self._count = 0

    @classmethod
    def open(cls, nbytes: int, root: Path = _ROOT, own: str | None = None) -> MemoryGroups | None:
        """Return them, if this process's control group is its own to divide; None if it is not.

        Args:
            nbytes: What each may use.
            root: Where the system shows control groups.
            own: Path of this process's group there; looked up by default.
        """
        try:
            found = own or _own_group()
            base = root / found.lstrip("/")
            if found == "/" or not os.access(base / "cgroup.procs", os.W_OK):
                return None
            leaf = base / f"rpcnb-{os.getpid()}"
            leaf.mkdir(exist_ok=True)
            (leaf / "cgroup.procs").write_text(str(os.getpid()))  # a group that is divided has no processes itself
            (base / "cgroup.subtree_control").write_text("+memory")
            groups = cls(base, nbytes)
            trial = groups.make()
            groups.remove(trial)
        except OSError:
            return None
        return groups

    def make(self) -> Path:
        """Make a group.

        Raises:
            OSError: The system refuses.
        """
        self._count += 1
        path = self._base / f"rpcnb-{os.getpid()}-{self._count}"
        path.mkdir()
        (path / "memory.max").write_text(str(self._nbytes))
        with contextlib.suppress(OSError):  # where swap is not counted
            (path / "memory.swap.max").write_text("0")
        return path

    @staticmethod
    def put(path: Path, pid: int) -> None:
        """Put a process into a group."""
        (path / "cgroup.procs").write_text(str(pid))

    @staticmethod
    def remove(path: Path) -> bool:
        """Remove a group whose processes have ended; returns whether its memory was used up."""
        used_up = False
        with contextlib.suppress(OSError, ValueError):
            facts = dict(line.split() for line in (path / "memory.events").read_text().splitlines())
            used_up = int(facts.get("oom_kill", "0")) > 0
        with contextlib.suppress(OSError):
            path.rmdir()
        return used_up


def _own_group() -> str:
    with open("/proc/self/cgroup") as file:
        return next((line.strip().removeprefix("0::") for line in file if line.startswith("0::")), "/")
