"""What the other side takes of text and bytes: told in the handshake, and kept to by the sender."""

from __future__ import annotations

from typing import Any

import pytest

from rpcnb.errors import LimitExceeded
from rpcnb.protocol.codes import Limits, Role
from rpcnb.protocol.endpoint import Endpoint
from rpcnb.protocol.handshake import KeyText
from rpcnb.protocol.messages import CallFunc, CopyAck, Raised, Return, encode_packet
from rpcnb.protocol.peerlimits import PeerLimits, extension, text_size
from rpcnb.values import CPU

MIB = 1 << 20
FEW = PeerLimits(text=1000, bytes=2000)


class Raw(bytes):
    def __len__(self) -> int:
        return 1


@pytest.mark.parametrize(
    ("limits", "option"),
    [
        (Limits(), "1.0,lanes"),
        (Limits(text=1 << 25, bytes_argument=5), f"1.0,lanes,text={1 << 25},bytes=5"),
        (Limits(text=1 << 27), f"1.0,lanes,text={64 * MIB - (1 << 17)}"),  # a text counts to its packet
        (Limits(call=1000), "1.0,lanes,text=500"),
    ],
)
def test_limits_travel_as_features_unless_they_are_the_defaults(limits: Limits, option: str) -> None:
    assert extension("1.0", limits, "lanes") == option
    features = KeyText.parse(f"server: -rpcnb={option}").features
    assert features is not None
    assert "lanes" in features
    told = PeerLimits.told_by(features)
    assert extension("1.0", Limits(text=told.text, bytes_argument=told.bytes, call=1 << 40), "lanes") == option


def test_who_says_nothing_has_the_defaults_and_nonsense_is_nothing() -> None:
    assert PeerLimits.told_by(frozenset()) == PeerLimits(16 * MIB, 1024 * MIB) == PeerLimits()
    odd = frozenset({"text=-1", "bytes=x", "text", "call=3", "bytes=²", f"text={10**30}"})
    assert PeerLimits.told_by(odd) == PeerLimits()
    assert PeerLimits.told_by(None).text == 16 * MIB
    assert PeerLimits.told_by(None).bytes > 1 << 60  # stock reads files of any size


@pytest.mark.parametrize(
    "value", ["x" * 1000, "ä" * 500, b"x" * 2000, bytearray(2000), memoryview(bytes(2000)), 1 << 62, None, 1.5, CPU]
)
def test_what_a_peer_takes_is_sent_as_it_is(value: Any) -> None:
    reply = Return((1, value))
    assert FEW.fit(reply) is reply


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("x" * 1001, "the text result of 1001 bytes exceeds the client's text=1000; raise it with connect"),
        ("ä" * 501, "the text result of 1002 bytes exceeds"),
        (bytes(2001), "the bytes result of 2001 bytes exceeds the client's bytes_argument=2000; raise it with"),
        (Raw(2001), "the bytes result of 2001 bytes exceeds"),
        (memoryview(bytes(2004)).cast("i"), "the bytes result of 2004 bytes exceeds"),
    ],
)
def test_a_larger_result_is_refused_by_the_limits_name(value: Any, text: str) -> None:
    with pytest.raises(LimitExceeded, match=text):
        FEW.fit(Return((1, value)))


def test_a_copys_data_has_no_limit() -> None:
    reply = CopyAck(bytes(5000))
    assert FEW.fit(reply) is reply


@pytest.mark.parametrize("letter", ["x", "ä", "\0", "\ud800"], ids=ascii)
def test_an_errors_texts_are_cut_and_say_so(letter: str) -> None:
    short = Raised("x" * 80, "ValueError", "")
    assert FEW.fit(short) is short
    for count in (90, 490, 10_000):
        found = FEW.fit(Raised(letter * count, "E" * count, letter * count))
        assert isinstance(found, Raised)
        for text, most in ((found.text, 1000), (found.type_name, 500), (found.traceback, 500)):
            packed = len(b"".join(map(bytes, encode_packet(Raised(text))))) - len(encode_packet(Raised(""))[0])
            assert packed <= most
        last = found.text
    assert "(cut: this text has " in last
    assert last.endswith("the client's text=1000; raise it with connect(..., limits=rpcnb.Limits(text=...)))")


def test_a_limit_that_is_shorter_than_the_note_still_holds() -> None:
    found = PeerLimits(text=10, bytes=10).fit(Raised("x" * 100, "ValueError", "y" * 100))
    assert found == Raised("... (cut: ", "... (", "... (")


def test_a_server_that_is_refused_a_result_can_still_answer() -> None:
    server = Endpoint(Role.SERVER)
    server.takes = FEW
    for part in Endpoint(Role.CLIENT).send(CallFunc(1)):
        server.receive_data(part)
    assert isinstance(server.next_message(), CallFunc)
    with pytest.raises(LimitExceeded):
        server.send(Return((65, "x" * 1001)))
    assert b"cut: this text has 1001 bytes" in b"".join(map(bytes, server.send(Raised("x" * 1001))))


def test_texts_in_records_leave_room_for_the_rest() -> None:
    assert PeerLimits(1000, 2000).in_records() == PeerLimits(500, 2000)
    assert PeerLimits().in_records() == PeerLimits()


def test_a_text_is_measured_only_where_it_may_be_too_long() -> None:
    assert (text_size("ä" * 10, 40), text_size("ä" * 10, 39), text_size("\ud800", 1)) == (10, 20, 3)
