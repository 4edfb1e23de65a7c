"""TVM's two words for making remote arrays: ``tensor(array, device)`` and ``empty(shape, dtype, device)``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rpcnb.client.remote import RemoteDevice, RemoteTensor

__all__ = ["empty", "tensor"]


def tensor(source: Any, device: RemoteDevice, *, timeout: float | None = None) -> RemoteTensor:
    """Copy a local array (numpy, or anything with DLPack) to a remote device.

    On a device of an async session this returns an awaitable.

    Raises:
        CopyMismatch: The wire has no such element type.
    """
    made: RemoteTensor = device.session.array(source, device, timeout=timeout)
    return made


def empty(
    shape: Sequence[int] | int,
    dtype: Any,
    device: RemoteDevice,
    mem_scope: str | None = None,
    *,
    timeout: float | None = None,
) -> RemoteTensor:
    """Allocate an uninitialised tensor on a remote device; on one of an async session this returns an awaitable."""
    made: RemoteTensor = device.session.empty(shape, dtype, device, mem_scope, timeout=timeout)
    return made
