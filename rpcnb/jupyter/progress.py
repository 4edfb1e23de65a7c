"""A compact line under a cell that waits for more than half a second: what it waits for, how far it is.

A thread looks five times a second at where the main thread is; what is called costs nothing more for that. In a
terminal the line is text on standard error. ``RPCNB_NONINTERACTIVE=1`` switches it off.
"""

from __future__ import annotations

import contextvars
import os
import sys
import threading
import time
from html import escape
from typing import TYPE_CHECKING, Any

from rpcnb.client.base import SessionBase, all_sessions
from rpcnb.client.pending import Pending
from rpcnb.client.remote import RemoteFunction
from rpcnb.client.transfers import Measured
from rpcnb.jupyter.statichtml import Html, show_bytes, show_span
from rpcnb.link import interrupt, link
from rpcnb.transport.terminal import printable

if TYPE_CHECKING:
    from types import FrameType

__all__ = ["ProgressLine", "describe_wait"]

_AFTER = 0.5  # seconds
_EVERY = 0.2
_CELLS = 20  # of a bar
_WAITING = (link.__file__, interrupt.__file__)


def describe_wait(frame: FrameType | None) -> tuple[int, str, float | None] | None:
    """Tell what a thread waits for in rpcnb.

    Args:
        frame: Its innermost frame.

    Returns:
        A number that is the same as long as it is the same wait, a text, and the share that is done, if known;
        None if it does not wait in rpcnb.
    """
    waits = False
    found: tuple[int, str, float | None] | None = None
    while frame is not None:
        where = frame.f_code.co_filename
        waits = waits or where.endswith(_WAITING)
        owner = frame.f_locals.get("self") if waits else None
        if isinstance(owner, Measured):
            share = owner.moved / owner.total if owner.total else None
            found = owner.id, _transfer_text(owner), share
        elif isinstance(owner, Pending):
            found = found or (owner.id, f"{owner.function} at {owner.session.peer}", None)
        elif isinstance(owner, RemoteFunction):
            found = found or (id(frame), f"{owner.name or 'a call'} at {owner.session.peer}", None)
        elif isinstance(owner, SessionBase) and isinstance(frame.f_locals.get("what"), str):
            found = found or (id(frame), f"{frame.f_locals['what']} at {owner.peer}", None)
        frame = frame.f_back
    return found


def _transfer_text(one: Any) -> str:
    total = f" of {show_bytes(one.total)}" if one.total else ""
    left = one.seconds_left
    rate = f", {show_bytes(one.rate)}/s" if one.rate else ""
    rest = f", {show_span(left)} left" if left is not None else ""
    return f"{'↑' if one.direction == 'up' else '↓'} {one.what}: {show_bytes(one.moved)}{total}{rate}{rest}"


class ProgressLine:
    """The line of the present cell.

    Args:
        shell: IPython's.
    """

    def __init__(self, shell: Any) -> None:
        self._shell = shell
        self._main = threading.main_thread().ident
        self._cell: contextvars.Context | None = None
        self._wake = threading.Event()
        self._thread: threading.Thread | None = None
        self._removed = False
        self._handle: Any = None
        self._shown = ""

    def install(self) -> None:
        """Look at every cell from now on."""
        self._shell.events.register("pre_run_cell", self._begin)
        self._shell.events.register("post_run_cell", self._end)

    def remove(self) -> None:
        """Look no more."""
        self._shell.events.unregister("pre_run_cell", self._begin)
        self._shell.events.unregister("post_run_cell", self._end)
        self._removed = True
        self._wake.set()
        if self._thread is not None:
            self._thread.join(1.0)

    def _begin(self, *_: Any) -> None:
        if os.environ.get("RPCNB_NONINTERACTIVE") == "1":
            return
        self._cell = contextvars.copy_context()  # output goes to the cell whose context this is
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="rpcnb-progress", daemon=True)
            self._thread.start()
        self._wake.set()

    def _end(self, *_: Any) -> None:
        self._cell = None

    def _run(self) -> None:
        while not self._removed:
            if self._cell is None or not all_sessions():
                self._clear(None)
                self._wake.wait(1.0 if self._cell is not None else None)
                self._wake.clear()
            self._look_at(self._cell)
            time.sleep(_EVERY)

    def _look_at(self, cell: contextvars.Context | None) -> None:
        """Look until the cell has ended."""
        number, since = 0, 0.0
        while cell is not None and cell is self._cell and not self._removed:
            found = describe_wait(sys._current_frames().get(self._main or 0))
            now = time.monotonic()
            if found is None or found[0] != number:
                self._clear(cell)
                number, since = (0, 0.0) if found is None else (found[0], now)
            elif now - since > _AFTER - _EVERY:
                cell.copy().run(self._show, found[1], found[2], now - since)
            time.sleep(_EVERY)
        self._clear(cell)

    def _show(self, text: str, share: float | None, seconds: float) -> None:
        full = (
            "" if share is None else f"{'█' * int(share * _CELLS)}{'░' * (_CELLS - int(share * _CELLS))} {share:4.0%} "
        )
        line = f"{full}{text}{'' if share is not None else f', {show_span(seconds)}'}"
        if getattr(self._shell, "kernel", None) is None:
            line = printable(line)
            sys.stderr.write(f"\r{line:{len(self._shown)}}")
            sys.stderr.flush()
        else:
            from IPython.display import display

            html = Html(f'<span style="opacity:.7;font-size:90%;white-space:pre">{escape(line)}</span>')
            if self._handle is None:
                self._handle = display(html, display_id=True)
            else:
                self._handle.update(html)
        self._shown = line

    def _clear(self, cell: contextvars.Context | None) -> None:
        if not self._shown:
            return
        if self._handle is None:
            sys.stderr.write(f"\r{'':{len(self._shown)}}\r")
            sys.stderr.flush()
        else:
            self._handle.update(Html(""))
        self._handle, self._shown = None, ""
