"""A storm of crashes: python tests/soak/crashes.py [--crashes 500] [--seed S]

Sessions end by a segmentation fault, an abort, an exit, a kill, no memory, a stop, closed descriptors and threads left
behind, at random moments and some at once, beside good sessions that copy, call and have calls overlap. No good
session may be disturbed (each reply is checked), and in the end no process, descriptor, socket, directory or session is
left; else exit 1.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil

import rpcnb
from rpcnb.errors import RpcError
from rpcnb.server.isolation import Isolation

__all__ = ["run"]

BOARD = str(Path(__file__).resolve().parents[1] / "loopback" / "isolatedboard.py")
TOKEN = "crashes"
LIMIT = 30.0  # seconds for an operation of a good session
GOOD = 8  # sessions
BAD = 4  # that crash at once
MEMORY = 1 << 30


def _crash(session: Any, rng: random.Random) -> str:
    """End a session's process in some way; returns which."""
    kind = rng.choice(["segfault", "abort", "exit", "kill", "memory", "stop", "descriptors", "threads", "child"])
    session.call("b.add", 1, 2, timeout=LIMIT)
    time.sleep(rng.random() * 0.05)
    if rng.random() < 0.3:
        session.submit(session.array, np.zeros(rng.randrange(1, 1 << 20)))
    way: Callable[[], object] = {
        "memory": lambda: session.call("b.allocate", 2 * MEMORY, timeout=LIMIT),
        "stop": lambda: session.submit(session.fn.b.stop, timeout=0.2).exception(LIMIT),
        "descriptors": lambda: session.call("b.close_all", timeout=LIMIT),
        "threads": lambda: session.call("b.leave_threads", timeout=LIMIT),
        "child": lambda: session.call("b.leave", rng.choice(["child", "orphan", "group"]), timeout=LIMIT),
    }.get(kind, lambda: session.call(rng.choice(["b.crash", "b.crash_later"]), kind, timeout=LIMIT))
    with contextlib.suppress(RpcError):
        way()
    return kind


def run(crashes: int, seed: int, good: int = GOOD) -> tuple[Counter[str], list[str]]:
    """Let it storm; returns what was done, and what should not have happened."""
    counts: Counter[str] = Counter()
    findings: list[str] = []
    lock = threading.Lock()
    over = threading.Event()
    left = iter(range(crashes))

    def note(kind: str) -> None:
        with lock:
            counts[kind] += 1

    def behave(number: int) -> None:
        rng = random.Random(seed * 1000 + number)
        try:
            with rpcnb.connect(server.address, token=TOKEN) as session:
                while not over.is_set():
                    a, b = rng.randrange(1 << 30), rng.randrange(1 << 30)
                    assert session.call("b.add", a, b, timeout=LIMIT) == a + b
                    waiting = [session.submit(session.fn.b.sleep, one / 1000, timeout=LIMIT) for one in range(4)]
                    array = np.full(rng.randrange(1, 1 << 18), number)
                    assert (session.array(array, timeout=LIMIT).numpy(timeout=LIMIT) == array).all()
                    assert [one.result() for one in waiting] == [one / 1000 for one in range(4)]
                    note("good")
        except BaseException as error:
            with lock:
                findings.append(f"good session {number}: {type(error).__name__}: {error}")

    def misbehave(number: int) -> None:
        rng = random.Random(seed * 1000 + 500 + number)
        while True:
            with lock:
                if next(left, None) is None:
                    return
            try:
                with rpcnb.connect(server.address, token=TOKEN) as session:
                    note(_crash(session, rng))
            except BaseException as error:
                with lock:
                    findings.append(f"a session to crash: {type(error).__name__}: {error}")

    before = len(os.listdir("/proc/self/fd"))
    with rpcnb.Server(port=0, token=TOKEN, silent=True, isolate=Isolation([BOARD], memory=MEMORY)) as server:
        zygote = psutil.Process(server._processes._process.pid)
        users = [threading.Thread(target=behave, args=(number,)) for number in range(good)]
        bad = [threading.Thread(target=misbehave, args=(number,)) for number in range(BAD)]
        for thread in [*users, *bad]:
            thread.start()
        for thread in bad:
            thread.join()
        over.set()
        for thread in users:
            thread.join()
        _await(lambda: not server.sessions and len(zygote.children()) <= 1, findings, "processes or sessions are left")
        _await(lambda: zygote.num_fds() <= 12, findings, "descriptors are left in the zygote")
        with rpcnb.connect(server.address, token=TOKEN) as session:
            assert session.call("b.add", 1, 2) == 3
        directory = Path(server._processes.directory)
        _await(lambda: not list(directory.iterdir()), findings, "directories are left")
    _await(lambda: len(os.listdir("/proc/self/fd")) <= before + 6, findings, "descriptors are left")
    return counts, findings


def _await(condition: Callable[[], object], findings: list[str], otherwise: str) -> None:
    give_up = time.monotonic() + 10
    while not condition():
        if time.monotonic() > give_up:
            findings.append(otherwise)
            return
        time.sleep(0.05)


def main() -> int:
    """Run, and say what came of it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--crashes", type=int, default=500)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as state:
        os.environ["RPCNB_STATE_DIR"] = state
        counts, findings = run(options.crashes, options.seed)
    for finding in findings:
        sys.stdout.write(f"{finding}\n")
    seconds = time.monotonic() - began
    sys.stdout.write(f"seed {options.seed}, {seconds:.0f} s, {len(findings)} findings: {dict(counts)}\n")
    return 1 if findings else 0


if __name__ == "__main__":
    sys.exit(main())
