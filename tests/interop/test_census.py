"""What TVM's Python asks a server for: there, or not there for a reason. docs/from-tvm-rpc.md has the table."""

from __future__ import annotations

import ast
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from test_relax import board

import rpcnb

if TYPE_CHECKING:
    pass

__all__ = ["board"]
pytest_plugins = ("stock_peer",)
pytestmark = [pytest.mark.stock, pytest.mark.timeout(120)]

TOKEN = "relax"
DOCS = Path(__file__).parents[2] / "docs/from-tvm-rpc.md"


def names_in(text: str) -> list[str]:
    return text.split()


LEAN = names_in("""
    tvm.rpc.server.upload tvm.rpc.server.download tvm.rpc.server.remove tvm.rpc.server.listdir
    tvm.rpc.server.workpath tvm.rpc.server.load_module tvm.rpc.server.ImportModule
    tvm.rpc.server.ModuleGetFunction tvm.rpc.server.download_linked_module runtime.RPCTimeEvaluator
    runtime.config_threadpool runtime.NumThreads cache_flush_cpu_non_first_arg tvm.contrib.random.random_fill
    tvm.contrib.random.random_fill_for_measure tvm.contrib.random.uniform tvm.contrib.random.normal
    tvm.contrib.random.randint tvm.contrib.sort.argsort tvm.contrib.sort.sort tvm.contrib.sort.topk
    ffi.SystemLib ffi.FunctionListGlobalNamesFunctor ffi.Shape ffi.GetRegisteredTypeKeys ffi.Array ffi.ArraySize
    ffi.ArrayGetItem ffi.Map ffi.MapSize ffi.MapGetItem ffi.String ffi.Bytes ffi.StructuralEqual
    ffi.StructuralHash ffi.ToJSONGraphString ffi.json.Parse ffi.ModuleGetFunction ffi.ModuleGetKind
    ffi.ModuleGetPropertyMask ffi.ModuleImplementsFunction ffi.ModuleInspectSource ffi.GetGlobalFuncMetadata
    testing.echo testing.test_raise_error rpc.test.addone rpc.test.strcat rpc.test.except
    rpc.test.runtime_str_concat rpc.test.remote_tensor_func rpc.test.add_to_lhs rpc.test.remote_return_nd
""")
RUNTIME = names_in("""
    runtime.RuntimeEnabled runtime.GetDeviceAttr runtime.TVMTensorAllocWithScope runtime.TVMTensorCopyFromTo
    runtime.TVMTensorCopyFromBytes runtime.TVMTensorCopyToBytes runtime.TVMTensorCreateView
    runtime.TVMTensorIsStorageShared runtime.Device_StreamCreate runtime.Device_StreamFree
    runtime.Device_SetStream runtime.Device_StreamSync runtime.TVMSetStream runtime.ModuleLoadStaticLibrary
    runtime.LoadParams runtime.LoadParamsFromFile runtime.SaveParams runtime.SaveParamsToFile
    runtime.LoadMetaDataFromJSON vm.builtin.copy vm.builtin.make_tuple vm.builtin.read_if_cond rpc.Connect
    rpc.LocalSession
""")
# What is not there, and why; the docs say the same.
ABSENT = {
    "ffi.FunctionRemoveGlobal": "it would change the server for everybody",
    "ffi.ModuleLoadFromFile": "it would leave out the checks of load_module",
    "ffi.ModuleImportModule": "tvm.rpc.server.ImportModule does it for all kinds of modules",
    "ffi.ModuleWriteToFile": "it would write outside the session's directory",
    "ffi.ModuleClearImports": "a module may be another session's too",
    "ffi.MakeObjectFromPackedArgs": "it makes any object of the process",
    "rpc.PopenSession": "a session constructor: session_constructor_args",
    "tvm.coreml_runtime.create": "the server's own library brings it: --load-library",
    "CloseRPCConnection": "the client has it",
}


def absent_at(session: Any, names: list[str]) -> list[str]:
    found = []
    for name in names:
        try:
            session.get_function(name)
        except rpcnb.FunctionNotFound:  # noqa: PERF203  # one by one
            found.append(name)
    return found


@pytest.mark.parametrize("flags", [("--runtime", "none"), ("--runtime", "auto")])
def test_what_is_asked_for_is_there_or_absent_for_a_reason(board: Callable[..., Any], flags: tuple[str, ...]) -> None:
    address, _ = board(*flags)
    with rpcnb.connect(address, token=TOKEN) as session:
        assert absent_at(session, LEAN) == []
        assert absent_at(session, RUNTIME) == (RUNTIME if "none" in flags else [])
        served = [name for name in ABSENT if name != "CloseRPCConnection"]
        assert absent_at(session, served) == served
        made = session.call("ffi.Array", 5, 7)
        assert session.call("ffi.ArraySize", made) == 2
        assert session.call("ffi.ArrayGetItem", made, 1) == 7


def test_stock_has_what_we_say_it_has(stock_port: int) -> None:
    with rpcnb.connect("127.0.0.1", stock_port, key="stock") as session:
        assert absent_at(session, [*LEAN, *RUNTIME]) == ["tvm.rpc.server.listdir"], "its C++ server has that"


def test_names_that_tvms_clients_ask_for_are_all_known() -> None:
    """The installed package's calls of ``get_function`` in what talks to servers."""
    spec = importlib.util.find_spec("tvm")
    assert spec is not None
    assert spec.submodule_search_locations
    root = Path(spec.submodule_search_locations[0])
    asked = set()
    for path in (
        root / "rpc/client.py",
        *(root / "s_tir/meta_schedule/runner").glob("*.py"),
        root / "contrib/coreml_runtime.py",
    ):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call):
                called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
                values = [*node.args, *(one.value for one in node.keywords)]
                texts = [one.value for one in values if isinstance(one, ast.Constant) and isinstance(one.value, str)]
                if called.startswith("get_") and "func" in called:
                    asked |= {text for text in texts if " " not in text}
    assert "tvm.rpc.server.upload" in asked
    assert asked - {*LEAN, *RUNTIME, *ABSENT} == set()


def test_the_docs_name_each_that_is_absent() -> None:
    text = DOCS.read_text()
    assert [name for name in ABSENT if name not in text] == []
