"""Servers by name: ``~/.config/rpcnb/hosts.toml``, which only this user may read.

::

    [bench-07]
    address = "rpcs://bench-07.lab:9090/rpi#sha256=..."
    token = "..."
    trust_output = true

``rpcnb.connect("bench-07")`` and ``%rpc_connect bench-07`` are enough then; an address that is given whole gets the
token of the entry with this address.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import logging
import os
import re
import stat
import sys
from typing import Any, NamedTuple

from rpcnb.errors import HostsUnreadable
from rpcnb.protocol.secret import Secret
from rpcnb.transport.address import Address, parse_address
from rpcnb.transport.certificates import config_directory, private_directory
from rpcnb.transport.runfiles import find_own, write_text_atomically

__all__ = ["VARIABLE", "Host", "find_host", "find_secret", "host_of", "list_hosts", "remember_host", "shows_as_own"]

log = logging.getLogger(__name__)

VARIABLE = "RPCNB_TOKEN"
_FILE = "hosts.toml"
_NAME = re.compile(r"[A-Za-z0-9_-]+")
_WORDS = {"address": str, "key": str, "token": str, "fingerprint": str, "trust_output": bool}


class Host(NamedTuple):
    """A server that this user has named.

    Attributes:
        name: Its name.
        address: As for :func:`rpcnb.connect`.
        key: That it serves, if the address names none.
        token: Its token; empty for none.
        fingerprint: Of its certificate, ``sha256=...``, if the address names none.
        trust_output: Show what it puts out as this kernel's own (:class:`rpcnb.Session`).
    """

    name: str
    address: str
    key: str = ""
    token: str = ""
    fingerprint: str = ""
    trust_output: bool = False

    @property
    def whole(self) -> str:
        """The address, with the fingerprint."""
        if "#" in self.address or not self.fingerprint:
            return self.address
        scheme = "" if "://" in self.address else "rpcs://"
        return f"{scheme}{self.address}#{self.fingerprint}"


def _load(text: Secret) -> dict[str, Any]:
    try:
        toml: Any = importlib.import_module("tomllib" if sys.version_info >= (3, 11) else "tomli")
    except ImportError:
        raise HostsUnreadable(f"{_FILE} is read by the package tomli: pip install 'rpcnb[hosts]'") from None
    try:
        found: dict[str, Any] = toml.loads(str(text))
    except toml.TOMLDecodeError as error:
        raise HostsUnreadable(f"{config_directory() / _FILE} is no TOML: {error}") from None
    for words in found.values():
        if isinstance(words, dict) and isinstance(words.get("token"), str):
            words["token"] = Secret(words["token"])
    return found


def list_hosts() -> list[Host]:
    """Return the servers that this user has named.

    Raises:
        HostsUnreadable: The file has other content, or others can read it.
    """
    path = config_directory() / _FILE
    try:
        with open(path, encoding="utf-8") as file:
            if os.name != "nt" and stat.S_IMODE(os.fstat(file.fileno()).st_mode) & 0o077:
                raise HostsUnreadable(f"{path} holds tokens, and others can read it: chmod 600 {path}")
            text = Secret(file.read())
    except (FileNotFoundError, NotADirectoryError):
        return []
    return [_host(name, words) for name, words in _load(text).items()]


def _host(name: str, words: Any) -> Host:
    if not isinstance(words, dict) or not isinstance(words.get("address"), str):
        raise HostsUnreadable(f'{_FILE}: [{name}] names no address = "..."')
    for word, value in words.items():
        kind = _WORDS.get(word)
        if kind is None or not isinstance(value, kind):
            shown = "a text" if kind is str else "true or false"
            expected = f"has {shown} as {word}" if kind else f"has no {word}; expected {', '.join(_WORDS)}"
            raise HostsUnreadable(f"{_FILE}: [{name}] {expected}")
    return Host(name, **words)


def find_host(name: str) -> Host | None:
    """Return the server of this name, or None; nothing is read for what cannot be one."""
    if not _NAME.fullmatch(name):
        return None
    return next((host for host in list_hosts() if host.name == name), None)


def host_of(address: Address) -> Host | None:
    """Return the server that has been named with this address, or None."""
    where = address.scheme, address.host, address.port
    try:
        hosts = list_hosts()
    except HostsUnreadable as error:  # who calls one by its name is told
        log.warning("%s", error)
        return None
    for host in hosts:
        with contextlib.suppress(ValueError):  # who calls it by its name is told
            there = parse_address(host.whole, key=host.key)
            if (there.scheme, there.host, there.port) == where and address.key in ("", there.key):
                return host
    return None


def find_secret(address: Address, named: Host | None = None) -> Secret | None:
    """Return the token of a server that nobody has given one for; None if there is none.

    It is that of this user's own server there, else what ``RPCNB_TOKEN`` says, else what is in the file of hosts.

    Args:
        address: Where the server is.
        named: It was called by its name.
    """
    own = find_own(address.host, address.port, address.key)
    if own is not None:
        token = own.get("token")
        return Secret(token) if isinstance(token, str) and token else None
    given = os.environ.get(VARIABLE)
    if given:
        return Secret(given.strip())
    host = named or host_of(address)
    return Secret(host.token) if host is not None and host.token else None


def shows_as_own(address: Address) -> bool:
    """Tell whether a server is this user's demo board or a notebook's kernel of theirs, or trusted by the file."""
    own = find_own(address.host, address.port, address.key) or {}
    if own.get("kind") in ("demo", "kernel"):
        return True
    host = host_of(address)
    return host is not None and host.trust_output


def remember_host(host: Host) -> None:
    """Write a server into the file, in the place of one of the same name.

    Raises:
        ValueError: That is no name.
        OSError: It cannot be written.
    """
    if not _NAME.fullmatch(host.name):
        raise ValueError(f"expected a name of letters, digits, '_' and '-', got {host.name!r}")
    list_hosts()  # what cannot be read is not written over
    path = private_directory() / _FILE
    before = Secret(path.read_text(encoding="utf-8") if path.exists() else "")
    write_text_atomically(path, _with(host, before))


def _with(host: Host, before: Secret) -> Secret:
    """Return the file's text with a server in it, in the place of one of the same name."""
    words = {word: getattr(host, word) for word in _WORDS if getattr(host, word)}
    lines = (f"{word} = {json.dumps(value if value is True else str(value))}\n" for word, value in words.items())
    kept = re.sub(rf"(?ms)^\[{re.escape(host.name)}\]\s*?$.*?(?=^\[|\Z)", "", str(before)).strip()
    return Secret(f"{kept}\n\n" * bool(kept) + f"[{host.name}]\n" + "".join(lines))
