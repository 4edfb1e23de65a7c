"""What a panel shows, folded from events and facts, and how that looks without a widget."""

from __future__ import annotations

from typing import Any

import pytest

from rpcnb import events
from rpcnb.jupyter import models
from rpcnb.jupyter.models import MOST_ROWS, Facts, PanelModel
from rpcnb.jupyter.statichtml import Html, show_bytes, show_html, show_span, show_text

EPOCH = 1000.0


def finished(call: int, seconds: float, function: str = "demo.add") -> events.CallFinished:
    return events.CallFinished(source="s", time=1.0, call=call, function=function, seconds=seconds)


def transfer(kind: Any, at: float, **facts: Any) -> Any:
    return kind(source="s", time=at, transfer=7, what="(4,) float32", direction="up", moved=16, total=16, **facts)


def names(snapshot: dict[str, Any], section: str) -> list[Any]:
    return [row["id"] for row in snapshot[section]["rows"]]


def test_latencies_are_of_the_users_own_calls() -> None:
    model = PanelModel(EPOCH)
    assert model.update(finished(1, 0.00123456))
    for number, function in enumerate(("copy_to", "get_function demo.add", "map demo.add"), 2):
        model.update(finished(number, 5.0, function))
    model.update(transfer(events.TransferStarted, 0.0))
    model.update(finished(7, 5.0, "upload.bin"))  # a transfer
    model.update(finished(8, 0.2))
    sessions = model.snapshot(Facts(sessions=[{"name": "s"}, {"name": "other"}]))["sessions"]["rows"]
    assert [row["latencies"] for row in sessions] == [[1.23, 200.0], []]


def test_the_latencies_of_a_session_end_with_it() -> None:
    model = PanelModel(EPOCH)
    model.update(finished(1, 0.2))
    model.update(events.SessionClosed(source="s", time=0.0, peer="p", reason=""))
    (row,) = model.snapshot(Facts(sessions=[{"name": "s"}]))["sessions"]["rows"]
    assert row["latencies"] == []


def test_what_changes_nothing_is_said_to() -> None:
    model = PanelModel(EPOCH)
    assert not model.update(events.CallSent(source="s", time=0.0, call=1, function="f"))
    assert not model.update(transfer(events.TransferProgress, 0.0))
    assert model.update(events.SessionClosed(source="s", time=0.0, peer="p", reason=""))


def test_a_finished_transfer_fades() -> None:
    model = PanelModel(EPOCH)
    model.update(transfer(events.TransferStarted, 1.0))
    model.update(transfer(events.TransferFinished, 2.0, error=""))
    (row,) = model.snapshot(Facts())["transfers"]["rows"]
    assert (row["state"], row["ended"]) == ("done", EPOCH + 2.0)
    assert model.fades(3.0)
    assert not model.fades(4.5)
    assert names(model.snapshot(Facts()), "transfers") == []


def test_a_brief_one_is_not_shown_at_all() -> None:
    model = PanelModel(EPOCH)
    model.update(transfer(events.TransferStarted, 1.0))
    model.update(transfer(events.TransferFinished, 1.1, error=""))
    assert names(model.snapshot(Facts()), "transfers") == []


def test_a_failed_one_stays_with_its_reason_until_it_is_dismissed() -> None:
    model = PanelModel(EPOCH)
    model.update(transfer(events.TransferFinished, 1.0, error="no space"))
    assert not model.fades(1000.0)
    (row,) = model.snapshot(Facts())["transfers"]["rows"]
    assert (row["state"], row["error"]) == ("failed", "no space")
    model.update(transfer(events.TransferFinished, 1.0, error="cancelled"))
    (row,) = model.snapshot(Facts())["transfers"]["rows"]
    assert (row["state"], "error" in row) == ("cancelled", False)
    model.dismiss(7)
    model.dismiss(7)
    assert names(model.snapshot(Facts()), "transfers") == []


def test_long_texts_are_cut() -> None:
    model = PanelModel(EPOCH)
    model.update(transfer(events.TransferFinished, 1.0, error="x" * 10_000_000))
    (row,) = model.snapshot(Facts())["transfers"]["rows"]
    assert row["error"] == "x" * 200 + "…"


def test_the_last_failures_are_kept_and_old_beginnings_forgotten() -> None:
    model = PanelModel(EPOCH)
    for number in range(MOST_ROWS * 4 + 30):
        event = events.TransferStarted(
            source="s", time=0.0, transfer=number, what="f", direction="up", moved=0, total=0
        )
        model.update(event)
        if number < 20:
            facts = {"what": "f", "direction": "up", "moved": 0, "total": 0}
            model.update(events.TransferFinished(source="s", time=1.0, transfer=number, error="no", **facts))  # type: ignore[arg-type]
    assert len(names(model.snapshot(Facts()), "transfers")) == models._MOST_FAILED
    model.update(transfer(events.TransferFinished, 1.0, error="no"))
    assert len(model._started) <= MOST_ROWS * 4


def test_a_transfer_that_is_listed_is_not_listed_twice() -> None:
    model = PanelModel(EPOCH)
    model.update(transfer(events.TransferFinished, 1.0, error="no"))
    assert names(model.snapshot(Facts(transfers=[{"id": 7}])), "transfers") == [7]


def test_sections_are_capped() -> None:
    rows = [{"id": number} for number in range(MOST_ROWS + 3)]
    found = PanelModel(EPOCH).snapshot(Facts(pending=rows))["pending"]
    assert (len(found["rows"]), found["more"]) == (MOST_ROWS, 3)


# -- without a widget ------------------------------------------------------------------------------------------------

EVIL = "<script>alert(1)</script>"
UP = {"id": 1, "way": "up", "what": EVIL, "session": "s", "moved": 5, "total": 10}
DOWN = {"id": 2, "way": "down", "what": "f", "session": "s", "moved": 5, "total": 0}
TRAFFIC = {"peer": "p", "kind": "rpcnb", "sent": 1, "received": 2, "held": 3}
SNAPSHOT: dict[str, Any] = {
    "jobs": {
        "rows": [
            {
                "name": "burnin",
                "session": "session-1",
                "state": "failed",
                "since": 90.0,
                "ended": 95.0,
                "output": 2000,
                "function": "work",
                "error": "ValueError: no",
            },
        ],
        "more": 0,
    },
    "transfers": {
        "rows": [{**UP, "rate": 2e6, "state": "copying"}, {**DOWN, "state": "failed", "error": "no"}],
        "more": 2,
    },
    "pending": {
        "rows": [
            {"function": "f", "session": "s", "state": "sent", "since": 90.0, "waits": "the link"},
            {"function": "g", "session": "s", "state": "done", "since": 90.0, "ended": 91.5, "waits": ""},
        ],
        "more": 0,
    },
    "sessions": {
        "rows": [
            {**TRAFFIC, "name": "s", "key": "k", "state": "ready", "expires": 130.0},
            {**TRAFFIC, "name": "t", "key": "", "state": "lost", "error": "gone"},
        ],
        "more": 0,
    },
    "devices": {"rows": [{"tracker": "farm", "board": "b", "key": "k", "state": "free"}], "more": 0},
    "servers": {
        "rows": [
            {"address": "a", "key": "k", "functions": 2, "clients": [{"peer": "c", "state": "idle", "function": ""}]},
            {"address": "b", "key": "", "functions": 2, "clients": [], "busy": 3},
        ],
        "more": 0,
    },
}
EMPTY = {name: {"rows": [], "more": 0} for name in SNAPSHOT}


def test_a_snapshot_as_text() -> None:
    text = show_text(SNAPSHOT, 100.0)
    assert "5 B of 10 B  2 MB/s  copying" in text
    assert "  and 2 more" in text
    assert "f  s  sent  10 s  waits for the link" in text
    assert "g  s  done  1.5 s" in text
    assert "ends in 30 s" in text
    assert "3 B held  gone" in text
    assert "farm  b  k  free" in text
    assert "a  key k  2 functions  c idle" in text
    assert "the kernel is busy with a cell" in text
    assert "burnin  session-1  failed  5.0 s  work  2 KB printed  ValueError: no" in text
    assert "%rpc_connect demo" in show_text(EMPTY, 0.0)
    assert show_text({**EMPTY, "sections": ["transfers"]}, 0.0) == "nothing to show"


def test_a_snapshot_as_html_is_escaped_and_needs_nothing() -> None:
    html = show_html({**SNAPSHOT, "sections": ["transfers"]}, 100.0, "a <note>")
    assert EVIL not in html
    assert "&lt;script&gt;" in html
    assert "and 2 more" in html
    assert "a &lt;note&gt;" in html
    assert "Sessions" not in html
    assert "%rpc_connect" in show_html(EMPTY, 0.0)


def test_html_without_text() -> None:
    assert Html("<b>x</b>")._repr_mimebundle_() == {"text/plain": "", "text/html": "<b>x</b>"}
    assert repr(Html("x")) == ""


@pytest.mark.parametrize(
    ("nbytes", "text"), [(0, "0 B"), (999, "999 B"), (1500, "1.5 KB"), (2e6, "2 MB"), (3e9, "3 GB"), (4e12, "4 TB")]
)
def test_sizes(nbytes: float, text: str) -> None:
    assert show_bytes(nbytes) == text


@pytest.mark.parametrize(
    ("seconds", "text"), [(-1, "0.0 s"), (1.25, "1.2 s"), (59.6, "60 s"), (600, "10 min"), (7200, "2.0 h")]
)
def test_durations(seconds: float, text: str) -> None:
    assert show_span(seconds) == text
