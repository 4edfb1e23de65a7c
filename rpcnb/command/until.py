"""Running until SIGINT or SIGTERM."""

from __future__ import annotations

import contextlib
import signal
import socket
from typing import TYPE_CHECKING

from rpcnb.transport import forks

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["Stop", "until_signal"]


_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_ENDS = (b"", b"\0", *(bytes([number]) for number in _SIGNALS))


class Stop:
    """The end that a signal, or another part of the program, brings."""

    def __init__(self, sock: socket.socket, wake: socket.socket) -> None:
        self._sock = sock
        self._wake = wake

    def wait(self) -> None:
        """Return when it has come; other signals wake it too (one that interrupts a remote cell)."""
        while self._sock.recv(1) not in _ENDS:
            pass

    def set(self) -> None:
        """Let it come; from any thread."""
        with contextlib.suppress(OSError):
            self._wake.send(b"\0")


class _Wiring:
    """The signals of this process; children that functions fork have their own: a signal to one must not end us."""

    def forked(self) -> None:
        """Undo it in a child, whose bytes would arrive in its parent."""
        signal.set_wakeup_fd(-1)
        for number in _SIGNALS:
            signal.signal(number, signal.SIG_DFL if number == signal.SIGTERM else signal.default_int_handler)


@contextlib.contextmanager
def until_signal() -> Iterator[Stop]:
    """Take SIGINT and SIGTERM over.

    A signal may reach another thread than the main one, and its handler may run in the middle of a wait that holds a
    lock: so it does nothing, and the byte that Python writes for it is waited for.
    """
    sock, wake = socket.socketpair()
    wake.setblocking(False)
    before_wake = signal.set_wakeup_fd(wake.fileno())
    before = [signal.signal(number, lambda *_: None) for number in _SIGNALS]
    wiring = _Wiring()
    forks.tell(wiring)
    forks.hold_back(_SIGNALS)
    try:
        yield Stop(sock, wake)
    finally:
        for number, handler in zip(_SIGNALS, before, strict=True):
            signal.signal(number, handler)
        signal.set_wakeup_fd(before_wake)
        sock.close()
        wake.close()
