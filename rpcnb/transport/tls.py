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
from rpcnb.transport.layered import Layered
from rpcnb.transport.tcptable import ends_of
from rpcnb.transport.tlsfiles import Tls

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from tornado.ioloop import IOLoop

    from rpcnb.transport.address import Address

__all__ = ["PlainEnd", "Relay", "ServerTls", "Tls", "secure"]

_PIECE = 256 << 10
_RECORD = 16 << 10  # bytes that TLS encrypts as one
_NOW: int = getattr(socket, "MSG_DONTWAIT", 0)
_NOT_TLS = ("WRONG_VERSION_NUMBER", "HTTP_REQUEST")
_NO_TLS = b"\x15\x03\x01\x00\x02\x02\x46"  # an alert, fatal: the version of the protocol
_AT_ONCE = 16  # pieces that are moved each way before others have their turn


class PlainEnd(socket.socket):
    """The plain end of a TLS connection.

    Attributes:
        fingerprint: Of the server's certificate.
        certificate: Fingerprint of the client's certificate, once it has shown one.
        ends: Both ends of the connection itself, as the system writes them.
    """

    fingerprint = ""
    certificate = ""
    ends = ""


class TlsSocket(Layered):
    """A connected socket on which TLS is spoken; used like a socket.

    What has been decrypted and did not fit is kept where no poll sees it: then ``has_more()`` is true, and receiving
    again gives it. ``send`` counts bytes when they have left: who cannot send now offers the same bytes again.

    Args:
        sock: The socket below.
        context: How.
        host: Of the server, for a client; None at a server.
    """

    def __init__(self, sock: socket.socket, context: ssl.SSLContext, host: str | None = None) -> None:
        super().__init__(sock)
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls = context.wrap_bio(self._incoming, self._outgoing, server_side=host is None, server_hostname=host)
        self._lock = threading.Lock()  # one thread may send while another receives
        self._unsent = memoryview(b"")  # encrypted
        self._promised = 0  # bytes of the caller's that leave with it
        self._full = False  # the last receiving has filled its buffer
        self.fingerprint = ""  # of the server's certificate
        self.ends = ends_of(sock)

    def shake_hands(self) -> None:
        """Go on with the handshake.

        Raises:
            ssl.SSLWantReadError: More must come.
            OSError: It has failed.
        """
        try:
            self._tls.do_handshake()
        finally:
            self._post()

    def feed(self, data: bytes) -> None:
        """Take what has been received below; nothing is the end of the stream."""
        if data:
            self._incoming.write(data)
        else:
            self._incoming.write_eof()

    def more(self) -> None:
        """Receive more below.

        Raises:
            BlockingIOError: There is nothing now.
        """
        self.feed(self._sock.recv(_PIECE, _NOW))

    def refuse(self) -> None:
        """Tell a peer that speaks no TLS what this port is, in clear: OpenSSL does not."""
        with contextlib.suppress(OSError):
            self._sock.send(_NO_TLS, _NOW)

    def certificate(self) -> bytes:
        """Return the peer's certificate, DER."""
        return self._tls.getpeercert(binary_form=True) or b""

    def has_more(self) -> bool:
        """Tell whether receiving again may give something at once."""
        return self._full and bool(self._tls.pending() or self._incoming.pending)

    # -- as a socket ---------------------------------------------------------------------------------------------

    def recv_into(self, buffer: Any, count: int = 0, flags: int = 0) -> int:
        """Receive into ``buffer``, as a socket does: what is there, and what the socket below gives at once."""
        view = memoryview(buffer)
        view = view[:count] if count else view
        while True:
            with self._lock:
                got = self._decrypt(view)
            if got is not None:
                return got
            data = self._sock.recv(_PIECE, flags)
            with self._lock:
                self.feed(data)

    def _decrypt(self, view: memoryview) -> int | None:
        """Decrypt into ``view``; None if there is nothing to decrypt."""
        got, read = 0, self._tls.read
        self._full = False
        try:
            while got < len(view):
                count = int(read(len(view) - got, view[got:]))
                if not count:
                    return got
                got += count
        except ssl.SSLWantReadError:
            self._post()  # an answer to a change of keys
            return got or None
        except (ssl.SSLEOFError, ssl.SSLZeroReturnError):
            return got
        self._full = True
        return got

    def _post(self) -> None:
        """Send what TLS has to say by itself, if it can be sent now."""
        if self._outgoing.pending:
            self._take_encrypted()
            with contextlib.suppress(BlockingIOError):
                self._flush(_NOW)

    def _take_encrypted(self) -> None:
        self._unsent = memoryview(b"".join((self._unsent, self._outgoing.read())))

    def _flush(self, flags: int) -> None:
        while self._unsent:
            self._unsent = self._unsent[self._sock.send(self._unsent, flags) :]

    def send(self, data: Any, flags: int = 0) -> int:
        """Send, as a socket does."""
        with self._lock:
            if not self._promised:
                self._promised = self._tls.write(memoryview(data).cast("B")[:_PIECE])
                self._take_encrypted()
            self._flush(flags)
            sent, self._promised = self._promised, 0
            return sent

    def sendmsg(self, buffers: Iterable[Any], ancillary: Any = (), flags: int = 0) -> int:
        """Send, as a socket does; small ones in one record."""
        parts: list[Any] = []
        size = 0
        for one in buffers:
            if parts and size + len(one) > _RECORD:
                break
            parts.append(one)
            size += len(one)
        return self.send(parts[0] if len(parts) == 1 else b"".join(parts), flags)


def _pair() -> tuple[socket.socket, PlainEnd]:
    ours, theirs = socket.socketpair()
    return ours, PlainEnd(fileno=theirs.detach())


# -- clients ---------------------------------------------------------------------------------------------------------


def secure(sock: socket.socket, address: Address, seconds: float | None, report: Callable[[Any], object]) -> None:
    """Speak TLS over ``sock``; in a daemon thread, as certificates are read and looked at.

    Args:
        sock: Connected; the thread owns it from now on.
        address: What was dialled: a name that the certificate must have, or the certificate's fingerprint.
        seconds: For the handshake.
        report: Gets what is used like a socket, or why there is none (an OSError); in that thread, which for ``wss://``
            lives as long as the connection: there it is a plain socket.
    """

    def run() -> None:
        try:
            sock.settimeout(seconds)
            encrypted = _shake_hands(sock, address)
            sock.setblocking(False)
        except (OSError, ValueError) as error:
            sock.close()
            report(error if isinstance(error, OSError) else OSError(str(error)))
            return
        if not address.is_web:
            report(encrypted)
            return
        ours, theirs = socket.socketpair()
        with sock, ours:
            report(theirs)
            with contextlib.suppress(OSError):
                _run(Relay(encrypted, ours))

    threading.Thread(target=run, name="rpcnb-tls", daemon=True).start()


def _shake_hands(sock: socket.socket, address: Address) -> TlsSocket:
    """Greet a server, and make sure that it is who it should be."""
    expected = address.fingerprint
    if address.scheme == "rpcs" and not expected:
        expected = known_fingerprint(address.host, address.port)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    if expected:  # whoever has signed it, and whatever name it has
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    else:
        context.load_default_certs()
    if address.tls is not None:
        address.tls.load(context)
    encrypted = TlsSocket(sock, context, address.host)
    try:
        while True:
            try:
                encrypted.shake_hands()
                break
            except ssl.SSLWantReadError:
                encrypted.feed(sock.recv(_PIECE))
    except ssl.SSLCertVerificationError as error:
        raise _unknown(address, error) from None
    except (ssl.SSLEOFError, ConnectionResetError):
        plain = "rpc://" if address.scheme == "rpcs" else "ws://"
        raise ConnectFailed(
            str(address), "connect", f"it ended the TLS handshake; a server without TLS is reached by {plain}"
        ) from None
    shown = encrypted.certificate()
    seen = fingerprint_of(shown)
    if expected and seen != expected:
        raise CertificateChanged(str(address), seen, expected, kept=not address.fingerprint)
    if expected and expiry(shown).over:
        raise CertificateUnknown(str(address), f"its certificate has expired on {expiry(shown)}")
    if address.fingerprint:
        remember(address.host, address.port, seen)
    encrypted.fingerprint = seen
    return encrypted


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

    def __init__(self, encrypted: TlsSocket, plain: socket.socket) -> None:
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
            except BlockingIOError:
                wants.encrypted |= select.POLLIN
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
            except BlockingIOError:
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
        self._context.num_tickets = 0  # a session is not resumed, and what wakes a client is for it
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
            encrypted = TlsSocket(sock, self._context)
            ours, theirs = _pair()
        except BaseException:
            sock.close()
            raise
        theirs.fingerprint, theirs.ends = self.fingerprint, encrypted.ends
        relay = _LoopRelay(self._io_loop, Relay(encrypted, ours), self._relays.discard)
        relay.failed = lambda why: self._failed(peer, why)
        relay.plain_end = theirs
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


class _LoopRelay:
    """A relay on a loop."""

    failed: Callable[[str], object]
    plain_end: PlainEnd

    def __init__(self, io_loop: IOLoop, relay: Relay, ended: Callable[[_LoopRelay], object]) -> None:
        self._io_loop = io_loop
        self._relay = relay
        self._ended = ended
        self._greeted = False
        self._over = False
        self._watched: dict[Any, int] = {}  # sockets that the loop watches, and for what

    def step(self, *_: object) -> None:
        """Go on; the loop calls it when a socket is ready."""
        if self._over:
            return
        try:
            wants = self._relay.move() if self._greeted else self._greet()
        except OSError as error:
            if not self._greeted:
                self.failed(getattr(error, "reason", None) or error.strerror or str(error))
                if getattr(error, "reason", "") in _NOT_TLS:
                    self._relay.encrypted.refuse()
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
        while True:
            try:
                relay.encrypted.shake_hands()
                break
            except ssl.SSLWantReadError:
                try:
                    relay.encrypted.more()
                except BlockingIOError:
                    return _Wants(encrypted=select.POLLIN, plain=select.POLLIN)
        self._greeted = True
        shown = relay.encrypted.certificate()
        if shown:
            self.plain_end.certificate = fingerprint_of(shown)
        return relay.move()

    def _watch(self, sock: Any, events: int) -> None:
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
