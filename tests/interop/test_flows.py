"""What people do with ``tvm.rpc``: TVM's client and ours, our servers lean, with TVM's runtime, and with TVM."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np
import pytest
from conftest import eventually
from test_relax import board

import rpcnb

if TYPE_CHECKING:
    from stock_peer import Peer

__all__ = ["board"]
pytest_plugins = ("stock_peer",)
pytestmark = [pytest.mark.stock, pytest.mark.timeout(120)]

TOKEN = "relax"
DROPPING = """
import os, rpcnb
rpcnb.register_func("drop.out", lambda: os.kill(os.getpid(), 9))
"""
CLIENTS = pytest.mark.parametrize("client", ["tvm", "rpcnb"])
SERVERS = pytest.mark.parametrize("flags", [("--runtime", "none"), ("--runtime", "auto")], ids=["lean", "runtime"])


def flow(name: str, *args: Any) -> Any:
    """In the child."""
    import flows

    return getattr(flows, name)(*args)


def key_for(client: str) -> str:
    return f" -token={TOKEN}" if client == "tvm" else ""


@CLIENTS
@SERVERS
def test_random_fill(board: Callable[..., Any], stock: Peer, client: str, flags: tuple[str, ...]) -> None:
    _, port = board(*flags)
    stock.run(flow, "random_fill", client, port, key_for(client))


@CLIENTS
@SERVERS
def test_thread_pool_settings(board: Callable[..., Any], stock: Peer, client: str, flags: tuple[str, ...]) -> None:
    _, port = board(*flags)
    stock.run(flow, "thread_pool", client, port, key_for(client))


@SERVERS
def test_kernels_take_types_that_numpy_lacks(
    board: Callable[..., Any], stock: Peer, flags: tuple[str, ...], tmp_path: Path
) -> None:
    stock.run(flow, "compile_copies", str(tmp_path), seconds=60)
    address, _ = board(*flags)
    with rpcnb.connect(address, token=TOKEN) as session:
        for path in sorted(tmp_path.glob("*.so")):
            session.upload(path)
            values = np.arange(-16, 16).astype(getattr(ml_dtypes, path.stem, path.stem))
            given, made = session.array(values), session.empty((32,), path.stem)
            copy = session.load_module(path.name)["main"]
            copy(given, made)
            assert (made.numpy() == values).all(), path.stem
            assert session.load_module(path.name).time_evaluator("main", session.cpu(), number=3)(given, made).mean > 0


@CLIENTS
def test_objects_for_other_machines_are_refused_by_name(
    board: Callable[..., Any], stock: Peer, client: str, tmp_path: Path
) -> None:
    _, port = board()
    said = stock.run(flow, "cross_objects", client, port, key_for(client), str(tmp_path), seconds=60)
    assert len(said) == 3
    for triple, one in zip(("aarch64", "riscv64", "powerpc64"), said, strict=True):
        if not one.startswith("not compiled"):
            assert f"{triple}-linux-gnu.o" in one
            assert "loaded" not in one


@pytest.fixture
def farm(tmp_path: Path) -> Iterator[int]:
    """A tracker's port; it has a board."""
    ready, dropping = tmp_path / "phone", tmp_path / "dropping.py"
    dropping.write_text(DROPPING)
    with rpcnb.Tracker(port=0, silent=True) as tracker:
        command = [
            sys.executable,
            "-m",
            "rpcnb",
            "serve",
            "--port",
            "0",
            "--key",
            "phone",
            "--silent",
            "--trust-tracker",
            "--load",
            str(dropping),
        ]
        command += ["--tracker", tracker.address, "--ready-file", str(ready)]
        with subprocess.Popen(command) as process:
            session = rpcnb.connect_tracker(tracker.address)
            eventually(lambda: session.summary()["queue_info"].get("phone", {}).get("free"), "the board", 30)
            yield tracker.port
            process.terminate()


@CLIENTS
def test_phones(farm: int, stock: Peer, client: str, tmp_path: Path) -> None:
    assert stock.run(flow, "phone", client, farm, str(tmp_path), seconds=60) > 0


@CLIENTS
def test_a_server_that_drops_out(farm: int, stock: Peer, client: str, tmp_path: Path) -> None:
    assert stock.run(flow, "server_drop", client, farm, str(tmp_path), seconds=60) > 0


@pytest.mark.parametrize("name", ["rpc_run", "dlight"])
def test_tvms_own_helpers(farm: int, stock: Peer, name: str) -> None:
    assert stock.run(flow, name, farm, seconds=60) > 0
