"""The lanes of a blocking session: further connections, opened when they are first needed.

Lane 1 is the control lane; 2 and 3 carry bulk copies. Where they are not to be had (a stock server, a hop, a proxy,
``lanes=0``), or cannot be opened (a firewall), everything works on the one connection, in stock's order.
"""

from __future__ import annotations

import logging
import threading
from typing import TYPE_CHECKING, Any

from rpcnb.errors import RpcError
from rpcnb.link import iothread
from rpcnb.link.control import CONTROL_LANE, Control, LanesBase, look_up_control
from rpcnb.link.dialer import OPEN_SECONDS, Dialer
from rpcnb.link.link import Link
from rpcnb.protocol import flows
from rpcnb.transport.deadline import NO_DEADLINE, Deadline
from rpcnb.transport.turn import Turn

if TYPE_CHECKING:
    from collections.abc import Callable

    from rpcnb.link.dial import SessionTicket
    from rpcnb.protocol.flows import Flow

__all__ = ["Lanes"]

log = logging.getLogger(__name__)


class Lanes(LanesBase):
    """The lanes of a blocking session.

    Args:
        dialer: Opens them.
        ticket: What they present.
        name: Of the session, for messages.
    """

    def __init__(self, dialer: Dialer, ticket: SessionTicket, name: str) -> None:
        self._opening = Turn()
        super().__init__(ticket, dialer.lanes, name, self._opening)
        self._dialer = dialer

    def control(self, deadline: Deadline = NO_DEADLINE) -> Control | None:
        """Return the control lane, opened now if need be; None if it cannot be.

        Raises:
            DeadlineExceeded: The time of the operation that wants it was over first.
        """
        control = self.opened
        if control is not None or self.refused:
            return control
        with self._opening.held(deadline, self.name):
            if self.opened is None and not (self.refused or self.closed):
                found = self._open(CONTROL_LANE, look_up_control(), deadline)
                if found is not None:
                    self.control_lane = Control(*found, self.numbers, self.control_lost)
                    self.close_again()
        return self.opened

    def bulk(self, deadline: Deadline = NO_DEADLINE) -> Link | None:
        """Return a connection for bulk data; None if there is none.

        Raises:
            DeadlineExceeded: The time of the operation that wants it was over first.
        """
        with self._opening.held(deadline, self.name):
            number = self.missing_bulk
            if number:
                found = self._open(number, flows.initialize(), deadline)
                if found is not None:
                    self.bulk_links.append(found[0])
                    self.close_again()
            link: Link | None = self.least_busy()
            return link

    def _open(self, number: int, flow: Flow[Any], deadline: Deadline) -> tuple[Link, Any] | None:
        try:
            found = self._dialer.open_lane(self.ticket, number, flow, min(OPEN_SECONDS, deadline.left()))
        except RpcError as error:
            deadline.left()  # raises if it was the operation's time that was over, not the lane's
            self.failed(error)
            return None
        if self.closed:
            found[0].close()
            return None
        self.opened_link(found[0])
        iothread.IO_THREAD.watch(found[0])
        return found

    def _do_soon(self, use: Callable[[Control], object]) -> None:
        def open_and_use() -> None:
            control = self.control()
            if control is not None:
                use(control)

        if not self.refused and not self.closed:
            threading.Thread(target=open_and_use, name="rpcnb-lane", daemon=True).start()
