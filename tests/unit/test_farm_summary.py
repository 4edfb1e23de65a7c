"""A tracker's summary, cut and read."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rpcnb.farm.summary import cut_summary, is_plain, read_port, read_summary, read_told

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.sampled_from(["key", "addr", "rpcnb", "sessions", "limit", "holders", "since"]), inner)
    ),
    max_leaves=12,
)
NOTHING: dict[str, Any] = {"queue_info": {}, "server_info": []}


def queue(rank: int, key: str) -> tuple[int, str]:
    return rank, f'{json.dumps(key)}: {{"free": 1, "pending": 0}}'


def test_a_small_summary_is_whole_and_as_pythons_json_writes_it() -> None:
    servers = ['{"key": "server:k"}', '{"key": "server:b"}']
    whole = {
        "queue_info": {"k": {"free": 1, "pending": 0}, "b": {"free": 1, "pending": 0}},
        "server_info": [{"key": "server:k"}, {"key": "server:b"}],
    }
    assert cut_summary([queue(0, "k"), queue(0, "b")], servers, None) == json.dumps(whole)
    text = cut_summary([queue(0, "k"), queue(0, "b")], servers, ['{"free": 1}'])
    assert text == json.dumps({**whole, "boards": [{"free": 1}]})


@pytest.mark.parametrize("boards", [False, True])
def test_a_giant_summary_fits_into_a_frame_and_counts_what_is_left_out(boards: bool) -> None:
    long = [json.dumps({"key": "server:a", "x": "y" * 16_000}) for _ in range(500)]
    short = [json.dumps({"key": f"server:{number}"}) for number in range(100)]
    queues = [queue(number, f"{number}" + "k" * 4000) for number in range(1000)] + [queue(0, "rpi")]
    text = cut_summary(queues, long + short, long + short if boards else None)
    assert len(text) <= 1 << 20
    found = json.loads(text)
    assert found["queue_info"]["rpi"] == {"free": 1, "pending": 0}
    assert [one["key"] for one in found["server_info"] if "x" not in one] == [f"server:{n}" for n in range(100)]
    left_out = {
        "server_info": 600 - len(found["server_info"]),
        "queue_info": 1001 - len(found["queue_info"]),
        **({"boards": 600 - len(found["boards"])} if boards else {}),
    }
    assert found["left_out"] == left_out
    assert min(left_out.values()) > 0


def test_very_many_short_entries_fit_too() -> None:
    text = cut_summary(
        [queue(0, str(number)) for number in range(100_000)], ["{}"] * 300_000, [json.dumps("b")] * 300_000
    )
    assert len(text) <= 1 << 20
    json.loads(text)


def test_many_keys_of_one_connection_go_behind_those_of_others() -> None:
    stranger = [queue(rank, f"s{rank}" + "k" * 100) for rank in range(20_000)]
    others = [queue(0, f"board {number}" + "k" * 600) for number in range(100)]
    found = json.loads(cut_summary(stranger + others, [], None))
    assert sum(key.startswith("board") for key in found["queue_info"]) == 100


@pytest.mark.parametrize("value", [None, 1, 10**400, "text", [1, [2.5]], {"a": {"b": []}}])
def test_what_every_reader_can_read_is_plain(value: Any) -> None:
    assert is_plain(value)


def deep(levels: int) -> Any:
    return [deep(levels - 1)] if levels else 1


@pytest.mark.parametrize("value", [float("inf"), [float("nan")], {"a": [{"b": -float("inf")}]}, deep(17)])
def test_numbers_that_are_none_and_depth_are_not_plain(value: Any) -> None:
    assert is_plain(deep(16))
    assert not is_plain(value)


def test_ports_may_be_text_as_cpp_boards_send_them() -> None:
    assert (read_port(9090), read_port("9090"), read_port(0)) == (9090, 9090, 0)
    wrong: Any
    for wrong in ("", "x", "-1", " 1", "70000", "999999", "\u0663", 1.5, True, None, [1], 65536, -1):
        with pytest.raises(ValueError, match="expected a port of 0 to 65535"):
            read_port(wrong)


def test_a_summary_of_the_known_shape_is_read_as_it_is() -> None:
    told = {"instance": "i", "token": True, "sessions": [{"peer": "h:2", "limit": 5.0}, {"peer": "h:3", "limit": None}]}
    board = {
        "key": ["k"],
        "addr": ["h", 1],
        "state": "busy",
        "free": 0,
        "holders": [{"name": "me", "key": "k", "since": 3.0}],
        "rpcnb": {**told, "draining": ["train"]},
    }
    summary = {
        "queue_info": {"k": {"free": 1, "pending": 2}},
        "server_info": [{"key": "server:k", "addr": ["h", 1], "rpcnb": told}, {"key": "server:b", "addr": ["h", 2]}],
        "boards": [board, {**board, "rpcnb": None}],
        "left_out": {"queue_info": 3},
    }
    assert read_summary(summary) == summary


def test_what_is_not_of_the_shape_is_left_out_and_nothing_else() -> None:
    good = {"key": "server:k", "addr": ["h", 1]}
    wrong: list[Any] = [5, None, [], {}, {"key": 1, "addr": ["h", 1, 2]}, {"key": "server:c", "addr": ["h", "9090"]}]
    read = read_summary({"queue_info": {"a": 1, "k": {"free": "x"}}, "server_info": [*wrong, good], "boards": [{}, 1]})
    assert read["queue_info"] == {"k": {"free": 0, "pending": 0}}
    assert read["server_info"] == [
        {"key": "", "addr": None},
        {"key": "", "addr": None},
        {"key": "server:c", "addr": ["h", 9090]},
        good,
    ]
    nobody: dict[str, Any] = {"key": [], "addr": None, "state": "", "free": 0, "holders": [], "rpcnb": None}
    assert read["boards"] == [nobody]
    assert read_summary({"server_info": [{"addr": ["h", "x"]}]})["server_info"] == [{"key": "", "addr": None}]


@pytest.mark.parametrize("told", [5, [1], "text", None])
def test_who_says_nothing_of_the_shape_says_nothing(told: Any) -> None:
    assert read_told(told) is None


def test_what_a_board_says_of_itself_is_cut() -> None:
    sessions = [5, {"limit": "x"}, {"limit": 10**400, "peer": "p" * 5000}, {"limit": -1}, {"limit": 2}] + [{}] * 5000
    told = read_told({"instance": "i" * 5000, "token": "yes", "sessions": sessions, "more": 1})
    assert told is not None
    assert set(told) == {"instance", "sessions"}
    assert len(told["instance"]) == 256
    assert [one["limit"] for one in told["sessions"][:4]] == [None, None, None, 2]
    assert (len(told["sessions"]), len(told["sessions"][1]["peer"])) == (64, 256)
    assert read_told({"sessions": 5}) == {"sessions": []}


@given(JSON)
def test_whatever_comes_is_read(value: Any) -> None:
    for one in (value, {"queue_info": value, "server_info": value, "boards": value, "left_out": value}):
        read = read_summary(one)
        assert read.keys() >= NOTHING.keys()
        assert read_summary(read) == read
    assert read_summary(5) == NOTHING
