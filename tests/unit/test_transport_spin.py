"""Trying before sleeping: when it pays, and when it rests."""

from __future__ import annotations

from itertools import chain
from typing import Any

import pytest

from rpcnb.transport import spin
from rpcnb.transport.spin import Spinner, receiving

VIEW = memoryview(bytearray(8))
US = 2.0**-20  # about a microsecond, and exact


class World:
    """A socket and a clock: data comes at a time, tries and the sleep take theirs."""

    def __init__(self) -> None:
        self.now = 0.0
        self.comes_in = 0.0  # seconds from the beginning of a wait
        self.one_try = 2 * US
        self.first_try = 2 * US
        self.slept = 0
        self.tried = 0
        self._begun: float | None = None

    def receive(self, view: memoryview, count: int = 0, flags: int = 0) -> int:
        if self._begun is None:
            self._begun = self.now
        left = self._begun + self.comes_in - self.now
        if flags and left > 0:
            self.tried += 1
            raise BlockingIOError
        if left > 0:
            self.slept += 1
            self.now += left
        self._begun = None
        return 8

    def give_way(self) -> None:
        assert self._begun is not None
        self.now += self.first_try if self.now == self._begun else self.one_try

    def clock(self) -> float:
        return self.now


@pytest.fixture
def world() -> World:
    return World()


@pytest.fixture
def waits(world: World) -> Any:
    return chain.from_iterable(Spinner(world.receive, world.give_way, world.clock).turns())


def wait(waits: Any, times: int = 1) -> None:
    for _ in range(times):
        assert next(waits)(VIEW) == 8


def test_what_has_come_is_taken_without_trying(world: World, waits: Any) -> None:
    wait(waits, 10)
    assert (world.tried, world.slept) == (0, 0)


def test_what_comes_soon_is_waited_for_without_sleeping(world: World, waits: Any) -> None:
    world.comes_in = 10 * US
    wait(waits, 10)
    assert (world.tried, world.slept) == (50, 0)


def test_what_comes_a_little_late_is_waited_for_again_so(world: World, waits: Any) -> None:
    world.comes_in = 100 * US
    wait(waits, 20)
    assert world.slept == 20
    assert world.tried > 20 * 20  # it tries all the same: the other side may begin to try too


def test_after_some_waits_in_vain_it_rests_longer_and_longer(world: World, waits: Any) -> None:
    world.comes_in = 1.0
    wait(waits, spin._MOST)
    tried = world.tried
    wait(waits, spin._REST)
    assert world.tried == tried
    wait(waits, spin._AGAIN)  # in vain again
    assert world.tried > tried
    tried = world.tried
    wait(waits, 2 * spin._REST)
    assert world.tried == tried
    wait(waits)
    assert world.tried > tried


def test_a_try_that_pays_after_the_rest_ends_it(world: World, waits: Any) -> None:
    world.comes_in = 1.0
    wait(waits, spin._MOST + spin._REST)
    world.comes_in = 10 * US
    slept = world.slept
    wait(waits, 100)
    assert world.slept == slept


def test_on_a_shared_cpu_where_each_try_lets_the_other_side_work_it_rests(world: World, waits: Any) -> None:
    world.comes_in = 10 * US
    wait(waits)  # it learns how long a try takes
    world.comes_in, world.first_try = 14 * US, 14 * US
    wait(waits, spin._MOST)
    tried = world.tried
    wait(waits, spin._REST)
    assert world.tried == tried


def test_where_another_thread_holds_the_interpreter_it_rests_after_two_tries_each(world: World, waits: Any) -> None:
    world.comes_in = 10 * US
    wait(waits)
    world.comes_in, world.first_try, world.one_try = 30 * US, 9 * US, 9 * US
    tried = world.tried
    wait(waits, spin._MOST + spin._REST)
    assert world.tried == tried + 2 * spin._MOST


def test_a_first_try_that_is_slow_by_itself_does_not_count(world: World, waits: Any) -> None:
    world.comes_in = 10 * US
    wait(waits)
    world.comes_in, world.first_try = 20 * US, 12 * US
    slept = world.slept
    wait(waits, 10 * spin._MOST)
    assert world.slept == slept


def test_what_the_socket_raises_goes_through(world: World) -> None:
    def broken(view: memoryview, count: int = 0, flags: int = 0) -> int:
        raise ConnectionResetError

    with pytest.raises(ConnectionResetError):
        Spinner(broken, world.give_way, world.clock).receive(VIEW)


def test_it_can_be_switched_off(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RPCNB_SPIN", "0")
    assert next(receiving(world.receive)) == world.receive
    monkeypatch.delenv("RPCNB_SPIN")
    assert next(receiving(world.receive)) != world.receive
