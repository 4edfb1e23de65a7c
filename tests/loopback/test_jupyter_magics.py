"""The magics in a real IPython shell, without a front end."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import eventually

import rpcnb
from rpcnb.jupyter.cellmagics import CellMagics
from rpcnb.jupyter.displays import session_html
from rpcnb.jupyter.magics import RpcMagics
from rpcnb.jupyter.serving import stop_serving
from rpcnb.jupyter.sessions import BOOK
from rpcnb.jupyter.workmagics import WorkMagics, histogram
from rpcnb.runtime.registry import Registry
from rpcnb.transport.runfiles import list_servers, publish


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
    board = cell(f"%rpc_connect {address} --key rpi --as board")
    assert cell("board") is board
    assert board.name == "board"
    assert cell(f"%rpc_connect {address} --key rpi") is board, "whatever its name"
    cell(f"%rpc_connect {address} --key rpi --as 2nd")
    assert "expects a variable's name" in cell.err


def test_a_board_that_was_started_again_is_found_with_its_new_token(
    cell: Cell, serve: Callable[..., Any], caplog: pytest.LogCaptureFixture
) -> None:
    board = serve(token="first")
    published = publish(board.port, {**board.whereabouts, "token": "first"})
    session = cell(f"%rpc_connect {board.address}")
    board.close()
    eventually(lambda: session.state == "lost")
    cell("%rpc 1")
    assert f"{session.name} was lost" in cell.err
    assert f"%rpc_connect {board.address} opens it again" in cell.err
    cell("%rpc_sessions")
    assert f"! {session.name}: {board.address}, lost" in cell.out
    again = serve(port=board.port, port_end=board.port + 1, token="second")
    published = publish(again.port, {**again.whereabouts, "token": "second"})
    assert cell(f"%rpc_connect {board.address}") is session
    assert cell.out.startswith(f"reconnected {board.address}")
    again.close()
    eventually(lambda: session.state == "lost")
    caplog.clear()
    third = serve(port=board.port, port_end=board.port + 1, token="third")
    assert published is not None
    published.unlink()
    BOOK.tokens[board.address] = "third"  # as if it had been asked for
    assert cell(f"%rpc_connect {third.address}") is not session
    assert cell.out.startswith("connected to")
    caplog.clear()  # the wrong token that was tried


@pytest.mark.usefixtures("_serves_no_more")
def test_sharing_leaves_the_server_that_runs(cell: Cell, monkeypatch: pytest.MonkeyPatch) -> None:
    server = cell("%rpc_serve --key lab")
    with rpcnb.connect(server.address, key="lab") as session:
        assert cell("%rpc_serve --share") is server
        assert "a colleague cannot reach it" in cell.out
        monkeypatch.setenv("JUPYTERHUB_SERVICE_PREFIX", "/user/alice/")
        monkeypatch.setenv("JUPYTERHUB_PUBLIC_URL", "https://hub.example/user/alice/")
        assert cell("%rpc_serve --share") is server
        assert f"%rpc_connect wss://hub.example/user/alice/proxy/{server.web_port}/ws --key lab" in cell.out
        assert session.state == "ready"
        monkeypatch.delenv("JUPYTERHUB_PUBLIC_URL")
        cell("%rpc_serve --share")
        assert "wss://THE-HUB/user/alice/" in cell.out
        assert "--allow-origin THE-HUB" in cell.out
        other = cell("%rpc_serve --key other --host 0.0.0.0 --share")
        assert f"stopped {server.address} with 1 session: its words were others" in cell.out
        monkeypatch.delenv("JUPYTERHUB_SERVICE_PREFIX")
        cell("%rpc_serve --key other --host 0.0.0.0 --share")
        assert f":{other.port} --key other  (asks for the token" in cell.out
        assert "%rpc_connect 0.0.0.0" not in cell.out


def test_a_line_for_a_named_session(cell: Cell, serve: Callable[..., Any]) -> None:
    server = serve(token="t", allow_exec=True)
    BOOK.tokens[server.address] = "t"
    cell(f"%rpc_connect {server.address} --as one")
    assert cell("%rpc --session one 6 * 7").data == {"text/plain": "42"}
    cell("%rpc --session two 1")
    assert "no session two" in cell.err
    cell("%rpc_functions nosuch*")
    assert cell.out == "no function matches nosuch*\n"


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
    cell(f"%rpc_connect {address} --token canary")
    assert "use a file" in cell.err
    assert "canary" not in cell.err


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


def test_a_token_is_asked_for_once_and_kept_under_a_name(
    cell: Cell,
    serve: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    tmp_path: Path,
) -> None:
    server = serve(token="secret-2")
    asked: list[str] = []
    monkeypatch.delenv("RPCNB_NONINTERACTIVE")

    def answer(prompt: str) -> str:
        asked.append(prompt)
        return "secret-2"

    monkeypatch.setattr("getpass.getpass", answer)
    monkeypatch.setattr("builtins.input", lambda prompt: "bench-07")
    monkeypatch.setenv("RPCNB_CONFIG_DIR", str(tmp_path))
    assert cell(f"%rpc_connect {server.address}").state == "ready"
    assert "from now on %rpc_connect bench-07 is enough" in cell.out
    assert "secret-2" not in cell.out
    assert cell("%rpc_connect bench-07 --new").state == "ready"
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
    assert "expected rpc://host:port/key, rpcs://host:port/key" in cell.err


# -- files and timing ----------------------------------------------------------------------------------------------


def test_files_go_there_and_back(cell: Cell, address: str, tmp_path: Path) -> None:
    (tmp_path / "a.bin").write_bytes(b"a" * 2000)
    (tmp_path / "b.bin").write_bytes(b"b")
    session = cell(f"%rpc_connect {address} --key rpi")
    cell(f"%rpc_upload {tmp_path}/a.bin {tmp_path}/b.bin")
    assert [line.split(" in ")[0] for line in cell.out.splitlines()] == [
        "uploaded a.bin: 2 KB",
        "uploaded b.bin: 1 bytes",
    ]
    cell(f"%rpc_upload {tmp_path}/b.bin --to c.bin")
    assert session.listdir() == ["a.bin", "b.bin", "c.bin"]
    (tmp_path / "back").mkdir()
    cell(f"%rpc_download a.bin c.bin --to {tmp_path}/back")
    assert (tmp_path / "back" / "a.bin").read_bytes() == b"a" * 2000
    assert (tmp_path / "back" / "c.bin").read_bytes() == b"b"
    cell(f"%rpc_download a.bin --to {tmp_path}/other.bin --session {session.name}")
    assert (tmp_path / "other.bin").read_bytes() == b"a" * 2000


def test_a_remote_function_is_measured_at_the_board(
    cell: Cell, serve: Callable[..., Any], registry: Registry, shell: Any
) -> None:
    calls: list[tuple[int, int]] = []

    def add(a: int, b: int) -> int:
        calls.append((a, b))
        return a + b

    registry.register("demo.add", add)
    cell(f"session = %rpc_connect {serve().address}")
    shell.user_ns["x"] = 20
    timing = cell("%rpc_timeit demo.add(x, 2) -n 3 -r 4 -o")
    assert len(timing.results) == 4
    assert set(calls) == {(20, 2)}
    lines = cell.out.splitlines()
    assert lines[0].startswith("demo.add: 4 repeats of 3 calls, ")
    assert lines[1].split() == ["mean", "median", "min", "max", "std"]
    assert lines[3].count("|") == 2
    shell.user_ns["add"] = shell.user_ns["session"].get_function("demo.add")
    assert len(cell("%rpc_timeit -o -n 1 -r 2 add(1, 2)").results) == 2


@pytest.mark.parametrize(
    ("line", "text"),
    [
        ("%rpc_upload nowhere.bin", "nowhere.bin"),
        ("%rpc_upload a b --to c", "--to names one file"),
        ("%rpc_download a b --to nowhere", "must be a folder"),
        ("%rpc_download nothing", "no such file"),
        ("%rpc_timeit 1 + 1", "expected a call"),
        ("%rpc_timeit f(", "expected a call"),
        ("%rpc_timeit nothing.there(1)", "nothing.there"),
        ("%rpc_timeit demo.add(1, 2) --session nobody", "no session nobody"),
        ("%rpc_upload a --wrong", "unrecognized arguments: --wrong"),
    ],
)
def test_work_magics_say_what_is_wrong_in_one_line(cell: Cell, address: str, line: str, text: str) -> None:
    cell(f"%rpc_connect {address} --key rpi")
    cell(line)
    assert text in cell.err
    assert "Traceback" not in cell.err + cell.out


def test_a_histogram_has_a_block_for_each_bin_that_is_not_empty() -> None:
    assert histogram([1.0, 1.0]) == "█"
    assert histogram([0.0, 1.0, 1.0, 1.0]) == "▄  █"
    assert len(histogram([float(value) for value in range(1000)])) == 24


# -- the kernel as a device ----------------------------------------------------------------------------------------


@pytest.fixture
def _serves_no_more() -> Iterator[None]:
    yield
    stop_serving()
    rpcnb.remove_global_func("kernel.greet")


@pytest.mark.usefixtures("_serves_no_more")
def test_a_kernel_serves_what_its_cells_register(cell: Cell) -> None:
    server = cell("%rpc_serve --key mine")
    assert server.token
    assert server.token not in cell.out
    assert f"%rpc_connect {server.address} --key mine" in cell.out
    assert cell("%rpc_serve --key mine") is server, "again is harmless"
    cell("import rpcnb\n@rpcnb.register_func('kernel.greet', override=True)\ndef greet(name): return 'hello ' + name")
    session = cell("%rpc_connect")
    assert session.peer == server.address, "this kernel's server comes first"
    assert session.call("kernel.greet", "you") == "hello you"
    cell("@rpcnb.register_func('kernel.greet')\ndef greet(name): return 'good day ' + name")
    assert session.call("kernel.greet", "you") == "good day you", "also for who holds it"
    assert [one["port"] for one in list_servers()] == [server.port]
    other = cell("%rpc_serve --key other --web-port 0")
    assert server.closed
    assert f"ws://127.0.0.1:{other.web_port}/ws" in cell.out
    words: dict[str, Any] = {"web_port": 0, "token": True, "allow_native": False, "run": "thread", "max_sessions": None}
    assert rpcnb.serve(key="other", **words) is other
    cell("%rpc_serve --stop")
    assert cell.out == "stopped serving\n"
    assert other.closed
    assert list_servers() == []
    cell("%rpc_serve --stop")
    assert cell.out == "this kernel does not serve\n"


@pytest.mark.usefixtures("_serves_no_more")
@pytest.mark.parametrize(
    ("line", "text"),
    [
        ("%rpc_serve --host 0.0.0.0 --no-token", "open to everybody"),
        ("%rpc_serve --run nowhere", "invalid choice"),
        ("%rpc_serve --port 99999", "0 to 65535"),
        ("%rpc_serve --key 'a b'", "without white space"),
    ],
)
def test_serving_wrongly_gives_one_line(cell: Cell, line: str, text: str) -> None:
    cell(line)
    assert text in cell.err
    assert "Traceback" not in cell.err + cell.out


@pytest.mark.usefixtures("_serves_no_more")
def test_serving_without_a_token_says_so(cell: Cell) -> None:
    server = cell("%rpc_serve --no-token")
    assert server.token is None
    assert "whoever can reach this port" in cell.out


# -- every magic (N7) ----------------------------------------------------------------------------------------------

MAGICS = [name for made in (RpcMagics, WorkMagics, CellMagics) for name in made.NAMES]
WITHOUT_SESSION = {
    "%rpc_close": "no session",
    "%rpc_functions": "no session",
    "%rpc_upload a": "no session",
    "%rpc_download a": "no session",
    "%rpc_timeit f(1)": "no session",
    "%rpc 1 + 1": "no session",
    "%%rpc\n1": "no session",
    "%rpc_close nobody": "no session nobody",
    "%rpc_close --session nobody": "no session nobody",
    "%rpc_sessions --session nobody": "no session nobody",
    "%rpc_functions --session nobody": "no session nobody",
    "%rpc_upload a --session nobody": "no session nobody",
    "%rpc_download a --session nobody": "no session nobody",
    "%rpc_panel --session nobody": "no session nobody",
    "%%rpc --session nobody\n1": "no session nobody",
}


def test_n7_there_are_few_magics() -> None:
    assert len(set(MAGICS)) == len(MAGICS) <= 10


@pytest.mark.parametrize("option", ["-h", "--help"])
@pytest.mark.parametrize("name", MAGICS)
def test_n7_every_magic_has_help(cell: Cell, name: str, option: str) -> None:
    if name == "rpc":
        cell(f"%%rpc {option}\n1")
        assert "--noblock" in cell.out
        cell("%rpc")
        assert "--noblock" in cell.out
    else:
        cell(f"%{name} {option}")
        assert "::" in cell.out
        assert f"%{name}" in cell.out
    assert cell.err == ""


@pytest.mark.parametrize("name", MAGICS)
def test_n7_a_wrong_option_gives_one_line(cell: Cell, name: str) -> None:
    cell("%%rpc --nonsense\n1" if name == "rpc" else f"%{name} --nonsense")
    assert cell.err.count("\n") == 1
    assert cell.err.startswith("UsageError: ")
    assert "Traceback" not in cell.out


@pytest.mark.parametrize(("source", "text"), WITHOUT_SESSION.items())
def test_n7_a_missing_session_gives_one_line(cell: Cell, source: str, text: str) -> None:
    cell(source)
    assert text in cell.err
    assert "%rpc_connect" in cell.err
    assert cell.err.count("\n") == 1


def test_n7_remote_cells_with_out_and_noblock(cell: Cell, serve: Callable[..., Any], shell: Any) -> None:
    server = serve(token="t", allow_exec=True)
    BOOK.tokens[server.address] = "t"
    cell(f"%rpc_connect {server.address}")
    assert cell("%%rpc --out answer\n6 * 7") is None
    assert shell.user_ns["answer"] == 42
    assert cell("%%rpc --noblock --out job\n'later'") is None
    assert shell.user_ns["job"].result(10).data == {"text/plain": "'later'"}
    assert cell("%%rpc --noblock\n1 + 1").result(10).data == {"text/plain": "2"}
    cell("%%rpc --out 2nd\n1")
    assert "--out expects a variable's name" in cell.err
    cell("%%rpc --timeout 0.2\nwhile True: pass")
    assert "took longer" in cell.err or "0.2" in cell.err
    assert cell("%rpc answer if 'answer' in dir() else 'none'").data == {"text/plain": "'none'"}
