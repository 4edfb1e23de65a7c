"""Sizes of the parts in which bulk data moves."""

from __future__ import annotations

from rpcnb.link.pace import Pace


def test_parts_are_what_moves_in_a_twentieth_of_a_second() -> None:
    now = [0.0]
    pace = Pace(lambda: now[0])
    assert pace.size == 1 << 20
    for seconds, nbytes, expected in (
        (0.001, 1 << 20, 2 << 20),  # fast: it doubles
        (0.001, 2 << 20, 4 << 20),
        (0.1, 4 << 20, 2 << 20),  # 40 MB/s
        (10.0, 2 << 20, 256 << 10),  # slow: the least
        (0.0, 256 << 10, 512 << 10),  # a clock that stands still
    ):
        now[0] += seconds
        pace.moved(nbytes)
        assert pace.size == expected
    for _ in range(10):
        pace.moved(64 << 20)
    assert pace.size == 16 << 20
