"""Opening sessions: :func:`connect`, :func:`connect_async` and :class:`LocalSession`."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any, TypeVar

from rpcnb.net.address import Address, is_loopback, parse_address
from rpcnb.net.dial import ClientKey
from rpcnb.net.interrupt import Guard
from rpcnb.net.link import Deadline
from rpcnb.session.base import SessionBase
from rpcnb.session.lanes import Dialer
from rpcnb.session.session import Session

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rpcnb.session.aio import AsyncSession

__all__ = ["connect", "connect_async"]

S = TypeVar("S", bound=SessionBase)

log = logging.getLogger(__name__)


def _prepare(
    url: str, port: int, key: str, session_timeout: float, token: str | None, extensions: bool
) -> tuple[Address, ClientKey]:
    address = parse_address(url, port, key)
    if token is None and is_loopback(address.host):
        from rpcnb.net.runfiles import find_token

        token = find_token(address.port)
    return address, ClientKey(address.key, session_timeout, token, extensions)


def _opened(session: S) -> S:
    """Tell the observers that a session was opened."""
    session._opened()
    return session


def connect(
    url: str,
    port: int = 9090,
    key: str = "",
    session_timeout: float = 0,
    session_constructor_args: Sequence[Any] | None = None,
    enable_logging: bool = False,
    *,
    token: str | None = None,
    timeout: float | None = 10.0,
    extensions: bool = True,
    lanes: int = 3,
    lost_after: float | None = None,
    depth: int | None = None,
) -> Session:
    """Open a session with an RPC server, rpcnb's or stock TVM's.

    Args:
        url: Host, ``host:port``, or ``rpc://host:port/key``.
        port: Port, if the URL names none.
        key: Key that the server must serve, if the URL names none.
        session_timeout: Seconds after which the server ends the session; 0 for never.
        session_constructor_args: Name and arguments of a session constructor of the server, for example
            ``["rpc.Connect", "inner-host", 9090, "key"]`` to go on to another server through this one.
        enable_logging: Log every operation at level DEBUG.
        token: The server's token; one of a server of this user on this machine is found without it.
        timeout: Seconds for resolving, connecting, handshake and init together; None for no limit.
        extensions: Offer rpcnb's extensions; False makes us stock to the byte.
        lanes: Further connections that the session may open to an rpcnb server when it needs them: one for calls that
            overlap and for cancelling, two for bulk copies beside calls. 0: everything on one connection.
        lost_after: Seconds of silence, while the server owes something, after which the session is lost; by default
            it is ``unresponsive`` after 40 s and calls go on waiting.
        depth: Requests on the way on one connection at most. Pass 1 for event-driven stock servers (a browser behind
            a stock proxy): they stall when a request arrives behind one that answers later.

    Raises:
        ConnectFailed: No session came about; the text names the phase and what was seen. Its subclasses are
            NotAnRpcServer, KeyMismatch (wrong key or token), DuplicateKey and VersionMismatch.
        RemoteError: The session constructor failed.
        ValueError: ``url`` is not an address.
    """
    address, client_key = _prepare(url, port, key, session_timeout, token, extensions)
    deadline = Deadline(timeout, f"connect to {address}")
    dialer = Dialer(address, client_key, tuple(session_constructor_args or ()), lanes, depth)
    with Guard() as guard:
        link, answer = dialer.open(deadline, guard)
    if enable_logging:
        log.debug("session with %s opened, key %r", address, address.key)
    return _opened(Session(link, address.key, answer, dialer=dialer, lost_after=lost_after))


async def connect_async(
    url: str,
    port: int = 9090,
    key: str = "",
    session_timeout: float = 0,
    session_constructor_args: Sequence[Any] | None = None,
    enable_logging: bool = False,
    *,
    token: str | None = None,
    timeout: float | None = 10.0,
    extensions: bool = True,
    lanes: int = 3,
    lost_after: float | None = None,
    depth: int | None = None,
) -> AsyncSession:
    """Open an awaited session in the running event loop; arguments and errors as :func:`connect`."""
    from rpcnb.session.aio import AsyncSession
    from rpcnb.session.aiolanes import open_async

    address, client_key = _prepare(url, port, key, session_timeout, token, extensions)
    dialer = Dialer(address, client_key, tuple(session_constructor_args or ()), lanes, depth)
    link, answer = await open_async(dialer, Deadline(timeout, f"connect to {address}"))
    if enable_logging:
        log.debug("session with %s opened, key %r", address, address.key)
    return _opened(AsyncSession(link, address.key, answer, dialer=dialer, lost_after=lost_after))
