"""The wire's nouns: element types, devices, pointers, tensors."""

from __future__ import annotations

import copy
import enum
import pickle
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from rpcnb.values import (
    CPU,
    NULL,
    Device,
    DType,
    FunctionRef,
    ModuleRef,
    ObjectRef,
    Pointer,
    StaysHere,
    TensorMeta,
    device,
    dtype,
    is_array,
    is_bare_enum,
    plain,
)

DTYPES = {
    "int8": (0, 8, 1),
    "int4": (0, 4, 1),
    "uint16": (1, 16, 1),
    "float32": (2, 32, 1),
    "float32x4": (2, 32, 4),
    "handle64": (3, 64, 1),
    "bfloat16": (4, 16, 1),
    "complex128": (5, 128, 1),
    "bool": (6, 8, 1),
    "boolx8": (6, 8, 8),
    "bool1": (6, 1, 1),
    "float8_e3m4": (7, 8, 1),
    "float8_e4m3": (8, 8, 1),
    "float8_e4m3b11fnuz": (9, 8, 1),
    "float8_e4m3fn": (10, 8, 1),
    "float8_e4m3fnuz": (11, 8, 1),
    "float8_e5m2": (12, 8, 1),
    "float8_e5m2fnuz": (13, 8, 1),
    "float8_e8m0fnu": (14, 8, 1),
    "float6_e2m3fn": (15, 6, 1),
    "float6_e3m2fn": (16, 6, 1),
    "float4_e2m1fn": (17, 4, 1),
    "float4_e2m1fnx2": (17, 4, 2),
}


@pytest.mark.parametrize("text", DTYPES)
def test_a_data_types_name_is_read_and_written(text: str) -> None:
    found = dtype(text)
    assert (found.code, found.bits, found.lanes) == DTYPES[text]
    assert found == text == str(found)
    assert dtype(found) is found
    for again in (copy.copy(found), pickle.loads(pickle.dumps(found))):
        assert (again, again.code, again.bits, again.lanes) == (text, *DTYPES[text])


def test_a_data_type_is_one_to_numpy_and_in_texts() -> None:
    kind = dtype("float32")
    assert np.zeros(3, kind).dtype == kind
    assert np.zeros(3).astype(kind).dtype == np.float32
    assert f"{kind}" == "%s" % kind == "float32"  # noqa: UP031  # that is what is tested
    assert {"float32": 1}[kind] == 1
    assert repr(kind) == "DType('float32')"
    assert dtype("float32x4").lane == kind


def test_types_of_sizes_that_nobody_has_are_not_taken_for_others() -> None:
    texts = [DType(code, bits, lanes) for code in range(20) for bits in range(1, 70) for lanes in (1, 2, 11)]
    assert len(set(texts)) == len(texts)


@pytest.mark.parametrize(
    "text",
    ["", "float", "float0", "float256", "quux8", "int8x0", "int8x65536", "int8 ", "float9_e1", "8", "bool0", "boolx0"],
)
def test_a_text_that_names_no_data_type_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="names no data type; expected for example 'float32'"):
        dtype(text)


def test_an_unknown_type_code_has_a_name_too() -> None:
    assert str(DType(99, 16, 2)) == "code99_16x2"


@pytest.mark.parametrize(
    ("text", "elements", "nbytes"), [("float32", 3, 12), ("int4", 3, 2), ("float32x4", 2, 32), ("bool1", 9, 2)]
)
def test_elements_below_a_byte_are_counted_packed(text: str, elements: int, nbytes: int) -> None:
    assert dtype(text).nbytes(elements) == nbytes


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("cpu", Device(1, 0)),
        ("llvm", Device(1, 0)),
        ("cuda:3", Device(2, 3)),
        ("cl", Device(4, 0)),
        ("hexagon", Device(16, 0)),
        (77, Device(77, 0)),
    ],
)
def test_a_device_is_made_from_a_name_or_number(kind: str | int, expected: Device) -> None:
    assert device(kind) == expected


def test_a_device_has_an_index_name_and_text() -> None:
    assert device("cuda", 2) == (2, 2)
    assert device("cuda:1", 2) == (2, 1)
    assert device(8, 1).name == "metal"
    assert str(CPU) == "cpu:0"
    assert str(Device(77, 1)) == "device77:1"


@pytest.mark.parametrize("name", ["gpu", "cuda:x", "cuda:-1", ""])
def test_a_text_that_names_no_device_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="names no device; expected one of cpu, cuda"):
        device(name)


def test_a_pointer_is_a_number_shown_in_hexadecimal() -> None:
    assert repr(Pointer(0x1234)) == "Pointer(0x1234)"
    assert (Pointer(7), int(NULL)) == (7, 0)
    assert type(Pointer(7)) is Pointer


def test_references_compare_by_kind_and_handle() -> None:
    assert FunctionRef(1) == FunctionRef(1) != FunctionRef(2)
    assert len({FunctionRef(1), ModuleRef(1), ObjectRef(1), FunctionRef(1)}) == 3


@pytest.mark.parametrize(("shape", "size"), [((), 1), ((0,), 0), ((2, 3), 6)])
def test_a_tensor_knows_its_size(shape: tuple[int, ...], size: int) -> None:
    meta = TensorMeta(7, CPU, shape, dtype("int16"), 4)
    assert (meta.size, meta.nbytes) == (size, 2 * size)
    assert meta.at(10) == TensorMeta(7, CPU, shape, dtype("int16"), 14)
    assert TensorMeta(7, CPU, shape, dtype("int16")).byte_offset == 0


class Mode(str, enum.Enum):
    FAST = "fast"


class Level(enum.IntEnum):
    HIGH = 3


class Colour(enum.Enum):
    RED = "red"


class Label(str):
    __slots__ = ()

    def __str__(self) -> str:
        return "shown"


class Number(int):
    def __int__(self) -> int:
        return -1


class Ratio(float):
    def __float__(self) -> float:
        return -1.0


class Raw(bytes):
    def __len__(self) -> int:
        return 1 << 40

    def __bytes__(self) -> bytes:
        return b"other"


class Growing(bytearray):
    def __len__(self) -> int:
        return 0


@pytest.mark.parametrize(
    ("value", "base"),
    [
        (Mode.FAST, "fast"),
        (Level.HIGH, 3),
        (Label("real"), "real"),
        (Number(7), 7),
        (Ratio(2.5), 2.5),
        (Raw(b"raw"), b"raw"),
        (Growing(b"grown"), bytearray(b"grown")),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_value_of_a_subclass_is_what_it_holds(value: object, base: object) -> None:
    assert plain(value) == base
    assert type(plain(value)) is type(base)


@pytest.mark.parametrize("value", ["x", 1, True, 1.5, b"x", None, Colour.RED, NULL, CPU, [1]], ids=repr)
def test_anything_else_stays_what_it_is(value: object) -> None:
    assert plain(value) is value


def test_an_enum_without_a_base_that_travels_is_told_from_one_with() -> None:
    assert [is_bare_enum(value) for value in (Colour.RED, Mode.FAST, Level.HIGH, "red")] == [True, False, False, False]


def test_an_array_is_known_without_loading_numpy(monkeypatch: pytest.MonkeyPatch) -> None:
    array = np.ma.masked_array([1])
    assert is_array(array)
    assert not is_array([1])
    monkeypatch.delitem(sys.modules, "numpy")
    assert not is_array(array)


class Thing(StaysHere):
    __slots__ = ("freed",)

    _instead = "make one there"


@pytest.mark.parametrize("take", [copy.copy, copy.deepcopy, pickle.dumps, lambda thing: copy.deepcopy([{"a": thing}])])
def test_what_stays_here_is_neither_copied_nor_pickled(take: Callable[[Any], Any]) -> None:
    with pytest.raises(
        TypeError, match=r"^a Thing belongs to this process and cannot be copied or pickled; make one there$"
    ):
        take(Thing())
