"""The control lane without connections."""

from __future__ import annotations

import itertools
import threading
from types import SimpleNamespace
from typing import Any

import pytest

from rpcnb.errors import SessionLost
from rpcnb.link.control import Control
from rpcnb.link.wire import Ticket
from rpcnb.protocol.messages import CallFunc
from rpcnb.protocol.records import CANCEL, CANCEL_AT, NEXT, START

FUNCTIONS = {START: 2, NEXT: 4, CANCEL: 6, CANCEL_AT: 8}


class LostLink:
    """A link that is lost, and tells so, while the first call is being started."""

    def __init__(self) -> None:
        self.wire = SimpleNamespace(lock=threading.Lock())
        self.polls: list[Any] = []

    def send(self, request: CallFunc) -> Ticket:
        ticket = Ticket(request)
        if request.handle == FUNCTIONS[START]:
            lost = SessionLost("the lane was lost")
            self.polls[0]._ticket.error = lost
            self.polls[0].resume()
            raise lost
        return ticket

    def resume_when_done(self, ticket: Ticket, operation: Any) -> bool:
        self.polls.append(operation)
        return False

    def settle_in_background(self) -> None:
        pass

    def fail(self, error: Any) -> None:
        pass


def test_a_call_that_is_started_while_the_lane_ends_fails_as_the_lane_does() -> None:
    ends: list[Any] = []
    control = Control(LostLink(), FUNCTIONS, itertools.count(1), ends.append)
    with pytest.raises(SessionLost, match="the lane was lost"):
        control.start(CallFunc(11, ()), 0)
    assert [str(end) for end in ends] == ["the lane was lost"]
    assert control.owed() == []
