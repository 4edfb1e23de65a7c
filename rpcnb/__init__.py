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

from rpcnb import parts

__version__ = "0.1.0"

# name -> module that has it; imported on first use, so that `import rpcnb` loads neither numpy nor tornado
_PUBLIC = {
    "AsyncSession": "rpcnb.client.aio",
    "Isolation": "rpcnb.server.isolation",
    "Limits": "rpcnb.protocol.codes",
    "Tls": "rpcnb.transport.tlsfiles",
    "LocalServingSession": "rpcnb.runtime.local",
    "LocalSession": "rpcnb.client.local",
    "Module": "rpcnb.runtime.served",
    "Proxy": "rpcnb.farm.proxy",
    "Server": "rpcnb.server.server",
    "ServingSession": "rpcnb.runtime.serving",
    "Session": "rpcnb.client.session",
    "Tracker": "rpcnb.farm.tracker",
    "TrackerSession": "rpcnb.farm.trackersession",
    "cancelled": "rpcnb.runtime.current",
    "connect": "rpcnb.client.opening",
    "connect_async": "rpcnb.client.opening",
    "connect_tracker": "rpcnb.farm.trackersession",
    "connect_tracker_async": "rpcnb.farm.trackersession",
    "create_event_driven_server": "rpcnb.runtime.eventdriven",
    "device": "rpcnb.values",
    "dtype": "rpcnb.values",
    "empty": "rpcnb.client.arrays",
    "get_global_func": "rpcnb.runtime.registry",
    "list_global_func_names": "rpcnb.runtime.registry",
    "panel": "rpcnb.jupyter.panels",
    "register_func": "rpcnb.runtime.registry",
    "remove_global_func": "rpcnb.runtime.registry",
    "serve": "rpcnb.jupyter.serving",
    "serve_blocking": "rpcnb.server.blocking",
    "tensor": "rpcnb.client.arrays",
    "workpath": "rpcnb.runtime.local",
}

# What earlier rooms find in later ones.
parts.offer("scheme tracker", "rpcnb.farm.dialer:TrackedDialer")
parts.offer("registration", "rpcnb.farm.registration:ServerRegistration")
parts.offer("dial out", "rpcnb.farm.dialout:DialOut")
parts.offer("panel", "rpcnb.jupyter.panels:panel")
parts.offer("load extension", "rpcnb.jupyter.extension:load")
parts.offer("unload extension", "rpcnb.jupyter.extension:unload")

__all__ = ["__version__", "errors", "load_ipython_extension", *_PUBLIC]  # names of strings


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        value = getattr(importlib.import_module(_PUBLIC[name]), name)
    elif name in ("errors", "events", "values"):
        value = importlib.import_module(f"rpcnb.{name}")
    elif name == "tvm":  # for scripts with TVM in them: rpcnb.tvm.watch
        value = importlib.import_module("rpcnb.jupyter.tuning")
    else:
        errors = importlib.import_module("rpcnb.errors")
        if name not in errors.__all__:
            raise AttributeError(f"module 'rpcnb' has no attribute {name!r}")
        value = getattr(errors, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    from rpcnb import errors

    return sorted({*__all__, *errors.__all__, "events", "tvm", "values"})


def load_ipython_extension(shell: Any) -> None:
    """Register the magics: ``%load_ext rpcnb``."""
    parts.find("load extension")(shell)


def unload_ipython_extension(shell: Any) -> None:
    """Remove the magics: ``%unload_ext rpcnb``."""
    parts.find("unload extension")(shell)
