"""Stock TVM clients with our server."""

from __future__ import annotations

import asyncio
import socket
import struct
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np
import pytest

import rpcnb
from rpcnb.runtime.registry import Registry

if TYPE_CHECKING:
    from stock_peer import Peer

pytest_plugins = ("stock_peer",)
pytestmark = pytest.mark.stock

SCALARS = [None, True, False, 0, -1, 2**63 - 1, -(2**63), 0.0, -2.5, 1e308]
TEXTS = ["", "1234567", "12345678", "x" * 100_000, "äöü€𝄞"]
BLOBS = [b"", b"1234567", b"12345678", b"\0\xff" * 5000]


def _remote(port: int, key: str = "", *constructor: Any, timeout: float = 0) -> Any:
    """Open a stock session; in the child."""
    from stock_peer import tvm

    return tvm().rpc.connect("127.0.0.1", port, key, timeout, list(constructor))


def _failure(function: Callable[..., Any], *args: Any) -> tuple[str, str]:
    """Return the class and the text of what a call raises; in the child."""
    try:
        result = function(*args)
    except Exception as error:
        return type(error).__name__, str(error)
    return "none", repr(result)


@pytest.fixture
def board(registry: Registry, serve: Callable[..., Any]) -> Any:
    """A server with functions of every kind."""
    registry.register("our.echo", lambda value: value)
    registry.register("our.kind", lambda value: type(value).__name__)
    registry.register("our.text", str)
    registry.register("our.fail", _fail)
    registry.register("our.sum", lambda array: float(np.sum(array, dtype="float64")))
    registry.register("our.list", lambda array: str(np.asarray(array, dtype="float64").tolist()))
    registry.register("our.shape", lambda array: str(array.shape))
    registry.register("our.arange", lambda count, kind: np.arange(count).astype(kind))
    registry.register("our.view", lambda count: np.arange(count, dtype="float32")[2:4])
    registry.register("our.scale", _scale)
    registry.register("our.adder", lambda x: lambda y: x + y)
    registry.register("our.object", lambda: {"some": "object"})
    registry.register("our.key", lambda thing, key: thing[key])
    registry.register("our.cpu", lambda index: rpcnb.device("cpu", index))
    registry.register("our.dtype", rpcnb.dtype)
    registry.register("our.null", lambda: rpcnb.values.NULL)
    registry.register("our.module", _module)
    registry.register("our.async", _sleep)
    registry.register("our.callback", _later, callback=True)
    return serve()


def _fail(text: str) -> None:
    raise ValueError(text)


def _scale(array: np.ndarray[Any, Any], factor: float) -> None:
    array *= factor


def _module() -> rpcnb.Module:
    module = rpcnb.Module({"double": lambda x: 2 * x, "nothing": lambda: None})
    module.import_module(rpcnb.Module({"triple": lambda x: 3 * x}))
    return module


async def _sleep(value: Any, seconds: float) -> Any:
    await asyncio.sleep(seconds)
    return value


def _later(done: Any, value: Any) -> None:
    threading.Timer(0.02, lambda: done(value)).start()


# -- values ----------------------------------------------------------------------------------------------------------


def echoes(port: int, values: list[Any]) -> list[Any]:
    """Send every value and return what comes back; in the child."""
    session = _remote(port)
    echo, kind = session.get_function("our.echo"), session.get_function("our.kind")
    return [(echo(value), kind(value)) for value in values]


def test_values_of_a_stock_client_arrive_and_come_back(stock: Peer, board: Any) -> None:
    values = [*SCALARS, *TEXTS, *BLOBS]
    for value, (back, kind) in zip(values, stock.run(echoes, board.port, values), strict=True):
        assert back == value
        assert type(back) is type(value)
        assert kind in (type(value).__name__, "StoredFile")
    assert stock.run(echoes, board.port, [bytearray(b"abc")]) == [(b"abc", "bytes")]


def other_kinds(port: int) -> dict[str, Any]:
    """Send and fetch what is neither number nor text; in the child."""
    import ctypes

    from stock_peer import tvm

    session = _remote(port)
    get = session.get_function
    echo = get("our.echo")
    thing = get("our.object")()
    adder = get("our.adder")(40)
    return {
        "dtypes": [str(echo(tvm().DataType(name))) for name in ("float32", "bool", "bfloat16", "float32x4", "int4")],
        "made dtype": str(get("our.dtype")("float16")),
        "device": (echo(session.cpu(3)).index, get("our.text")(session.cpu(3)), get("our.text")(session.cuda(1))),
        "made device": (get("our.cpu")(2).dlpack_device_type() % 128, get("our.cpu")(2).index),
        "null": repr(echo(ctypes.c_void_p(0))),
        "made null": repr(get("our.null")()),
        "object": get("our.key")(thing, "some"),
        "echoed object": get("our.key")(echo(thing), "some"),
        "function": adder(2),
        "function of a well-known name": get("rpc.test.add_to_lhs")(40)(2),
        "shape": (
            get("rpc.testing.GetShapeSize")(get("ffi.Shape")(7, 8, 9)),
            get("rpc.testing.GetShapeElem")(get("ffi.Shape")(7, 8, 9), 1),
        ),
        "missing": _failure(get, "our.missing"),
        "failure": _failure(get("our.fail"), "it burns"),
        "failure beyond ASCII": _failure(get("our.fail"), "brännt"),
        "after it": echo(1),
        "synchronous": [get("our.async")(7, 0.02), get("our.callback")("text")],
    }


def test_other_kinds_of_values_between_a_stock_client_and_us(stock: Peer, board: Any) -> None:
    found = stock.run(other_kinds, board.port)
    assert found["dtypes"] == ["float32", "bool", "bfloat16", "float32x4", "int4"]
    assert found["made dtype"] == "float16"
    assert found["device"] == (3, "cpu:3", "cuda:1")
    assert found["made device"] == (1, 2)
    assert found["null"] in ("None", "c_void_p(None)")
    assert found["made null"] in ("None", "c_void_p(None)")
    assert (found["object"], found["echoed object"]) == ("object", "object")
    assert (found["function"], found["function of a well-known name"], found["shape"]) == (42, 42, (3, 8))
    assert found["missing"][0] == "AttributeError"
    assert "our.missing" in found["missing"][1]
    kind, text = found["failure"]
    assert kind == "RPCError"
    assert text.splitlines()[1:] == ["it burns"]
    assert found["failure beyond ASCII"][1].endswith("brännt")
    assert (found["after it"], found["synchronous"]) == (1, [7, "text"])


# -- tensors ---------------------------------------------------------------------------------------------------------

ARRAYS = [
    np.arange(12, dtype="float32").reshape(3, 4),
    np.array([-128, 0, 127], "int8"),
    np.array([True, False, True]),
    np.array([0.5, -2.0], "float16"),
    np.array([2**62, -1], "int64"),
    np.array([1.5, -3.0], ml_dtypes.bfloat16),
    np.array([1.5, -2.0], ml_dtypes.float8_e4m3fn),
    np.zeros((0, 3), "float32"),
    np.array(7.0, "float32"),
    np.arange(1 << 20, dtype="float32"),
]


def round_trips(port: int, arrays: list[Any]) -> list[Any]:
    """Copy arrays there, among remote and back; in the child."""
    from stock_peer import tvm

    runtime = tvm().runtime
    session = _remote(port)
    shape = session.get_function("our.shape")
    results = []
    for array in arrays:
        remote = runtime.tensor(array, session.cpu())
        other = runtime.empty(array.shape, str(array.dtype), session.cpu())
        if array.size:
            remote.copyto(other)
        results.append((remote.numpy(), other.numpy(), shape(remote)))
    return results


def test_arrays_of_a_stock_client_are_copied_to_us_and_back(stock: Peer, board: Any) -> None:
    for array, (back, other, shape) in zip(ARRAYS, stock.run(round_trips, board.port, ARRAYS), strict=True):
        assert back.dtype == array.dtype
        np.testing.assert_array_equal(back, array)
        np.testing.assert_array_equal(other, array)
        assert shape == str(array.shape)


def tensor_work(port: int) -> dict[str, Any]:
    """Use tensors as arguments and results, with views; in the child."""
    from stock_peer import tvm

    runtime = tvm().runtime
    session = _remote(port)
    get = session.get_function
    whole = runtime.tensor(np.arange(12, dtype="float32"), session.cpu())
    view = whole._create_view((2, 2), None, 16)
    found = {"sum": get("our.sum")(whole), "view": get("our.list")(view), "shape": get("our.shape")(view)}
    get("our.scale")(view, 10.0)
    found["scaled"] = whole.numpy()
    target = runtime.empty((2, 2), "float32", session.cpu())
    view.copyto(target)
    found["copied"] = target.numpy()
    found["result"] = get("our.arange")(5, "int32").numpy()
    found["result view"] = get("our.list")(get("our.view")(8))
    get("rpc.test.remote_tensor_func")(runtime.tensor(np.ones((3, 4)), session.cpu()))
    array = get("rpc.test.remote_return_nd")("get_arr")
    found["kept"] = [array().numpy(), array().numpy()]
    found["no scope"] = _failure(runtime.empty, (2,), "float32", session.cpu(), "texture")
    found["no device"] = _failure(runtime.empty, (2,), "float32", session.cuda())
    return found


def test_a_stock_client_works_on_tensors(stock: Peer, board: Any) -> None:
    found = stock.run(tensor_work, board.port)
    assert found["sum"] == 66
    assert found["view"] == "[[4.0, 5.0], [6.0, 7.0]]"
    assert found["shape"] == "(2, 2)"
    np.testing.assert_array_equal(found["scaled"], np.array([0, 1, 2, 3, 40, 50, 60, 70, 8, 9, 10, 11], "float32"))
    np.testing.assert_array_equal(found["copied"], np.array([[40, 50], [60, 70]], "float32"))
    np.testing.assert_array_equal(found["result"], np.arange(5, dtype="int32"))
    assert found["result view"] == "[2.0, 3.0]"
    for kept in found["kept"]:
        np.testing.assert_array_equal(kept, np.zeros(10, "float32"))
    assert "texture" in found["no scope"][1]
    assert "cuda" in found["no device"][1]


def device_work(port: int) -> dict[str, Any]:
    """Ask for attributes, use streams; in the child."""
    session = _remote(port)
    cpu = session.cpu()
    stream = cpu.create_raw_stream()
    cpu.set_raw_stream(stream)
    cpu.sync(stream)
    cpu.free_raw_stream(stream)
    cpu.sync()
    return {
        "exist": cpu.exist,
        "memory": cpu.total_global_memory,
        "clock": cpu.max_clock_rate,
        "cuda": session.cuda().exist,
    }


def test_devices_and_streams_for_a_stock_client(stock: Peer, board: Any) -> None:
    found = stock.run(device_work, board.port)
    assert found["memory"] > 1 << 20
    assert {name: found[name] for name in ("exist", "clock", "cuda")} == {"exist": True, "clock": None, "cuda": False}


# -- files and modules -----------------------------------------------------------------------------------------------


def file_work(port: int) -> dict[str, Any]:
    """Upload, list, download, remove; in the child."""
    session = _remote(port)
    session.upload(bytearray(b"\0\1" * 5000), "weights.bin")
    session.upload(bytearray(b"abc"), "small.txt")
    found = {
        "names": sorted(session.listdir(".").split(",")),
        "data": bytes(session.download("weights.bin")),
        "path": session.get_function("tvm.rpc.server.workpath")("small.txt"),
    }
    session.remove("small.txt")
    found["left"] = session.listdir(".")
    found["missing"] = _failure(session.download, "small.txt")
    found["outside"] = _failure(session.upload, bytearray(b"x"), "../outside")
    return found


def test_files_of_a_stock_client(stock: Peer, board: Any) -> None:
    found = stock.run(file_work, board.port)
    assert found["names"] == ["small.txt", "weights.bin"]
    assert found["data"] == b"\0\1" * 5000
    assert found["path"].endswith("/small.txt")
    assert found["left"] == "weights.bin"
    assert found["missing"][0] == "RPCError"
    assert found["outside"][0] == "RPCError"


def module_work(port: int) -> dict[str, Any]:
    """Use modules that functions return, and the system library; in the child."""
    session = _remote(port)
    module = session.get_function("our.module")()
    library = session.system_lib()
    timing = module.time_evaluator("double", session.cpu(), number=5, repeat=3)(21)
    registered = session.get_function("our.echo")
    return {
        "double": module["double"](21),
        "triple": module.get_function("triple", query_imports=True)(14),
        "missing": _failure(module.__getitem__, "absent"),
        "again": session.get_function("our.echo")(module)["double"](4),
        "system": _failure(library.__getitem__, "absent"),
        "timing": list(timing.results),
        "still": registered(5),
    }


def test_modules_for_a_stock_client(stock: Peer, board: Any) -> None:
    found = stock.run(module_work, board.port)
    assert (found["double"], found["triple"], found["again"], found["still"]) == (42, 42, 8, 5)
    assert found["missing"][0] == "AttributeError"
    assert found["system"][0] == "AttributeError"
    assert len(found["timing"]) == 3
    assert min(found["timing"]) > 0


ADD_ONE = """
#include <stdint.h>
typedef struct { int32_t type_index; uint32_t zero; union { int64_t v_int64; void* v_ptr; }; } Any;
int __tvm_ffi_add_one(void* self, const Any* args, int32_t count, Any* result) {
  (void)self; (void)count;
  result->type_index = 1; result->zero = 0; result->v_int64 = args[0].v_int64 + 1;
  return 0;
}
"""


def compile_c(folder: Path, name: str, source: str) -> Path:
    """Compile a small library."""
    path = folder / f"{name}.so"
    (folder / f"{name}.c").write_text(source)
    subprocess.run(["gcc", "-shared", "-fPIC", "-o", str(path), str(folder / f"{name}.c")], check=True)
    return path


def library_work(port: int, path: str, key: str) -> dict[str, Any]:
    """Upload and load a library; in the child."""
    session = _remote(port, key)
    session.upload(path)
    module = session.load_module(Path(path).name)
    timing = module.time_evaluator("add_one", session.cpu(), number=10, repeat=2)(1)
    linked = session.download_linked_module(Path(path).name)
    return {"result": module["add_one"](41), "timing": list(timing.results), "linked": len(linked)}


def load_failure(port: int, path: str) -> tuple[str, str]:
    """Upload and try to load a library; in the child."""
    session = _remote(port)
    session.upload(path)
    return _failure(session.load_module, Path(path).name)


def test_a_stock_client_with_the_token_loads_a_library(
    stock: Peer, serve: Callable[..., Any], board: Any, tmp_path: Path
) -> None:
    path = compile_c(tmp_path, "add_one", ADD_ONE)
    trusted = serve(key="rpi", token="secret")
    found = stock.run(library_work, trusted.port, str(path), "rpi -token=secret")
    assert found["result"] == 42
    assert len(found["timing"]) == 2
    assert found["linked"] == path.stat().st_size
    kind, text = stock.run(load_failure, board.port, str(path))
    assert kind == "RPCError"
    assert "load_module needs trust: start the server with a token, or with --allow-native" in text


# -- sessions --------------------------------------------------------------------------------------------------------


def connect_failure(port: int, key: str) -> tuple[str, str]:
    """Try to connect; in the child."""
    return _failure(_remote, port, key)


def add_one(port: int, key: str, *constructor: Any) -> Any:
    """Call one function; in the child."""
    return _remote(port, key, *constructor).get_function("rpc.test.addone")(41)


def test_wrong_keys_and_tokens_of_a_stock_client_are_refused(
    stock: Peer, serve: Callable[..., Any], caplog: pytest.LogCaptureFixture
) -> None:
    port = serve(key="rpi", token="secret").port
    for key in ("other", "rpi", "rpi -token=wrong", "rpi -timeout=5"):
        kind, text = stock.run(connect_failure, port, key)
        assert kind != "none"
        assert "cannot find server that matches key" in text
    assert len(caplog.records) == 1, "further ones are summed up"
    assert "secret" not in caplog.text
    caplog.clear()
    assert stock.run(add_one, port, "rpi -token=secret") == 42
    assert stock.run(add_one, port, "rpi -unknown=1 -token=secret -timeout=20") == 42


def session_timeout(port: int) -> list[tuple[str, str]]:
    """Outlive a session's time limit, in a call and between calls; in the child."""
    session = _remote(port, timeout=0.3)
    called = _failure(session.get_function("our.async"), 1, 30.0)
    return [called, _failure(session.get_function, "our.echo")]


def test_the_time_limit_of_a_stock_clients_session(stock: Peer, board: Any) -> None:
    called, after = stock.run(session_timeout, board.port)
    assert called[0] == "RPCSessionTimeoutError"
    assert 'try to increase the "session_timeout" value' in called[1]
    assert after[0] != "none"
    assert stock.run(add_one, board.port, "") == 42


def hop_work(port: int, *constructor: Any) -> dict[str, Any]:
    """Do some of everything through a hop; in the child."""
    from stock_peer import tvm

    session = _remote(port, "", *constructor)
    get = session.get_function
    remote = tvm().runtime.tensor(np.arange(6, dtype="float32"), session.cpu())
    found = {
        "text": get("rpc.test.runtime_str_concat")("ab", "cd"),
        "adder": get("rpc.test.add_to_lhs")(40)(2),
        "array": remote.numpy(),
        "kept": get("rpc.test.remote_return_nd")("get_arr")().numpy(),
        "failure": _failure(get("rpc.test.except"), "it burns"),
        "missing": _failure(get, "absent"),
    }
    session.upload(bytearray(b"abc"), "file")
    found["file"] = bytes(session.download("file"))
    found["timing"] = len(session._sess.time_evaluator("rpc.test.addone", session.cpu(), repeat=2)(1).results)
    return found


def check_hop(found: dict[str, Any]) -> None:
    assert (found["text"], found["adder"], found["file"]) == ("abcd", 42, b"abc")
    np.testing.assert_array_equal(found["array"], np.arange(6, dtype="float32"))
    np.testing.assert_array_equal(found["kept"], np.zeros(10, "float32"))
    assert found["failure"][1].endswith("it burns")
    assert found["failure"][1].count("Error caught from RPC call") == 2
    assert found["missing"][0] == "AttributeError"


def test_a_stock_client_through_us_to_us(
    stock: Peer, board: Any, serve: Callable[..., Any], caplog: pytest.LogCaptureFixture
) -> None:
    inner = serve(key="inner")
    found = stock.run(hop_work, board.port, "rpc.Connect", "127.0.0.1", inner.port, "inner", False)
    check_hop(found)
    kind, text = stock.run(_constructor_failure, board.port, "rpc.Connect", "127.0.0.1", inner.port, "wrong", False)
    assert kind != "none"
    assert "wrong key or token" in text
    assert [record.getMessage().partition(": refused ")[0] for record in caplog.records] == ["server:inner"]
    caplog.clear()
    assert "no.Such" in stock.run(_constructor_failure, board.port, "no.Such")[1]


def _constructor_failure(port: int, *constructor: Any) -> tuple[str, str]:
    return _failure(_remote, port, "", *constructor)


def test_a_stock_client_through_us_to_a_stock_server(stock: Peer, board: Any, stock_servers: Peer) -> None:
    from stock_peer import start_stock_server

    inner = stock_servers.run(start_stock_server, "inner")
    check_hop(stock.run(hop_work, board.port, "rpc.Connect", "127.0.0.1", inner, "inner", False))


def test_a_stock_client_through_a_stock_server_to_us(
    stock: Peer, serve: Callable[..., Any], stock_servers: Peer
) -> None:
    from stock_peer import start_stock_server

    outer = stock_servers.run(start_stock_server, "")
    inner = serve(key="inner")
    check_hop(stock.run(hop_work, outer, "rpc.Connect", "127.0.0.1", inner.port, "inner", False))


def test_stock_and_our_clients_use_a_server_at_once(stock: Peer, board: Any) -> None:
    stock.start(session_timeout, board.port)  # stays for 0.3 s
    with rpcnb.connect(board.address) as session:
        assert session.call("our.echo", 42) == 42
    assert stock.finish()[0][0] == "RPCSessionTimeoutError"


# -- the event-driven server without a transport ----------------------------------------------------------------------


def relay(listener: socket.socket, seen: list[int]) -> None:
    """Carry one client's bytes to an event-driven server and back; the magic word is ours to answer."""
    client, _ = listener.accept()
    with client:
        (magic,) = struct.unpack("<i", client.recv(4, socket.MSG_WAITALL))
        assert magic == 0xFF271
        key = b"server:relay"
        client.sendall(struct.pack("<ii", magic, len(key)) + key)
        handler = rpcnb.create_event_driven_server(client.send, "relay", "%toinit")
        while True:
            data = client.recv(7000)
            result = handler(data, 3)
            while result == 2:
                result = handler(b"", 3)
            seen.append(result)
            if result == 0 or not data:
                return


def test_a_stock_client_drives_the_event_driven_server(stock: Peer) -> None:
    seen: list[int] = []
    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=relay, args=(listener, seen))
        thread.start()
        port = listener.getsockname()[1]
        ((back, _, _),) = stock.run(relayed_round_trip, port, [np.arange(1 << 16, dtype="float32")])
        np.testing.assert_array_equal(back, np.arange(1 << 16, dtype="float32"))
        thread.join(10)
        assert not thread.is_alive()
    assert set(seen[:-1]) == {1}
    assert seen[-1] == 0


def relayed_round_trip(port: int, arrays: list[Any]) -> list[Any]:
    """Call and copy through a relay, then close; in the child."""
    from stock_peer import tvm

    session = _remote(port)
    assert session.get_function("rpc.test.addone")(41) == 42
    assert _failure(session.get_function("rpc.test.except"), "it burns")[1].endswith("it burns")
    remotes = [tvm().runtime.tensor(array, session.cpu()) for array in arrays]
    return [(remote.numpy(), None, "") for remote in remotes]


def in_one_process() -> Any:
    """Serve and call in one process, which stock's destructors would stop. Runs in the child."""
    from stock_peer import tvm

    import rpcnb

    module = tvm()
    server = rpcnb.Server(port=0, silent=True)
    try:
        session = module.rpc.connect("127.0.0.1", server.port)
        return session.get_function("rpc.test.addone")(1)
    except Exception as error:
        return str(error)
    finally:
        server.close()


def test_a_stock_client_in_the_servers_own_process_is_told_that_it_would_hang(stock: Peer) -> None:
    said = stock.run(in_one_process)
    assert "tvm.rpc in the server's own process waits for ever when it frees a handle" in said
    assert "use rpcnb.connect() here" in said
