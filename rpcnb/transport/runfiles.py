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

__all__ = ["find_token", "list_servers", "publish", "runtime_directory", "token_for", "write_atomically"]


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
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-")
    try:
        with os.fdopen(descriptor, "w") as file:
            json.dump(content, file)
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
        write_atomically(path, content)
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
                if _alive(content["pid"]):
                    found.append((path.stat().st_mtime, content))
                else:
                    path.unlink()
    return [content for _, content in sorted(found, key=lambda item: -item[0])]


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


def token_for(host: str, port: int, key: str, given: str | None) -> str | None:
    """Return the token that was given, else that of this user's own server on this machine, if it is one."""
    return find_token(port, key) if given is None and is_loopback(host) else given


def find_token(port: int, key: str = "") -> str | None:
    """Return the token of this user's own server on ``port``, if there is one.

    Behind a proxy's port there may be servers of others: there the key must be the same, or a token would get about.
    """
    for server in list_servers():
        if port in (server.get("port"), server.get("web_port")) and (
            not server.get("proxy") or server.get("key") == key
        ):
            token = server.get("token")
            return token if isinstance(token, str) and token else None
    return None
