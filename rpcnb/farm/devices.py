"""A tracker's summary as tables, for terminals."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

from rpcnb.transport.address import show_address

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["device_rows", "show_devices"]


def show_devices(summary: dict[str, Any]) -> str:
    """Return a table of the servers and one of the queues.

    Args:
        summary: What :meth:`TrackerSession.summary` returned, of an rpcnb or a stock tracker.
    """
    boards = device_rows(summary)
    totals = Counter(row[1] for row in boards)
    queues = [
        (key, str(totals[key]), str(queue["free"]), str(queue["pending"]))
        for key, queue in sorted(summary["queue_info"].items())
    ]
    servers = _table(("server", "key", "state", "since", "holder", "limit"), boards) if boards else "no server"
    waiting = _table(("key", "total", "free", "waiting"), queues) if queues else "no queue"
    return f"{servers}\n\n{waiting}\n"


def device_rows(summary: dict[str, Any]) -> list[tuple[str, str, str, str, str, str]]:
    """Return address, key, state, age of the state, holders and time limit of every board, sorted by key."""
    states = {_where(board): board for board in summary.get("boards", [])}
    servers = sorted(summary["server_info"], key=lambda server: str(server.get("key")))
    return [
        (_where(server), str(server.get("key", "")).partition(":")[2], *_state(states.get(_where(server)), server))
        for server in servers
    ]


def _where(info: dict[str, Any]) -> str:
    address = info.get("addr")
    if isinstance(address, list) and len(address) == 2 and isinstance(address[1], int):
        return show_address(str(address[0]), address[1])
    return "?"


def _state(board: dict[str, Any] | None, server: dict[str, Any]) -> tuple[str, str, str, str]:
    """Return state, age, holders and time limit; as far as the tracker knows them."""
    told = (board or server).get("rpcnb") or {}
    sessions = told.get("sessions", []) if isinstance(told, dict) else []
    limits = ", ".join(f"{session['limit']:g} s" for session in sessions if session.get("limit"))
    if board is None:
        return ("busy" if sessions else "?", "", "", limits)
    holders = board["holders"]
    since = f"{max(holder['since'] for holder in holders):.0f} s" if holders else ""
    return board["state"], since, ", ".join(holder["name"] for holder in holders), limits


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    widths = [max(len(row[column]) for row in (head, *rows)) for column in range(len(head))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in (head, *rows)]
    return "\n".join(line.rstrip() for line in [lines[0], "  ".join("-" * width for width in widths), *lines[1:]])
