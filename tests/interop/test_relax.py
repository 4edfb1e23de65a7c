"""Relax models on boards: clients and servers, ours and stock's; TVM's runtime found when it is needed, or given."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from conftest import eventually

import rpcnb
from rpcnb.runtime.tvmruntime import find_runtime

if TYPE_CHECKING:
    from stock_peer import Peer

pytest_plugins = ("stock_peer",)
pytestmark = [pytest.mark.stock, pytest.mark.timeout(120)]

TOKEN = "relax"
RNG = np.random.default_rng(7)
X, W = RNG.random((4, 8), "float32"), RNG.random((8, 3), "float32")
BOARDS = {
    "lean": [],
    "runtime": ["--runtime", "auto"],
    "one process": ["--runtime", "auto", "--shared-state"],
    "tvm": ["--load", "tvm", "--shared-state"],
}
Start = Callable[..., tuple[str, int]]


def compile_model(folder: str) -> str:
    import relax_models

    return relax_models.compile_model(folder)


def run_as_stock(*args: Any) -> Any:
    import relax_models

    return relax_models.run_as_stock(*args)


@pytest.fixture(scope="module")
def model(stock: Peer, tmp_path_factory: pytest.TempPathFactory) -> str:
    path: str = stock.run(compile_model, str(tmp_path_factory.mktemp("relax")), seconds=60)
    return path


@pytest.fixture
def board(tmp_path: Path) -> Iterator[Start]:
    """Start boards; returns their address and port."""
    running: list[subprocess.Popen[bytes]] = []

    def start(*flags: str, token: bool = True) -> tuple[str, int]:
        ready, secret = tmp_path / f"ready-{len(running)}", tmp_path / "token"
        secret.write_text(TOKEN)
        command = [sys.executable, "-m", "rpcnb", "serve", "--port", "0", "--silent", "--ready-file", str(ready)]
        command += ["--token-file", str(secret)] if token else ["--no-token"]
        running.append(subprocess.Popen([*command, *flags]))
        eventually(ready.exists, "the board", 60)
        port = json.loads(ready.read_text())["port"]
        return f"127.0.0.1:{port}", port

    yield start
    for process in running:
        process.terminate()
        process.wait(10)


def check(session: Any, vm: Any) -> None:
    """All that a virtual machine does."""
    x, w = session.array(X), session.array(W)
    assert np.allclose(vm["main"](x, w).numpy(), X @ W, atol=1e-5)
    assert vm["main"].params == ["x", "w"]
    assert np.allclose(vm["main"](x, w=w).numpy(), X @ W, atol=1e-5)
    assert np.allclose(vm["main"](w=w, x=x).numpy(), X @ W, atol=1e-5)
    column = session.array(X[:, 0].copy())
    a, (b, c) = vm["nested"](column)
    for found, expected in ((a, 2 * X[:, 0]), (b, X[:, 0] ** 2), (c, X[:, 0] - X[:, 0] ** 2)):
        assert np.allclose(found.numpy(), expected, atol=1e-5)
    vm.set_input("nested", column)
    vm.invoke("nested")
    again = vm.outputs("nested")
    assert np.allclose(again[1][1].numpy(), c.numpy())
    pending = vm["main"].submit(x, w)
    assert np.allclose(pending.result(10).numpy(), X @ W, atol=1e-5)
    vm.save_function("main", "saved", x, w, include_return=False)
    assert vm.time_evaluator("saved", number=3, repeat=2)().mean > 0
    assert vm["saved"]() is None
    vm.save_function("main", "kept", x, w)
    assert np.allclose(vm["kept"]().numpy(), X @ W, atol=1e-5)
    with pytest.raises(TypeError, match=r"kept\(\) was saved with its arguments; it takes none, got 1"):
        vm["kept"](x)
    check_overlapping(session, vm)
    assert vm.time_evaluator("main", session.cpu(), number=2)(x, w).mean > 0


def check_overlapping(session: Any, vm: Any) -> None:
    """A machine keeps arguments and results between the requests of a call: calls that overlap do not mix them."""
    columns = [np.full(4, value, "float32") for value in range(12)]
    given = [session.array(one) for one in columns]

    def expect(results: list[Any]) -> None:
        for column, (a, (b, c)) in zip(columns, results, strict=True):
            for found, expected in ((a, 2 * column), (b, column**2), (c, column - column**2)):
                assert np.array_equal(found.numpy(), expected)

    nested = vm["nested"]
    expect([pending.result(30) for pending in [nested.submit(one) for one in given]])
    with ThreadPoolExecutor(4) as pool:
        expect(list(pool.map(nested, given)))
    submitted = [nested.submit(one) for one in given[:6]]
    blocked = [nested(one) for one in given[6:]]
    expect([one.result(30) for one in submitted] + blocked)
    vm.set_input("nested", given[3])
    assert np.array_equal(nested(given[5])[0].numpy(), 2 * columns[5])
    vm.invoke("nested")
    assert np.array_equal(vm.outputs("nested")[0].numpy(), 2 * columns[3]), "what set_input gave is still there"


@pytest.mark.parametrize("kind", BOARDS)
def test_our_client_runs_a_model_on_our_board(board: Start, model: str, kind: str) -> None:
    address, _ = board(*BOARDS[kind])
    with rpcnb.connect(address, token=TOKEN) as session:
        vm = session.vm(model)
        check(session, vm)
        assert repr(vm) == f"VM(cpu:0 of {session.name})"
        again = session.vm(session.load_module("model.so"), session.cpu(), memory_cfg="naive")
        assert np.allclose(again["main"](session.array(X), session.array(W)).numpy(), X @ W, atol=1e-5)


def test_our_client_runs_a_model_on_a_stock_board(stock_port: int, model: str) -> None:
    with rpcnb.connect("127.0.0.1", stock_port, key="stock") as session:
        vm = session.vm(model)
        check(session, vm)
        with pytest.raises(rpcnb.FunctionNotFound, match="that takes an rpcnb server"):
            vm.profile("main", session.array(X), session.array(W))


@pytest.mark.parametrize("kind", BOARDS)
def test_a_profile_says_where_the_time_goes(board: Start, model: str, kind: str) -> None:
    address, _ = board(*BOARDS[kind])
    with rpcnb.connect(address, token=TOKEN) as session:
        vm = session.vm(model)
        x, w = session.array(X), session.array(W)
        found = vm.profile("main", x, w=w, runs=5)
        (kernel,) = [row for row in found.rows if row.name == "matmul"]
        assert kernel.arguments == "float32[4, 8], float32[8, 3], float32[4, 3]"
        assert kernel.calls == 1
        assert 0 < kernel.seconds < found.seconds
        assert "matmul" in repr(found)
        assert "<td style='text-align:left'>matmul</td>" in found._repr_html_()
        assert np.allclose(vm["main"](x, w).numpy(), X @ W, atol=1e-5), "it goes on as before"
        with pytest.raises(rpcnb.RemoteError, match="expected 1 to 1000 runs, got 0"):
            vm.profile("main", x, w, runs=0)
        with pytest.raises(rpcnb.RemoteError, match="expected the module of a virtual machine"):
            session.call("rpcnb.vm_profile", session.load_module("model.so"), "main", 1, 1, 0)


def test_the_awaited_twin(board: Start, model: str) -> None:
    address, _ = board()

    async def story() -> None:
        async with await rpcnb.connect_async(address, token=TOKEN) as session:
            vm = await session.vm(model)
            x, w = await session.array(X), await session.array(W)
            assert np.allclose(await (await vm["main"](x, w=w)).numpy(), X @ W, atol=1e-5)
            await vm.set_input("main", x, w)
            await vm.invoke("main")
            assert np.allclose(await (await vm.outputs("main")).numpy(), X @ W, atol=1e-5)
            await vm.save_function("main", "saved", x, w)
            measure = await vm.time_evaluator("saved", number=2)
            assert (await measure()).mean > 0
            assert (await vm["saved"]()).shape == (4, 3)
            assert (await vm.profile("main", x, w, runs=1)).runs == 1
            columns = [await session.array(np.full(4, value, "float32")) for value in range(8)]
            found = await asyncio.gather(*(vm["nested"](one) for one in columns))
            for value, (a, (_, c)) in enumerate(found):
                assert (await a.numpy()).tolist() == [2 * value] * 4
                assert (await c.numpy()).tolist() == [value - value**2] * 4

    asyncio.run(story())


@pytest.mark.parametrize("kind", BOARDS)
def test_a_stock_client_runs_a_model_on_our_board(board: Start, stock: Peer, model: str, kind: str) -> None:
    _, port = board(*BOARDS[kind])
    product, fields, timing = stock.run(run_as_stock, port, f" -token={TOKEN}", model, X, W)
    assert np.allclose(product, X @ W, atol=1e-5)
    assert np.allclose(fields[2], X[:, 0] - X[:, 0] ** 2, atol=1e-5)
    assert len(timing) == 2


@pytest.fixture
def hidden_board() -> Iterator[rpcnb.Proxy]:
    """A proxy at which a board waits; it dials out by WebSocket."""
    with rpcnb.Proxy(port=0, web_port=0, silent=True) as proxy:
        command = [sys.executable, "-m", "rpcnb", "serve", "--silent", "--no-token", "--allow-native"]
        process = subprocess.Popen([*command, "--key", "hidden", "--proxy", f"ws://127.0.0.1:{proxy.web_port}"])
        try:
            eventually(lambda: proxy.waiting == 1, "the board", 60)
            yield proxy
        finally:
            process.terminate()
            process.wait(10)


def test_a_model_runs_behind_a_proxy_that_speaks_websocket(hidden_board: rpcnb.Proxy, stock: Peer, model: str) -> None:
    with rpcnb.connect(f"ws://127.0.0.1:{hidden_board.web_port}", key="hidden") as session:
        check(session, session.vm(model))
    product, _, _ = stock.run(run_as_stock, hidden_board.port, "hidden", model, X, W)
    assert np.allclose(product, X @ W, atol=1e-5)


class Foreign:
    """A tensor of another library in this process."""

    def __dlpack__(self) -> None:
        raise AssertionError("nobody looks at it")


def test_what_is_wrong_is_told_in_one_line(board: Start, model: str, tmp_path: Path) -> None:
    address, _ = board()
    with rpcnb.connect(address, token=TOKEN) as session:
        vm = session.vm(model)
        x, w = session.array(X), session.array(W)
        wrong: list[tuple[Callable[[], Any], type[Exception], str]] = [
            (
                lambda: vm["main"](X, w),
                rpcnb.ArgumentError,
                r"argument 0 is an array of this process.*session\.array",
            ),
            (
                lambda: vm["main"](x, Foreign()),
                rpcnb.ArgumentError,
                r"argument 1 is an array of this process.*session\.array",
            ),
            (
                lambda: vm.set_input("main", x, object()),
                rpcnb.ArgumentError,
                "argument 1 is of type object; expected a ten",
            ),
            (lambda: vm["main"](x, None), rpcnb.ArgumentError, "argument 1 is None; expected a tensor"),
            (lambda: vm["main"]((x, w)), rpcnb.ArgumentError, "argument 0 is a tuple"),
            (lambda: vm["main"](x, v=w), TypeError, r"main\(x, w\) got no parameter 'v'"),
            (lambda: vm["main"](x, w, x=x), TypeError, r"main\(x, w\) got 3 arguments"),
            (lambda: vm["nobody"](x), rpcnb.FunctionNotFound, "the virtual machine has no function 'nobody'"),
            (lambda: vm["nobody"].params, rpcnb.FunctionNotFound, "the virtual machine has no function 'nobody'"),
            (lambda: vm["main"](w, x), rpcnb.RemoteError, "shape"),
            (lambda: session.vm(model, memory_cfg="much"), ValueError, "'naive' or 'pooled'"),
            (lambda: session.vm(model, session.cuda(0)), rpcnb.DeviceError, "has no device cuda:0"),
            (lambda: session.vm(tmp_path / "none.so"), FileNotFoundError, "none.so"),
        ]
        for attempt, kind, text in wrong:
            with pytest.raises(kind, match=text):
                attempt()
        assert np.allclose(vm["main"](x, w).numpy(), X @ W, atol=1e-5), "it goes on"


def test_a_board_without_the_runtime_says_what_to_do(board: Start, model: str) -> None:
    address, _ = board("--runtime", "none")
    with rpcnb.connect(address, token=TOKEN) as session, pytest.raises(rpcnb.RemoteError) as caught:
        session.vm(model)
    said = "model.so: it needs relax.VMExecutable, of TVM's runtime; start the server with --runtime auto"
    assert said in str(caught.value)


def test_the_runtime_is_for_those_who_are_trusted(board: Start, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "rpcnb", "serve", "--port", "0", "--silent", "--no-token", "--runtime", "auto"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1
    assert done.stderr == "rpcnb: TVM's runtime runs native code for clients: give a token, or allow_native=True\n"
    address, _ = board("--load", "tvm", "--shared-state", token=False)
    with rpcnb.connect(address) as session:
        for name in ("rpc.PopenSession", "rpc.CreatePipeClient"):
            function = session.get_function(name)
            with pytest.raises(rpcnb.RemoteError, match=f"{name} needs trust: start the server with a token"):
                function("/bin/true")


@pytest.mark.parametrize("kind", [*BOARDS, "library"])
def test_what_others_ask_a_board_for(board: Start, kind: str) -> None:
    flags = BOARDS[kind] if kind in BOARDS else ["--load-library", str(find_runtime())]
    address, _ = board(*flags)
    with rpcnb.connect(address, token=TOKEN) as session:
        session.call("runtime.config_threadpool", 1, 77)
        own = session.call("runtime.NumThreads")
        assert own == 77 if kind == "lean" else own < 77, "TVM's own, where its runtime is, however that was loaded"
        session.call("runtime.config_threadpool", 1, 2)
        assert session.call("runtime.NumThreads") in (1, 2)
        out = session.empty((1000,))
        session.call("tvm.contrib.random.uniform", 2.0, 3.0, out)
        assert (out.numpy() >= 2).all()
        data, order = session.array(np.array([3, 1, 2], "float32")), session.empty((3,), "int32")
        session.call("tvm.contrib.sort.argsort", data, order, 0, True)
        assert order.numpy().tolist() == [1, 2, 0]
        session.call("cache_flush_cpu_non_first_arg", data, out)
