"""How many connections strangers may hold that say nothing."""

from __future__ import annotations

import resource

import pytest

from rpcnb.transport.halfopen import HalfOpen, within_descriptors


@pytest.mark.parametrize(
    ("soft", "most", "share", "expected"),
    [(1024, 256, 0.25, 256), (256, 256, 0.25, 64), (256, 16384, 0.75, 192), (2, 256, 0.25, 1), (-1, 256, 0.25, 256)],
)
def test_a_bound_leaves_descriptors_for_others(
    monkeypatch: pytest.MonkeyPatch, soft: int, most: int, share: float, expected: int
) -> None:
    assert resource.RLIM_INFINITY == -1
    monkeypatch.setattr(resource, "getrlimit", lambda which: (soft, 4096))
    assert within_descriptors(most, share) == expected


def test_of_too_many_the_oldest_goes() -> None:
    closed: list[str] = []
    half_open: HalfOpen[str] = HalfOpen(closed.append, 3)
    for name in "abcde":
        half_open.add(name, "127.0.0.1")
    assert closed == ["a", "b"]
    half_open.forget("c")
    half_open.forget("unknown")
    assert half_open.drop_oldest()
    assert closed == ["a", "b", "d"]
    assert len(half_open) == 1
    half_open.clear()
    assert closed == ["a", "b", "d", "e"]
    assert not half_open.drop_oldest()


def test_one_address_may_have_so_many() -> None:
    half_open: HalfOpen[str] = HalfOpen(lambda one: None, 256, 2)
    half_open.add("a", "10.0.0.5")
    assert half_open.admits("10.0.0.5")
    half_open.add("b", "10.0.0.5")
    assert not half_open.admits("10.0.0.5")
    assert half_open.admits("10.0.0.6")
    half_open.forget("a")
    assert half_open.admits("10.0.0.5")


@pytest.mark.parametrize("exempt", [True, False])
def test_this_machine_is_not_counted_unless_that_is_wanted(exempt: bool) -> None:
    half_open: HalfOpen[int] = HalfOpen(lambda one: None, 256, 1, exempt)
    half_open.add(1, "127.0.0.1")
    assert half_open.admits("127.0.0.1") is exempt
