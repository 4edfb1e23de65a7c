"""C13: what upstream tests of a session, in every cell of client, server and way."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from cases import CASES
from conftest import eventually
from test_stock_farm import start_board, start_proxy, stop_boards

import rpcnb

if TYPE_CHECKING:
    from stock_peer import Peer

pytest_plugins = ("stock_peer",)
pytestmark = [pytest.mark.stock, pytest.mark.timeout(120)]

KEY = "matrix"


class _Stock:
    """Stock TVM's way to make arrays; in the child."""

    @staticmethod
    def tensor(data: Any, device: Any) -> Any:
        import tvm

        return tvm.runtime.tensor(data, device)

    @staticmethod
    def empty(shape: Any, kind: str, device: Any) -> Any:
        import tvm

        return tvm.runtime.empty(shape, kind, device)


def play_stock(port: int, key: str, constructor: list[Any], folder: str) -> dict[str, str]:
    """Run all cases with a stock client; returns what failed. In the child."""
    from stock_peer import tvm

    remote = tvm().rpc.connect("127.0.0.1", port, key, session_constructor_args=constructor)
    return _play(remote, _Stock, Path(folder))


def _play(remote: Any, nd: Any, folder: Path) -> dict[str, str]:
    failed = {}
    for name, case in CASES.items():
        try:
            case(remote, nd, folder)
        except Exception as error:  # noqa: PERF203  # each case may fail
            failed[name] = f"{type(error).__name__}: {error}"
    return failed


@pytest.fixture(params=["ours", "stock"])
def kind(request: pytest.FixtureRequest) -> str:
    """Whose server."""
    return str(request.param)


@pytest.fixture(params=["direct", "hop through ours", "hop through stock", "our proxy", "stock proxy"])
def way(request: pytest.FixtureRequest, kind: str, stock_servers: Peer) -> Iterator[Any]:
    """Port, key and constructor that lead to the server."""
    closing: list[Any] = []
    proxy_port = 0
    if request.param == "our proxy":
        proxy = rpcnb.Proxy(port=0, silent=True)
        closing.append(proxy)
        proxy_port = proxy.port
    elif request.param == "stock proxy":
        proxy_port = stock_servers.run(start_proxy)[0]
    port = proxy_port
    if kind == "ours":
        board = rpcnb.Server("127.0.0.1", proxy_port, key=KEY, is_proxy=bool(proxy_port), silent=True)
        closing.append(board)
        port = board.port
        eventually(lambda: not proxy_port or board.registered, "the server's wait")
    else:
        port = stock_servers.run(start_board, KEY, 0, proxy_port)
    key, constructor = KEY, []
    if request.param == "hop through ours":
        middle = rpcnb.Server(port=0, silent=True)
        closing.append(middle)
        key, constructor, port = "", ["rpc.Connect", "127.0.0.1", port, KEY, False], middle.port
    if request.param == "hop through stock":
        middle_port = stock_servers.run(start_board, "middle")
        key, constructor, port = "middle", ["rpc.Connect", "127.0.0.1", port, KEY, False], middle_port
    yield port, key, constructor
    for one in reversed(closing):
        one.close()
    stock_servers.run(stop_boards)


def test_c13_our_client(way: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    port, key, constructor = way
    with rpcnb.connect("127.0.0.1", port, key, session_constructor_args=constructor, timeout=20) as session:
        assert _play(session, rpcnb, tmp_path) == {}
    caplog.clear()


def test_c13_a_stock_client(way: Any, stock: Peer, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    port, key, constructor = way
    assert stock.run(play_stock, port, key, constructor, str(tmp_path), seconds=60) == {}
    caplog.clear()
