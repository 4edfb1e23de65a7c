"""Pictures of a run; they need matplotlib."""

from __future__ import annotations

from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from benchmarks.cases import Case
from benchmarks.rounds import Ratios

__all__ = ["plot"]

MISSING = "no plots: matplotlib is not installed"


def plot(ratios: Ratios, cases: Iterable[Case], folder: Path) -> list[Path]:
    """Draw calls, copies and windows into ``folder``; returns the files, none without matplotlib."""
    if find_spec("matplotlib") is None:
        print(MISSING)
        return []
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    folder.mkdir(parents=True, exist_ok=True)
    drawn = []
    for name, prefix, other in (
        ("calls", "calls", "stock"),
        ("copies", "copies", "raw"),
        ("windows", "pipeline", "raw"),
    ):
        bars = [(f"{case.label}{_placement(case)}", _ratio(ratios, case, other)) for case in cases]
        wanted = [case.section.startswith(prefix) for case in cases]
        found = [(label, value) for (label, value), want in zip(bars, wanted, strict=True) if want and value]
        if found:
            drawn.append(folder / f"{name}.png")
            _draw(pyplot, found, f"{name}: ours as a multiple of {other}", drawn[-1])
    return drawn


def _placement(case: Case) -> str:
    return ", two CPUs" if case.section.endswith("cross") else ""


def _ratio(ratios: Ratios, case: Case, other: str) -> float | None:
    than = case.stock if other == "stock" else case.raw
    name, base = f"{case.section}/{case.figure}", f"{case.section}/{than}"
    return ratios.ratio(name, base) if than and name in ratios and base in ratios else None


def _draw(pyplot: Any, found: list[tuple[str, float]], title: str, path: Path) -> None:
    figure, axes = pyplot.subplots(figsize=(8, 0.8 + 0.3 * len(found)))
    labels, values = zip(*found[::-1], strict=True)
    axes.barh(labels, values, color="#4477aa")
    axes.axvline(1, color="black", linewidth=1)
    axes.set_xscale("log" if max(values) > 10 else "linear")
    axes.set_title(title, fontsize=10)
    axes.tick_params(labelsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=100)
    pyplot.close(figure)
