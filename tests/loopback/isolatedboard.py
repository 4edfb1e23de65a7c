"""Functions of a board whose sessions have processes of their own, and some that end theirs."""

from __future__ import annotations

import asyncio
import ctypes
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable

import numpy as np

from rpcnb.runtime.local import workpath
from rpcnb.runtime.registry import register_func

STATE: list[int] = []
CRASHES: dict[str, Callable[[], object]] = {
    "segfault": lambda: ctypes.string_at(8),
    "abort": os.abort,
    "exit": lambda: os._exit(3),
    "kill": lambda: os.kill(os.getpid(), signal.SIGKILL),
}


def no_core() -> None:
    """Leave no core file."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


@register_func("b.crash")
def crash(kind: str) -> None:
    no_core()
    CRASHES[kind]()


@register_func("b.crash_later")
async def crash_later(kind: str) -> None:
    await asyncio.sleep(0.05)
    crash(kind)


@register_func("b.stop")
def stop() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)
    time.sleep(60)


@register_func("b.close_all")
def close_all() -> None:
    os.closerange(3, 256)


@register_func("b.hang")
def hang(seconds: float) -> None:
    """Let nothing else run: a C call that does not give the interpreter away."""
    ctypes.PyDLL(None).usleep(int(seconds * 1e6))


@register_func("b.leave_threads")
def leave_threads() -> None:
    for _ in range(4):
        threading.Thread(target=time.sleep, args=(1000,)).start()


@register_func("b.leave_child")
def leave_child(detached: bool) -> int:
    """Start a process that would go on; returns its number."""
    command = "sleep 1000 & echo $!" if detached else "exec sleep 1000"
    child = subprocess.Popen(["sh", "-c", command], stdout=subprocess.PIPE if detached else None)
    return int(child.stdout.readline()) if child.stdout is not None else child.pid


@register_func("b.burn")
def burn() -> None:
    while True:
        pass


@register_func("b.allocate")
def allocate(nbytes: int) -> int:
    return len(bytearray(nbytes))


@register_func("b.pid")
def pid() -> int:
    return os.getpid()


@register_func("b.facts")
def facts() -> str:
    """Say what the process is like."""
    with open("/proc/self/oom_score_adj") as file:
        return f"{os.environ.get('OMP_NUM_THREADS')} {file.read().strip()} {np.random.random()}"


@register_func("b.note")
def note(number: int) -> int:
    """Count what this process has noted."""
    STATE.append(number)
    return len(STATE)


@register_func("b.add")
def add(a: int, b: int) -> int:
    return a + b


@register_func("b.sleep")
async def sleep(seconds: float) -> float:
    await asyncio.sleep(seconds)
    return seconds


@register_func("b.block")
def block(seconds: float) -> float:
    time.sleep(seconds)
    return seconds


@register_func("b.work")
def work(steps: int, array: object) -> object:
    """Print, leave a file, and return what was given, twice."""
    for step in range(steps):
        sys.stdout.write(f"step {step}\n")
        sys.stderr.write("noted\n")
        os.system("echo from a child")
        time.sleep(0.02)
    with open(workpath("report.txt"), "w") as file:
        file.write("all well")
    return array * 2  # type: ignore[operator]


@register_func("b.fail")
def fail(text: str) -> None:
    raise ValueError(text)


@register_func("b.callback", callback=True)
def callback(done: object, value: int) -> None:
    threading.Timer(0.02, lambda: done(value + 1)).start()  # type: ignore[operator]
