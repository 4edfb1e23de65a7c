"""numpy arrays and the wire's tensors."""

from __future__ import annotations

import builtins
from collections.abc import Iterator
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from rpcnb.errors import CopyMismatch
from rpcnb.runtime import arrays
from rpcnb.runtime.arrays import (
    array_view,
    as_wire_array,
    dtype_of,
    lane_shape,
    numpy_dtype,
    pack,
    plain_array,
    unpack,
    wire_bytes,
)
from rpcnb.values import DType, dtype

PLAIN = [f"{kind}{bits}" for kind in ("int", "uint") for bits in (8, 16, 32, 64)]
PLAIN += ["float16", "float32", "float64", "complex64", "complex128", "bool"]
EXTENDED = [
    "bfloat16",
    "int4",
    "uint4",
    "int2",
    "uint2",
    "float4_e2m1fn",
    "float6_e2m3fn",
    "float6_e3m2fn",
    "float8_e3m4",
    "float8_e4m3",
    "float8_e4m3b11fnuz",
    "float8_e4m3fn",
    "float8_e4m3fnuz",
    "float8_e5m2",
    "float8_e5m2fnuz",
    "float8_e8m0fnu",
]
WITHOUT_ML_DTYPES = {
    "bfloat16": "<u2",
    "int4": "i1",
    "uint4": "u1",
    "int2": "i1",
    "float8_e4m3fn": "u1",
    "float6_e2m3fn": "u1",
    "float4_e2m1fn": "u1",
}


@pytest.fixture
def _no_ml_dtypes(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    real = builtins.__import__

    def refuse(name: str, *args: Any, **more: Any) -> Any:
        if name == "ml_dtypes":
            raise ImportError(name)
        return real(name, *args, **more)

    monkeypatch.setattr(builtins, "__import__", refuse)
    arrays._extension_types.cache_clear()
    numpy_dtype.cache_clear()
    yield
    arrays._extension_types.cache_clear()
    numpy_dtype.cache_clear()


@pytest.mark.parametrize("name", PLAIN)
def test_numpys_own_types_go_both_ways(name: str) -> None:
    kind = np.dtype(name)
    assert numpy_dtype(dtype(name)) == kind
    assert dtype_of(np.zeros(1, kind)) == dtype(name)


@pytest.mark.parametrize("name", EXTENDED)
def test_ml_dtypes_go_both_ways(name: str) -> None:
    kind = np.dtype(getattr(ml_dtypes, name))
    assert numpy_dtype(dtype(name)) == kind
    assert dtype_of(np.zeros(1, kind)) == dtype(name)


@pytest.mark.usefixtures("_no_ml_dtypes")
@pytest.mark.parametrize(("name", "stand_in"), WITHOUT_ML_DTYPES.items())
def test_without_ml_dtypes_the_bits_appear_as_integers(name: str, stand_in: str) -> None:
    assert numpy_dtype(dtype(name)) == np.dtype(stand_in)


@pytest.mark.usefixtures("_no_ml_dtypes")
def test_without_ml_dtypes_the_sign_of_int4_is_extended() -> None:
    data = np.array([0xF1, 0x78], np.uint8)
    assert unpack(data, dtype("int4"), (2, 2)).tolist() == [[1, -1], [-8, 7]]
    assert unpack(data, dtype("uint4"), (3,)).tolist() == [1, 15, 8]


@pytest.mark.parametrize("text", ["float24", "handle64", "float3"])
def test_odd_sizes_are_taken_as_the_next_integer(text: str) -> None:
    kind = dtype(text)
    assert numpy_dtype(kind).kind == "u"
    assert numpy_dtype(kind).itemsize * 8 >= kind.bits


@pytest.mark.parametrize(("kind", "text"), [(DType(0, 128), "int128"), (DType(3, 80), "handle80")])
def test_what_numpy_has_nothing_for_is_refused(kind: DType, text: str) -> None:
    with pytest.raises(CopyMismatch, match=f"numpy has no type for {text}"):
        numpy_dtype(kind)


@pytest.mark.parametrize("array", [np.array(["a"]), np.array([object()]), np.array(["2020-01-01"], "M8[D]")])
def test_an_array_without_counterpart_is_refused(array: np.ndarray[Any, Any]) -> None:
    with pytest.raises(CopyMismatch, match="has no counterpart on the wire"):
        dtype_of(array)


@pytest.mark.parametrize("name", ["int4", "uint4", "int2", "uint2", "float4_e2m1fn", "float6_e2m3fn", "float6_e3m2fn"])
@pytest.mark.parametrize("count", [0, 1, 2, 3, 7, 8, 9])
def test_small_types_are_packed_lowest_bits_first(name: str, count: int) -> None:
    kind = dtype(name)
    values = np.arange(count).astype(getattr(ml_dtypes, name))
    packed = pack(values, kind)
    assert packed.nbytes == kind.nbytes(count)
    raw = values.view(np.uint8) & ((1 << kind.bits) - 1)
    number = sum(int(value) << (index * kind.bits) for index, value in enumerate(raw))
    assert packed.tobytes() == number.to_bytes(packed.nbytes, "little")
    back = unpack(packed, kind, (count,))
    assert (back.view(np.uint8) & ((1 << kind.bits) - 1)).tolist() == raw.tolist()


@pytest.mark.parametrize(
    ("array", "wire"),
    [
        (np.array([1, 2], ">i2"), "0100 0200"),
        (np.array([[1, 2], [3, 4]], "<i2").T, "0100 0300 0200 0400"),
        (np.arange(6, dtype="u1")[::2], "00 02 04"),
        (np.array(5, ">u4"), "05000000"),
        (np.zeros((0, 3), "f4"), ""),
        (np.array([1, 2, 3], ml_dtypes.int4), "21 03"),
        (np.array([True, False]), "01 00"),
    ],
)
def test_arrays_become_little_endian_rows(array: np.ndarray[Any, Any], wire: str) -> None:
    assert bytes(wire_bytes(array, dtype_of(array))) == bytes.fromhex(wire)


def test_a_ready_array_is_not_copied() -> None:
    array = np.arange(4.0)
    assert as_wire_array(array) is array
    assert np.shares_memory(np.frombuffer(wire_bytes(array, dtype("float64")), "u1"), array)


def test_a_big_endian_host_swaps_native_arrays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.byteorder", "big")
    assert as_wire_array(np.array([1], "=i2")).dtype.byteorder in "<="


def test_a_zero_dimensional_array_stays_so() -> None:
    assert as_wire_array(np.array(1, ">i2")).shape == ()


def test_lanes_are_one_more_axis() -> None:
    kind = DType(2, 32, 4)
    assert lane_shape(kind, (3,)) == (3, 4)
    view = array_view(np.arange(12, dtype="<f4").view("u1"), kind, (3,))
    assert view.shape == (3, 4)
    assert view[1, 0] == 4.0


def test_a_view_shares_memory_but_unpacked_elements_are_read_only() -> None:
    data = np.zeros(8, np.uint8)
    array_view(data, dtype("int32"), (2,))[0] = 7
    assert data[0] == 7
    small = array_view(data[:1], dtype("int4"), (2,))
    assert small.tolist() == [7, 0]
    assert not small.flags.writeable
    two_lanes = array_view(data[:1], DType(0, 4, 2), (1,))
    assert two_lanes.shape == (1, 2)


class Liar(np.ndarray[Any, Any]):
    def __len__(self) -> int:
        return 7

    def reshape(self, *shape: Any, **options: Any) -> Any:
        raise AssertionError("not to be asked")


@pytest.mark.parametrize(
    "array",
    [
        np.ones((2, 2)).view(np.matrix),
        np.ma.masked_array([1.0, 2.0]),
        np.ma.masked_array([1.0, 2.0], mask=[False, False]),
        np.array([1.0, 2.0]).view(Liar),
    ],
    ids=["matrix", "masked", "masked without masks", "a user's"],
)
def test_an_array_of_a_subclass_becomes_a_plain_one_over_its_memory(array: Any) -> None:
    found = plain_array(array)
    assert type(found) is np.ndarray
    assert np.shares_memory(found, array)
    assert found.shape == array.shape
    assert plain_array(found) is found


@pytest.mark.parametrize(
    ("array", "text"),
    [
        (
            np.ma.masked_array([1.0, 2.0], mask=[False, True]),
            r"1 elements of a MaskedArray are masked; pass \.filled\(value\)",
        ),
        (np.ma.masked, r"1 elements of a MaskedConstant are masked"),
        ([1.0], "expected a numpy array, got list"),
    ],
)
def test_what_is_masked_or_no_array_is_refused(array: Any, text: str) -> None:
    with pytest.raises(CopyMismatch, match=text):
        plain_array(array)


@pytest.mark.parametrize("array", [np.rec.fromarrays([[1], [2.0]]), np.ma.array([(1, 2.0)], dtype="i4,f8")])
def test_an_array_of_records_has_no_type_on_the_wire(array: Any) -> None:
    with pytest.raises(CopyMismatch, match="has no counterpart on the wire"):
        dtype_of(plain_array(array))
