"""TVM's names at our client, and TVM's own types beside it."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np
import pytest
from test_relax import W, X, board, model

import rpcnb

if TYPE_CHECKING:
    from stock_peer import Peer

__all__ = ["board", "model"]
pytest_plugins = ("stock_peer",)
pytestmark = [pytest.mark.stock, pytest.mark.timeout(120)]

TOKEN = "relax"
Start = Callable[..., tuple[str, int]]


def test_what_scripts_call_is_there(board: Start, model: str) -> None:
    address, _ = board("--runtime", "auto")
    session = rpcnb.connect(address, token=TOKEN)
    device = session.device("cpu:0")
    assert device.dlpack_device_type() == 1
    assert device.create_raw_stream() == 0
    device.set_raw_stream(0)
    device.free_raw_stream(0)
    tensor = session.array(np.arange(12, dtype="float32").reshape(3, 4))
    assert tensor.numel() == tensor.size == 12
    assert tensor.strides == (4, 1)
    assert tensor.is_contiguous()
    assert tensor.same_as(tensor)
    assert not tensor.same_as(tensor.view((12,)))
    assert (tensor._create_view((2, 4), "float32", 16).numpy() == tensor.numpy()[1:]).all()
    assert (tensor._create_view((12,)).numpy() == np.arange(12)).all()
    session.upload(model)
    module = session.load_module("model.so")
    assert module.kind == "rpc"
    assert module.imports == []
    whole = session.system_lib()
    whole.import_module(module)
    assert whole.imports == [module]
    assert whole.implements_function("vm_load_executable", True)
    assert not whole.implements_function("vm_load_executable")
    assert module.implements_function("vm_load_executable")
    assert not module.implements_function("nothing")
    vm = session.vm(module)
    vm.save_function("main", "saved", session.array(X), session.array(W))
    assert len(vm.time_evaluator("saved", device, 2, 3)().results) == 3
    assert len(vm.module.time_evaluator("saved", device, 1, 2)().results) == 2
    assert len(session.time_evaluator("saved", device, 1, 4, module=vm.module)().results) == 4
    for options, text in (((1,) * 9, "got 9 options"), ((1, 2), "number twice")):
        with pytest.raises(TypeError, match=text):
            session.time_evaluator("saved", device, *options, number=3, module=vm.module)
    session._sess.get_function("CloseRPCConnection")()
    assert session.state == "closed"


def test_names_are_awaited_too(board: Start) -> None:
    import asyncio

    address, _ = board()

    async def main() -> None:
        session = await rpcnb.connect_async(address, token=TOKEN)
        assert await session.cpu().create_raw_stream() == 0
        close: Any = await session.get_function("CloseRPCConnection")
        await close()
        assert session.state == "closed"

    asyncio.run(main())


def test_tvms_own_types_are_beside_ours(board: Start, model: str, stock: Peer) -> None:
    address, _ = board("--runtime", "auto")
    stock.run(use_both, address, model, seconds=60)


def use_both(address: str, model: str) -> None:
    """In a process that has both."""
    from stock_peer import tvm

    package = tvm()
    from tvm import relax

    with rpcnb.connect(address, token=TOKEN) as session:
        remote = session.tvm()
        assert isinstance(remote, package.rpc.RPCSession)
        remote.upload(model)
        vm = relax.VirtualMachine(remote.load_module("model.so"), remote.cpu())
        found = vm["main"](package.runtime.tensor(X, remote.cpu()), package.runtime.tensor(W, remote.cpu()))
        assert np.allclose(found.numpy(), X @ W, atol=1e-5)

        here = package.runtime.tensor(X)
        there = session.array(here)
        assert (there.numpy() == X).all()
        back = package.runtime.empty(X.shape, "float32")
        assert there.copyto(back) is back
        assert (back.numpy() == X).all()
        there.copyfrom(package.runtime.tensor(-X))
        assert (there.numpy() == -X).all()
        for kind in ("bfloat16", "float8_e4m3fn", "int4"):
            values = np.array([1, 2, -3]).astype(getattr(ml_dtypes, kind))
            local = package.runtime.empty((3,), kind)
            assert session.array(values).copyto(local) is local
            assert (session.array(local).numpy() == values).all(), kind
        with pytest_raises(rpcnb.errors.CopyMismatch):
            there.copyto(package.runtime.empty((2, 2), "float32"))


def pytest_raises(kind: type[BaseException]) -> Any:
    import pytest

    return pytest.raises(kind)


def test_where_tvm_cannot_be_had_it_is_said(
    board: Start, serve: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    address, _ = board()
    monkeypatch.setitem(sys.modules, "tvm.rpc", None)
    with (
        rpcnb.connect(address, token=TOKEN) as session,
        pytest.raises(rpcnb.LocalProtocolError, match="pip install apache-tvm"),
    ):
        session.tvm()
    server = serve(web_port=0)
    with (
        rpcnb.connect(f"ws://127.0.0.1:{server.web_port}/ws") as session,
        pytest.raises(rpcnb.LocalProtocolError, match="knows TCP alone"),
    ):
        session.tvm()
    with rpcnb.LocalSession() as session, pytest.raises(rpcnb.LocalProtocolError, match="cannot reach this process"):
        session.tvm()


def test_copies_go_into_local_arrays_that_can_be_written(board: Start) -> None:
    address, _ = board()
    with rpcnb.connect(address, token=TOKEN) as session:
        tensor = session.array(X)
        for wrong in (5, "text", [1, 2]):
            with pytest.raises(TypeError, match="a local array that can be written, got"):
                tensor.copyto(wrong)
        made = np.empty_like(X)
        assert tensor.copyto(made) is made
        assert (made == X).all()
