"""Messages and descriptors between processes of our own, over a Unix socket.

A message is a JSON object, bytes behind it where it has some, and descriptors: ``<II`` (the sizes of both), then both.
The other process may run foreign code: what it says is bounded and checked like a stranger's.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import struct
import threading
from collections import deque
from typing import TYPE_CHECKING, Any, NamedTuple

from rpcnb.errors import RemoteProtocolError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from tornado.ioloop import IOLoop

__all__ = ["Channel", "Note"]

_HEAD = struct.Struct("<II")
_MOST_WORDS = 4 << 20  # bytes of the JSON of one message
_MOST_BYTES = 1 << 30  # of what is behind it
_PIECE = 1 << 18
_DESCRIPTORS = 8  # received at once
_MOST_DESCRIPTORS = 64  # that have come before the messages that name them


class Note(NamedTuple):
    """A message.

    Attributes:
        words: Its JSON object.
        data: Bytes behind it.
        descriptors: Whose receiver is the owner.
    """

    words: dict[str, Any]
    data: bytes
    descriptors: list[int]


class Channel:
    """One end; the other process has the other one.

    Args:
        sock: Connected Unix stream socket.

    Attributes:
        out_of_memory: It has ended as there was no memory here for what came.
    """

    out_of_memory = False

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self._buffer = bytearray()
        self._descriptors: deque[int] = deque()
        self._lock = threading.Lock()  # of sending
        self._out: deque[tuple[memoryview, Sequence[int]]] = deque()  # on a loop: what has not left
        self._io_loop: IOLoop | None = None
        self._writing = False
        self.waiting = 0  # bytes that have not left

    # -- sending -------------------------------------------------------------------------------------------------

    def send(self, words: dict[str, Any], data: bytes = b"", descriptors: Sequence[int] = ()) -> None:
        """Send and wait until it has left; from any thread.

        Raises:
            OSError: The other process has gone.
        """
        packet = memoryview(_packed(words, data, descriptors))
        with self._lock:
            sent = socket.send_fds(self.sock, [packet], list(descriptors)) if descriptors else self.sock.send(packet)
            if sent < len(packet):
                self.sock.sendall(packet[sent:])

    def post(self, words: dict[str, Any], data: bytes = b"", descriptors: Sequence[int] = ()) -> None:
        """Send what leaves now, the rest when it can; on the loop of :meth:`listen`. The descriptors are ours no more.

        That the other process has gone is told by the end of the channel alone.
        """
        packet = memoryview(_packed(words, data, descriptors))
        self._out.append((packet, tuple(descriptors)))
        self.waiting += len(packet)
        if not self._writing:
            self._flush()

    def _flush(self) -> None:
        while self._out:
            packet, descriptors = self._out[0]
            try:
                if descriptors:
                    sent = socket.send_fds(self.sock, [packet], list(descriptors))
                else:
                    sent = self.sock.send(packet)
            except BlockingIOError:
                break
            except OSError:
                self._drop_out()
                break
            _close_all(descriptors)
            self.waiting -= sent
            if sent < len(packet):
                self._out[0] = packet[sent:], ()
            else:
                self._out.popleft()
        self._watch(bool(self._out))

    def _drop_out(self) -> None:
        for _, descriptors in self._out:
            _close_all(descriptors)
        self._out.clear()
        self.waiting = 0

    def _watch(self, writing: bool) -> None:
        if self._io_loop is not None and writing != self._writing:
            self._writing = writing
            events = self._io_loop.READ | (self._io_loop.WRITE if writing else 0)
            self._io_loop.update_handler(self.sock.fileno(), events)

    # -- receiving -----------------------------------------------------------------------------------------------

    def receive(self) -> Note | None:
        """Wait for a message; None at the end.

        Raises:
            RemoteProtocolError: The other side does not keep to the form.
        """
        while True:
            for note in self._taken():
                return note
            if not self._fill():
                return None

    def receive_some(self) -> Iterator[Note]:
        """Wait for bytes, once, and yield the messages that are whole then.

        Raises:
            EOFError: The other process has gone.
            RemoteProtocolError: The other side does not keep to the form.
        """
        if not self._fill():
            raise EOFError
        yield from self._taken()

    def listen(self, io_loop: IOLoop, on_note: Callable[[Note], object], on_end: Callable[[], object]) -> None:
        """Call ``on_note`` with each message, and ``on_end`` once, on a loop."""
        self.sock.setblocking(False)
        self._io_loop = io_loop

        def ready(_: Any, events: int) -> None:
            if self._io_loop is None:
                return
            if events & io_loop.WRITE:
                self._flush()
            try:
                alive = self._fill() if events else True
                for note in self._taken():
                    on_note(note)
                    if self._io_loop is None:  # it was closed by that
                        return
            except BlockingIOError:
                return
            except RemoteProtocolError:
                alive = False
            except MemoryError:  # what has come would come again and again
                alive, self.out_of_memory = False, True
            if not alive:
                self.close()
                on_end()

        io_loop.add_handler(self.sock.fileno(), ready, io_loop.READ)
        if self._buffer:  # messages, perhaps, that have come behind those that were received
            io_loop.add_callback(ready, None, 0)

    def _fill(self) -> bool:
        try:
            data, descriptors, _, _ = socket.recv_fds(self.sock, _PIECE, _DESCRIPTORS)
        except BlockingIOError:
            raise
        except OSError:
            return False
        self._descriptors.extend(descriptors)
        if len(self._descriptors) > _MOST_DESCRIPTORS:
            raise RemoteProtocolError(f"expected at most {_MOST_DESCRIPTORS} descriptors that no message names")
        self._buffer += data
        return bool(data)

    def _taken(self) -> Iterator[Note]:
        """Take the messages that are whole."""
        while len(self._buffer) >= _HEAD.size:
            words, nbytes = _HEAD.unpack_from(self._buffer)
            if words > _MOST_WORDS or nbytes > _MOST_BYTES:
                raise RemoteProtocolError(
                    f"expected at most {_MOST_WORDS} and {_MOST_BYTES} bytes, got {words}, {nbytes}"
                )
            size = _HEAD.size + words + nbytes
            if len(self._buffer) < size:
                return
            text, data = bytes(self._buffer[_HEAD.size : _HEAD.size + words]), bytes(self._buffer[size - nbytes : size])
            del self._buffer[:size]
            yield self._note(text, data)

    def _note(self, text: bytes, data: bytes) -> Note:
        try:
            found = json.loads(text)
            count = found.pop("descriptors", 0)
        except (ValueError, AttributeError, TypeError, RecursionError) as error:
            raise RemoteProtocolError(f"expected a JSON object, got {text[:40]!r}") from error
        if not isinstance(count, int) or not 0 <= count <= len(self._descriptors):
            raise RemoteProtocolError(f"expected {len(self._descriptors)} descriptors, got {count!r}")
        return Note(found, data, [self._descriptors.popleft() for _ in range(count)])

    def close(self) -> None:
        """End it."""
        io_loop, self._io_loop = self._io_loop, None
        if io_loop is not None:
            io_loop.remove_handler(self.sock.fileno())
        self._drop_out()
        _close_all(self._descriptors)
        self._descriptors.clear()
        self.sock.close()


def _packed(words: dict[str, Any], data: bytes, descriptors: Sequence[int]) -> bytes:
    text = json.dumps({**words, "descriptors": len(descriptors)} if descriptors else words).encode()
    return _HEAD.pack(len(text), len(data)) + text + data


def _close_all(descriptors: Sequence[int] | deque[int]) -> None:
    for descriptor in descriptors:
        with contextlib.suppress(OSError):
            os.close(descriptor)
