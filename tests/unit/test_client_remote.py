"""What a remote call's results become, without a server."""

from __future__ import annotations

import math
import struct

import pytest

from rpcnb.client.remote import TimingResult


def test_measurements_have_a_deviation() -> None:
    found = TimingResult((1.0, 2.0, 3.0, 6.0))
    assert (found.mean, found.median, found.min, found.max) == (3.0, 2.5, 1.0, 6.0)
    assert found.std == pytest.approx(math.sqrt(14 / 4))


@pytest.mark.parametrize("measured", [(1e300, -1e300), (1e308, 1e308), (math.inf, 1.0), (math.nan, 1.0)])
def test_measurements_that_nobody_can_have_made_are_shown_all_the_same(measured: tuple[float, float]) -> None:
    assert "mean" in repr(TimingResult.decode(struct.pack("<2d", *measured)))
