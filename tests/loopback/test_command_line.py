"""The command line, as a user types it."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from conftest import eventually

import rpcnb
from rpcnb.command.main import main
from rpcnb.transport.runfiles import list_servers


def run(*args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "rpcnb", *args], capture_output=True, text=True, timeout=30, check=False
    )


class Running:
    """A command that runs until it is told to stop."""

    def __init__(self, file: Path, *args: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "rpcnb", *args, "--ready-file", str(file)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        eventually(lambda: file.exists() or self.process.poll() is not None, "the ready file")
        self.ready: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}

    @property
    def address(self) -> str:
        return f"{self.ready['host']}:{self.ready['port']}"

    def stop(self, number: int = signal.SIGTERM) -> tuple[str, str]:
        if self.process.poll() is None:
            self.process.send_signal(number)
        return self.process.communicate(timeout=10)


class Serving(Running):
    """``rpcnb serve`` as a child process."""

    def __init__(self, folder: Path, *args: str) -> None:
        self.file = folder / "ready.json"
        super().__init__(self.file, "serve", "--port", "0", *args)


@pytest.fixture
def serving(tmp_path: Path) -> Iterator[Any]:
    started: list[Serving] = []

    def start(*args: str) -> Serving:
        started.append(Serving(tmp_path, *args))
        return started[-1]

    yield start
    for one in started:
        one.stop()


def test_a_link_is_shaped_on_any_port(serving: Any) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    assert serving("--demo", "--link", "100M,1ms", "--port", str(port)).address.endswith(f":{port}")


def test_serve_call_functions_and_servers(serving: Any, capsys: pytest.CaptureFixture[str]) -> None:
    board = serving("--demo", "--key", "rpi")
    assert board.ready["pid"] == board.process.pid
    assert board.ready["key"] == "rpi"
    assert "token" not in board.ready
    assert main(["call", board.address, "--key", "rpi", "demo.add", "1", "2.5"]) == 0
    assert capsys.readouterr().out == "3.5\n"
    assert main(["call", board.address, "--key", "rpi", "demo.add", "a", "b"]) == 0
    assert capsys.readouterr().out == "ab\n"
    assert main(["functions", board.address, "--key", "rpi", "demo.s*"]) == 0
    assert capsys.readouterr().out.split() == ["demo.scale", "demo.sensor", "demo.sleep", "demo.slow_add"]
    assert main(["servers", "--json"]) == 0
    (found,) = json.loads(capsys.readouterr().out)
    assert found["port"] == board.ready["port"]
    assert "token" not in found
    assert main(["servers"]) == 0
    assert board.address in capsys.readouterr().out


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_end_serve_cleanly_and_it_says_what_to_paste(serving: Any, number: int) -> None:
    board = serving("--key", "rpi")
    (run_file,) = [one for one in list_servers() if one["pid"] == board.process.pid]
    out, err = board.stop(number)
    assert board.process.returncode == 0
    assert err == ""
    assert f"%rpc_connect {board.address} --key rpi" in out
    assert f"rpcnb.connect('{board.address}', key='rpi', token='{run_file['token']}')" in out
    assert f"key='rpi -token={run_file['token']}'" in out
    assert not [one for one in list_servers() if one["pid"] == board.process.pid]


def test_a_token_is_needed_and_found_by_the_same_user(serving: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    board = serving("--demo")
    with rpcnb.connect(board.address) as session:
        assert session.call("demo.add", 1, 2) == 3
    monkeypatch.setenv("RPCNB_RUNTIME_DIR", "/nonexistent")
    with pytest.raises(rpcnb.errors.KeyMismatch, match="wrong key or token"):
        rpcnb.connect(board.address)


def test_token_file_and_load_of_a_file(serving: Any, tmp_path: Path) -> None:
    token = tmp_path / "token"
    token.write_text("abc-123\n")
    functions = tmp_path / "my_functions.py"
    functions.write_text("import rpcnb\n\n@rpcnb.register_func('mine.twice')\ndef twice(x):\n    return 2 * x\n")
    board = serving("--token-file", str(token), "--load", str(functions))
    with rpcnb.connect(board.address, token="abc-123") as session:
        assert session.call("mine.twice", 21) == 42


def test_a_session_constructor_by_name(serving: Any, tmp_path: Path) -> None:
    functions = tmp_path / "my_session.py"
    functions.write_text(
        "import rpcnb\n\nclass Mine(rpcnb.LocalServingSession):\n"
        "    def call(self, handle, args):\n        return (1, 7)\n"
        "    def async_call(self, handle, args, done):\n        done((1, 7))\n\n"
        "rpcnb.register_func('my.session', Mine)\n"
    )
    board = serving("--load", str(functions), "--session", "my.session")
    with rpcnb.connect(board.address) as session:
        assert session.get_function("rpc.test.addone")(1) == 7


def test_a_shaped_link_takes_its_time(serving: Any) -> None:
    import time

    import numpy as np

    board = serving("--demo", "--link", "20M,5ms")
    data = np.ones(1 << 20, np.uint8)
    with rpcnb.connect(board.address) as session:
        start = time.perf_counter()
        assert np.array_equal(session.array(data).numpy(), data)
        assert time.perf_counter() - start > 0.08  # 2 MiB at 20 MB/s are 0.105 s
        assert session.call("demo.sensor", 1) == 21.0


@pytest.mark.parametrize(
    ("args", "code", "text"),
    [
        (["call", "127.0.0.1:1", "f"], 3, "connection refused"),
        (["call", "not an address:x", "f"], 2, "expected"),
        (["serve", "--host", "0.0.0.0", "--no-token"], 1, "insecure"),
        (["serve", "--load", "no_such_module_here"], 2, "no_such_module_here"),
        (["serve", "--load", "missing/file.py"], 1, "no such file"),
        (["serve", "--session", "nobody"], 2, "no session constructor"),
        (["serve", "--port", "0", "--link", "fast"], 2, "expected RATE,LATENCY"),
        (["serve", "--port", "0", "--token-file", __file__], 2, "letters, digits"),
        (["serve", "--port", "70000"], 2, "0 to 65535"),
    ],
)
def test_errors_are_one_line_with_a_documented_code(args: list[str], code: int, text: str) -> None:
    done = run(*args)
    assert done.returncode == code, done.stderr
    assert text in done.stderr
    assert done.stderr.count("\n") == 1
    assert "Traceback" not in done.stderr


def test_a_remote_error_is_one_line_and_code_1(serving: Any) -> None:
    board = serving("--demo")
    done = run("call", board.address, "demo.fail", "boom")
    assert done.returncode == 1
    assert done.stderr == "rpcnb: ValueError: boom\n"
    assert run("call", board.address, "demo.nothing").returncode == 1


def test_version_and_wrong_usage() -> None:
    assert run("--version").stdout == f"rpcnb {rpcnb.__version__}\n"
    assert run("--bad").returncode == 2
    assert run("serve", "--help").returncode == 0


def test_the_demo_tells_its_story(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo"]) == 0
    out = capsys.readouterr().out
    assert "RemoteError: ValueError: the board is on fire" in out
    assert "differs from numpy's by" in out


def test_no_server_says_how_to_start_one(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("RPCNB_RUNTIME_DIR", str(tmp_path / "none"))
    assert main(["servers"]) == 0
    assert "rpcnb serve" in capsys.readouterr().out
    assert os.listdir(tmp_path) == []


# -- a farm --------------------------------------------------------------------------------------------------------


@pytest.fixture
def running(tmp_path: Path) -> Iterator[Any]:
    started: list[Running] = []

    def start(*args: str) -> Running:
        started.append(Running(tmp_path / f"{len(started)}.json", *args))
        return started[-1]

    yield start
    for one in reversed(started):
        one.stop()


def test_a_farm_from_the_command_line(running: Any, capsys: pytest.CaptureFixture[str]) -> None:
    tracker = running("tracker", "--port", "0")
    proxy = running("proxy", "--port", "0", "--web-port", "0", "--tracker", tracker.address)
    near = running("serve", "--demo", "--port", "0", "--key", "near", "--tracker", tracker.address)
    far = running("serve", "--demo", "--key", "far", "--proxy", proxy.address, "--trust-tracker")
    session = rpcnb.connect_tracker(tracker.address)
    eventually(lambda: all(session.summary()["queue_info"].get(key) for key in ("near", "far")), "both boards")
    for key in ("near", "far"):
        assert main(["call", f"tracker://{tracker.address}/{key}", "demo.add", "1", "2"]) == 0
        assert capsys.readouterr().out == "3\n"
    eventually(lambda: session.summary()["queue_info"]["near"]["free"] == 1, "its return")
    eventually(lambda: "proxy[far]" in str(session.summary()["server_info"]), "the other's return to the proxy")
    assert main(["devices", tracker.address]) == 0
    text = capsys.readouterr().out
    assert near.address in text
    assert "proxy[far]" in text
    assert main(["devices", tracker.address, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["queue_info"]["near"]["free"] == 1
    said = {name: one.stop()[0] for name, one in (("far", far), ("near", near), ("proxy", proxy), ("tracker", tracker))}
    assert f"%rpc_connect tracker://{tracker.address}/near" in said["near"]
    assert f"behind the proxy {proxy.address}" in said["far"]
    assert f"rpcnb serve --proxy {proxy.address}" in said["proxy"]
    assert f"ws://127.0.0.1:{proxy.ready['web_port']}/ws" in said["proxy"]
    assert f"rpcnb devices {tracker.address}" in said["tracker"]
    assert [one.process.returncode for one in (far, near, proxy, tracker)] == [0] * 4


def test_stocks_options_have_counterparts(
    running: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    tracker = running("tracker", "--port", "0")
    proxy = running("proxy", "--port", "0", "--tracker", tracker.address)
    host, _, port = proxy.address.partition(":")
    running("serve", "--demo", "--key", "far", "--host", host, "--port", port, "--through-proxy", "--trust-tracker")
    monkeypatch.setenv("TVM_TRACKER_HOST", "127.0.0.1")
    monkeypatch.setenv("TVM_TRACKER_PORT", tracker.address.partition(":")[2])
    session = rpcnb.connect_tracker()
    eventually(lambda: "far" in session.summary()["queue_info"], "the board")
    assert main(["devices", "--stock"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"Tracker address {tracker.address}"
    assert any(line.endswith("    server:proxy[far]") for line in lines)
    monkeypatch.setenv("TVM_TRACKER_PORT", "none")
    with pytest.raises(ValueError, match="expected a port in TVM_TRACKER_PORT, got 'none'"):
        rpcnb.connect_tracker()


def test_devices_are_watched_until_ctrl_c(running: Any) -> None:
    tracker = running("tracker", "--port", "0", "--silent")
    command = [sys.executable, "-m", "rpcnb", "devices", tracker.address, "--watch"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        lines = [process.stdout.readline() for _ in range(4)]
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=10)
    assert lines.count("no server\n") == 2
    assert process.returncode == 130


def test_a_server_listens_on_the_web_too(running: Any) -> None:
    served = running("serve", "--demo", "--port", "0", "--web-port", "0", "--key", "web")
    with rpcnb.connect(f"ws://127.0.0.1:{served.ready['web_port']}/ws", key="web") as session:  # the token is found
        assert session.call("demo.add", 1, 2) == 3
    assert f"ws://127.0.0.1:{served.ready['web_port']}/ws" in served.stop()[0]


@pytest.mark.parametrize(
    ("args", "text"),
    [
        (["tracker", "--host", "0.0.0.0"], "--insecure"),
        (["proxy", "--host", "0.0.0.0"], "--insecure"),
        (["proxy", "--resource", "nothing"], "FOLDER:FILE"),
        (["serve", "--trust-tracker"], "needs a tracker"),
        (["serve", "--link", "1M,1ms", "--tracker", "h:1"], "--link"),
        (["serve", "--proxy", "h:1", "--tracker", "h:1"], "registered by the proxy"),
        (["devices", "127.0.0.1:1"], "connection refused"),
        (["devices", "ftp://x"], "scheme"),
    ],
    ids=lambda one: " ".join(one) if isinstance(one, list) else "",
)
def test_wrong_words_for_a_farm_get_one_line(args: list[str], text: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(args) in (1, 2, 3)
    error = capsys.readouterr().err
    assert text in error
    assert error.count("\n") == 1


HOSTILE = "\x1b]52;c;cm0gLXJmIH4=\x07\x1b[2J\u202eis-well\r"


def test_control_characters_of_strangers_reach_no_terminal(
    serve: Any, registry: Any, capfd: pytest.CaptureFixture[str]
) -> None:
    def fail() -> None:
        raise ValueError(HOSTILE)

    registry.register(f"t.{HOSTILE}", lambda: None)
    registry.register("t.fail", fail)
    registry.register("t.say", lambda: HOSTILE)
    server = serve()
    with rpcnb.Tracker(port=0, silent=True) as tracker, socket.create_connection(("127.0.0.1", tracker.port)) as board:
        board.sendall(struct.pack("<i", 0x2F271))
        board.recv(4)
        for message in (
            [5, {"key": f"server:{HOSTILE}", "addr": [None, 9090]}],
            [3, HOSTILE, [9090, "x:1"], None],
        ):
            body = json.dumps(message).encode()
            board.sendall(struct.pack("<i", len(body)) + body)
            board.recv(64)
        for args in (
            ["functions", server.address, "t.*"],
            ["call", server.address, "t.fail"],
            ["call", server.address, "t.say"],
            ["call", server.address, HOSTILE],
            ["devices", tracker.address],
            ["devices", tracker.address, "--stock"],
            ["devices", tracker.address, "--json"],
        ):
            main(args)
            said = capfd.readouterr()
            text = said.out + said.err
            assert not set("\x1b\x07\r\u202e") & set(text), args
            assert r"\x1b]52" in text or r"\u001b]52" in text, args


@pytest.mark.parametrize("args", [["call", "x:1", "f", "--token", "canary"], ["call", "x:1", "f", "--token=canary"]])
def test_a_token_on_the_line_is_refused_and_not_repeated(args: list[str]) -> None:
    done = run(*args)
    assert done.returncode == 2
    assert "--token-file FILE" in done.stderr
    assert "canary" not in done.stderr


def test_at_a_terminal_serve_refuses_it_too() -> None:
    master, slave = os.openpty()
    command = [sys.executable, "-m", "rpcnb", "serve", "--port", "0", "--token", "canary"]
    done = subprocess.run(command, stdin=slave, capture_output=True, text=True, timeout=30)
    os.close(slave)
    os.close(master)
    assert done.returncode == 2
    assert "--token-file FILE" in done.stderr
    assert "canary" not in done.stderr


@pytest.mark.parametrize("words", [["--token", "canary-of-a-script"], ["--token=canary-of-a-script"]])
def test_a_script_s_is_taken_out_of_the_list_of_processes(tmp_path: Path, words: list[str]) -> None:
    ready = tmp_path / "ready"
    command = [sys.executable, "-m", "rpcnb", "serve", *words, "--port", "0", "--silent", "--ready-file", str(ready)]
    with subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        eventually(ready.exists, "the server", 30)
        content = json.loads(ready.read_text())
        assert content["pid"] == process.pid
        for one in (psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)):
            assert "canary" not in " ".join(one.cmdline())
        with rpcnb.connect("127.0.0.1", content["port"], token="canary-of-a-script") as session:
            assert session.call("rpc.test.addone", 1) == 2
        process.terminate()
        _, said = process.communicate(timeout=30)
    assert b"--token-file FILE" in said
    assert b"canary" not in said


def test_with_tls_the_line_to_paste_has_all_but_the_token(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RPCNB_CONFIG_DIR", str(tmp_path / "config"))
    ready = tmp_path / "ready"
    command = [sys.executable, "-m", "rpcnb", "serve", "--tls", "--plain-port", "0", "--port", "0", "--key", "rpi"]
    with subprocess.Popen([*command, "--ready-file", str(ready)], stdout=subprocess.PIPE, text=True) as process:
        eventually(ready.exists, "the server", 30)
        content = json.loads(ready.read_text())
        assert process.stdout is not None
        lines = [process.stdout.readline() for _ in range(5)]
        (line,) = [one for one in lines if "rpcnb.connect" in one]
        address, token = re.findall(r"'([^']*)'", line)
        assert address == f"rpcs://127.0.0.1:{content['port']}/rpi#{content['fingerprint']}"
        with rpcnb.connect(address, token=token) as session:
            assert session.call("rpc.test.addone", 1) == 2
        (stock,) = [one for one in lines if "stock TVM" in one]
        assert f", {content['plain_port']}, key='rpi -token={token}'" in stock
        process.terminate()
