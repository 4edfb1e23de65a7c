"""Our client with a server in C++: TVM's runtime, without Python."""

from __future__ import annotations

import asyncio
import subprocess
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from test_tvm_devices import build

import rpcnb

pytestmark = [pytest.mark.stock, pytest.mark.timeout(120)]


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build("cppserver.cc", tmp_path_factory.mktemp("cpp") / "server")


@pytest.fixture
def address(program: Path) -> Iterator[str]:
    with subprocess.Popen([program], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        yield f"127.0.0.1:{int(process.stdout.readline())}"
        process.kill()


def test_calls_copies_files_and_errors(address: str) -> None:
    with rpcnb.connect(address) as session:
        assert not session.is_rpcnb
        assert session.key == "" or session.server_key == "cpp"
        assert session.call("cpp.add", 20, 22) == 42
        data = np.arange(100_000, dtype="float32")
        tensor = session.array(data)
        assert (tensor.numpy() == data).all()
        assert (tensor.view((10,), "float32", 40).numpy() == data[10:20]).all()
        assert session.listdir() == ["one.txt", "two.txt"]
        assert session.cpu().exist
        assert not session.cuda().exist
        with pytest.raises(rpcnb.FunctionNotFound, match=r"no function 'cpp\.ad'; did you mean 'cpp\.add'"):
            session.get_function("cpp.ad")
        with pytest.raises(rpcnb.RemoteError):
            session.call("cpp.add", "text", 1)
        session.reconnect()
        assert session.call("cpp.add", 1, 2) == 3


def test_awaited(address: str) -> None:
    async def main() -> None:
        async with await rpcnb.connect_async(address) as session:
            found = await asyncio.gather(*(session.call("cpp.add", number, 1) for number in range(20)))
            assert found == list(range(1, 21))

    asyncio.run(main())
