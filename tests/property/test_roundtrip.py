"""F1: whatever is written is read back, for every type of value, at any cut. F8: element order of arrays."""

from __future__ import annotations

import itertools
import struct
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rpcnb.errors import RpcError
from rpcnb.protocol.codes import Code, Limits, Role
from rpcnb.protocol.endpoint import Endpoint, State
from rpcnb.protocol.handshake import Handshake, KeyText, hello, key_text
from rpcnb.protocol.messages import (
    CallFunc,
    CopyAck,
    CopyFromRemote,
    CopyToRemote,
    InitServer,
    Message,
    PayloadEnd,
    Raised,
    Return,
    Syscall,
    encode_packet,
)
from rpcnb.protocol.sequence import Buffer, Style, decode_values, encode_values
from rpcnb.runtime.arrays import as_wire_array, dtype_of, numpy_dtype, pack, unpack, wire_bytes
from rpcnb.values import Device, DType, FunctionRef, ModuleRef, ObjectRef, Pointer, TensorMeta, Value, dtype

settings.register_profile("rpcnb", deadline=None)  # a busy machine is no failure
settings.load_profile("rpcnb")

U64 = st.integers(0, (1 << 64) - 1)
I64 = st.integers(-(1 << 63), (1 << 63) - 1)
I32 = st.integers(-(1 << 31), (1 << 31) - 1)
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)
DTYPES = st.builds(DType, st.integers(0, 255), st.integers(1, 255), st.integers(1, 65535))
DEVICES = st.builds(Device, I32, I32)
SHAPES = st.lists(st.integers(0, 1000), max_size=5).map(tuple)
TENSORS = st.builds(TensorMeta, U64, DEVICES, SHAPES, DTYPES, st.integers(0, (1 << 63) - 1)).filter(
    lambda meta: meta.nbytes < 1 << 63  # larger ones are refused
)
SCALARS = st.one_of(st.none(), st.booleans(), I64, st.floats(), U64.map(Pointer), DTYPES, DEVICES)
VALUES = st.one_of(
    SCALARS,
    TEXT,
    st.binary(max_size=40),
    TENSORS,
    U64.map(FunctionRef),
    U64.map(ModuleRef),
    U64.map(ObjectRef),
)
SEQUENCES = st.lists(VALUES, max_size=6).map(tuple)
RESULTS = st.tuples(st.integers(3, 128), VALUES) | VALUES.filter(lambda value: value is not None).map(lambda v: (v,))
REQUESTS: st.SearchStrategy[Message] = st.one_of(
    st.builds(InitServer, SEQUENCES, TEXT.filter(lambda text: len(text.encode()) <= 64)),
    st.builds(CallFunc, U64, SEQUENCES),
    st.builds(CopyFromRemote, TENSORS, U64),
    st.builds(lambda name: Syscall(Code.GET_GLOBAL_FUNC, (name,)), TEXT),
    st.builds(lambda meta, scope: Syscall(Code.DEV_ALLOC_DATA_WITH_SCOPE, (meta, scope)), TENSORS, st.none() | TEXT),
)
PRINTABLE = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=40)
REPLIES: st.SearchStrategy[Message] = st.one_of(
    st.builds(Return, RESULTS),
    st.builds(Raised, PRINTABLE),
    st.builds(Raised, PRINTABLE, PRINTABLE.filter(bool), PRINTABLE),
)


def same(one: Any, other: Any) -> bool:
    """Compare values with their types, floats by their bits."""
    if isinstance(one, tuple) and type(one) is tuple and isinstance(other, tuple):
        return len(one) == len(other) and all(map(same, one, other))
    if type(one) is float and type(other) is float:
        return struct.pack("<d", one) == struct.pack("<d", other)
    return type(one) is type(other) and bool(one == other)


def contents(message: Message) -> tuple[Any, ...]:
    return tuple(getattr(message, name) for name in type(message).__slots__)


@settings(max_examples=300)
@given(st.sampled_from(Style), SEQUENCES)
def test_every_value_comes_back(style: Style, values: tuple[Value, ...]) -> None:
    parts: list[Buffer] = []
    encode_values(values, style, parts)
    data = b"".join(parts)
    found: list[Value] = []
    end = decode_values(memoryview(data), 4, len(data), len(values), Limits(), found)
    assert end == len(data)
    assert same(tuple(found), values)


@given(U64)
def test_every_floats_bits_come_back(bits: int) -> None:
    data = struct.pack("<iQ", 3, bits)
    found: list[Value] = []
    decode_values(memoryview(data), 0, 12, 1, Limits(), found)
    parts: list[Buffer] = []
    encode_values(found, Style.ARGUMENT, parts)
    assert b"".join(parts)[4:] == data


def pieces(data: bytes, cuts: list[int]) -> list[bytes]:
    places = sorted({0, len(data), *(cut % (len(data) + 1) for cut in cuts)})
    return [data[start:stop] for start, stop in itertools.pairwise(places)]


CUTS = st.lists(st.integers(0, 1 << 20), max_size=8)


@settings(max_examples=200)
@given(st.lists(REQUESTS, min_size=1, max_size=4), CUTS)
def test_every_request_comes_back_at_any_cut(requests: list[Message], cuts: list[int]) -> None:
    server = Endpoint(Role.SERVER)
    found: list[Message] = []
    for piece in pieces(b"".join(b"".join(encode_packet(request)) for request in requests), cuts):
        server.receive_data(piece)
        while (message := server.next_message()) is not None:
            found.append(message)
            server.send(Return())
    assert [type(message) for message in found] == [type(request) for request in requests]
    assert all(same(contents(one), contents(other)) for one, other in zip(found, requests, strict=True))


@settings(max_examples=200)
@given(st.lists(REPLIES, min_size=1, max_size=4), CUTS)
def test_every_reply_comes_back_at_any_cut(replies: list[Message], cuts: list[int]) -> None:
    client = Endpoint(Role.CLIENT)
    for _ in replies:
        client.send(CallFunc(1))
    found: list[Message] = []
    for piece in pieces(b"".join(b"".join(encode_packet(reply)) for reply in replies), cuts):
        client.receive_data(piece)
        while (message := client.next_message()) is not None:
            found.append(message)
    assert client.state is State.IDLE
    assert all(same(contents(one), contents(other)) for one, other in zip(found, replies, strict=True))


@given(st.binary(max_size=300), TENSORS, CUTS)
def test_a_copys_data_comes_through_at_any_cut(data: bytes, meta: TensorMeta, cuts: list[int]) -> None:
    client, server = Endpoint(Role.CLIENT), Endpoint(Role.SERVER)
    into, back = bytearray(len(data)), bytearray(len(data))
    said: list[type] = []
    for piece in pieces(b"".join(client.send(CopyToRemote(meta, len(data), data))), cuts):
        server.receive_data(piece)
        while (message := server.next_message()) is not None:
            said.append(type(message))
            if isinstance(message, CopyToRemote):
                server.receive_payload(memoryview(into))
    assert said == [CopyToRemote, PayloadEnd]
    assert into == data
    client.receive_data(b"".join(server.send(Return())))
    assert client.next_message() == Return()
    server.receive_data(b"".join(client.send(CopyFromRemote(meta, len(data), memoryview(back)))))
    assert isinstance(server.next_message(), CopyFromRemote)
    for piece in pieces(b"".join(server.send(CopyAck(data))), cuts):
        client.receive_data(piece)
        message = client.next_message()
    assert message == CopyAck()
    assert back == data


@settings(max_examples=30)
@given(st.integers(1 << 16, 1 << 18), st.sampled_from(["bytes", "text"]), CUTS)
def test_a_bulk_argument_comes_back_at_any_cut(nbytes: int, kind: str, cuts: list[int]) -> None:
    bulk: Value = bytes(nbytes) if kind == "bytes" else "x" * nbytes
    message = CallFunc(1, ("name", bulk, 2.5, bulk))
    server = Endpoint(Role.SERVER)
    found = []
    for piece in pieces(b"".join(encode_packet(message)), cuts):
        server.receive_data(piece)
        found.append(server.next_message())
    assert [one for one in found if one is not None] == [message]


@settings(max_examples=300)
@given(st.binary(max_size=120), st.sampled_from(Role))
def test_noise_ends_in_messages_typed_errors_or_waiting(data: bytes, role: Role) -> None:
    endpoint = Endpoint(role)
    body = struct.pack("<Q", len(data)) + data
    endpoint.receive_data(body)
    try:
        endpoint.next_message()
    except RpcError:
        assert endpoint.state is State.CLOSED


KEYS = st.text(st.characters(exclude_categories=["Cs", "Z", "C"]), max_size=20)
OPTIONS = st.dictionaries(
    st.text("abcdefgh", min_size=1, max_size=5).map(lambda name: f"-{name}"),
    st.text("abc=0.5,:", max_size=8),
    max_size=4,
)


@given(st.sampled_from(Role), KEYS, OPTIONS, CUTS)
def test_every_key_text_comes_back_at_any_cut(role: Role, key: str, options: dict[str, str], cuts: list[int]) -> None:
    text = key_text(role, key, options)
    handshake = Handshake()
    found = [handshake.receive_data(piece) for piece in pieces(hello(text), cuts)]
    assert found[-1] == text
    assert KeyText.parse(text) == KeyText(role.name.lower(), key, options)


@given(st.integers(0, 17), st.integers(1, 255), st.integers(1, 65535))
def test_every_data_types_name_is_read_back(code: int, bits: int, lanes: int) -> None:
    kind = DType(code, bits, lanes)
    read = dtype(str(kind))
    assert (read, read.code, read.bits, read.lanes) == (kind, code, bits, lanes)


# -- F8: arrays of the other byte order ------------------------------------------------------------------------------

NUMBERS = ["i2", "i4", "i8", "u2", "u4", "u8", "f2", "f4", "f8", "c8", "c16"]


@pytest.mark.parametrize("number", NUMBERS)
@given(shape=st.lists(st.integers(0, 4), max_size=3).map(tuple))
def test_a_big_endian_array_has_the_bytes_of_a_little_endian_one(number: str, shape: tuple[int, ...]) -> None:
    little = np.arange(int(np.prod(shape)), dtype=f"<{number}").reshape(shape)
    big = little.astype(f">{number}")
    assert dtype_of(big) == dtype_of(little)
    assert bytes(wire_bytes(big, dtype_of(big))) == little.tobytes()
    wire = as_wire_array(big)
    assert wire.dtype == numpy_dtype(dtype_of(big))
    assert np.array_equal(wire, little)


def test_a_big_endian_transposed_array_is_sent_in_rows() -> None:
    array = np.arange(6, dtype=">f4").reshape(2, 3).T
    assert bytes(wire_bytes(array, dtype_of(array))) == struct.pack("<6f", 0, 3, 1, 4, 2, 5)


@given(st.sampled_from(["int4", "uint4", "int2", "uint2"]), st.lists(st.integers(0, 15), max_size=20))
def test_elements_below_a_byte_are_packed_and_unpacked(name: str, numbers: list[int]) -> None:
    kind = dtype(name)
    values = np.array(numbers, np.uint8) & np.uint8((1 << kind.bits) - 1)
    packed = pack(values, kind)
    assert len(packed) == kind.nbytes(len(values))
    found = unpack(packed, kind, (len(values),))
    assert [int(value) & ((1 << kind.bits) - 1) for value in found] == [int(value) for value in values]
