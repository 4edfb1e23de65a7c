"""Copies up and down, into warm memory, and the memory they take.

python -m benchmarks.transfer [--pin same|cross|none] [--rounds N] [--quick]
"""

from __future__ import annotations

from contextlib import ExitStack

from benchmarks.peers import Client, Server, open_peers, pin_choices
from benchmarks.rounds import Ratios, machine, options, save, show

SIZES = ((64 << 10, 200), (1 << 20, 50), (64 << 20, 3))
STOCK_COUNT = {64 << 10: 20, 1 << 20: 3, 64 << 20: 1}


def main() -> None:
    """Measure and print."""
    chosen = options(__doc__ or "")
    rounds = 2 if chosen.quick else chosen.rounds
    server_cpu, client_cpu = pin_choices(chosen.pin)
    ratios = Ratios()
    with ExitStack() as stack:
        clients = open_peers(stack, chosen.pin)
        for _ in range(rounds):
            for size, count in SIZES:
                for way in ("up", "down"):
                    for name, client in clients.items():
                        number = STOCK_COUNT[size] if "stock" in name else count
                        found = client.ask(way, size, number)
                        ratios.add(f"{way} {size} {name}", size / found["p50"])
        server = stack.enter_context(Server("ours", server_cpu))
        client = stack.enter_context(Client("ours", server.port, client_cpu))
        here = client.ask("memory", 256 << 20)
        there = server.peak() - (256 << 20)
    rows = []
    for size, _ in SIZES:
        for way in ("up", "down"):
            for name in clients:
                key = f"{way} {size} {name}"
                rows.append(
                    [
                        f"{way} {size >> 10} KiB",
                        name,
                        f"{ratios.median(key) / 1e9:.3f}",
                        f"{ratios.ratio(key, f'{way} {size} stock'):.1f}",
                        f"{ratios.ratio(key, f'{way} {size} raw'):.2f}",
                    ]
                )
    print(machine(), f"pin={chosen.pin}", f"rounds={rounds}")
    show("Copies", ("case", "client -> server", "GB/s", "x stock pair", "x raw socket"), rows)
    print(
        f"\nmemory of a 256 MiB copy up and down beyond source and destination: client {here / 2**20:.1f} MiB, "
        f"server {there / 2**20:.1f} MiB (with what its idle process takes)"
    )
    save(chosen.json, {name: ratios.median(name) for name in ratios.names()})


if __name__ == "__main__":
    main()
