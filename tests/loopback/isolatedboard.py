"""Functions of a board whose sessions have processes of their own, and some that end theirs."""

from __future__ import annotations

import asyncio
import atexit
import contextlib
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
HOARD: list[bytearray] = []
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


LEAVES = {
    "child": "echo $$; exec sleep 1000",
    "orphan": "sleep 1000 & echo $!",
    "group": "set -m; sh -c 'echo $$; sleep 1000; true'",
}


@register_func("b.leave")
def leave(kind: str) -> int:
    """Start a process that would go on; returns its number."""
    child = subprocess.Popen(["sh", "-c", LEAVES[kind]], stdout=subprocess.PIPE)
    assert child.stdout is not None
    return int(child.stdout.readline())


@register_func("b.hoard")
def hoard() -> None:
    """Use up all memory that this process may have, and keep it."""
    for size in (1 << 20, 1 << 12, 100):
        with contextlib.suppress(MemoryError):
            while True:
                HOARD.append(bytearray(size))


@register_func("b.leave_at_exit")
def leave_at_exit() -> int:
    """Return, but have something in the process that goes on when it is to end."""
    atexit.register(time.sleep, 1000)
    return 5


@register_func("b.files")
def files(nbytes: int) -> int:
    """Leave a file with a hole, and one without."""
    with open(workpath("holes"), "wb") as file:
        file.truncate(1 << 32)
    with open(workpath("whole"), "wb") as file:
        file.write(bytes(nbytes))
    return nbytes


@register_func("b.odd")
def odd(nested: bool) -> object:
    """Return what JSON would make another of."""
    return [{"a": {None: 2}}] if nested else {1: 2}


@register_func("b.letters")
def letters() -> None:
    """Print letters of two bytes in pieces of one."""
    for piece in "äöü€".encode() * 5:
        os.write(1, bytes([piece]))
        time.sleep(0.002)


@register_func("b.flood")
def flood() -> None:
    while True:
        os.write(1, b"x" * 65536)


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
