"""TLS for ``wss://``: a thread moves bytes between the encrypted socket and a plain one that the session uses.

The session's own ways of waiting and receiving need a plain socket: OpenSSL keeps decrypted data where no poll sees it.
"""

from __future__ import annotations

import contextlib
import select
import socket
import ssl
import threading
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["secure"]

_PIECE = 256 << 10


def secure(sock: socket.socket, host: str, seconds: float, report: Callable[[socket.socket | OSError], object]) -> None:
    """Speak TLS over ``sock``, in a daemon thread that ends with the connection.

    Args:
        sock: Connected; the thread owns it from now on.
        host: Name that the certificate must have.
        seconds: For the handshake.
        report: Gets the plain socket, or why there is none; in that thread.
    """

    def run() -> None:
        try:
            sock.settimeout(seconds)
            encrypted = ssl.create_default_context().wrap_socket(sock, server_hostname=host)
        except (OSError, ValueError) as error:
            sock.close()
            report(error if isinstance(error, OSError) else OSError(str(error)))
            return
        ours, theirs = socket.socketpair()
        with encrypted, ours:
            report(theirs)
            with contextlib.suppress(OSError):
                _Relay(encrypted, ours).run()

    threading.Thread(target=run, name="rpcnb-tls", daemon=True).start()


class _Relay:
    """Moves bytes both ways until one side ends."""

    def __init__(self, encrypted: ssl.SSLSocket, plain: socket.socket) -> None:
        encrypted.setblocking(False)
        plain.setblocking(False)
        self._encrypted = encrypted
        self._plain = plain
        self._inward = memoryview(b"")  # decrypted, for the session
        self._outward = memoryview(b"")
        self._poll = select.poll()

    def run(self) -> None:
        while True:
            read_wants, outward_wants = self._move_inward(), self._move_outward()
            if read_wants is None or outward_wants is None:
                return
            self._poll.register(self._encrypted, read_wants | outward_wants)
            waits_for_session = 0 if self._outward else select.POLLIN
            self._poll.register(self._plain, waits_for_session | (select.POLLOUT if self._inward else 0))
            self._poll.poll()

    def _move_inward(self) -> int | None:
        """Decrypt and pass on while that is possible; returns what to wait for, None at the end."""
        while True:
            if self._inward:
                try:
                    self._inward = self._inward[self._plain.send(self._inward) :]
                except BlockingIOError:
                    return 0
                continue
            try:
                data = self._encrypted.recv(_PIECE)
            except ssl.SSLWantReadError:
                return select.POLLIN
            except ssl.SSLWantWriteError:
                return select.POLLOUT
            if not data:
                return None
            self._inward = memoryview(data)

    def _move_outward(self) -> int | None:
        """Encrypt and pass on while that is possible; returns what to wait for, None at the end."""
        while True:
            if not self._outward:
                try:
                    data = self._plain.recv(_PIECE)
                except BlockingIOError:
                    return 0
                if not data:
                    return None
                self._outward = memoryview(data)
            try:
                self._outward = self._outward[self._encrypted.send(self._outward) :]
            except ssl.SSLWantReadError:
                return select.POLLIN
            except ssl.SSLWantWriteError:
                return select.POLLOUT
