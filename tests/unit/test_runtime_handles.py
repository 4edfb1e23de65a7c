"""The handle table: nothing that was not issued reaches anything."""

from __future__ import annotations

import random

import pytest

from rpcnb.errors import InvalidHandle, LimitExceeded, StaleHandle
from rpcnb.runtime.handles import HandleKind, HandleTable

FUNCTION, MODULE, OBJECT, DATA = HandleKind.FUNCTION, HandleKind.MODULE, HandleKind.OBJECT, HandleKind.DATA


def test_equal_objects_give_equal_handles_and_are_counted() -> None:
    table, thing = HandleTable(), object()
    handle = table.issue(OBJECT, thing)
    assert table.issue(OBJECT, thing) == handle
    assert table.issue(MODULE, thing) != handle
    assert table.release(handle, OBJECT) is None
    assert table.find(handle, OBJECT) is thing
    entry = table.release(handle, OBJECT)
    assert entry is not None
    assert entry.thing is thing
    with pytest.raises(StaleHandle, match=f"handle {handle:#x} was freed before"):
        table.find(handle, OBJECT)


def test_a_number_is_never_reused() -> None:
    table = HandleTable()
    seen = set()
    for _ in range(1000):
        handle = table.issue(OBJECT, object())
        table.release(handle, OBJECT)
        seen.add(handle)
    assert len(seen) == 1000
    assert len(table) == 0


def test_a_handle_of_another_kind_is_refused_by_name() -> None:
    table = HandleTable()
    handle = table.issue(OBJECT, [])
    with pytest.raises(InvalidHandle, match=f"handle {handle:#x} is a object; expected a function"):
        table.find(handle, FUNCTION)
    with pytest.raises(InvalidHandle, match="is a object; expected a function or module"):
        table.release(handle, FUNCTION, MODULE)
    assert not table.exhausted
    assert len(table) == 1


def test_a_handle_of_another_session_was_never_issued_here() -> None:
    one, other = HandleTable(), HandleTable()
    handle = one.issue(OBJECT, object())
    other.issue(OBJECT, object())
    for act in (lambda: other.find(handle, OBJECT), lambda: other.release(handle, OBJECT)):
        with pytest.raises(InvalidHandle, match="was never issued in this session"):
            act()


def test_s11_a_hundred_thousand_forged_handles_hit_nothing() -> None:
    table = HandleTable()
    for _ in range(50):
        table.issue(OBJECT, object())
    dice = random.Random(11)
    real = set(table._entries)
    for number in range(100_000):
        forged = dice.getrandbits(64) if number % 2 else dice.randrange(1, 60) << 32 | dice.getrandbits(32)
        if forged in real:  # pragma: no cover  # 1 in 2**32
            continue
        assert type(table.unknown(forged)) is InvalidHandle
        assert table.exhausted is (number >= 99)


def test_s11_stale_handles_do_not_count_as_forged() -> None:
    table = HandleTable()
    handle = table.issue(OBJECT, object())
    table.release(handle, OBJECT)
    for _ in range(1000):
        assert isinstance(table.unknown(handle), StaleHandle)
    assert not table.exhausted


def test_the_number_of_live_handles_is_limited() -> None:
    table, first = HandleTable(limit=2), object()
    handle = table.issue(OBJECT, first)
    table.issue(OBJECT, object())
    with pytest.raises(LimitExceeded, match="session holds 2 handles, handles=2; free some first"):
        table.issue(OBJECT, object())
    assert table.issue(OBJECT, first) == handle
    table.release(handle, OBJECT)
    table.release(handle, OBJECT)
    assert table.issue(OBJECT, object())


def test_clear_returns_what_was_live() -> None:
    table, thing = HandleTable(), object()
    table.issue(DATA, thing)
    assert [entry.thing for entry in table.clear()] == [thing]
    assert len(table) == 0
    assert table.issue(DATA, thing)
