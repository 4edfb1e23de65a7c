"""Packed sequences: the bytes of every kind of value, all forms a peer may send, and what is refused."""

from __future__ import annotations

import struct
from array import array
from typing import Any

import pytest

from rpcnb.errors import ArgumentError, LimitExceeded, RemoteProtocolError, RpcError
from rpcnb.protocol.codes import Limits
from rpcnb.protocol.sequence import (
    Buffer,
    Style,
    decode_tensor,
    decode_values,
    encode_call_result,
    encode_tensor,
    encode_values,
    is_bulk,
)
from rpcnb.values import CPU, NULL, Device, DType, FunctionRef, ModuleRef, ObjectRef, Pointer, TensorMeta, Value

LIMITS = Limits()
A, R, C = Style.ARGUMENT, Style.RESULT, Style.CONSTRUCTOR
META = TensorMeta(0x1122, Device(2, 1), (2, 3), DType(2, 32, 4), 8)
META_HEX = "2211000000000000 02000000 01000000 02000000 02 20 0400 0200000000000000 0300000000000000 0800000000000000"

# One value, the style it is written in, and its bytes.
VALUES: list[tuple[Value, Style, str]] = [
    (None, A, "00000000"),
    (0, A, "01000000 0000000000000000"),
    (-1, A, "01000000 ffffffffffffffff"),
    ((1 << 63) - 1, A, "01000000 ffffffffffffff7f"),
    (-(1 << 63), A, "01000000 0000000000000080"),
    (True, A, "02000000 0100000000000000"),
    (False, A, "02000000 0000000000000000"),
    (1.5, A, "03000000 000000000000f83f"),
    (float("inf"), A, "03000000 000000000000f07f"),
    (float("-inf"), A, "03000000 000000000000f0ff"),
    (-0.0, A, "03000000 0000000000000080"),
    (5e-324, A, "03000000 0100000000000000"),
    (Pointer(0x1234), A, "04000000 3412000000000000"),
    (Pointer((1 << 64) - 1), A, "04000000 ffffffffffffffff"),
    (NULL, A, "04000000 0000000000000000"),
    (DType(2, 16, 4), A, "05000000 02 10 0400 00000000"),
    (Device(2, 3), A, "06000000 02000000 03000000"),
    (META, A, "07000000" + META_HEX),
    ("", A, "08000000 0000000000000000"),
    ("1234567", A, "08000000 0700000000000000 31323334353637"),
    ("12345678", A, "08000000 0800000000000000 3132333435363738"),
    ("é世", R, "08000000 0500000000000000 c3a9e4b896"),
    ("", C, "0b000000 41000000 0000000000000000"),
    ("1234567", C, "0b000000 41000000 0700000000000000 31323334353637"),
    ("12345678", C, "41000000 41000000 0800000000000000 3132333435363738"),
    ("a\0b", A, "0b000000 41000000 0300000000000000 610062"),
    ("a\0b45678", R, "41000000 41000000 0800000000000000 6100623435363738"),
    (b"", A, "0c000000 42000000 0000000000000000"),
    (b"1234567", A, "0c000000 42000000 0700000000000000 31323334353637"),
    (b"12345678", A, "42000000 42000000 0800000000000000 3132333435363738"),
    (b"12345678", C, "42000000 42000000 0800000000000000 3132333435363738"),
    (b"abc", R, "09000000 0300000000000000 616263"),
    (FunctionRef(7), A, "44000000 0700000000000000"),
    (ModuleRef(7), A, "49000000 0700000000000000"),
    (ObjectRef(7), A, "73000000 73000000 0700000000000000"),
]

# Forms that only other peers write, and what they mean: either declared index with either inner word.
FORMS: list[tuple[str, Value]] = [
    ("0b000000 41000000 0300000000000000 616263", "abc"),
    ("41000000 41000000 0300000000000000 616263", "abc"),
    ("0c000000 41000000 0300000000000000 616263", "abc"),
    ("42000000 41000000 0300000000000000 616263", "abc"),
    ("0b000000 42000000 0300000000000000 616263", b"abc"),
    ("41000000 42000000 0300000000000000 616263", b"abc"),
    ("0c000000 42000000 0300000000000000 616263", b"abc"),
    ("42000000 42000000 0300000000000000 616263", b"abc"),
    ("80000000 41000000 0100000000000000 61", "a"),
    ("40000000 73000000 0900000000000000", ObjectRef(9)),
    ("02000000 0500000000000000", True),
    ("05000000 02 20 0100 12345678", DType(2, 32, 1)),
]


def encode(values: tuple[Any, ...], style: Style = A) -> bytes:
    parts: list[Buffer] = []
    encode_values(values, style, parts)
    return b"".join(parts)


def decode(data: bytes, count: int, limits: Limits = LIMITS) -> tuple[list[Value], int]:
    values: list[Value] = []
    return values, decode_values(memoryview(data), 0, len(data), count, limits, values)


@pytest.mark.parametrize(("value", "style", "text"), VALUES)
def test_a_value_has_its_bytes_and_comes_back(value: Value, style: Style, text: str) -> None:
    data = bytes.fromhex(text)
    assert encode((value,), style) == struct.pack("<i", 1) + data
    found, end = decode(data, 1)
    assert (found, end) == ([value], len(data))
    assert type(found[0]) is type(value)


@pytest.mark.parametrize(("text", "value"), FORMS)
def test_a_form_that_other_peers_write_is_read(text: str, value: Value) -> None:
    data = bytes.fromhex(text)
    assert decode(data, 1) == ([value], len(data))


@pytest.mark.parametrize("text", [*(text for _, _, text in VALUES), *(text for text, _ in FORMS)])
def test_a_cut_value_is_awaited_and_bytes_behind_a_value_are_left(text: str) -> None:
    data = bytes.fromhex(text)
    for cut in range(len(data)):
        assert decode(data[:cut], 1) == ([], 0)
    for more in (b"\0", b"\0" * 3, b"\xff" * 40):
        found, end = decode(data + more, 1)
        assert (len(found), end) == (1, len(data))


def test_several_values_are_read_as_far_as_they_are_whole() -> None:
    data = encode((1, None, "abc", 2.5))[4:]
    assert decode(data, 4) == ([1, None, "abc", 2.5], len(data))
    assert decode(data, 2) == ([1, None], 16)
    assert decode(data[:-1], 4) == ([1, None, "abc"], len(data) - 12)
    assert decode(encode((None, 1))[4:], 1) == ([None], 4)
    assert decode(encode((None, 1))[4:], 2) == ([None, 1], 16)


def test_a_nan_keeps_its_payload() -> None:
    data = bytes.fromhex("03000000 efbeadde0000f87f")
    found, _ = decode(data, 1)
    assert encode((found[0],))[4:] == data


@pytest.mark.parametrize("value", [bytearray(b"abc"), memoryview(b"abc")])
def test_other_buffers_travel_as_bytes(value: bytearray | memoryview) -> None:
    assert encode((value,)) == encode((b"abc",))


@pytest.mark.parametrize("style", Style)
@pytest.mark.parametrize(
    "view",
    [
        memoryview(array("i", [1, 2, 3])),
        memoryview(bytes(12)).cast("B", (3, 4)),
        memoryview(bytes(range(24)))[::2],
        memoryview(bytes(200_000))[::2],
    ],
    ids=["items of 4 bytes", "two dimensions", "every other byte", "every other of many"],
)
def test_a_view_of_anything_travels_as_its_bytes(view: memoryview, style: Style) -> None:
    data = view.tobytes()
    assert encode((view,), style) == encode((data,), style)
    assert encode_call_result(view)[0] == 66  # type: ignore[arg-type]  # what a function may return all the same


def test_subclasses_travel_as_what_they_are() -> None:
    class Count(int):
        pass

    class Ratio(float):
        pass

    class Name(str):
        __slots__ = ()

        def encode(self, *how: str) -> bytes:
            return b"other"

    class Raw(bytes):
        def __len__(self) -> int:
            return 1 << 40

    assert encode((Count(5), Ratio(0.5), Name("n"), Raw(b"r"))) == encode((5, 0.5, "n", b"r"))
    assert encode_call_result(Raw(b"r")) == (12, b"r")


def test_bulk_bytes_stay_a_buffer_of_their_own() -> None:
    data = bytes(1 << 16)
    parts: list[Buffer] = []
    encode_values((data, 1), A, parts)
    assert any(part is data for part in parts)
    assert decode(b"".join(parts)[4:], 2)[0] == [data, 1]


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ((1, [1]), "argument 1 is of type list; expected None, bool, int"),
        ((object(),), "argument 0 is of type object; expected None"),
        ((1 << 63,), "argument 0 is the int 9223372036854775808; expected 64 signed bits"),
        ((-(1 << 63) - 1,), "argument 0 is the int -9223372036854775809; expected 64 signed bits"),
        ((1 << 5000,), "argument 0 is the int of many digits; expected 64 signed bits"),
        (("a\ud800",), r"argument 0 is text that is not Unicode \(surrogates not allowed\); expected text without"),
    ],
)
def test_what_cannot_travel_is_refused_by_position(values: tuple[Any, ...], text: str) -> None:
    with pytest.raises(ArgumentError, match=text):
        encode(values)


@pytest.mark.parametrize(
    ("value", "index"),
    [
        (None, 0),
        (5, 1),
        (True, 2),
        (2.5, 3),
        (Pointer(5), 4),
        (DType(0, 8), 5),
        (CPU, 6),
        ("1234567", 11),
        ("12345678", 65),
        ("é世é", 11),
        ("é世é1", 65),
        (b"1234567", 12),
        (b"12345678", 66),
    ],
)
def test_a_calls_result_carries_its_type_index(value: Value, index: int) -> None:
    assert encode_call_result(value) == (index, value)


def test_a_result_without_a_plain_form_is_refused() -> None:
    with pytest.raises(ArgumentError, match="argument 0 is of type FunctionRef"):
        encode_call_result(FunctionRef(1))


@pytest.mark.parametrize(
    ("text", "error", "words"),
    [
        ("0a000000 0000000000000000", RemoteProtocolError, "expected a value's type index, got 10"),
        ("0d000000 0000000000000000", RemoteProtocolError, "expected a value's type index, got 13"),
        ("46000000 0000000000000000", RemoteProtocolError, "expected a value's type index, got 70"),
        ("ffffffff 0000000000000000", RemoteProtocolError, "expected a value's type index, got -1"),
        (
            "41000000 43000000 0000000000000000",
            RemoteProtocolError,
            r"expected an object of type 65, 66 or 115, got 67 \(outer type 65\)",
        ),
        ("08000000 0200000000000000 c328", RemoteProtocolError, "expected UTF-8 text, got invalid .* at byte 0"),
        ("41000000 41000000 0300000000000000 eda080", RemoteProtocolError, "expected UTF-8 text"),
        ("07000000" + "00" * 16 + "01000041" + "00" * 12, LimitExceeded, "dimensions exceeds ndim=64"),
    ],
)
def test_an_illegal_value_is_refused(text: str, error: type[RpcError], words: str) -> None:
    with pytest.raises(error, match=words):
        decode(bytes.fromhex(text), 1)


def test_text_above_the_limit_is_refused_in_every_form() -> None:
    limits = Limits(text=3)
    for style in Style:
        assert decode(encode(("abc",), style)[4:], 1, limits)[0] == ["abc"]
        with pytest.raises(LimitExceeded, match=r"text of 4 bytes exceeds text=3"):
            decode(encode(("abcd",), style)[4:], 1, limits)


@pytest.mark.parametrize("length", [1 << 31, 1 << 63, (1 << 64) - 1])
@pytest.mark.parametrize("head", ["08000000", "09000000", "0b00000041000000", "4200000042000000"])
def test_an_absurd_length_waits_and_allocates_nothing(head: str, length: int) -> None:
    assert decode(bytes.fromhex(head) + struct.pack("<Q", length) + b"abc", 1) == ([], 0)


def tensor_bytes(
    ndim: int, shape: tuple[int, ...], *, kind: tuple[int, int, int] = (2, 32, 1), offset: int = 0
) -> bytes:
    head = struct.pack("<QiiiBBH", 1, 1, 0, ndim, *kind)
    return head + struct.pack(f"<{len(shape)}qQ", *shape, offset)


@pytest.mark.parametrize("shape", [(), (0,), (5,), (2, 3), tuple([1] * 64)])
def test_a_tensor_comes_back(shape: tuple[int, ...]) -> None:
    meta = TensorMeta(9, CPU, shape, DType(0, 4, 1), 3)
    data = encode_tensor(meta)
    assert len(data) == 32 + 8 * len(shape)
    assert decode_tensor(memoryview(data), 0, len(data), LIMITS) == (meta, len(data))
    assert all(decode_tensor(memoryview(data), 0, cut, LIMITS) is None for cut in range(len(data)))


@pytest.mark.parametrize(
    ("data", "error", "words"),
    [
        (tensor_bytes(-1, ()), LimitExceeded, "tensor of -1 dimensions exceeds ndim=64"),
        (tensor_bytes(65, ()), LimitExceeded, "tensor of 65 dimensions exceeds ndim=64"),
        (tensor_bytes((1 << 31) - 1, ()), LimitExceeded, "tensor of 2147483647 dimensions exceeds ndim=64"),
        (tensor_bytes(1, (-1,)), RemoteProtocolError, r"expected a tensor shape and type, got shape \(-1,\), 32 bits"),
        (tensor_bytes(2, (3, -4)), RemoteProtocolError, r"got shape \(3, -4\)"),
        (tensor_bytes(0, (), kind=(2, 0, 1)), RemoteProtocolError, "0 bits, 1 lanes"),
        (tensor_bytes(0, (), kind=(2, 8, 0)), RemoteProtocolError, "8 bits, 0 lanes"),
        (tensor_bytes(2, (1 << 62, 1 << 62)), LimitExceeded, r"exceeds 2\*\*63 bytes"),
        (tensor_bytes(1, ((1 << 63) - 1,)), LimitExceeded, r"exceeds 2\*\*63 bytes"),
        (tensor_bytes(0, (), offset=1 << 63), LimitExceeded, r"at offset 9223372036854775808 exceeds 2\*\*63 bytes"),
    ],
)
def test_an_impossible_tensor_is_refused(data: bytes, error: type[RpcError], words: str) -> None:
    with pytest.raises(error, match=words):
        decode_tensor(memoryview(data), 0, len(data), LIMITS)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("08000000 0a00000000000000", (65, 12, 10)),
        ("09000000 0a00000000000000", (66, 12, 10)),
        ("08000000 0900000000000000", None),
        ("0b000000 41000000 0a00000000000000", (65, 16, 10)),
        ("42000000 42000000 ffffffffffffffff", (66, 16, (1 << 64) - 1)),
        ("41000000 42000000 0a00000000000000", (66, 16, 10)),
        ("42000000 42000000 0900000000000000", None),
        ("42000000 73000000 0a00000000000000", None),
        ("42000000 42000000", None),
        ("42000000 42000000 0a000000", None),
        ("01000000 ffffffffffffff7f 00000000", None),
        ("08000000 0a0000", None),
    ],
)
def test_a_bulk_value_is_told_by_its_head(text: str, found: tuple[int, int, int] | None) -> None:
    data = bytes.fromhex(text)
    assert is_bulk(memoryview(data), 0, len(data), 10) == found
