"""Programs without Python that serve a session: TVM's minrpc server behind ``rpc.PopenSession``."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import psutil
import pytest
from conftest import eventually

import rpcnb
from rpcnb.server.isolation import Isolation

if TYPE_CHECKING:
    from stock_peer import Peer

pytest_plugins = ("stock_peer",)
pytestmark = [pytest.mark.stock, pytest.mark.timeout(180)]

TOKEN = "a-token-of-the-tests"
Serve = Callable[..., Any]


def build(folder: str) -> str:
    import minrpc_program

    return minrpc_program.build(folder)


def run_as_stock(*args: Any) -> Any:
    import minrpc_program

    return minrpc_program.run_as_stock(*args)


@pytest.fixture(scope="module")
def program(stock: Peer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(stock.run(build, str(tmp_path_factory.mktemp("minrpc")), seconds=120))


@pytest.fixture(params=["one process", "isolated"])
def board(request: pytest.FixtureRequest) -> Iterator[Any]:
    isolate = Isolation() if request.param == "isolated" else False
    with rpcnb.Server(port=0, silent=True, token=TOKEN, isolate=isolate) as server:
        yield server


def check(session: Any) -> None:
    given, made = session.array(np.arange(4, dtype="float32")), session.empty((4,), "float32")
    session.system_lib()["addone"](given, made)
    assert (made.numpy() == [1, 2, 3, 4]).all()


def programs() -> list[psutil.Process]:
    """The programs that run: of this process, and of sessions' processes."""
    found = psutil.Process().children(recursive=True)
    return [one for one in found if one.is_running() and one.name() == "server.minrpc"]


def test_a_program_serves_a_session(board: Any, program: Path) -> None:
    arguments = ["rpc.PopenSession", program.read_bytes()]
    with rpcnb.connect(board.address, token=TOKEN, session_constructor_args=arguments) as session:
        check(session)
        assert len(programs()) == 1
        with rpcnb.connect(board.address, token=TOKEN, session_constructor_args=arguments) as other:
            check(other)
            check(session)
    eventually(lambda: not programs(), "the end of the programs")


def test_a_program_of_the_server_serves_an_awaited_session(board: Any, program: Path) -> None:
    async def main() -> None:
        arguments = ["rpc.PopenSession", str(program)]
        async with await rpcnb.connect_async(board.address, token=TOKEN, session_constructor_args=arguments) as session:
            given, made = await session.array(np.arange(4, dtype="float32")), await session.empty((4,), "float32")
            library = await session.system_lib()
            addone = await library.get_function("addone")
            await addone(given, made)
            assert (await made.numpy() == [1, 2, 3, 4]).all()

    asyncio.run(main())


def test_stocks_client_has_a_program_run(board: Any, program: Path, stock: Peer) -> None:
    made = stock.run(run_as_stock, board.port, f" -token={TOKEN}", str(program), seconds=60)
    assert (made == [1, 2, 3, 4]).all()


def test_our_client_goes_on_to_a_program_at_stocks_server(stock_port: int, program: Path) -> None:
    with rpcnb.connect(
        "127.0.0.1", stock_port, key="stock", session_constructor_args=["rpc.PopenSession", program.read_bytes()]
    ) as session:
        check(session)


def test_a_program_that_ends_is_told(board: Any, program: Path) -> None:
    arguments = ["rpc.PopenSession", program.read_bytes()]
    with rpcnb.connect(board.address, token=TOKEN, session_constructor_args=arguments) as session:
        (running,) = programs()
        running.kill()
        with pytest.raises((rpcnb.RemoteError, rpcnb.errors.SessionLost)):
            check(session)


@pytest.mark.parametrize(
    ("binary", "text"),
    [
        (b"no program at all", "the program cannot be run: Exec format error"),
        (b"", "cannot be run"),
        (b"#!/bin/sh\nexit 3\n", "does not speak the protocol: it has exited with code 3"),
        (b"#!/bin/sh\nkill -9 $$\n", "does not speak the protocol: it was ended by signal 9"),
        (
            b'#!/bin/sh\neval "echo 123456789012345678901234567890 >&$1"\nexec sleep 100\n',
            "does not speak the protocol",
        ),
        (b"#!/bin/sh\nexec sleep 100\n", "it has not answered in 0.5 s"),
        ("/no/such/program", "is no program that can be run here"),
        ("/tmp", "is no program that can be run here"),
        (5, "expects a program as bytes, or a path, got int"),
    ],
)
def test_what_is_no_such_program_is_one_line(
    serve: Serve, binary: Any, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rpcnb.server.popen._START", 0.5 if "0.5" in text else 10.0)
    server = serve(token=TOKEN)
    with pytest.raises(rpcnb.RemoteError, match=r"Error caught from session constructor rpc\.Popen") as caught:
        rpcnb.connect(server.address, token=TOKEN, session_constructor_args=["rpc.PopenSession", binary])
    assert text in str(caught.value)
    eventually(lambda: not programs(), "the end of the programs")


def test_a_program_needs_trust(serve: Serve, program: Path) -> None:
    with pytest.raises(rpcnb.RemoteError, match="runs a program for its client: give the server a token"):
        rpcnb.connect(serve().address, session_constructor_args=["rpc.PopenSession", program.read_bytes()])


def test_the_lean_server_needs_nothing_of_tvm_for_that(program: Path) -> None:
    code = f"""
import sys, numpy as np, rpcnb
with rpcnb.Server(port=0, silent=True, token={TOKEN!r}) as server:
    arguments = ["rpc.PopenSession", {str(program)!r}]
    with rpcnb.connect(server.address, token={TOKEN!r}, session_constructor_args=arguments) as session:
        made = session.empty((4,), "float32")
        session.system_lib()["addone"](session.array(np.ones(4, "float32")), made)
        assert (made.numpy() == 2).all()
assert not [name for name in sys.modules if name.partition(".")[0] in ("tvm", "tvm_ffi")]
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
