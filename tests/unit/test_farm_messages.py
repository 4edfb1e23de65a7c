"""The tracker's frames, requests and exchanges."""

from __future__ import annotations

import json
import struct
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rpcnb.errors import RemoteProtocolError
from rpcnb.farm.messages import (
    GREETING,
    NOTHING,
    PLACE,
    Frames,
    PendingKeys,
    Ping,
    Put,
    RequestBoard,
    Stop,
    Summary,
    UpdateInfo,
    ask_pending_keys,
    ask_summary,
    can_be_listed,
    encode_frame,
    parse_request,
    put_board,
    request_board,
    tell_info,
)

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=12,
)


def values(frames: Frames) -> list[Any]:
    found = []
    while (value := frames.next_value()) is not NOTHING:
        found.append(value)
    return found


def play(flow: Any, *replies: Any) -> tuple[list[Any], Any]:
    """Give a flow these replies; returns what it sent, and its result."""
    sent = [next(flow)]
    *early, last = replies
    sent += [flow.send(reply) for reply in early]
    with pytest.raises(StopIteration) as end:
        flow.send(last)
    return sent, end.value.value


@given(st.lists(JSON, max_size=4), st.data())
def test_frames_arrive_in_any_cut(sent: list[Any], data: st.DataObject) -> None:
    stream = GREETING + b"".join(map(encode_frame, sent))
    cuts = sorted(data.draw(st.lists(st.integers(0, len(stream)), max_size=6)))
    frames = Frames()
    found = []
    for start, end in zip([0, *cuts], [*cuts, len(stream)], strict=True):
        frames.receive_data(stream[start:end])
        found += values(frames)
    assert frames.greeted
    assert found == sent


def test_nothing_is_read_before_the_magic_word() -> None:
    frames = Frames()
    frames.receive_data(GREETING[:3])
    assert not frames.greeted
    assert frames.next_value() is NOTHING


@pytest.mark.parametrize("word", [b"\x71\xf2\x0f\x00", b"GET ", b"\0\0\0\0"])
def test_another_magic_word_is_refused(word: bytes) -> None:
    with pytest.raises(RemoteProtocolError, match="magic word 0x2f271, got"):
        Frames().receive_data(word + b"more")


@pytest.mark.parametrize("length", [0, -1, (64 << 10) + 1, (1 << 20) + 1, 2**31 - 1])
def test_a_request_has_one_byte_to_64_kib(length: int) -> None:
    frames = Frames()
    frames.receive_data(GREETING + struct.pack("<i", length))
    with pytest.raises(RemoteProtocolError, match=f"got {length}"):
        frames.next_value()


@pytest.mark.parametrize("text", [b"{", b"\xff\xfe", b"[" * 10_000, b"NaN", b"[Infinity]", b"9" * 10_000])
def test_what_is_no_json_is_refused(text: bytes) -> None:
    frames = Frames()
    frames.receive_data(GREETING + struct.pack("<i", len(text)) + text)
    with pytest.raises(RemoteProtocolError, match="expected JSON"):
        frames.next_value()


def test_json_that_is_deep_beyond_the_interpreters_depth_is_refused() -> None:
    frames = Frames(of_tracker=True)
    text = b"[" * 300_000 + b"]" * 300_000
    frames.receive_data(GREETING + struct.pack("<i", len(text)) + text)
    with pytest.raises(RemoteProtocolError, match="expected JSON"):
        frames.next_value()


GOOD = [
    ([1], Ping()),
    ([1, "more"], Ping()),
    ([2, "key"], Stop("key")),
    ([3, "k", [9091, "k:1"]], Put("k", 9091, "k:1")),
    ([3, "k", [9091, "k:1"], None], Put("k", 9091, "k:1")),
    ([3, "k", [9091, "k:1"], "host", {}], Put("k", 9091, "k:1", "host")),
    ([3, "k", ["9091", "k:1"], ""], Put("k", 9091, "k:1")),
    ([4, "k", "", 1], RequestBoard("k")),
    ([4, "k", None, 1], RequestBoard("k")),
    ([4, "k", "me", 2.5, {"rpcnb": "1.7"}], RequestBoard("k", "me", 2.5, True)),
    ([4, "k", "", 1, {"rpcnb": "2.0"}], RequestBoard("k")),
    ([4, "k", "", 1, {"rpcnb": 1}], RequestBoard("k")),
    ([5, {"key": "server:k", "addr": [None, 1]}], UpdateInfo({"key": "server:k", "addr": [None, 1]})),
    ([5, {"key": "server:cpp", "addr": [None, "9090"]}], UpdateInfo({"key": "server:cpp", "addr": [None, 9090]})),
    ([5, {"addr": ["", 1]}], UpdateInfo({"addr": [None, 1]})),
    ([5, {"other": [1]}], UpdateInfo({"other": [1]})),
    ([5, {"rpcnb": {"sessions": [1]}}], UpdateInfo({"rpcnb": {"sessions": []}})),
    ([5, {"rpcnb": 5}], UpdateInfo({"rpcnb": None})),
    ([6], Summary()),
    ([6, {"rpcnb": "1.0"}], Summary(True)),
    ([7], PendingKeys()),
]


@pytest.mark.parametrize(("value", "request_"), GOOD, ids=lambda one: json.dumps(one) if isinstance(one, list) else "")
def test_requests_are_read(value: list[Any], request_: Any) -> None:
    assert parse_request(value) == request_


BAD: list[Any] = [
    1,
    None,
    {},
    [],
    ["1"],
    [True],
    [8],
    [-1],
    [2],
    [2, 1],
    [3, "k"],
    [3, "k", [1]],
    [3, "k", ["x", "k:1"]],
    [3, "k", [70000, "k:1"]],
    [3, "k", [1, 2]],
    [3, 1, [1, "k:1"]],
    [3, "k" * 5000, [1, "k:1"]],
    [4, "k", "user", 10**400],
    [3, "k", [1, "k:1"], 7],
    [3, "k", 5],
    [4, "k"],
    [4, "k", "", "high"],
    [4, "k", "", True],
    [4, "k", "", 1e999],
    [4, "k", 1, 1],
    [5],
    [5, []],
    [5, {"key": 1}],
    [5, {"addr": 1}],
    [5, {"addr": [1, 1]}],
    [5, {"addr": ["h", "x"]}],
    [5, {"x": "y" * 20_000}],
    [5, {"x": float("inf")}],
    [5, {"x": [[[[[[[[[[[[[[[[[1]]]]]]]]]]]]]]]]]}],
    [5, {"key": "server:\ud800"}],
    [5, {"addr": ["two words", 1]}],
    [2, "\ud800"],
    [3, "k", [1, "two words"]],
    [3, "k", [1, "k" * 1000]],
    [3, "k", [1, "k:1"], "\x1b[2J"],
    [3, "k", [1, "k:1"], "h" * 256],
    [4, "k", "", 10**400],
]


@pytest.mark.parametrize("value", BAD, ids=lambda one: json.dumps(one)[:30])
def test_what_is_no_request_is_refused(value: Any) -> None:
    with pytest.raises(RemoteProtocolError, match="expected a"):
        parse_request(value)


@given(JSON)
def test_whatever_is_asked_gives_a_request_or_a_typed_error(value: Any) -> None:
    text = "no error"
    try:
        parse_request(value)
    except RemoteProtocolError as error:
        text = str(error)
    assert len(text) < 200


def test_what_is_as_deep_as_the_interpreter_allows_is_refused_with_a_short_text() -> None:
    deep: Any = []
    for _ in range(5000):
        deep = [deep]
    with pytest.raises(RemoteProtocolError, match="expected a request of a known shape, got something deep"):
        parse_request([5, {"x": deep}])
    with pytest.raises(RemoteProtocolError, match="expected a request of a known shape, got something deep"):
        parse_request([99, deep])


def test_a_board_is_asked_for_as_stock_does() -> None:
    assert play(request_board("k"), [0, ["h", 1, "k:1"]]) == ([[4, "k", "", 1]], ("h", 1, "k:1"))


def test_the_place_in_the_queue_is_told_while_one_waits() -> None:
    places: list[tuple[int, int]] = []
    flow = request_board("k", "me", 2, lambda place, length: places.append((place, length)))
    told = [[PLACE, {"place": 2, "of": 3}], [PLACE, {"place": 1, "of": 3}]]
    sent, result = play(flow, *told, [0, ["h", 1, "k:1"]])
    assert sent == [[4, "k", "me", 2, {"rpcnb": "1.0"}], None, None]
    assert places == [(2, 3), (1, 3)]
    assert result == ("h", 1, "k:1")


@pytest.mark.parametrize(
    "reply", [0, -1, [0], [1, ["h", 1, "k"]], [0, ["h", "x", "k"]], [0, [1, 1, "k"]], [0, 7], [100, {"place": 1}]]
)
def test_another_answer_to_a_request_is_refused(reply: Any) -> None:
    with pytest.raises(RemoteProtocolError, match=r"expected \[0, \[host"):
        play(request_board("k"), reply)


@pytest.mark.parametrize("place", [{"place": 1}, {"place": "x", "of": 1}, {"place": 10**400, "of": 1}, [], None, "12"])
def test_a_place_that_is_none_is_refused(place: Any) -> None:
    with pytest.raises(RemoteProtocolError, match=r"expected \[100, "):
        play(request_board("k", told=lambda place, length: None), [PLACE, place])


def test_the_summary_is_asked_for() -> None:
    found: dict[str, Any] = {"queue_info": {}, "server_info": []}
    assert play(ask_summary(False), [0, found]) == ([[6]], found)
    assert play(ask_summary(), [0, found]) == ([[6, {"rpcnb": "1.0"}]], found)


def test_a_summary_that_a_stock_tracker_passes_on_from_strangers_is_read() -> None:
    frames = Frames(of_tracker=True)
    text = b'[0, {"queue_info": {}, "server_info": [{"key": "server:a", "addr": ["h", "9090"], "x": Infinity}, 5]}]'
    text += b" " * (2 << 20)
    frames.receive_data(GREETING + struct.pack("<i", len(text)) + text)
    (reply,) = values(frames)
    server = {"key": "server:a", "addr": ["h", 9090]}
    assert play(ask_summary(False), reply)[1] == {"queue_info": {}, "server_info": [server]}


def test_match_keys_of_all_the_boards_of_a_connection_fit_into_a_frame() -> None:
    long = "k" * 998
    assert can_be_listed(long)
    assert not can_be_listed(long + "k")
    assert len(encode_frame([long] * 1024)) - 4 <= 1 << 20


@pytest.mark.parametrize("reply", [0, [1, {}], [0, {}], [0, {"queue_info": [], "server_info": []}], [0, []]])
def test_another_summary_is_refused(reply: Any) -> None:
    with pytest.raises(RemoteProtocolError, match=r"expected \[0, summary\]"):
        play(ask_summary(), reply)


def test_a_board_tells_of_itself_and_offers_sessions() -> None:
    assert play(tell_info({"key": "server:k"}), 0) == ([[5, {"key": "server:k"}]], None)
    assert play(put_board("k", 1, "k:1"), 0) == ([[3, "k", [1, "k:1"], None]], None)
    with pytest.raises(RemoteProtocolError, match="expected 0 from the tracker, got -1"):
        play(put_board("k", 1, "k:1", "h"), -1)


def test_a_board_asks_for_its_keys() -> None:
    assert play(ask_pending_keys(), ["a", "b"]) == ([[7]], {"a", "b"})
    wrong: Any
    for wrong in (0, [1], {}):
        with pytest.raises(RemoteProtocolError, match="expected match keys"):
            play(ask_pending_keys(), wrong)
