"""Copies and calls over a WebSocket and through a proxy, against a direct connection.

python -m benchmarks.farm [--pin same|cross|none] [--rounds N] [--quick]
"""

from __future__ import annotations

from contextlib import ExitStack

from benchmarks.peers import Client, Server, pin_choices
from benchmarks.rounds import Ratios, machine, options, save, show

SIZES = ((1 << 20, 50), (64 << 20, 3), (256 << 20, 1))
CALLS = 2000


def main() -> None:
    """Measure and print."""
    chosen = options(__doc__ or "")
    rounds = 2 if chosen.quick else chosen.rounds
    server_cpu, client_cpu = pin_choices(chosen.pin)
    ratios = Ratios()
    with ExitStack() as stack:
        direct = stack.enter_context(Server("ours", server_cpu))
        web = stack.enter_context(Server("web", server_cpu))
        proxy = stack.enter_context(Server("proxy", None))
        stack.enter_context(Server("behind", server_cpu, str(proxy.port)))
        clients = {
            "direct": stack.enter_context(Client("ours", direct.port, client_cpu)),
            "WebSocket": stack.enter_context(Client("web", web.port, client_cpu)),
            "proxy": stack.enter_context(Client("proxy", proxy.port, client_cpu)),
        }
        for _ in range(rounds):
            for size, count in SIZES:
                for way in ("up", "down"):
                    for name, client in clients.items():
                        ratios.add(f"{way} {size >> 20} MiB {name}", size / client.ask(way, size, count)["p50"])
            for name, client in clients.items():
                ratios.add(f"null call {name}", client.ask("null", CALLS)["p50"])
    cases = [f"{way} {size >> 20} MiB" for size, _ in SIZES for way in ("up", "down")]
    rows = [
        [
            case,
            name,
            f"{ratios.median(f'{case} {name}') / 1e9:.2f} GB/s",
            f"{ratios.ratio(f'{case} {name}', f'{case} direct'):.2f}",
        ]
        for case in cases
        for name in clients
    ]
    rows += [
        [
            "null call",
            name,
            f"{ratios.median(f'null call {name}') * 1e6:.1f} us",
            f"{ratios.ratio(f'null call {name}', 'null call direct'):.2f}",
        ]
        for name in clients
    ]
    print(machine(), f"pin={chosen.pin}", f"rounds={rounds}")
    show("Not direct", ("case", "way", "median", "x direct"), rows)
    save(chosen.json, ratios.medians())


if __name__ == "__main__":
    main()
