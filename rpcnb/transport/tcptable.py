"""What the system says of TCP connections: who is still connected, and whether both ends are in this process.

Source:
    Linux's ``/proc/net/tcp``, proc_net_tcp(5).
"""

from __future__ import annotations

import contextlib
import os
import socket
import struct
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["both_ends_are_here", "ends_of", "established", "may_listen"]

_ESTABLISHED, _LISTENS = "01", "0A"
_INODE = 9  # words of a line before it


def ends_of(sock: Any) -> str:
    """Return both ends of a TCP connection as the system writes them, ours first; empty for any other."""
    plain = socket.socket(fileno=sock.fileno())
    try:
        if plain.family not in (socket.AF_INET, socket.AF_INET6):
            return ""
        return " ".join(_written(plain.family, *end()[:2]) for end in (plain.getsockname, plain.getpeername))
    except OSError:
        return ""
    finally:
        plain.detach()


def _written(family: int, host: str, port: int) -> str:
    packed = socket.inet_pton(family, host.partition("%")[0])
    words = struct.unpack(f"={len(packed) // 4}I", packed)
    return "".join(f"{word:08X}" for word in words) + f":{port:04X}"


def _lines() -> Iterator[list[str]]:
    for path in ("/proc/net/tcp", "/proc/net/tcp6"):
        with open(path) as file:
            yield from (line.split() for line in file)


def established() -> set[str] | None:
    """Return both ends of all established TCP connections of this machine; None where that cannot be seen."""
    try:
        return {f"{words[1]} {words[2]}" for words in _lines() if words[3] == _ESTABLISHED}
    except (OSError, IndexError):
        return None


def both_ends_are_here(sock: Any) -> bool:
    """Tell whether the other end of a TCP connection is in this process too; False where that cannot be seen."""
    other = " ".join(reversed(ends_of(sock).split(" ")))
    with contextlib.suppress(OSError, IndexError):
        inodes = {words[_INODE] for words in _lines() if f"{words[1]} {words[2]}" == other}
        if inodes:
            return _has_one(os.getpid(), inodes)
    return False


def may_listen(pid: int, port: int) -> bool:
    """Tell whether a process listens on a port of this machine; True where that cannot be seen."""
    try:
        inodes = {words[_INODE] for words in _lines() if words[3] == _LISTENS and words[1].endswith(f":{port:04X}")}
        return _has_one(pid, inodes)
    except (OSError, IndexError):
        return True


def _has_one(pid: int, inodes: set[str]) -> bool:
    """Tell whether a process has one of these sockets.

    Raises:
        OSError: That cannot be seen.
    """
    return any(_inode(pid, name) in inodes for name in os.listdir(f"/proc/{pid}/fd"))


def _inode(pid: int, name: str) -> str:
    try:
        return os.readlink(f"/proc/{pid}/fd/{name}").removeprefix("socket:[").removesuffix("]")
    except OSError:
        return ""
