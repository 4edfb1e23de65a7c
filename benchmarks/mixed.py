"""Null calls beside a bulk copy on the same session.

python -m benchmarks.mixed [--pin same|cross|none] [--rounds N] [--quick]
"""

from __future__ import annotations

from benchmarks.peers import Client, Server, pin_choices
from benchmarks.rounds import Ratios, machine, options, save, show


def measure(pin: str, rounds: int, nbytes: int) -> Ratios:
    """Measure in rounds, beside copies of ``nbytes`` in each direction."""
    ratios = Ratios()
    server_cpu, client_cpu = pin_choices(pin)
    with Server("ours", server_cpu) as server, Client("ours", server.port, client_cpu) as client:
        for _ in range(rounds):
            for case, figures in client.ask("mixed", nbytes, 3000).items():
                for name, value in figures.items():
                    ratios.add(f"{case} {name}", value)
    return ratios


def main() -> None:
    """Measure and print."""
    chosen = options(__doc__ or "")
    rounds, nbytes = (1, 256 << 20) if chosen.quick else (chosen.rounds, 1 << 30)
    ratios = measure(chosen.pin, rounds, nbytes)
    rows = []
    for case in ("idle", "up", "down"):
        p50, p99 = ratios.median(f"{case} p50"), ratios.median(f"{case} p99")
        row = [case, f"{p50 * 1e6:.0f}", f"{p99 * 1e6:.0f}", f"{ratios.ratio(f'{case} p50', 'idle p50'):.2f}"]
        if case != "idle":
            row += [f"{ratios.median(f'{case} rate') / 1e9:.2f}", f"{ratios.median(f'{case} slowdown'):.2f}"]
        rows.append(row + ["-"] * (6 - len(row)))
    print(machine(), f"pin={chosen.pin}", f"rounds={rounds}")
    header = ("beside a copy", "p50 us", "p99 us", "x idle p50", "copy GB/s", "copy's time x alone")
    show(f"Null calls beside a copy of {nbytes >> 20} MiB", header, rows)
    save(chosen.json, ratios.medians())


if __name__ == "__main__":
    main()
