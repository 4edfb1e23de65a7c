"""What every target promises of an input, and how inputs are cut.

Memory is looked at while ``tracemalloc`` traces (the runner starts it); it also sees what numpy reserves and never
touches, so nothing that is only announced passes unseen.
"""

from __future__ import annotations

import time
import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["PromiseBroken", "bounded", "pieces", "segments"]

_SLACK = 2 << 20  # bytes: buffers that every conversation has, and what is made once (imports, caches)
_TIMES = 256  # bytes per byte of input: an allocation of 4 KiB takes a request of some thirty
_SECONDS = 2.0  # of this thread's own CPU: a loaded machine is no finding


class PromiseBroken(AssertionError):
    """An input made something do what it promises not to."""


@contextmanager
def bounded(nbytes: int) -> Iterator[None]:
    """Raise PromiseBroken if what is done inside for ``nbytes`` of input takes too much memory or time."""
    traced = tracemalloc.is_tracing()
    before = 0
    if traced:
        tracemalloc.reset_peak()
        before = tracemalloc.get_traced_memory()[0]
    start = time.thread_time()
    yield
    spent = time.thread_time() - start
    if spent > _SECONDS:
        raise PromiseBroken(f"expected at most {_SECONDS:g} s for {nbytes} bytes, took {spent:.1f} s")
    if traced:
        used = tracemalloc.get_traced_memory()[1] - before
        if used > _SLACK + _TIMES * nbytes:
            raise PromiseBroken(f"expected memory of some times {nbytes} bytes, {used} bytes were reserved")


def pieces(data: bytes, cut: int) -> Iterator[bytes]:
    """Cut ``data``: 0 leaves it whole, 1 makes single bytes of it, anything else names an irregular cut."""
    start = 0
    while start < len(data):
        size = len(data) if cut == 0 else 1 if cut == 1 else 1 + (cut * 31 + start * 7) % (cut * 3)
        yield data[start : start + size]
        start += size


def segments(data: bytes) -> Iterator[tuple[int, bytes]]:
    """Take an input of several peers apart: a byte that says who and what, two for a length, and the bytes."""
    start = 0
    while start < len(data):
        size = int.from_bytes(data[start + 1 : start + 3], "little")
        yield data[start], data[start + 3 : start + 3 + size]
        start += 3 + size
