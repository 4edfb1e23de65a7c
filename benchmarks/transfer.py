"""Copies up and down, into warm memory, and the memory they take.

python -m benchmarks.transfer [--pin same|cross|none] [--rounds N] [--quick]
"""

from __future__ import annotations

from contextlib import ExitStack

from benchmarks.peers import Client, Server, open_peers, pin_choices
from benchmarks.rounds import Ratios, machine, options, save, show

NAMES = ("raw", "ours", "stock->ours", "stock")
COUNTS = {64 << 10: 200, 1 << 20: 50, 64 << 20: 5, 256 << 20: 2}
STOCK_COUNTS = {64 << 10: 20, 1 << 20: 3, 64 << 20: 1}


def measure(clients: dict[str, Client], rounds: int, quick: bool) -> Ratios:
    """Measure each size and way with each pair, in rounds; bytes a second.

    Stock copies at the same 40 MB/s from 64 KiB on, so its largest copies (7 s each) are not made: its rate at the size
    before stands in their place, in a quick run already at 64 MiB.
    """
    ratios = Ratios()
    largest = (1 << 20) if quick else (64 << 20)
    for _ in range(rounds):
        for way in ("up", "down"):
            rates: dict[str, float] = {}
            for size, count in COUNTS.items():
                for name in NAMES:
                    if "stock" not in name:
                        rates[name] = size / clients[name].ask(way, size, count)["p50"]
                    elif size <= largest:
                        rates[name] = size / clients[name].ask(way, size, STOCK_COUNTS[size])["p50"]
                    ratios.add(f"{way} {size} {name}", rates[name])
    return ratios


def measure_memory(pin: str, nbytes: int = 256 << 20) -> Ratios:
    """Measure what a copy there and back takes at each end beyond source and destination."""
    ratios = Ratios()
    server_cpu, client_cpu = pin_choices(pin)
    with Server("ours", server_cpu) as server, Client("ours", server.port, client_cpu) as client:
        client.ask("memory", 1 << 10)
        before = server.peak()
        ratios.add("memory client", max(0, client.ask("memory", nbytes)))
        ratios.add("memory server", max(0, server.peak() - before - nbytes))
    return ratios


def main() -> None:
    """Measure and print."""
    chosen = options(__doc__ or "")
    rounds = 2 if chosen.quick else chosen.rounds
    with ExitStack() as stack:
        ratios = measure(open_peers(stack, chosen.pin), rounds, chosen.quick)
    memory = measure_memory(chosen.pin)
    rows = []
    for size in COUNTS:
        for way in ("up", "down"):
            for name in NAMES:
                key, stock, raw = (f"{way} {size} {one}" for one in (name, "stock", "raw"))
                what = [f"{way} {size >> 10} KiB", name, f"{ratios.median(key) / 1e9:.3f}"]
                rows.append([*what, f"{ratios.ratio(key, stock):.1f}", f"{ratios.ratio(key, raw):.2f}"])
    print(machine(), f"pin={chosen.pin}", f"rounds={rounds}")
    show("Copies", ("case", "client -> server", "GB/s", "x stock pair", "x raw socket"), rows)
    print("\nmemory of a 256 MiB copy up and down beyond source and destination:", end=" ")
    print(", ".join(f"{who} {memory.median(f'memory {who}') / 2**20:.1f} MiB" for who in ("client", "server")))
    save(chosen.json, {**ratios.medians(), **memory.medians()})


if __name__ == "__main__":
    main()
