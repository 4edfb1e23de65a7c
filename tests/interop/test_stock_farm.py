"""Stock TVM and rpcnb in one farm: tracker, server, client and proxy, in every mix."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from conftest import eventually

import rpcnb
from rpcnb.runtime.registry import Registry

if TYPE_CHECKING:
    from stock_peer import Peer

pytest_plugins = ("stock_peer",)
pytestmark = [pytest.mark.stock, pytest.mark.timeout(240)]

TRIALS = 16
_KEPT: list[Any] = []  # in the children


# -- in the child with stock TVM -----------------------------------------------------------------------------------


def start_tracker() -> int:
    from stock_peer import tvm
    from tvm.rpc.tracker import Tracker

    assert tvm()
    _KEPT.append(Tracker("127.0.0.1", _free_port(), 65000, silent=True))
    return int(_KEPT[-1].port)


def start_proxy(tracker: int = 0, web: bool = False) -> tuple[int, int]:
    from tvm.rpc.proxy import Proxy

    web_port = _free_port() if web else 0
    address = ("127.0.0.1", tracker) if tracker else None
    _KEPT.append(Proxy("127.0.0.1", _free_port(), 65000, web_port=web_port, tracker_addr=address, timeout_client=3))
    return int(_KEPT[-1].port), web_port


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def start_board(key: str, tracker: int = 0, proxy: int = 0) -> int:
    from stock_peer import register_stock_functions, tvm

    address = ("127.0.0.1", tracker) if tracker else None
    port = proxy or _free_port()
    server = tvm().rpc.Server(
        "127.0.0.1", port, 65000, bool(proxy), address, key, server_init_callback=register_stock_functions
    )
    _KEPT.append(server)
    return proxy or int(server.port)


def stop_boards() -> None:
    while _KEPT:
        _KEPT.pop().terminate()


def query_tracker(port: int) -> str:
    """Return what TVM's tool prints of a tracker."""
    import io

    from tvm.exec import query_rpc_tracker

    printed, before = io.StringIO(), sys.argv
    sys.argv = ["query_rpc_tracker", "--host", "127.0.0.1", "--port", str(port)]
    try:
        with contextlib.redirect_stdout(printed):
            query_rpc_tracker.main()
    finally:
        sys.argv = before
    return printed.getvalue()


def call_tracked(tracker: int, key: str, name: str, value: int, times: int = 1) -> list[int]:
    from stock_peer import tvm

    session = tvm().rpc.connect_tracker("127.0.0.1", tracker)
    found = []
    for _ in range(times):
        remote = session.request(key, session_timeout=30)
        found.append(int(remote.get_function(name)(value)))
        del remote
    return found


def call_direct(port: int, key: str, name: str, value: int) -> int:
    from stock_peer import tvm

    return int(tvm().rpc.connect("127.0.0.1", port, key).get_function(name)(value))


def ask_summary(tracker: int) -> tuple[str, dict[str, Any]]:
    from stock_peer import tvm

    session = tvm().rpc.connect_tracker("127.0.0.1", tracker)
    return session.text_summary(), session.summary()


def tune(tracker: int, folder: str, key: str = "tune") -> tuple[int, float]:
    """Measure candidates of a small matmul with MetaSchedule's own runner, unchanged.

    Its search and its builder are left out: those of the 0.27.0 wheel crash by themselves, without any server.

    Returns:
        How many candidates were measured, and the seconds of the runner.
    """
    from stock_peer import tvm

    module = tvm()
    from tvm.s_tir import meta_schedule as ms

    te = module.te
    left, right = te.placeholder((64, 64), name="left"), te.placeholder((64, 64), name="right")
    k = te.reduce_axis((0, 64), name="k")
    product = te.compute((64, 64), lambda i, j: te.sum(left[i, k] * right[k, j], axis=k), name="product")
    function = te.create_prim_func([left, right, product]).with_attr("global_symbol", "main")
    target = module.target.Target({"kind": "llvm", "num-cores": 2})
    candidates = []
    for number in range(TRIALS):
        schedule = module.s_tir.Schedule(function)
        block = schedule.get_sblock("product")
        i, j, inner = schedule.get_loops(block)
        outer, tile = schedule.split(j, [None, 1 << (number % 6)])
        if number % 2:
            schedule.parallel(i)
        schedule.reorder(i, outer, inner, tile)
        candidates.append(f"{folder}/{number}.tar")
        module.compile(schedule.mod, target=target).export_library(candidates[-1])
    shapes = [ms.arg_info.TensorInfo("float32", (64, 64)) for _ in range(3)]
    config = ms.runner.RPCConfig("127.0.0.1", tracker, key, session_priority=1, session_timeout_sec=60)
    evaluator = ms.runner.EvaluatorConfig(number=3, repeat=2, min_repeat_ms=0)
    runner = ms.runner.RPCRunner(config, evaluator, max_workers=2)
    start = time.perf_counter()
    futures = runner.run([ms.runner.RunnerInput(path, "cpu", shapes) for path in candidates])
    results = [future.result() for future in futures]
    seconds = time.perf_counter() - start
    assert {one.error_msg for one in results} == {None}, results[0].error_msg
    return sum(all(float(cost) > 0 for cost in one.run_secs) for one in results), seconds


# -- here ----------------------------------------------------------------------------------------------------------


def listens(port: int) -> bool:
    with socket.socket() as probe:
        return not probe.connect_ex(("127.0.0.1", port))


def greeted_as_duplicate(port: int) -> bool:
    """Try once; True when the proxy calls us a duplicate."""
    try:
        rpcnb.connect("127.0.0.1", port, key="x", timeout=1)
    except rpcnb.DuplicateKey as error:
        return "already waiting" in str(error)
    except rpcnb.ConnectFailed:
        pass
    return False


@pytest.fixture
def boards(stock_servers: Peer) -> Iterator[Peer]:
    """A child that owns stock trackers, proxies and servers; they are stopped after the test."""
    yield stock_servers
    stock_servers.run(stop_boards)


@pytest.fixture
def tracker() -> Iterator[rpcnb.Tracker]:
    with rpcnb.Tracker(port=0, silent=True) as tracker:
        yield tracker


@pytest.fixture
def ours(registry: Registry, serve: Callable[..., Any]) -> Callable[..., Any]:
    """Start a server of ours that doubles numbers."""
    registry.register("our.double", lambda value: value * 2)
    return serve


def test_a_stock_client_gets_our_board_from_our_tracker(
    stock: Peer, tracker: rpcnb.Tracker, ours: Callable[..., Any]
) -> None:
    server = ours(key="rpi", tracker_addr=tracker.address_pair)
    assert stock.run(call_tracked, tracker.port, "rpi", "our.double", 21, 3) == [42] * 3
    eventually(lambda: server.sessions == 0, "the end of the session")


def test_a_stock_client_gets_a_stock_board_from_our_tracker(stock: Peer, boards: Peer, tracker: rpcnb.Tracker) -> None:
    boards.run(start_board, "st", tracker.port)
    assert stock.run(call_tracked, tracker.port, "st", "rpc.test.addone", 1, 2) == [2, 2]
    with rpcnb.connect(f"tracker://{tracker.address}/st") as session:
        assert not session.is_rpcnb
        assert session.call("rpc.test.addone", 2) == 3


def test_we_get_boards_of_both_kinds_from_a_stock_tracker(stock: Peer, boards: Peer, ours: Callable[..., Any]) -> None:
    port = boards.run(start_tracker)
    server = ours(key="rpi", tracker_addr=("127.0.0.1", port))
    eventually(lambda: server.registered, "the registration")
    boards.run(start_board, "st", port)
    session = rpcnb.connect_tracker("127.0.0.1", port)
    for _ in range(2):
        with session.request("rpi") as board:
            assert board.is_rpcnb
            assert board.call("our.double", 4) == 8
    with session.request("st") as board:
        assert board.call("rpc.test.addone", 4) == 5
    assert stock.run(call_tracked, port, "rpi", "our.double", 21) == [42]
    summary = session.summary()
    assert {info["key"] for info in summary["server_info"]} == {"server:rpi", "server:st"}
    assert "rpi" in session.text_summary()
    with pytest.raises(rpcnb.DeadlineExceeded), session.request("rpi"):
        session.request("rpi", timeout=0.5)


def test_the_stock_query_tool_reads_our_tracker(stock: Peer, tracker: rpcnb.Tracker, ours: Callable[..., Any]) -> None:
    server = ours(key="rpi", tracker_addr=tracker.address_pair)
    eventually(lambda: server.registered, "the registration")
    text, summary = stock.run(ask_summary, tracker.port)
    assert f"127.0.0.1:{server.port}" in text
    assert "rpi   1      1     0" in text
    assert summary["queue_info"] == {"rpi": {"free": 1, "pending": 0}}
    done = subprocess.run(
        [sys.executable, "-m", "tvm.exec.query_rpc_tracker", "--host", "127.0.0.1", "--port", str(tracker.port)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "server:rpi" in done.stdout


@pytest.mark.parametrize("server_kind", ["ours", "stock"])
@pytest.mark.parametrize("client_kind", ["ours", "stock"])
def test_our_proxy_joins_both_kinds(
    stock: Peer, boards: Peer, ours: Callable[..., Any], client_kind: str, server_kind: str
) -> None:
    with rpcnb.Proxy(port=0, silent=True) as proxy:
        server = None
        if server_kind == "ours":
            server = ours(host="127.0.0.1", port=proxy.port, key="x", is_proxy=True)
        else:
            boards.run(start_board, "x", 0, proxy.port)
        name, expected = ("our.double", 42) if server_kind == "ours" else ("rpc.test.addone", 22)
        for _ in range(2):
            eventually(lambda: proxy.waiting == 1, "the server's wait")
            if client_kind == "stock":
                assert stock.run(call_direct, proxy.port, "x", name, 21) == expected
            else:
                with rpcnb.connect("127.0.0.1", proxy.port, key="x") as session:
                    assert session.call(name, 21) == expected
        if server is not None:
            server.close()
        else:
            boards.run(stop_boards)


@pytest.mark.parametrize("web", [False, True], ids=["tcp", "ws"])
def test_our_board_waits_at_a_stock_proxy(stock: Peer, boards: Peer, ours: Callable[..., Any], web: bool) -> None:
    port, web_port = boards.run(start_proxy, 0, web)
    host = f"ws://127.0.0.1:{web_port}/ws" if web else "127.0.0.1"
    eventually(lambda: listens(web_port or port), "the proxy's port")
    server = ours(host=host, port=port, key="x", is_proxy=True)
    for _ in range(2):
        eventually(lambda: server.registered, "the server's wait")
        assert stock.run(call_direct, port, "x", "our.double", 21) == 42
        eventually(lambda: server.registered, "the server's wait")
        with rpcnb.connect(f"ws://127.0.0.1:{web_port}" if web else f"127.0.0.1:{port}", key="x") as session:
            assert session.is_rpcnb
            assert session.call("our.double", 3) == 6
    server.close()


def test_h7_a_stock_proxy_says_duplicate_and_mismatch(
    boards: Peer, ours: Callable[..., Any], caplog: pytest.LogCaptureFixture
) -> None:
    port, _ = boards.run(start_proxy)
    with pytest.raises(rpcnb.KeyMismatch):  # nobody serves that key, and the proxy's patience is 3 s
        rpcnb.connect("127.0.0.1", port, key="nobody", timeout=10)
    first = ours(host="127.0.0.1", port=port, key="x", is_proxy=True)
    eventually(lambda: first.registered, "the first's wait")
    second = ours(host="127.0.0.1", port=port, key="x", is_proxy=True)
    eventually(lambda: "already waiting" in caplog.text, "the word about the duplicate")
    second.close()
    first.close()
    caplog.clear()


def test_h7_our_client_learns_of_a_duplicate(boards: Peer) -> None:
    port, _ = boards.run(start_proxy)
    with socket.create_connection(("127.0.0.1", port), 5) as waiting:
        waiting.sendall(b"\x71\xf2\x0f\x00\x08\x00\x00\x00client:x")
        eventually(lambda: greeted_as_duplicate(port), "the word, once the proxy has read the other's key")


def test_a_proxy_of_each_kind_registers_with_a_tracker_of_the_other(
    stock: Peer,
    boards: Peer,
    tracker: rpcnb.Tracker,
    ours: Callable[..., Any],
    caplog: pytest.LogCaptureFixture,
) -> None:
    port, _ = boards.run(start_proxy, tracker.port)
    first = ours(host="127.0.0.1", port=port, key="a", is_proxy=True)
    session = rpcnb.connect_tracker(tracker.address)
    eventually(lambda: session.summary()["queue_info"].get("a", {}).get("free"), "the stock proxy's offer")
    with session.request("a") as board:
        assert board.call("our.double", 1) == 2
    first.close()
    stock_tracker = boards.run(start_tracker)
    with rpcnb.Proxy(port=0, tracker_addr=("127.0.0.1", stock_tracker), silent=True) as proxy:
        boards.run(start_board, "b", 0, proxy.port)
        server = ours(host="127.0.0.1", port=proxy.port, key="b", is_proxy=True)
        theirs = rpcnb.connect_tracker("127.0.0.1", stock_tracker)
        eventually(lambda: theirs.summary()["queue_info"].get("b", {}).get("free") == 2, "our proxy's offers")
        for _ in range(3):
            with theirs.request("b") as board:
                assert board.call("rpc.test.addone", 1) == 2
        assert stock.run(call_tracked, stock_tracker, "b", "rpc.test.addone", 1, 2) == [2, 2]
        server.close()
        boards.run(stop_boards)
    caplog.clear()  # the proxy's word that its tracker has gone


def test_meta_schedule_tunes_unchanged_on_our_farm(stock: Peer, tracker: rpcnb.Tracker, tmp_path: Path) -> None:
    children = []
    try:
        for number in range(2):
            command = [sys.executable, "-m", "rpcnb", "serve", "--port", "0", "--key", "tune", "--silent"]
            command += ["--tracker", tracker.address, "--trust-tracker", "--ready-file", str(tmp_path / f"{number}")]
            children.append(subprocess.Popen(command, env={**os.environ, "TVM_NUM_THREADS": "2"}))
        session = rpcnb.connect_tracker(tracker.address)
        eventually(lambda: session.summary()["queue_info"].get("tune", {}).get("free") == 2, "both boards", 30)
        measured, _ = stock.run(tune, tracker.port, str(tmp_path), seconds=200)
        assert measured == TRIALS
        assert json.loads((tmp_path / "0").read_text())["key"] == "tune"
    finally:
        for child in children:
            child.terminate()
            child.wait(10)


@pytest.mark.parametrize("kind", ["ours", "stock"])
def test_stocks_table_is_printed_letter_by_letter(stock: Peer, capsys: pytest.CaptureFixture[str], kind: str) -> None:
    from rpcnb.command.main import main

    with contextlib.ExitStack() as stack:
        if kind == "ours":
            port = stack.enter_context(rpcnb.Tracker(port=0, silent=True)).port
        else:
            port = stock.run(start_tracker)
        for key in ("rpi", "a", "rpi"):
            stack.enter_context(rpcnb.Server(port=0, silent=True, key=key, tracker_addr=("127.0.0.1", port)))
        tracker = rpcnb.connect_tracker("127.0.0.1", port)
        eventually(lambda: tracker.summary()["queue_info"].get("rpi", {}).get("free") == 2, "the boards")
        eventually(lambda: tracker.summary()["queue_info"].get("a", {}).get("free") == 1, "the boards")
        with tracker.request("rpi", told=lambda place, length: None):
            assert main(["devices", f"127.0.0.1:{port}", "--stock"]) == 0
            assert capsys.readouterr().out == stock.run(query_tracker, port)
