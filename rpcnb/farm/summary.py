"""A tracker's summary: cut to the size of a frame where it is made, and read with care where it arrives.

What boards and clients say of themselves is a stranger's: one that says nonsense, or very much, must not hide others.
"""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = ["cut_summary", "is_plain", "read_port", "read_summary", "read_told"]

_FRAME = (1 << 20) - 4096  # bytes; a frame may have 1 MiB, some of it around what is counted here
_BETWEEN = ", "  # entries, as Python's json writes it
_LEVELS = 16  # of nested lists and dicts
_SMALL = 512  # bytes: shorter entries are not preferred to each other
_TEXT = 256  # letters of a name
_SESSIONS = 64  # of one board
_LARGEST = 1 << 53  # a number that every JSON reader takes


def is_plain(value: Any, levels: int = _LEVELS) -> bool:
    """Tell whether every JSON reader can read this value again: numbers are finite, and it is not deep."""
    if type(value) is float:
        return math.isfinite(value)
    if type(value) not in (dict, list):
        return True
    inner = value.values() if type(value) is dict else value
    return levels > 0 and all(is_plain(one, levels - 1) for one in inner)


# -- where it is made ----------------------------------------------------------------------------------------------


def cut_summary(queues: Iterable[tuple[int, str]], servers: Iterable[str], boards: Iterable[str] | None) -> str:
    """Return a summary as JSON that fits into a frame: of each part what is short goes before what is long.

    Args:
        queues: Rank and JSON of each, as it stands in an object. The rank is how many keys whoever uses it had before:
            many keys of one connection go last.
        servers: JSON of each.
        boards: Likewise; None for stock's clients.

    Returns:
        JSON; with ``left_out``, how many of each part there are besides, if there are any.
    """
    left_out: dict[str, int] = {}
    served, left_out["server_info"] = _fit(sorted(servers, key=_size), _FRAME * (2 if boards is not None else 3) // 4)
    room = _FRAME - len(served)
    in_order = (text for _, text in sorted(queues, key=lambda queue: (queue[0], _size(queue[1]))))
    queued, left_out["queue_info"] = _fit(in_order, room // (2 if boards is not None else 1))
    parts = {"queue_info": f"{{{queued}}}", "server_info": f"[{served}]"}
    if boards is not None:
        told, left_out["boards"] = _fit(sorted(boards, key=_size), room - len(queued))
        parts["boards"] = f"[{told}]"
    if any(left_out.values()):
        parts["left_out"] = json.dumps({name: count for name, count in left_out.items() if count})
    return "{" + ", ".join(f'"{name}": {text}' for name, text in parts.items()) + "}"


def _size(text: str) -> int:
    return max(len(text), _SMALL)


def _fit(entries: Iterable[str], room: int) -> tuple[str, int]:
    """Return the entries that fit into ``room`` bytes, and how many do not."""
    fitting, left_out = [], 0
    for entry in entries:
        if len(entry) + len(_BETWEEN) <= room:
            room -= len(entry) + len(_BETWEEN)
            fitting.append(entry)
        else:
            left_out += 1
    return _BETWEEN.join(fitting), left_out


# -- where it arrives ----------------------------------------------------------------------------------------------


def read_summary(value: Any) -> dict[str, Any]:
    """Return a tracker's summary in the shape of :meth:`TrackerSession.summary`, without what is not of it."""
    value = value if type(value) is dict else {}
    summary: dict[str, Any] = {
        "queue_info": {
            key: {"free": _count(one.get("free")), "pending": _count(one.get("pending"))}
            for key, one in _dict(value.get("queue_info")).items()
            if type(one) is dict
        },
        "server_info": [_read_server(one) for one in _dicts(value.get("server_info"))],
    }
    if "boards" in value:
        summary["boards"] = [_read_board(one) for one in _dicts(value["boards"])]
    if "left_out" in value:
        summary["left_out"] = {name: _count(number) for name, number in _dict(value["left_out"]).items()}
    return summary


def _read_server(server: dict[str, Any]) -> dict[str, Any]:
    told = read_told(server.get("rpcnb"))
    found = {"key": _text(server.get("key")), "addr": _read_address(server.get("addr"))}
    return found if told is None else {**found, "rpcnb": told}


def _read_board(board: dict[str, Any]) -> dict[str, Any]:
    keys = board.get("key")
    return {
        "key": [one for one in keys if type(one) is str] if type(keys) is list else [],
        "addr": _read_address(board.get("addr")),
        "state": _text(board.get("state")),
        "free": _count(board.get("free")),
        "holders": [
            {"name": _text(one.get("name")), "key": _text(one.get("key")), "since": _seconds(one.get("since")) or 0.0}
            for one in _dicts(board.get("holders"))
        ],
        "rpcnb": read_told(board.get("rpcnb")),
    }


def read_told(value: Any) -> dict[str, Any] | None:
    """Return what an rpcnb server says of itself, as far as it is of the known shape; None if it says nothing."""
    if type(value) is not dict:
        return None
    told: dict[str, Any] = {}
    if type(value.get("instance")) is str:
        told["instance"] = value["instance"][:_TEXT]
    if type(value.get("token")) is bool:
        told["token"] = value["token"]
    if "sessions" in value:
        told["sessions"] = [
            {"peer": _text(one.get("peer"))[:_TEXT], "limit": _seconds(one.get("limit"))}
            for one in _dicts(value["sessions"])[:_SESSIONS]
        ]
    for name in ("draining", "jobs"):
        if type(value.get(name)) is list:
            told[name] = [_text(one)[:_TEXT] for one in value[name][:_SESSIONS]]
    return told


def read_port(value: Any) -> int:
    """Return a port; C++ boards of TVM send theirs as text.

    Raises:
        ValueError: It is not one.
    """
    if type(value) is str and value.isascii() and value.isdecimal() and len(value) <= 5:
        value = int(value)
    if type(value) is not int or not 0 <= value < 65536:
        raise ValueError(f"expected a port of 0 to 65535, got {value!r}")
    return value


def _read_address(value: Any) -> list[Any] | None:
    if type(value) is not list or len(value) != 2 or type(value[0]) is not str:
        return None
    try:
        return [value[0], read_port(value[1])]
    except ValueError:
        return None


def _dict(value: Any) -> dict[str, Any]:
    return value if type(value) is dict else {}


def _dicts(value: Any) -> list[dict[str, Any]]:
    return [one for one in value if type(one) is dict] if type(value) is list else []


def _text(value: Any) -> str:
    return value if type(value) is str else ""


def _count(value: Any) -> int:
    return value if type(value) is int and 0 <= value < _LARGEST else 0


def _seconds(value: Any) -> float | None:
    return value if type(value) in (int, float) and 0 <= value < _LARGEST else None
