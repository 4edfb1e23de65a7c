"""A tracker's summary as tables."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rpcnb.farm.devices import device_rows, show_devices


def board(**more: Any) -> dict[str, Any]:
    return {"addr": ["h", 1], "state": "busy", "holders": [{"name": "me@here", "since": 3.2}], **more}


def test_servers_and_queues_are_shown() -> None:
    told = {"sessions": [{"peer": "p", "limit": 60}, {"peer": "q", "limit": None}]}
    summary = {
        "queue_info": {"k": {"free": 0, "pending": 2}},
        "server_info": [{"key": "server:k", "addr": ["h", 1]}, {"key": "server:b", "addr": ["::1", 2], "rpcnb": told}],
        "boards": [board(rpcnb=told)],
    }
    assert show_devices(summary).split("\n") == [
        "server   key  state  since  holder   limit",
        "-------  ---  -----  -----  -------  -----",
        "[::1]:2  b    busy                   60 s",
        "h:1      k    busy   3 s    me@here  60 s",
        "",
        "key  total  free  waiting",
        "---  -----  ----  -------",
        "k    1      0     2",
        "",
    ]


def test_a_board_on_which_something_still_runs_is_draining() -> None:
    server = {"key": "server:k", "addr": ["h", 1], "rpcnb": {"sessions": [], "draining": ["train"]}}
    assert device_rows({"server_info": [server]}) == [("h:1", "k", "draining", "", "", "")]


def test_nothing_is_shown_as_nothing() -> None:
    assert show_devices({}) == "no server\n\nno queue\n"


def test_what_was_left_out_is_said() -> None:
    text = show_devices({"left_out": {"queue_info": 3, "server_info": 2, "other": 1}})
    assert text.endswith("\nleft out, as they are too many: 2 servers, 3 keys\n")


@pytest.mark.parametrize(
    ("said", "shown"),
    [
        ("\x1b]0;owned\x07\x1b[2J", "\\x1b]0;owned\\x07\\x1b[2J"),
        ("a\nfake  row", "a\\nfake  row"),
        ("\u202eback", "\\u202eback"),
        ("\ud800", "\\ud800"),
        ("\u00e4\u4e2d", "\u00e4\u4e2d"),
        ("k" * 5000, "k" * 77 + "..."),
        ("\x1b" * 5000, "\\x1b" * 19 + "\\..."),
    ],
)
def test_what_strangers_say_does_nothing_to_a_terminal(said: str, shown: str) -> None:
    server = {"key": f"server:{said}", "addr": [said, 1]}
    holder = [{"name": said, "key": said, "since": 1}]
    summary = {
        "queue_info": {said: {"free": 1, "pending": 0}},
        "server_info": [server],
        "boards": [board(addr=[said, 1], state=said, holders=holder)],
    }
    text = show_devices(summary)
    assert text.replace("\n", "").isprintable()
    text.encode()
    (row,) = device_rows(summary)
    assert (row[1], row[2], row[4]) == (shown, shown, shown)
    assert max(map(len, row)) <= 80


NONSENSE: dict[str, Any] = {
    "sessions: 5": {"sessions": 5},
    "limit: text": {"sessions": [{"limit": "x"}]},
    "session: 1": {"sessions": [1]},
    "limit: 10**400": {"sessions": [{"limit": 10**400}]},
    "limit: infinite": {"sessions": [{"limit": float("inf")}]},
    "a list": [1],
    "draining: no list": {"draining": 1},
    "draining: a number": {"draining": [1]},
}


@pytest.mark.parametrize("name", NONSENSE)
def test_one_bad_board_never_hides_the_others(name: str) -> None:
    bad = {"key": "server:a", "addr": ["h", 1], "rpcnb": NONSENSE[name]}
    rows = device_rows({"server_info": [bad, {"key": "server:rpi", "addr": ["h", 2]}]})
    assert [row[:2] for row in rows] == [("h:1", "a"), ("h:2", "rpi")]


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(codec=None)),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)


@given(ANYTHING, ANYTHING, ANYTHING)
def test_it_fails_on_nothing(queues: Any, servers: Any, boards: Any) -> None:
    show_devices(queues)
    show_devices({"queue_info": {"k": queues}, "server_info": [servers], "boards": [boards]})
    show_devices(
        {"server_info": [{"key": servers, "addr": boards, "rpcnb": queues}], "boards": [{"holders": [boards]}]}
    )
