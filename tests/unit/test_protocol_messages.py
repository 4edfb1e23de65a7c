"""Messages: the bytes of each kind of packet."""

from __future__ import annotations

import struct
from typing import Any

import pytest

from rpcnb.errors import ArgumentError
from rpcnb.protocol.codes import Code
from rpcnb.protocol.messages import (
    VOID,
    CallFunc,
    CopyAck,
    CopyFromRemote,
    CopyToRemote,
    InitServer,
    Message,
    Raised,
    Return,
    Shutdown,
    Syscall,
    encode_packet,
)
from rpcnb.values import CPU, DType, Pointer, TensorMeta

META = TensorMeta(7, CPU, (2,), DType(0, 32), 4)
META_HEX = "0700000000000000 01000000 00000000 01000000 00 20 0100 0200000000000000 0400000000000000"

PACKETS: list[tuple[Message, str]] = [
    (Shutdown(), "01000000"),
    (InitServer(), "02000000 0500000000000000 302e382e30 00000000"),
    (InitServer(("a",), "0.7"), "02000000 0300000000000000 302e37 01000000 0b000000 41000000 0100000000000000 61"),
    (CallFunc(42), "03000000 2a00000000000000 00000000"),
    (CallFunc(42, (None, 1)), "03000000 2a00000000000000 02000000 00000000 01000000 0100000000000000"),
    (Return(), "04000000 01000000 00000000"),
    (VOID, "04000000 01000000 00000000"),
    (Return((0, None)), "04000000 02000000 01000000 0000000000000000 00000000"),
    (Return((1, -2)), "04000000 02000000 01000000 0100000000000000 01000000 feffffffffffffff"),
    (Return((1, -(1 << 63))), "04000000 02000000 01000000 0100000000000000 01000000 0000000000000080"),
    (Return((1, True)), "04000000 02000000 01000000 0100000000000000 02000000 0100000000000000"),
    (Return((12, b"a")), "04000000 02000000 01000000 0c00000000000000 09000000 0100000000000000 61"),
    (Return((Pointer(5),)), "04000000 01000000 04000000 0500000000000000"),
    (Raised("boom"), "05000000 01000000 08000000 0400000000000000 626f6f6d"),
    (Raised("a\0b"), "05000000 01000000 08000000 0600000000000000 615c78303062"),
    (Raised("\ud800"), "05000000 01000000 08000000 0600000000000000 5c7564383030"),
    (
        Raised("a", "B", "c"),
        "05000000 03000000 08000000 0100000000000000 61 08000000 0100000000000000 42 08000000 0100000000000000 63",
    ),
    (CopyFromRemote(META, 8), "06000000" + META_HEX + "0800000000000000"),
    (CopyToRemote(META, 3, b"abc"), "07000000" + META_HEX + "0300000000000000 616263"),
    (CopyAck(b"abc"), "08000000 616263"),
    (CopyAck(memoryview(b"abc")), "08000000 616263"),
    (Syscall(Code.GET_GLOBAL_FUNC, ("f",)), "09000000 01000000 08000000 0100000000000000 66"),
]


@pytest.mark.parametrize(("message", "text"), PACKETS)
def test_a_message_has_its_bytes(message: Message, text: str) -> None:
    body = bytes.fromhex(text)
    assert b"".join(encode_packet(message)) == struct.pack("<Q", len(body)) + body


def test_small_packets_are_one_buffer() -> None:
    assert all(len(encode_packet(message)) == 1 for message, _ in PACKETS)


@pytest.mark.parametrize("args", [(bytes(1 << 16), 1), (1, bytes(1 << 16)), (bytes(1 << 16), bytes(1 << 17), "a")])
def test_bulk_bytes_are_sent_from_where_they_are(args: tuple[Any, ...]) -> None:
    buffers = encode_packet(CallFunc(1, args))
    bulk = [arg for arg in args if isinstance(arg, bytes)]
    assert [buffer for buffer in buffers if len(buffer) >= 1 << 16] == bulk
    assert all(any(buffer is arg for buffer in buffers) for arg in bulk)
    data = b"".join(buffers)
    assert struct.unpack_from("<Q", data) == (len(data) - 8,)


def test_many_small_parts_become_one_buffer() -> None:
    buffers = encode_packet(CallFunc(1, tuple("x" * 1000 for _ in range(100))))
    assert len(buffers) == 1
    assert struct.unpack_from("<Q", bytes(buffers[0])) == (len(buffers[0]) - 8,)


def test_a_bulk_payload_is_sent_from_where_it_is() -> None:
    payload = memoryview(bytearray(1 << 17))
    for message in (CopyToRemote(META, 1 << 17, payload), CopyAck(payload)):
        buffers = encode_packet(message)
        assert len(buffers) == 2
        assert buffers[1] is payload


def test_a_value_that_cannot_travel_refuses_the_packet() -> None:
    with pytest.raises(ArgumentError, match="argument 1 is of type list"):
        encode_packet(CallFunc(1, (1, [])))  # type: ignore[arg-type]  # on purpose
