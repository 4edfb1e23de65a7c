"""One session in the caller's thread, over a socket that somebody else accepted."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

from rpcnb.protocol.codes import Role
from rpcnb.protocol.endpoint import Endpoint
from rpcnb.runtime.environment import Environment
from rpcnb.runtime.servant import Servant

if TYPE_CHECKING:
    import socket

__all__ = ["serve_blocking"]

_GATHER = 64


def serve_blocking(sock: socket.socket, environment: Environment | None = None) -> None:
    """Serve one session over ``sock`` until its client ends it; the handshake has been done.

    Args:
        sock: Connected and blocking; it is left open.
        environment: What the session may use; by default the global registry, without native code.

    Asynchronous sessions are refused, as in TVM: nothing here could complete them. Coroutine functions of a plain
    session run to their end.

    Raises:
        RemoteProtocolError: The client broke the framing.
    """
    completed = threading.Event()
    endpoint = Endpoint(Role.SERVER)
    servant = Servant(endpoint, environment or Environment(), name="blocking", on_completed=completed.set, plain=True)
    try:
        while True:
            completed.clear()
            servant.advance()
            if servant.parked is not None:
                completed.wait()
                continue
            if servant.output:
                while servant.output:
                    servant.output.consume(sock.sendmsg(servant.output.first(_GATHER)))
                continue  # requests may have waited for room in the output
            if servant.over:
                return
            count = sock.recv_into(endpoint.get_buffer())
            if count == 0:
                endpoint.receive_eof()
                endpoint.next_message()  # raises if the stream ended inside a packet
                return
            endpoint.received(count)
    finally:
        servant.cancel()
