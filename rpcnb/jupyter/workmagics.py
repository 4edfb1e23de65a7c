"""Magics that work with a session: files there and back, and time evaluation at the board.

Their plain Python twins: ``session.upload``, ``session.download``, ``session.time_evaluator``.
"""

from __future__ import annotations

import ast
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from IPython.core.magic import Magics, line_magic, magics_class, no_var_expand
from IPython.core.magic_arguments import argument, magic_arguments, parse_argstring

from rpcnb.jupyter.magics import plain_errors, say
from rpcnb.jupyter.sessions import BOOK

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rpcnb.client.remote import RemoteModule, TimingResult

__all__ = ["WorkMagics", "histogram", "show_timing"]

_BLOCKS = "▁▂▃▄▅▆▇█"
_BINS = 24
_UNITS = ((1.0, "s"), (1e-3, "ms"), (1e-6, "us"), (1e-9, "ns"))


def histogram(values: Sequence[float]) -> str:
    """Return a line of blocks: how often values fall between the least and the largest."""
    low, high = min(values), max(values)
    if low == high:
        return _BLOCKS[-1]
    bins = min(_BINS, len(values))
    counts = [0] * bins
    for value in values:
        counts[min(bins - 1, int((value - low) / (high - low) * bins))] += 1
    most = max(counts)
    return "".join(" " if not count else _BLOCKS[(count * 7 + most - 1) // most] for count in counts)


def show_timing(name: str, timing: TimingResult, number: int) -> str:
    """Return a small table of what a time evaluator measured, and the histogram of its repeats."""
    scale, unit = next(((scale, unit) for scale, unit in _UNITS if timing.median >= scale), _UNITS[-1])
    figures = [(word, getattr(timing, word) / scale) for word in ("mean", "median", "min", "max", "std")]
    head = "  ".join(f"{word:>9}" for word, _ in figures)
    line = "  ".join(f"{value:9.4g}" for _, value in figures)
    low, high = figures[2][1], figures[3][1]
    return (
        f"{name}: {len(timing.results)} repeats of {number} calls, {unit} per call\n{head}\n{line}\n"
        f"{low:.4g} |{histogram(timing.results)}| {high:.4g}"
    )


def _show_size(nbytes: float) -> str:
    for unit in ("bytes", "KB", "MB"):
        if nbytes < 1000:
            return f"{nbytes:.3g} {unit}"
        nbytes /= 1000
    return f"{nbytes:.3g} GB"


@magics_class
class WorkMagics(Magics):  # type: ignore[misc]  # IPython is untyped here
    """Magics that work with a session."""

    NAMES = ("rpc_upload", "rpc_download", "rpc_timeit")

    @no_var_expand
    @line_magic
    @plain_errors
    @magic_arguments()
    @argument("files", nargs="+", metavar="FILE", help="local files")
    @argument("--to", help="name at the board, for one file")
    @argument("--session", help="name of the session; the current one by default")
    def rpc_upload(self, line: str) -> None:
        """Send files to the session's directory at the board."""
        options = parse_argstring(self.rpc_upload, line)
        if options.to and len(options.files) > 1:
            raise ValueError(f"--to names one file, got {len(options.files)}")
        session = BOOK.find(options.session)
        for file in map(Path, options.files):
            start = time.monotonic()
            target = options.to or file.name
            session.upload(file.expanduser(), target)
            say(
                f"uploaded {target}: {_show_size(file.expanduser().stat().st_size)} in {time.monotonic() - start:.2f} s"
            )

    @no_var_expand
    @line_magic
    @plain_errors
    @magic_arguments()
    @argument("files", nargs="+", metavar="FILE", help="files in the session's directory")
    @argument("--to", help="local file, for one file; or a folder that exists")
    @argument("--session", help="name of the session; the current one by default")
    def rpc_download(self, line: str) -> None:
        """Fetch files of the session's directory at the board."""
        options = parse_argstring(self.rpc_download, line)
        folder = Path(options.to or ".").expanduser()
        if options.to and len(options.files) > 1 and not folder.is_dir():
            raise ValueError(f"--to must be a folder that exists for {len(options.files)} files, got {options.to}")
        session = BOOK.find(options.session)
        for name in options.files:
            start = time.monotonic()
            target = folder / Path(name).name if folder.is_dir() else folder
            session.download(name, target)
            say(f"downloaded {target}: {_show_size(target.stat().st_size)} in {time.monotonic() - start:.2f} s")

    @no_var_expand
    @line_magic
    @plain_errors
    @magic_arguments()
    @argument("expression", nargs="+", help="a call: demo.matmul(x, y), or module['name'](x, y)")
    @argument("-n", "--number", type=int, default=10, help="calls per repeat")
    @argument("-r", "--repeat", type=int, default=5, help="repeats")
    @argument("-o", "--output", action="store_true", help="return the TimingResult")
    @argument("--session", help="name of the session; the current one by default")
    def rpc_timeit(self, line: str) -> TimingResult | None:
        """Measure a remote function at the board, so that the network does not count."""
        options = parse_argstring(self.rpc_timeit, line)
        session = BOOK.find(options.session)
        name, module, arguments = self._take_apart(" ".join(options.expression))
        evaluate = session.time_evaluator(
            name, session.cpu(), module=module, number=options.number, repeat=options.repeat
        )
        timing = evaluate(*arguments)
        say(show_timing(name, timing, options.number))
        return timing if options.output else None

    def _take_apart(self, source: str) -> tuple[str, RemoteModule | None, list[Any]]:
        """Return function, module and arguments of a call that the user has written; arguments are the user's own."""
        try:
            call = ast.parse(source, mode="eval").body
        except SyntaxError:
            call = None
        if not isinstance(call, ast.Call) or call.keywords:
            raise ValueError(f"expected a call such as demo.matmul(x, y), got {source}")
        arguments = [self.shell.ev(ast.unparse(argument)) for argument in call.args]
        function = call.func
        if isinstance(function, ast.Subscript) and isinstance(function.slice, ast.Constant):
            return str(function.slice.value), self.shell.ev(ast.unparse(function.value)), arguments
        name = ast.unparse(function)
        bound = self.shell.user_ns.get(name)
        return str(getattr(bound, "name", name)), None, arguments
