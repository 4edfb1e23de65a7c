"""rpcnb: drive remote devices from a notebook; Apache TVM's RPC, with an event-driven server.

::

    import rpcnb

    session = rpcnb.connect("board:9090")     # rpcnb's server or stock TVM's
    session.get_function("demo.add")(1, 2)

In Jupyter ``%load_ext rpcnb``, then ``%rpc_connect demo``.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

# name -> module that has it; imported on first use, so that `import rpcnb` loads neither numpy nor tornado
_PUBLIC = {
    "AsyncSession": "rpcnb.session.aio",
    "LocalServingSession": "rpcnb.runtime.local",
    "LocalSession": "rpcnb.session.local",
    "Module": "rpcnb.runtime.serving",
    "Proxy": "rpcnb.net.proxy",
    "Server": "rpcnb.net.server",
    "ServingSession": "rpcnb.runtime.serving",
    "Session": "rpcnb.session.session",
    "Tracker": "rpcnb.net.tracker",
    "TrackerSession": "rpcnb.session.tracker",
    "cancelled": "rpcnb.runtime.current",
    "connect": "rpcnb.session.opening",
    "connect_async": "rpcnb.session.opening",
    "connect_tracker": "rpcnb.session.tracker",
    "connect_tracker_async": "rpcnb.session.tracker",
    "create_event_driven_server": "rpcnb.runtime.eventdriven",
    "device": "rpcnb.values",
    "dtype": "rpcnb.values",
    "empty": "rpcnb.session.arrays",
    "get_global_func": "rpcnb.runtime.registry",
    "list_global_func_names": "rpcnb.runtime.registry",
    "panel": "rpcnb.jupyter.panels",
    "register_func": "rpcnb.runtime.registry",
    "remove_global_func": "rpcnb.runtime.registry",
    "serve": "rpcnb.jupyter.serving",
    "serve_blocking": "rpcnb.net.blocking",
    "tensor": "rpcnb.session.arrays",
    "workpath": "rpcnb.runtime.serving",
}

__all__ = ["__version__", "errors", "load_ipython_extension", *_PUBLIC]  # names of strings


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        value = getattr(importlib.import_module(_PUBLIC[name]), name)
    elif name in ("errors", "events", "values"):
        value = importlib.import_module(f"rpcnb.{name}")
    else:
        errors = importlib.import_module("rpcnb.errors")
        if name not in errors.__all__:
            raise AttributeError(f"module 'rpcnb' has no attribute {name!r}")
        value = getattr(errors, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    from rpcnb import errors

    return sorted({*__all__, *errors.__all__, "events", "values"})


def load_ipython_extension(shell: Any) -> None:
    """Register the magics: ``%load_ext rpcnb``."""
    from rpcnb.jupyter.extension import load

    load(shell)


def unload_ipython_extension(shell: Any) -> None:
    """Remove the magics: ``%unload_ext rpcnb``."""
    from rpcnb.jupyter.extension import unload

    unload(shell)
