"""The panel's widget: one anywidget with one JSON snapshot; imported only where anywidget is installed."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import anywidget
import traitlets

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["PanelWidget"]

_STATIC = Path(__file__).parent / "static"


class PanelWidget(anywidget.AnyWidget):  # type: ignore[misc]  # anywidget is untyped here
    """Draws snapshots; a DOMWidget, so it nests in an ``HBox``."""

    _esm = _STATIC / "panel.js"
    _css = _STATIC / "panel.css"
    snapshot = traitlets.Dict().tag(sync=True)

    def __init__(self, on_message: Callable[[dict[str, Any]], object], static_html: Callable[[], str]) -> None:
        super().__init__(layout={"width": "100%", "min_width": "0"})  # also in a box, where width is shared
        self._static_html = static_html
        self.on_msg(lambda _, message, __: on_message(message) if isinstance(message, dict) else None)
        _answer_in_subshell(self.comm)

    def _repr_mimebundle_(self, **options: Any) -> Any:
        """Add static HTML for where no widget can be drawn: GitHub, nbconvert."""
        bundle = super()._repr_mimebundle_(**options)
        data, metadata = bundle if isinstance(bundle, tuple) else (bundle, {})
        return {**(data or {}), "text/plain": repr(self), "text/html": self._static_html()}, metadata

    def __repr__(self) -> str:
        return "<rpcnb panel>"


def _answer_in_subshell(comm: Any) -> None:
    """Let clicks arrive while a cell blocks, also on ipykernel 7.4.

    It sends a comm's messages to the loop that last sent on it: for a widget made in a cell the main one, which is
    blocked. Elsewhere the attribute is absent, and nothing is to be done.
    """
    if hasattr(comm, "_reply_subshell_for"):
        comm._reply_subshell_for = lambda data, default: default
