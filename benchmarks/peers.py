"""Servers and clients in processes of their own, driven over pipes, so that rounds can be interleaved.

A peer is one of ``raw`` (a Python socket without a protocol), ``stock`` (apache-tvm) and ``ours``.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from contextlib import ExitStack
from importlib.util import find_spec
from typing import Any

__all__ = ["Client", "Server", "open_peers", "pin_choices", "resident"]

# Kinds of client and server; each pair has a client process of its own.
PAIRS = {
    "raw": ("raw", "raw"),
    "ours": ("ours", "ours"),
    "awaited": ("awaited", "ours"),
    "uvloop": ("uvloop", "ours"),
    "stock->ours": ("stock", "ours"),
    "stock": ("stock", "stock"),
    "ours->stock": ("ours", "stock for ours"),
}


class _Process:
    def __init__(self, *args: str, cpu: int | None) -> None:
        command = [sys.executable, *args]
        if cpu is not None:
            command = ["taskset", "-c", str(cpu), *command]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, bufsize=1
        )

    @property
    def pid(self) -> int:
        """Number of the process."""
        return self.process.pid

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
        return max(resident(pid, "VmHWM") for pid in (self.process.pid, *children.stdout.split()))


class Client(_Process):
    """A client of a kind, connected to a server once ``ask`` is first used."""

    def __init__(self, kind: str, port: int, cpu: int | None = None) -> None:
        super().__init__("-m", "benchmarks.client_process", kind, str(port), cpu=cpu)
        self.kind = kind

    def ask(self, case: str, *args: int | str) -> Any:
        """Have it measure; returns what the case reports, times in seconds."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps([case, *args]) + "\n")
        return self.read()


def open_peers(stack: ExitStack, pin: str) -> dict[str, Client]:
    """Start the pairs that are compared (see ``PAIRS``), pinned as asked."""
    server_cpu, client_cpu = pin_choices(pin)
    # A stock server serves one session at a time, so our client has one of its own.
    kinds = ("raw", "stock", "ours", "stock for ours")
    ports = {kind: stack.enter_context(Server(kind.split()[0], server_cpu)).port for kind in kinds}
    clients = {
        name: stack.enter_context(Client(client, ports[server], client_cpu))
        for name, (client, server) in PAIRS.items()
        if client != "uvloop" or find_spec("uvloop") is not None
    }
    return clients


def resident(pid: int | str, what: str = "VmRSS") -> int:
    """Return the resident memory of a process in bytes, or its peak (``VmHWM``)."""
    with open(f"/proc/{pid}/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(what))


def pin_choices(pin: str) -> tuple[int | None, int | None]:
    """Return the CPUs of server and client: one, two, or unpinned."""
    cpus = sorted(os.sched_getaffinity(0))
    if pin == "none" or len(cpus) < 2:
        return None, None
    return (cpus[0], cpus[0]) if pin == "same" else (cpus[0], cpus[1])
