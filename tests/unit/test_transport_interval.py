"""The process's switch interval while servers are open."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import pytest

from rpcnb.transport import interval

USUAL = 0.004


@pytest.fixture(autouse=True)
def _usual() -> Iterator[None]:
    before = sys.getswitchinterval()
    sys.setswitchinterval(USUAL)
    yield
    assert not interval._wanted
    sys.setswitchinterval(before)


def now() -> float:
    return round(sys.getswitchinterval(), 6)  # the system keeps whole microseconds


def test_the_shortest_wanted_holds_until_the_last_is_released() -> None:
    interval.hold(0.001)
    assert now() == 0.001
    interval.hold(0.0005)
    assert now() == 0.0005
    interval.hold(0.002)
    assert now() == 0.0005
    interval.release(0.0005)
    assert now() == 0.001
    interval.release(0.001)
    assert now() == 0.002
    interval.release(0.002)
    assert now() == USUAL


def test_a_longer_one_than_the_process_has_changes_nothing() -> None:
    interval.hold(0.1)
    assert now() == USUAL
    interval.release(0.1)
    assert now() == USUAL


def test_what_somebody_else_has_set_meanwhile_stays() -> None:
    interval.hold(0.001)
    sys.setswitchinterval(0.003)
    interval.release(0.001)
    assert now() == 0.003
