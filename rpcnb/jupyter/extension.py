"""``%load_ext rpcnb``: registers the magics, the displays, completion, the progress line and the wake-up descriptor."""

from __future__ import annotations

from typing import Any

from rpcnb.jupyter import displays
from rpcnb.jupyter.cellmagics import CellMagics
from rpcnb.jupyter.completion import matcher
from rpcnb.jupyter.jobmagics import JobMagics
from rpcnb.jupyter.magics import RpcMagics
from rpcnb.jupyter.progress import ProgressLine
from rpcnb.jupyter.wakeup import WakeUp
from rpcnb.jupyter.workmagics import WorkMagics

__all__ = ["load", "unload"]

_MAGICS = (RpcMagics, WorkMagics, CellMagics, JobMagics)
_wake_up = WakeUp()
_progress: ProgressLine | None = None
_matcher: Any = None


def load(shell: Any) -> None:
    """Register everything with an IPython shell; doing so again is harmless."""
    global _progress, _matcher
    unload(shell)
    for made in _MAGICS:
        shell.register_magics(made(shell))
    displays.register(shell)
    _wake_up.install()
    _progress = ProgressLine(shell)
    _progress.install()
    _matcher = matcher(shell)
    shell.Completer.custom_matchers.append(_matcher)


def unload(shell: Any) -> None:
    """Take everything back; sessions stay open."""
    global _progress, _matcher
    manager = shell.magics_manager
    for made in _MAGICS:
        for name in made.NAMES:
            for kind in ("line", "cell"):
                manager.magics[kind].pop(name, None)
        manager.registry.pop(made.__name__, None)
    displays.unregister(shell)
    _wake_up.remove()
    if _progress is not None:
        _progress.remove()
        _progress = None
    if _matcher in shell.Completer.custom_matchers:
        shell.Completer.custom_matchers.remove(_matcher)
    _matcher = None
