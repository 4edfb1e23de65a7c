"""Several values as one bytes value: what detached jobs are given and what they return, between rpcnb peers.

``u32`` bytes of JSON, the JSON, then the bytes of its arrays and bytes values, one after the other. The JSON is a list
with one entry a value: ``{"json": value}``, ``{"bytes": n}`` or ``{"array": dtype, "shape": [...]}``. No code is run by
reading one.
"""

from __future__ import annotations

import json
import struct
from typing import TYPE_CHECKING, Any

import numpy as np

from rpcnb.errors import ArgumentError, RemoteProtocolError
from rpcnb.values import has_item, is_array, plain, type_name

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["pack", "unpack"]

_HEAD = struct.Struct("<I")
_MOST_NDIM = 64
_KINDS = "biufc"  # of numpy's dtypes: what is no object and has no fields


def pack(values: Sequence[Any]) -> bytes:
    """Return what carries numbers, texts, bytes, numpy arrays, and lists and dicts of the former.

    Raises:
        ArgumentError: A value is of another kind.
    """
    entries: list[dict[str, Any]] = []
    parts: list[bytes] = []
    for index, value in enumerate(values):
        if is_array(value):
            array = np.ascontiguousarray(value)
            if array.dtype.kind not in _KINDS:
                raise ArgumentError(index, f"an array of {array.dtype}", "an array of numbers")
            entries.append({"array": array.dtype.newbyteorder("<").str, "shape": list(np.shape(value))})
            parts.append(array.astype(array.dtype.newbyteorder("<"), copy=False).tobytes())
            continue
        if type(value).__module__ == "numpy" and has_item(value):
            value = value.item()
        value = plain(value)
        if isinstance(value, (bytes, bytearray, memoryview)):
            entries.append({"bytes": memoryview(value).nbytes})
            parts.append(bytes(value))
            continue
        try:
            json.dumps(value)
        except (TypeError, ValueError, RecursionError):
            kinds = "numbers, texts, bytes, numpy arrays, and lists and dicts of the former"
            raise ArgumentError(index, f"of type {type_name(value)}", kinds) from None
        if not _has_text_keys(value):
            raise ArgumentError(index, "a dict with a key that is no text", "dicts with text keys: it would become one")
        entries.append({"json": value})
    head = json.dumps(entries).encode()
    return b"".join([_HEAD.pack(len(head)), head, *parts])


def _has_text_keys(value: Any) -> bool:
    """Tell whether all dicts in a value that JSON can carry have text keys: it makes others such."""
    if isinstance(value, dict):
        return all(isinstance(key, str) and _has_text_keys(one) for key, one in value.items())
    return not isinstance(value, (list, tuple)) or all(map(_has_text_keys, value))


def unpack(data: bytes) -> list[Any]:
    """Return the values that a parcel carries; arrays are copies.

    Raises:
        RemoteProtocolError: It is none.
    """
    try:
        (size,) = _HEAD.unpack_from(data)
        entries = json.loads(data[_HEAD.size : _HEAD.size + size])
        at = _HEAD.size + size
        found: list[Any] = []
        for entry in entries:
            if "json" in entry:
                found.append(entry["json"])
                continue
            if "bytes" in entry:
                nbytes = int(entry["bytes"])
                value: Any = data[at : at + nbytes]
            else:
                dtype, shape = np.dtype(str(entry["array"])), tuple(map(int, entry["shape"]))
                if dtype.kind not in _KINDS or len(shape) > _MOST_NDIM or any(one < 0 for one in shape):
                    raise ValueError(f"an array of {dtype}")
                nbytes = dtype.itemsize
                for one in shape:
                    nbytes *= one
                if at + nbytes <= len(data):
                    value = np.frombuffer(data, dtype, nbytes // dtype.itemsize, at).reshape(shape).copy()
            if nbytes < 0 or at + nbytes > len(data):
                raise ValueError(f"{nbytes} bytes where {len(data) - at} are left")
            found.append(value)
            at += nbytes
    except (ValueError, TypeError, KeyError, AttributeError, struct.error, RecursionError, OverflowError) as error:
        raise RemoteProtocolError(f"expected a parcel of values, got {len(data)} bytes: {error}") from None
    return found
