"""Interleaved rounds, medians, ratios, and the table they make."""

from __future__ import annotations

import argparse
import json
import platform
import statistics
from collections import defaultdict
from collections.abc import Iterable, Sequence
from importlib.metadata import version
from typing import Any

__all__ = ["Ratios", "machine", "options", "show"]


class Ratios:
    """Figures of several rounds; ratios are taken within a round, then their median."""

    def __init__(self) -> None:
        self._figures: dict[str, list[float]] = defaultdict(list)

    def add(self, name: str, value: float) -> None:
        """Note this round's figure."""
        self._figures[name].append(value)

    def median(self, name: str) -> float:
        """Return the median over the rounds."""
        return statistics.median(self._figures[name])

    def ratio(self, name: str, other: str) -> float:
        """Return the median of ``name / other`` over the rounds."""
        pairs = zip(self._figures[name], self._figures[other], strict=True)
        return statistics.median(one / two for one, two in pairs)

    def names(self) -> list[str]:
        """Return what was measured."""
        return list(self._figures)


def options(description: str, argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the options that every benchmark has."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--pin", choices=("same", "cross", "none"), default="same")
    parser.add_argument("--quick", action="store_true", help="fewer rounds and calls")
    parser.add_argument("--json", metavar="FILE", help="write the figures as JSON")
    return parser.parse_args(argv)


def machine() -> str:
    """Say what was measured on and with."""
    packages = ", ".join(f"{name} {version(name)}" for name in ("apache-tvm", "tornado", "numpy"))
    return f"{platform.system()} {platform.machine()}, Python {platform.python_version()}, {packages}"


def show(title: str, header: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Print a Markdown table."""
    print(f"\n{title}\n")
    print("| " + " | ".join(header) + " |")
    print("|" + "---|" * len(header))
    for row in rows:
        print("| " + " | ".join(row) + " |")


def save(path: str | None, content: Any) -> None:
    """Write JSON where asked."""
    if path:
        with open(path, "w") as file:
            json.dump(content, file, indent=1)
