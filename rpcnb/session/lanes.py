"""How a blocking session opens its connections, and its lanes: further ones, opened when they are first needed.

Lane 1 is the control lane; 2 and 3 carry bulk copies. Where they are not to be had (a stock server, a hop, a proxy,
``lanes=0``), or cannot be opened (a firewall), everything works on the one connection, in stock's order.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from typing import TYPE_CHECKING, Any

from rpcnb.errors import DeadlineExceeded, RpcError
from rpcnb.net import iothread
from rpcnb.net.dial import ClientKey, connect_socket, expired, explain_init, shake_hands
from rpcnb.net.interrupt import Guard
from rpcnb.net.link import NO_DEADLINE, Deadline, Link
from rpcnb.net.wire import Wire
from rpcnb.protocol import flows
from rpcnb.protocol.codes import Role
from rpcnb.protocol.endpoint import Endpoint
from rpcnb.session.control import CONTROL_LANE, Control, LanesBase, look_up_control
from rpcnb.session.running import run_flow

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from socket import socket

    from rpcnb.net.address import Address
    from rpcnb.protocol.flows import Flow
    from rpcnb.protocol.handshake import KeyText

__all__ = ["OPEN_SECONDS", "Dialer", "Lanes", "make_wire"]

log = logging.getLogger(__name__)

OPEN_SECONDS = 10.0


def make_wire(sock: socket, answer: KeyText, address: Address, depth: int | None) -> Wire:
    """Return the client's side of a connection that has been greeted."""
    wire = Wire(sock, Endpoint(Role.CLIENT), str(address))
    wire.quick_ack = answer.features is None
    wire.depth = depth
    return wire


class Dialer:
    """What is needed to open a session's connections, and to open it again.

    Args:
        address: The server.
        key: What the client presents.
        constructor: Name and arguments of the session constructor.
        lanes: Further connections at most.
        depth: Requests on the way on one connection at most; None for any number.
        find_key: Returns what the client presents, when the session is opened again: a server of this user that was
            started again has another token.
    """

    def __init__(
        self,
        address: Address,
        key: ClientKey,
        constructor: tuple[Any, ...],
        lanes: int,
        depth: int | None = None,
        find_key: Callable[[], ClientKey] | None = None,
    ) -> None:
        self.address = address
        self.key = key
        self.constructor = constructor
        self.lanes = lanes
        self.depth = depth
        self._find_key = find_key

    def renew(self) -> None:
        """Prepare to open the session again."""
        if self._find_key is not None:
            self.key = self._find_key()

    @property
    def hops(self) -> bool:
        """Tell whether the session goes on to another server."""
        return bool(self.constructor) and self.constructor[0] == "rpc.Connect"

    def ticket(self, answer: KeyText) -> str:
        """Return what lanes present, or nothing where there can be none."""
        if not self.lanes or self.hops or "lanes" not in (answer.features or ()):
            return ""
        return answer.options.get("-session", "")

    def open(self, deadline: Deadline, guard: Guard) -> tuple[Link, KeyText]:
        """Open the connection that opens the session."""
        link, answer, _ = self._open(self.key, flows.initialize(self.constructor), deadline, guard)
        return link, answer

    async def open_awaiting(self, deadline: Deadline) -> tuple[Any, KeyText]:
        """Open the connection that opens an awaited session."""
        from rpcnb.session.aiolanes import open_dialled

        return await open_dialled(self, deadline)

    def open_lane(self, ticket: str, number: int, flow: Flow[Any], seconds: float) -> tuple[Link, Any]:
        """Open a further connection within ``seconds``, initialized by ``flow``; returns the flow's result too."""
        deadline = Deadline(seconds, f"lane {number} to {self.address}")
        with Guard() as guard:
            link, _, result = self._open(ClientKey.for_lane(ticket, number), flow, deadline, guard)
        link.lane = number
        return link, result

    def _open(self, key: ClientKey, flow: Flow[Any], deadline: Deadline, guard: Guard) -> tuple[Link, KeyText, Any]:
        where = str(self.address)
        sock = connect_socket(self.address, deadline, guard)
        try:
            answer = shake_hands(sock, key, where, deadline, guard)
            link = Link(make_wire(sock, answer, self.address, self.depth))
        except BaseException:
            sock.close()
            raise
        try:
            return link, answer, run_flow(link, flow, deadline, guard)
        except DeadlineExceeded as error:
            link.close()
            raise expired(where, "init", error) from None
        except BaseException as error:
            link.close()
            if isinstance(error, RpcError):
                raise explain_init(where, error) from None
            raise


class Lanes(LanesBase):
    """The lanes of a blocking session.

    Args:
        dialer: Opens them.
        ticket: What they present.
        name: Of the session, for messages.
    """

    def __init__(self, dialer: Dialer, ticket: str, name: str) -> None:
        self._opening = threading.Lock()
        super().__init__(ticket, dialer.lanes, name, self._opening)
        self._dialer = dialer

    def control(self, deadline: Deadline = NO_DEADLINE) -> Control | None:
        """Return the control lane, opened now if need be; None if it cannot be.

        Raises:
            DeadlineExceeded: The time of the operation that wants it was over first.
        """
        if self.opened is None and not self.refused:
            with self._opening_within(deadline):
                if self.opened is None and not (self.refused or self.closed):
                    found = self._open(CONTROL_LANE, look_up_control(), deadline)
                    if found is not None:
                        self.opened = Control(*found, self.numbers, self.control_lost)
        return self.opened

    def bulk(self, deadline: Deadline = NO_DEADLINE) -> Link | None:
        """Return a connection for bulk data; None if there is none.

        Raises:
            DeadlineExceeded: The time of the operation that wants it was over first.
        """
        with self._opening_within(deadline):
            number = self.missing_bulk
            if number:
                found = self._open(number, flows.initialize(), deadline)
                if found is not None:
                    self.bulk_links.append(found[0])
            link: Link | None = self.least_busy()
            return link

    @contextlib.contextmanager
    def _opening_within(self, deadline: Deadline) -> Iterator[None]:
        """Take the turn to open lanes; another thread may be at it."""
        if not self._opening.acquire(timeout=deadline.left()):
            raise deadline.exceeded()
        try:
            yield
        finally:
            self._opening.release()

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
        self.wires.append(found[0].wire)
        iothread.IO_THREAD.watch(found[0])
        return found

    def _do_soon(self, use: Callable[[Control], object]) -> None:
        def open_and_use() -> None:
            control = self.control()
            if control is not None:
                use(control)

        if not self.refused and not self.closed:
            threading.Thread(target=open_and_use, name="rpcnb-lane", daemon=True).start()
