"""The short way of small calls: the same bytes and values as the general way, and nothing else."""

from __future__ import annotations

import struct
from typing import Any

import pytest

from rpcnb.errors import LocalProtocolError
from rpcnb.protocol.codes import Role
from rpcnb.protocol.endpoint import Endpoint
from rpcnb.protocol.messages import CallFunc, Return, Shutdown, encode_packet
from rpcnb.protocol.sequence import encode_call_result
from rpcnb.protocol.shortcut import CALL_BYTES, NOT_PLAIN, read_call, read_result, write_call, write_result
from rpcnb.values import CPU, Pointer

PLAIN_ARGS: list[tuple[Any, ...]] = [
    (),
    (None,),
    (None, None, None),
    (1,),
    (-(1 << 63), (1 << 63) - 1),
    (1.5, float("inf"), -0.0),
    ("", "abc", "x" * 256),
    (1, None, "name", 2.5, None),
    ("a", None),
]
OTHER_ARGS: list[tuple[Any, ...]] = [
    (True,),
    (b"bytes",),
    (Pointer(1),),
    (CPU,),
    ("é",),
    ("a\0b",),
    ("x" * 257,),
    (1, True),
]
PLAIN_RESULTS: list[Any] = [None, 0, -(1 << 63), (1 << 63) - 1, 1.5, "", "1234567", "12345678", "x" * 256]


def packet(message: CallFunc | Return) -> bytes:
    return b"".join(encode_packet(message))


def read(data: bytes) -> tuple[int, tuple[Any, ...]] | None:
    return read_call(memoryview(data), len(data))


def read_back(data: bytes) -> Any:
    return read_result(memoryview(data), len(data))


@pytest.mark.parametrize("args", PLAIN_ARGS, ids=str)
def test_a_plain_call_has_the_general_ways_bytes_and_meaning(args: tuple[Any, ...]) -> None:
    data = packet(CallFunc(42, args))
    assert write_call(42, args) == data
    assert read(data) == (42, args)


@pytest.mark.parametrize("args", [*OTHER_ARGS, (1 << 63,), (-(1 << 63) - 1,)], ids=str)
def test_a_call_that_is_not_plain_is_not_written(args: tuple[Any, ...]) -> None:
    assert write_call(42, args) is None


@pytest.mark.parametrize("args", [*OTHER_ARGS, tuple([1] * 17)], ids=str)
def test_a_call_that_is_not_plain_is_not_read(args: tuple[Any, ...]) -> None:
    assert read(packet(CallFunc(42, args))) is None


@pytest.mark.parametrize(
    "data",
    [
        struct.pack("<QiQi", 16, 9, 1, 0),
        struct.pack("<QiQi", 17, 3, 1, 0),
        struct.pack("<QiQi", 16, 3, 1, -1),
        struct.pack("<QiQi", 17, 3, 1, 0) + b"\0",
        struct.pack("<QiQi", 16, 3, 1, 1),
        struct.pack("<QiQi", 18, 3, 1, 1) + b"\0\0",
        struct.pack("<QiQi", 20, 3, 1, 1) + b"\1\0\0\0",
        struct.pack("<QiQi", 24, 3, 1, 1) + bytes(8),
        struct.pack("<QiQiiq", 28, 3, 1, 1, 8, 1),
        struct.pack("<QiQiiq", 28, 3, 1, 1, 8, -1),
        struct.pack("<QiQiiq", 28, 3, 1, 1, 8, 1 << 40),
        struct.pack("<QiQiiq", 29, 3, 1, 1, 8, 1) + b"\xff",
        struct.pack("<QiQiiq", 28, 3, 1, 1, 4, 1),
        packet(CallFunc(1, (1,))) + b"\0",
        packet(CallFunc(1)) + packet(CallFunc(2)),
    ],
)
def test_bytes_that_are_not_one_plain_call_take_the_general_way(data: bytes) -> None:
    assert len(data) >= CALL_BYTES
    assert read(data) is None


@pytest.mark.parametrize("value", PLAIN_RESULTS, ids=str)
def test_a_plain_result_has_the_general_ways_bytes_and_meaning(value: Any) -> None:
    data = packet(Return(encode_call_result(value)))
    assert write_result(value) == data
    found = read_back(data)
    assert found == value or (value == "" and found is NOT_PLAIN)  # as long as an int: the general way reads it


def test_text_that_is_not_ascii_is_read_but_not_written() -> None:
    assert write_result("é") is None
    assert read_back(packet(Return((11, "é")))) == "é"


@pytest.mark.parametrize("value", [True, b"x", 1 << 63, -(1 << 63) - 1, "a\0b", "x" * 257, Pointer(1), [1]], ids=str)
def test_a_result_that_is_not_plain_is_not_written(value: Any) -> None:
    assert write_result(value) is None


@pytest.mark.parametrize(
    "data",
    [
        packet(Return()),
        packet(Return((2, True))),
        packet(Return((4, Pointer(1)))),
        packet(Return((12, b"abc"))),
        packet(Return((66, b"12345678"))),
        packet(Return((70, None))),
        packet(Return((11, "a\0b"))),
        packet(Return((0, None, None))),
        packet(Return((1, 5)))[:-1],
        packet(Return((11, "abc")))[:-1],
        packet(Return((11, "abc")))[:-1] + b"\xff",
        packet(Return((11, "abc"))) + b"\0",
        struct.pack("<Qiiiqiq", 32, 5, 2, 1, 1, 1, 5),
        struct.pack("<Qiiiqiq", 31, 4, 2, 1, 1, 1, 5),
        struct.pack("<Qiiiq", 24, 5, 2, 1, 0) + bytes(4),
    ],
)
def test_bytes_that_are_not_one_plain_result_take_the_general_way(data: bytes) -> None:
    assert read_back(data) is NOT_PLAIN


def test_a_request_and_its_reply_may_be_noted_that_went_the_short_way() -> None:
    endpoint = Endpoint(Role.CLIENT)
    assert endpoint.idle
    endpoint.note_sent(CallFunc(1))
    assert list(endpoint.owed) == [CallFunc(1)]
    assert endpoint.state.value == "busy"
    endpoint.note_answered()
    assert not endpoint.owed
    assert endpoint.state.value == "idle"
    endpoint.receive_data(b"\0")
    assert not endpoint.idle


def test_a_short_reply_after_our_shutdown_does_not_reopen_the_conversation() -> None:
    endpoint = Endpoint(Role.CLIENT)
    endpoint.note_sent(CallFunc(1))
    endpoint.send(Shutdown())
    endpoint.note_answered()
    assert endpoint.state.value == "closed"
    with pytest.raises(LocalProtocolError, match="we cannot send a request while the conversation is closed"):
        endpoint.note_sent(CallFunc(2))
    assert not endpoint.owed
