"""What strangers may write into a log."""

from __future__ import annotations

import logging

import pytest

from rpcnb.transport.refusals import Refusals


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def refusals(clock: Clock) -> Refusals:
    return Refusals(logging.getLogger("rpcnb.test"), clock)


def lines(caplog: pytest.LogCaptureFixture) -> list[str]:
    """Return what has been logged since the last time."""
    found = [record.getMessage() for record in caplog.records]
    caplog.clear()
    return found


def test_the_first_is_logged_at_once_and_the_others_once_a_minute(
    refusals: Refusals, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    for number in range(419):
        refusals.note("10.0.0.5", f"refused {number}")
    assert lines(caplog) == ["refused 0"]
    clock.now += 59
    refusals.sweep()
    assert lines(caplog) == []
    clock.now += 1
    refusals.sweep()
    assert lines(caplog) == ["refused 418 ... and 417 more of 10.0.0.5 in the last minute"]
    refusals.note("10.0.0.5", "refused again")
    assert lines(caplog) == [], "one line a minute"
    clock.now += 60
    refusals.note("10.0.0.6", "another")
    assert lines(caplog) == ["refused again", "another"], "what is due is told by whatever is refused next"


def test_an_address_that_was_quiet_for_a_minute_is_new_again(
    refusals: Refusals, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    refusals.note("10.0.0.5", "refused")
    clock.now += 60
    refusals.sweep()
    refusals.note("10.0.0.5", "refused")
    assert lines(caplog) == ["refused", "refused"]


def test_one_address_does_not_hide_another_and_very_many_are_summed_up_together(
    refusals: Refusals, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    for number in range(256):
        refusals.note(f"2001:db8::{number:x}", "refused")
    assert len(lines(caplog)) == 256
    for number in range(1000):
        refusals.note(f"2001:db8:1::{number:x}", f"refused {number}")
    assert lines(caplog) == ["refused 0"]
    clock.now += 60
    refusals.sweep()
    assert lines(caplog) == ["refused 999 ... and 998 more of other addresses in the last minute"]
