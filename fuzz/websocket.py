"""WebSocket frames over a socket pair: the first byte says whose side reads, the second how the rest is cut."""

from __future__ import annotations

import socket

from fuzz.promises import PromiseBroken, bounded, pieces
from rpcnb.transport.websocket import WebSocket

__all__ = ["one_input"]

_MOST = 64 << 10  # what a socket pair takes without anybody reading


def one_input(data: bytes) -> None:
    """Receive the frames in pieces and whole: the same payload, and the same end."""
    if len(data) < 2:
        return
    client, cut, stream = bool(data[0] & 1), data[1], data[2 : 2 + _MOST]
    with bounded(len(data)):
        cut_up = _receive(stream, cut, client=client)
        whole = _receive(stream, 0, client=client)
    if cut_up[1] != whole[1] or not cut_up[0].startswith(whole[0]):
        raise PromiseBroken(f"expected the same payload and end at any cut, got {cut_up!r} and {whole!r}")
    if whole[1] != "error" and len(cut_up[0]) != len(whole[0]):
        raise PromiseBroken(f"expected {len(whole[0])} bytes of payload at any cut, got {len(cut_up[0])}")


def _receive(stream: bytes, cut: int, *, client: bool) -> tuple[bytes, str]:
    """Return the payload, and how it ended: ``more``, ``end`` or ``error``."""
    near, far = socket.socketpair()
    got = bytearray()
    buffer = bytearray(4096)
    with near, far:
        near.setblocking(False)
        far.setblocking(False)
        receiver = WebSocket(near, client=client)
        for piece in pieces(stream, cut):
            far.sendall(piece)
            while True:
                try:
                    count = receiver.recv_into(buffer)
                except BlockingIOError:
                    if _is_empty(near):
                        break
                    continue  # only headers: there may be more behind them
                except ConnectionError:
                    return bytes(got), "error"
                if not count:
                    return bytes(got), "end"
                got += buffer[:count]
            _drop(far)  # pongs and the goodbye
    return bytes(got), "more"


def _is_empty(sock: socket.socket) -> bool:
    try:
        sock.recv(1, socket.MSG_PEEK)
    except BlockingIOError:
        return True
    return False


def _drop(sock: socket.socket) -> None:
    try:
        while sock.recv(4096):
            pass
    except OSError:
        pass
