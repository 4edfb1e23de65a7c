"""The event-driven server without a transport: ``handler(in_bytes, event_flag) -> int``.

What TVM calls ``rpc.CreateEventDrivenServer``: whoever owns the bytes calls the handler with what has arrived and the
handler calls ``fsend`` with what is to go out. The tornado server stands on the same servant.

Source:
    RPCEndpoint::ServerAsyncIOEventHandler, src/runtime/rpc/rpc_endpoint.cc and rpc_event_driven_server; protocol.md 9.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from rpcnb.errors import RpcError
from rpcnb.protocol.codes import Role
from rpcnb.protocol.endpoint import Endpoint
from rpcnb.protocol.handshake import Handshake, KeyText
from rpcnb.protocol.peerlimits import PeerLimits
from rpcnb.runtime.environment import Environment
from rpcnb.runtime.servant import Servant

if TYPE_CHECKING:
    from collections.abc import Callable

    from rpcnb.protocol.sequence import Buffer

__all__ = ["EventHandler", "create_event_driven_server"]

WRITABLE = 2
SHUTDOWN, WAIT, WRITE = 0, 1, 2
_GATHER = 64  # buffers joined for one fsend


class EventHandler:
    """The handler; call it with bytes and a flag. See :func:`create_event_driven_server`."""

    def __init__(
        self,
        fsend: Callable[[Buffer], int],
        name: str,
        remote_key: str,
        environment: Environment,
        want_write: Callable[[], object] | None,
    ) -> None:
        self._fsend = fsend
        self._want_write = want_write
        self._handshake = Handshake(environment.limits.key, with_magic=False) if remote_key == "%toinit" else None
        self.remote_key = "" if self._handshake else remote_key
        self.servant = Servant(
            Endpoint(Role.SERVER, environment.limits),
            environment,
            name=name,
            on_completed=self._go_on,
            on_reply=self._flush_all,
        )

    def __call__(self, in_bytes: Buffer, event_flag: int) -> int:
        """Take bytes and perform what they ask; send at most once if the flag says writable.

        Args:
            in_bytes: What has arrived; may be empty.
            event_flag: Bit 1: output may be sent now. Bit 0 says that there are bytes, which is seen anyway: they are
                taken without it too, as stock takes them. Callers use 3.

        Returns:
            0: shut down, close; 2: output is left, call again when writable; 1: wait for input.

        Raises:
            RemoteProtocolError: The peer broke the framing.
        """
        servant = self.servant
        if in_bytes and not servant.over:
            self._feed(in_bytes)
        if event_flag & WRITABLE and servant.output:
            self._send_once()
            servant.advance()  # what waited for the output to drain
        if servant.output:
            return WRITE
        if servant.over:
            servant.cancel()
            return SHUTDOWN
        return WAIT

    def _feed(self, in_bytes: Buffer) -> None:
        servant = self.servant
        try:
            if self._handshake is not None:
                found = self._handshake.receive_data(bytes(in_bytes))
                if not isinstance(found, str):
                    return
                in_bytes, self._handshake, self.remote_key = self._handshake.rest, None, found
                features = KeyText.parse(found).features
                servant.extended = features is not None
                servant.endpoint.takes = PeerLimits.told_by(features)
            with servant.lock:  # a completion may be reading in another thread
                servant.endpoint.receive_data(in_bytes)
            servant.advance()
        except RpcError:
            servant.cancel()
            raise

    def _send_once(self) -> bool:
        """Send once; returns False if nothing was accepted or the other side is broken."""
        servant = self.servant
        with servant.lock:
            if not servant.output:
                return False
            data = b"".join(servant.output.first(_GATHER))
            accepted = self._fsend(data)
            if accepted < 0:
                servant.over = True
                servant.output.clear()
            else:
                servant.output.consume(accepted)
            return accepted > 0

    def _flush_all(self) -> None:
        """Send everything, as a completion does; what is not accepted is asked for by ``want_write``."""
        while self._send_once():
            pass
        if self.servant.output and self._want_write is not None:
            self._want_write()

    def _go_on(self) -> None:
        """Continue with what is buffered behind a request that has just completed."""
        while True:
            self.servant.advance()
            self._flush_all()
            if not self.servant.congested or self.servant.output:
                break
        if self.servant.over and not self.servant.output:
            self.servant.cancel()


def create_event_driven_server(
    fsend: Callable[[Buffer], int],
    name: str,
    remote_key: str,
    *,
    environment: Environment | None = None,
    want_write: Callable[[], object] | None = None,
) -> EventHandler:
    """Make an event-driven server without a transport.

    Args:
        fsend: Takes bytes to send and returns how many it accepted; -1 for a broken connection.
        name: Of the server, for messages.
        remote_key: ``"%toinit"``: the handler first reads the rest of the handshake (length and key; the caller
            has consumed the magic word). Anything else: packets begin at once.
        environment: What its sessions may use; by default the global registry, without native code.
        want_write: Called when a completion could not send everything; the owner then calls the handler with
            empty bytes once output can be sent.

    Returns:
        ``handler(in_bytes, event_flag) -> int``; see :meth:`EventHandler.__call__`.
    """
    return EventHandler(fsend, name, remote_key, environment or Environment(), want_write)
