"""Functions that every server has: files, modules, time evaluation, and TVM's test functions.

Names and arguments are protocol.md 11's. Each is made for the session that asks, on first use.
"""

from __future__ import annotations

import functools
import json
import sys
from typing import TYPE_CHECKING, Any

from rpcnb.errors import AccessDenied, ArgumentError, InvalidHandle, LimitExceeded
from rpcnb.runtime.parcel import pack, unpack
from rpcnb.runtime.served import Module, ServedFunction, Shape
from rpcnb.runtime.standins import STAND_INS

if TYPE_CHECKING:
    from collections.abc import Callable

    from rpcnb.runtime.completion import Callback
    from rpcnb.runtime.files import StoredFile
    from rpcnb.runtime.serving import HandleSession

__all__ = ["UPLOAD", "WELL_KNOWN", "find_well_known", "keeps_state_by_thread"]

UPLOAD = "tvm.rpc.server.upload"
# Globals of apache-tvm-ffi that any client may call: they compute on their arguments and reach nothing else.
_FFI_ALLOWED = frozenset({"ffi.Shape", "ffi.GetRegisteredTypeKeys", "testing.echo"})
# Those that clients with native code may call too: containers and modules, as TVM's own Python asks for them. They
# change nothing of the process; what does (``ffi.FunctionRemoveGlobal``) is not among them.
_FFI_TRUSTED = (
    *("ffi.Array", "ffi.Map", "ffi.Dict", "ffi.List", "ffi.String", "ffi.Bytes", "ffi.Structural", "ffi.json."),
    *("ffi.ToJSONGraph", "ffi.FromJSONGraph", "ffi.ModuleGet", "ffi.ModuleImplements", "ffi.ModuleInspect"),
    "ffi.GetGlobalFuncMetadata",
)


def _workpath(session: HandleSession, name: str) -> str:
    return str(session.files.path(name))


def _upload(session: HandleSession, name: str, data: bytes | StoredFile) -> None:
    session.files.write(name, data)


def _download(session: HandleSession, name: str) -> bytes:
    return session.files.read(name)


def _remove(session: HandleSession, name: str) -> None:
    session.files.remove(name)


def _listdir(session: HandleSession, name: str) -> str:
    return ",".join(session.files.listdir(name))


def _put(session: HandleSession, name: str, total: int, offset: int, data: bytes) -> None:
    session.files.put(name, total, offset, data)


def _get(session: HandleSession, name: str, offset: int, nbytes: int) -> bytes:
    return session.files.get(name, offset, nbytes)


def _size(session: HandleSession, name: str) -> int:
    return session.files.size(name)


def _digest(session: HandleSession, name: str, nbytes: int) -> str:
    return session.files.digest(name, nbytes)


def _profile(session: HandleSession, *args: Any) -> str:
    from rpcnb.runtime.vmprofile import profile

    return profile(session, *args)


# What rpcnb peers have between them: files in parts, a virtual machine's profile; not listed among the functions.
BETWEEN_PEERS: dict[str, Callable[..., Any]] = {
    "rpcnb.put": _put,
    "rpcnb.get": _get,
    "rpcnb.size": _size,
    "rpcnb.digest": _digest,
    "rpcnb.vm_profile": _profile,
}


# Remote cells, where the operator lets clients run them (``cells/cells.py``).
CELLS = frozenset(
    {"rpcnb.cell", "rpcnb.cells", "rpcnb.variable", "rpcnb.set_variable", "rpcnb.del_variable", "rpcnb.variables"}
)


# Detached jobs, where sessions have processes of their own (``server/jobs.py``).
JOBS = "rpcnb.jobs"
_MOST_WORDS = 1 << 20


def ask_jobs(session: HandleSession, done: Callback, question: bytes) -> None:
    """``rpcnb.jobs(parcel)``: words and bytes to the server's jobs, and theirs back."""
    words, data = unpack(question)
    if not isinstance(words, dict) or not isinstance(data, bytes):
        raise ArgumentError(0, f"{type(words).__name__} and {type(data).__name__}", "words and bytes")
    if len(json.dumps(words)) > _MOST_WORDS:
        raise LimitExceeded(f"what is asked of jobs has more than {_MOST_WORDS} bytes: the source of a cell, perhaps")
    assert session.environment.jobs is not None, "looked at before"
    session.environment.jobs(words, data, lambda words, data: done(pack([words, data])))


def _no_cells(*_: Any) -> None:
    raise AccessDenied(
        "this server runs no code of its clients; who owns it may allow that: "
        "rpcnb serve --allow-exec, or %rpc_serve --allow-exec"
    )


def need_native(session: HandleSession, what: str) -> None:
    """Raise AccessDenied unless native code was trusted to this server's clients."""
    if not session.environment.native:
        raise AccessDenied(f"{what} needs trust: start the server with a token, or with --allow-native")


def _load_module(session: HandleSession, name: str) -> Module:
    need_native(session, "load_module")
    from rpcnb.runtime.libraries import load_library

    return load_library(session.files.path(name), session.files.pin, session.environment.runtime)


def _download_linked_module(session: HandleSession, name: str) -> bytes:
    need_native(session, "download_linked_module")
    from rpcnb.runtime.libraries import link_library

    path = session.files.path(name)
    if not path.is_file():
        raise FileNotFoundError(f"cannot find file {path}")
    return link_library(path).read_bytes()


def _import_module(session: HandleSession, parent: Module, child: Module) -> None:
    _as_module(parent).import_module(_as_module(child))


def _module_get_function(
    session: HandleSession, module: Module, name: str, query_imports: bool = False
) -> Callable[..., Any] | None:
    return _as_module(module).get_function(name, query_imports)


def _as_module(value: Any) -> Module:
    if not isinstance(value, Module):
        raise InvalidHandle(f"expected a module, got {type(value).__name__}")
    return value


def _system_lib(session: HandleSession, *prefix: str) -> Module:
    return Module(kind="library")


def _shape(session: HandleSession, *extents: int) -> Shape:
    return Shape(extents)


def _shape_size(session: HandleSession, shape: Shape) -> int:
    return len(shape)


def _shape_elem(session: HandleSession, shape: Shape, index: int) -> int:
    return shape[index]


def _time_evaluator(session: HandleSession, *args: Any) -> ServedFunction:
    from rpcnb.runtime.timing import make_evaluator

    return make_evaluator(session, *args)


def _names(session: HandleSession) -> Callable[[int], int | str]:
    """Answer TVM's question for names: ``f(-1)`` is their number, ``f(i)`` one of them."""
    names = sorted({*session.environment.registry.names(), *WELL_KNOWN})
    return lambda index: len(names) if index < 0 else names[index]


def _addone(session: HandleSession, x: Any) -> Any:
    return x + 1


def _strcat(session: HandleSession, name: str, x: int) -> str:
    return f"{name}:{x}"


def _except(session: HandleSession, name: str) -> None:
    raise ValueError(name)


def _str_concat(session: HandleSession, x: str, y: str) -> str:
    return x + y


def _remote_tensor_func(session: HandleSession, tensor: Any) -> None:
    import numpy as np

    np.testing.assert_equal(tensor, np.ones((3, 4)))


def _add_to_lhs(session: HandleSession, x: Any) -> Callable[[Any], Any]:
    return lambda y: x + y


def _remote_return_nd(session: HandleSession, what: str) -> Callable[..., Any]:
    import numpy as np

    array = np.zeros(10, np.float32)
    replies: dict[str, Callable[..., Any]] = {
        "get_arr": lambda: array,
        "ref_count": lambda: 1,
        "get_elem": lambda index: float(array[index]),
        "get_arr_elem": lambda other, index: float(other[index]),
    }
    if what not in replies:
        raise ValueError(f"expected one of {', '.join(replies)}, got {what!r}")
    return replies[what]


def _echo(session: HandleSession, *args: Any) -> Any:
    return args[0] if args else None


def _raise_error(session: HandleSession, kind: str, message: str) -> None:
    import builtins

    found = getattr(builtins, kind, None)
    error = found if isinstance(found, type) and issubclass(found, Exception) else RuntimeError
    raise error(message)


def _stand_in(name: str, session: HandleSession, *args: Any) -> Any:
    if name == "runtime.config_threadpool":  # it is for all sessions of this process
        need_native(session, name)
    return STAND_INS[name](*args)


# name -> (function of the session, where it runs). ``any``: it cannot take long, wherever that is.
WELL_KNOWN: dict[str, tuple[Callable[..., Any], str]] = {
    "tvm.rpc.server.workpath": (_workpath, "any"),
    UPLOAD: (_upload, "thread"),
    "tvm.rpc.server.download": (_download, "thread"),
    "tvm.rpc.server.remove": (_remove, "thread"),
    "tvm.rpc.server.listdir": (_listdir, "thread"),
    "tvm.rpc.server.load_module": (_load_module, "thread"),
    "tvm.rpc.server.ImportModule": (_import_module, "thread"),
    "tvm.rpc.server.ModuleGetFunction": (_module_get_function, "thread"),
    "tvm.rpc.server.download_linked_module": (_download_linked_module, "thread"),
    "runtime.RPCTimeEvaluator": (_time_evaluator, "any"),
    "ffi.SystemLib": (_system_lib, "any"),
    "ffi.Shape": (_shape, "any"),
    "ffi.FunctionListGlobalNamesFunctor": (_names, "any"),
    "rpc.testing.GetShapeSize": (_shape_size, "any"),
    "rpc.testing.GetShapeElem": (_shape_elem, "any"),
    "rpc.test.addone": (_addone, "thread"),
    "rpc.test.strcat": (_strcat, "thread"),
    "rpc.test.except": (_except, "thread"),
    "rpc.test.runtime_str_concat": (_str_concat, "thread"),
    "rpc.test.remote_tensor_func": (_remote_tensor_func, "thread"),
    "rpc.test.add_to_lhs": (_add_to_lhs, "thread"),
    "rpc.test.remote_return_nd": (_remote_return_nd, "thread"),
    "testing.echo": (_echo, "thread"),
    "testing.test_raise_error": (_raise_error, "thread"),
}
WELL_KNOWN |= {name: (functools.partial(_stand_in, name), "thread") for name in STAND_INS}


def find_well_known(session: HandleSession, name: str) -> ServedFunction | None:
    """Return a well-known function for this session, or an FFI global it may call, or None."""
    part = BETWEEN_PEERS.get(name)
    if part is not None:
        return ServedFunction(name, functools.partial(part, session))
    if name == "rpcnb.status":
        say = session.environment.status
        return ServedFunction(name, lambda done: say(lambda status: done(json.dumps(status))), "callback")
    if name == JOBS:
        known = session.environment.jobs is not None
        return ServedFunction(name, functools.partial(ask_jobs, session), "callback") if known else None
    if name in CELLS:
        cells = session.environment.cells
        return ServedFunction(name, _no_cells) if cells is None else cells.serve(session, name)
    environment = session.environment
    if name in STAND_INS and environment.native and _runtime_is_here():
        own = _of_ffi(session, name)
        if own is not None:
            return own
    if name in WELL_KNOWN:
        function, run = WELL_KNOWN[name]
        return ServedFunction(name, functools.partial(function, session), "plain", run)
    trusted = environment.native and name.startswith(_FFI_TRUSTED)
    known = name in _FFI_ALLOWED or name in _of_runtime() or name in environment.ffi_names
    return _of_ffi(session, name) if known or trusted or environment.expose_ffi else None


def _of_ffi(session: HandleSession, name: str) -> ServedFunction | None:
    """Return a global function of apache-tvm-ffi, which refuses clients without native code unless it is for all."""
    from rpcnb.runtime.libraries import find_ffi_global

    function = find_ffi_global(name)
    if function is None:
        return None
    open_to_all = name in _FFI_ALLOWED or session.environment.expose_ffi or session.environment.native
    return ServedFunction(name, function if open_to_all else functools.partial(_closed, session, name))


def keeps_state_by_thread() -> bool:
    """Tell whether TVM's runtime is here: its threads, streams and current devices are each thread's own."""
    return "tvm" in sys.modules or _runtime_is_here()


def _of_runtime() -> frozenset[str]:
    """Return what TVM's runtime has registered, if it was loaded here."""
    runtime = sys.modules.get("rpcnb.runtime.tvmruntime")
    return frozenset() if runtime is None else runtime.runtime_names()


def _runtime_is_here() -> bool:
    """Tell whether TVM's runtime is in this process: loaded by us, with the package ``tvm``, or as any library."""
    if "tvm_ffi" not in sys.modules:
        return False
    from rpcnb.runtime.backend import runtime_is_loaded

    return runtime_is_loaded()


def _closed(session: HandleSession, name: str, *_: Any) -> None:
    """Refuse what a runtime has registered that the operator has loaded: it may run programs, as rpc.PopenSession."""
    need_native(session, name)
