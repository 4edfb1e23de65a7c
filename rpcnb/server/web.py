"""A WebSocket port: HTTP up to the upgrade (tornado's), then a socket like any other.

Browsers are let in only from pages of our own: a foreign ``Origin``, a ``Host`` that is a name somebody else may have
pointed at this machine, and requests that a page of another site makes are answered with 403 before anything else. A
missing ``Origin`` (not a browser) is allowed and still needs key and token. Nothing of a request is ever logged.
"""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import os
import socket
import time
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from tornado.httpserver import HTTPServer
from tornado.ioloop import IOLoop
from tornado.iostream import IOStream
from tornado.web import Application, HTTPError, RequestHandler

from rpcnb.protocol.codes import Limits
from rpcnb.transport.halfopen import HalfOpen
from rpcnb.transport.keepalive import KeepAlive
from rpcnb.transport.listen import Acceptor, listen
from rpcnb.transport.refusals import Refusals
from rpcnb.transport.websocket import WebSocket, accept_key

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

__all__ = ["WebPort"]

log = logging.getLogger(__name__)

_REQUEST = 10.0  # seconds for a request, and between two of them
_TYPES = {
    ".html": "text/html",
    ".js": "text/javascript",
    ".css": "text/css",
    ".wasm": "application/wasm",
    ".json": "application/json",
}


class WebPort:
    """Listens for WebSockets at ``/ws``, from when it is made (on a loop) until it is closed.

    Args:
        host: Address to listen on.
        port: Port to listen on; 0 for any free one.
        admit: Called with each new WebSocket (used like a socket) and the peer's address.
        allowed: Names of hosts that pages and clients may name, besides numbers, ``localhost`` and this machine's name:
            a hub's, say. ``*`` allows every one.
        pages: Served besides: path, and the file.
        name: For messages.
        limits: How many connections may be open that have not become a WebSocket.
        refusals: What is logged of those who were refused.
        metrics: Returns the text of ``/metrics`` for a token and who asks; None if that is wrong, and the seconds after
            which that is said.
    """

    def __init__(
        self,
        host: str,
        port: int,
        admit: Callable[[Any, tuple[Any, ...]], object],
        allowed: Sequence[str] = (),
        pages: Sequence[tuple[str, str]] = (),
        name: str = "web",
        limits: Limits | None = None,
        refusals: Refusals | None = None,
        metrics: Callable[[str, str], tuple[str | None, float]] | None = None,
    ) -> None:
        self.listeners = listen(host, port, port + 1)
        self.host = host
        self.port = int(self.listeners[0].getsockname()[1])
        self.admit = admit
        self.name = name
        self._allowed: set[str] = set()
        self.allow(allowed)
        self._own_names = {"localhost", socket.gethostname().lower(), host.lower()}
        handlers: list[Any] = [("/ws", _Upgrade, {"web": self})]
        handlers += [(path, _Page, {"web": self, "file": file}) for path, file in pages]
        if metrics is not None:
            handlers.append(("/metrics", _Metrics, {"web": self, "metrics": metrics}))
        application = Application(handlers, log_function=lambda handler: None)
        self._http = HTTPServer(
            application,
            max_header_size=65536,
            max_body_size=1024,
            idle_connection_timeout=_REQUEST,
            body_timeout=_REQUEST,
        )
        limits = limits or Limits()
        self._streams: HalfOpen[_Stream] = HalfOpen(
            lambda stream: stream.close(), limits.half_open, limits.half_open_per_address, limits.exempt_loopback
        )
        self.refusals = refusals or Refusals(log, time.monotonic)
        self.keep_alive = KeepAlive()
        self._acceptor = Acceptor(IOLoop.current(), self.listeners, name, self._serve, self._streams.drop_oldest)

    def _serve(self, sock: socket.socket, address: tuple[Any, ...]) -> None:
        """Speak HTTP on a new connection; until it is a WebSocket, a stranger may hold it for nothing."""
        host = str(address[0])
        if not self._streams.admits(host):
            self.refusals.note(host, f"{self.name}: refused {host}: too many HTTP connections")
            sock.close()
            return
        stream = _Stream(sock, self._streams.forget)
        self._streams.add(stream, host)
        self._http.handle_stream(stream, address)

    def refuses(self, request: Any) -> str:
        """Say why a request is refused; empty if it is not."""
        headers = request.headers
        host, origin = headers.get("Host", ""), headers.get("Origin")
        if not self._knows(_host_of(f"//{host}")):
            return f"the host name {_shorten(host)} is not ours"
        if origin is not None and not self._is_same(origin, host):
            return f"the page's origin {_shorten(origin)} is foreign"
        if headers.get("Sec-Fetch-Site", "none") not in ("none", "same-origin", "same-site"):
            return "a page of another site asks"
        return ""

    def _is_same(self, origin: str, host: str) -> bool:
        """Tell whether a page's origin is this server, or an allowed one."""
        try:
            parts = urlsplit(origin)
        except ValueError:
            return False
        if parts.scheme not in ("http", "https") or not parts.hostname:
            return False
        return parts.netloc.lower() == host.lower() or self._is_allowed(parts.hostname.lower())

    def _knows(self, name: str) -> bool:
        """Tell whether nobody else can have pointed this name here."""
        if not name:
            return False
        try:
            ipaddress.ip_address(name)
        except ValueError:
            return name in self._own_names or self._is_allowed(name)
        return True

    def allow(self, names: Iterable[str]) -> None:
        """Let browsers and hubs of these names in too."""
        self._allowed |= {one.lower().removeprefix("https://").removeprefix("http://") for one in names}

    def _is_allowed(self, name: str) -> bool:
        return name in self._allowed or "*" in self._allowed

    def close(self) -> None:
        """Stop listening, and end what has not become a WebSocket; on the loop. Those that have belong to others."""
        self._acceptor.close()
        self._streams.clear()
        self.keep_alive.close()


class _Stream(IOStream):  # type: ignore[misc]  # tornado is not followed
    """Tells when its descriptor is free again; tornado's own callback is used by the HTTP connection."""

    def __init__(self, sock: socket.socket, freed: Callable[[_Stream], object]) -> None:
        self._freed = freed
        super().__init__(sock, max_buffer_size=1 << 20)  # bytes; of a header 64 KiB are read at most

    def close_fd(self) -> None:
        super().close_fd()
        self._freed(self)


def _host_of(url: str) -> str:
    try:
        return (urlsplit(url).hostname or "").lower()
    except ValueError:
        return ""


def _shorten(text: str) -> str:
    return repr(text[:60])


class _Checked(RequestHandler):  # type: ignore[misc]  # tornado is not followed
    """Refuses what another site's page may send, before anything else."""

    def initialize(self, web: WebPort, **options: Any) -> None:
        self.web = web
        self.options = options

    def prepare(self) -> None:
        reason = self.web.refuses(self.request)
        if reason:
            self._note(f"refused {self.request.remote_ip}: {reason}")
            self.refuse(403, reason)

    def _note(self, text: str) -> None:
        self.web.refusals.note(str(self.request.remote_ip), f"{self.web.name}: {text}")

    def log_exception(self, kind: Any, value: Any, trace: Any) -> None:
        """Log what went wrong as what a stranger may have caused: without the request."""
        if not isinstance(value, HTTPError):
            self._note(f"an answer to {self.request.remote_ip} failed: {type(value).__name__}: {value}")

    def refuse(self, status: int, text: str) -> None:
        self.set_status(status)
        self.set_header("Content-Type", "text/plain")
        self.finish(text)

    def write_error(self, status_code: int, **kwargs: Any) -> None:
        self.refuse(status_code, f"{status_code}")

    def data_received(self, chunk: bytes) -> None:
        """Take no body."""


class _Upgrade(_Checked):
    """Turns a request into a WebSocket and passes it on."""

    def get(self) -> None:
        headers = self.request.headers
        wanted = {word.strip().lower() for word in headers.get("Connection", "").split(",")}
        key = headers.get("Sec-WebSocket-Key", "")
        if headers.get("Upgrade", "").lower() != "websocket" or "upgrade" not in wanted or not key:
            self.refuse(400, "This is the WebSocket of an RPC server; connect with rpcnb.connect('ws://...').")
            return
        if headers.get("Sec-WebSocket-Version") != "13":
            self.set_header("Sec-WebSocket-Version", "13")
            self.refuse(426, "WebSocket version 13 is spoken here.")
            return
        self.set_status(101)
        self.clear_header("Content-Type")
        self.set_header("Upgrade", "websocket")
        self.set_header("Connection", "Upgrade")
        self.set_header("Sec-WebSocket-Accept", accept_key(key))
        self.finish()
        stream = self.detach()
        try:
            address = stream.socket.getpeername()
            sock = socket.socket(fileno=os.dup(stream.socket.fileno()))  # the stream's own is closed with it
        except (OSError, AttributeError):
            return  # the peer has gone meanwhile
        finally:
            stream.close()
        sock.setblocking(False)
        web = WebSocket(sock, client=False)
        self.web.keep_alive.add(web)
        self.web.admit(web, address)


class _Page(_Checked):
    """Serves one file."""

    def get(self) -> None:
        file = self.options["file"]
        kind = _TYPES.get(os.path.splitext(file)[1], "application/octet-stream")
        self.set_header("Content-Type", kind)
        with open(file, "rb") as content:
            data = content.read()
        if kind == "text/html":  # TVM's page names its proxy's usual port
            data = data.replace(b"ws://localhost:9190/ws", f"ws://localhost:{self.web.port}/ws".encode())
        self.finish(data)


class _Metrics(_Checked):
    """Tells numbers to whoever knows the token: ``Authorization: Bearer TOKEN``."""

    async def get(self) -> None:
        kind, _, token = self.request.headers.get("Authorization", "").partition(" ")
        given = token.strip() if kind.lower() == "bearer" else ""
        text, delay = self.options["metrics"](given, str(self.request.remote_ip))
        if text is None:
            await asyncio.sleep(delay)
            self._note(f"refused {self.request.remote_ip}: wrong token for /metrics")
            self.set_header("WWW-Authenticate", "Bearer")
            self.refuse(401, "the server's token is needed: Authorization: Bearer TOKEN")
            return
        self.set_header("Content-Type", "text/plain; version=0.0.4")
        self.finish(text)
