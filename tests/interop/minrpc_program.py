"""Programs that serve a model linked into them, built by stock TVM in a child. PYTEST_DONT_REWRITE."""
# mypy: ignore-errors

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import tvm
import tvm.rpc.minrpc
from tvm import te
from tvm.support import cc


def build(folder: str) -> str:
    """Link a function ``addone`` into TVM's minrpc server; returns the program."""
    # The wheel has the server's sources, but looks for them elsewhere, and lacks one header.
    sources = Path(tvm.__file__).parent / "src/runtime/rpc/minrpc"
    tvm.rpc.minrpc.find_minrpc_server_libpath = lambda server="posix_popen_server": (
        str(sources),
        str(sources / server / f"{server}.cc"),
    )
    includes = Path(folder) / "include"
    (includes / "a/b").mkdir(parents=True)
    (includes / "support").mkdir()
    shutil.copy(Path(__file__).with_name("arena.h"), includes / "support")
    link = cc.cross_compiler(cc.create_executable, options=[f"-I{includes / 'a/b'}"])

    given = te.placeholder((4,), name="A")
    made = te.compute(given.shape, lambda *i: given(*i) + 1.0, name="B")
    function = te.create_prim_func([given, made]).with_attr("global_symbol", "addone")
    module = tvm.IRModule.from_expr(function).with_attr("system_lib_prefix", "")
    path = os.path.join(folder, "program")
    tvm.build(module, "llvm").export_library(path, fcompile=tvm.rpc.minrpc.with_minrpc(link))
    return path


def run_as_stock(port: int, key: str, path: str) -> Any:
    """Have the program run at a server by TVM's own client; returns what its function makes of 0, 1, 2, 3."""
    from tvm import rpc

    remote = rpc.connect(
        "127.0.0.1", port, key=key, session_constructor_args=["rpc.PopenSession", Path(path).read_bytes()]
    )
    given = tvm.runtime.tensor(np.arange(4, dtype="float32"), remote.cpu())
    made = tvm.runtime.empty((4,), "float32", remote.cpu())
    remote.system_lib()["addone"](given, made)
    return made.numpy()
