"""Opening sessions: :func:`connect`, :func:`connect_async` and :class:`LocalSession`."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeVar

from rpcnb import parts
from rpcnb.client.base import SessionBase
from rpcnb.client.session import Session
from rpcnb.link.dial import ClientKey
from rpcnb.link.dialer import Dialer
from rpcnb.link.hosts import find_host, find_secret
from rpcnb.link.interrupt import Guard
from rpcnb.protocol.secret import Secret, hidden
from rpcnb.transport.address import DEFAULT_PORT, parse_address
from rpcnb.transport.deadline import Deadline

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from rpcnb.client.aio import AsyncSession
    from rpcnb.protocol.codes import Limits
    from rpcnb.transport.tlsfiles import Tls

__all__ = ["connect", "connect_async", "open_session", "open_session_async"]

S = TypeVar("S", bound=SessionBase)

log = logging.getLogger(__name__)

_BESIDE_TEXT = 1 << 20  # bytes of a packet besides its text, which counts to ``Limits.call``


def _make_dialer(
    url: str,
    port: int,
    key: str,
    session_timeout: float,
    session_constructor_args: Sequence[Any] | None,
    token: str | None,
    extensions: bool,
    lanes: int,
    depth: int | None,
    headers: Mapping[str, str] | None,
    limits: Limits | None,
    plain_token: bool,
    tls: Tls | None,
    trust_output: bool | None,
) -> Dialer:
    if limits is not None:
        limits = replace(limits, call=max(limits.call, limits.text + _BESIDE_TEXT))
    named = find_host(url)
    if named is not None:
        url, key = named.whole, key or named.key
    address = parse_address(url, port if port != DEFAULT_PORT or "://" not in url else None, key, headers)
    if tls is not None:
        if not address.is_secure:
            raise ValueError(f"tls= is for rpcs:// and wss:// addresses, not for {url!r}")
        address = replace(address, tls=tls)
    constructor = tuple(session_constructor_args or ())
    given = [word for word in address.key.split(" ")[1:] if word.startswith("-token=")]
    if given:  # as TVM's client is given it
        address = replace(address, key=address.key.replace(f" {given[0]}", ""))
        token = token or Secret(given[0].partition("=")[2])
    make: Callable[..., Dialer] | None = parts.find(f"scheme {address.scheme}")
    if make is not None:
        if plain_token:
            raise ValueError("plain_token=True: whoever offers a board at a tracker would get the token")
        if token is None and named is not None and named.token:
            token = hidden(named.token)
        tracked = make(
            address, 1, session_timeout, 5, constructor, token, extensions, lanes=lanes, depth=depth, limits=limits
        )
        tracked.trust_output = trust_output
        return tracked

    def find_key() -> ClientKey:
        found = token
        if found is None and extensions:
            found = find_secret(address, named)
        return ClientKey(address.key, session_timeout, found, extensions, limits, plain_token=plain_token)

    dialer = Dialer(address, find_key(), constructor, lanes, depth, find_key)
    dialer.trust_output = True if trust_output is None and named is not None and named.trust_output else trust_output
    return dialer


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
    headers: Mapping[str, str] | None = None,
    limits: Limits | None = None,
    plain_token: bool = False,
    tls: Tls | None = None,
    trust_output: bool | None = None,
) -> Session:
    """Open a session with an RPC server, rpcnb's or stock TVM's.

    Args:
        url: A name of this user's file of hosts (docs/secrets.md); host, ``host:port``, ``rpc://host:port/key``;
            ``rpcs://host:port/key#sha256=...`` for a server with TLS, as it prints it (without the fingerprint
            where it is known since, or its certificate signed); ``tracker://host:port/key`` for a board that a tracker
            hands out; ``ws://host:port/ws`` or ``wss://...`` for a server behind the web.
        port: Port, if the URL names none.
        key: Key that the server must serve, if the URL names none.
        session_timeout: Seconds after which the server ends the session; 0 for never.
        session_constructor_args: Name and arguments of a session constructor of the server, for example
            ``["rpc.Connect", "inner-host", 9090, "key"]`` to go on to another server through this one.
        enable_logging: Log every operation at level DEBUG.
        token: The server's token. It is proved, not sent, and the server must prove that it knows it too. Without it:
            that of this user's own server on this machine, else ``RPCNB_TOKEN`` of the environment, else that of the
            file of hosts.
        timeout: Seconds for resolving, connecting, handshake and init together; None for no limit. Waiting for a
            tracker's board takes as long as it takes (:meth:`TrackerSession.request` has a limit for that too).
        extensions: Offer rpcnb's extensions; False makes us stock to the byte.
        lanes: Further connections that the session may open to an rpcnb server when it needs them: one for calls that
            overlap and for cancelling, two for bulk copies beside calls. 0: everything on one connection.
        lost_after: Seconds of silence, while the server owes something, after which the session is lost; by default
            it is ``unresponsive`` after 40 s and calls go on waiting.
        depth: Requests on the way on one connection at most; 1 for ``rpc.WasmSession``, else any number. Event-driven
            stock servers (a browser) are served with any: where they do not look at their input, they are made to.
        headers: Further HTTP headers for ``ws://`` and ``wss://``, such as ``{"Authorization": "token ..."}`` of a
            hub.
        limits: What the server may send at most: ``rpcnb.Limits(text=64 << 20)`` for results that are longer texts than
            16 MiB, ``bytes_argument`` for bytes over 1 GiB. A longer result is an error of its call.
        plain_token: Send the token in clear: to an rpcnb server older than proofs, or through what must repeat it.
        tls: Certificates of one's own, for ``rpcs://`` and ``wss://``.
        trust_output: Show what remote cells put out as this kernel's own (:attr:`Session.trust_output`).

    Raises:
        ConnectFailed: No session came about; the text names the phase and what was seen. Its subclasses are
            NotAnRpcServer, KeyMismatch (wrong key or token), DuplicateKey and VersionMismatch.
        RemoteError: The session constructor failed.
        ValueError: ``url`` is not an address; or the token could only be sent in clear.
    """
    token, args = hidden(token), session_constructor_args
    dialer = _make_dialer(
        url,
        port,
        key,
        session_timeout,
        args,
        token,
        extensions,
        lanes,
        depth,
        headers,
        limits,
        plain_token,
        tls,
        trust_output,
    )
    session = open_session(dialer, dialer.address.key, _limit(dialer, timeout), lost_after)
    if enable_logging:
        log.debug("session with %s opened, key %r", session.peer, session.key)
    return session


def _limit(dialer: Dialer, timeout: float | None) -> Deadline:
    """Return the limit for connecting; waiting for a tracker's board takes as long as it takes."""
    return Deadline(None if dialer.patient else timeout, f"connect to {dialer.address}")


def open_session(dialer: Dialer, key: str, deadline: Deadline, lost_after: float | None = None) -> Session:
    """Open a blocking session where ``dialer`` leads."""
    with Guard() as guard:
        link, answer = dialer.open(deadline, guard)
    return _opened(Session(link, key, answer, dialer=dialer, lost_after=lost_after))


async def open_session_async(
    dialer: Dialer, key: str, deadline: Deadline, lost_after: float | None = None
) -> AsyncSession:
    """Open an awaited session where ``dialer`` leads."""
    from rpcnb.client.aio import AsyncSession

    link, answer = await dialer.open_awaiting(deadline)
    return _opened(AsyncSession(link, key, answer, dialer=dialer, lost_after=lost_after))


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
    headers: Mapping[str, str] | None = None,
    limits: Limits | None = None,
    plain_token: bool = False,
    tls: Tls | None = None,
    trust_output: bool | None = None,
) -> AsyncSession:
    """Open an awaited session in the running event loop; arguments and errors as :func:`connect`."""
    token, args = hidden(token), session_constructor_args
    dialer = _make_dialer(
        url,
        port,
        key,
        session_timeout,
        args,
        token,
        extensions,
        lanes,
        depth,
        headers,
        limits,
        plain_token,
        tls,
        trust_output,
    )
    session = await open_session_async(dialer, dialer.address.key, _limit(dialer, timeout), lost_after)
    if enable_logging:
        log.debug("session with %s opened, key %r", session.peer, session.key)
    return session
