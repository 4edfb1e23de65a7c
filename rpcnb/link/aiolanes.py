"""The lanes of an awaited session; the twin of :mod:`rpcnb.link.lanes`."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from rpcnb.errors import RpcError
from rpcnb.link.aiolink import AsyncLink
from rpcnb.link.control import CONTROL_LANE, Control, LanesBase, look_up_control
from rpcnb.link.dialer import Dialer
from rpcnb.protocol import flows

if TYPE_CHECKING:
    from collections.abc import Callable

    from rpcnb.link.dial import SessionTicket
    from rpcnb.protocol.flows import Flow

__all__ = ["AsyncLanes"]


class AsyncLanes(LanesBase):
    """The lanes of an awaited session.

    Args:
        dialer: Opens them.
        ticket: What they present.
        name: Of the session, for messages.
    """

    def __init__(self, dialer: Dialer, ticket: SessionTicket, name: str) -> None:
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
                        self.control_lane = Control(*found, self.numbers, self.control_lost)
                        self.close_again()
        return self.opened

    async def bulk(self) -> AsyncLink | None:
        """Return a connection for bulk data; None if there is none."""
        async with self._opening:
            number = self.missing_bulk
            if number:
                found = await self._open(number, flows.initialize())
                if found is not None:
                    self.bulk_links.append(found[0])
                    self.close_again()
            link: AsyncLink | None = self.least_busy()
            return link

    async def _open(self, number: int, flow: Flow[Any]) -> tuple[AsyncLink, Any] | None:
        try:
            link, result = await self._dialer.open_lane_awaiting(self.ticket, number, flow)
        except RpcError as error:
            self.failed(error)
            return None
        if self.closed:
            link.close()
            return None
        self.opened_link(link)
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
