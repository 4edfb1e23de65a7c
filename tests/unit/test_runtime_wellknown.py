"""Functions that every server has."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from runtime_wire import Client, function_of, handle_of, module_of, object_of

from rpcnb.errors import DeviceError
from rpcnb.protocol.messages import CallFunc, Shutdown
from rpcnb.runtime import libraries, wellknown
from rpcnb.runtime.environment import Environment
from rpcnb.runtime.registry import Registry
from rpcnb.runtime.served import Module
from rpcnb.runtime.wellknown import WELL_KNOWN
from rpcnb.values import ModuleRef, TensorMeta

PREFIX = "tvm.rpc.server."


@pytest.fixture
def client(registry: Registry) -> Iterator[Client]:
    client = Client(Environment(registry=registry))
    yield client
    client.send(Shutdown())


def test_files_are_uploaded_listed_downloaded_and_removed(client: Client) -> None:
    assert client.call(PREFIX + "upload", "d/x", b"data") == (0, None)
    assert client.call(PREFIX + "upload", "a", b"") == (0, None)
    assert client.call(PREFIX + "listdir", ".") == (11, "a,d")
    assert client.call(PREFIX + "download", "d/x") == (12, b"data")
    assert client.call(PREFIX + "workpath", "d/x")[1] == str(client.local.files.root / "d" / "x")
    assert client.call(PREFIX + "remove", "a") == (0, None)
    assert client.call(PREFIX + "remove", "") == (0, None), "TVM's runners clean up so"
    assert client.call(PREFIX + "listdir", "") == (11, "d")
    assert "no such file in the session's directory" in client.call_error(PREFIX + "download", "a")
    assert "is refused" in client.call_error(PREFIX + "workpath", "../x")


@pytest.mark.parametrize("name", ["load_module", "download_linked_module"])
def test_native_code_needs_trust(client: Client, name: str) -> None:
    client.call(PREFIX + "upload", "m.so", b"data")
    assert client.call_error(PREFIX + name, "m.so") == (
        f"{name} needs trust: start the server with a token, or with --allow-native"
    )


def test_with_trust_libraries_are_linked_and_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    module = Module({"f": lambda: 1})
    monkeypatch.setattr(libraries, "load_library", lambda path, pin, runtime: module)
    client = Client(Environment(native=True))
    client.call(PREFIX + "upload", "m.so", b"data")
    assert client.call(PREFIX + "download_linked_module", "m.so") == (12, b"data")
    assert "cannot find file" in client.call_error(PREFIX + "download_linked_module", "n.so")
    ref = module_of(client.call(PREFIX + "load_module", "m.so"))
    function = function_of(client.call(PREFIX + "ModuleGetFunction", ref, "f", True))
    assert client.call(function.handle) == (1, 1)
    client.send(Shutdown())


def test_modules_import_and_find_functions(client: Client) -> None:
    modules = {"parent": Module({"p": lambda: "p"}), "child": Module({"c": lambda: "c"})}
    client.environment.registry.register("module", modules.__getitem__)
    parent, child = (module_of(client.call("module", name)) for name in modules)
    get = client.find(PREFIX + "ModuleGetFunction")
    assert client.call(get, parent, "c", True) == (0, None)
    assert client.call(PREFIX + "ImportModule", parent, child) == (0, None)
    assert client.call(get, parent, "c", False) == (0, None)
    assert client.call(get, parent, "c") == (0, None)
    assert client.call(handle_of(client.call(get, parent, "c", True))) == (11, "c")
    assert client.call(handle_of(client.call(get, parent, "p", False))) == (11, "p")
    assert client.call_error(get, 5, "c", True) == "expected a module, got int"
    assert client.call_error(PREFIX + "ImportModule", parent, "x") == "expected a module, got str"
    assert "expected a module" in client.call_error(get, ModuleRef(get), "c", True)


def test_the_system_library_is_an_empty_module(client: Client) -> None:
    ref = module_of(client.call("ffi.SystemLib"))
    assert client.call(PREFIX + "ModuleGetFunction", ref, "f", True) == (0, None)
    assert client.call("ffi.SystemLib", "prefix_")[0] == 73


def test_the_names_of_all_functions_are_served_by_number(client: Client) -> None:
    client.environment.registry.register("a.first", len)
    names = handle_of(client.call("ffi.FunctionListGlobalNamesFunctor"))
    count = client.call(names, -1)[1]
    assert count == len(WELL_KNOWN) + 1
    assert isinstance(count, int)
    assert sorted([*WELL_KNOWN, "a.first"]) == [client.call(names, index)[1] for index in range(count)]
    assert "out of range" in client.call_error(names, count)


def test_shapes_are_objects(client: Client) -> None:
    shape = object_of(client.call("ffi.Shape", 3, 4, 5))
    assert client.call("rpc.testing.GetShapeSize", shape) == (1, 3)
    assert client.call("rpc.testing.GetShapeElem", shape, 1) == (1, 4)


def test_stocks_test_functions_answer(client: Client) -> None:
    assert client.call("rpc.test.addone", 1) == (1, 2)
    assert client.call("rpc.test.strcat", "a", 5) == (11, "a:5")
    assert client.call_error("rpc.test.except", "abc") == "abc"
    assert client.call("rpc.test.runtime_str_concat", "a", "b") == (11, "ab")
    assert client.call(handle_of(client.call("rpc.test.add_to_lhs", 1)), 2) == (1, 3)
    assert client.call("testing.echo", "x", 1) == (11, "x")
    assert client.call("testing.echo") == (0, None)


@pytest.mark.parametrize(
    ("kind", "type_name"), [("ValueError", "ValueError"), ("len", "RuntimeError"), ("Nothing", "RuntimeError")]
)
def test_errors_of_a_wanted_kind_are_raised(kind: str, type_name: str) -> None:
    client = Client(extended=True)
    reply = client.error(CallFunc(client.find("testing.test_raise_error"), (kind, "abc")))
    assert (reply.text, reply.type_name) == ("abc", type_name)
    client.send(Shutdown())


def test_the_tensor_test_functions_check_and_return_arrays(client: Client) -> None:
    meta = client.tensor((3, 4), "float32")
    client.write(meta, np.ones((3, 4), "<f4").tobytes())
    assert client.call("rpc.test.remote_tensor_func", meta) == (0, None)
    client.write(meta, np.zeros((3, 4), "<f4").tobytes())
    assert "Arrays are not equal" in client.call_error("rpc.test.remote_tensor_func", meta)
    make = client.find("rpc.test.remote_return_nd")
    parts = {name: handle_of(client.call(make, name)) for name in ("get_arr", "ref_count", "get_elem", "get_arr_elem")}
    _, array, _ = client.call(parts["get_arr"])
    assert isinstance(array, TensorMeta)
    assert array.shape == (10,)
    assert client.call(parts["ref_count"]) == (1, 1)
    assert client.call(parts["get_elem"], 3) == (3, 0.0)
    assert client.call(parts["get_arr_elem"], array, 3) == (3, 0.0)
    assert "expected one of get_arr" in client.call_error(make, "nothing")


def test_a_time_evaluator_is_a_function_of_bytes(client: Client) -> None:
    args: tuple[Any, ...] = (None, "rpc.test.addone", 1, 0, 1, 2, 0, 100, 0, 1, 0, "")
    evaluator = handle_of(client.call("runtime.RPCTimeEvaluator", *args))
    index, data = client.call(evaluator, 1)
    assert index == 66
    assert isinstance(data, bytes)
    assert len(data) == 16


def test_globals_of_the_ffi_are_an_allow_list(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def find(name: str) -> Any:
        asked.append(name)
        return (lambda: "ffi") if name != "ffi.none" else None

    monkeypatch.setattr(libraries, "find_ffi_global", find)
    closed, opened = Client(), Client(Environment(expose_ffi=True))
    assert closed.find("ffi.Anything") == 0
    assert asked == []
    assert closed.call("ffi.GetRegisteredTypeKeys") == (11, "ffi")
    assert opened.call("ffi.Anything") == (11, "ffi")
    loaded = frozenset({"ffi.Anything"})
    trusting, careful = (Client(Environment(ffi_names=loaded, native=native)) for native in (True, False))
    assert trusting.call("ffi.Anything") == (11, "ffi")
    text = careful.error(CallFunc(careful.find("ffi.Anything"), (1, 2))).text
    assert text == "ffi.Anything needs trust: start the server with a token, or with --allow-native"
    assert opened.find("ffi.none") == 0
    for client in (closed, opened, trusting, careful):
        client.send(Shutdown())


def test_without_the_ffi_its_globals_are_absent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tvm_ffi", None)
    client = Client(Environment(expose_ffi=True))
    assert client.find("ffi.GetRegisteredTypeKeys") == 0
    client.send(Shutdown())


@pytest.mark.parametrize("kind", ["float32", "float16", "int8", "uint64", "bool"])
def test_random_fill_writes_numbers_from_one_to_ten(client: Client, kind: str) -> None:
    fill: Any = WELL_KNOWN["tvm.contrib.random.random_fill_for_measure"][0]
    array = np.zeros((40, 50), kind)
    fill(client.local, array)
    assert len(np.unique(array)) > 1
    assert array.max() <= 10
    assert kind == "bool" or array.min() >= 1


def test_random_fill_works_in_the_cpus_memory_only(client: Client) -> None:
    fill: Any = WELL_KNOWN["tvm.contrib.random.random_fill"][0]
    with pytest.raises(DeviceError, match="CPU's memory"):
        fill(client.local, "no tensor")


def test_containers_of_the_ffi_are_for_clients_with_native_code() -> None:
    trusting, careful = (Client(Environment(native=native)) for native in (True, False))
    assert trusting.local.get_function("ffi.Array")
    assert not careful.local.get_function("ffi.Array")
    assert not trusting.local.get_function("ffi.FunctionRemoveGlobal")
    assert trusting.local.get_function("ffi.ModuleGetKind")
    trusting.send(Shutdown())
    careful.send(Shutdown())


def test_a_runtime_s_own_functions_win_where_it_has_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wellknown, "_runtime_is_here", lambda: True)
    monkeypatch.setattr(libraries, "find_global", lambda name: (lambda: 42) if name == "runtime.NumThreads" else None)
    client = Client(Environment(native=True))
    assert client.call("runtime.NumThreads") == (1, 42)
    tensor = client.tensor((4,), "float32")
    assert client.call("tvm.contrib.random.uniform", 1.0, 2.0, tensor) == (0, None), "the main library alone lacks it"
    client.send(Shutdown())
