"""What a room finds by name because it stands in a later one: a URL scheme's dialler, a tracker's registration.

No room imports what stands after it (``docs/architecture.md``). ``rpcnb/__init__.py`` offers such parts here, as names
alone; one is loaded when somebody asks for it. A package of somebody else may offer a scheme of its own likewise.
"""

from __future__ import annotations

import importlib
from typing import Any

__all__ = ["find", "offer"]

_PARTS: dict[str, str] = {}


def offer(name: str, where: str) -> None:
    """Offer a part: ``offer("scheme tracker", "rpcnb.farm.dialer:TrackedDialer")``; a later offer replaces it."""
    _PARTS[name] = where


def find(name: str) -> Any:
    """Return the part that is offered under this name, loaded now if need be; None if there is none."""
    where = _PARTS.get(name)
    if where is None:
        return None
    module, _, attribute = where.partition(":")
    return getattr(importlib.import_module(module), attribute)
