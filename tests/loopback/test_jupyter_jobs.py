"""``%rpc_jobs``, ``%%rpc --detach``, ``%rpc_restart`` and the panel's jobs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from conftest import eventually
from test_jupyter_magics import Cell
from test_server_isolation import TOKEN, start

from rpcnb.jupyter.actions import act
from rpcnb.jupyter.bridge import BRIDGE
from rpcnb.jupyter.facts import Scope
from rpcnb.jupyter.sessions import BOOK
from rpcnb.jupyter.statichtml import show_html

__all__ = ["start"]


@pytest.fixture
def cell(shell: Any, start: Callable[..., Any], capsys: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[Cell]:
    """A shell that is connected to a board whose sessions have processes of their own."""
    monkeypatch.setenv("RPCNB_NONINTERACTIVE", "1")
    board = start(allow_exec=True)
    running = Cell(shell, capsys)
    BOOK.tokens[board.address] = TOKEN  # as if it had been asked for
    running(f"%rpc_connect {board.address}")
    assert BOOK.current is not None, running.err
    yield running
    BOOK.close_all()
    BOOK.asked.clear()
    BOOK.tokens.clear()


def test_a_detached_cell_is_listed_followed_and_its_result_bound(cell: Cell) -> None:
    cell("%rpc_jobs")
    assert "no jobs; begin one with %%rpc --detach NAME" in cell.out
    job = cell("%%rpc --detach burnin\nprint('a line')\n6 * 7")
    assert job.name == "burnin"
    cell("%rpc_jobs burnin --follow")
    assert "a line\n" in cell.out
    cell("%rpc_jobs burnin --out answer")
    assert cell("answer") == 42
    assert cell("%rpc_jobs burnin").facts["state"] == "done"
    cell("%rpc_jobs")
    words = cell.out.split()
    assert (words[0], words[1], words[4:]) == ("burnin", "done", ["a", "cell"])
    cell("%rpc_jobs burnin --forget")
    assert cell.out == "forgot burnin\n"
    cell("%rpc_jobs")
    assert "no jobs" in cell.out


def test_all_that_is_asked_of_a_job_is_done(cell: Cell) -> None:
    cell("%%rpc --detach one\nprint('a line')\n5")
    cell("%rpc_jobs one --follow --out answer --forget")
    assert cell.out == "a line\nforgot one\n"
    assert cell("answer") == 5
    cell("%%rpc --detach two\nimport time\ntime.sleep(600)")
    cell("%rpc_jobs two --cancel --forget")
    assert cell.out == "two was cancelled\nforgot two\n"


def test_a_crashed_session_begins_afresh(cell: Cell, caplog: pytest.LogCaptureFixture) -> None:
    cell("%%rpc\nimport os\nos._exit(3)")
    assert "exited with code 3" in cell.err
    cell("%rpc_restart")
    assert "begins afresh" in cell.out
    assert str(cell("%rpc 1 + 1")) == "2"
    cell("%rpc_restart --session nobody")
    assert "no session nobody" in cell.err
    caplog.clear()


def test_a_job_is_cancelled_and_a_failed_one_says_why(cell: Cell) -> None:
    cell("%%rpc --detach long\nimport time\ntime.sleep(600)")
    cell("%rpc_jobs long --cancel")
    assert cell.out == "long was cancelled\n"
    cell("%rpc_jobs long --cancel")
    assert cell.out == "long had ended\n"
    job = cell("%%rpc --detach wrong\n1 / 0")
    eventually(lambda: job.state == "failed")
    cell("%rpc_jobs")
    assert [line.split()[:2] for line in cell.out.splitlines()] == [["long", "cancelled"], ["wrong", "failed"]]
    assert cell.out.splitlines()[1].endswith("ZeroDivisionError: division by zero")


@pytest.mark.parametrize(
    ("source", "text"),
    [
        ("%rpc_jobs --follow", "expected the name of a job"),
        ("%rpc_jobs nobody", "no job 'nobody'"),
        ("%rpc_jobs nobody --out 2x", "--out expects a variable's name, got '2x'"),
        ("%%rpc --detach a --out b\n1", "--detach goes alone"),
        ("%%rpc --detach a/b\n1", "expected a job's name of letters, digits"),
    ],
)
def test_a_wrong_line_is_told_in_one(cell: Cell, source: str, text: str) -> None:
    cell(source)
    assert text in cell.err + cell.out
    assert "Traceback" not in cell.err + cell.out


def test_restarting_is_a_fresh_process(cell: Cell) -> None:
    session = BOOK.find(None)
    before = session.call("b.pid")
    cell("%rpc x = 1")
    cell("%rpc_restart")
    assert "begins afresh at" in cell.out
    assert session.call("b.pid") != before
    cell("%rpc x")
    assert "NameError: name 'x' is not defined" in cell.out + cell.err


def test_the_panel_shows_jobs_and_a_click_cancels_one(cell: Cell) -> None:
    job = cell("%%rpc --detach long\nimport time\ntime.sleep(600)")
    BRIDGE.ask_now()
    (row,) = BRIDGE.snapshot(Scope())["jobs"]["rows"]
    assert (row["name"], row["state"], row["function"]) == ("long", "running", "a cell")
    assert "long" in show_html(BRIDGE.snapshot(Scope()), 0.0)
    act({"op": "cancel_job", "session": row["session"], "name": "nobody's"})
    act({"op": "cancel_job", "session": row["session"], "name": "long"})
    eventually(lambda: job.state == "cancelled")
    BRIDGE.ask_now()
    assert BRIDGE.snapshot(Scope())["jobs"]["rows"][0]["state"] == "cancelled"
