"""Events and who is told of them."""

from __future__ import annotations

import dataclasses

import pytest

from rpcnb.events import ConnectionAccepted, Event, Observers, observers


def happened(peer: str = "a:1") -> ConnectionAccepted:
    return ConnectionAccepted(source="server", time=1.0, peer=peer)


def test_an_event_is_a_frozen_fact() -> None:
    event = happened()
    with pytest.raises(dataclasses.FrozenInstanceError):
        event.peer = "other"  # type: ignore[misc]
    assert event == happened()
    assert event != happened("b:2")


def test_observers_are_told_until_they_unsubscribe() -> None:
    seen: list[Event] = []
    mine = Observers()
    assert not mine
    unsubscribe = mine.subscribe(seen.append)
    assert mine
    mine.tell(happened("a:1"))
    unsubscribe()
    unsubscribe()
    mine.tell(happened("b:2"))
    assert seen == [happened("a:1")]
    assert not mine


def test_a_parent_is_told_too() -> None:
    seen: list[Event] = []
    parent = Observers()
    child = Observers(parent)
    assert not child
    parent.subscribe(seen.append)
    assert child
    child.tell(happened())
    assert seen == [happened()]


def test_one_that_raises_is_logged_and_removed(caplog: pytest.LogCaptureFixture) -> None:
    seen: list[Event] = []

    def broken(event: Event) -> None:
        raise RuntimeError("broken observer")

    mine = Observers()
    mine.subscribe(broken)
    mine.subscribe(seen.append)
    mine.tell(happened())
    mine.tell(happened())
    assert len(seen) == 2
    assert [record.levelname for record in caplog.records] == ["ERROR"]
    caplog.clear()


def test_the_global_observers_are_there() -> None:
    assert isinstance(observers, Observers)
