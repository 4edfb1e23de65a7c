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

__all__ = ["Ratios", "add_options", "machine", "markdown", "options", "save", "show"]


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
        """Return the median of ``name / other`` over the rounds in which both were measured."""
        pairs = zip(self._figures[name], self._figures[other])  # noqa: B905  # stock's slow cases are measured once
        return statistics.median(one / two for one, two in pairs)

    def names(self) -> list[str]:
        """Return what was measured."""
        return list(self._figures)

    def medians(self) -> dict[str, float]:
        """Return the median of everything."""
        return {name: self.median(name) for name in self._figures}

    def __contains__(self, name: str) -> bool:
        return name in self._figures

    def take(self, other: Ratios, prefix: str = "") -> None:
        """Take another's figures over, each name with a prefix."""
        for name, figures in other._figures.items():
            self._figures[prefix + name] = list(figures)


def options(description: str, argv: Sequence[str] | None = None, pin: str = "same") -> argparse.Namespace:
    """Parse the options that every benchmark has."""
    parser = argparse.ArgumentParser(description=description)
    add_options(parser, pin)
    return parser.parse_args(argv)


def add_options(parser: argparse.ArgumentParser, pin: str | None) -> None:
    """Add the options that every benchmark has."""
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--pin", choices=("same", "cross", "none"), default=pin, help="CPUs of client and server")
    parser.add_argument("--quick", action="store_true", help="fewer rounds and calls")
    parser.add_argument("--json", metavar="FILE", help="write the figures as JSON")


def machine() -> str:
    """Say what was measured on and with."""
    packages = ", ".join(f"{name} {version(name)}" for name in ("apache-tvm", "tornado", "numpy"))
    return f"{platform.system()} {platform.machine()}, Python {platform.python_version()}, {packages}"


def show(title: str, header: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Print a Markdown table."""
    print(f"\n{title}\n")
    print("\n".join(markdown(header, rows)))


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Return the lines of a table."""
    return ["| " + " | ".join(header) + " |", "|" + "---|" * len(header), *(f"| {' | '.join(row)} |" for row in rows)]


def save(path: str | None, content: Any) -> None:
    """Write JSON where asked."""
    if path:
        with open(path, "w") as file:
            json.dump(content, file, indent=1)
            file.write("\n")
