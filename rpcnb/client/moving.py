"""What a bulk operation moves."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, BinaryIO

from rpcnb.values import plain

__all__ = ["BULK", "FileSink", "Moving", "Progress", "describe_upload", "moving_array"]

BULK = 1 << 20  # bytes from which a copy travels on a lane of its own, where there are lanes


@dataclass(slots=True)
class Moving:
    """What moves.

    Attributes:
        direction: ``up`` to the server, or ``down``.
        thing: A tensor, an array, or a file's name.
        total: Bytes, 0 while unknown (a file that is downloaded, until the server has said its size).
    """

    direction: str
    thing: Any
    total: int

    @property
    def what(self) -> str:
        """A tensor's shape and type, or a file's name."""
        shape = getattr(self.thing, "shape", None)
        return str(self.thing) if shape is None else f"{tuple(shape)} {self.thing.dtype}"


class FileSink:
    """Takes a reply's bytes value into a file, piece by piece, as it comes; errors wait for who wants the file.

    Attributes:
        error: What writing the file raised; the rest of the value was received and dropped.
    """

    def __init__(self, file: BinaryIO, moving: Moving | None) -> None:
        self.error: OSError | None = None
        self._file: BinaryIO | None = file
        self._moving = moving

    def begin(self, nbytes: int) -> FileSink:
        """Take the size; the value follows."""
        if self._moving is not None:
            self._moving.total = nbytes
        return self

    def write(self, data: memoryview) -> None:
        """Take the next piece."""
        if self._file is None:
            return
        try:
            self._file.write(data)
        except OSError as error:
            self.error = error
            self._file = None

    def finish(self) -> bytes:
        """Return what stands in the value's place."""
        return b""

    def drop(self) -> None:
        """Write no more: whoever wanted the file has given it up."""
        self._file = None


Progress = Callable[[Any], object]


def moving_array(source: Any) -> Moving | None:
    """Say what the copy of a local array moves; None for a sequence, which is small."""
    nbytes = getattr(source, "nbytes", None)
    return Moving("up", source, nbytes) if isinstance(nbytes, int) else None


def describe_upload(data: Any, target: str | None = None) -> Moving:
    """Say what an upload moves."""
    data = plain(data)
    if isinstance(data, (bytes, bytearray, memoryview)):
        return Moving("up", target or "bytes", memoryview(data).nbytes)
    path = os.fspath(data)
    return Moving("up", target or os.path.basename(path), os.path.getsize(path) if os.path.exists(path) else 0)
