"""Every benchmark in one run, as ratios to stock TVM and to a raw socket: ``python -m benchmarks``.

Without ``--pin`` each case runs where its bar is meant; with it all run there, and those meant elsewhere are left out.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path

from benchmarks import busy, links, mixed, panels, pipeline, roundtrip, sessions, transfer, weight
from benchmarks.cases import CASES
from benchmarks.peers import open_peers
from benchmarks.plots import plot
from benchmarks.report import HEADER, committable, disasters, row
from benchmarks.rounds import Ratios, add_options, machine, markdown, save

RESULTS = Path(__file__).parent / "results"
COMMITTED = RESULTS / "committed.json"

Measure = Callable[[str, int, bool], Ratios]  # pin, rounds, quick


def _calls(pin: str, rounds: int, quick: bool) -> Ratios:
    with ExitStack() as stack:
        return roundtrip.measure(open_peers(stack, pin), rounds, quick)


def _copies(pin: str, rounds: int, quick: bool) -> Ratios:
    with ExitStack() as stack:
        return transfer.measure(open_peers(stack, pin), rounds, quick)


def _pipeline(pin: str, rounds: int, quick: bool) -> Ratios:
    with ExitStack() as stack:
        return pipeline.measure(open_peers(stack, pin), rounds, quick)


def _links(pin: str, rounds: int, quick: bool) -> Ratios:
    found = links.measure(1 if quick else rounds, links.SIZE // (4 if quick else 1))
    for way in ("up", "down"):
        found.add(f"share {way}", found.ratio("ideal", way))
    return found


def _mixed(pin: str, rounds: int, quick: bool) -> Ratios:
    return mixed.measure(pin, rounds // 2 if quick else rounds, (256 << 20) if quick else (1 << 30))


def _observers(pin: str, rounds: int, quick: bool) -> Ratios:
    return panels.measure(rounds, quick)


# name -> who measures it, and on which CPUs: "same" one, "cross" two, "none" as the system likes
SECTIONS: dict[str, tuple[Measure, str]] = {
    "calls same": (_calls, "same"),
    "calls cross": (_calls, "cross"),
    "copies same": (_copies, "same"),
    "copies cross": (_copies, "cross"),
    "memory": (lambda pin, rounds, quick: transfer.measure_memory(pin), "cross"),
    "pipeline": (_pipeline, "cross"),
    "sessions": (lambda pin, rounds, quick: sessions.measure(pin, 1 if quick else rounds, quick), "same"),
    "mixed": (_mixed, "none"),
    "busy": (busy.measure, "cross"),
    "links": (_links, "none"),
    "weight": (lambda pin, rounds, quick: weight.measure(rounds), "none"),
    "observers": (_observers, "none"),
}


def measure(names: Sequence[str], pin: str | None, rounds: int, quick: bool) -> tuple[Ratios, dict[str, str]]:
    """Run sections; returns the figures, and on which CPUs each ran."""
    ratios, places = Ratios(), {}
    for name in names:
        function, usual = SECTIONS[name]
        if pin not in (None, usual) and name.split()[-1] in ("same", "cross"):
            print(f"{name}: not with --pin {pin}", file=sys.stderr)
            continue
        places[name] = pin or usual
        start = time.monotonic()
        ratios.take(function(places[name], rounds, quick), f"{name}/")
        print(f"{name}: {time.monotonic() - start:.0f} s", file=sys.stderr)
    if "observers" in places:
        places["panels"] = places["observers"]
        ratios.add("panels/share", ratios.median("observers/share"))
    return ratios, places


def _check(quick: bool, rounds: int) -> int:
    """Compare the watched cases with the committed run; one that looks like a disaster is measured once more."""
    committed: dict[str, float] = json.loads(COMMITTED.read_text())
    watched = [name for name in SECTIONS if any(case.watched and case.section == name for case in CASES)]
    ratios, _ = measure(watched, None, rounds, quick)
    found = disasters(ratios, CASES, committed)
    if found:
        print("again:", *(text for _, text in found), sep="\n  ")
        again = [name for name in watched if any(case.section == name for case, _ in found)]
        ratios, _ = measure(again, None, rounds, quick)
        found = disasters(ratios, [case for case, _ in found], committed)
    print("disasters:" if found else "no disaster", *(text for _, text in found), sep="\n  ")
    return 1 if found else 0


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, and print the table; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    add_options(parser, pin=None)
    parser.add_argument("--only", action="append", choices=SECTIONS, help="run this section alone; may be repeated")
    parser.add_argument("--check", action="store_true", help="fail if a ratio is twice as bad as the committed one")
    parser.add_argument("--commit", action="store_true", help="write the ratios that --check compares with")
    chosen = parser.parse_args(argv)
    rounds = 3 if chosen.quick else chosen.rounds
    if chosen.check:
        return _check(chosen.quick, rounds)
    ratios, places = measure(chosen.only or list(SECTIONS), chosen.pin, rounds, chosen.quick)
    rows = [row(ratios, case, places[case.section]) for case in CASES if case.section in places]
    print(machine(), f"rounds={rounds}" + (", quick" if chosen.quick else ""), "", sep="\n")
    print("\n".join(markdown(HEADER, [one for one in rows if one is not None])))
    save(chosen.json, {"machine": machine(), "places": places, "medians": ratios.medians()})
    if chosen.commit:
        before = json.loads(COMMITTED.read_text()) if COMMITTED.exists() else {}
        save(str(COMMITTED), {**before, **committable(ratios, CASES)})
    for path in plot(ratios, CASES, RESULTS):
        print(f"drawn: {path.name}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
