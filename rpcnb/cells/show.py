"""How values of remote cells are shown: IPython's rich representations where it is installed, text elsewhere."""

from __future__ import annotations

import contextlib
import io
import os
import sys
import threading
from functools import cache
from typing import TYPE_CHECKING, Any

from rpcnb.cells.output import CellOutput, current_output

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["Shown", "display", "figures_shown", "mime_bundle", "prepare_display"]


_prepared = threading.local()


def prepare_display() -> None:
    """Let ``IPython.display.display`` and matplotlib's figures of this thread go to the running cell."""
    if getattr(_prepared, "done", False):
        return
    _prepared.done = True
    os.environ.setdefault("MPLBACKEND", "Agg")  # a device has no screen
    publisher = getattr(_shell(), "display_pub", None)
    if publisher is not None and hasattr(publisher, "register_hook"):
        publisher.register_hook(_take_message)  # ipykernel's, for this thread
    elif publisher is not None:
        publish = publisher.publish
        publisher.publish = lambda *args, **options: _take(*args, **options) or publish(*args, **options)


@cache
def _shell() -> Any:
    """Return IPython's shell, in which ``display`` looks for its publisher: the kernel's, or a bare one of our own."""
    try:
        from IPython.core.interactiveshell import InteractiveShell
        from traitlets.config import Config
    except ImportError:
        return None
    config = Config()
    config.HistoryManager.enabled = False
    if InteractiveShell.initialized():
        return InteractiveShell.instance()
    hook, except_hook = sys.displayhook, sys.excepthook
    shell = InteractiveShell.instance(config=config)
    shell.is_bare = True  # no notebook: nobody's cells run in it
    sys.displayhook, sys.excepthook = hook, except_hook
    return shell


def _take(data: dict[str, Any], metadata: dict[str, Any] | None = None, **_: Any) -> bool:
    """Take what is displayed while a cell runs here."""
    output = current_output()
    if output is not None:
        output.show(data, metadata or {})
    return output is not None


def _take_message(message: dict[str, Any]) -> dict[str, Any] | None:
    """Take what ipykernel would send to its own front end, while a cell runs in this thread."""
    output = current_output()
    if output is None or message["header"]["msg_type"] not in ("display_data", "update_display_data"):
        return message
    output.show(message["content"]["data"], message["content"]["metadata"])
    return None


@cache
def _formatter() -> Any:
    try:
        from IPython.core.formatters import DisplayFormatter
    except ImportError:
        return None
    formatter = DisplayFormatter()
    formatter.formatters["image/png"].for_type_by_name("matplotlib.figure", "Figure", _picture)
    return formatter


def _picture(figure: Any) -> bytes:
    file = io.BytesIO()
    figure.savefig(file, format="png", bbox_inches="tight")
    return file.getvalue()


def mime_bundle(value: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the representations of a value, and their metadata; none for None."""
    if value is None:
        return {}, {}
    formatter = _formatter()
    if formatter is None:
        return {"text/plain": repr(value)}, {}
    data, metadata = formatter.format(value)
    return dict(data), dict(metadata)


def display(*values: Any) -> None:
    """Show values under the cell, with their rich representations."""
    for value in values:
        _take(*mime_bundle(value))


class Shown:
    """What a cell shows by itself.

    Attributes:
        value: The value of its last expression.
    """

    value: Any = None


@contextlib.contextmanager
def figures_shown(output: CellOutput) -> Iterator[Shown]:
    """Show the figures that are drawn meanwhile, as notebooks do, but the value itself once only."""
    before = _figures()
    shown = Shown()
    try:
        yield shown
        for number in _figures():
            figure = sys.modules["matplotlib.pyplot"].figure(number)
            if number not in before and figure is not shown.value:
                output.show(*mime_bundle(figure))
    finally:
        for number in _figures():
            if number not in before:
                sys.modules["matplotlib.pyplot"].close(number)


def _figures() -> list[int]:
    plt = sys.modules.get("matplotlib.pyplot")
    return [] if plt is None else list(plt.get_fignums())
