"""WebSocket as a socket: what speaks it is used like a plain socket, at nearly the same speed.

Packets are a stream of bytes; messages carry no meaning. So :class:`WebSocket` receives straight into the caller's
memory and squeezes the frames' headers out in place, and a server sends straight from the caller's memory. Nothing that
was received is ever kept back: a poll on the descriptor stays truthful.

Source:
    RFC 6455; binary messages at path ``/ws`` without a subprotocol: python/tvm/rpc/proxy.py of TVM 0.27.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import os
import secrets
import socket
import struct
import threading
from typing import TYPE_CHECKING, Any

from rpcnb.errors import ConnectFailed, KeyMismatch, NotAnRpcServer
from rpcnb.transport.layered import Layered

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from rpcnb.transport.address import Address

__all__ = ["HEAD_END", "PING_EVERY", "WebSocket", "accept_key", "check_answer", "upgrade_request"]

# Seconds without anything sent, after which a ping is: nginx and cloud load balancers cut what is quiet for a minute.
PING_EVERY = 20.0

HEAD_END = b"\r\n\r\n"
_GUID = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"  # of RFC 6455, section 1.3
_CONTINUATION, _TEXT, _BINARY, _CLOSE, _PING, _PONG = 0x0, 0x1, 0x2, 0x8, 0x9, 0xA
_FIN, _MASKED = 0x80, 0x80
# A frame at most: common peers refuse messages over 10 MiB; a client's piece is masked while it is in the cache.
_FRAME, _MASKED_FRAME = 1 << 20, 256 << 10
_AT_BOUNDARY = 64 << 10  # received at most where a header may be: what follows it must be moved
_SMALL = 1024
_NOW: int = getattr(socket, "MSG_DONTWAIT", 0)


def _mask(data: memoryview, key: bytes, offset: int) -> None:
    """Mask (or unmask) in place; ``offset`` bytes of the frame came before."""
    turn = offset % 4
    if turn:
        key = key[turn:] + key[:turn]
    count = len(data)
    if count < _SMALL:
        pattern = (key * (count // 4 + 1))[:count]
        mixed = int.from_bytes(data, "little") ^ int.from_bytes(pattern, "little")
        data[:] = mixed.to_bytes(count, "little")
        return
    import numpy as np

    whole = count & ~3
    words = np.frombuffer(data[:whole], dtype="<u4")
    np.bitwise_xor(words, np.frombuffer(key, dtype="<u4")[0], out=words)
    for index in range(whole, count):
        data[index] ^= key[index % 4]


def _header(opcode: int, length: int, key: bytes = b"") -> bytes:
    masked = _MASKED if key else 0
    if length < 126:
        start = struct.pack(">BB", _FIN | opcode, masked | length)
    elif length < 1 << 16:
        start = struct.pack(">BBH", _FIN | opcode, masked | 126, length)
    else:
        start = struct.pack(">BBQ", _FIN | opcode, masked | 127, length)
    return start + key


class WebSocket(Layered):
    """A connected socket on which the HTTP upgrade has been done; used like a socket.

    Args:
        sock: The socket below.
        client: Our side masks what it sends, and the other side does not.
    """

    def __init__(self, sock: socket.socket, *, client: bool) -> None:
        super().__init__(sock)
        self._client = client
        self._lock = threading.Lock()  # of sending: a pong may go out while another thread sends
        self._ended = False
        # Receiving.
        self._head = bytearray()  # of a header that is not complete
        self._left = 0  # payload bytes of the frame in progress
        self._key = b""
        self._offset = 0  # payload bytes of that frame that came before
        self._control: bytearray | None = None  # payload of a control frame in progress
        self._opcode = 0
        # Sending.
        self._scratch = memoryview(bytearray()) if client else None
        self._unsent = memoryview(b"")  # of a header, a pong, or a client's whole frame
        self._promised = 0  # payload bytes of the caller's that leave with it (client)
        self._open = 0  # payload bytes that the frame in progress still needs (server)
        self._pong = b""
        self._sent = True  # since the last look of `keep_alive`
        self._quiet_since = 0.0

    _STATE = ("_client", "_head", "_left", "_key", "_offset", "_control", "_opcode", "_unsent", "_promised", "_open",
              "_pong")  # fmt: skip

    def state(self) -> dict[str, Any]:
        """Return where it is in the stream, for :meth:`resumed`."""
        found = {name: getattr(self, name) for name in self._STATE}
        return {
            name: value if value is None or isinstance(value, int) else bytes(value).hex()
            for name, value in found.items()
        }

    @classmethod
    def resumed(cls, sock: socket.socket, state: dict[str, Any]) -> WebSocket:
        """Return what goes on, in another process, where one with this state has stopped."""
        made = cls(sock, client=state["_client"])
        for name in cls._STATE:
            value, kind = state[name], type(getattr(made, name)) if name != "_control" else bytearray
            setattr(made, name, kind(bytes.fromhex(value)) if isinstance(value, str) else value)
        return made

    # -- as a socket ---------------------------------------------------------------------------------------------

    def detach(self) -> int:
        """Give up the socket below without a word to the other side; returns its descriptor."""
        self._ended = True
        return super().detach()

    def shutdown(self, how: int) -> None:
        """Say goodbye, and shut the socket below down."""
        self._say_goodbye()
        super().shutdown(how)

    def close(self) -> None:
        """Say goodbye as far as that is possible at once, and close."""
        self._say_goodbye()
        super().close()

    def _say_goodbye(self) -> None:
        with self._lock:
            if not self._ended and self._sock.fileno() >= 0 and not (self._unsent or self._open):
                self._ended = True
                with contextlib.suppress(OSError):  # the other side sees the end of the stream instead
                    self._sock.send(self._control_frame(_CLOSE, struct.pack(">H", 1000)), _NOW)

    # -- receiving -----------------------------------------------------------------------------------------------

    def recv_into(self, buffer: Any, count: int = 0, flags: int = 0) -> int:
        """Receive as a socket does; 0 at the end of the stream, and after the other side's close frame.

        Raises:
            BlockingIOError: Nothing that belongs to the stream has come.
            ConnectionError: The other side breaks the rules.
        """
        if self._ended:
            return 0
        view = memoryview(buffer).cast("B")
        room = min(len(view), count or len(view))
        inside = self._left and self._control is None
        got = self._sock.recv_into(view, min(room, self._left if inside else _AT_BOUNDARY), flags)
        if not got:
            return 0
        kept = self._take(view[:got]) if inside else self._squeeze(view[:got])
        if kept:
            return kept
        if self._ended:
            return 0
        raise BlockingIOError("only frames' headers have come")

    def _take(self, part: memoryview) -> int:
        """Note payload that has come."""
        count = len(part)
        if self._key:
            _mask(part, self._key, self._offset)
        self._offset += count
        self._left -= count
        return count

    def _squeeze(self, view: memoryview) -> int:
        """Take headers and control frames out, move the payload together; returns how much that is."""
        at = kept = 0
        while at < len(view) and not self._ended:
            if not self._left:
                at += self._read_header(view[at:])
                continue
            count = min(self._left, len(view) - at)
            if self._control is not None:
                part = view[at : at + count]
                self._take(part)
                self._control += part
                if not self._left:
                    self._end_control()
            else:
                if kept != at:
                    view[kept : kept + count] = view[at : at + count]
                self._take(view[kept : kept + count])
                kept += count
            at += count
        return kept

    def _read_header(self, view: memoryview) -> int:
        """Read on in a frame's header; returns the bytes used."""
        used = 0
        while True:
            need = self._header_size() - len(self._head)
            if not need:
                break
            part = view[used : used + need]
            self._head += part
            used += len(part)
            if len(part) < need:
                return used
        self._begin_frame()
        return used

    def _header_size(self) -> int:
        """Return how long the header is, as far as that is known."""
        head = self._head
        if len(head) < 2:
            return 2
        length = head[1] & 0x7F
        return 2 + (2 if length == 126 else 8 if length == 127 else 0) + (4 if head[1] & _MASKED else 0)

    def _begin_frame(self) -> None:
        head, self._head = bytes(self._head), bytearray()
        opcode, length = head[0] & 0x0F, head[1] & 0x7F
        masked = bool(head[1] & _MASKED)
        if length == 126:
            (length,) = struct.unpack_from(">H", head, 2)
        elif length == 127:
            (length,) = struct.unpack_from(">Q", head, 2)
        control = opcode & 0x8
        wrong = head[0] & 0x70 or masked == self._client or (control and (length > 125 or not head[0] & _FIN))
        if wrong or opcode not in (_CONTINUATION, _BINARY, _CLOSE, _PING, _PONG):
            what = "text" if opcode == _TEXT else f"a frame {head[:2].hex()}"
            raise ConnectionError(f"expected binary WebSocket messages, got {what}")
        self._opcode = opcode
        self._key = head[-4:] if masked else b""
        self._left, self._offset = length, 0
        if control:
            self._control = bytearray()
            if not length:
                self._end_control()

    def _end_control(self) -> None:
        content, self._control = bytes(self._control or b""), None
        if self._opcode == _CLOSE:
            self._answer(_CLOSE, content[:2])
            self._ended = True
        elif self._opcode == _PING:
            self._answer(_PONG, content)

    def _control_frame(self, opcode: int, content: bytes) -> bytes:
        if not self._client:
            return _header(opcode, len(content)) + content
        key = secrets.token_bytes(4)
        masked = bytearray(content)
        _mask(memoryview(masked), key, 0)
        return _header(opcode, len(content), key) + masked

    def _answer(self, opcode: int, content: bytes) -> None:
        """Send a control frame: now, or with the next frame."""
        with self._lock:
            self._pong = self._control_frame(opcode, content)
            if self._unsent or self._open:
                return
            self._unsent, self._pong, self._promised = memoryview(self._pong), b"", 0
            with contextlib.suppress(OSError):  # it is tried again with the next frame
                self._unsent = self._unsent[self._sock.send(self._unsent, _NOW) :]

    def keep_alive(self, now: float) -> None:
        """Send a ping if nothing has been sent for :data:`PING_EVERY` seconds; call now and then, in any thread.

        A pong that waited for a next frame, which may be long in coming, leaves too.

        Args:
            now: ``time.monotonic()``.
        """
        with self._lock:
            if self._sent:
                self._sent, self._quiet_since = False, now
            if self._ended or self._promised or self._open:  # in the middle of a frame: its rest is traffic enough
                return
            if now - self._quiet_since >= PING_EVERY:
                self._quiet_since = now
                if not self._unsent:  # else the connection takes nothing anyway
                    self._pong += self._control_frame(_PING, b"")
            if self._pong and not self._unsent:
                self._unsent, self._pong = memoryview(self._pong), b""
            if self._unsent:
                with contextlib.suppress(OSError):  # who uses the connection finds out
                    self._unsent = self._unsent[self._sock.send(self._unsent, _NOW) :]

    # -- sending -------------------------------------------------------------------------------------------------

    def send(self, data: Any, flags: int = 0) -> int:
        """Send as a socket does."""
        return self.sendmsg((data,), (), flags)

    def sendmsg(self, buffers: Iterable[Any], ancillary: Any = (), flags: int = 0) -> int:
        """Send as a socket does.

        After a BlockingIOError the same bytes must be offered again: part of them may be on the way.

        Returns:
            Bytes of ``buffers`` that have left; at least one.
        """
        views = [memoryview(buffer).cast("B") for buffer in buffers if len(buffer)]
        with self._lock:
            self._sent = True
            return self._send_masked(views, flags) if self._client else self._send_plainly(views, flags)

    def _send_masked(self, views: Sequence[memoryview], flags: int) -> int:
        if not self._promised:
            self._unsent = self._make_frame(views)
        self._unsent = self._unsent[self._sock.send(self._unsent, flags) :]
        if self._unsent:
            raise BlockingIOError("part of a frame has left")
        promised, self._promised = self._promised, 0
        return promised

    def _make_frame(self, views: Sequence[memoryview]) -> memoryview:
        """Return a frame, behind what is still to be sent, and note how many of the caller's bytes it holds."""
        before = bytes(self._unsent) + self._pong
        self._pong = b""
        count = min(sum(map(len, views)), _MASKED_FRAME)
        key = secrets.token_bytes(4)
        head = before + _header(_BINARY, count, key)
        size = len(head) + count
        if self._scratch is None or len(self._scratch) < size:
            self._scratch = memoryview(bytearray(max(size, 4096)))
        frame = self._scratch[:size]
        frame[: len(head)] = head
        at = len(head)
        for view in views:
            part = view[: size - at]
            frame[at : at + len(part)] = part
            at += len(part)
            if at == size:
                break
        _mask(frame[len(head) :], key, 0)
        self._promised = count
        return frame

    def _send_plainly(self, views: list[memoryview], flags: int) -> int:
        if not self._open:
            self._open = min(sum(map(len, views)), _FRAME)
            self._unsent = memoryview(bytes(self._unsent) + self._pong + _header(_BINARY, self._open))
            self._pong = b""
        parts, room = [self._unsent] if self._unsent else [], self._open
        for view in views:
            parts.append(view[:room])
            room -= len(parts[-1])
            if not room:
                break
        sent = self._sock.sendmsg(parts, (), flags) if len(parts) > 1 else self._sock.send(parts[0], flags)
        head = min(sent, len(self._unsent))
        self._unsent = self._unsent[head:]
        self._open -= sent - head
        if sent == head:
            raise BlockingIOError("only a frame's header has left")
        return sent - head


# -- the upgrade ---------------------------------------------------------------------------------------------------


def accept_key(key: str) -> str:
    """Return what a server answers to ``Sec-WebSocket-Key``."""
    return base64.b64encode(hashlib.sha1(key.encode() + _GUID, usedforsecurity=False).digest()).decode()


def upgrade_request(address: Address) -> tuple[bytes, str]:
    """Return a client's HTTP request, and what the server must answer as ``Sec-WebSocket-Accept``.

    Raises:
        ValueError: A header would break out of its line.
    """
    from rpcnb.transport.address import PORTS, show_address

    key = base64.b64encode(os.urandom(16)).decode()
    host = show_address(address.host, address.port)
    if address.port == PORTS[address.scheme]:
        host = host.rpartition(":")[0]
    headers = {
        "Host": host,
        "Upgrade": "websocket",
        "Connection": "Upgrade",
        "Sec-WebSocket-Key": key,
        "Sec-WebSocket-Version": "13",
        **address.headers,
    }
    for name, value in headers.items():
        if not f"{name}{value}".isprintable() or not name.isascii() or ":" in name:
            raise ValueError(f"header {name!r} is not one")
    lines = [f"GET {address.path} HTTP/1.1", *(f"{name}: {value}" for name, value in headers.items())]
    return "\r\n".join(lines).encode() + HEAD_END, accept_key(key)


def check_answer(address: Address, head: bytes, expected: str) -> None:
    """Look at the head of a server's answer.

    Raises:
        ConnectFailed: It does not upgrade; the text says what to do.
    """
    lines = head.decode("latin-1").split("\r\n")
    words = lines[0].split(None, 2)
    fields = dict(line.partition(":")[::2] for line in lines[1:])
    headers = {name.strip().lower(): value.strip() for name, value in fields.items()}
    where = str(address)
    if len(words) < 2 or not words[0].startswith("HTTP/1."):
        raise NotAnRpcServer(where, "handshake", f"expected an HTTP answer, got {head[:20]!r}")
    if words[1] in ("301", "302", "303", "307", "308") and "login" in headers.get("location", ""):
        raise KeyMismatch(
            where, "handshake", "it wants a login; pass headers={'Authorization': 'token ...'} of the hub"
        )
    if words[1] in ("401", "403"):
        reason = (
            "it refuses us: the hub's token (headers=) is missing or wrong, or it does not allow this host or origin"
        )
        raise KeyMismatch(where, "handshake", f"HTTP {words[1]}: {reason} (--allow-origin at the server)")
    if words[1] != "101":
        raise ConnectFailed(where, "handshake", f"expected HTTP 101, got {' '.join(words[1:])}; is the path right?")
    if headers.get("sec-websocket-accept") != expected:
        raise NotAnRpcServer(where, "handshake", "its WebSocket answer does not belong to our request")
