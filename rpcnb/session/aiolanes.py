"""How an awaited session opens its connections and its lanes; the twin of :mod:`rpcnb.session.lanes`."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from rpcnb.errors import DeadlineExceeded, RpcError
from rpcnb.net.aiolink import AsyncLink, dial
from rpcnb.net.dial import ClientKey, expired, explain_init
from rpcnb.net.link import Deadline
from rpcnb.protocol import flows
from rpcnb.protocol.flows import Send, SendCalls, Wait
from rpcnb.protocol.messages import CallFunc
from rpcnb.session.control import CONTROL_LANE, Control, LanesBase, look_up_control, may_answer_later
from rpcnb.session.lanes import OPEN_SECONDS, Dialer, make_wire

if TYPE_CHECKING:
    from collections.abc import Callable

    from rpcnb.protocol.flows import Flow
    from rpcnb.protocol.handshake import KeyText
    from rpcnb.session.control import Route

__all__ = ["AsyncLanes", "await_flow", "open_dialled", "open_link"]


async def await_flow(
    route: AsyncLink | Route, flow: Flow[Any], lanes: AsyncLanes | None = None, tickets: list[Any] | None = None
) -> Any:
    """Run a flow by awaiting; what was asked and not answered is abandoned when it is left early.

    Args:
        route: A link, or the way of an operation.
        flow: What to run.
        lanes: Where a control lane may be had for calls that may answer later.
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
                if lanes is not None and may_answer_later(step):
                    route.control = await lanes.control()  # type: ignore[union-attr]  # with lanes it is a route
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


async def open_link(dialer: Dialer, key: ClientKey, flow: Flow[Any], deadline: Deadline) -> tuple[Any, KeyText, Any]:
    """Open a connection that ``flow`` initializes; returns its link, the server's answer and the flow's result."""
    where = str(dialer.address)
    sock, answer = await dial(dialer.address, key, deadline)
    link = AsyncLink(make_wire(sock, answer, dialer.address, dialer.depth))
    try:
        seconds = None if deadline.at is None else deadline.left()
        return link, answer, await asyncio.wait_for(await_flow(link, flow), seconds)
    except (asyncio.TimeoutError, DeadlineExceeded):
        link.close()
        raise expired(where, "init", deadline.exceeded()) from None
    except BaseException as error:
        link.close()
        if isinstance(error, RpcError):
            raise explain_init(where, error) from None
        raise


async def open_dialled(dialer: Dialer, deadline: Deadline) -> tuple[AsyncLink, KeyText]:
    """Open the connection that opens a session, where the dialler aims."""
    link, answer, _ = await open_link(dialer, dialer.key, flows.initialize(dialer.constructor), deadline)
    return link, answer


class AsyncLanes(LanesBase):
    """The lanes of an awaited session.

    Args:
        dialer: Opens them.
        ticket: What they present.
        name: Of the session, for messages.
    """

    def __init__(self, dialer: Dialer, ticket: str, name: str) -> None:
        self._opening = asyncio.Lock()
        super().__init__(ticket, dialer.lanes, name, self._opening)
        self._dialer = dialer
        self._tasks: set[asyncio.Task[Any]] = set()

    async def control(self) -> Control | None:
        """Return the control lane, opened now if need be; None if it cannot be."""
        if self.opened is None and not self.refused:
            async with self._opening:
                if self.opened is None and not (self.refused or self.closed):
                    found = await self._open(CONTROL_LANE, look_up_control())
                    if found is not None:
                        self.opened = Control(*found, self.numbers, self.control_lost)
        return self.opened

    async def bulk(self) -> AsyncLink | None:
        """Return a connection for bulk data; None if there is none."""
        async with self._opening:
            number = self.missing_bulk
            if number:
                found = await self._open(number, flows.initialize())
                if found is not None:
                    self.bulk_links.append(found[0])
            link: AsyncLink | None = self.least_busy()
            return link

    async def _open(self, number: int, flow: Flow[Any]) -> tuple[AsyncLink, Any] | None:
        deadline = Deadline(OPEN_SECONDS, f"lane {number} to {self._dialer.address}")
        try:
            link, _, result = await open_link(self._dialer, ClientKey.for_lane(self.ticket, number), flow, deadline)
        except RpcError as error:
            self.failed(error)
            return None
        link.lane = number
        if self.closed:
            link.close()
            return None
        self.wires.append(link.wire)
        return link, result

    def _do_soon(self, use: Callable[[Control], object]) -> None:
        async def open_and_use() -> None:
            control = await self.control()
            if control is not None:
                use(control)

        if not self.refused and not self.closed:
            task = asyncio.ensure_future(open_and_use())
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    def close(self) -> None:
        """End all lanes."""
        super().close()
        for task in self._tasks:
            task.cancel()
