"""Reading what a server's well-known functions answer; a peer may send anything."""

from __future__ import annotations

import json
from typing import Any

from rpcnb.errors import RemoteProtocolError

__all__ = ["expect", "load_json"]


def load_json(data: Any) -> Any:
    """Read JSON that a server sent."""
    try:
        return json.loads(data)
    except (ValueError, TypeError, RecursionError) as odd:
        raise RemoteProtocolError(f"expected JSON, got {str(data)[:40]!r}: {odd}") from None


def expect(value: Any, kind: type | tuple[type, ...], what: str) -> Any:
    """Return a well-known function's result if it is what it should be; a peer may send anything."""
    if not isinstance(value, kind):
        raise RemoteProtocolError(f"expected {what}, got {type(value).__name__}")
    return value
