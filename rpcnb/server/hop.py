"""Going on to another server: the session constructor ``rpc.Connect``.

Every request of the outer client is performed on the onward session; handles pass through unchanged, exceptions gain
one prefix per hop, and nothing blocks the loop: each request parks until the onward reply has come.
"""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING, Any

from rpcnb.errors import RpcError
from rpcnb.link.aiolink import AsyncLink, dial
from rpcnb.link.dial import ClientKey
from rpcnb.link.wire import Wire
from rpcnb.protocol import flows
from rpcnb.protocol.codes import Role
from rpcnb.protocol.endpoint import Endpoint
from rpcnb.runtime.forwarding import ForwardingSession
from rpcnb.transport.address import Address
from rpcnb.transport.deadline import Deadline

if TYPE_CHECKING:
    from rpcnb.protocol.messages import Reply, Request
    from rpcnb.runtime.completion import Done

__all__ = ["Onward", "connect_constructor", "forward"]

_CONNECT_TIMEOUT = 10.0


class Onward:
    """The onward connection, as :class:`ForwardingSession` needs it."""

    def __init__(self, link: AsyncLink) -> None:
        self.link = link

    def exchange(self, request: Request, done: Done) -> None:
        """Send ``request`` onward; ``done`` gets the reply."""
        try:
            ticket = self.link.send(request)
        except RpcError as error:
            done.error(error)
            return

        def settled() -> None:
            reply: Reply | None = ticket.reply
            if reply is not None:
                self.link.loop.call_soon(done, reply)
            else:
                assert ticket.error is not None
                self.link.loop.call_soon(done.error, ticket.error)

        if ticket.done:
            settled()
        else:
            ticket.waker = settled

    def close(self) -> None:
        """End the onward session; from any thread."""
        loop = self.link.loop
        if not loop.is_closed():
            loop.call_soon_threadsafe(self.link.close)


async def connect_constructor(url: str, port: int, key: str = "", enable_logging: bool = False, *args: Any) -> Any:
    """Open an onward session: TVM's ``rpc.Connect``.

    Args:
        url: Host of the next server.
        port: Its port.
        key: Its bare key, options allowed.
        enable_logging: TVM's; unused here.
        args: A further session constructor with its arguments, for the next server.
    """
    address = Address(url, int(port), key)
    deadline = Deadline(_CONNECT_TIMEOUT, f"connect to {address}")
    sock, _ = await dial(address, ClientKey(key, extensions=False), deadline)
    wire = Wire(sock, Endpoint(Role.CLIENT), str(address))
    wire.is_stock = True  # we offer no extensions
    return await forward(Onward(AsyncLink(wire)), args, deadline.left())


async def forward(onward: Onward, args: tuple[Any, ...], seconds: float | None) -> ForwardingSession:
    """Return a session that passes all on, once the next server has one; ``onward`` is ended if that fails.

    Args:
        onward: A connection that has been greeted.
        args: Session constructor for the next server, with its arguments.
        seconds: How long that may take.
    """
    link = onward.link
    flow = flows.initialize(args)
    try:
        ticket = link.send(next(flow))  # type: ignore[arg-type]  # its only step is a request
        await asyncio.wait_for(link.wait(ticket), seconds)
        with contextlib.suppress(StopIteration):
            flow.send(ticket.result())
    except BaseException:
        onward.close()
        raise
    return ForwardingSession(onward)
