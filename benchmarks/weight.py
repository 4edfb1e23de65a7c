"""What rpcnb weighs: import time, the memory of an idle server, installed size.

python -m benchmarks.weight [--rounds N] [--quick]
"""

from __future__ import annotations

import contextlib
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import rpcnb
from benchmarks.peers import resident
from benchmarks.rounds import Ratios, machine, options, save, show

IMPORT = "import time; a = time.perf_counter(); import {0}; print(time.perf_counter() - a)"
CONNECTING = "import time; a = time.perf_counter(); import rpcnb; rpcnb.connect; print(time.perf_counter() - a)"
READY_SECONDS = 20


def _seconds(code: str) -> float:
    return float(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)


def idle_memory() -> int:
    """Return the bytes that ``rpcnb serve`` takes before its first client."""
    with tempfile.TemporaryDirectory() as folder:
        ready = Path(folder, "ready")
        command = [sys.executable, "-m", "rpcnb", "serve", "--port", "0", "--no-token", "--silent"]
        with subprocess.Popen([*command, "--ready-file", str(ready)], stdout=subprocess.DEVNULL) as server:
            give_up = time.monotonic() + READY_SECONDS
            while not ready.exists() and time.monotonic() < give_up:
                time.sleep(0.02)
            with contextlib.suppress(ProcessLookupError):
                found = resident(server.pid)
                server.terminate()
        return found


def installed() -> int:
    """Return the bytes of the package's own files."""
    root = Path(rpcnb.__file__).parent
    return sum(path.stat().st_size for path in root.rglob("*") if path.is_file() and "__pycache__" not in path.parts)


def measure(rounds: int) -> Ratios:
    """Measure as often as that."""
    ratios = Ratios()
    for _ in range(rounds):
        ratios.add("import rpcnb", _seconds(IMPORT.format("rpcnb")))
        ratios.add("import connect", _seconds(CONNECTING))
        ratios.add("import tvm", _seconds(IMPORT.format("tvm")))
        ratios.add("idle", idle_memory())
        ratios.add("installed", installed())
    return ratios


def main() -> None:
    """Measure and print."""
    chosen = options(__doc__ or "")
    ratios = measure(2 if chosen.quick else chosen.rounds)
    rows = [
        ["import rpcnb", f"{ratios.median('import rpcnb') * 1e3:.1f} ms"],
        ["import rpcnb; rpcnb.connect", f"{ratios.median('import connect') * 1e3:.1f} ms"],
        ["import tvm", f"{ratios.median('import tvm') * 1e3:.1f} ms"],
        ["rpcnb serve, idle", f"{ratios.median('idle') / 2**20:.1f} MiB"],
        ["installed", f"{ratios.median('installed') / 2**20:.2f} MiB"],
    ]
    print(machine())
    show("Weight", ("what", "that is"), rows)
    save(chosen.json, ratios.medians())


if __name__ == "__main__":
    main()
