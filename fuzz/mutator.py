"""A seeded mutator, so that the targets run where atheris does not, and the same way every time."""

from __future__ import annotations

import random
import struct
from collections.abc import Iterator, Sequence

__all__ = ["mutations"]

_INTERESTING = (0, 1, 2, 3, 4, 7, 8, 63, 64, 65, 127, 128, 255, 256, 4096, 65535, 1 << 20, (1 << 31) - 1, 1 << 31)
_LARGE = ((1 << 32) - 1, 1 << 32, (1 << 63) - 1, 1 << 63, (1 << 64) - 1)
_TOKENS = (b"null", b"true", b"-1", b"1e999", b"[", b"{", b"}", b"]", b'"', b'\\ud800"', b"9" * 400, b"NaN", b"0")
_MOST = 8192  # bytes of an input


def mutations(corpus: Sequence[bytes], seed: int) -> Iterator[bytes]:
    """Yield mutated inputs for ever: the corpus itself first, then one to six changes of one of its members."""
    rng = random.Random(seed)
    yield from corpus
    while True:
        data = bytearray(rng.choice(corpus))
        for _ in range(rng.choice((1, 1, 1, 2, 3, 6))):
            _change(rng, data, corpus)
        yield bytes(data[:_MOST])


def _change(rng: random.Random, data: bytearray, corpus: Sequence[bytes]) -> None:
    at = rng.randrange(len(data) + 1)
    size = min(rng.choice((1, 1, 2, 4, 8, 16, 64)), len(data) - at)
    match rng.randrange(9):
        case 0 if at < len(data):
            data[at] ^= 1 << rng.randrange(8)
        case 1 if at < len(data):
            data[at] = rng.randrange(256)
        case 2:
            del data[at : at + size]
        case 3:
            data[at:at] = data[at : at + size] * rng.choice((1, 2, 30))
        case 4:
            data[at:at] = rng.randbytes(size or 1)
        case 5:
            data[at : at + 4] = struct.pack("<I", rng.choice(_INTERESTING))
        case 6:
            data[at : at + 8] = struct.pack("<Q", rng.choice(_INTERESTING + _LARGE))
        case 7:
            other = rng.choice(corpus)
            start = rng.randrange(len(other) + 1)
            data[at:] = other[start:]
        case _:
            data[at:at] = rng.choice(_TOKENS)
