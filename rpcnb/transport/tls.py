"""TLS: for ``rpcs://`` and ``wss://`` clients, and for a server's own port.

The ways of waiting and receiving of sessions and servers need a plain socket: OpenSSL keeps decrypted data where no
poll sees it. So a :class:`Relay` moves bytes between the encrypted socket and a plain one: of a client in a thread, of
a server on its loop.
"""

from __future__ import annotations

import contextlib
import select
import socket
import ssl
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rpcnb.errors import CertificateChanged, CertificateUnknown, ConnectFailed
from rpcnb.transport.certificates import (
    expiry,
    fingerprint_of,
    first_certificate,
    known_fingerprint,
    own_certificate,
    remember,
)
from rpcnb.transport.tcptable import ends_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from tornado.ioloop import IOLoop

    from rpcnb.transport.address import Address

__all__ = ["PlainEnd", "Relay", "ServerTls", "Tls", "secure"]

_PIECE = 256 << 10
_NO_TLS = b"\x15\x03\x01\x00\x02\x02\x46"  # an alert, fatal: the version of the protocol
_AT_ONCE = 16  # pieces that are moved each way before others have their turn


@dataclass(frozen=True)
class Tls:
    """Certificates of one's own, for ``Server(tls=...)`` and ``connect("rpcs://...", tls=...)``.

    Attributes:
        cert: File of the certificate (and what it is signed by), PEM.
        key: File of its private key; None: it is in ``cert``.
        ca: File of the authorities that are trusted: by a client for servers' certificates; by a server for those of
            clients, which it then asks for.
    """

    cert: str | None = None
    key: str | None = None
    ca: str | None = None

    def load(self, context: ssl.SSLContext) -> None:
        """Let a context have these.

        Raises:
            OSError: A file is not there, or not what it should be.
        """
        try:
            if self.cert is not None:
                context.load_cert_chain(self.cert, self.key)
            if self.ca is not None:
                context.load_verify_locations(self.ca)
        except ssl.SSLError as error:
            names = ", ".join(name for name in (self.cert, self.key, self.ca) if name)
            raise OSError(error.errno, f"not certificates that go together: {error.reason or error}", names) from None


class PlainEnd(socket.socket):
    """The plain end of a TLS connection.

    Attributes:
        fingerprint: Of the server's certificate.
        ends: Both ends of the connection itself, as the system writes them.
    """

    fingerprint = ""
    ends = ""


def _pair() -> tuple[socket.socket, PlainEnd]:
    ours, theirs = socket.socketpair()
    return ours, PlainEnd(fileno=theirs.detach())


# -- clients ---------------------------------------------------------------------------------------------------------


def secure(
    sock: socket.socket, address: Address, seconds: float | None, report: Callable[[PlainEnd | OSError], object]
) -> None:
    """Speak TLS over ``sock``, in a daemon thread that ends with the connection.

    Args:
        sock: Connected; the thread owns it from now on.
        address: What was dialled: a name that the certificate must have, or the certificate's fingerprint.
        seconds: For the handshake.
        report: Gets the plain socket, or why there is none; in that thread.
    """

    def run() -> None:
        try:
            sock.settimeout(seconds)
            encrypted, shown = _shake_hands(sock, address)
        except (OSError, ValueError) as error:
            sock.close()
            report(error if isinstance(error, OSError) else OSError(str(error)))
            return
        ours, theirs = _pair()
        theirs.fingerprint = shown
        with encrypted, ours:
            report(theirs)
            with contextlib.suppress(OSError):
                _run(Relay(encrypted, ours))

    threading.Thread(target=run, name="rpcnb-tls", daemon=True).start()


def _shake_hands(sock: socket.socket, address: Address) -> tuple[ssl.SSLSocket, str]:
    """Return the encrypted socket of a server that is who it should be, and its certificate's fingerprint."""
    context = ssl.create_default_context()
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    if address.tls is not None:
        address.tls.load(context)
    expected = address.fingerprint
    if address.scheme == "rpcs" and not expected:
        expected = known_fingerprint(address.host, address.port)
    if expected:  # whoever has signed it, and whatever name it has
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    try:
        encrypted = context.wrap_socket(sock, server_hostname=address.host)
    except ssl.SSLCertVerificationError as error:
        raise _unknown(address, error) from None
    except (ssl.SSLEOFError, ConnectionResetError):
        plain = "rpc://" if address.scheme == "rpcs" else "ws://"
        raise ConnectFailed(
            str(address), "connect", f"it ended the TLS handshake; a server without TLS is reached by {plain}"
        ) from None
    shown = encrypted.getpeercert(binary_form=True) or b""
    seen = fingerprint_of(shown)
    try:
        if expected and seen != expected:
            raise CertificateChanged(str(address), seen, expected, kept=not address.fingerprint)
        if expected and expiry(shown).over:
            raise CertificateUnknown(str(address), f"its certificate has expired on {expiry(shown)}")
        if address.fingerprint:
            remember(address.host, address.port, seen)
    except BaseException:
        encrypted.close()
        raise
    return encrypted, seen


def _unknown(address: Address, error: ssl.SSLCertVerificationError) -> ConnectFailed:
    ways = "tls=rpcnb.Tls(ca=FILE) names who may sign it"
    if address.scheme == "rpcs":
        ways = f"the address that the server printed ends in #sha256=... and is enough; {ways}"
    return CertificateUnknown(str(address), f"{error.verify_message}; {ways}")


def _run(relay: Relay) -> None:
    """Move bytes until one side ends, in a thread."""
    poll = select.poll()
    while True:
        wants = relay.move()
        if wants is None:
            return
        if wants.again:
            continue
        poll.register(relay.encrypted, wants.encrypted)
        poll.register(relay.plain, wants.plain)
        poll.poll()


# -- both ------------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Wants:
    """What a relay waits for, as poll() has it; ``again``: nothing, there is more to move at once."""

    encrypted: int = 0
    plain: int = 0
    again: bool = False


class Relay:
    """Moves bytes both ways between an encrypted socket and a plain one, without ever waiting.

    Args:
        encrypted: Its handshake may be yet to come.
        plain: What is used like the connection.
    """

    def __init__(self, encrypted: ssl.SSLSocket, plain: socket.socket) -> None:
        encrypted.setblocking(False)
        plain.setblocking(False)
        self.encrypted = encrypted
        self.plain = plain
        self._inward = memoryview(b"")  # decrypted, for the plain side
        self._outward = memoryview(b"")

    def move(self) -> _Wants | None:
        """Move what can be moved; returns what to wait for, None at the end.

        Raises:
            OSError: One side is broken.
        """
        wants = _Wants()
        if not self._move_inward(wants) or not self._move_outward(wants):
            return None
        return wants

    def _move_inward(self, wants: _Wants) -> bool:
        """Decrypt and pass on; False at the end."""
        for _ in range(_AT_ONCE):
            if self._inward:
                try:
                    self._inward = self._inward[self.plain.send(self._inward) :]
                except BlockingIOError:
                    wants.plain |= select.POLLOUT
                    return True
                continue
            try:
                data = self.encrypted.recv(_PIECE)
            except ssl.SSLWantReadError:
                wants.encrypted |= select.POLLIN
                return True
            except ssl.SSLWantWriteError:
                wants.encrypted |= select.POLLOUT
                return True
            if not data:
                return False
            self._inward = memoryview(data)
        wants.again = True
        return True

    def _move_outward(self, wants: _Wants) -> bool:
        """Encrypt and pass on; False at the end."""
        for _ in range(_AT_ONCE):
            if not self._outward:
                try:
                    data = self.plain.recv(_PIECE)
                except BlockingIOError:
                    wants.plain |= select.POLLIN
                    return True
                if not data:
                    return False
                self._outward = memoryview(data)
            try:
                self._outward = self._outward[self.encrypted.send(self._outward) :]
            except ssl.SSLWantReadError:
                wants.encrypted |= select.POLLIN
                return True
            except ssl.SSLWantWriteError:
                wants.encrypted |= select.POLLOUT
                return True
        wants.again = True
        return True


# -- servers ---------------------------------------------------------------------------------------------------------


class ServerTls:
    """A server's side: its certificate, and the relays of its clients, on a loop.

    Args:
        io_loop: The loop.
        given: Certificates; without one, the server's own is used, which is made at the first time.
        failed: Is told whose handshake failed, and why.

    Attributes:
        fingerprint: Of the certificate.

    Raises:
        OSError: A certificate cannot be read, or made.
    """

    def __init__(self, io_loop: IOLoop, given: Tls, failed: Callable[[Any, str], object]) -> None:
        self._io_loop = io_loop
        self._failed = failed
        self._relays: set[_LoopRelay] = set()
        if given.cert is None:
            cert, key = own_certificate()
            given = Tls(str(cert), str(key), given.ca)
        self._context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self._context.minimum_version = ssl.TLSVersion.TLSv1_2
        self._context.options |= ssl.OP_NO_RENEGOTIATION
        given.load(self._context)
        if given.ca is not None:
            self._context.verify_mode = ssl.CERT_REQUIRED
        self.fingerprint = fingerprint_of(first_certificate(str(given.cert)))

    def wrap(self, sock: socket.socket, peer: Any) -> PlainEnd:
        """Speak TLS with a client; returns the plain socket that stands for it, at once.

        Raises:
            OSError: There are no descriptors left; the socket is closed.
        """
        try:
            encrypted = self._context.wrap_socket(sock, server_side=True, do_handshake_on_connect=False)
            ours, theirs = _pair()
        except BaseException:
            sock.close()
            raise
        theirs.fingerprint, theirs.ends = self.fingerprint, ends_of(encrypted)
        relay = _LoopRelay(self._io_loop, Relay(encrypted, ours), self._relays.discard)
        relay.failed = lambda why: self._failed(peer, why)
        self._relays.add(relay)
        relay.step()
        return theirs

    def close(self) -> None:
        """End all connections; on the loop."""
        for relay in list(self._relays):
            relay.end()

    def forked(self) -> None:
        """In a forked child: the connections are the parent's."""
        for relay in self._relays:
            relay.close()


def _say_why_not(sock: ssl.SSLSocket, error: OSError) -> None:
    """Tell a client that speaks no TLS what this port is; what has come is taken, as else its answer would be lost."""
    with contextlib.suppress(OSError):
        socket.socket.recv(sock, _PIECE)
        if getattr(error, "reason", "") in ("WRONG_VERSION_NUMBER", "HTTP_REQUEST"):  # OpenSSL says nothing then
            socket.socket.send(sock, _NO_TLS)


class _LoopRelay:
    """A relay on a loop."""

    failed: Callable[[str], object]

    def __init__(self, io_loop: IOLoop, relay: Relay, ended: Callable[[_LoopRelay], object]) -> None:
        self._io_loop = io_loop
        self._relay = relay
        self._ended = ended
        self._greeted = False
        self._over = False
        self._watched: dict[socket.socket, int] = {}  # sockets that the loop watches, and for what

    def step(self, *_: object) -> None:
        """Go on; the loop calls it when a socket is ready."""
        if self._over:
            return
        try:
            wants = self._relay.move() if self._greeted else self._greet()
        except OSError as error:
            if not self._greeted:
                self.failed(getattr(error, "reason", None) or error.strerror or str(error))
                _say_why_not(self._relay.encrypted, error)
            wants = None
        if wants is None:
            self.end()
            return
        if wants.again:
            self._io_loop.add_callback(self.step)
        self._watch(self._relay.encrypted, 0 if wants.again else wants.encrypted)
        self._watch(self._relay.plain, 0 if wants.again else wants.plain)

    def _greet(self) -> _Wants | None:
        relay = self._relay
        with contextlib.suppress(BlockingIOError):
            if not relay.plain.recv(1, socket.MSG_PEEK):  # the server does not wait any longer
                return None
        try:
            relay.encrypted.do_handshake()
        except ssl.SSLWantReadError:
            return _Wants(encrypted=select.POLLIN, plain=select.POLLIN)
        except ssl.SSLWantWriteError:
            return _Wants(encrypted=select.POLLOUT, plain=select.POLLIN)
        self._greeted = True
        return relay.move()

    def _watch(self, sock: socket.socket, events: int) -> None:
        loop, before = self._io_loop, self._watched.get(sock)
        mask = (loop.READ if events & select.POLLIN else 0) | (loop.WRITE if events & select.POLLOUT else 0)
        if mask == before:
            return
        if before is None:
            loop.add_handler(sock, self.step, mask)
        else:
            loop.update_handler(sock, mask)
        self._watched[sock] = mask

    def end(self) -> None:
        """Close both sides."""
        if self._over:
            return
        self._over = True
        for sock in self._watched:
            self._io_loop.remove_handler(sock)
        self.close()
        self._ended(self)

    def close(self) -> None:
        """Close the sockets alone."""
        self._relay.encrypted.close()
        self._relay.plain.close()
