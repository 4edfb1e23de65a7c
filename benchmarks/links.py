"""Copies and calls over a shaped link of 10 MB/s and 20 ms round trip.

python -m benchmarks.links [--rounds N] [--quick]
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import numpy as np

import rpcnb
from benchmarks.peers import Server
from benchmarks.rounds import Ratios, machine, options, save, show
from rpcnb.transport.shaper import Shaper

RATE, ROUND_TRIP = 10e6, 0.02
SIZE = 20_000_000
CALLS = 100


def _took(function: Callable[[], Any]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def _shape(port: int, stack: ExitStack) -> int:
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, daemon=True).start()
    shaper = Shaper(("127.0.0.1", port), RATE, ROUND_TRIP / 2)
    asyncio.run_coroutine_threadsafe(shaper.start("127.0.0.1", 0), loop).result()
    stack.callback(loop.call_soon_threadsafe, shaper.close)
    return shaper.port


def measure(rounds: int, size: int) -> Ratios:
    """Measure in rounds; seconds, and the share of the link that each copy uses."""
    ratios = Ratios()
    data = np.ones(size, np.uint8)
    with ExitStack() as stack:
        port = _shape(stack.enter_context(Server("ours")).port, stack)
        session = stack.enter_context(rpcnb.connect("127.0.0.1", port))
        add, later = session.get_function("bench.add"), session.get_function("bench.async")
        later.submit().result()
        tensor = session.empty(data.shape, "uint8")
        session.submit(tensor.copyfrom, data).result()
        for _ in range(rounds):
            ratios.add("single call", _took(add))
            ratios.add("up", _took(lambda: tensor.copyfrom(data)))
            ratios.add("down", _took(lambda: tensor.numpy(data)))
            ratios.add("map", _took(lambda: add.map(range(CALLS), window=CALLS)))
            ratios.add("submit", _took(lambda: [job.result() for job in [add.submit() for _ in range(CALLS)]]))
            ratios.add("overlap", _took(lambda: [job.result() for job in [later.submit() for _ in range(CALLS)]]))
            ratios.add("ideal", size / RATE + ROUND_TRIP)
            ratios.add("round trip", ROUND_TRIP)
    return ratios


def main() -> None:
    """Measure and print."""
    chosen = options(__doc__ or "")
    size = SIZE // 4 if chosen.quick else SIZE
    ratios = measure(1 if chosen.quick else chosen.rounds, size)
    rows = [
        [f"copy {way}", f"{ratios.median(way):.2f} s", f"{ratios.ratio('ideal', way):.3f} of the link"]
        for way in ("up", "down")
    ]
    rows += [
        [name, f"{ratios.median(name) * 1e3:.1f} ms", f"{ratios.ratio(name, 'round trip'):.2f} round trips"]
        for name in ("single call", "map", "submit", "overlap")
    ]
    print(machine(), f"{RATE / 1e6:.0f} MB/s, {ROUND_TRIP * 1e3:.0f} ms round trip")
    show(f"A copy of {size / 1e6:.0f} MB and {CALLS} calls over a slow link", ("case", "time", "that is"), rows)
    save(chosen.json, ratios.medians())


if __name__ == "__main__":
    main()
