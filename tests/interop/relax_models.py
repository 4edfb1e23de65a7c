"""Relax models, compiled and run by stock TVM in a child. PYTEST_DONT_REWRITE."""
# mypy: ignore-errors

from __future__ import annotations

from typing import Any

import numpy as np
from tvm.script import ir as I  # TVMScript's names
from tvm.script import relax as R


@I.ir_module
class Model:
    @R.function
    def main(x: R.Tensor((4, 8), "float32"), w: R.Tensor((8, 3), "float32")) -> R.Tensor((4, 3), "float32"):
        with R.dataflow():
            y = R.matmul(x, w)
            R.output(y)
        return y

    @R.function
    def nested(x: R.Tensor((4,), "float32")):
        with R.dataflow():
            a = R.add(x, x)
            b = R.multiply(x, x)
            c = R.subtract(x, b)
            found = (a, (b, c))
            R.output(found)
        return found


def compile_model(folder: str) -> str:
    """Compile the models; returns the library."""
    import tvm

    path = f"{folder}/model.so"
    tvm.compile(Model, target="llvm").export_library(path)
    return path


def run_as_stock(port: int, key: str, path: str, x: Any, w: Any) -> Any:
    """Upload and run them with TVM's own classes."""
    import tvm
    from tvm import relax

    session = tvm.rpc.connect("127.0.0.1", port, key)
    session.upload(path)
    device = session.cpu()
    machine = relax.VirtualMachine(session.load_module("model.so"), device)
    one, other = tvm.runtime.tensor(x, device), tvm.runtime.tensor(w, device)
    machine.set_input("main", one, other)
    machine.invoke_stateful("main")
    product = machine.get_outputs("main").numpy()
    machine.set_input("nested", tvm.runtime.tensor(x[:, 0].copy(), device))
    machine.invoke_stateful("nested")
    first, (second, third) = machine.get_outputs("nested")
    machine.save_function("main", "saved", one, other, include_return=False)
    timing = machine.time_evaluator("saved", device, number=3, repeat=2)()
    return np.asarray(product), [one.numpy() for one in (first, second, third)], list(timing.results)
