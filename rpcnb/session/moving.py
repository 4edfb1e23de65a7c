"""What a bulk operation moves."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, NamedTuple

__all__ = ["BULK", "Moving", "Progress", "describe_upload", "moving_array"]

BULK = 1 << 20  # bytes from which a copy travels on a lane of its own, where there are lanes


class Moving(NamedTuple):
    """What moves.

    Attributes:
        direction: ``up`` to the server, or ``down``.
        thing: A tensor, an array, or a file's name.
        total: Bytes, 0 while unknown (a file that is downloaded).
    """

    direction: str
    thing: Any
    total: int

    @property
    def what(self) -> str:
        """A tensor's shape and type, or a file's name."""
        shape = getattr(self.thing, "shape", None)
        return str(self.thing) if shape is None else f"{tuple(shape)} {self.thing.dtype}"


Progress = Callable[[Any], object]


def moving_array(source: Any) -> Moving | None:
    """Say what the copy of a local array moves; None for a sequence, which is small."""
    nbytes = getattr(source, "nbytes", None)
    return Moving("up", source, nbytes) if isinstance(nbytes, int) else None


def describe_upload(data: Any, target: str | None = None) -> Moving:
    """Say what an upload moves."""
    if isinstance(data, (bytes, bytearray, memoryview)):
        return Moving("up", target or "bytes", len(data))
    path = os.fspath(data)
    return Moving("up", target or os.path.basename(path), os.path.getsize(path) if os.path.exists(path) else 0)
