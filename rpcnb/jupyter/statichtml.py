"""Snapshots as static HTML and as text: where no widget can be drawn, and what a saved notebook shows."""

from __future__ import annotations

from html import escape
from typing import Any

__all__ = ["Html", "show_bytes", "show_html", "show_span", "show_text"]

_TITLES = (
    ("transfers", "Transfers"),
    ("pending", "Pending"),
    ("jobs", "Jobs"),
    ("sessions", "Sessions"),
    ("devices", "Devices"),
    ("servers", "Server"),
)
_HINT = "no session is open; connect with %rpc_connect HOST:PORT or %rpc_connect demo"


def show_bytes(nbytes: float) -> str:
    """Return a size for people."""
    for unit in ("B", "KB", "MB", "GB"):
        if nbytes < 1000:
            return f"{nbytes:.3g} {unit}"
        nbytes /= 1000
    return f"{nbytes:.3g} TB"


def show_span(seconds: float) -> str:
    """Return a duration for people."""
    if seconds < 10:
        return f"{max(0.0, seconds):.1f} s"
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _transfer(row: dict[str, Any], now: float) -> tuple[str, ...]:
    size = f"{show_bytes(row['moved'])} of {show_bytes(row['total'])}" if row["total"] else show_bytes(row["moved"])
    rate = f"{show_bytes(row['rate'])}/s" if row.get("rate") else ""
    arrow = "↑" if row["way"] == "up" else "↓"
    return f"{arrow} {row['what']}", row["session"], size, rate, row["state"], row.get("error", "")


def _operation(row: dict[str, Any], now: float) -> tuple[str, ...]:
    age = show_span(row.get("ended", now) - row["since"])
    waits = f"waits for {row['waits']}" if row["waits"] else ""
    return row["function"], row["session"], row["state"], age, waits


def _job(row: dict[str, Any], now: float) -> tuple[str, ...]:
    age = show_span((row["ended"] or now) - row["since"])
    printed = f"{show_bytes(row['output'])} printed"
    return row["name"], row["session"], row["state"], age, row["function"], printed, row.get("error", "")


def _session(row: dict[str, Any], now: float) -> tuple[str, ...]:
    peer = f"{row['peer']}, key {row['key']}" if row["key"] else row["peer"]
    traffic = f"↑ {show_bytes(row['sent'])}, ↓ {show_bytes(row['received'])}"
    limit = f"ends in {show_span(row['expires'] - now)}" if "expires" in row else row.get("error", "")
    return row["name"], peer, row["kind"], row["state"], traffic, f"{show_bytes(row['held'])} held", limit


def _device(row: dict[str, Any], now: float) -> tuple[str, ...]:
    return tuple(str(row.get(name, "")) for name in ("tracker", "board", "key", "state", "since", "holder", "limit"))


def _server(row: dict[str, Any], now: float) -> tuple[str, ...]:
    key = f"key {row['key']}" if row["key"] else ""
    clients = "; ".join(f"{one['peer']} {one['state']} {one['function']}".rstrip() for one in row["clients"])
    busy = "the kernel is busy with a cell" if "busy" in row else ""
    return row["address"], key, f"{row['functions']} functions", clients or "no client", busy


_ROWS = {
    "transfers": _transfer,
    "pending": _operation,
    "jobs": _job,
    "sessions": _session,
    "devices": _device,
    "servers": _server,
}


def _sections(snapshot: dict[str, Any], now: float) -> list[tuple[str, list[tuple[str, ...]], int]]:
    shown = snapshot.get("sections", [name for name, _ in _TITLES])
    return [
        (title, [_ROWS[name](row, now) for row in found["rows"]], found["more"])
        for name, title in _TITLES
        if name in shown and (found := snapshot[name])["rows"]
    ]


def _empty(snapshot: dict[str, Any]) -> str:
    """Say that there is nothing to show, and what to do if there is no session."""
    return _HINT if "sessions" in snapshot.get("sections", ("sessions",)) else "nothing to show"


def show_text(snapshot: dict[str, Any], now: float) -> str:
    """Return a snapshot as text."""
    lines = []
    for title, rows, more in _sections(snapshot, now):
        lines.append(title)
        lines += ["  " + "  ".join(cell for cell in row if cell) for row in rows]
        if more:
            lines.append(f"  and {more} more")
    return "\n".join(lines) or _empty(snapshot)


def show_html(snapshot: dict[str, Any], now: float, note: str = "") -> str:
    """Return a snapshot as tables that need nothing: no script, no style sheet."""
    parts = []
    for title, rows, more in _sections(snapshot, now):
        body = "".join(
            "<tr>" + "".join(f'<td style="text-align:left">{escape(cell)}</td>' for cell in row) + "</tr>"
            for row in rows
        )
        rest = f"<div>and {more} more</div>" if more else ""
        parts.append(f"<div><b>{title}</b></div><table>{body}</table>{rest}")
    if not parts:
        parts.append(f"<div>{escape(_empty(snapshot))}</div>")
    if note:
        parts.append(f"<div><i>{escape(note)}</i></div>")
    return f"<div>{''.join(parts)}</div>"


class Html:
    """HTML whose text is empty, so that nothing is left where only text is shown."""

    def __init__(self, html: str) -> None:
        self._html = html

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, str]:
        return {"text/plain": "", "text/html": self._html}

    def __repr__(self) -> str:
        return ""
