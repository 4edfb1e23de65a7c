"""The handshake: key texts, and reading one at every cut."""

from __future__ import annotations

import struct
from collections import deque

import pytest

from rpcnb.errors import RemoteProtocolError
from rpcnb.protocol.codes import MAGIC, MAGIC_DUPLICATE, MAGIC_MISMATCH, Role
from rpcnb.protocol.handshake import Handshake, KeyText, describe_strangers, hello, key_text, refusal

HELLO = bytes.fromhex("71f20f00 09000000") + b"client:x1"

TEXTS: list[tuple[str, KeyText]] = [
    ("client:", KeyText("client", "")),
    ("client: -timeout=1", KeyText("client", "", {"-timeout": "1"})),
    ("client:x1 -a -b=c=d  -e=", KeyText("client", "x1", {"-a": "", "-b": "c=d", "-e": ""})),
    ("server:gpu:0.5", KeyText("server", "gpu:0.5")),
    ("proxy:gpu", KeyText("", "proxy:gpu")),
    ("client", KeyText("", "client")),
    ("", KeyText("", "")),
]


@pytest.mark.parametrize(("text", "parts"), TEXTS)
def test_a_key_text_is_taken_apart(text: str, parts: KeyText) -> None:
    assert KeyText.parse(text) == parts


@pytest.mark.parametrize(
    ("option", "seconds"),
    [
        ("30", 30.0),
        ("0.5", 0.5),
        ("abc", None),
        ("", None),
        ("0", None),
        ("-1", None),
        ("inf", None),
        ("nan", None),
        ("1e400", None),
    ],
)
def test_a_timeout_counts_only_if_it_is_a_time(option: str, seconds: float | None) -> None:
    assert KeyText.parse(f"client: -timeout={option}").timeout == seconds


def test_without_the_option_there_is_no_timeout() -> None:
    assert KeyText.parse("client:").timeout is None


@pytest.mark.parametrize(
    ("option", "features"),
    [
        (" -rpcnb=1.0", frozenset[str]()),
        (" -rpcnb=1.7,a,b", frozenset({"a", "b"})),
        (" -rpcnb=2.0,a", None),
        (" -rpcnb", None),
        ("", None),
    ],
)
def test_features_are_those_of_a_peer_of_our_major_version(option: str, features: frozenset[str] | None) -> None:
    assert KeyText.parse("server:" + option).features == features


def test_a_key_text_is_composed() -> None:
    assert key_text(Role.CLIENT, "x1", {"-timeout": "30", "-rpcnb": "1.0"}) == "client:x1 -timeout=30 -rpcnb=1.0"
    assert key_text(Role.SERVER, "", {}) == "server:"
    assert hello("client:x1") == HELLO
    assert hello("é")[4:8] == struct.pack("<i", 2)


def test_a_refusal_is_one_word() -> None:
    assert refusal() == struct.pack("<i", MAGIC_MISMATCH)
    assert refusal(duplicate=True) == struct.pack("<i", MAGIC_DUPLICATE)


@pytest.mark.parametrize("cut", range(len(HELLO) + 1))
def test_a_key_text_is_read_at_every_cut(cut: int) -> None:
    handshake = Handshake()
    assert not handshake.started
    found = [handshake.receive_data(part) for part in (HELLO[:cut], HELLO[cut:])]
    assert [text for text in found if text is not None] == ["client:x1"]
    assert handshake.rest == b""


def test_a_key_text_is_read_byte_by_byte_and_what_follows_is_left() -> None:
    handshake = Handshake()
    found = [handshake.receive_data(memoryview(HELLO)[i : i + 1]) for i in range(len(HELLO))]
    assert found == [None] * (len(HELLO) - 1) + ["client:x1"]
    whole = Handshake()
    assert whole.receive_data(HELLO + b"more") == "client:x1"
    assert whole.rest == b"more"


def test_waiting_bytes_are_told() -> None:
    handshake = Handshake()
    assert handshake.receive_data(HELLO[:2]) is None
    assert handshake.started


def test_the_magic_word_may_have_been_consumed_before() -> None:
    handshake = Handshake(with_magic=False)
    assert handshake.receive_data(HELLO[4:] + b"!") == "client:x1"
    assert handshake.rest == b"!"


@pytest.mark.parametrize("word", [MAGIC_MISMATCH, MAGIC_DUPLICATE])
def test_a_refusal_is_read(word: int) -> None:
    handshake = Handshake()
    data = struct.pack("<i", word)
    assert [handshake.receive_data(data[i : i + 1]) for i in range(4)] == [None, None, None, word]


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"GET / HTTP/1.1", "expected an RPC peer, got an HTTP request; the RPC port is not a web page"),
        (b"HTTP/1.1 200", "an HTTP answer; this is a web server's port"),
        (b"\x16\x03\x01\x02", "a TLS hello; this port speaks plain TCP"),
        (b"SSH-2.0", "an SSH banner"),
        (bytes.fromhex("71f20200"), "the tracker's magic word"),
        (b"\x01\0\0\0", f"the first word 0x1 instead of {MAGIC:#x}"),
        (struct.pack("<ii", MAGIC, -1), "expected a key of 0 to 10 bytes, got -1"),
        (struct.pack("<ii", MAGIC, 11), "expected a key of 0 to 10 bytes, got 11"),
        (struct.pack("<ii", MAGIC, (1 << 31) - 1), "expected a key of 0 to 10 bytes, got 2147483647"),
        (struct.pack("<ii", MAGIC, 2) + b"\xc3\x28", "expected a key in UTF-8"),
    ],
)
def test_a_stranger_or_an_impossible_key_is_refused_at_any_cut(data: bytes, words: str) -> None:
    with pytest.raises(RemoteProtocolError, match=words):
        Handshake(10).receive_data(data)
    handshake = Handshake(10)
    with pytest.raises(RemoteProtocolError, match=words):
        deque((handshake.receive_data(data[i : i + 1]) for i in range(len(data))), maxlen=0)


def test_a_key_as_long_as_the_limit_is_accepted() -> None:
    assert Handshake(7).receive_data(hello("client:")) == "client:"
    assert Handshake(0).receive_data(hello("")) == ""


def test_strangers_have_names() -> None:
    assert describe_strangers(b"POST").startswith("an HTTP request")
