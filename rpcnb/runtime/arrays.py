"""numpy arrays and the wire's tensors: element types, byte order, packing, views.

The wire has little-endian elements and packs types below 8 bits. A type that numpy lacks is taken from
``ml_dtypes`` if that is installed (bfloat16, float8, int4 ...), else its bits appear as unsigned integers of the
same width. A type with lanes adds an axis at the end, as in TVM: ``float32x4`` of shape (n,) is (n, 4) float32.
"""

from __future__ import annotations

import sys
from functools import cache
from typing import Any

import numpy as np

from rpcnb.errors import CopyMismatch
from rpcnb.values import DType, dtype

__all__ = ["TensorView", "as_wire_array", "dtype_of", "numpy_dtype", "pack", "plain_array", "unpack", "wire_bytes"]

_WIDEST = 16  # bytes; of more bits the wire's byte cannot tell (long complex numbers)
_KINDS = {"i": 0, "u": 1, "f": 2, "c": 5, "b": 6}
_LETTERS = {0: "i", 1: "u", 2: "f", 5: "c"}


@cache
def _extension_types() -> dict[str, np.dtype[Any]]:
    """Types of ``ml_dtypes`` by the wire's name; empty without that package."""
    try:
        import ml_dtypes
    except ImportError:
        return {}
    names: tuple[str, ...] = ("bfloat16", "int2", "uint2", "int4", "uint4")
    names += tuple(name for name in dir(ml_dtypes) if name.startswith(("float4_", "float6_", "float8_")))
    return {name: np.dtype(getattr(ml_dtypes, name)) for name in names}


@cache
def numpy_dtype(kind: DType) -> np.dtype[Any]:
    """Return the numpy type of one lane, little-endian.

    Raises:
        CopyMismatch: numpy has nothing of this size.
    """
    single = kind.lane
    if single == "bool":
        return np.dtype(np.bool_)
    if kind.code in _LETTERS and kind.bits in (8, 16, 32, 64, 128):
        text = f"<{_LETTERS[kind.code]}{kind.bits // 8}"
        try:
            return np.dtype(text)
        except TypeError:
            pass
    known = _extension_types().get(single)
    if known is not None:
        return known
    if kind.bits <= 64:
        bits = max(8, 1 << (kind.bits - 1).bit_length())
        return np.dtype(f"<{'i' if kind.code == 0 else 'u'}{bits // 8}")
    raise CopyMismatch(f"numpy has no type for {kind}")


def dtype_of(array: np.ndarray[Any, Any]) -> DType:
    """Return the wire's type of an array.

    Raises:
        CopyMismatch: The wire has no such type (objects, text, dates).
    """
    kind = array.dtype
    if kind.kind in _KINDS and kind.isbuiltin != 2 and kind.itemsize <= _WIDEST:
        return DType(_KINDS[kind.kind], kind.itemsize * 8, 1)
    for name, known in _extension_types().items():
        if kind == known:
            return dtype(name)
    raise CopyMismatch(f"an array of type {kind} has no counterpart on the wire")


def plain_array(array: Any) -> np.ndarray[Any, Any]:
    """Return an array of a subclass (matrix, memmap, masked, a user's own) as a plain one, over the same memory.

    Subclasses change what indexing, reshaping and ``len`` mean, on which sizes and bytes here depend.

    Raises:
        CopyMismatch: Elements are masked, or it is no array.
    """
    if type(array) is np.ndarray:
        return array
    if not isinstance(array, np.ndarray):
        raise CopyMismatch(f"expected a numpy array, got {type(array).__name__}")
    mask = np.ma.getmask(array) if isinstance(array, np.ma.MaskedArray) else np.ma.nomask
    if mask.dtype.names is None and mask.any():  # an array of records is refused for its type
        count = int(np.count_nonzero(mask))
        raise CopyMismatch(
            f"{count} elements of a {type(array).__name__} are masked; pass .filled(value), or .data to ignore the mask"
        )
    return np.asarray(array)


def as_wire_array(array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Return the array C-contiguous and little-endian; itself if it is so already."""
    if array.dtype.byteorder == ">" or (array.dtype.byteorder == "=" and sys.byteorder == "big"):
        array = array.astype(array.dtype.newbyteorder("<"))
    return array if array.flags.c_contiguous else np.array(array, order="C", ndmin=array.ndim)


def pack(array: np.ndarray[Any, Any], kind: DType) -> np.ndarray[Any, Any]:
    """Pack elements below 8 bits, first element in the lowest bits; returns bytes."""
    values = array.reshape(-1).view(np.uint8) & np.uint8((1 << kind.bits) - 1)
    bits = np.unpackbits(values[:, None], axis=1, count=kind.bits, bitorder="little")
    return np.packbits(bits.reshape(-1), bitorder="little")


def unpack(data: np.ndarray[Any, Any], kind: DType, shape: tuple[int, ...]) -> np.ndarray[Any, Any]:
    """Unpack elements below 8 bits into one element a byte; the inverse of :func:`pack`."""
    count = int(np.prod(shape, dtype=np.int64))
    bits = np.unpackbits(data, count=count * kind.bits, bitorder="little").reshape(count, kind.bits)
    values = np.packbits(bits, axis=1, bitorder="little").reshape(-1)
    target = numpy_dtype(kind)
    if target.kind == "i" and target.isbuiltin == 1:  # int4 without ml_dtypes: extend the sign
        shift = 8 - kind.bits
        return ((values << shift).view(np.int8) >> shift).reshape(shape)
    return values.view(target).reshape(shape)


def wire_bytes(array: np.ndarray[Any, Any], kind: DType) -> memoryview:
    """Return the bytes of an array as they go onto the wire; the array's own memory where possible."""
    ready = as_wire_array(array)
    if kind.bits < 8:
        ready = pack(ready, kind)
    return byte_view(ready)


def byte_view(array: np.ndarray[Any, Any]) -> memoryview:
    """Return the memory of a C-contiguous array as bytes."""
    return memoryview(array.reshape(-1).view(np.uint8).data) if array.size else memoryview(b"")


class TensorView(np.ndarray[Any, Any]):
    """A tensor of a type that numpy does not have as it lies in memory: packed elements, lanes.

    Attributes:
        tensor: The tensor, for compiled code.
    """

    tensor: Any = None


def is_exact(array: np.ndarray[Any, Any], kind: DType) -> bool:
    """Tell whether an array's memory and type are a tensor's of this type."""
    return kind.lanes == 1 and kind.bits >= 8 and dtype_of(array) == kind


def array_view(data: np.ndarray[Any, Any], kind: DType, shape: tuple[int, ...]) -> np.ndarray[Any, Any]:
    """View bytes as an array of the wire's type and shape; types below 8 bits are unpacked into a copy."""
    if kind.bits < 8:
        array = unpack(data, kind.lane, lane_shape(kind, shape))
        array.flags.writeable = False
        return array
    return data.view(numpy_dtype(kind)).reshape(lane_shape(kind, shape))


def lane_shape(kind: DType, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the numpy shape: the tensor's, and the lanes as one more axis."""
    return shape if kind.lanes == 1 else (*shape, kind.lanes)
