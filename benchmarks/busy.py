"""Null calls of a server in a process whose main thread computes, as in a notebook's kernel.

python -m benchmarks.busy [--pin same|cross|none] [--rounds N] [--quick]
"""

from __future__ import annotations

from benchmarks.peers import Client, Server, pin_choices
from benchmarks.rounds import Ratios, machine, options, save, show
from benchmarks.server_process import BUSY

WHAT = {
    "busy": "pure Python, switch interval 5 ms",
    "short": "pure Python, switch interval 0.3 ms",
    "numpy": "numpy",
}


def measure(pin: str, rounds: int, quick: bool) -> Ratios:
    """Measure in rounds; seconds per call."""
    ratios = Ratios()
    server_cpu, client_cpu = pin_choices(pin)
    for _ in range(rounds):
        for kind in BUSY:
            with Server(kind, server_cpu) as server, Client("ours", server.port, client_cpu) as client:
                found = client.ask("null", 40 if quick else 100)
            ratios.add(kind, found["p50"])
            ratios.add(f"{kind} p99", found["p99"])
    return ratios


def main() -> None:
    """Measure and print."""
    chosen = options(__doc__ or "", pin="cross")
    rounds = 1 if chosen.quick else chosen.rounds
    ratios = measure(chosen.pin, rounds, chosen.quick)
    rows = [
        [WHAT[kind], f"{ratios.median(kind) * 1e3:.2f}", f"{ratios.median(f'{kind} p99') * 1e3:.1f}"] for kind in BUSY
    ]
    print(machine(), f"pin={chosen.pin}", f"rounds={rounds}")
    show("Null calls of a busy kernel", ("main thread", "p50 ms", "p99 ms"), rows)
    save(chosen.json, ratios.medians())


if __name__ == "__main__":
    main()
