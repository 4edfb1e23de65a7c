"""Bytes on their way: the queue of what is to be sent, and memory for data that cannot go where it belongs at once."""

from __future__ import annotations

import mmap
from collections import deque
from itertools import islice
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rpcnb.protocol.sequence import Buffer

__all__ = ["Output", "staging"]

_SMALL = 1 << 16


def staging(nbytes: int) -> memoryview:
    """Return memory for ``nbytes`` bytes, of which no page exists before data has arrived for it."""
    if nbytes <= _SMALL:
        return memoryview(bytearray(nbytes))
    return memoryview(mmap.mmap(-1, nbytes))


class Output:
    """A queue of buffers.

    Attributes:
        size: Bytes in it.
    """

    __slots__ = ("_buffers", "size")

    def __init__(self) -> None:
        self._buffers: deque[Buffer] = deque()
        self.size = 0

    def __bool__(self) -> bool:
        return self.size > 0

    def add(self, buffers: list[Buffer]) -> None:
        """Append buffers."""
        for buffer in buffers:
            if len(buffer):
                self._buffers.append(buffer)
                self.size += len(buffer)

    def first(self, count: int) -> list[Buffer]:
        """Return up to ``count`` buffers from the front; they stay in the queue."""
        return list(islice(self._buffers, count))

    def consume(self, sent: int) -> None:
        """Drop ``sent`` bytes from the front."""
        self.size -= sent
        buffers = self._buffers
        while sent:
            buffer = buffers[0]
            if sent < len(buffer):
                buffers[0] = memoryview(buffer)[sent:]
                return
            sent -= len(buffer)
            buffers.popleft()

    def clear(self) -> None:
        """Drop everything."""
        self._buffers.clear()
        self.size = 0
