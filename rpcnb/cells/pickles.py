"""Pickled objects, for peers that have said that they trust each other; the one module of rpcnb that unpickles."""

from __future__ import annotations

from typing import Any

from rpcnb.errors import RpcError

__all__ = ["pickled", "unpickled"]


def pickled(value: Any) -> bytes:
    """Pickle an object."""
    data: bytes = _cloudpickle().dumps(value)
    return data


def unpickled(data: bytes) -> Any:
    """Read a pickle, which may run any code: only where the sender is trusted."""
    return _cloudpickle().loads(data)


def _cloudpickle() -> Any:
    try:
        import cloudpickle
    except ImportError:
        raise RpcError('pickled objects need cloudpickle: pip install "rpcnb[exec]", at both ends') from None
    return cloudpickle
