"""Null calls beside a bulk copy on the same session.

python -m benchmarks.mixed [--pin same|cross|none] [--rounds N] [--quick]
"""

from __future__ import annotations

from contextlib import ExitStack

from benchmarks.peers import Client, Server, pin_choices
from benchmarks.rounds import Ratios, machine, options, save, show


def main() -> None:
    """Measure and print."""
    chosen = options(__doc__ or "")
    rounds, nbytes = (1, 256 << 20) if chosen.quick else (chosen.rounds, 1 << 30)
    ratios = Ratios()
    with ExitStack() as stack:
        server_cpu, client_cpu = pin_choices(chosen.pin)
        server = stack.enter_context(Server("ours", server_cpu))
        client = stack.enter_context(Client("ours", server.port, client_cpu))
        for _ in range(rounds):
            found = client.ask("mixed", nbytes, 3000)
            for case, figures in found.items():
                for name, value in figures.items():
                    ratios.add(f"{case} {name}", value)
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
    save(chosen.json, {name: ratios.median(name) for name in ratios.names()})


if __name__ == "__main__":
    main()
