"""Several values as one bytes value."""

from __future__ import annotations

import enum
import json
import struct
from typing import Any

import numpy as np
import pytest

from rpcnb.errors import ArgumentError, RemoteProtocolError
from rpcnb.runtime.parcel import pack, unpack


class Colour(str, enum.Enum):
    RED = "red"


@pytest.mark.parametrize(
    "value",
    [None, True, 3, 2.5, "text", [1, {"a": [None]}], b"", b"bytes", {"k": "v"}],
)
def test_what_json_and_bytes_hold_comes_back(value: Any) -> None:
    assert unpack(pack([value, 1])) == [value, 1]


def test_arrays_come_back_with_shape_and_type() -> None:
    given = [np.arange(6, dtype=">i2").reshape(2, 3), np.zeros((0, 3), "float32"), np.array(2.5), np.array([1j])[::-1]]
    found = unpack(pack(given))
    assert [(one.shape, one.dtype.newbyteorder("=")) for one in found] == [
        (one.shape, one.dtype.newbyteorder("=")) for one in given
    ]
    assert all((one == other).all() for one, other in zip(found, given, strict=True))
    found[0][0, 0] = 7  # they are copies, which may be changed


def test_scalars_and_enums_travel_by_their_value() -> None:
    assert unpack(pack([np.float64(1.5), Colour.RED, bytearray(b"x"), memoryview(b"y")])) == [1.5, "red", b"x", b"y"]


@pytest.mark.parametrize("value", [object(), {1, 2}, np.array([object()]), np.array(["text"])])
def test_anything_else_is_refused_by_name(value: Any) -> None:
    with pytest.raises(ArgumentError):
        pack([value])


def _parcel(entries: Any, rest: bytes = b"") -> bytes:
    head = json.dumps(entries).encode()
    return struct.pack("<I", len(head)) + head + rest


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\0\0",
        b"\xff\xff\xff\xff",
        _parcel(3),
        _parcel(["x"]),
        _parcel([{}]),
        _parcel([{"bytes": 5}], b"1234"),
        _parcel([{"bytes": -1}], b"1234"),
        _parcel([{"array": "<i4", "shape": [2]}], b"1234"),
        _parcel([{"array": "O", "shape": [1]}], b"12345678"),
        _parcel([{"array": "<i4", "shape": [-1]}], b"1234"),
        _parcel([{"array": "<i4", "shape": [1] * 65}], b"1234"),
        _parcel([{"array": "<i4", "shape": [1 << 62, 1 << 62]}]),
    ],
)
def test_what_is_no_parcel_is_refused(data: bytes) -> None:
    with pytest.raises(RemoteProtocolError, match="parcel"):
        unpack(data)


@pytest.mark.parametrize("value", [{1: 2}, {None: 2}, {True: 2}, [{1: 2}], {"a": [({2.5: 1},)]}])
def test_a_key_that_would_become_a_text_is_refused(value: Any) -> None:
    with pytest.raises(ArgumentError, match="dicts with text keys") as caught:
        pack([1, value])
    assert caught.value.index == 1


def test_nested_text_keys_travel() -> None:
    value = {"a": [{"b": [1, {"c": None}]}]}
    assert unpack(pack([value])) == [value]
