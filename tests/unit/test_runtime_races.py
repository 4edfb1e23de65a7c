"""Races at the server, found by stepping the real code through its interleavings (tests/explorer.py)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from explorer import Failure, explore
from runtime_wire import Client

from rpcnb.protocol.codes import Limits
from rpcnb.protocol.messages import CallFunc, Raised, Return, Shutdown
from rpcnb.protocol.records import read_records
from rpcnb.runtime import completion, eventdriven, overlap, servant
from rpcnb.runtime.environment import Environment
from rpcnb.runtime.overlap import Calls, Started
from rpcnb.runtime.registry import Registry


class Session:
    """What calls need of their session."""

    class environment:
        limits = Limits()

        @staticmethod
        def later(seconds: float, function: Callable[[], object]) -> Callable[[], object]:
            return lambda: None


class Poll:
    """The ``done`` of one ``rpcnb.next``."""

    def __init__(self, into: list[int]) -> None:
        self.into = into
        self.answers = 0

    def __call__(self, result: Any = None) -> None:
        self.answers += 1
        self.into += [number for number, _ in read_records(result[1])]


def outcomes() -> tuple[list[Callable[[], object]], Callable[[], object]]:
    """Two calls end in threads of their own, while the loop polls and requests arrive behind the poll."""
    session = Session()
    calls = Calls(session)  # type: ignore[arg-type]  # as much of one as is needed
    got: list[int] = []
    polls: list[Poll] = []
    started = [Started(calls, number, "f") for number in (1, 2)]
    calls._running.update({call.id: call for call in started})

    def poll() -> None:
        polls.append(Poll(got))
        calls.next(polls[-1], ())  # type: ignore[arg-type]  # its call and its mark are all that counts

    def loop() -> None:
        for _ in range(2):
            poll()
            calls.give_way()

    def check() -> None:
        poll()
        calls.give_way()
        assert sorted(got) == [1, 2], f"outcomes of calls 1 and 2: {got} (session {session!r})"
        assert [one.answers for one in polls] == [1] * len(polls)

    return [
        lambda: calls.finish(started[0], Return((1, 1))),
        lambda: calls.finish(started[1], Return((1, 2))),
        loop,
    ], check


def test_every_outcome_of_a_started_call_is_delivered_once() -> None:
    assert explore(outcomes, [overlap, completion], bound=1, beyond=1000) > 1100


def test_the_explorer_finds_an_outcome_that_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    def give_way(self: Calls) -> None:
        with self._lock:
            poll, self._poll = self._poll, None
            data = self._take()  # taken, although nobody may be there to get it
        if poll is not None:
            poll((66, data))

    monkeypatch.setattr(Calls, "give_way", give_way)
    with pytest.raises(Failure, match="outcomes of calls 1 and 2"):
        explore(outcomes, [overlap, completion], bound=1)


def a_handler(cancelled: bool, ended: bool) -> tuple[list[Callable[[], object]], Callable[[], object]]:
    """A parked call is completed in a thread, cancelled in another, while the bytes' owner brings more of them."""
    kept: list[Any] = []
    registry = Registry()
    registry.register("keep", lambda done: kept.append(done), callback=True)
    registry.register("echo", lambda x: x)
    client = Client(Environment(registry=registry))
    keep, echo = client.find("keep"), client.find("echo")
    client.send(CallFunc(keep), CallFunc(echo, (2,)))
    ordinal = client.servant.ordinal

    def feed() -> None:
        client.send(CallFunc(echo, (3,)))
        if ended:
            client.send(Shutdown())

    def check() -> None:
        first, *others = [client.reply() for _ in range(4)]
        assert [one and one.values for one in others] == [(1, 2), (1, 3), None]
        assert isinstance(first, Raised) if not isinstance(first, Return) else first.values == (1, 1)
        assert isinstance(first, Return) or cancelled
        assert client.servant.over == ended
        assert not client.servant.output

    threads: list[Callable[[], object]] = [lambda: kept[0](1), feed]
    if cancelled:
        threads.append(lambda: client.servant.cancel_request(ordinal))
    return threads, check


@pytest.mark.parametrize("cancelled", [False, True])
@pytest.mark.parametrize("ended", [False, True])
def test_replies_keep_their_order_whoever_completes_the_first(cancelled: bool, ended: bool) -> None:
    tried = explore(lambda: a_handler(cancelled, ended), [servant, eventdriven, completion], bound=0, beyond=400)
    assert tried > 400
