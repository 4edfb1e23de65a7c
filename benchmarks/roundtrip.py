"""Small calls: null, small arguments, awaited, look-up, after a pause, connect plus first call.

python -m benchmarks.roundtrip [--pin same|cross|none] [--rounds N] [--quick]
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack

from benchmarks.peers import Client, open_peers
from benchmarks.rounds import Ratios, machine, options, save, show

COUNTS = {"null": 5000, "small": 3000, "lookup": 2000, "pause": 10, "connect": 10}
FEWER = {"null": 1500, "small": 800, "lookup": 300, "pause": 4, "connect": 4}
RPC = ("ours", "stock->ours", "stock", "ours->stock")
WHO = {
    "null": ("raw", *RPC, "awaited", "uvloop"),
    "small": ("raw", *RPC),
    "lookup": RPC,
    "pause": RPC,
    "connect": RPC[:3],
}


def measure(clients: dict[str, Client], rounds: int, quick: bool, cases: Sequence[str] = tuple(WHO)) -> Ratios:
    """Measure each case with each pair, in rounds."""
    ratios = Ratios()
    counts = FEWER if quick else COUNTS
    for _ in range(rounds):
        for case in cases:
            for name in WHO[case]:
                if name in clients:
                    found = clients[name].ask(case, counts[case])
                    ratios.add(f"{case} {name}", found["p50"])
                    for part in ("p10", "p99"):
                        ratios.add(f"{case} {name} {part}", found[part])
    return ratios


def main() -> None:
    """Measure and print."""
    chosen = options(__doc__ or "")
    rounds = 3 if chosen.quick else chosen.rounds
    with ExitStack() as stack:
        ratios = measure(open_peers(stack, chosen.pin), rounds, chosen.quick)
    rows = []
    for case, names in WHO.items():
        for name in names:
            key = f"{case} {name}"
            if key not in ratios:
                continue
            rows.append(
                [
                    case,
                    name,
                    f"{ratios.median(key) * 1e6:.1f}",
                    f"{ratios.median(key + ' p99') * 1e6:.0f}",
                    f"{ratios.ratio(key, f'{case} stock'):.2f}",
                    f"{ratios.ratio(key, f'{case} raw'):.2f}" if f"{case} raw" in ratios else "-",
                ]
            )
    print(machine(), f"pin={chosen.pin}", f"rounds={rounds}")
    show("Small calls", ("case", "client -> server", "p50 us", "p99 us", "x stock pair", "x raw socket"), rows)
    save(chosen.json, ratios.medians())


if __name__ == "__main__":
    main()
