"""MetaSchedule's runner with hooks, cache flush, and candidates that crash or hang. PYTEST_DONT_REWRITE."""
# mypy: ignore-errors

from __future__ import annotations

import os
import subprocess
from typing import Any

import tvm
from tvm import te
from tvm.s_tir import meta_schedule as ms

import rpcnb

# Functions that crash and hang, in the calling convention of compiled functions.
BAD = "int __tvm_ffi_main(void* self, void* args, int count, void* result) { %s return 0; }"


def good(folder: str, number: int) -> str:
    """Compile a vector addition."""
    one, other = (te.placeholder((64,), name=name) for name in "ab")
    added = te.compute((64,), lambda i: one[i] + other[i], name="added")
    function = te.create_prim_func([one, other, added]).with_attr("global_symbol", "main")
    path = os.path.join(folder, f"good-{number}.tar")
    tvm.compile(function, target="llvm").export_library(path)
    return path


def bad(folder: str, name: str, body: str) -> str:
    """Compile what does something else."""
    source, path = os.path.join(folder, f"{name}.c"), os.path.join(folder, f"{name}.so")
    with open(source, "w") as file:
        file.write(BAD % body)
    subprocess.run(["g++", "-x", "c", "-shared", "-fPIC", "-o", path, source], check=True)
    return path


def noting_evaluator(session: Any, remote: Any, device: Any, config: Any, arguments: list[Any]) -> list[float]:
    """A hook: it measures as MetaSchedule does, after a word to the board."""
    assert session.get_function("runtime.NumThreads")() > 0
    evaluator = remote.time_evaluator(
        func_name=remote.entry_name,
        dev=device,
        number=config.number,
        repeat=config.repeat,
        min_repeat_ms=config.min_repeat_ms,
        f_preproc="cache_flush_cpu_non_first_arg" if config.enable_cpu_cache_flush else "",
    )
    return [float(cost) for given in arguments for cost in evaluator(*given).results]


def tune(tracker: int, folder: str) -> list[str]:
    """Measure good and bad candidates; returns what came of each: ``ok``, or its error's last line."""
    candidates = [
        good(folder, 0),
        bad(folder, "crashes", "*(volatile int*)8 = 1;"),
        good(folder, 1),
        bad(folder, "hangs", "for (volatile int i = 0;; ++i) {}"),
        good(folder, 2),
    ]
    shapes = [ms.arg_info.TensorInfo("float32", (64,)) for _ in range(3)]
    config = ms.runner.RPCConfig("127.0.0.1", tracker, "tune", session_priority=1, session_timeout_sec=3)
    evaluator = ms.runner.EvaluatorConfig(number=3, repeat=2, min_repeat_ms=0, enable_cpu_cache_flush=True)
    runner = ms.runner.RPCRunner(config, evaluator, max_workers=2, f_run_evaluator=noting_evaluator)
    runner = rpcnb.tvm.watch(runner)
    futures = runner.run([ms.runner.RunnerInput(path, "cpu", shapes) for path in candidates])
    results = [future.result() for future in futures]
    return ["ok" if one.run_secs else str(one.error_msg).strip().splitlines()[-1] for one in results]


def tracker_of_environment(host: str, port: int) -> int:
    """Let the runner's RPCConfig find the tracker in the environment; returns how many boards it counts."""
    os.environ.update(TVM_TRACKER_HOST=host, TVM_TRACKER_PORT=str(port), TVM_TRACKER_KEY="tune")
    try:
        return int(ms.runner.RPCRunner(max_workers=1).rpc_config.count_num_servers(allow_missing=False))
    finally:
        for name in ("HOST", "PORT", "KEY"):
            del os.environ[f"TVM_TRACKER_{name}"]
