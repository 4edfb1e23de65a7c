"""Running flows by awaiting, and opening a connection with one; the twin of :mod:`rpcnb.link.running`."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from rpcnb.errors import DeadlineExceeded, RpcError
from rpcnb.link.aiolink import AsyncLink, dial
from rpcnb.link.control import may_answer_later
from rpcnb.link.dial import expired, explain_init
from rpcnb.link.wire import make_wire
from rpcnb.protocol.flows import Send, SendCalls, Wait
from rpcnb.protocol.messages import CallFunc
from rpcnb.protocol.proof import proving
from rpcnb.transport.within import within

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from rpcnb.link.control import Control, Route
    from rpcnb.link.dial import ClientKey
    from rpcnb.protocol.flows import Flow
    from rpcnb.protocol.handshake import KeyText
    from rpcnb.protocol.proof import Proof
    from rpcnb.transport.address import Address
    from rpcnb.transport.deadline import Deadline

__all__ = ["await_flow", "open_link"]


async def await_flow(
    route: AsyncLink | Route,
    flow: Flow[Any],
    control: Callable[[], Awaitable[Control | None]] | None = None,
    tickets: list[Any] | None = None,
) -> Any:
    """Run a flow by awaiting; what was asked and not answered is abandoned when it is left early.

    Args:
        route: A link, or the way of an operation.
        flow: What to run.
        control: Opens the control lane, for calls that may answer later.
        tickets: Receives the operation's tickets.
    """
    tickets = [] if tickets is None else tickets
    link = route if isinstance(route, AsyncLink) else route.link
    try:
        step: Any = next(flow)
        while True:
            if isinstance(step, Send):
                tickets.append(route.send(step.request))
                step = flow.send(tickets[-1])
                continue
            if isinstance(step, SendCalls):
                sent = [route.send(CallFunc(step.handle, args)) for args in step.calls]
                tickets += sent
                step = flow.send(sent)
                continue
            if isinstance(step, Wait):
                ticket = step.ticket
            else:
                if control is not None and may_answer_later(step):
                    route.control = await control()  # type: ignore[union-attr]  # with lanes it is a route
                ticket = route.send(step)
                tickets.append(ticket)
            if not ticket.done:
                await link.wait(ticket)
            ticket.taken = True  # what the reply brings is the flow's from now on
            step = flow.send(ticket.reply) if ticket.error is None else flow.throw(ticket.error)
    except StopIteration as end:
        return end.value
    except BaseException:
        flow.close()
        route.abandon([ticket for ticket in tickets if not ticket.taken])
        raise


async def open_link(
    address: Address, key: ClientKey, depth: int | None, flow: Flow[Any], deadline: Deadline
) -> tuple[Any, KeyText, Any, Proof | None]:
    """Open a connection that ``flow`` initializes.

    Returns:
        Its link, the server's answer, the flow's result, and what has been proved.
    """
    where, key = str(address), key.again()
    sock, answer = await dial(address, key, deadline)
    try:
        proof = key.proof(answer, where, getattr(sock, "fingerprint", ""))
        link = AsyncLink(make_wire(sock, answer, address, depth, key.limits))
    except BaseException:
        sock.close()
        raise
    try:
        seconds = None if deadline.at is None else deadline.left()
        if proof is not None:
            flow = proving(flow, proof, where)
        return link, answer, await within(await_flow(link, flow), seconds), proof
    except (asyncio.TimeoutError, DeadlineExceeded):
        link.close()
        raise expired(where, "init", deadline.exceeded()) from None
    except BaseException as error:
        link.close()
        if isinstance(error, RpcError):
            raise explain_init(where, error) from None
        raise
