"""A server that dials out to a proxy: one connection always waits there, for a client that the proxy joins with it.

Source:
    _connect_proxy_loop of python/tvm/rpc/server.py of TVM 0.27.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from typing import TYPE_CHECKING

from rpcnb.errors import ConnectFailed, DeadlineExceeded
from rpcnb.link.aiolink import connect_awaiting
from rpcnb.protocol.codes import MAGIC_DUPLICATE, Role
from rpcnb.protocol.handshake import EXTENSION, KeyText, hello, key_text
from rpcnb.protocol.peerlimits import extension
from rpcnb.protocol.proof import NONCE, WRONG_TOKEN, new_nonce
from rpcnb.server.connection import Connection
from rpcnb.transport.backoff import Backoff
from rpcnb.transport.deadline import Deadline
from rpcnb.transport.keepalive import KeepAlive

if TYPE_CHECKING:
    from typing import Any

    from rpcnb.server.server import Server
    from rpcnb.transport.address import Address

__all__ = ["DialOut"]

log = logging.getLogger(__name__)

_CONNECT = 10.0  # seconds
_SHORT_WAIT = 1.0  # seconds; a proxy that ends a wait sooner is not dialled again at once


class _Dialled(Connection):
    """A connection that the server opened: it speaks first, and the client's key comes through the proxy."""

    def __init__(self, server: Server, sock: Any, address: tuple[Any, ...]) -> None:
        super().__init__(server, sock, address)
        self.settled: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        options = {"-rpcnb": extension(EXTENSION, server.limits)}
        if server.gate.token is not None:
            options[NONCE] = new_nonce()
        self._said = key_text(Role.SERVER, server.key, options)
        self.send_all(hello(self._said))

    def _accept(self, text: str) -> None:
        key, gate = KeyText.parse(text), self.server.gate
        if gate.can_prove(key):
            self.challenge(str(gate.token), {}, lambda: self._paired(key, self.why_full(key)))
            return
        refusal = self.why_full(key)
        if not gate.has_token(text):
            self.note_refusal(f"refused a client behind {self.peer}: {WRONG_TOKEN}")
            refusal = WRONG_TOKEN
        self._paired(key, refusal)

    def _paired(self, key: KeyText, refusal: str) -> None:
        self._settle("paired")  # before anything that may end the connection
        self.begin(key, {}, refusal)

    def _answer(self, options: dict[str, str]) -> str:
        """Return what went out first."""
        return self._said

    def _refused(self, word: int) -> None:
        self._settle("duplicate" if word == MAGIC_DUPLICATE else "unmatched")
        self.close()

    def _settle(self, how: str) -> None:
        if not self.settled.done():
            self.settled.set_result(how)

    def close(self) -> None:
        super().close()
        self._settle("paired" if self.text else "closed")


class DialOut:
    """Keeps a server's connection waiting at a proxy, on the server's loop, until it is closed.

    Args:
        server: The server.
        proxy: Where to dial; TCP or WebSocket.
    """

    def __init__(self, server: Server, proxy: Address) -> None:
        self.proxy = proxy
        self.waiting = False
        self._server = server
        self._room = asyncio.Event()
        self._keep_alive = KeepAlive()
        self._closed = False
        self._task = asyncio.ensure_future(self._run())

    def ended(self) -> None:
        """Note that a session has ended."""
        self._room.set()

    async def _run(self) -> None:
        backoff = Backoff()
        told = ""
        while not self._closed:
            self._room.clear()
            if self._server.full:
                await self._room.wait()
                continue
            began = time.monotonic()
            try:
                how = await self._wait_for_client()
                problem = {
                    "duplicate": f"a server with key {self._server.key!r} is already waiting there",
                    "closed": "it closed the connection",
                }.get(how, "")
                if how == "unmatched" and time.monotonic() - began < _SHORT_WAIT:
                    problem = "it does not let servers wait"
            except (ConnectFailed, DeadlineExceeded, OSError) as error:
                problem = str(error)
            except Exception:
                log.exception("%s: dialling %s failed", self._server.name, self.proxy)
                problem = "an error here"
            if not problem:
                backoff.reset()
                told = ""
                continue
            if problem != told:  # once, not at every try
                text = f"{self._server.name}: not waiting at the proxy {self.proxy}: {problem}"
                self._server.refusals.note(f"proxy {self.proxy}", text)
                told = problem
            await asyncio.sleep(backoff.next())

    async def _wait_for_client(self) -> str:
        """Wait at the proxy; returns how that ended: ``paired``, ``unmatched``, ``duplicate`` or ``closed``."""
        sock = await connect_awaiting(self.proxy, Deadline(_CONNECT, f"connect to {self.proxy}"))
        try:
            if self._closed:  # a cancellation was lost on the way (before Python 3.12)
                raise asyncio.CancelledError
            connection = _Dialled(self._server, sock, (self.proxy.host, self.proxy.port))
            self._server.adopt(connection)
            if self.proxy.is_web:
                self._keep_alive.add(sock)
        except BaseException:
            sock.close()
            raise
        self.waiting = True
        try:
            return await connection.settled
        finally:
            self.waiting = False
            if not connection.settled.done() or connection.settled.cancelled():
                with contextlib.suppress(OSError):
                    connection.close()

    def close(self) -> None:
        """End it; on the loop."""
        self._closed = True
        self._keep_alive.close()
        self._task.cancel()
