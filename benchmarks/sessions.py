"""Many sessions of one server: opening them, calling in turn and all at once, the memory of idle ones.

python -m benchmarks.sessions [--pin same|cross|none] [--rounds N] [--quick]
"""

from __future__ import annotations

from benchmarks.peers import Client, Server, pin_choices, resident
from benchmarks.rounds import Ratios, machine, options, save, show

OPEN = 500
IDLE = 1000
IN_TURN = 50
ENDS = ("server", "client")


def measure(pin: str, rounds: int, quick: bool) -> Ratios:
    """Measure in rounds, each with a server and a client of its own."""
    ratios = Ratios()
    server_cpu, client_cpu = pin_choices(pin)
    turns = 20 if quick else 100
    for _ in range(rounds):
        with Server("ours", server_cpu) as server, Client("many", server.port, client_cpu) as client:
            client.ask("more", IN_TURN)
            for name in ("add", "hop"):
                client.ask("in_turn", f"bench.{name}", 2)  # the threads there will be
                ratios.add(f"in turn {name}", client.ask("in_turn", f"bench.{name}", turns))
            client.ask("end_all")
            ratios.add("open", client.ask("more", OPEN))
            ratios.add("at once", client.ask("all_at_once"))
            here, there = client.ask("resident"), resident(server.pid)
            client.ask("more", IDLE)
            ratios.add("idle server", (resident(server.pid) - there) / IDLE)
            ratios.add("idle client", (client.ask("resident") - here) / IDLE)
    return ratios


def main() -> None:
    """Measure and print."""
    chosen = options(__doc__ or "")
    rounds = 1 if chosen.quick else chosen.rounds
    ratios = measure(chosen.pin, rounds, chosen.quick)
    hop = ratios.ratio("in turn add", "in turn hop")
    rows = [
        [f"{IN_TURN} sessions in turn", f"{ratios.median('in turn add'):,.0f} calls/s, {hop:.2f} x a hop to a pool"],
        ["the same with a hop to a pool", f"{ratios.median('in turn hop'):,.0f} calls/s"],
        [f"opening {OPEN} sessions", f"{ratios.median('open') * 1e3:.2f} ms each"],
        ["a call in each at once", f"{ratios.median('at once'):,.0f} calls/s"],
        *([f"{IDLE} idle, the {end}", f"{ratios.median(f'idle {end}') / 1024:.0f} KiB each"] for end in ENDS),
    ]
    print(machine(), f"pin={chosen.pin}", f"rounds={rounds}")
    show("Many sessions", ("what", "that is"), rows)
    save(chosen.json, ratios.medians())


if __name__ == "__main__":
    main()
