"""``%load_ext rpcnb``: registers the magics and the displays of sessions."""

from __future__ import annotations

from typing import Any

from rpcnb.jupyter import displays
from rpcnb.jupyter.magics import RpcMagics

__all__ = ["load", "unload"]


def load(shell: Any) -> None:
    """Register everything with an IPython shell; doing so again is harmless."""
    unload(shell)
    shell.register_magics(RpcMagics(shell))
    displays.register(shell)


def unload(shell: Any) -> None:
    """Take everything back; sessions stay open."""
    manager = shell.magics_manager
    for name in RpcMagics.NAMES:
        manager.magics["line"].pop(name, None)
    manager.registry.pop("RpcMagics", None)
    displays.unregister(shell)
