"""Servers and clients in processes of their own, driven over pipes, so that rounds can be interleaved.

A peer is one of ``raw`` (a Python socket without a protocol), ``stock`` (apache-tvm) and ``ours``.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from contextlib import ExitStack
from typing import Any

__all__ = ["Client", "Server", "open_peers", "pin_choices"]


class _Process:
    def __init__(self, *args: str, cpu: int | None) -> None:
        command = [sys.executable, *args]
        if cpu is not None:
            command = ["taskset", "-c", str(cpu), *command]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, bufsize=1
        )

    def read(self) -> Any:
        """Read one JSON line."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self.process.args} ended with {self.process.wait()}")
        return json.loads(line)

    def close(self) -> None:
        """End the process."""
        self.process.kill()
        self.process.wait()

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


class Server(_Process):
    """A server of a kind; ``port`` is where it listens."""

    def __init__(self, kind: str, cpu: int | None = None, *args: str) -> None:
        super().__init__("-m", "benchmarks.server_process", kind, *args, cpu=cpu)
        self.kind = kind
        self.port = int(self.read())

    def peak(self) -> int:
        """Return the largest resident memory of the process so far, in bytes."""
        children = subprocess.run(["pgrep", "-P", str(self.process.pid)], capture_output=True, text=True, check=False)
        pids = [str(self.process.pid), *children.stdout.split()]
        peaks = []
        for pid in pids:
            with open(f"/proc/{pid}/status") as file:
                peaks += [int(line.split()[1]) * 1024 for line in file if line.startswith("VmHWM")]
        return max(peaks)


class Client(_Process):
    """A client of a kind, connected to a server once ``ask`` is first used."""

    def __init__(self, kind: str, port: int, cpu: int | None = None) -> None:
        super().__init__("-m", "benchmarks.client_process", kind, str(port), cpu=cpu)
        self.kind = kind

    def ask(self, case: str, *args: int) -> Any:
        """Have it measure; returns what the case reports, times in seconds."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps([case, *args]) + "\n")
        return self.read()


def open_peers(stack: ExitStack, pin: str) -> dict[str, Client]:
    """Start the servers and their clients: raw, ours, stock->ours and stock, each pair with processes of its own."""
    server_cpu, client_cpu = pin_choices(pin)
    ports = {kind: stack.enter_context(Server(kind, server_cpu)).port for kind in ("raw", "stock", "ours")}
    pairs = {"raw": ("raw", "raw"), "ours": ("ours", "ours"), "stock->ours": ("stock", "ours"), "stock": ("stock",) * 2}
    return {
        name: stack.enter_context(Client(client, ports[server], client_cpu)) for name, (client, server) in pairs.items()
    }


def pin_choices(pin: str) -> tuple[int | None, int | None]:
    """Return the CPUs of server and client: one, two, or unpinned."""
    cpus = sorted(os.sched_getaffinity(0))
    if pin == "none" or len(cpus) < 2:
        return None, None
    return (cpus[0], cpus[0]) if pin == "same" else (cpus[0], cpus[1])
