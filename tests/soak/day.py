"""An ordinary day, quickly: python tests/soak/day.py --minutes 40 --warm-up 20 [--seed S] [--only calls,cells,...]

One session is used and others are opened and closed: calls of every kind, submitted and out of time, copies, files,
remote cells, while a panel of everything is open. After a warm-up, memory grows by less than 1 MiB per 100,000
operations at the client and at the server (a process of its own), and descriptors and threads are as many as before;
else exit 1.
``--trace`` names the lines whose memory has grown at the client.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import gc
import os
import random
import sys
import threading
import time
import tracemalloc
from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

import rpcnb
from rpcnb.jupyter.bridge import Bridge
from rpcnb.jupyter.facts import Scope

if __name__ == "__main__":
    sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))

from storm import TOKEN, start_server
from users import ADDED

__all__ = ["OPERATIONS", "Day", "Figures"]

LIMIT = 30.0  # seconds for an operation
PER = 100_000  # operations
MOST = 1 << 20  # bytes that they may leave behind
BLUR = 1 << 20  # bytes that an allocator's fragments make of a resident size, whatever is done
WARM_UP = 0.25  # of the time, where none is given; a short day has not warmed up when it begins to count
WORKERS = 4  # threads that a pool may have made meanwhile, as more were needed at once
SERVER_STATE = """\
import gc as _gc, os as _os, threading as _threading
_gc.collect()
_pages = int(open("/proc/self/statm").read().split()[1])
(_pages * _os.sysconf("SC_PAGE_SIZE"), len(_os.listdir("/proc/self/fd")), _threading.active_count())
"""


class Figures(NamedTuple):
    """What a process has."""

    rss: int
    descriptors: int
    threads: int


class _View:
    """A panel at which somebody looks."""

    def __init__(self) -> None:
        self.scope = Scope()
        self.shown = 0

    def show(self, snapshot: dict[str, Any]) -> bool:
        self.shown += 1
        return True

    def tick(self, now: float) -> None:
        pass


class Day:
    """The client."""

    def __init__(self, address: str, seed: int) -> None:
        self.rng = random.Random(seed)
        self._address = address
        self.session = self._connect()
        self._observed = self._connect()  # by whom the server's figures are asked: a session of its own
        self.counts: Counter[str] = Counter()
        self.array = np.arange(50_000, dtype="int32")
        self.number = 0

    def _connect(self) -> Any:
        return rpcnb.connect(self._address, token=TOKEN)

    def ours(self) -> Figures:
        """Return what this process has."""
        gc.collect()
        with open("/proc/self/statm") as file:
            rss = int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        return Figures(rss, len(os.listdir("/proc/self/fd")), threading.active_count())

    def servers(self) -> Figures:
        """Ask what the server's process has."""
        text = self._observed.run_cell(SERVER_STATE, timeout=LIMIT).data["text/plain"]
        return Figures(*(int(word) for word in text.strip("()").split(",")))

    def close(self) -> None:
        """End the sessions."""
        self.session.close()
        self._observed.close()

    # -- operations: each returns how many it was --------------------------------------------------------------------

    def calls(self) -> int:
        for name, added in ADDED.items():
            self.number += 1
            assert self.session.call(name, self.number, timeout=LIMIT) == self.number + added
        return len(ADDED)

    def plain(self) -> int:
        function = self.session.get_function("plain", timeout=LIMIT)
        for x in range(50):
            assert function(x) == x + 1
        return 50

    def submits(self) -> int:
        function = self.session.get_function("later", timeout=LIMIT)
        pending = [function.submit(x, timeout=LIMIT) for x in range(20)]
        pending[3].cancel()
        for x, one in enumerate(pending):
            assert x == 3 or one.result() == x + 2
        return len(pending)

    def late(self) -> int:
        with contextlib.suppress(rpcnb.DeadlineExceeded):
            self.session.call("slow", 1, timeout=0.0002)
        return 1

    def copies(self) -> int:
        tensor = self.session.array(self.array[: self.rng.randrange(1, len(self.array))], timeout=LIMIT)
        tensor.numpy(timeout=LIMIT)
        return 2

    def files(self) -> int:
        self.session.upload(self.rng.randbytes(3000), "file", timeout=LIMIT)
        self.session.download("file", timeout=LIMIT)
        self.session.remove("file", timeout=LIMIT)
        return 3

    def cells(self) -> int:
        self.number += 1
        found = self.session.run_cell(f"print({self.number})\nx = {self.number}\nx", timeout=LIMIT)
        assert found.data["text/plain"] == str(self.number)
        return 1

    def failures(self) -> int:
        with contextlib.suppress(rpcnb.RemoteError):
            self.session.call("fail", self.number, timeout=LIMIT)
        return 1

    def sessions(self) -> int:
        with self._connect() as session:
            assert session.call("later", 1, timeout=LIMIT) == 3
        return 1

    def reconnects(self) -> int:
        with self._connect() as session:
            session.call("plain", 1, timeout=LIMIT)
            session.reconnect(timeout=LIMIT)
            session.call("plain", 1, timeout=LIMIT)
        return 2


OPERATIONS = ("calls", "plain", "submits", "late", "copies", "files", "cells", "failures", "sessions", "reconnects")


def run(day: Day, names: list[str], until: float) -> int:
    """Do all operations in turn until it is time; returns how many they were."""
    count = 0
    while time.monotonic() < until:
        for name in names:
            way: Callable[[], int] = getattr(day, name)
            done = way()
            day.counts[name] += done
            count += done
    return count


def told(name: str, before: Figures, after: Figures, operations: int) -> bool:
    """Print what has changed; returns whether that is within what is promised."""
    grown = after.rss - before.rss
    per = grown / operations * PER
    good = grown < BLUR or per < MOST
    same = after.descriptors <= before.descriptors and after.threads <= before.threads + WORKERS
    sys.stdout.write(
        f"{name}: memory {before.rss / 2**20:.1f} -> {after.rss / 2**20:.1f} MiB, {per / 2**20:+.2f} MiB per {PER} "
        f"operations; descriptors {before.descriptors} -> {after.descriptors}; threads {before.threads} -> "
        f"{after.threads}{'' if good and same else '  <-- BROKEN'}\n"
    )
    return good and same


def settled(figures: Callable[[], Figures], before: Figures | None) -> Figures:
    """Return figures once threads and descriptors of before have gone, or after five seconds."""
    give_up = time.monotonic() + 5
    while True:
        found = figures()
        gone = before is not None and found.descriptors <= before.descriptors and found.threads <= before.threads
        if gone or time.monotonic() > give_up:
            return found
        time.sleep(0.2)


def main() -> int:
    """Work, look, work, and look again."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--warm-up", type=float, metavar="MINUTES", help="of these minutes; else a quarter")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", type=functools.partial(str.split, sep=","), default=[*OPERATIONS])
    parser.add_argument("--trace", action="store_true")
    options = parser.parse_args()
    warm_up = options.minutes * WARM_UP if options.warm_up is None else options.warm_up
    view, bridge = _View(), Bridge()
    with start_server() as address:
        day = Day(address, options.seed)
        bridge.add(view)
        run(day, options.only, time.monotonic() + warm_up * 60)
        if options.trace:
            tracemalloc.start(8)
            run(day, options.only, time.monotonic() + 5)
            gc.collect()
            traced = tracemalloc.take_snapshot()
        servers, ours = settled(day.servers, None), settled(day.ours, None)  # in this order: asking opens a lane
        count = run(day, options.only, time.monotonic() + (options.minutes - warm_up) * 60)
        ours_after, servers_after = settled(day.ours, ours), settled(day.servers, servers)
        if options.trace:
            for line in tracemalloc.take_snapshot().compare_to(traced, "lineno")[:12]:
                sys.stdout.write(f"  {line}\n")
        bridge.remove(view)
        day.close()
    sys.stdout.write(f"{count} operations: {dict(day.counts)}; {view.shown} snapshots\n")
    good = told("client", ours, ours_after, count)
    good &= told("server", servers, servers_after, count)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
