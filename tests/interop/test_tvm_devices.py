"""Devices of TVM's runtime through our server: one of the tests' own, in C++; GPUs answer the same functions."""

from __future__ import annotations

import asyncio
import importlib.util
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from test_relax import board, model

import rpcnb

if TYPE_CHECKING:
    from stock_peer import Peer

__all__ = ["board", "model"]
pytest_plugins = ("stock_peer",)
pytestmark = [pytest.mark.stock, pytest.mark.timeout(180)]

TOKEN = "relax"
DATA = np.arange(12, dtype="float32").reshape(3, 4)
Start = Callable[..., tuple[str, int]]


def installed(package: str) -> Path:
    spec = importlib.util.find_spec(package)
    assert spec is not None
    assert spec.submodule_search_locations
    return Path(spec.submodule_search_locations[0])


def build(source: str, made: Path, *flags: str) -> Path:
    """Build against the headers and libraries of apache-tvm's wheel."""
    tvm, ffi = installed("tvm"), installed("tvm_ffi")
    includes = [f"-I{one}" for one in (tvm / "include", ffi / "include", ffi / "3rdparty/dlpack/include")]
    folders = [tvm / "lib", ffi / "lib"]
    libraries = ["-Wl,--no-as-needed", *(f"-L{one}" for one in folders), "-ltvm_runtime", "-ltvm_ffi"]
    libraries += [f"-Wl,-rpath,{one}" for one in folders]
    path = str(Path(__file__).with_name(source))
    command = ["g++", "-std=c++17", "-O1", *flags, "-o", str(made), path, *includes, *libraries]
    subprocess.run(command, check=True, timeout=120)
    return made


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The device."""
    return build("testdevice.cc", tmp_path_factory.mktemp("device") / "libtestdevice.so", "-shared", "-fPIC")


@pytest.fixture(params=["isolated", "one process"])
def session(request: pytest.FixtureRequest, board: Start, library: Path) -> Iterator[Any]:
    flags = ["--runtime", "auto", "--load-library", str(library), "--expose-ffi"]
    address, _ = board(*flags, *(["--shared-state"] if request.param == "one process" else []))
    with rpcnb.connect(address, token=TOKEN) as opened:
        yield opened


def count(session: Any, what: str) -> int:
    return int(session.call("testdevice.count", what))


def test_a_device_says_what_it_is(session: Any) -> None:
    device = session.ext_dev(1)
    assert device.exist
    assert device.device_name == "a device of the tests"
    assert device.total_global_memory == 1 << 20
    assert device.warp_size == 32
    assert device.max_clock_rate is None
    assert not session.ext_dev(2).exist
    assert not session.vulkan(0).exist
    assert not session.ext_dev(2).warp_size


def test_memory_is_copied_there_back_and_within(session: Any) -> None:
    device = session.ext_dev()
    one = session.array(DATA, device)
    assert (one.numpy() == DATA).all()
    other = session.empty(DATA.shape, "float32", device)
    one.copyto(other)
    assert (other.numpy() == DATA).all()
    here = session.empty(DATA.shape, "float32")
    other.copyto(here)
    assert (here.numpy() == DATA).all()
    here.copyto(other)
    view = other.view((2, 4), "float32", 16)
    assert (view.numpy() == DATA[1:]).all()
    view.copyfrom(-DATA[1:])
    assert (other.numpy() == np.concatenate([DATA[:1], -DATA[1:]])).all()
    large = session.array(np.arange(100_000, dtype="uint8"), device)
    assert (large.numpy() == np.arange(100_000, dtype="uint8")).all()
    assert session.empty((0,), "float32", device).numpy().shape == (0,)


def test_compiled_functions_take_and_return_its_tensors(session: Any) -> None:
    device = session.ext_dev()
    one, other, made = session.array(DATA, device), session.array(DATA * 10, device), session.empty((4,), device=device)
    add = session.get_function("testdevice.add")
    add(one.view((4,), "float32", 16), other.view((4,), "float32", 16), made)
    assert (made.numpy() == DATA[1] * 11).all()
    part = one.view((4,), "float32", 16)
    assert session.time_evaluator("testdevice.add", device, 2)(part, part, made).mean > 0
    passed = session.call("testdevice.pass", one.view((2, 4), "float32", 16))
    assert passed.device == device
    assert passed.shape == (2, 4)
    assert (passed.numpy() == DATA[1:]).all()
    with pytest.raises(rpcnb.RemoteError, match="expected a tensor on the device"):
        add(session.array(DATA), other, made)


def test_its_memory_is_given_back(session: Any) -> None:
    device = session.ext_dev()
    before = count(session, "allocated")
    tensor = session.array(DATA, device)
    assert count(session, "allocated") == before + DATA.nbytes
    passed = session.call("testdevice.pass", tensor)
    tensor.free()
    assert (passed.numpy() == DATA).all()
    passed.free()
    assert count(session, "allocated") == before
    with pytest.raises(rpcnb.RemoteError, match=r"cannot allocate 2097152 bytes on ext_dev:0.*no memory left"):
        session.empty((2 << 20,), "uint8", device)
    with pytest.raises(rpcnb.RemoteError, match="there is no device ext_dev:7"):
        session.empty((2,), "uint8", session.ext_dev(7))


def test_its_streams(session: Any) -> None:
    device = session.ext_dev()
    stream = device.create_stream()
    assert stream
    device.set_stream(stream)
    assert count(session, "current") >= 1
    device.sync(stream)
    assert count(session, "synced") == count(session, "current")
    device.set_stream(0)
    assert count(session, "current") == 0
    device.sync()
    assert count(session, "synced") == 0
    device.free_raw_stream(stream)
    assert count(session, "freed") == 1


def test_an_awaited_session_has_it_too(board: Start, library: Path) -> None:
    address, _ = board("--runtime", "auto", "--load-library", str(library))

    async def main() -> None:
        async with await rpcnb.connect_async(address, token=TOKEN) as session:
            tensor = await session.array(DATA, session.ext_dev())
            assert (await tensor.numpy() == DATA).all()
            assert await session.ext_dev().attribute("exist")

    asyncio.run(main())


def test_stocks_client_has_it_too(board: Start, library: Path, stock: Peer) -> None:
    _, port = board("--runtime", "auto", "--load-library", str(library))
    assert stock.run(copy_as_stock, port, f" -token={TOKEN}", seconds=60) == "a device of the tests"


def copy_as_stock(port: int, key: str) -> str:
    from stock_peer import tvm

    package = tvm()
    remote = package.rpc.connect("127.0.0.1", port, key=key)
    device = remote.ext_dev(0)
    assert device.exist
    tensor = package.runtime.tensor(DATA, device)
    assert (tensor.numpy() == DATA).all()
    made = package.runtime.empty((4,), "float32", device)
    view = tensor._create_view((4,), "float32")
    remote.get_function("testdevice.add")(view, view, made)
    assert (made.numpy() == DATA[0] * 2).all()
    return str(device.device_name)


def test_strangers_do_not_have_it(board: Start, library: Path) -> None:
    address, _ = board("--runtime", "none", token=False)
    with rpcnb.connect(address) as session:
        assert not session.ext_dev().exist
        with pytest.raises(rpcnb.RemoteError, match="Device API ext_dev is not enabled"):
            session.empty((4,), device=session.ext_dev())
