"""The magics in a real IPython shell, without a front end."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import eventually
from IPython.core.interactiveshell import InteractiveShell

import rpcnb
from rpcnb.jupyter.displays import session_html
from rpcnb.jupyter.sessions import BOOK
from rpcnb.runtime.registry import Registry


@pytest.fixture(scope="module")
def shell() -> Iterator[Any]:
    made = InteractiveShell.instance()
    made.run_line_magic("load_ext", "rpcnb")
    yield made
    made.run_line_magic("unload_ext", "rpcnb")
    if made.history_manager is not None:
        made.history_manager.end_session()
    InteractiveShell.clear_instance()


@pytest.fixture(autouse=True)
def _closed(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("RPCNB_NONINTERACTIVE", "1")
    yield
    BOOK.close_all()
    BOOK.asked.clear()
    BOOK.tokens.clear()


class Cell:
    """Run a cell, and look at what it printed and returned."""

    def __init__(self, shell: Any, capsys: pytest.CaptureFixture[str]) -> None:
        self.shell = shell
        self.capsys = capsys

    def __call__(self, source: str) -> Any:
        outcome = self.shell.run_cell(source)
        captured = self.capsys.readouterr()
        self.out, self.err = captured.out, captured.err
        return outcome.result


@pytest.fixture
def cell(shell: Any, capsys: pytest.CaptureFixture[str]) -> Cell:
    return Cell(shell, capsys)


@pytest.fixture
def address(serve: Callable[..., Any], registry: Registry) -> str:
    registry.register("demo.add", lambda a, b: a + b)
    return str(serve(key="rpi").address)


def test_connect_returns_the_session_and_prints_one_line(cell: Cell, address: str) -> None:
    session = cell(f"%rpc_connect {address} --key rpi")
    assert session.fn.demo.add(1, 2) == 3
    assert cell.out.splitlines()[0] == f"connected to {address}, key rpi (rpcnb)"


def test_connecting_again_gives_the_same_session_and_new_another(cell: Cell, address: str) -> None:
    first = cell(f"%rpc_connect {address} --key rpi")
    assert cell(f"%rpc_connect {address} --key rpi") is first
    assert cell.out.startswith("still connected")
    second = cell(f"%rpc_connect {address} --key rpi --new")
    assert second is not first
    assert BOOK.current is second


def test_as_binds_a_variable(cell: Cell, address: str) -> None:
    assert cell(f"%rpc_connect {address} --key rpi --as board") is None
    assert cell("board.name") == "board"
    cell(f"%rpc_connect {address} --key rpi --as 2nd")
    assert "expects a variable's name" in cell.err


def test_sessions_functions_and_close(cell: Cell, address: str) -> None:
    cell("%rpc_sessions")
    assert "no session is open" in cell.out
    cell("%rpc_functions")
    assert "connect with %rpc_connect" in cell.err
    session = cell(f"%rpc_connect {address} --key rpi")
    cell("%rpc_sessions")
    assert cell.out == f"* {session.name}: {address}, ready\n"
    cell("%rpc_functions demo.*")
    assert cell.out == "demo.add\n"
    cell("%rpc_close")
    assert cell.out == f"closed {session.name}\n"
    cell("%rpc_close")
    assert "no session" in cell.err
    cell("%rpc_close --all")
    assert cell.out == "no session was open\n"


def test_errors_are_one_line_and_help_is_help(cell: Cell, address: str, caplog: pytest.LogCaptureFixture) -> None:
    cell("%rpc_connect 127.0.0.1:1")
    assert cell.err.count("\n") == 1
    assert "connection refused" in cell.err
    cell(f"%rpc_connect {address} --key other")
    assert "wrong key or token" in cell.err
    assert "wrong key or token" in caplog.text
    caplog.clear()
    cell("%rpc_connect --nonsense")
    assert "unrecognized arguments" in cell.err
    cell("%rpc_connect --help")
    assert "--token-file" in cell.out


def test_a_token_comes_from_a_file(
    cell: Cell, serve: Callable[..., Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    server = serve(token="secret-1")
    (tmp_path / "token").write_text("secret-1\n")
    session = cell(f"%rpc_connect {server.address} --token-file {tmp_path / 'token'}")
    assert session.state == "ready"
    cell(f"%rpc_connect {server.address} --new")
    assert "wrong key or token" in cell.err
    assert "secret-1" not in caplog.text
    caplog.clear()


def test_a_token_is_asked_for_once(
    cell: Cell, serve: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    server = serve(token="secret-2")
    asked: list[str] = []
    monkeypatch.delenv("RPCNB_NONINTERACTIVE")

    def answer(prompt: str) -> str:
        asked.append(prompt)
        return "secret-2"

    monkeypatch.setattr("getpass.getpass", answer)
    assert cell(f"%rpc_connect {server.address}").state == "ready"
    assert cell(f"%rpc_connect {server.address} --new").state == "ready"
    assert asked == [f"token of {server.address}: "]
    assert "secret-2" not in cell.out
    other = serve(token="secret-3")
    cell(f"%rpc_connect {other.address}")
    assert "wrong key or token" in cell.err
    cell(f"%rpc_connect {other.address}")
    assert len(asked) == 2
    caplog.clear()


def test_demo_starts_a_board_that_close_all_stops(cell: Cell) -> None:
    session = cell("%rpc_connect demo")
    assert session.fn.demo.add(1, 2) == 3
    board = BOOK.board
    assert board is not None
    assert cell("%rpc_connect demo") is session
    cell("%rpc_close --all")
    assert not board.alive


def test_without_an_address_the_newest_server_of_this_user_is_taken(
    cell: Cell, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = cell("%rpc_connect")  # none is running: the demo board
    assert session.server_key == "demo"
    BOOK.close_all()


def test_objects_have_escaped_html(cell: Cell, address: str, shell: Any) -> None:
    session = cell(f"%rpc_connect {address} --key rpi")
    session.name = "<script>"
    assert "&lt;script&gt;" in session_html(session)
    formatter = shell.display_formatter.formatters["text/html"]
    for thing in (session, session.get_function("demo.add"), session.empty((2,)), session.call):
        text = formatter(thing)
        assert text is None or "<script>" not in text
    evaluate = session.time_evaluator("demo.add", session.cpu(), number=1)
    assert "repeats" in formatter(evaluate(1, 2))


def test_load_ext_twice_and_unload(cell: Cell, shell: Any) -> None:
    cell("%reload_ext rpcnb")
    assert cell.err == ""
    cell("%unload_ext rpcnb")
    assert "rpc_connect" not in shell.magics_manager.magics["line"]
    cell("%load_ext rpcnb")
    assert "rpc_connect" in shell.magics_manager.magics["line"]


def test_a_trackers_board_is_connected_to_and_given_back(
    cell: Cell, serve: Callable[..., Any], registry: Registry
) -> None:
    registry.register("demo.add", lambda a, b: a + b)
    with rpcnb.Tracker(port=0, silent=True) as tracker:
        server = serve(key="rpi", tracker_addr=tracker.address_pair)
        eventually(lambda: server.registered, "the registration")
        session = cell(f"%rpc_connect tracker://{tracker.address}/rpi")
        assert session.fn.demo.add(1, 2) == 3
        assert cell.out.splitlines()[0] == f"connected to {server.address}, key rpi (rpcnb)"
        assert cell(f"%rpc_connect tracker://{tracker.address}/rpi") is session
        cell("%rpc_close")
        eventually(lambda: tracker.boards[0]["state"] == "free", "its return")
        server.close()


def test_a_servers_web_port_is_connected_to(cell: Cell, serve: Callable[..., Any]) -> None:
    server = serve(web_port=0)
    session = cell(f"%rpc_connect ws://127.0.0.1:{server.web_port}/ws")
    assert session.call("rpc.test.addone", 1) == 2
    cell("%rpc_connect ftp://somewhere")
    assert "expected rpc://host:port/key, tracker://host:port/key" in cell.err
