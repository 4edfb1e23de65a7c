"""What a time evaluator says of the same kernels at our servers and at stock's: it is to measure them, not the server.

python -m benchmarks.timing [--rounds N] [--quick]
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np

import rpcnb
from benchmarks.rounds import Ratios, machine, options, save, show

TOKEN = "benchmark-of-timings"
KINDS = ("stock", "lean", "runtime")
KERNELS = {"add": (16,), "parallel": (64, 64)}
COMPILE = """
import sys
import tvm
from tvm import te

a, b = te.placeholder((16,), name="a"), te.placeholder((16,), name="b")
added = te.compute((16,), lambda i: a[i] + b[i], name="added")
x, y = te.placeholder((64, 64), name="x"), te.placeholder((64, 64), name="y")
k = te.reduce_axis((0, 64), name="k")
product = te.compute((64, 64), lambda i, j: te.sum(x[i, k] * y[k, j], axis=k), name="product")
schedule = tvm.s_tir.Schedule(te.create_prim_func([x, y, product]).with_attr("global_symbol", "parallel"))
schedule.parallel(schedule.get_loops(schedule.get_sblock("product"))[0])
module = tvm.IRModule({
    "add": te.create_prim_func([a, b, added]).with_attr("global_symbol", "add"),
    "parallel": schedule.mod["main"].with_attr("global_symbol", "parallel"),
})
tvm.compile(module, target="llvm").export_library(sys.argv[1])
"""


@contextmanager
def ours(runtime: str, folder: str) -> Iterator[Any]:
    """A session with a server of ours."""
    ready = Path(folder) / f"ready-{runtime}-{time.monotonic_ns()}"
    secret = Path(folder) / "token"
    secret.write_text(TOKEN)
    command = [sys.executable, "-m", "rpcnb", "serve", "--port", "0", "--token-file", str(secret), "--silent"]
    with subprocess.Popen([*command, "--runtime", runtime, "--ready-file", str(ready)]) as process:
        while not ready.exists():
            time.sleep(0.02)
        with rpcnb.connect(f"127.0.0.1:{json.loads(ready.read_text())['port']}", token=TOKEN) as session:
            yield session
        process.terminate()


@contextmanager
def stocks() -> Iterator[Any]:
    """A session with a server of stock's."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "tvm.exec.rpc_server", "--host", "127.0.0.1", "--silent"]
    command += ["--port", str(port), "--port-end", str(port + 1)]
    with subprocess.Popen(command, start_new_session=True) as process:
        until = time.monotonic() + 60
        while True:
            try:
                session = rpcnb.connect("127.0.0.1", port, timeout=2)
                break
            except rpcnb.ConnectFailed:
                if time.monotonic() > until:
                    raise
                time.sleep(0.1)
        with session:
            yield session
        os.killpg(process.pid, signal.SIGKILL)  # its worker would stay


def _evaluators(session: Any, library: str, quick: bool) -> dict[str, Any]:
    session.upload(library)
    module = session.load_module(Path(library).name)
    found = {}
    for name, shape in KERNELS.items():
        tensors = [session.array(np.ones(shape, "float32")) for _ in range(3)]
        number = (2000 if name == "add" else 200) if quick else (20_000 if name == "add" else 2000)
        evaluate = module.time_evaluator(name, session.cpu(), number=number, repeat=3)
        found[name] = lambda evaluate=evaluate, tensors=tensors: evaluate(*tensors).min
    return found


def measure(rounds: int, quick: bool) -> Ratios:
    """Measure all in turn, in rounds, each with servers of its own."""
    ratios = Ratios()
    with tempfile.TemporaryDirectory() as folder:
        library = f"{folder}/kernels.so"
        subprocess.run([sys.executable, "-W", "ignore", "-c", COMPILE, library], check=True)
        for _ in range(rounds):
            with ExitStack() as stack:
                sessions = {"stock": stack.enter_context(stocks())}
                sessions["lean"] = stack.enter_context(ours("none", folder))
                sessions["runtime"] = stack.enter_context(ours("auto", folder))
                evaluators = {kind: _evaluators(session, library, quick) for kind, session in sessions.items()}
                for _ in range(3):
                    for kind in KINDS:
                        for name in KERNELS:
                            ratios.add(f"{name} {kind}", evaluators[kind][name]())
    return ratios


def main() -> None:
    """Measure and print."""
    chosen = options(__doc__ or "")
    rounds = 2 if chosen.quick else chosen.rounds
    ratios = measure(rounds, chosen.quick)
    rows = []
    for name, what in (("add", "add of 16 floats"), ("parallel", "matmul 64x64, parallel")):
        stock = ratios.median(f"{name} stock")
        for kind in KINDS:
            mean = ratios.median(f"{name} {kind}")
            bar = (
                {"add": "≤ +0.1 us", "parallel": "≤ 2" if kind == "lean" else "≤ 1.1"}[name] if kind != "stock" else ""
            )
            ratio = ratios.ratio(f"{name} {kind}", f"{name} stock")
            rows.append([what, kind, f"{mean * 1e6:.4f} us", f"{(mean - stock) * 1e6:+.4f} us", f"{ratio:.2f}", bar])
    print(machine(), f"rounds={rounds}")
    show("Time per call, as measured at the server", ("kernel", "server", "time", "over stock", "x stock", "bar"), rows)
    save(chosen.json, ratios.medians())


if __name__ == "__main__":
    main()
