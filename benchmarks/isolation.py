"""A process for each session beside one for all: connecting, calls, copies, and what an idle process weighs.

python -m benchmarks.isolation [--rounds N] [--quick]
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np

import rpcnb
from benchmarks.rounds import Ratios, machine, options, save, show

TOKEN = "benchmark"
SIZES = (64 << 10, 1 << 20, 64 << 20)
KINDS = ("shared", "isolated")
TURNS = 3  # of both kinds, in each round: the scheduler places threads now so, now otherwise
PAUSE = 0.1  # seconds: the process for the next session is ready by then


@contextmanager
def board(kind: str) -> Iterator[tuple[str, int]]:
    """Start a demo board; yields its address and its process."""
    with tempfile.TemporaryDirectory() as folder:
        ready = Path(folder) / "ready"
        flag = "--isolate" if kind == "isolated" else "--shared-state"
        secret = Path(folder) / "token"
        secret.write_text(TOKEN)
        command = [sys.executable, "-m", "rpcnb", "serve", "--port", "0", "--token-file", str(secret), "--demo", flag]
        with subprocess.Popen([*command, "--silent", "--ready-file", str(ready)]) as process:
            while not ready.exists():
                time.sleep(0.02)
            yield f"127.0.0.1:{json.loads(ready.read_text())['port']}", process.pid
            process.terminate()


def _best(function: Callable[[], object], count: int) -> float:
    """Return the median seconds of a call."""
    times = []
    for _ in range(count):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def _connect(address: str) -> float:
    """Connect and call; returns the seconds, closing left out."""
    start = time.perf_counter()
    with rpcnb.connect(address, token=TOKEN) as session:
        session.call("demo.add", 1, 2)
        return time.perf_counter() - start


def _connect_now_and_then(address: str, count: int) -> float:
    """Return the median seconds of connecting with pauses, as people do."""
    times = []
    for _ in range(count):
        time.sleep(PAUSE)
        times.append(_connect(address))
    return statistics.median(times)


def _children(pid: int) -> list[int]:
    with open(f"/proc/{pid}/task/{pid}/children") as file:
        return [int(word) for word in file.read().split()]


def _pss(pid: int) -> float:
    """Return the proportional share of memory of a process, in bytes."""
    with open(f"/proc/{pid}/smaps_rollup") as file:
        return next(int(line.split()[1]) * 1024.0 for line in file if line.startswith("Pss:"))


def measure(rounds: int, quick: bool) -> Ratios:
    """Measure both in turn, in rounds, each with boards of its own."""
    ratios = Ratios()
    count = 10 if quick else 30
    for _ in range(rounds):
        with board("shared") as shared, board("isolated") as isolated:
            where = {"shared": shared[0], "isolated": isolated[0]}
            for kind in KINDS:
                _best(partial(_connect, where[kind]), 3)
            for kind in KINDS:
                ratios.add(f"connect {kind}", _connect_now_and_then(where[kind], count))
            for kind in KINDS:
                ratios.add(f"at once {kind}", _best(partial(_connect, where[kind]), count))
            sessions = {kind: rpcnb.connect(where[kind], token=TOKEN) for kind in KINDS}
            for size in SIZES:
                array = np.zeros(size, "uint8")
                times = max(3, min(600, (64 << 20) // size))
                for kind in KINDS * TURNS:
                    tensor = sessions[kind].array(array)
                    ratios.add(f"up {size} {kind}", size / _best(partial(tensor.copyfrom, array), times))
                    ratios.add(f"down {size} {kind}", size / _best(tensor.numpy, times))
            for kind in KINDS:
                add = sessions[kind].get_function("demo.add")
                ratios.add(f"call {kind}", _best(partial(add, 1, 2), 300 if quick else 2000))
            more = [rpcnb.connect(isolated[0], token=TOKEN) for _ in range(7)]
            (zygote,) = _children(isolated[1])
            ratios.add("idle process", statistics.median(_pss(pid) for pid in _children(zygote)))
            ratios.add("zygote", _pss(zygote))
            for session in [*sessions.values(), *more]:
                session.close()
    return ratios


def main() -> None:
    """Measure and print."""
    chosen = options(__doc__ or "")
    rounds = 2 if chosen.quick else chosen.rounds
    ratios = measure(rounds, chosen.quick)
    rows = []
    for name, what, bar in (
        ("connect", "connect and first call, now and then", "≤ 3"),
        ("at once", "the same, one behind the other, and the end", ""),
    ):
        ratio = ratios.ratio(f"{name} isolated", f"{name} shared")
        rows.append([what, f"{ratios.median(f'{name} isolated') * 1e3:.1f} ms", f"{ratio:.2f}", bar])
    rows += [
        [
            "call",
            f"{ratios.median('call isolated') * 1e6:.1f} us",
            f"{ratios.ratio('call isolated', 'call shared'):.2f}",
            "",
        ],
    ]
    for size in SIZES:
        for way in ("up", "down"):
            name = f"{way} {size}"
            ratio = ratios.ratio(f"{name} isolated", f"{name} shared")
            rate = ratios.median(f"{name} isolated") / 1e9
            rows.append([f"copy {way} {size >> 10} KiB", f"{rate:.2f} GB/s", f"{ratio:.2f}", "≥ 0.95"])
    rows.append(["idle process, PSS", f"{ratios.median('idle process') / 2**20:.1f} MiB", "", "≤ 13 MiB"])
    rows.append(["zygote, PSS", f"{ratios.median('zygote') / 2**20:.1f} MiB", "", ""])
    print(machine(), f"rounds={rounds}")
    show("A process for each session", ("what", "isolated", "x shared", "bar"), rows)
    save(chosen.json, ratios.medians())


if __name__ == "__main__":
    main()
