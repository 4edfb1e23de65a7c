"""Small calls: null, small arguments, look-up, after a pause, connect plus first call.

python -m benchmarks.roundtrip [--pin same|cross|none] [--rounds N] [--quick]
"""

from __future__ import annotations

from contextlib import ExitStack

from benchmarks.peers import Client, Server, open_peers, pin_choices
from benchmarks.rounds import Ratios, machine, options, save, show

CASES = (("null", 5000), ("small", 3000), ("lookup", 2000), ("pause", 10), ("connect", 10))


def main() -> None:
    """Measure and print."""
    chosen = options(__doc__ or "")
    rounds = 3 if chosen.quick else chosen.rounds
    server_cpu, client_cpu = pin_choices(chosen.pin)
    ratios = Ratios()
    with ExitStack() as stack:
        clients = open_peers(stack, chosen.pin)
        # A stock server serves one session at a time, so this pair has a server of its own.
        second = stack.enter_context(Server("stock", server_cpu))
        clients["ours->stock"] = stack.enter_context(Client("ours", second.port, client_cpu))
        for _ in range(rounds):
            for case, count in CASES:
                for name, client in clients.items():
                    if (name == "raw" and case not in ("null", "small")) or (
                        name == "ours->stock" and case == "connect"
                    ):
                        continue
                    found = client.ask(case, max(count // 5, 5) if chosen.quick else count)
                    ratios.add(f"{case} {name}", found["p50"])
                    ratios.add(f"{case} {name} p99", found["p99"])
    rows = []
    for case, _ in CASES:
        for name in clients:
            key = f"{case} {name}"
            if key not in ratios.names():
                continue
            floor = f"{ratios.ratio(key, f'{case} raw'):.2f}" if f"{case} raw" in ratios.names() else "-"
            stock = f"{ratios.ratio(key, f'{case} stock'):.2f}"
            rows.append(
                [
                    case,
                    name,
                    f"{ratios.median(key) * 1e6:.1f}",
                    f"{ratios.median(key + ' p99') * 1e6:.0f}",
                    stock,
                    floor,
                ]
            )
    print(machine(), f"pin={chosen.pin}", f"rounds={rounds}")
    show("Small calls", ("case", "client -> server", "p50 us", "p99 us", "x stock pair", "x raw socket"), rows)
    save(chosen.json, {name: ratios.median(name) for name in ratios.names()})


if __name__ == "__main__":
    main()
