"""What an open panel and an observer cost: copies of eight sessions with and without.

python -m benchmarks.panels [--rounds N] [--quick]
"""

from __future__ import annotations

import json
import time
from contextlib import ExitStack
from typing import Any

import numpy as np

import rpcnb
from benchmarks.peers import Server
from benchmarks.rounds import Ratios, machine, options, save, show
from rpcnb.jupyter.bridge import BRIDGE
from rpcnb.jupyter.facts import Scope

SESSIONS = 8
SIZE = 8 << 20


class _Looks:
    """Takes an open panel's snapshots, and makes of them what would go to the browser."""

    def __init__(self) -> None:
        self.scope = Scope()
        self.sent = 0

    def show(self, snapshot: dict[str, Any]) -> bool:
        self.sent += len(json.dumps(snapshot))
        return True

    def tick(self, now: float) -> None:
        """There is no front end whose answer one might wait for."""


class _Copying:
    """Sessions that copy up and down at once."""

    def __init__(self, stack: ExitStack) -> None:
        port = stack.enter_context(Server("ours")).port
        self._data = np.ones(SIZE, np.uint8)
        self._sessions: list[Any] = [stack.enter_context(rpcnb.connect("127.0.0.1", port)) for _ in range(SESSIONS)]
        self._tensors = [session.array(self._data) for session in self._sessions]
        self._back = [np.ones(SIZE, np.uint8) for _ in self._sessions]

    def seconds(self, times: int) -> float:
        """Copy as often; returns how long it took."""
        start = time.perf_counter()
        for _ in range(times):
            pairs = zip(self._sessions, self._tensors, self._back, strict=True)
            copies = [one.submit(tensor.copyfrom, self._data) for one, tensor, _ in pairs]
            for copy in copies:
                copy.result()
            pairs = zip(self._sessions, self._tensors, self._back, strict=True)
            for copy in [one.submit(tensor.numpy, back) for one, tensor, back in pairs]:
                copy.result()
        return time.perf_counter() - start

    def observed(self, times: int) -> float:
        """Copy with an observer in every session that does nothing."""
        ends = [session.observers.subscribe(lambda event: None) for session in self._sessions]
        try:
            return self.seconds(times)
        finally:
            for end in ends:
                end()


def measure(rounds: int, quick: bool) -> Ratios:
    """Measure in rounds: the time with, of the time without."""
    ratios = Ratios()
    times = 2 if quick else 5
    with ExitStack() as stack:
        copying = _Copying(stack)
        copying.seconds(1)
        for _ in range(rounds):
            alone = copying.seconds(times)
            ratios.add("observed", copying.observed(times) / alone)
            looks = _Looks()
            BRIDGE.add(looks)
            ratios.add("share", copying.seconds(times) / alone - 1)
            BRIDGE.remove(looks)
            assert looks.sent, "the panel has shown nothing"
    return ratios


def main() -> None:
    """Measure and print."""
    chosen = options(__doc__ or "")
    ratios = measure(2 if chosen.quick else chosen.rounds, chosen.quick)
    print(machine())
    rows = [["an observer that does nothing", f"{ratios.median('observed'):.3f} of the time without"]]
    rows.append(["an open panel", f"{ratios.median('share'):.1%} of the time"])
    show(f"{SESSIONS} sessions copying", ("with", "takes"), rows)
    save(chosen.json, ratios.medians())


if __name__ == "__main__":
    main()
