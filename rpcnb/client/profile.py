"""What :meth:`VM.profile` returns: where the time of a Relax function goes, as a table with bars."""

from __future__ import annotations

import html
import json
import math
from typing import NamedTuple

from rpcnb.errors import RemoteProtocolError

__all__ = ["Profile", "ProfileRow", "show_time"]

_BAR = 20  # characters
_SHOWN = 40  # rows
_STEPS = " ▏▎▍▌▋▊▉█"


class ProfileRow(NamedTuple):
    """The calls of one function with arguments of one shape.

    Attributes:
        name: Of the function: a kernel, or one of the machine's own (``vm.builtin...``).
        arguments: Types and shapes of its tensors.
        calls: In one run.
        seconds: That they take in one run, without what they call themselves.
    """

    name: str
    arguments: str
    calls: float
    seconds: float


class Profile:
    """Where the time of one run goes.

    Attributes:
        name: Of the function.
        seconds: Of one run, measuring included.
        runs: That were measured.
        rows: What took longest first.
    """

    def __init__(self, name: str, runs: int, seconds: float, rows: list[ProfileRow]) -> None:
        self.name = name
        self.runs = runs
        self.seconds = seconds
        self.rows = rows

    @classmethod
    def read(cls, name: str, runs: int, text: object) -> Profile:
        """Read a server's answer.

        Raises:
            RemoteProtocolError: It is something else.
        """
        try:
            found = json.loads(str(text))
            rows = [
                ProfileRow(str(one), str(args), float(calls), float(spent)) for one, args, calls, spent in found["rows"]
            ]
            seconds = float(found["seconds"])
            if not all(math.isfinite(number) for number in (seconds, *(row.seconds + row.calls for row in rows))):
                raise ValueError("a number that is none")
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise RemoteProtocolError(f"expected a profile, got {str(text)[:60]!r}: {error}") from None
        return cls(name, runs, seconds, rows)

    def _shares(self) -> list[tuple[ProfileRow, float]]:
        total = sum(row.seconds for row in self.rows) or 1.0
        return [(row, max(0.0, row.seconds / total)) for row in self.rows[:_SHOWN]]

    def _left_out(self) -> str:
        more = len(self.rows) - _SHOWN
        return f"and {more} more" if more > 0 else ""

    @property
    def _title(self) -> str:
        runs = "1 run" if self.runs == 1 else f"{self.runs} runs"
        return f"{self.name}: {show_time(self.seconds)} a run, of {runs}"

    def table(self) -> str:
        """Return it as text."""
        lines = [
            (f"{share:4.0%} {_bar(share)} {show_time(row.seconds):>9} {row.calls:6g}", row.name, row.arguments)
            for row, share in self._shares()
        ]
        width = max((len(name) for _, name, _ in lines), default=0)
        rows = [f"{head}  {name:{width}}  {args}".rstrip() for head, name, args in lines]
        return "\n".join(
            [self._title, f"{'':{_BAR + 5}} {'time':>9} {'calls':>6}", *rows, *filter(None, [self._left_out()])]
        )

    def json(self) -> str:
        """Return it as JSON."""
        rows = [row._asdict() for row in self.rows]
        return json.dumps({"name": self.name, "runs": self.runs, "seconds": self.seconds, "rows": rows})

    def __repr__(self) -> str:
        return self.table()

    def _repr_html_(self) -> str:
        bar = "background:var(--jp-brand-color1,#1976d2);height:0.8em;min-width:1px"
        rows = "".join(
            f"<tr><td style='text-align:left'>{html.escape(row.name)}</td>"
            f"<td style='text-align:left'>{html.escape(row.arguments)}</td><td>{row.calls:g}</td>"
            f"<td>{show_time(row.seconds)}</td>"
            f"<td style='min-width:10em'><div style='{bar};width:{share:.1%}' title='{share:.1%}'></div></td></tr>"
            for row, share in self._shares()
        )
        head = "".join(f"<th>{one}</th>" for one in ("function", "tensors", "calls", "time", "share"))
        return (
            f"<div>{html.escape(self._title)}</div><table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>"
            f"<div>{self._left_out()}</div>"
        )


def show_time(seconds: float) -> str:
    """Return a time for people: ``3.2 us``."""
    for limit, factor, unit in ((1e-6, 1e9, "ns"), (1e-3, 1e6, "us"), (1.0, 1e3, "ms")):
        if seconds < limit:
            return f"{seconds * factor:.3g} {unit}"
    return f"{seconds:.3g} s"


def _bar(share: float) -> str:
    eighths = round(min(1.0, share) * _BAR * 8)
    full, rest = divmod(eighths, 8)
    return f"{'█' * full}{_STEPS[rest] if rest else ''}".ljust(_BAR)
