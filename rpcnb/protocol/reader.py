"""Reads packets from a byte stream in any cut: the receive buffer, and decoding in it.

Small packets are decoded where they lie. Larger ones are decoded piece by piece, so that nothing is allocated for what
a length word merely announces. The data of a copy never enters the buffer if it can be helped: once the header is
known, :meth:`PacketReader.get_buffer` hands out the final memory.

Source:
    RPCEndpoint::EventHandler, src/runtime/rpc/rpc_endpoint.cc, protocol 0.8.0.
"""

from __future__ import annotations

import struct
from collections import deque
from typing import TYPE_CHECKING, Any, Protocol

from rpcnb.errors import LimitExceeded, RemoteProtocolError, RpcError
from rpcnb.protocol.codes import Code, Limits, Role
from rpcnb.protocol.messages import (
    SYSCALLS,
    CallFunc,
    CopyAck,
    CopyFromRemote,
    CopyToRemote,
    InitServer,
    Malformed,
    PayloadEnd,
    Raised,
    Return,
    Shutdown,
    Syscall,
)
from rpcnb.protocol.sequence import decode_tensor, decode_values, is_bulk
from rpcnb.protocol.shortcut import NOT_PLAIN, read_result

if TYPE_CHECKING:
    from collections.abc import Callable, Generator

    from rpcnb.protocol.messages import Message, Request
    from rpcnb.protocol.sequence import Buffer
    from rpcnb.values import Value

__all__ = ["PacketReader", "Sink"]

_LENGTH_CODE = struct.Struct("<Qi")
_LENGTH = struct.Struct("<Q")
_INT = struct.Struct("<i")
_HANDLE_COUNT = struct.Struct("<Qi")
_INT_RESULT = struct.Struct("<iiqiq")  # 2 values: int (type index), int

_FIRST_BUFFER = 4096
_WHOLE = 1 << 17  # packets up to here are decoded whole, where they lie
_BULK = 1 << 16  # text and bytes from here on are collected piece by piece
_ABSURD = 1 << 48  # no packet is this long: framing is lost
_SYSCALL_CODES = frozenset(int(code) for code in SYSCALLS)


class Sink(Protocol):
    """Takes a bulk bytes argument as it arrives, instead of memory (an uploaded file, say)."""

    def write(self, data: memoryview) -> None:
        """Take the next piece; raise to refuse the rest of the packet."""

    def finish(self) -> Value:
        """Return what stands in the argument's place."""


class PacketReader:
    """The receiving half of an endpoint.

    Args:
        role: Our side.
        limits: What the peer may ask for.
        sink_for: Server: called with ``(handle, arguments so far, nbytes)`` when a bulk bytes argument begins;
            returns a sink, or None to collect it in memory.
    """

    def __init__(
        self,
        role: Role,
        limits: Limits | None = None,
        sink_for: Callable[[int, list[Value], int], Sink | None] | None = None,
    ) -> None:
        self.role = role
        self.limits = limits or Limits()
        self.owed: deque[Request] = deque()  # client: requests whose replies have not come
        self.sink_for = sink_for if role is Role.SERVER else self._reply_sink
        # What a limit might refuse is looked at piece by piece.
        limit = min(self.limits.call, self.limits.bytes_argument, self.limits.text)
        self._whole = min(_WHOLE, limit)
        self._bulk = min(_BULK, limit)
        self._decode = self._decode_request if role is Role.SERVER else self._decode_reply
        self._view = memoryview(bytearray(_FIRST_BUFFER))
        self._start = 0
        self._end = 0
        self._parser: Generator[None, None, Message] | None = None
        self._left = 0  # bytes of the current packet that the piecewise parser has not consumed
        self._payload: memoryview | None = None  # where a copy's data goes; None with _payload_left: nowhere
        self._payload_left = 0
        self._payload_message: Message | None = None  # what stands for the data once it is complete

    @property
    def buffered(self) -> int:
        """Bytes received and not yet interpreted."""
        return self._end - self._start

    @property
    def waiting(self) -> int:
        """Packets in the buffer, the last perhaps not whole; any thread may look, so it may be off by some."""
        view, pos, count = self._view, self._start, 0
        if self._parser is None:
            while pos + 8 <= self._end:
                pos += 8 + _LENGTH.unpack_from(view, pos)[0]
                count += 1
        return count

    @property
    def idle(self) -> bool:
        """Tell whether the next byte begins a packet, and would stand at the start of the buffer."""
        return self._start == self._end and self._parser is None and self._payload_message is None

    @property
    def payload_left(self) -> int:
        """Bytes of a copy's data still to come."""
        return self._payload_left

    @property
    def bulk_left(self) -> int:
        """Bytes still to come of a packet that is taken piece by piece."""
        return self._payload_left or (self._left if self._parser is not None else 0)

    @property
    def bytes_needed(self) -> int:
        """Bytes without which nothing new can be said: a reader that must not read ahead asks for these."""
        have = self._end - self._start
        if self._payload_left:
            return self._payload_left
        if self._parser is not None:
            return 1
        if have >= 8:
            nbytes: int = _LENGTH.unpack_from(self._view, self._start)[0]
            return max(1, min(nbytes + 8, 12) - have)
        return 12 - have if self.owed else 8 - have

    def get_buffer(self) -> memoryview:
        """Return where the next bytes go: the receive buffer, or the final memory of a copy's data."""
        if self._start == self._end:
            if self._payload_left:
                return self._payload_buffer()
            if self._end:
                self._start = self._end = 0
                if len(self._view) > _BULK and self._parser is None:
                    self._view = memoryview(bytearray(_FIRST_BUFFER))  # a burst is over: give its memory back
            if self.owed and type(self.owed[0]) is CopyFromRemote and self._parser is None:
                return self._view[:12]  # the header alone, so that the data can go where it belongs
            return self._view
        if self._end == len(self._view):
            self._make_room()
        return self._view[self._end :]

    def _payload_buffer(self) -> memoryview:
        if self._payload is not None:
            return self._payload[len(self._payload) - self._payload_left :]
        if len(self._view) < _BULK:
            self._view = memoryview(bytearray(_BULK))
        self._start = self._end = 0
        return self._view[: min(len(self._view), self._payload_left)]

    def _make_room(self) -> None:
        have = self._end - self._start
        size = len(self._view)
        view = self._view if have <= size // 2 else memoryview(bytearray(size * 2))
        view[:have] = self._view[self._start : self._end]
        self._view, self._start, self._end = view, 0, have

    def received(self, nbytes: int) -> None:
        """Note that ``nbytes`` bytes now stand at the start of the last ``get_buffer()``."""
        if self._payload_left and self._start == self._end:
            self._payload_left -= nbytes
        else:
            self._end += nbytes

    def take_result(self) -> Any:
        """Client: take the next packet if it is whole and a plain result; else NOT_PLAIN, and nothing is taken."""
        start = self._start
        have = self._end - start
        if have < 32 or self._parser is not None or self._payload_message is not None:
            return NOT_PLAIN
        nbytes = 8 + _LENGTH.unpack_from(self._view, start)[0]
        if nbytes > have:
            return NOT_PLAIN
        value = read_result(self._view[start : start + nbytes], nbytes)
        if value is not NOT_PLAIN:
            self._start = start + nbytes
        return value

    def skip(self, nbytes: int) -> None:
        """Server: leave out bytes at the start of the buffer that were served the short way."""
        self._start += nbytes

    def receive_data(self, data: Buffer) -> None:
        """Take bytes that were received elsewhere (copies them)."""
        source = memoryview(data)
        while source:
            view = self.get_buffer()
            count = min(len(view), len(source))
            view[:count] = source[:count]
            self.received(count)
            source = source[count:]
            if self._payload_left == 0 and self._end == len(self._view) and len(source) > 0:
                self._make_room()

    def _take(self) -> Message | None:
        """Return the next message, a copy's header, or the end of its data; None while bytes are missing."""
        if self._payload_message is not None:
            if self._payload_left:
                return None
            message, self._payload_message, self._payload = self._payload_message, None, None
            return message
        while True:
            if self._parser is not None:
                return self._continue()
            have = self._end - self._start
            if have < 12:
                if have < 8:
                    return None
                (nbytes,) = _LENGTH.unpack_from(self._view, self._start)
                if nbytes == 0:
                    self._start += 8
                    continue
                if nbytes >= 4:
                    return None
                code = 0
            else:
                nbytes, code = _LENGTH_CODE.unpack_from(self._view, self._start)
                if nbytes == 0:
                    self._start += 8
                    continue
            if nbytes < self._whole and nbytes >= 4 and code != 7 and code != 8:
                if have < 8 + nbytes:
                    return None
                start = self._start + 12
                self._start = stop = start + nbytes - 4
                try:
                    return self._decode(code, start, stop)
                except RpcError as error:
                    return Malformed(error)
            if nbytes >= _ABSURD:
                raise RemoteProtocolError(f"expected a packet, got a length of {nbytes} bytes")
            self._start += 8
            self._left = nbytes
            self._parser = self._piecewise()

    def _sequence(self, pos: int, end: int) -> tuple[Value, ...]:
        """Decode the packed sequence that fills ``[pos, end)`` of the buffer."""
        view = self._view
        if end - pos < 4:
            raise RemoteProtocolError("expected a packed sequence, got the end of the packet")
        (count,) = _INT.unpack_from(view, pos)
        if count == 0 and end - pos == 4:
            return ()
        self._check_count(count)
        values: list[Value] = []
        pos = decode_values(view, pos + 4, end, count, self.limits, values)
        self._check_sequence(count, len(values), end - pos)
        return tuple(values)

    def _check_count(self, count: int) -> None:
        if count < 0:
            raise RemoteProtocolError(f"expected a count of values, got {count}")
        if count > self.limits.args:
            raise LimitExceeded(f"sequence of {count} values exceeds args={self.limits.args}")

    @staticmethod
    def _check_sequence(count: int, found: int, left: int) -> None:
        if found < count:
            raise RemoteProtocolError(f"expected {count} values, got the end of the packet after {found}")
        if left:
            raise RemoteProtocolError(f"expected the end of the packet after {count} values, got {left} bytes more")

    def _decode_request(self, code: int, pos: int, end: int) -> Message:
        """Decode a whole packet, whose fields after the code fill ``[pos, end)`` of the buffer."""
        if code == 3:
            if end - pos < 12:
                raise RemoteProtocolError("expected a function handle, got the end of the packet")
            handle, count = _HANDLE_COUNT.unpack_from(self._view, pos)
            if count == 0 and end - pos == 12:
                return CallFunc(handle)
            return CallFunc(handle, self._sequence(pos + 8, end))
        if code in _SYSCALL_CODES:
            return self._checked_syscall(Code(code), self._sequence(pos, end))
        if code == 6:
            found = decode_tensor(self._view, pos, end, self.limits)
            if found is None or end - found[1] != 8:
                raise RemoteProtocolError(f"expected a tensor and a byte count in {end - pos} bytes")
            return CopyFromRemote(found[0], _LENGTH.unpack_from(self._view, found[1])[0])
        if code == 2:
            if end - pos < 8:
                raise RemoteProtocolError("expected a version, got the end of the packet")
            (nbytes,) = _LENGTH.unpack_from(self._view, pos)
            if nbytes > min(64, end - pos - 8):
                raise RemoteProtocolError(f"expected a version of at most 64 bytes, got {nbytes}")
            stop = pos + 8 + int(nbytes)
            version = bytes(self._view[pos + 8 : stop]).decode("utf-8", "replace")
            return InitServer(self._sequence(stop, end), version)
        if code == 1:
            return Shutdown()
        raise RemoteProtocolError(f"expected a request, got code {code}")

    @staticmethod
    def _checked_syscall(code: Code, values: tuple[Value, ...]) -> Syscall:
        expected = SYSCALLS[code]
        if len(values) != len(expected):
            raise RemoteProtocolError(f"{code.name} expected {len(expected)} arguments, got {len(values)}")
        for index, (value, types) in enumerate(zip(values, expected, strict=True)):
            if not isinstance(value, types):
                names = " or ".join(kind.__name__ for kind in types)
                raise RemoteProtocolError(
                    f"{code.name} expected {names} as argument {index}, got {type(value).__name__}"
                )
        return Syscall(code, values)

    def _decode_reply(self, code: int, pos: int, end: int) -> Message:
        """Decode a whole packet, as :meth:`_decode_request`."""
        if code == 4:
            if end - pos == 28:  # as long as an int result, the commonest: 0.9 us by the general path, 0.3 us so
                count, index, kind, again, value = _INT_RESULT.unpack_from(self._view, pos)
                if count == 2 and index == kind == again == 1:
                    return Return((1, value))
            return Return(self._sequence(pos, end))
        if code == 5:
            return self._raised(self._sequence(pos, end))
        if code == 1:
            return Shutdown()
        raise RemoteProtocolError(f"expected a reply, got code {code}")

    @staticmethod
    def _raised(values: tuple[Value, ...]) -> Raised:
        texts = [value for value in values if isinstance(value, str)]
        if not texts or len(texts) != len(values):
            raise RemoteProtocolError(f"expected an exception's text, got {len(values)} values")
        return Raised(*texts[:3])

    # -- large packets, piece by piece ---------------------------------------------------------------------------

    def _continue(self) -> Message | None:
        """Run the piecewise parser on what has arrived."""
        assert self._parser is not None
        try:
            next(self._parser)
        except StopIteration as end:
            self._parser = None
            if self._payload_message is not None and self.role is Role.CLIENT:
                self._take_buffered()
                return self._take()
            message: Message = end.value
            return message
        return None

    def _take_buffered(self) -> None:
        """Move what lies in the buffer already to where the data belongs."""
        count = min(self._payload_left, self._end - self._start)
        if count:
            if self._payload is not None:
                done = len(self._payload) - self._payload_left
                self._payload[done : done + count] = self._view[self._start : self._start + count]
            self._start += count
            self._payload_left -= count

    def receive_payload(self, into: memoryview | None) -> None:
        """Server: say where the data of the CopyToRemote just received goes; None drops it."""
        self._payload = into
        self._take_buffered()

    def discard(self, request: CopyFromRemote) -> None:
        """Client: let the data of ``request`` go nowhere from now on; its reply is still owed."""
        if self._payload_left and self.owed and self.owed[0] is request:
            self._payload = None
        request.into = None

    def _piecewise(self) -> Generator[None, None, Message]:
        """Decode one packet as its bytes arrive; the buffer never holds more than one small value of it."""
        try:
            if self._left < 4:
                raise RemoteProtocolError(f"expected a packet with a code, got {self._left} bytes")
            (code,) = _INT.unpack((yield from self._read(4)))
            if self.role is Role.SERVER:
                return (yield from self._piecewise_request(code))
            return (yield from self._piecewise_reply(code))
        except Exception as error:  # a sink may raise anything
            # skip the rest of the packet: framing is intact
            while self._left:
                count = min(self._left, self._end - self._start)
                self._start += count
                self._left -= count
                if self._left:
                    yield
            return Malformed(error)

    def _piecewise_request(self, code: int) -> Generator[None, None, Message]:
        if code == 7:
            return (yield from self._copy_header())
        if code == 3:
            (handle,) = _LENGTH.unpack((yield from self._read(8)))
            return CallFunc(handle, (yield from self._read_values(handle)))
        if code == 2:
            (nbytes,) = _LENGTH.unpack((yield from self._read(8)))
            if nbytes > 64:
                raise RemoteProtocolError(f"expected a version of at most 64 bytes, got {nbytes}")
            version = (yield from self._read(int(nbytes))).decode("utf-8", "replace")
            return InitServer((yield from self._read_values()), version)
        if code in _SYSCALL_CODES:
            return self._checked_syscall(Code(code), (yield from self._read_values()))
        raise RemoteProtocolError(f"expected a request, got code {code} in a packet of {self._left + 4} bytes")

    def _piecewise_reply(self, code: int) -> Generator[None, None, Message]:
        if code == 8:
            request = self.owed[0] if self.owed else None
            if not isinstance(request, CopyFromRemote) or request.nbytes != self._left:
                wanted = request.nbytes if isinstance(request, CopyFromRemote) else "no"
                raise RemoteProtocolError(f"expected a reply with {wanted} bytes of data, got {self._left}")
            self._payload, self._payload_left, self._left = request.into, self._left, 0
            self._payload_message = CopyAck()
            return self._payload_message
        if code == 4:
            return Return((yield from self._read_values()))
        if code == 5:
            return self._raised((yield from self._read_values()))
        raise RemoteProtocolError(f"expected a reply, got code {code} in a packet of {self._left + 4} bytes")

    def _copy_header(self) -> Generator[None, None, Message]:
        while True:
            stop = min(self._end, self._start + self._left)
            found = decode_tensor(self._view, self._start, stop, self.limits)
            if found is not None and stop - found[1] >= 8:
                break
            if stop - self._start == self._left:
                raise RemoteProtocolError(f"expected a tensor and a byte count in {self._left} bytes")
            yield
        meta, pos = found
        (nbytes,) = _LENGTH.unpack_from(self._view, pos)
        self._left -= pos + 8 - self._start
        self._start = pos + 8
        if nbytes != self._left:
            raise RemoteProtocolError(f"expected {nbytes} bytes of data, got {self._left}")
        self._payload, self._payload_left, self._left = None, self._left, 0
        self._payload_message = PayloadEnd()
        return CopyToRemote(meta, nbytes)

    def _read(self, nbytes: int) -> Generator[None, None, bytes]:
        assert nbytes <= self._left  # a packet read piecewise is longer than its fixed fields
        while self._end - self._start < nbytes:
            yield
        data = bytes(self._view[self._start : self._start + nbytes])
        self._start += nbytes
        self._left -= nbytes
        return data

    def _read_values(self, handle: int = 0) -> Generator[None, None, tuple[Value, ...]]:
        (count,) = _INT.unpack((yield from self._read(4)))
        self._check_count(count)
        values: list[Value] = []
        plain = 0  # bytes consumed outside bytes payloads
        while len(values) < count:
            stop = min(self._end, self._start + self._left)
            bulk = is_bulk(self._view, self._start, stop, self._bulk)
            if bulk is not None:
                plain += bulk[1] if bulk[0] == 66 else bulk[1] + bulk[2]
                self._check_plain(plain)
                yield from self._read(bulk[1])
                values.append((yield from self._read_bulk(bulk[0], bulk[2], handle, values)))
                continue
            # One value at a time: the next one may be bulk.
            pos = decode_values(self._view, self._start, stop, 1, self.limits, values)
            consumed = pos - self._start
            if not consumed:
                if stop - self._start == self._left:
                    self._check_sequence(count, len(values), 0)
                yield
                continue
            plain += consumed
            self._check_plain(plain)
            self._start = pos
            self._left -= consumed
        self._check_sequence(count, len(values), self._left)
        return tuple(values)

    def _reply_sink(self, handle: int, values: list[Value], nbytes: int) -> Sink | None:
        """Client: return what takes a large bytes value of the reply that is being read, if its request says so."""
        sink = getattr(self.owed[0], "sink", None) if self.owed else None
        found: Sink | None = None if sink is None else sink.begin(nbytes)
        return found

    def _check_plain(self, plain: int) -> None:
        if plain > self.limits.call:
            raise LimitExceeded(f"call packet of more than {plain} bytes exceeds call={self.limits.call}")

    def _read_bulk(
        self, kind: int, nbytes: int, handle: int, values: list[Value]
    ) -> Generator[None, None, str | bytes | Value]:
        sink = None
        if kind == 66 and self.sink_for is not None and nbytes <= self._left:  # else it would never be ended
            sink = self.sink_for(handle, values, nbytes)
        if sink is None:
            limit, name = (self.limits.bytes_argument, "bytes_argument") if kind == 66 else (self.limits.text, "text")
            if nbytes > limit:
                noun = "value" if kind == 66 else "text"
                raise LimitExceeded(f"{noun} of {nbytes} bytes exceeds {name}={limit}")
        if nbytes > self._left:
            raise RemoteProtocolError(f"expected {nbytes} bytes, got the end of the packet after {self._left}")
        chunks: list[bytes] = []
        left = nbytes
        while left:
            count = min(left, self._end - self._start)
            if count:
                piece = self._view[self._start : self._start + count]
                if sink is not None:
                    sink.write(piece)
                else:
                    chunks.append(bytes(piece))
                self._start += count
                self._left -= count
                left -= count
            if left:
                if self._start == self._end and len(self._view) < _WHOLE:
                    self._view = memoryview(bytearray(_WHOLE))  # fewer system calls for the rest
                    self._start = self._end = 0
                yield
        if sink is not None:
            return sink.finish()
        data = b"".join(chunks)
        if kind == 66:
            return data
        try:
            return data.decode()
        except UnicodeDecodeError as error:
            raise RemoteProtocolError(f"expected UTF-8 text, got {error.reason}") from None
