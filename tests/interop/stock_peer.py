"""Stock TVM in child processes, so that the tests' own process never imports it. PYTEST_DONT_REWRITE.

A :class:`Peer` is a child that has imported ``tvm`` and runs functions of the test modules by name::

    def add_one(port: int) -> int:            # runs in the child
        return tvm().rpc.connect("127.0.0.1", port).get_function("rpc.test.addone")(41)

    def test_a_stock_client_calls(stock: Peer, ...) -> None:
        assert stock.run(add_one, server.port) == 42

Arguments and results travel as pickles of plain values and numpy arrays. The fixtures here are pytest's plugin
``stock_peer``, which the test modules name; each child is started once per run.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import multiprocessing.connection
import os
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

HERE = Path(__file__).parent
ROOT = HERE.parent.parent


class PeerError(AssertionError):
    """A function raised in the child; the text is its traceback."""


def tvm() -> Any:
    """Return stock TVM; only children call this."""
    assert "pytest" not in sys.modules or os.environ.get("RPCNB_STOCK_PEER"), "the tests' process must not import tvm"
    import tvm.rpc

    return tvm


class Peer:
    """A child process with stock TVM in it."""

    def __init__(self, log: Path) -> None:
        ours, theirs = multiprocessing.Pipe()
        self._log = log
        paths = [str(HERE), str(ROOT / "tests"), str(ROOT), os.environ.get("PYTHONPATH", "")]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), "RPCNB_STOCK_PEER": "1"}
        command = [sys.executable, "-c", f"import stock_peer; stock_peer.main({theirs.fileno()})"]
        with log.open("wb") as output:
            self._process = subprocess.Popen(
                command,
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=environment,
            )
        theirs.close()
        self._pipe = ours
        self._receive(50)

    def run(self, function: Callable[..., Any], *args: Any, seconds: float = 30.0) -> Any:
        """Run a module-level function in the child and return its result."""
        self.start(function, *args)
        return self._receive(seconds)

    def start(self, function: Callable[..., Any], *args: Any) -> None:
        """Start a function in the child; :meth:`finish` returns its result."""
        self._pipe.send((function.__module__, function.__qualname__, args))

    def finish(self, seconds: float = 30.0) -> Any:
        """Wait for the function that was started."""
        return self._receive(seconds)

    def _receive(self, seconds: float) -> Any:
        try:
            if not self._pipe.poll(seconds):
                raise PeerError(f"no answer within {seconds:g} s; its output:\n{self._log.read_text()}")
            good, result = self._pipe.recv()
        except (EOFError, ConnectionError):
            raise PeerError(f"the child ended; its output:\n{self._log.read_text()}") from None
        if not good:
            raise PeerError(result)
        return result

    def close(self) -> None:
        """Kill the child and everything it has started (stock servers are processes of their own)."""
        with contextlib.suppress(psutil.NoSuchProcess):
            process = psutil.Process(self._process.pid)
            process.suspend()  # so that it starts nothing while its family is looked up
            family = [*process.children(recursive=True), process]
            for one in family:
                with contextlib.suppress(psutil.NoSuchProcess):
                    one.kill()
            psutil.wait_procs(family, 5)
        self._process.wait(5)
        self._pipe.close()


def main(descriptor: int) -> None:
    """Run what the parent asks for, until it closes the pipe."""
    os.set_inheritable(descriptor, False)
    pipe = multiprocessing.connection.Connection(descriptor)
    tvm()
    pipe.send((True, None))
    with contextlib.suppress(EOFError):
        while True:
            module, name, args = pipe.recv()
            try:
                result = True, plain(getattr(importlib.import_module(module), name)(*args))
            except BaseException:
                result = False, traceback.format_exc()
            pipe.send(result)
    for server in _SERVERS:  # the tests have ended without closing us
        server.terminate()
    os._exit(0)


def plain(value: Any) -> Any:
    """Return the value without classes that only TVM has (its ``str`` is a subclass)."""
    kind: Any
    for kind in (bool, int, float, str, bytes):
        if isinstance(value, kind):
            return kind(value)
    if isinstance(value, (list, tuple)):
        return type(value)(map(plain, value))
    if isinstance(value, dict):
        return {plain(key): plain(one) for key, one in value.items()}
    return value


_SERVERS: list[Any] = []


def start_stock_server(key: str = "") -> int:
    """Start a stock server process; returns its port. Runs in a child."""
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    server = tvm().rpc.Server("127.0.0.1", port, port + 50, key=key, server_init_callback=register_stock_functions)
    _SERVERS.append(server)
    return int(server.port)


def register_stock_functions() -> None:
    """Register what our clients call at a stock server. Runs in the server's process."""
    import time

    import numpy as np

    module = tvm()

    def register(name: str, function: Callable[..., Any]) -> None:
        module.register_global_func(name, function, override=True)

    register("stock.echo", lambda value: value)
    register("stock.kind", lambda value: type(value).__name__)
    register("stock.text", str)
    register("stock.length", len)
    register("stock.sum", lambda tensor: float(tensor.numpy().astype("float64").sum()))
    register("stock.shape", lambda tensor: module.runtime.ShapeTuple(tensor.shape) if tensor.ndim else None)
    register("stock.list", lambda tensor: str(tensor.numpy().tolist()))
    register("stock.arange", lambda count, kind: module.runtime.tensor(np.arange(count).astype(kind)))
    register(
        "stock.view", lambda count: module.runtime.tensor(np.arange(count, dtype="float32"))._create_view((2,), None, 8)
    )
    register("stock.fill", lambda tensor, value: tensor.copyfrom(np.full(tensor.shape, value, tensor.dtype)) and None)
    register("stock.cpu", lambda index: module.cpu(index))
    register("stock.dtype", lambda text: module.DataType(text))
    register("stock.sleep", time.sleep)
    register("stock.null", lambda: __import__("ctypes").c_void_p(0))
    register("stock.adder", lambda x: lambda y: x + y)
    register("stock.exit", lambda: os._exit(3))
    register("stock.module", lambda: module.get_global_func("ffi.SystemLib")())


def need_stock() -> None:
    """Skip without apache-tvm; in CI that is a failure."""
    if importlib.util.find_spec("tvm") is None:
        if os.environ.get("CI") == "true":
            pytest.fail("apache-tvm is missing; CI needs it", pytrace=False)
        pytest.skip("apache-tvm is not installed")


@pytest.fixture(scope="session")
def start_stock(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[], Peer]]:
    """Start children with stock TVM; they are killed at the end of the run."""
    need_stock()
    folder = tmp_path_factory.mktemp("stock")
    peers: list[Peer] = []

    def start() -> Peer:
        peer = Peer(folder / f"{len(peers)}.log")
        peers.append(peer)
        return peer

    yield start
    for peer in peers:
        peer.close()


@pytest.fixture(scope="session")
def stock(start_stock: Callable[[], Peer]) -> Peer:
    """A child that runs stock clients."""
    return start_stock()


@pytest.fixture(scope="session")
def stock_servers(start_stock: Callable[[], Peer]) -> Peer:
    """A child that owns stock servers."""
    return start_stock()


@pytest.fixture(scope="session")
def stock_port(stock_servers: Peer) -> int:
    """Port of a stock server whose key is ``stock``; it serves one session at a time."""
    port: int = stock_servers.run(start_stock_server, "stock")
    return port
