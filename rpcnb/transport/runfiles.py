"""Files of running servers: where a user's own clients find address, key and token.

One JSON file per server, mode 0600, in the user's runtime directory (mode 0700). ``rpcnb servers`` lists them; a
client of the same user finds the token of a loopback server there by itself.
"""

from __future__ import annotations

import contextlib
import json
import os
import stat
import tempfile
from pathlib import Path
from typing import Any

from rpcnb.transport.address import is_loopback
from rpcnb.transport.tcptable import may_listen

__all__ = [
    "find_own",
    "find_token",
    "list_servers",
    "publish",
    "runtime_directory",
    "write_atomically",
    "write_text_atomically",
]


def runtime_directory() -> Path:
    """Return the directory of the user's run files; it need not exist."""
    chosen = os.environ.get("RPCNB_RUNTIME_DIR")
    if chosen:
        return Path(chosen)
    base = os.environ.get("XDG_RUNTIME_DIR")
    if base and os.path.isdir(base):
        return Path(base) / "rpcnb"
    user = os.getuid() if hasattr(os, "getuid") else os.environ.get("USERNAME", "user")
    return Path(tempfile.gettempdir()) / f"rpcnb-{user}"


def write_atomically(path: Path, content: dict[str, Any]) -> None:
    """Write JSON so that a reader sees all of it or nothing, readable by the owner only."""
    write_text_atomically(path, json.dumps(content))


def write_text_atomically(path: Path, text: str) -> None:
    """Write a text likewise."""
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-")
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise


def publish(port: int, content: dict[str, Any]) -> Path | None:
    """Write the run file of a server of this process; None where that is not possible safely."""
    folder = runtime_directory()
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not _private(folder):
            return None
        path = folder / f"server-{port}-{os.getpid()}.json"
        write_atomically(path, {**content, "started": _started(os.getpid())})
        return path
    except OSError:
        return None


def _private(path: Path) -> bool:
    """Tell whether only this user can read and write ``path``."""
    if not hasattr(os, "getuid"):
        return True
    found = path.lstat()
    return found.st_uid == os.getuid() and not stat.S_ISLNK(found.st_mode) and not found.st_mode & 0o077


def list_servers() -> list[dict[str, Any]]:
    """Return the running servers of this user, newest first; files of dead processes are removed."""
    found = []
    folder = runtime_directory()
    try:
        paths = list(folder.glob("server-*.json")) if folder.is_dir() and _private(folder) else []
    except OSError:  # no descriptors left, say
        return []
    for path in paths:
        with contextlib.suppress(OSError, ValueError):
            if not _private(path):
                continue
            content = json.loads(path.read_text())
            if isinstance(content, dict) and isinstance(content.get("pid"), int):
                if _alive(content["pid"], content.get("started")):
                    found.append((path.stat().st_mtime, content))
                else:
                    path.unlink()
    return [content for _, content in sorted(found, key=lambda item: -item[0])]


def _alive(pid: int, started: object) -> bool:
    """Tell whether a process lives, and is the one that started then: numbers are used again."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return started is None or _started(pid) in (None, started)


def _started(pid: int) -> int | None:
    """Return when a process has started, in ticks since the machine has; None where that cannot be seen."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            return int(file.read().rpartition(")")[2].split()[19])
    except (OSError, ValueError, IndexError):
        return None


def find_own(host: str, port: int, key: str = "") -> dict[str, Any] | None:
    """Return what is published of this user's own server that is reached at an address of this machine; None: no one.

    Only the process that has published it may be it: one that still lives, and listens there. Behind a proxy's port
    there may be servers of others: there the key must be the same.
    """
    for server in list_servers() if is_loopback(host) else []:
        if port not in (server.get("port"), server.get("web_port"), server.get("plain_port")):
            continue
        if not _is_reached(host, str(server.get("host"))):
            continue
        proxied = bool(server.get("proxy"))
        if server.get("key") == key if proxied else may_listen(server["pid"], port):
            return server
    return None


def find_token(host: str, port: int, key: str = "") -> str | None:
    """Return the token of this user's own server that is reached at an address of this machine, if there is one."""
    token = (find_own(host, port, key) or {}).get("token")
    return token if isinstance(token, str) and token else None


def _is_reached(dialled: str, listening: str) -> bool:
    """Tell whether who dials an address of this machine reaches who listens on another."""
    return bool(_numbers(dialled) & _numbers(listening)) or listening in ("", "::") or (
        listening == "0.0.0.0" and ":" not in dialled
    )  # fmt: skip


def _numbers(host: str) -> set[str]:
    return {"127.0.0.1", "::1"} if host == "localhost" else {host}
