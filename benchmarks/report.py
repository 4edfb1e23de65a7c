"""What the figures say: ratios, bars, the table, and the check against disasters. Nothing is measured here."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

from benchmarks.cases import Bar, Case
from benchmarks.rounds import Ratios

__all__ = ["HEADER", "committable", "disasters", "meets", "row", "shown"]

HEADER = ("case", "CPUs", "median", "p99", "x stock", "x raw", "bar", "met")
FACTOR = 2.0  # how much worse than the committed ratio is a disaster
_UNITS = {"us": 1e6, "ms": 1e3, "GB/s": 1e-9, "calls/s": 1.0, "MiB": 2**-20, "KiB": 2**-10, "ratio": 1.0}


def shown(value: float, unit: str) -> str:
    """Return a figure for people, in its unit: seconds, bytes or calls become what the unit says."""
    scaled = value * _UNITS[unit]
    digits = 0 if unit == "calls/s" else 1 if unit in ("us", "MiB", "KiB") else 2
    return f"{scaled:,.{digits}f}" + ("" if unit == "ratio" else f" {unit}")


def value_of(ratios: Ratios, case: Case, bar: Bar) -> float | None:
    """Return what a bar judges, or None if that was not measured."""
    name, other = f"{case.section}/{case.figure}", f"{case.section}/{bar.of}"
    if name not in ratios or (bar.of and other not in ratios):
        return None
    return ratios.ratio(name, other) if bar.of else ratios.median(name)


def meets(ratios: Ratios, case: Case, bar: Bar) -> bool | None:
    """Tell whether a bar is met; None if it was not measured."""
    value = value_of(ratios, case, bar)
    if value is None:
        return None
    return value >= bar.limit if bar.least else value <= bar.limit


def _describe(case: Case, bar: Bar) -> str:
    sign = "≥" if bar.least else "≤"
    if not bar.of:
        return f"{sign} {shown(bar.limit, case.unit)}"
    word = next((one for one in ("stock", "raw", "hop", "idle") if one in bar.of.split()), bar.of)
    return f"{sign} {bar.limit:g} {word}"


def row(ratios: Ratios, case: Case, cpus: str) -> list[str] | None:
    """Return a case's row, or None if it was not measured."""
    name = f"{case.section}/{case.figure}"
    if name not in ratios:
        return None
    tail = f"{name} p99"
    compared = [
        f"{ratios.ratio(name, f'{case.section}/{other}'):.2f}" if other and f"{case.section}/{other}" in ratios else "-"
        for other in (case.stock, case.raw)
    ]
    verdicts = [meets(ratios, case, bar) for bar in case.bars]
    met = "-" if None in verdicts or not verdicts else "yes" if all(verdicts) else "NO"
    return [
        case.label,
        cpus,
        shown(ratios.median(name), case.unit),
        shown(ratios.median(tail), case.unit) if tail in ratios else "-",
        *compared,
        ", ".join(_describe(case, bar) for bar in case.bars) or "-",
        met,
    ]


def _measure(case: Case) -> Bar:
    """Return the ratio by which a watched case is compared with a committed run: its bar's, else to stock."""
    return next((bar for bar in case.bars if bar.of), Bar(0.0, case.stock, least=case.unit in ("GB/s", "calls/s")))


def _steady(ratios: Ratios, case: Case) -> float | None:
    """Return a watched case's ratio, of the quick tenths where they were measured.

    A process that wakes every 100 us on the same CPU makes the median of awaited calls 5 times raw (1.7 alone).
    """
    bar = _measure(case)
    quick = value_of(ratios, replace(case, figure=f"{case.figure} p10"), replace(bar, of=f"{bar.of} p10"))
    return value_of(ratios, case, bar) if quick is None else quick


def committable(ratios: Ratios, cases: Iterable[Case]) -> dict[str, float]:
    """Return the ratios of the watched cases, to be committed."""
    found = {}
    for case in cases:
        value = _steady(ratios, case) if case.watched else None
        if value is not None:
            found[f"{case.section}: {case.label}"] = round(value, 4)
    return found


def disasters(
    ratios: Ratios, cases: Iterable[Case], committed: Mapping[str, float], factor: float = FACTOR
) -> list[tuple[Case, str]]:
    """Return the watched cases whose ratio is ``factor`` times worse than the committed one, and what to say.

    A watched case that was not measured, or is not committed, is one too: a check must not pass by looking away.
    """
    found = []
    for case in cases:
        if not case.watched:
            continue
        name, bar = f"{case.section}: {case.label}", _measure(case)
        value, before = _steady(ratios, case), committed.get(name)
        if value is None or before is None:
            found.append((case, f"{name}: {'not measured' if value is None else 'not committed'}"))
        elif (before > factor * value) if bar.least else (value > factor * before):
            found.append((case, f"{name}: {value:.2f} x {bar.of}, committed {before:.2f}"))
    return found
