"""Calls a second with 1, 10, 100 and 1000 on the way, as factors of sequential calls.

python -m benchmarks.pipeline [--pin same|cross|none] [--rounds N] [--quick]
"""

from __future__ import annotations

from contextlib import ExitStack

from benchmarks.peers import Client, Server, open_peers, pin_choices
from benchmarks.rounds import Ratios, machine, options, save, show

WINDOWS = (1, 10, 100, 1000)
CALLS = 10_000


def main() -> None:
    """Measure and print."""
    chosen = options(__doc__ or "")
    rounds, calls = (2, CALLS // 5) if chosen.quick else (chosen.rounds, CALLS)
    ratios = Ratios()
    with ExitStack() as stack:
        clients = open_peers(stack, chosen.pin)
        server_cpu, client_cpu = pin_choices(chosen.pin)
        # A stock server serves one session at a time, so this pair has a server of its own.
        port = stack.enter_context(Server("stock", server_cpu)).port
        clients["ours->stock"] = stack.enter_context(Client("ours", port, client_cpu))
        for _ in range(rounds):
            for name in ("raw", "stock"):
                ratios.add(f"{name} sequential", 1 / clients[name].ask("null", calls // 2)["p50"])
            for window in WINDOWS:
                for name in ("ours", "ours->stock"):
                    for case in ("pipeline", "map", *(("overlap",) if name == "ours" else ())):
                        ratios.add(f"{name} {case} {window}", clients[name].ask(case, window, calls))
            ratios.add("sleeps", clients["ours"].ask("sleeps", 100))
    rows = []
    for name in ratios.names():
        if name != "sleeps":
            raw, stock = ratios.ratio(name, "raw sequential"), ratios.ratio(name, "stock sequential")
            rows.append([name, f"{ratios.median(name):,.0f}", f"{raw:.2f}", f"{stock:.2f}"])
    print(machine(), f"pin={chosen.pin}", f"rounds={rounds}")
    show("Calls on the way", ("case, window", "calls/s", "x raw ping-pong", "x stock, sequential"), rows)
    print(f"\n100 calls of 100 ms each, submitted at once on one session: {ratios.median('sleeps') * 1e3:.0f} ms")
    save(chosen.json, {name: ratios.median(name) for name in ratios.names()})


if __name__ == "__main__":
    main()
