"""What people do with ``tvm.rpc``, written once for TVM's client and ours. PYTEST_DONT_REWRITE.

``kind`` chooses the lines that differ: ``tvm`` or ``rpcnb``; all others are the same script.
"""
# mypy: ignore-errors

from __future__ import annotations

import os
from typing import Any

import numpy as np
import tvm
from tvm import te

import rpcnb


def choose(kind: str) -> tuple[Any, Any]:
    """Return the two modules that a script imports: for sessions, and for tensors."""
    return (tvm.rpc, tvm.runtime) if kind == "tvm" else (rpcnb, rpcnb)


def adder() -> Any:
    given = te.placeholder((32,), name="given")
    made = te.compute((32,), lambda i: given[i] + 1.0, name="made")
    return te.create_prim_func([given, made]).with_attr("global_symbol", "main")


NARROW = ("float16", "bfloat16", "float8_e4m3fn", "int4")


def compile_copies(folder: str) -> None:
    """Compile a kernel for each narrow type, which copies."""
    for dtype in NARROW:
        given = te.placeholder((32,), dtype=dtype, name="given")
        made = te.compute((32,), lambda i: given[i], name="made")  # noqa: B023  # called at once
        function = te.create_prim_func([given, made]).with_attr("global_symbol", "main")
        tvm.compile(function, target="llvm").export_library(os.path.join(folder, f"{dtype}.so"))


def random_fill(kind: str, port: int, key: str) -> None:
    """Fill tensors on the board, as tuners do before they measure."""
    rpc, tensors = choose(kind)
    remote = rpc.connect("127.0.0.1", port, key)
    fill = remote.get_function("tvm.contrib.random.random_fill")
    for dtype in ("bool", "int8", "uint8", "int32", "float16", "float32", "float64"):
        tensor = tensors.empty((64, 64), dtype, remote.cpu())
        fill(tensor)
        assert np.count_nonzero(tensor.numpy()) > 1000, dtype


def thread_pool(kind: str, port: int, key: str) -> None:
    """Say how many threads compiled code may use."""
    rpc, _ = choose(kind)
    remote = rpc.connect("127.0.0.1", port, key)
    remote.get_function("runtime.config_threadpool")(1, 1)
    assert remote.get_function("runtime.NumThreads")() == 1


def cross_objects(kind: str, port: int, key: str, folder: str) -> list[str]:
    """Upload what was compiled for other machines; returns what the board says of each."""
    rpc, _ = choose(kind)
    remote = rpc.connect("127.0.0.1", port, key)
    said = []
    for triple in ("aarch64-linux-gnu", "riscv64-linux-gnu", "powerpc64-linux-gnu"):
        path = os.path.join(folder, f"{triple}.o")
        try:
            module = tvm.compile(adder(), target={"kind": "llvm", "mtriple": triple})
            module.write_to_file(path)
        except Exception as error:  # this LLVM cannot
            said.append(f"not compiled: {error}")
            continue
        remote.upload(path)
        try:
            remote.load_module(os.path.basename(path))
        except Exception as error:
            said.append(str(error))
        else:
            said.append("loaded")
    return said


def phone(kind: str, tracker: int, folder: str) -> float:
    """Do as the Android and iOS examples: a tracker's board, an OpenCL device that may not be there, the CPU else."""
    rpc, tensors = choose(kind)
    farm = rpc.connect_tracker("127.0.0.1", tracker)
    remote = farm.request("phone", priority=0, session_timeout=60)
    device = remote.cl(0)
    if not device.exist:
        device = remote.cpu(0)
    path = os.path.join(folder, "phone.so")
    tvm.compile(adder(), target="llvm").export_library(path)
    remote.upload(path)
    function = remote.load_module("phone.so")
    data = np.arange(32, dtype="float32")
    given, made = tensors.tensor(data, device), tensors.empty((32,), "float32", device)
    evaluator = function.time_evaluator(function.entry_name, device, number=5)
    mean = evaluator(given, made).mean
    np.testing.assert_equal(made.numpy(), data + 1)
    remote.remove("phone.so")
    try:
        remote.get_function("tvm.coreml_runtime.create")
    except AttributeError:
        return float(mean)
    raise AssertionError("there is no CoreML on a Linux board")


def rpc_run(tracker: int) -> float:
    """TVM's own helper: a module, arguments, a farm."""
    from tvm.s_tir import meta_schedule as ms
    from tvm.testing import rpc_run as run

    data = np.arange(32, dtype="float32")
    config = ms.runner.RPCConfig("127.0.0.1", tracker, "phone", session_timeout_sec=60)
    evaluator = ms.runner.EvaluatorConfig(number=3, repeat=1, min_repeat_ms=0, enable_cpu_cache_flush=True)
    args, profile = run(tvm.compile(adder(), target="llvm"), "cpu", [data, np.zeros_like(data)], evaluator, config)
    np.testing.assert_equal(args[1], data + 1)
    return float(profile.mean)


def dlight(tracker: int) -> float:
    """TVM's benchmark of one function, on a farm."""
    from tvm.s_tir import meta_schedule as ms
    from tvm.s_tir.dlight.benchmark import benchmark

    config = ms.runner.RPCConfig("127.0.0.1", tracker, "phone", session_timeout_sec=60)
    shapes = [((32,), "float32"), ((32,), "float32")]
    target = tvm.target.Target({"kind": "llvm", "num-cores": 1})
    _, median, _ = benchmark(adder(), args=shapes, dym_var_sample={}, target=target, rpc_config=config)
    return float(median)


def server_drop(kind: str, tracker: int, folder: str) -> float:
    """Measure on a farm while the server drops out: the work is done again on what the tracker hands out next."""
    rpc, tensors = choose(kind)
    path = os.path.join(folder, "drop.so")
    tvm.compile(adder(), target="llvm").export_library(path)
    tries = []

    def measure(remote: Any) -> float:
        tries.append(remote)
        remote.upload(path)
        function = remote.load_module("drop.so")
        if len(tries) == 1:
            remote.get_function("drop.out")()
        data = np.arange(32, dtype="float32")
        given, made = tensors.tensor(data, remote.cpu()), tensors.empty((32,), "float32", remote.cpu())
        mean = function.time_evaluator("main", remote.cpu(), number=5)(given, made).mean
        np.testing.assert_equal(made.numpy(), data + 1)
        return float(mean)

    mean = rpc.connect_tracker("127.0.0.1", tracker).request_and_run("phone", measure, session_timeout=60)
    assert len(tries) == 2
    return mean
