"""MetaSchedule's RPCRunner, unchanged: ``python -m benchmarks.tuning_process``.

It reads ``[tracker's port, with hooks and cache flush]`` and prints seconds.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from typing import Any

TRIALS = 16


def candidates(folder: str) -> list[str]:
    """Compile as many schedules of a small matmul; returns the files."""
    import tvm

    te = tvm.te
    left, right = te.placeholder((64, 64), name="left"), te.placeholder((64, 64), name="right")
    k = te.reduce_axis((0, 64), name="k")
    product = te.compute((64, 64), lambda i, j: te.sum(left[i, k] * right[k, j], axis=k), name="product")
    function = te.create_prim_func([left, right, product]).with_attr("global_symbol", "main")
    files = []
    for number in range(TRIALS):
        schedule = tvm.s_tir.Schedule(function)
        i, j, inner = schedule.get_loops(schedule.get_sblock("product"))
        outer, tile = schedule.split(j, [None, 1 << (number % 6)])
        schedule.reorder(i, outer, inner, tile)
        files.append(f"{folder}/{number}.tar")
        tvm.compile(schedule.mod, target="llvm").export_library(files[-1])
    return files


def evaluate(session: Any, remote: Any, device: Any, config: Any, arguments: list[Any]) -> list[float]:
    """Measure as MetaSchedule does by itself, after a question to the board."""
    session.get_function("runtime.NumThreads")()
    flush = "cache_flush_cpu_non_first_arg" if config.enable_cpu_cache_flush else ""
    evaluator = remote.time_evaluator(
        func_name=remote.entry_name, dev=device, number=config.number, repeat=config.repeat, f_preproc=flush
    )
    return [float(cost) for given in arguments for cost in evaluator(*given).results]


def measure(tracker: int, hooked: bool, files: list[str]) -> float:
    """Run all candidates on the tracker's boards; returns the seconds."""
    from tvm.s_tir import meta_schedule as ms

    shapes = [ms.arg_info.TensorInfo("float32", (64, 64)) for _ in range(3)]
    config = ms.runner.RPCConfig("127.0.0.1", tracker, "tune", session_priority=1, session_timeout_sec=60)
    evaluator = ms.runner.EvaluatorConfig(number=3, repeat=2, min_repeat_ms=0, enable_cpu_cache_flush=hooked)
    hook = evaluate if hooked else None
    runner = ms.runner.RPCRunner(config, evaluator, max_workers=2, f_run_evaluator=hook)
    start = time.perf_counter()
    results: list[Any] = [one.result() for one in runner.run([ms.runner.RunnerInput(f, "cpu", shapes) for f in files])]
    seconds = time.perf_counter() - start
    if any(one.error_msg for one in results):
        raise RuntimeError(next(one.error_msg for one in results if one.error_msg))
    return seconds


def main() -> None:
    """Serve until end of input."""
    with tempfile.TemporaryDirectory() as folder:
        files = candidates(folder)
        print(json.dumps("ready"), flush=True)
        for line in sys.stdin:
            print(json.dumps(measure(*json.loads(line), files)), flush=True)


if __name__ == "__main__":
    main()
