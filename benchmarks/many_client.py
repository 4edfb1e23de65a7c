"""Many sessions of one client."""

from __future__ import annotations

import time
from typing import Any

from benchmarks.our_clients import Ours
from benchmarks.peers import resident

__all__ = ["Many"]


class Many(Ours):
    """rpcnb's client with any number of sessions."""

    def __init__(self, port: int) -> None:
        super().__init__(port)
        self.sessions: list[Any] = []
        self.functions: list[Any] = []

    def more(self, count: int) -> float:
        """Open ``count`` sessions and keep them; returns the seconds per session."""
        start = time.perf_counter()
        opened = [self.open() for _ in range(count)]
        took = (time.perf_counter() - start) / count
        self.sessions += opened
        return took

    def resident(self) -> int:
        """Return the bytes of memory that this process has."""
        return resident("self")

    def all_at_once(self) -> float:
        """Have a call on the way in every session; returns calls a second. A wrong or lost answer raises."""
        functions = self._look_up("bench.add")
        start = time.perf_counter()
        calls = [function.submit() for function in functions]
        if [call.result() for call in calls] != [1] * len(functions):
            raise RuntimeError("a session answered wrongly")
        return len(functions) / (time.perf_counter() - start)

    def in_turn(self, name: str, turns: int) -> float:
        """Call a function in one session after the other; returns calls a second."""
        functions = self._look_up(name)
        start = time.perf_counter()
        for _ in range(turns):
            for function in functions:
                function()
        return turns * len(functions) / (time.perf_counter() - start)

    def _look_up(self, name: str) -> list[Any]:
        return [session.get_function(name) for session in self.sessions]

    def end_all(self) -> None:
        """Close the sessions."""
        for session in self.sessions:
            session.close()
        self.sessions.clear()
