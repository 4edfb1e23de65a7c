"""A tracker's summary as tables, for terminals. What strangers say of themselves is shown, and does nothing."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

from rpcnb.farm.summary import read_summary
from rpcnb.transport.address import show_address

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["device_rows", "show_as_stock", "show_devices"]

_CELL = 80  # letters
_PARTS = {"server_info": "servers", "boards": "states of servers", "queue_info": "keys"}


def show_devices(summary: Any) -> str:
    """Return a table of the servers and one of the queues.

    Args:
        summary: What :meth:`TrackerSession.summary` returned, of an rpcnb or a stock tracker.
    """
    summary = read_summary(summary)
    boards = device_rows(summary)
    totals = Counter(_served(server) for server in summary["server_info"])
    queues = [
        (_visible(key), str(totals[key]), str(queue["free"]), str(queue["pending"]))
        for key, queue in sorted(summary["queue_info"].items())
    ]
    servers = _table(("server", "key", "state", "since", "holder", "limit"), boards) if boards else "no server"
    waiting = _table(("key", "total", "free", "waiting"), queues) if queues else "no queue"
    left_out = summary.get("left_out", {})
    more = ", ".join(f"{left_out[name]} {what}" for name, what in _PARTS.items() if left_out.get(name))
    return f"{servers}\n\n{waiting}\n" + (f"\nleft out, as they are too many: {more}\n" if more else "")


def show_as_stock(address: str, summary: Any) -> str:
    """Return what ``python -m tvm.exec.query_rpc_tracker`` prints, letter by letter, for scripts that read that.

    Args:
        address: ``host:port`` of the tracker.
        summary: What :meth:`TrackerSession.summary` returned.
    """
    summary = read_summary(summary)
    servers = sorted(summary["server_info"], key=lambda server: server["key"])
    totals = Counter(_served(server).partition(":")[0] for server in servers)
    line = "-" * 30
    told = [f"{_visible(_where(server)):21}    {_visible(server['key'])}" for server in servers]
    queues = sorted(summary["queue_info"].items())
    width = max((len(_visible(key)) for key, _ in queues), default=0)
    title = f"{'key':{width}}   total  free  pending"
    rows = [
        f"{_visible(key):{width}}   {totals[key]:<5d}  {queue['free']:<4d}  {queue['pending']:<7d}"
        for key, queue in queues
        if totals[key] or queue["pending"]
    ]
    rule = "-" * (len(title) + 1)
    lines = [
        *(f"Tracker address {address}", "", "Server List", line, "server-address           key", line, *told, line),
        *("", "Queue Status", rule, title, rule, *rows, rule, ""),
    ]
    return "\n".join(lines) + "\n"


def device_rows(summary: Any) -> list[tuple[str, str, str, str, str, str]]:
    """Return address, key, state, age of the state, holders and time limit of every board, sorted by key."""
    summary = read_summary(summary)
    states = {_where(board): board for board in summary.get("boards", [])}
    rows = [
        (_where(server), _served(server), *_state(states.get(_where(server)), server))
        for server in sorted(summary["server_info"], key=lambda server: server["key"])
    ]
    return [tuple(map(_visible, row)) for row in rows]  # type: ignore[misc]  # six as before


def _served(server: dict[str, Any]) -> str:
    """Return the key that a server serves: what it says is ``server:KEY``."""
    key: str = server["key"]
    return key.partition(":")[2]


def _where(info: dict[str, Any]) -> str:
    return "?" if info["addr"] is None else show_address(*info["addr"])


def _state(board: dict[str, Any] | None, server: dict[str, Any]) -> tuple[str, str, str, str]:
    """Return state, age, holders and time limit; as far as the tracker knows them."""
    told = (board or server).get("rpcnb") or {}
    sessions = told.get("sessions", [])
    jobs = [f"job {name}" for name in told.get("jobs", [])]
    limits = ", ".join(f"{session['limit']:g} s" for session in sessions if session["limit"])
    if board is None:
        state = "draining" if told.get("draining") else "busy" if sessions or jobs else "?"
        return (state, "", ", ".join(jobs), limits)
    holders = board["holders"]
    since = f"{max(holder['since'] for holder in holders):.0f} s" if holders else ""
    return board["state"], since, ", ".join([*(holder["name"] for holder in holders), *jobs]), limits


def _visible(text: str) -> str:
    """Return ``text`` with its control characters written out, and not too long for a cell."""
    shown = text[: _CELL + 1]
    if not shown.isprintable():
        shown = "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in shown)
    return shown if len(shown) <= _CELL else f"{shown[: _CELL - 3]}..."


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    widths = [max(len(row[column]) for row in (head, *rows)) for column in range(len(head))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in (head, *rows)]
    return "\n".join(line.rstrip() for line in [lines[0], "  ".join("-" * width for width in widths), *lines[1:]])
