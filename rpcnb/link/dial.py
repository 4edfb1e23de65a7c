"""Dialling: from an address to a connection on which kInitServer may be sent.

One time limit covers resolving, connecting, the handshake and init; errors name the phase and what was seen. The
handshake is a generator over bytes, so that the blocking and the awaiting dialler share it.
"""

from __future__ import annotations

import contextlib
import copy
import errno
import ipaddress
import logging
import os
import queue
import select
import socket
import threading
from typing import TYPE_CHECKING, Any, NamedTuple

from rpcnb.errors import (
    ConnectFailed,
    DeadlineExceeded,
    DuplicateKey,
    KeyMismatch,
    NotAnRpcServer,
    RemoteError,
    RemoteProtocolError,
    RpcError,
    VersionMismatch,
)
from rpcnb.protocol.codes import MAGIC_DUPLICATE, VERSION, Limits, Role
from rpcnb.protocol.handshake import EXTENSION, Handshake, KeyText, hello, key_text
from rpcnb.protocol.peerlimits import extension
from rpcnb.protocol.proof import NONCE, WRONG_TOKEN, Proof, new_nonce, proof_of_end
from rpcnb.protocol.secret import Secret
from rpcnb.transport.sockets import tune

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterator

    from rpcnb.link.interrupt import Guard
    from rpcnb.transport.address import Address
    from rpcnb.transport.deadline import Deadline

__all__ = ["ClientKey", "SessionTicket", "connect_socket", "explain_errno", "explain_init", "greet", "resolve"]

log = logging.getLogger(__name__)

_ALERT = b"\x15\x03"  # TLS says that it has understood nothing
_HEAD = 16384  # bytes of an HTTP answer's head
_BUSY_HINT = (
    "it accepted the connection but does not answer; a stock TVM server does so while it serves another session"
)


class SessionTicket(NamedTuple):
    """What further connections of a session present.

    Attributes:
        name: Of the session.
        secret: Goes with it.
        proved: It is proved, not sent.
    """

    name: str
    secret: str
    proved: bool

    def __repr__(self) -> str:
        return f"SessionTicket({self.name!r})"


class ClientKey:
    """What a client presents on one connection.

    Args:
        key: The server's key, or the match key that a tracker has handed out.
        session_timeout: Seconds; 0 for no limit.
        token: The server's token. It is proved, to a server that proves to know it too.
        extensions: Offer rpcnb's extensions.
        limits: What this client takes.
        plain_token: Send the token in clear: to servers of older versions, and through what must repeat it.
    """

    def __init__(
        self,
        key: str,
        session_timeout: float = 0,
        token: str | None = None,
        extensions: bool = True,
        limits: Limits | None = None,
        *,
        plain_token: bool = False,
    ) -> None:
        self.limits = limits or Limits()
        self.key = key
        self.session_timeout = session_timeout
        self.stock = f"{key} -token={token}" if token else key  # what TVM's client is given for its key
        self._options: dict[str, str] = {}
        if session_timeout:
            self._options["-timeout"] = str(session_timeout)
        if token and not (plain_token or extensions):
            raise ValueError("a token is proved by an extension: leave extensions=False out, or give plain_token=True")
        if token and plain_token:
            self._options["-token"] = token
        if extensions:
            self._options["-rpcnb"] = extension(EXTENSION, self.limits)
        self._secret = Secret("" if plain_token else token or "")
        self.text = self._compose()

    @classmethod
    def for_lane(cls, ticket: SessionTicket, number: int, limits: Limits | None = None) -> ClientKey:
        """Return what a further connection of a session presents."""
        return cls._for_ticket(ticket, {"-lane": str(number)}, limits)

    @classmethod
    def for_end(cls, ticket: SessionTicket) -> ClientKey:
        """Return what asks how a session has ended."""
        return cls._for_ticket(ticket, {"-ended": proof_of_end(ticket.secret) if ticket.proved else ""}, None)

    @classmethod
    def _for_ticket(cls, ticket: SessionTicket, options: dict[str, str], limits: Limits | None) -> ClientKey:
        made = cls("", limits=limits)
        made._options["-session"] = ticket.name if ticket.proved else f"{ticket.name}.{ticket.secret}"
        made._options.update(options)
        made._secret = Secret(ticket.secret if ticket.proved and "-lane" in options else "")
        made.text = made._compose()
        return made

    def _compose(self) -> str:
        fresh = {NONCE: new_nonce()} if self._secret else {}
        return key_text(Role.CLIENT, self.key, {**self._options, **fresh})

    def again(self) -> ClientKey:
        """Return what another connection presents: the same, with a nonce of its own."""
        made = copy.copy(self)
        made.text = made._compose()
        return made

    def proof(self, answer: KeyText, address: str, fingerprint: str = "") -> Proof | None:
        """Return what is to be proved to a server that has answered so; None if there is nothing.

        Args:
            answer: The server's key text.
            address: What was dialled.
            fingerprint: Of the certificate that it has shown.

        Raises:
            KeyMismatch: It cannot prove that it knows the token; so it is not given to it.
        """
        if not self._secret:
            return None
        if NONCE not in answer.options:
            raise KeyMismatch(
                address,
                "handshake",
                "it does not prove that it knows the token (a stock server needs none: leave token=, RPCNB_TOKEN out; "
                "for an rpcnb of an older version: plain_token=True, which sends it in clear)",
            )
        return Proof(self._secret, self.text, answer.text, fingerprint)

    def __repr__(self) -> str:
        return f"ClientKey({self.key!r})"  # the text may hold a token


def greet(key: ClientKey, address: str) -> Generator[bytes | None, bytes, KeyText]:
    """Perform the client's handshake.

    Yields bytes to send, then None for each read; is sent what arrived (empty: end of stream).

    Raises:
        KeyMismatch: Wrong key or token.
        NotAnRpcServer: The peer is something else, or closed at once.
    """
    handshake = Handshake()
    yield hello(key.text)
    while True:
        data = yield None
        if not data:
            raise NotAnRpcServer(address, "handshake", "it closed the connection without an RPC answer")
        if data[:2] == _ALERT:
            raise NotAnRpcServer(address, "handshake", "it speaks TLS: connect to rpcs://HOST:PORT")
        try:
            found = handshake.receive_data(data)
        except RemoteProtocolError as error:
            raise NotAnRpcServer(address, "handshake", str(error)) from None
        if isinstance(found, str):
            if handshake.rest:
                raise NotAnRpcServer(address, "handshake", "it sent more than its key before being asked")
            return KeyText.parse(found)
        if found == MAGIC_DUPLICATE:
            raise DuplicateKey(address, "handshake", f"a peer with key {key.key!r} is already waiting there")
        if found is not None:
            raise KeyMismatch(
                address,
                "handshake",
                f"wrong key or token: it does not serve key {key.key!r}, or the token is missing or wrong; "
                "pass key= and token= (--key K --token-file F), as the server printed them when it started",
            )


def explain_init(address: str, error: RpcError) -> RpcError:
    """Turn a failed kInitServer into an error that says what to do."""
    if isinstance(error, RemoteError) and error.message.startswith(WRONG_TOKEN):
        return KeyMismatch(address, "init", f"{error.message}; pass token= (--token-file F)")
    if isinstance(error, RemoteError) and "protocol version mismatch" in error.message:
        return VersionMismatch(
            address, "init", f"it speaks another protocol version than our {VERSION}: {error.message.splitlines()[0]}"
        )
    return error


def expired(address: str, phase: str, error: DeadlineExceeded) -> ConnectFailed:
    """Return the error of a time limit that ended in ``phase``."""
    seen = f"{_BUSY_HINT} ({error})" if phase in ("handshake", "init") else f"no answer ({error})"
    return ConnectFailed(address, phase, seen)


@contextlib.contextmanager
def no_resource(address: str, phase: str) -> Iterator[None]:
    """Turn the system's refusal of a descriptor or a thread into an error of a connection that did not come about."""
    try:
        yield
    except RpcError:
        raise
    except TimeoutError:
        raise
    except OSError as error:
        raise ConnectFailed(address, phase, f"this process: {error.strerror or error}") from None
    except RuntimeError as error:
        if "thread" not in str(error):  # the interpreter's words where none can be started
            raise
        raise ConnectFailed(address, phase, f"this process: {error}") from None


def look_up(address: Address, report: Callable[[list[tuple[Any, ...]] | OSError], object]) -> None:
    """Resolve a host name in a daemon thread, which may be abandoned: getaddrinfo has no time limit.

    Args:
        address: Host and port.
        report: Gets what ``socket.getaddrinfo`` returned or raised, in that thread; for numbers at once.
    """

    def ask() -> None:
        try:
            report(socket.getaddrinfo(address.host, address.port, type=socket.SOCK_STREAM))
        except OSError as error:
            report(error)
        except UnicodeError as error:  # a label of more than 63 letters, say
            report(OSError(0, f"not a host name: {error}"))

    if _is_numeric(address.host):
        ask()
    else:
        threading.Thread(target=ask, name="rpcnb-resolve", daemon=True).start()


def found_hosts(address: Address, found: list[tuple[Any, ...]] | OSError) -> list[tuple[Any, ...]]:
    """Return what a look-up found, or raise ConnectFailed."""
    if isinstance(found, OSError):
        raise ConnectFailed(str(address), "resolve", f"no such host ({found.strerror})") from None
    return found


def resolve(address: Address, deadline: Deadline, guard: Guard) -> list[tuple[Any, ...]]:
    """Resolve a host name, interruptibly; returns what ``socket.getaddrinfo`` returns."""
    answers: queue.SimpleQueue[list[tuple[Any, ...]] | OSError] = queue.SimpleQueue()
    look_up(address, answers.put)
    while True:
        try:
            left = deadline.left()
            return found_hosts(address, guard.wait(lambda limit: answers.get(timeout=limit), left))
        except queue.Empty:  # noqa: PERF203  # a tick went by
            continue
        except DeadlineExceeded as error:
            raise expired(str(address), "resolve", error) from None


def _is_numeric(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False  # also "1.2.3": the resolver would ask the network, and a server's loop must not wait for that
    return True


def connect_socket(address: Address, deadline: Deadline, guard: Guard) -> Any:
    """Connect to the first of the host's addresses that answers, and to its WebSocket if it is one; interruptible.

    Returns:
        A socket, or what is used like one.

    Raises:
        ConnectFailed: None did; the text has the last reason.
    """
    with no_resource(str(address), "connect"):
        sock = _connect(address, deadline, guard)
        if not (address.is_web or address.is_secure):
            return sock
        try:
            if address.is_secure:
                sock = _secure(sock, address, deadline, guard)
            return _upgrade(sock, address, deadline, guard) if address.is_web else sock
        except DeadlineExceeded as error:
            sock.close()
            raise expired(str(address), "handshake", error) from None
        except BaseException:
            sock.close()
            raise


def _connect(address: Address, deadline: Deadline, guard: Guard) -> socket.socket:
    last: str = "no address"
    for family, kind, protocol, _, where in resolve(address, deadline, guard):
        sock = socket.socket(family, kind, protocol)
        try:
            tune(sock)
            code = sock.connect_ex(where)
            if code == errno.EINPROGRESS:
                code = _await_connected(sock, deadline, guard)
            if code == 0:
                return sock
            last = explain_errno(code, address)
        except DeadlineExceeded as error:
            sock.close()
            raise expired(str(address), "connect", error) from None
        except BaseException:
            sock.close()
            raise
        sock.close()
    raise ConnectFailed(str(address), "connect", last)


def _upgrade(sock: socket.socket, address: Address, deadline: Deadline, guard: Guard) -> Any:
    """Ask for a WebSocket."""
    from rpcnb.transport.websocket import WebSocket, check_answer, upgrade_request

    poll = select.poll()
    request, expected = upgrade_request(address)
    _send_all(sock, request, poll, deadline, guard)
    head = bytearray()
    while not ends_head(sock, head, address):
        poll.register(sock, select.POLLIN)
        while not guard.wait(lambda limit: poll.poll(limit * 1000), deadline.left()):
            pass
    check_answer(address, bytes(head), expected)
    return WebSocket(sock, client=True)


def _secure(sock: socket.socket, address: Address, deadline: Deadline, guard: Guard) -> socket.socket:
    from rpcnb.transport.tls import secure

    answers: queue.SimpleQueue[socket.socket | OSError] = queue.SimpleQueue()
    secure(sock, address, deadline.left(), answers.put)
    while True:
        try:
            return secured(address, guard.wait(lambda limit: answers.get(timeout=limit), deadline.left()))
        except queue.Empty:  # noqa: PERF203  # a tick went by
            continue


def secured(address: Address, found: socket.socket | OSError) -> socket.socket:
    """Return the plain end of a TLS connection, or raise ConnectFailed."""
    if isinstance(found, RpcError):
        raise found
    if isinstance(found, OSError):
        reason = found.strerror or str(found)
        raise ConnectFailed(str(address), "connect", f"TLS failed: {reason}") from None
    found.setblocking(False)
    return found


def ends_head(sock: socket.socket, head: bytearray, address: Address) -> bool:
    """Receive more of an HTTP answer's head, and nothing behind it; True when it is whole."""
    from rpcnb.transport.websocket import HEAD_END

    try:
        seen = sock.recv(_HEAD, socket.MSG_PEEK)
    except BlockingIOError:
        return False
    except OSError as error:
        raise NotAnRpcServer(str(address), "handshake", f"{error.strerror}") from None
    if not seen:
        raise NotAnRpcServer(str(address), "handshake", "it closed the connection without an HTTP answer")
    end = (bytes(head) + seen).find(HEAD_END)
    head += sock.recv(len(seen) if end < 0 else end + len(HEAD_END) - len(head))
    if len(head) > _HEAD:
        raise NotAnRpcServer(str(address), "handshake", "its HTTP answer does not end")
    return end >= 0


def _await_connected(sock: socket.socket, deadline: Deadline, guard: Guard) -> int:
    poll = select.poll()
    poll.register(sock, select.POLLOUT)
    while not guard.wait(lambda limit: poll.poll(limit * 1000), deadline.left()):
        pass
    return sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)


def explain_errno(code: int, address: Address) -> str:
    """Say why a connect failed, and what to try."""
    if code == errno.ECONNREFUSED and address.scheme == "tracker":
        return "connection refused; is a tracker running there? (`rpcnb tracker`)"
    if code == errno.ECONNREFUSED:
        return "connection refused; is a server running there? (`rpcnb serve`, `rpcnb servers`)"
    return os.strerror(code)


def shake_hands(sock: socket.socket, key: ClientKey, address: str, deadline: Deadline, guard: Guard) -> KeyText:
    """Drive :func:`greet` over a connected socket."""
    poll = select.poll()
    steps = greet(key, address)
    data: bytes | None = b""
    try:
        while True:
            out = steps.send(data) if data else next(steps)
            if out is not None:
                _send_all(sock, out, poll, deadline, guard)
                data = b""
                continue
            poll.register(sock, select.POLLIN)
            data = None
            while data is None:
                while not guard.wait(lambda limit: poll.poll(limit * 1000), deadline.left()):
                    pass
                with contextlib.suppress(BlockingIOError):  # what came was TLS's own
                    data = sock.recv(4096)
            if not data:
                steps.send(b"")
    except StopIteration as end:
        found: KeyText = end.value
        return found
    except DeadlineExceeded as error:
        raise expired(address, "handshake", error) from None
    except RpcError:
        raise
    except OSError as error:  # reset, perhaps before our key was sent
        raise NotAnRpcServer(address, "handshake", f"{error.strerror}") from None


def _send_all(sock: socket.socket, data: bytes, poll: select.poll, deadline: Deadline, guard: Guard) -> None:
    poll.register(sock, select.POLLOUT)
    while data:
        while not guard.wait(lambda limit: poll.poll(limit * 1000), deadline.left()):
            pass
        with contextlib.suppress(BlockingIOError):  # TLS has not sent all that it has made of it
            data = data[sock.send(data) :]
