"""The panels: ``%rpc_panel``, :func:`panel`, ``session.panel()``, ``pending.panel()``, ``server.panel()``.

A panel is a widget where the front end can draw it. If it does not answer within three seconds (anywidget is missing
in JupyterLab's environment), static HTML that is updated takes over, with one line of remedy; in a terminal, and with
``RPCNB_NONINTERACTIVE=1``, a panel is what it shows at that moment.
"""

from __future__ import annotations

import os
import sys
import time
from typing import TYPE_CHECKING, Any

from rpcnb.jupyter.actions import act
from rpcnb.jupyter.bridge import BRIDGE
from rpcnb.jupyter.facts import Scope
from rpcnb.jupyter.statichtml import Html, show_html, show_text

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rpcnb.client.base import SessionBase
    from rpcnb.server.server import Server

__all__ = ["SECTIONS", "Panel", "panel"]

SECTIONS = ("transfers", "pending", "jobs", "sessions", "devices", "servers")
_ANSWER_WITHIN = 3.0  # seconds
_HTML_EVERY = 0.5  # seconds between two updates of static HTML
_OLD_KERNEL = "while a cell runs, use the stop button: clicks reach this kernel between cells only"
_NO_WIDGET = (
    "the live panel needs anywidget where JupyterLab runs: pip install anywidget there, then reload the page; "
    "this table is updated meanwhile"
)


def _kernel() -> Any:
    """Return the notebook's kernel; None in a terminal or script."""
    ipython = sys.modules.get("IPython")
    shell = None if ipython is None else ipython.get_ipython()
    return getattr(shell, "kernel", None)


def _clicks_arrive(kernel: Any) -> bool:
    """Tell whether clicks reach the kernel while a cell blocks: ipykernel 7 has subshells."""
    return bool(getattr(kernel, "_supports_kernel_subshells", False))


class Panel:
    """A live view of what goes on; display it, or leave it as a cell's last expression.

    Args:
        scope: What it is about.
        sections: Which sections it has.

    Attributes:
        widget: The widget, to be nested in others; None where there is none.
    """

    def __init__(self, scope: Scope, sections: Sequence[str]) -> None:
        self.scope = scope
        self._sections = list(sections)
        self._answered = False
        self._views = 0
        self._closed = False
        self._html: Any = None  # the display that is updated, once it has taken over
        self._html_at = 0.0
        self._shown_at: float | None = None
        kernel = _kernel()
        self._live = kernel is not None and os.environ.get("RPCNB_NONINTERACTIVE") != "1"
        self._note = "" if not self._live or _clicks_arrive(kernel) else _OLD_KERNEL
        self.widget: Any = None
        if self._live:
            try:
                from rpcnb.jupyter.widget import PanelWidget
            except ImportError:
                self._note = _NO_WIDGET
            else:
                self.widget = PanelWidget(self._on_message, self.static_html)
                self.widget.snapshot = {**self.snapshot(), "now": time.time()}
                BRIDGE.add(self)

    def snapshot(self) -> dict[str, Any]:
        """Return what it shows now, as data."""
        return self._dress(BRIDGE.snapshot(self.scope))

    def _dress(self, snapshot: dict[str, Any]) -> dict[str, Any]:
        return {**snapshot, "sections": self._sections, "note": self._note}

    def static_html(self) -> str:
        """Return what it shows now as HTML that needs nothing."""
        return show_html(self.snapshot(), time.time())

    # -- the bridge's view -------------------------------------------------------------------------------------------

    def show(self, snapshot: dict[str, Any]) -> bool:
        """Show a snapshot; in the bridge's thread."""
        if self._closed:
            return False
        if self.widget is not None:
            self.widget.snapshot = self._dress(snapshot)
        return True

    def tick(self, now: float) -> None:
        """Look whether the front end has answered; in the bridge's thread, ten times a second."""
        if self._answered or self._html is None or self._shown_at is None or now - self._shown_at < _ANSWER_WITHIN:
            return
        if now - self._html_at >= _HTML_EVERY:
            self._html_at = now
            self._html.update(Html(show_html(self.snapshot(), time.time(), _NO_WIDGET)))

    def _on_message(self, message: dict[str, Any]) -> None:
        if message.get("op") == "hello":
            if not self._answered and self._html is not None and self._html_at:
                self._html.update(Html(""))
            self._answered = True
            self._views += 1
            if self._views == 1 and not self._closed:
                BRIDGE.add(self)
        elif message.get("op") == "bye":
            self._views = max(0, self._views - 1)
            if not self._views:  # the cell has run again, or its output was cleared: nobody looks
                BRIDGE.remove(self)
        else:
            act(message)

    def close(self) -> None:
        """End it; what it has shown stays."""
        self._closed = True
        BRIDGE.remove(self)
        if self.widget is not None:
            self.widget.close()

    # -- display -----------------------------------------------------------------------------------------------------

    def _ipython_display_(self) -> None:
        from IPython.display import display

        if not self._live:
            if "devices" in self._sections or "jobs" in self._sections:
                BRIDGE.ask_now()
            display({"text/plain": show_text(self.snapshot(), time.time()), "text/html": self.static_html()}, raw=True)
            return
        if self.widget is not None:
            display(self.widget)
        self._html = display(Html(""), display_id=True)
        self._shown_at = time.monotonic()
        if self.widget is None:
            BRIDGE.add(self)
            self._shown_at -= _ANSWER_WITHIN

    def __repr__(self) -> str:
        return "<rpcnb panel>"


def panel(
    *sections: str,
    session: SessionBase | None = None,
    pending: Any = None,
    server: Server | None = None,
) -> Panel:
    """Return a live view of sessions, pending calls, transfers, jobs, farm devices and this kernel's server.

    It goes on while a cell blocks. Every section stands alone: ``rpcnb.panel("transfers")``.

    Args:
        sections: Of ``transfers``, ``pending``, ``jobs``, ``sessions``, ``devices``, ``servers``; all by default.
        session: Only this session and its operations.
        pending: Only this operation.
        server: Only this server.

    Raises:
        ValueError: There is no such section.
    """
    for name in sections:
        if name not in SECTIONS:
            raise ValueError(f"expected sections of {', '.join(SECTIONS)}, got {name!r}")
    return Panel(Scope(session, pending, server), sections or SECTIONS)
