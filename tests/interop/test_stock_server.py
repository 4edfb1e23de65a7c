"""Our clients with a stock TVM server."""

from __future__ import annotations

import asyncio
import gc
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np
import pytest

import rpcnb
from rpcnb.client.session import Session
from rpcnb.values import NULL

if TYPE_CHECKING:
    from stock_peer import Peer

pytest_plugins = ("stock_peer",)
pytestmark = pytest.mark.stock

SCALARS = [None, True, False, 0, -1, 2**63 - 1, -(2**63), 0.0, -2.5, 1e308, float("inf")]
TEXTS = ["", "1234567", "12345678", "x" * 100_000, "äöü€𝄞"]
BLOBS = [b"", b"1234567", b"12345678", b"\0\xff" * 5000]


@pytest.fixture(scope="module")
def session(stock_port: int) -> Iterator[Session]:
    """One session for most tests; a stock server has only one at a time."""
    with rpcnb.connect("127.0.0.1", stock_port, key="stock", timeout=20) as session:
        yield session


def test_a_stock_server_is_recognized(session: Session) -> None:
    assert not session.is_rpcnb
    assert session.server_key == "stock"
    assert session.state == "ready"
    assert "stock TVM" in repr(session)


@pytest.mark.parametrize("value", [*SCALARS, *TEXTS, *BLOBS], ids=lambda value: repr(value)[:20])
def test_values_go_to_a_stock_server_and_come_back(session: Session, value: Any) -> None:
    result = session.call("stock.echo", value)
    assert result == value
    assert type(result) is type(value)


def test_bytearrays_and_memoryviews_are_bytes_at_a_stock_server(session: Session) -> None:
    assert session.call("stock.echo", bytearray(b"abc")) == b"abc"
    assert session.call("stock.echo", memoryview(b"0123456789")) == b"0123456789"


def test_numpy_scalars_are_python_scalars_at_a_stock_server(session: Session) -> None:
    assert session.call("stock.echo", np.float32(0.5)) == 0.5
    assert session.call("stock.echo", np.int8(-3)) == -3


def test_dtypes_devices_and_null_come_back_from_a_stock_server(session: Session) -> None:
    for name in ("float32", "int8", "bool", "bfloat16", "float8_e4m3fn", "float32x4", "int4", "uint16"):
        assert session.call("stock.echo", rpcnb.dtype(name)) == rpcnb.dtype(name)
    assert str(session.call("stock.dtype", "float16")) == "float16"
    assert session.call("stock.echo", session.cpu(3)) == session.cpu(3)
    assert session.call("stock.cpu", 2) == session.cpu(2)
    assert session.call("stock.echo", session.cuda(1)) == session.cuda(1)
    assert session.call("stock.echo", NULL) in (None, NULL)
    assert session.call("stock.null") in (None, NULL)


def test_text_with_nul_arrives_whole_at_a_stock_server(session: Session) -> None:
    # A stock server cuts text in its results at a NUL, so the length is asked for.
    assert session.call("stock.length", "ab\0cd") == 5
    assert session.call("stock.length", "0123456789\0" * 3) == 33


def test_functions_modules_and_objects_of_a_stock_server_are_used(session: Session) -> None:
    adder = session.call("stock.adder", 40)
    assert adder(2) == 42
    assert session.call("rpc.test.add_to_lhs", 2)(40) == 42
    shape = session.call("ffi.Shape", 7, 8, 9)
    assert session.call("rpc.testing.GetShapeSize", shape) == 3
    assert session.call("rpc.testing.GetShapeElem", shape, 1) == 8
    again = session.call("stock.echo", shape)
    assert session.call("rpc.testing.GetShapeElem", again, 2) == 9
    module = session.call("stock.module")
    with pytest.raises(rpcnb.FunctionNotFound, match="no function 'nothing'"):
        module["nothing"]
    same = session.call("stock.echo", module)
    with pytest.raises(rpcnb.FunctionNotFound):
        same["nothing"]
    del adder, shape, again, module, same
    gc.collect()
    assert session.call("rpc.test.addone", 1) == 2


def test_a_remote_function_as_argument_is_refused_before_sending(session: Session) -> None:
    adder = session.call("stock.adder", 1)
    with pytest.raises(rpcnb.ArgumentError, match="argument 0 is a remote function, which stock TVM servers"):
        session.call("stock.echo", adder)
    with pytest.raises(rpcnb.ArgumentError, match="argument 0 is a list"):
        session.call("stock.echo", [1])


def test_an_exception_of_a_stock_server_is_a_remote_error(session: Session) -> None:
    with pytest.raises(rpcnb.RemoteError) as info:
        session.call("rpc.test.except", "it burns")
    assert info.value.message == "it burns"
    assert info.value.remote_type == ""
    assert session.call("rpc.test.addone", 1) == 2


def test_names_of_a_stock_server_are_listed_and_suggested(session: Session) -> None:
    names = session.list_functions()
    assert "rpc.test.addone" in names
    assert len(names) > 500
    with pytest.raises(
        rpcnb.FunctionNotFound, match=r"has no function 'rpc.test.addon'; did you mean 'rpc.test.addone'"
    ):
        session.get_function("rpc.test.addon")
    assert session.fn.rpc.test.addone(4) == 5


ARRAYS = {
    "float32": np.arange(12, dtype="float32").reshape(3, 4),
    "int8": np.array([-128, 0, 127], "int8"),
    "bool": np.array([True, False, True]),
    "float16": np.array([0.5, -2.0], "float16"),
    "int64": np.array([2**62, -1], "int64"),
    "uint16": np.array([65535], "uint16"),
    "float64": np.linspace(0, 1, 1000),
    "bfloat16": np.array([1.5, -3.0], ml_dtypes.bfloat16),
    "float8": np.array([1.5, -2.0], ml_dtypes.float8_e4m3fn),
    "empty": np.zeros((0, 3), "float32"),
    "0-d": np.array(7.0, "float32"),
    "big": np.arange(1 << 20, dtype="float32"),
    "transposed": np.arange(6, dtype="float32").reshape(2, 3).T,
}


@pytest.mark.parametrize("name", ARRAYS)
def test_arrays_are_copied_to_a_stock_server_and_back(session: Session, name: str) -> None:
    array = ARRAYS[name]
    remote = session.array(array)
    back = remote.numpy()
    assert back.dtype == array.dtype
    np.testing.assert_array_equal(back, array)
    out = np.empty_like(array, order="C")
    assert remote.numpy(out) is out
    np.testing.assert_array_equal(out, array)
    other = session.empty(array.shape, remote.dtype)
    remote.copyto(other)
    np.testing.assert_array_equal(other.numpy(), array)


def test_a_stock_function_works_on_our_tensors(session: Session) -> None:
    remote = session.array(np.arange(10, dtype="float32"))
    assert session.call("stock.sum", remote) == 45
    assert session.call("stock.sum", np.ones((3, 4), "float32")) == 12  # uploaded for the call
    session.call("stock.fill", remote, 2.0)
    np.testing.assert_array_equal(remote.numpy(), np.full(10, 2, "float32"))
    session.call("rpc.test.remote_tensor_func", np.ones((3, 4), "float64"))


def test_tensors_that_a_stock_server_returns_are_read_and_released(session: Session) -> None:
    result = session.call("stock.arange", 5, "int32")
    np.testing.assert_array_equal(result.numpy(), np.arange(5, dtype="int32"))
    np.testing.assert_array_equal(session.call("stock.view", 8).numpy(), np.array([2, 3], "float32"))
    get = session.call("rpc.test.remote_return_nd", "get_arr")
    one, other = get(), get()
    one.free()
    del one
    np.testing.assert_array_equal(other.numpy(), np.zeros(10, "float32"))


def test_views_are_copied_at_their_offset_though_stock_clients_do_not(session: Session) -> None:
    whole = session.array(np.arange(12, dtype="float32"))
    view = whole.view((2, 2), byte_offset=16)
    np.testing.assert_array_equal(view.numpy(), np.array([[4, 5], [6, 7]], "float32"))
    assert session.call("stock.list", view) == "[[4.0, 5.0], [6.0, 7.0]]"
    view.copyfrom(np.zeros((2, 2), "float32"))
    target = session.empty((2, 2), "float32")
    whole.view((2, 2), byte_offset=32).copyto(target)
    np.testing.assert_array_equal(target.numpy(), np.array([[8, 9], [10, 11]], "float32"))
    np.testing.assert_array_equal(whole.numpy(), np.array([0, 1, 2, 3, 0, 0, 0, 0, 8, 9, 10, 11], "float32"))


def test_devices_and_streams_of_a_stock_server(session: Session) -> None:
    cpu = session.cpu()
    assert cpu.attribute("exist") is True
    assert cpu.attribute("total_global_memory") > 1 << 20
    assert cpu.attribute("max_clock_rate") is None
    assert session.cuda().attribute("exist") is False
    stream = cpu.create_stream()
    cpu.set_stream(stream)
    cpu.sync(stream)
    cpu.free_stream(stream)
    cpu.sync()
    with pytest.raises(rpcnb.RemoteError, match="not enabled"):
        session.empty((2,), "float32", session.cuda())
    with pytest.raises(rpcnb.RemoteError, match="memory scope"):
        session.empty((2,), "float32", mem_scope="texture")


def test_files_at_a_stock_server(session: Session, tmp_path: Path) -> None:
    path = tmp_path / "weights.bin"
    path.write_bytes(b"\0\1" * 1000)
    session.upload(path)
    assert session.download("weights.bin") == b"\0\1" * 1000
    session.upload(b"abc", "small.txt")
    assert session.download("small.txt") == b"abc"
    assert session.call("tvm.rpc.server.workpath", "small.txt").endswith("/small.txt")
    session.remove("small.txt")
    with pytest.raises(rpcnb.RemoteError):
        session.download("small.txt")
    with pytest.raises(rpcnb.FunctionNotFound, match=r"tvm\.rpc\.server\.listdir"):
        session.listdir()


def test_system_lib_of_a_stock_server(session: Session) -> None:
    library = session.system_lib()
    with pytest.raises(rpcnb.FunctionNotFound, match="no function 'absent'"):
        library["absent"]


def test_a_stock_server_times_a_global_function(session: Session) -> None:
    result = session.time_evaluator("rpc.test.addone", session.cpu(), number=5, repeat=3)(1)
    assert len(result.results) == 3
    assert 0 < result.min <= result.median <= result.max
    with pytest.raises(rpcnb.RemoteError, match="Cannot find absent in the global function"):
        session.time_evaluator("absent", session.cpu())


def test_a_call_to_a_stock_server_can_be_given_up(session: Session) -> None:
    with pytest.raises(rpcnb.DeadlineExceeded):
        session.call("stock.sleep", 0.4, timeout=0.1)
    assert session.call("rpc.test.addone", 1) == 2


def test_threads_share_a_stock_session(session: Session) -> None:
    add_one = session.get_function("rpc.test.addone")
    failures: list[object] = []

    def work(base: int) -> None:
        for index in range(100):
            result = add_one(base + index)
            if result != base + index + 1:
                failures.append(result)

    threads = [threading.Thread(target=work, args=(1000 * number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_a_busy_stock_server_is_named_within_the_timeout(session: Session, stock_port: int) -> None:
    assert session.state == "ready"  # the server serves us, so nobody else
    with pytest.raises(rpcnb.ConnectFailed, match="stock TVM server does so while it serves another session") as info:
        rpcnb.connect("127.0.0.1", stock_port, key="stock", timeout=0.5)
    assert info.value.phase == "handshake"


@pytest.fixture(scope="session")
def free_port(stock_servers: Peer) -> int:
    """Port of another stock server, which is free for short sessions."""
    from stock_peer import start_stock_server

    port: int = stock_servers.run(start_stock_server, "free")
    return port


def test_a_wrong_key_is_refused_by_a_stock_server(free_port: int) -> None:
    with pytest.raises(rpcnb.KeyMismatch, match="wrong key or token"):
        rpcnb.connect("127.0.0.1", free_port, key="other")


def test_a_stock_server_cannot_prove_a_token_and_the_user_is_told(free_port: int) -> None:
    with pytest.raises(rpcnb.KeyMismatch, match="a stock server needs none: leave token=, RPCNB_TOKEN out"):
        rpcnb.connect("127.0.0.1", free_port, key="free", token="abc")


def test_a_failed_call_keeps_the_functions_it_has_looked_up(serve: Callable[..., Any]) -> None:
    """Handles of replies that the operation had consumed were freed twice; a stock server crashed of it later."""
    server = serve()

    async def awaited() -> None:
        async with await rpcnb.connect_async(server.address) as session:
            for _ in range(3):
                with pytest.raises(rpcnb.RemoteError, match="it burns"):
                    await session.call("rpc.test.except", "it burns")
                with pytest.raises(rpcnb.FunctionNotFound, match="did you mean"):
                    await session.get_function("rpc.test.addon")

    asyncio.run(awaited())
    with rpcnb.connect(server.address) as session:
        for _ in range(3):
            with pytest.raises(rpcnb.RemoteError, match="it burns"):
                session.call("rpc.test.except", "it burns")
            with pytest.raises(rpcnb.FunctionNotFound, match="did you mean"):
                session.get_function("rpc.test.addon")


def test_without_extensions_we_are_a_stock_client(free_port: int) -> None:
    with rpcnb.connect(f"rpc://127.0.0.1:{free_port}/free", extensions=False) as session:
        assert session.call("rpc.test.addone", 1) == 2


def test_the_time_limit_of_a_stock_session_is_a_session_timeout(free_port: int) -> None:
    with rpcnb.connect("127.0.0.1", free_port, key="free", session_timeout=0.4) as session:
        with pytest.raises(rpcnb.SessionTimeout, match="session_timeout"):
            session.call("stock.sleep", 10)
        assert session.timed_out
        with pytest.raises(rpcnb.SessionTimeout):
            session.call("rpc.test.addone", 1)


def test_a_failing_session_constructor_of_a_stock_server(free_port: int) -> None:
    with pytest.raises((rpcnb.RemoteError, rpcnb.ConnectFailed), match=r"no\.Such"):
        rpcnb.connect("127.0.0.1", free_port, key="free", session_constructor_args=["no.Such"])


def test_through_a_stock_server_to_ours(free_port: int, serve: Callable[..., Any]) -> None:
    server = serve(key="inner")
    hop = ["rpc.Connect", "127.0.0.1", server.port, "inner", False]
    with rpcnb.connect("127.0.0.1", free_port, key="free", session_constructor_args=hop) as session:
        assert session.call("rpc.test.addone", 41) == 42
        assert session.call("rpc.test.add_to_lhs", 40)(2) == 42
        remote = session.array(np.arange(6, dtype="float32").reshape(2, 3))
        np.testing.assert_array_equal(remote.numpy(), np.arange(6, dtype="float32").reshape(2, 3))
        view = remote.view((3,), byte_offset=12)  # the stock hop loses a copy's offset, so this is staged
        np.testing.assert_array_equal(view.numpy(), np.array([3, 4, 5], "float32"))
        view.copyfrom(np.array([30, 40, 50], "float32"))
        np.testing.assert_array_equal(remote.numpy(), np.array([[0, 1, 2], [30, 40, 50]], "float32"))
        session.upload(b"abc", "file")
        assert session.listdir() == ["file"]
        with pytest.raises(rpcnb.RemoteError, match="it burns"):
            session.call("rpc.test.except", "it burns")


def test_through_our_server_to_a_stock_one(free_port: int, serve: Callable[..., Any]) -> None:
    hop = ["rpc.Connect", "127.0.0.1", free_port, "free", False]
    with rpcnb.connect(serve().address, session_constructor_args=hop) as session:
        assert session.call("stock.kind", 1.5) == "float"
        assert session.call("stock.echo", "text") == "text"
        assert session.call("stock.echo", b"bytes and more") == b"bytes and more"
        assert session.call("stock.adder", 40)(2) == 42
        remote = session.array(np.arange(6, dtype="float32"))
        assert session.call("stock.sum", remote) == 15
        np.testing.assert_array_equal(remote.view((3,), byte_offset=12).numpy(), np.array([3, 4, 5], "float32"))
        np.testing.assert_array_equal(session.call("stock.arange", 3, "int8").numpy(), np.arange(3, dtype="int8"))
        with pytest.raises(rpcnb.RemoteError, match="it burns"):
            session.call("rpc.test.except", "it burns")
        assert "stock.echo" in session.list_functions()


def test_through_a_stock_server_to_another(free_port: int, stock_servers: Peer) -> None:
    from stock_peer import start_stock_server

    inner = stock_servers.run(start_stock_server, "inner")
    hop = ["rpc.Connect", "127.0.0.1", inner, "inner", False]
    with rpcnb.connect("127.0.0.1", free_port, key="free", session_constructor_args=hop) as session:
        assert session.call("stock.echo", "text") == "text"
        remote = session.array(np.arange(6, dtype="float32"))
        assert session.call("stock.sum", remote) == 15
        with pytest.raises(rpcnb.RemoteError, match="it burns"):
            session.call("rpc.test.except", "it burns")


def test_a_stock_server_that_dies_is_a_lost_session(stock_servers: Peer) -> None:
    from stock_peer import start_stock_server

    port = stock_servers.run(start_stock_server, "dies")
    with rpcnb.connect("127.0.0.1", port, key="dies") as session:
        kill = session.get_function("stock.exit")
        with pytest.raises(rpcnb.SessionLost):
            kill()
        assert session.state == "lost"


def test_an_async_session_with_a_stock_server(free_port: int, tmp_path: Path) -> None:
    async def story() -> None:
        async with await rpcnb.connect_async("127.0.0.1", free_port, key="free") as session:
            assert not session.is_rpcnb
            for value in [*SCALARS, *TEXTS, *BLOBS]:
                result = await session.call("stock.echo", value)
                assert result == value
                assert type(result) is type(value)
            assert await session.call("stock.length", "ab\0cd") == 5
            assert str(await session.call("stock.echo", rpcnb.dtype("bfloat16"))) == "bfloat16"
            assert await session.call("stock.echo", session.cpu(3)) == session.cpu(3)
            for array in ARRAYS.values():
                remote = await session.array(array)
                np.testing.assert_array_equal(await remote.numpy(), array)
            whole = await session.array(np.arange(12, dtype="float32"))
            view = whole.view((2,), byte_offset=40)
            np.testing.assert_array_equal(await view.numpy(), np.array([10, 11], "float32"))
            result = await session.call("stock.arange", 3, "float32")
            np.testing.assert_array_equal(await result.numpy(), np.arange(3, dtype="float32"))
            adder = await session.call("stock.adder", 40)
            assert await adder(2) == 42
            assert await asyncio.gather(*(adder(number) for number in range(50))) == list(range(40, 90))
            with pytest.raises(rpcnb.RemoteError, match="it burns"):
                await session.call("rpc.test.except", "it burns")
            with pytest.raises(rpcnb.FunctionNotFound, match=r"did you mean 'rpc\.test\.addone'"):
                await session.get_function("rpc.test.addon")
            with pytest.raises(rpcnb.DeadlineExceeded):
                await session.call("stock.sleep", 0.3, timeout=0.05)
            await session.upload(b"abc", "file")
            assert await session.download("file") == b"abc"
            evaluate = await session.time_evaluator("rpc.test.addone", session.cpu(), number=3, repeat=2)
            assert len((await evaluate(1)).results) == 2
            library = await session.system_lib()
            with pytest.raises(rpcnb.FunctionNotFound):
                await library.get_function("absent")
            await session.cpu().sync()

    asyncio.run(story())


def test_the_time_limit_of_an_awaited_stock_session(free_port: int) -> None:
    async def story() -> None:
        async with await rpcnb.connect_async("127.0.0.1", free_port, key="free", session_timeout=0.3) as session:
            with pytest.raises(rpcnb.SessionTimeout):
                await session.call("stock.sleep", 10)

    asyncio.run(story())


def test_a_busy_stock_server_is_named_to_an_awaiting_client(session: Session, stock_port: int) -> None:
    assert session.state == "ready"
    with pytest.raises(rpcnb.ConnectFailed, match="stock TVM server does so while it serves another session"):
        asyncio.run(rpcnb.connect_async("127.0.0.1", stock_port, key="stock", timeout=0.5))


def anonymous_memory() -> int:
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) << 10 for line in status if line.startswith("RssAnon"))


def test_u3_a_file_of_a_stock_server_is_written_as_it_comes(session: Session, tmp_path: Path) -> None:
    path = tmp_path / "huge.bin"
    with path.open("wb") as file:
        for _ in range(192):
            file.write(np.random.default_rng(4).bytes(1 << 20))
    session.upload(path, "huge.bin")
    before, seen, totals = anonymous_memory(), [0], []

    def look(transfer: Any) -> None:
        seen.append(anonymous_memory())
        totals.append(transfer.total)

    session.download("huge.bin", tmp_path / "back.bin", progress=look)
    assert max(seen) - before < 16 << 20
    assert totals[-1] == 192 << 20, "its size is known as soon as it comes"
    assert (tmp_path / "back.bin").read_bytes() == path.read_bytes()
    session.download("huge.bin", tmp_path / "again.bin")
    assert (tmp_path / "again.bin").stat().st_size == 192 << 20
    session.remove("huge.bin")
    session.upload(b"tiny", "tiny")
    session.download("tiny", tmp_path / "tiny")
    assert (tmp_path / "tiny").read_bytes() == b"tiny"
