"""How rpcnb's objects look in a notebook: static HTML that survives nbconvert, escaped; registered, not built in."""

from __future__ import annotations

import time
from html import escape
from typing import TYPE_CHECKING, Any

from rpcnb.client.base import SessionBase
from rpcnb.client.pending import Pending
from rpcnb.client.remote import RemoteObject, TimingResult, _Function, _Module, _Tensor
from rpcnb.client.transfers import Transfer
from rpcnb.jupyter.statichtml import show_bytes, show_span
from rpcnb.server.server import Server

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["register", "session_html", "unregister"]

_GREEN, _BLUE, _ORANGE, _RED, _GREY = "#2e7d32", "#1565c0", "#ef6c00", "#c62828", "#757575"
_DOTS = {
    **dict.fromkeys(("ready", "done"), _GREEN),
    **dict.fromkeys(("busy", "running", "sent", "copying"), _BLUE),
    **dict.fromkeys(("draining", "unresponsive"), _ORANGE),
    **dict.fromkeys(("lost", "failed"), _RED),
    "closed": _GREY,
}


def _table(title: str, rows: list[tuple[str, str]], dot: str = "") -> str:
    mark = f'<span style="color:{dot}">&#9679;</span> ' if dot else ""
    cells = "".join(
        f'<tr><th style="text-align:left;padding-right:1em">{escape(name)}</th>'
        f'<td style="text-align:left">{escape(value)}</td></tr>'
        for name, value in rows
    )
    return f"<div><div>{mark}<b>{escape(title)}</b></div><table>{cells}</table></div>"


def session_html(session: SessionBase) -> str:
    """Return a session's name, peer and state."""
    kind = "rpcnb" if session.is_rpcnb else "stock TVM (no listing of files, no remote tracebacks)"
    rows = [("peer", session.peer), ("key", session.server_key or "(none)"), ("server", kind), ("state", session.state)]
    return _table(session.name, rows, _DOTS.get(session.state, ""))


def _tensor_html(tensor: _Tensor) -> str:
    rows = [("shape", str(tensor.shape)), ("dtype", str(tensor.dtype)), ("device", repr(tensor.device))]
    return _table(type(tensor).__name__, [*rows, ("size", f"{tensor.nbytes} bytes, not fetched")])


def _function_html(function: _Function) -> str:
    return _table(function.name or "remote function", [("session", function.session.name)])


def _timing_html(result: TimingResult) -> str:
    rows = [(name, f"{getattr(result, name):.4g} s") for name in ("mean", "median", "min", "max", "std")]
    return _table("time per call", [*rows, ("repeats", str(len(result.results)))])


def _server_html(server: Server) -> str:
    token = "needed" if server.token else "none"
    rows = [("address", server.address), ("key", server.key or "(none)"), ("token", token)]
    return _table(server.name, [*rows, ("sessions", str(server.sessions))])


def _pending_html(pending: Pending) -> str:
    rows = [("session", pending.session.name), ("state", pending.state)]
    title = pending.function
    if isinstance(pending, Transfer):
        title = f"{'↑' if pending.direction == 'up' else '↓'} {pending.what}"
        total = f" of {show_bytes(pending.total)}" if pending.total else ""
        rows.append(("moved", f"{show_bytes(pending.moved)}{total}"))
    rows.append(("time", show_span((pending.finished or time.monotonic()) - pending.submitted)))
    return _table(title or "operation", rows, _DOTS.get(pending.state, ""))


def _object_html(thing: _Module | RemoteObject) -> str:
    return _table(type(thing).__name__, [("session", thing.session.name)])


_FORMS: tuple[tuple[type, Callable[[Any], str]], ...] = (
    (SessionBase, session_html),
    (_Tensor, _tensor_html),
    (_Function, _function_html),
    (TimingResult, _timing_html),
    (Pending, _pending_html),
    (_Module, _object_html),
    (RemoteObject, _object_html),
    (Server, _server_html),
)


def register(shell: Any) -> None:
    """Teach the shell's HTML formatter our types; text stays ``repr``."""
    formatter = shell.display_formatter.formatters["text/html"]
    for kind, form in _FORMS:
        formatter.for_type(kind, form)


def unregister(shell: Any) -> None:
    """Take them back."""
    formatter = shell.display_formatter.formatters["text/html"]
    for kind, _ in _FORMS:
        formatter.type_printers.pop(kind, None)
