"""TVM's RPC tutorial: compile here, upload, run there, time it.

``python tutorial_story.py HOST PORT KEY FOLDER``. With rpcnb three lines change, see test_real_job.py.
"""

import sys
from typing import Any

import numpy as np
import tvm
from tvm import rpc

from tvm import te  # isort: skip


def main(host: str, port: int, key: str, folder: str) -> None:
    """Tell the story."""
    n = 1024
    A = te.placeholder((n,), name="A")
    B = te.compute(A.shape, lambda i: A[i] + 1.0, name="B")
    function = te.create_prim_func([A, B]).with_attr("global_symbol", "add_one")
    library = tvm.compile(tvm.IRModule({"add_one": function}), target="llvm")
    path = f"{folder}/lib.tar"
    library.export_library(path)

    remote: Any = rpc.connect(host, port, key)
    remote.upload(path)
    module = remote.load_module("lib.tar")

    dev = remote.cpu()
    a = tvm.runtime.tensor(np.random.uniform(size=n).astype("float32"), dev)
    b = tvm.runtime.empty((n,), "float32", dev)
    module["add_one"](a, b)
    np.testing.assert_equal(b.numpy(), a.numpy() + 1)

    evaluate = module.time_evaluator("add_one", dev, number=10)
    cost = evaluate(a, b).mean
    sys.stdout.write(f"{cost:g} seconds per call\n")


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), sys.argv[3], sys.argv[4])
