"""``rpcnb.tvm``: what TVM's tools do, seen in a notebook.

::

    runner = rpcnb.tvm.watch(ms.runner.RPCRunner(...))   # everything else of the script stays as it is

shows under the cell how many candidates were measured, which failed, and the best so far, as a line and a plot.
"""

from __future__ import annotations

import html
import importlib
import math
import sys
import threading
import time
from typing import TYPE_CHECKING, Any

from rpcnb.client.profile import show_time
from rpcnb.errors import LocalProtocolError

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["Trials", "watch"]

_EVERY = 0.5  # seconds between two looks
_WIDTH, _HEIGHT = 480, 120
_MOST_LABEL = 60  # letters


class Trials:
    """What was measured of one kind of candidates.

    Attributes:
        label: What they take.
        best: Seconds of the best so far; infinite before there is one.
        curve: The best so far after each trial.
        failed: Why candidates could not be measured, the last one's first line.
    """

    def __init__(self, label: str) -> None:
        self.label = label
        self.best = math.inf
        self.curve: list[float] = []
        self.failures = 0
        self.failed = ""

    def note(self, seconds: list[float], error: str) -> None:
        """Take a result: the seconds of its repeats, or why there are none."""
        if error or not seconds:
            self.failures += 1
            self.failed = next((line.strip() for line in reversed(error.splitlines()) if line.strip()), "no result")
        else:
            self.best = min(self.best, sum(seconds) / len(seconds))
        self.curve.append(self.best)

    def line(self, waiting: int = 0, total: int | None = None) -> str:
        """Return it in one line."""
        of = f" of {total}" if total and len(self.curve) <= total else ""
        parts = [
            f"{len(self.curve)}{of} measured",
            f"best {show_time(self.best)}" if self.best < math.inf else "none yet",
        ]
        if waiting:
            parts.append(f"{waiting} on the way")
        if self.failures:
            parts.append(f"{self.failures} failed: {self.failed[:_MOST_LABEL]}")
        return f"{self.label}: {', '.join(parts)}"

    def svg(self) -> str:
        """Return the best so far over the trials as a picture; empty before there are two."""
        points = [(index, math.log10(value)) for index, value in enumerate(self.curve) if 0 < value < math.inf]
        if len(points) < 2:
            return ""
        low, high = min(value for _, value in points), max(value for _, value in points)
        wide, tall = max(1, len(self.curve) - 1), (high - low) or 1.0
        placed = [
            (5 + (_WIDTH - 10) * index / wide, 15 + (_HEIGHT - 35) * (high - value) / tall) for index, value in points
        ]
        path, (_, before) = [f"{placed[0][0]:.1f},{placed[0][1]:.1f}"], placed[0]
        for x, y in placed[1:]:  # a step down, when a better one was found
            path += [f"{x:.1f},{before:.1f}", f"{x:.1f},{y:.1f}"]
            before = y
        text = "font-size='11' font-family='sans-serif' fill='currentColor'"
        first, best = show_time(10**high), show_time(10**low)
        title = f"best so far over {len(self.curve)} trials, from {first} to {best}"
        size = f"width='{_WIDTH}' height='{_HEIGHT}' viewBox='0 0 {_WIDTH} {_HEIGHT}'"
        line = "fill='none' stroke='var(--jp-brand-color1,#1976d2)' stroke-width='2'"
        return (
            f"<svg {size} role='img' aria-label='{title}'><polyline points='{' '.join(path)}' {line}/>"
            f"<text x='5' y='11' {text}>{first}</text>"
            f"<text x='5' y='{_HEIGHT - 5}' {text}>{best}</text>"
            f"<text x='{_WIDTH - 5}' y='{_HEIGHT - 5}' text-anchor='end' {text}>trial {len(self.curve)}</text></svg>"
        )


class _Watch:
    """What a runner does, shown."""

    def __init__(self, total: int | None) -> None:
        self.total = total
        self.groups: dict[str, Trials] = {}
        self.waiting = 0
        self._lock = threading.Lock()
        self._shown = 0.0
        self._show = _display()

    def began(self, count: int) -> None:
        """So many candidates are on the way."""
        with self._lock:
            self.waiting += count
        self._look()

    def ended(self, label: str, seconds: list[float], error: str) -> None:
        """One has been measured, or could not be."""
        with self._lock:
            self.waiting -= 1
            self.groups.setdefault(label, Trials(label)).note(seconds, error)
            last = self.waiting == 0
        self._look(now=last)

    def _look(self, *, now: bool = False) -> None:
        with self._lock:
            late = time.monotonic() - self._shown >= _EVERY
            if not (now or late):
                return
            self._shown = time.monotonic()
            groups = list(self.groups.values())
            last = groups[-1:]
            total = self.total if len(groups) == 1 else None
            told = [(one.line(self.waiting if one in last else 0, total), one.svg()) for one in groups]
        text = "\n".join(line for line, _ in told) or f"{self.waiting} on the way"
        self._show(text, "".join(f"<div>{html.escape(line)}</div>{picture}" for line, picture in told))


def _display() -> Callable[[str, str], None]:
    """Return what shows text and a picture: under the cell, or as lines on standard error."""
    shell = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
    if shell is None:
        return lambda text, _: print(text, file=sys.stderr)  # noqa: T201  # it is a program's terminal
    from IPython.display import display

    handle = display({"text/plain": ""}, raw=True, display_id=True)

    def show(text: str, picture: str) -> None:
        handle.update({"text/plain": text, "text/html": picture or f"<div>{html.escape(text)}</div>"}, raw=True)

    return show


def watch(runner: Any, total: int | None = None) -> Any:
    """Return a runner that does what ``runner`` does, and shows it under the cell.

    Args:
        runner: MetaSchedule's: ``RPCRunner``, ``LocalRunner`` or one of your own.
        total: Trials that there will be, if that is known.

    Raises:
        LocalProtocolError: TVM is not installed here.
        TypeError: ``runner`` is none.
    """
    if not callable(getattr(runner, "run", None)):
        raise TypeError(f"expected a runner of MetaSchedule, got {type(runner).__name__}")
    try:
        runners = importlib.import_module("tvm.s_tir.meta_schedule.runner")
        derived_object = importlib.import_module("tvm.ir.utils").derived_object
    except ImportError as error:
        raise LocalProtocolError(f"rpcnb.tvm.watch needs TVM here: pip install apache-tvm ({error})") from None
    shown = _Watch(total)

    class Watched(runners.PyRunner):  # type: ignore[misc,name-defined]  # TVM is untyped here
        """The runner, and who looks on."""

        def run(self, inputs: Any) -> list[Any]:
            inputs = [*inputs]
            shown.began(len(inputs))
            return [follow(future, one) for future, one in zip(runner.run(inputs), inputs, strict=True)]

    def follow(future: Any, given: Any) -> Any:
        label, told = _label(given), False

        def result() -> Any:
            nonlocal told
            found = future.result()
            if not told:
                told = True
                seconds = [float(one) for one in found.run_secs or ()]
                shown.ended(label, seconds, str(found.error_msg or ""))
            return found

        return runners.RunnerFuture(future.done, result)

    return derived_object(Watched)()


def _label(given: Any) -> str:
    """Name what a candidate takes: tells tasks of one tuning apart."""
    shapes = [f"{one.dtype}[{', '.join(map(str, one.shape))}]" for one in given.args_info if hasattr(one, "shape")]
    text = ", ".join(shapes) or "no arguments"
    return text if len(text) <= _MOST_LABEL else f"{text[: _MOST_LABEL - 3]}..."
