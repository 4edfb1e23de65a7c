"""Opening a session's connections: the first one and its lanes, by blocking or by awaiting."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rpcnb.errors import DeadlineExceeded, RpcError
from rpcnb.link.aiorunning import open_link
from rpcnb.link.dial import ClientKey, SessionTicket, connect_socket, expired, explain_init, no_resource, shake_hands
from rpcnb.link.interrupt import Guard
from rpcnb.link.link import Link
from rpcnb.link.running import run_flow
from rpcnb.link.wire import make_wire
from rpcnb.protocol import flows
from rpcnb.protocol.proof import proving
from rpcnb.transport.deadline import Deadline

if TYPE_CHECKING:
    from collections.abc import Callable

    from rpcnb.protocol.flows import Flow
    from rpcnb.protocol.handshake import KeyText
    from rpcnb.protocol.proof import Proof
    from rpcnb.transport.address import Address

__all__ = ["OPEN_SECONDS", "Dialer"]

OPEN_SECONDS = 10.0


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

    patient = False  # opening may have to wait for somebody else's board, for as long as that takes
    trust_output: bool | None = None  # show what its cells put out as the kernel's own; None: if it is

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
        self.depth = 1 if depth is None and constructor[:1] == ("rpc.WasmSession",) else depth  # a browser
        self._find_key = find_key

    def renew(self) -> None:
        """Prepare to open the session again."""
        if self._find_key is not None:
            self.key = self._find_key()

    @property
    def hops(self) -> bool:
        """Tell whether the session goes on to another server, or a program."""
        return self.constructor[:1] in (("rpc.Connect",), ("rpc.PopenSession",))

    def _ticket(self, answer: KeyText, proof: Proof | None) -> SessionTicket | None:
        """Return what lanes present; None where there can be none."""
        if not self.lanes or self.hops or "lanes" not in (answer.features or ()):
            return None
        name, _, secret = answer.options.get("-session", "").partition(".")
        if proof is not None:
            return SessionTicket(name, proof.lanes, proved=True) if name else None
        return SessionTicket(name, secret, proved=False) if name else None

    def open(self, deadline: Deadline, guard: Guard) -> tuple[Link, KeyText]:
        """Open the connection that opens the session."""
        link, answer, _, proof = self._open(self.key, flows.initialize(self.constructor), deadline, guard)
        link.ticket = self._ticket(answer, proof)
        return link, answer

    async def open_awaiting(self, deadline: Deadline) -> tuple[Any, KeyText]:
        """Open the connection that opens an awaited session."""
        flow = flows.initialize(self.constructor)
        link, answer, _, proof = await open_link(self.address, self.key, self.depth, flow, deadline)
        link.ticket = self._ticket(answer, proof)
        return link, answer

    async def open_lane_awaiting(self, ticket: SessionTicket, number: int, flow: Flow[Any]) -> tuple[Any, Any]:
        """Do as :meth:`open_lane`, awaited."""
        deadline = Deadline(OPEN_SECONDS, f"lane {number} to {self.address}")
        key = ClientKey.for_lane(ticket, number, self.key.limits)
        link, _, result, _ = await open_link(self.address, key, self.depth, flow, deadline)
        link.lane = number
        return link, result

    def open_lane(self, ticket: SessionTicket, number: int, flow: Flow[Any], seconds: float) -> tuple[Link, Any]:
        """Open a further connection within ``seconds``, initialized by ``flow``; returns the flow's result too."""
        deadline = Deadline(seconds, f"lane {number} to {self.address}")
        key = ClientKey.for_lane(ticket, number, self.key.limits)
        with Guard() as guard:
            link, _, result, _ = self._open(key, flow, deadline, guard)
        link.lane = number
        return link, result

    def _open(
        self, key: ClientKey, flow: Flow[Any], deadline: Deadline, guard: Guard
    ) -> tuple[Link, KeyText, Any, Proof | None]:
        where, key = str(self.address), key.again()
        sock = connect_socket(self.address, deadline, guard)
        try:
            answer = shake_hands(sock, key, where, deadline, guard)
            proof = key.proof(answer, where, getattr(sock, "fingerprint", ""))
            with no_resource(where, "connect"):
                link = Link(make_wire(sock, answer, self.address, self.depth, key.limits))
        except BaseException:
            sock.close()
            raise
        try:
            if proof is not None:
                flow = proving(flow, proof, where)
            return link, answer, run_flow(link, flow, deadline, guard), proof
        except DeadlineExceeded as error:
            link.close()
            raise expired(where, "init", error) from None
        except BaseException as error:
            link.close()
            if isinstance(error, RpcError):
                raise explain_init(where, error) from None
            raise
