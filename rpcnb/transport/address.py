"""Addresses that users write: ``host:port``, ``rpc://host:port/key``, ``tracker://host:port/key``, ``ws://...``."""

from __future__ import annotations

import base64
import contextlib
import ipaddress
import socket
from dataclasses import dataclass, field
from typing import TYPE_CHECKING
from urllib.parse import unquote

if TYPE_CHECKING:
    from collections.abc import Mapping

    from rpcnb.transport.tlsfiles import Tls

__all__ = [
    "Address",
    "is_loopback",
    "outside_address",
    "parse_address",
    "parse_pair",
    "read_fingerprint",
    "show_address",
    "tracker_pair",
]

DEFAULT_PORT = 9090
PORTS = {"rpc": DEFAULT_PORT, "rpcs": DEFAULT_PORT, "tracker": 9190, "ws": 80, "wss": 443}
_WEB = ("ws", "wss")


@dataclass(frozen=True, slots=True)
class Address:
    """Where a server is, and the key it serves.

    Attributes:
        host: Name or number.
        port: Of the server.
        key: That it serves.
        scheme: ``rpc``, ``rpcs``, ``tracker``, ``ws`` or ``wss``.
        path: Of a WebSocket: the HTTP path, with a query if there is one.
        headers: Of a WebSocket: further HTTP headers; never shown, as they may hold secrets.
        fingerprint: Of the certificate that the server must have; empty: a known or a signed one.
        tls: Certificates of one's own.
    """

    host: str
    port: int
    key: str = ""
    scheme: str = "rpc"
    path: str = "/ws"
    headers: Mapping[str, str] = field(default_factory=dict, repr=False, hash=False)
    fingerprint: str = ""
    tls: Tls | None = None

    @property
    def is_secure(self) -> bool:
        """Tell whether TLS is spoken."""
        return self.scheme in ("rpcs", "wss")

    @property
    def is_web(self) -> bool:
        """Tell whether it is a WebSocket's."""
        return self.scheme in _WEB

    def __str__(self) -> str:
        shown = show_address(self.host, self.port)
        if self.scheme == "rpc":
            return shown
        path = self.path.partition("?")[0] if self.is_web else ""  # a query may hold a token
        return f"{self.scheme}://{shown}{path}"


def show_address(host: str, port: int) -> str:
    """Return ``host:port`` as users write it."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def parse_address(
    text: str, port: int | None = None, key: str = "", headers: Mapping[str, str] | None = None
) -> Address:
    """Read an address.

    Args:
        text: ``host``, ``host:port``, ``[::1]:port``, or a URL: ``rpc://host:port/key``, ``tracker://host:port/key``,
            ``rpcs://host:port/key#sha256=fingerprint``, ``ws://host:port/path`` or ``wss://``.
        port: What holds where the text names none; by default that of the scheme.
        key: Likewise.
        headers: HTTP headers for a WebSocket.

    Raises:
        ValueError: It is not one.
    """
    rest, fingerprint = text.strip(), ""
    scheme, path = "rpc", "/ws"
    before, separator, after = rest.partition("://")
    if separator:
        if before not in PORTS:
            expected = (
                "rpc://host:port/key, rpcs://host:port/key, tracker://host:port/key, ws://host:port/ws or host:port"
            )
            raise ValueError(f"address {text!r} has scheme {before!r}; expected {expected}")
        scheme = before
        if scheme == "rpcs":
            after, sign, pin = after.partition("#")
            fingerprint = read_fingerprint(pin) if sign else ""
        rest, slash, tail = after.partition("/")
        if scheme in _WEB:
            path = slash + tail if tail else path
            _check_path(path, text)
        else:
            key = unquote(tail) or key
    if headers and scheme not in _WEB:
        raise ValueError(f"headers= are for ws:// and wss:// addresses, not for {text!r}")
    host, number = _split(rest, text)
    if number:
        if not number.isdecimal() or not 0 < int(number) < 65536:
            raise ValueError(f"address {text!r} has port {number!r}; expected 1 to 65535")
        port = int(number)
    port = PORTS[scheme] if port is None else port
    return Address(host, port, key, scheme, path, dict(headers or {}), fingerprint)


def read_fingerprint(text: str) -> str:
    """Read ``sha256=...``: base64url, or hexadecimal with or without colons, as others print it.

    Raises:
        ValueError: It is none.
    """
    kind, _, value = text.partition("=")
    plain = value.replace(":", "")
    with contextlib.suppress(ValueError):
        digest = bytes.fromhex(plain) if len(plain) == 64 else base64.urlsafe_b64decode(value.rstrip("=") + "=")
        if kind == "sha256" and len(digest) == 32:
            return base64.urlsafe_b64encode(digest).decode().rstrip("=")
    raise ValueError(f"expected the fingerprint of a certificate, sha256=..., got {text!r}")


def parse_pair(text: str, port: int) -> tuple[str, int]:
    """Read ``host:port`` of a tracker or proxy, or ``host`` alone.

    Raises:
        ValueError: It is not one.
    """
    found = parse_address(text if "://" in text else f"rpc://{text}", port)
    return found.host, found.port


def tracker_pair(given: tuple[str, int] | str, port: int = 9190) -> tuple[str, int]:
    """Return host and port of a tracker, given as a pair, or as text as users write it.

    Raises:
        ValueError: It is neither.
    """
    if isinstance(given, str):
        return parse_pair(given, port)
    try:
        host, number = given
        if isinstance(host, str):
            return host, int(number)
    except (TypeError, ValueError):
        pass
    raise ValueError(f"expected host and port of a tracker, ('host', 9190) or 'host:9190', got {given!r}")


def _check_path(path: str, text: str) -> None:
    if not path.isascii() or not path.isprintable() or " " in path:
        raise ValueError(f"address {text!r} has a path with characters that must be written as %XX")


def _split(rest: str, text: str) -> tuple[str, str]:
    """Return host and port of ``host:port``, the port empty if there is none."""
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
    return host, number


def is_loopback(host: str) -> bool:
    """Tell whether only this machine can reach ``host``."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def outside_address(host: str) -> str:
    """Return the address under which others see this machine, for a server that listens everywhere."""
    if host not in ("0.0.0.0", "::", ""):  # compared, not bound
        return host
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # documentation address; a datagram socket sends nothing here
            return str(probe.getsockname()[0])
        except OSError:
            return socket.gethostname()
