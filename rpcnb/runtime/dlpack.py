"""Tensors in this process's memory that numpy's own DLPack does not take: bfloat16, float8, int4, types with lanes.

numpy refuses them both ways. Their memory is the same as that of bytes, so only the description is ours.

Source:
    DLPack's dlpack.h: DLTensor, DLManagedTensor; the capsule's name is ``dltensor`` until somebody has taken it.
"""

from __future__ import annotations

import ctypes
import math
from typing import Any

import numpy as np

from rpcnb.errors import CopyMismatch
from rpcnb.runtime.arrays import array_view, dtype_of, pack
from rpcnb.values import Device, DType

__all__ = ["Exported", "fill", "from_dlpack"]

_HOST = (1, 3, 11)  # CPU; memory of CUDA and ROCm that the CPU reaches
_CAPSULE = b"dltensor"

_pointer_of = ctypes.pythonapi.PyCapsule_GetPointer
_pointer_of.restype, _pointer_of.argtypes = ctypes.c_void_p, (ctypes.py_object, ctypes.c_char_p)


class _DLTensor(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_index", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    )


def _described(capsule: Any) -> _DLTensor:
    return _DLTensor.from_address(_pointer_of(capsule, _CAPSULE))


class _Bytes(np.ndarray[Any, Any]):
    """Bytes that keep the extents to which a capsule points: the capsule keeps this array."""

    extents: Any = None


class Exported:
    """Bytes of the CPU's memory as a tensor of any type and shape, for who takes DLPack.

    Args:
        data: One dimension of ``uint8``, writable.
        kind: The type of the elements, which lie packed as on the wire.
        shape: The tensor's.
    """

    def __init__(self, data: np.ndarray[Any, Any], kind: DType, shape: tuple[int, ...]) -> None:
        self._data, self._kind, self._shape = data, kind, shape

    def __dlpack_device__(self) -> tuple[int, int]:
        return 1, 0

    def __dlpack__(self, **_: Any) -> Any:
        count = len(self._shape)
        strides = [math.prod(self._shape[axis + 1 :]) for axis in range(count)]
        kept = self._data.view(_Bytes)
        kept.extents = (ctypes.c_int64 * max(1, 2 * count))(*self._shape, *strides)
        capsule = kept.__dlpack__()
        tensor = _described(capsule)
        tensor.ndim = count
        tensor.code, tensor.bits, tensor.lanes = self._kind.code, self._kind.bits, self._kind.lanes
        tensor.shape = ctypes.cast(kept.extents, ctypes.POINTER(ctypes.c_int64))
        tensor.strides = ctypes.cast(ctypes.byref(kept.extents, 8 * count), ctypes.POINTER(ctypes.c_int64))
        return capsule


def from_dlpack(source: Any) -> np.ndarray[Any, Any]:
    """Return an array over the memory of a tensor of another library; types below 8 bits are unpacked into a copy.

    Raises:
        CopyMismatch: It is not in this process's memory, or not contiguous.
    """
    try:
        return np.from_dlpack(source)
    except (RuntimeError, BufferError, TypeError, ValueError) as error:
        return array_view(*_memory(source, str(error)))


def fill(target: Any, array: np.ndarray[Any, Any]) -> None:
    """Copy an array into a tensor of another library whose memory :func:`from_dlpack` does not show.

    Raises:
        CopyMismatch: It has another type or shape.
    """
    kind = dtype_of(array)
    if kind.bits >= 8:
        target.copyfrom(array)
        return
    memory, there, shape = _memory(target, "no memory to write to")
    if (there, shape) != (kind, array.shape):
        raise CopyMismatch(f"cannot copy {kind} of shape {array.shape} into {there} of shape {shape}")
    memory[...] = pack(array, kind)


def _memory(source: Any, refused: str) -> tuple[np.ndarray[Any, Any], DType, tuple[int, ...]]:
    """Return the bytes of another library's tensor, its type and its shape."""
    name = type(source).__name__
    try:
        capsule = source.__dlpack__()
        tensor = _described(capsule)
    except (RuntimeError, BufferError, TypeError, ValueError):
        raise CopyMismatch(f"cannot read this {name}: {refused}") from None
    if tensor.device_type not in _HOST:
        where = Device(tensor.device_type, tensor.device_index)
        raise CopyMismatch(f"this {name} is on {where}; copy it into this process's memory first")
    kind, shape = DType(tensor.code, tensor.bits, tensor.lanes), tuple(tensor.shape[: tensor.ndim])
    if not _is_compact(tensor, shape):
        raise CopyMismatch(f"this {name} of {kind} is not contiguous; make it so first")
    nbytes = kind.nbytes(math.prod(shape))
    if not nbytes:
        return np.empty(0, np.uint8), kind, shape
    memory: Any = (ctypes.c_uint8 * nbytes).from_address(tensor.data + tensor.byte_offset)
    memory.owner = (source, capsule)
    return np.frombuffer(memory, np.uint8), kind, shape


def _is_compact(tensor: _DLTensor, shape: tuple[int, ...]) -> bool:
    if not tensor.strides:
        return True
    expected = 1
    for axis in reversed(range(len(shape))):
        if shape[axis] != 1 and tensor.strides[axis] != expected:
            return False
        expected *= shape[axis]
    return True
