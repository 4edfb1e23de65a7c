"""What speaks a protocol over a socket and is used like one: what both have in common is the socket's below."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import socket

__all__ = ["Layered"]


class Layered:
    """Used like a socket; a subclass says how it receives and sends.

    Args:
        sock: The socket below.
    """

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock

    def fileno(self) -> int:
        """Return the descriptor of the socket below."""
        return self._sock.fileno()

    def detach(self) -> int:
        """Give up the socket below without a word to the other side; returns its descriptor."""
        return self._sock.detach()

    def setblocking(self, flag: bool) -> None:
        """Set the socket below."""
        self._sock.setblocking(flag)

    def gettimeout(self) -> float | None:
        """Return the time limit of the socket below."""
        return self._sock.gettimeout()

    def setsockopt(self, *args: Any) -> None:
        """Set an option of the socket below."""
        self._sock.setsockopt(*args)

    def getsockopt(self, *args: Any) -> Any:
        """Return an option of the socket below."""
        return self._sock.getsockopt(*args)

    def shutdown(self, how: int) -> None:
        """Shut the socket below down."""
        self._sock.shutdown(how)

    def close(self) -> None:
        """Close the socket below."""
        self._sock.close()

    def recv(self, count: int, flags: int = 0) -> bytes:
        """Receive as a socket does."""
        data = bytearray(count)
        return bytes(data[: self.recv_into(data, count, flags)])

    def recv_into(self, buffer: Any, count: int = 0, flags: int = 0) -> int:
        """Receive as a socket does."""
        raise NotImplementedError
