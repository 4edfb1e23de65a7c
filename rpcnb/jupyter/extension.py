"""``%load_ext rpcnb``: registers the magics and the displays of sessions."""

from __future__ import annotations

from typing import Any

from rpcnb.jupyter import displays
from rpcnb.jupyter.magics import RpcMagics
from rpcnb.jupyter.workmagics import WorkMagics

__all__ = ["load", "unload"]

_MAGICS = (RpcMagics, WorkMagics)


def load(shell: Any) -> None:
    """Register everything with an IPython shell; doing so again is harmless."""
    unload(shell)
    for made in _MAGICS:
        shell.register_magics(made(shell))
    displays.register(shell)


def unload(shell: Any) -> None:
    """Take everything back; sessions stay open."""
    manager = shell.magics_manager
    for made in _MAGICS:
        for name in made.NAMES:
            manager.magics["line"].pop(name, None)
        manager.registry.pop(made.__name__, None)
    displays.unregister(shell)
