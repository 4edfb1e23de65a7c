"""Calls a second with 1, 10, 100 and 1000 on the way, as factors of sequential calls.

python -m benchmarks.pipeline [--pin same|cross|none] [--rounds N] [--quick]
"""

from __future__ import annotations

from contextlib import ExitStack

from benchmarks.peers import Client, open_peers
from benchmarks.rounds import Ratios, machine, options, save, show

WINDOWS = (1, 10, 100, 1000)
CALLS = 10_000
WAYS = {"ours": ("pipeline", "map", "overlap"), "ours->stock": ("pipeline", "map"), "awaited": ("gathered",)}
SLEEPS = "sleeps"


def measure(clients: dict[str, Client], rounds: int, quick: bool) -> Ratios:
    """Measure each window, in rounds; calls a second."""
    ratios = Ratios()
    calls = CALLS // 5 if quick else CALLS
    for _ in range(rounds):
        for name in ("raw", "stock"):
            ratios.add(f"{name} sequential", 1 / clients[name].ask("null", calls // 2)["p50"])
        for window in WINDOWS:
            for name, ways in WAYS.items():
                for way in ways:
                    ratios.add(f"{name} {way} {window}", clients[name].ask(way, window, calls))
        ratios.add(SLEEPS, clients["ours"].ask("sleeps", 100))
    return ratios


def main() -> None:
    """Measure and print."""
    chosen = options(__doc__ or "")
    rounds = 2 if chosen.quick else chosen.rounds
    with ExitStack() as stack:
        ratios = measure(open_peers(stack, chosen.pin), rounds, chosen.quick)
    rows = []
    for name in ratios.names():
        if name != SLEEPS:
            raw, stock = ratios.ratio(name, "raw sequential"), ratios.ratio(name, "stock sequential")
            rows.append([name, f"{ratios.median(name):,.0f}", f"{raw:.2f}", f"{stock:.2f}"])
    print(machine(), f"pin={chosen.pin}", f"rounds={rounds}")
    show("Calls on the way", ("case, window", "calls/s", "x raw ping-pong", "x stock, sequential"), rows)
    print(f"\n100 calls of 100 ms each, submitted at once on one session: {ratios.median(SLEEPS) * 1e3:.0f} ms")
    save(chosen.json, ratios.medians())


if __name__ == "__main__":
    main()
