"""Fuzzing: bytes that a peer may send, thrown at each part that reads them. See ``fuzz/README.md``."""

from __future__ import annotations

__all__ = ["TARGETS"]

TARGETS = ("client", "devices", "proxy", "records", "servant", "tracker", "websocket")
