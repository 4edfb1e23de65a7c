"""Addresses that users write: ``host:port``, ``rpc://host:port/key``, IPv6 in brackets."""

from __future__ import annotations

import ipaddress
from typing import NamedTuple
from urllib.parse import unquote

__all__ = ["Address", "is_loopback", "parse_address", "show_address"]

DEFAULT_PORT = 9090


class Address(NamedTuple):
    """Where a server is, and the key it serves."""

    host: str
    port: int
    key: str = ""

    def __str__(self) -> str:
        return show_address(self.host, self.port)


def show_address(host: str, port: int) -> str:
    """Return ``host:port`` as users write it."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def parse_address(text: str, port: int = DEFAULT_PORT, key: str = "") -> Address:
    """Read an address.

    Args:
        text: ``host``, ``host:port``, ``[::1]:port``, or a URL ``rpc://host:port/key``.
        port: What holds where the text names none.
        key: Likewise.

    Raises:
        ValueError: It is not one.
    """
    rest = text.strip()
    scheme, separator, after = rest.partition("://")
    if separator:
        if scheme != "rpc":
            raise ValueError(f"address {text!r} has scheme {scheme!r}; expected rpc://host:port/key or host:port")
        rest, _, path = after.partition("/")
        key = unquote(path) or key
    if rest.startswith("["):
        host, bracket, tail = rest[1:].partition("]")
        if not bracket or (tail and not tail.startswith(":")):
            raise ValueError(f"address {text!r} is not one; expected [host]:port")
        number = tail[1:]
    elif rest.count(":") > 1:
        host, number = rest, ""
    else:
        host, _, number = rest.partition(":")
    if not host:
        raise ValueError(f"address {text!r} names no host; expected host:port")
    if number:
        if not number.isdecimal() or not 0 < int(number) < 65536:
            raise ValueError(f"address {text!r} has port {number!r}; expected 1 to 65535")
        port = int(number)
    return Address(host, port, key)


def is_loopback(host: str) -> bool:
    """Tell whether only this machine can reach ``host``."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
