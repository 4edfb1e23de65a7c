"""TVM's MetaSchedule RPCRunner, 16 trials on two boards: our tracker and servers against stock's.

python -m benchmarks.tuning [--rounds N] [--quick]
"""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
from contextlib import ExitStack
from typing import Any

from benchmarks.rounds import Ratios, machine, options, save, show

HOOKED = ", hooks and cache flush"


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _start(stack: ExitStack, *args: str) -> None:
    process = subprocess.Popen([sys.executable, "-m", *args], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def end() -> None:
        process.terminate()
        process.wait(20)

    stack.callback(end)


def _farm(stack: ExitStack, kind: str) -> int:
    """Start a tracker and two boards; returns the tracker's port."""
    import rpcnb

    port = _free_port()
    where = f"127.0.0.1:{port}"
    if kind == "ours":
        _start(stack, "rpcnb", "tracker", "--port", str(port), "--silent")
    else:
        _start(stack, "tvm.exec.rpc_tracker", "--host", "127.0.0.1", "--port", str(port), "--port-end", "65000")
    for _ in range(2):
        board = str(_free_port())
        if kind == "ours":
            _start(stack, "rpcnb", "serve", "--port", board, "--key", "tune", "--tracker", where, "--trust-tracker")
        else:
            ports = ["--host", "127.0.0.1", "--port", board, "--port-end", "65000"]
            _start(stack, "tvm.exec.rpc_server", *ports, "--key", "tune", "--tracker", where)
    give_up = time.monotonic() + 60
    while time.monotonic() < give_up:
        try:
            if rpcnb.connect_tracker(where).summary()["queue_info"].get("tune", {}).get("free") == 2:
                return port
        except rpcnb.RpcError:
            pass
        time.sleep(0.1)
    raise RuntimeError(f"the {kind} farm did not come up")


def main() -> None:
    """Measure and print."""
    chosen = options(__doc__ or "")
    rounds = 2 if chosen.quick else chosen.rounds
    ratios = Ratios()
    with ExitStack() as stack:
        farms = {kind: _farm(stack, kind) for kind in ("ours", "stock")}
        command = [sys.executable, "-m", "benchmarks.tuning_process"]
        tuner: Any = stack.enter_context(
            subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1)
        )
        assert json.loads(tuner.stdout.readline()) == "ready"
        for _ in range(rounds):
            for hooked in (False, True):
                for kind, port in farms.items():
                    tuner.stdin.write(json.dumps([port, hooked]) + "\n")
                    ratios.add(kind + HOOKED * hooked, json.loads(tuner.stdout.readline()))
        tuner.stdin.close()
    rows = []
    for name in ("", HOOKED):
        for kind in farms:
            seconds, ratio = ratios.median(kind + name), ratios.ratio(kind + name, "stock" + name)
            rows.append([kind + name, f"{seconds:.2f} s", f"{ratio:.2f}"])
    print(machine(), f"rounds={rounds}")
    show("RPCRunner, 16 trials on two boards", ("farm", "median", "x stock"), rows)
    save(chosen.json, ratios.medians())


if __name__ == "__main__":
    main()
