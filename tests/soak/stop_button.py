"""The stop button at random instants of real kernels: python tests/soak/stop_button.py [--kernels N] [--presses N]

Cells of every kind run against the demo board, one at a time, and each is interrupted as a front end does it. After
each press the sessions must be alive, the next call of both right, and memory that nobody wrote as it was. Printed are
the times from the press to an idle kernel (p50, p99, max) and the sessions that were lost; more than none, or a p99
above 0.5 s, is a failure.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))

from kernels import Cell, Kernel

__all__ = ["KINDS", "P99", "Presses", "press_often"]

P99 = 0.5  # seconds from the press to an idle kernel
_LONGEST = 0.8  # seconds from a cell's beginning to the press
_LOST_PRESS = 3.0  # seconds after which one presses again, as a user would
_DEAF = 15.0  # seconds after which a kernel that takes no cell up is given up

SETUP = """\
import asyncio, zlib
import numpy as np
import rpcnb
%load_ext rpcnb
session = %rpc_connect demo
there = await rpcnb.connect_async(session.peer, key="demo")
add, slow, wait = (session.get_function("demo." + name) for name in ("add", "slow_add", "sleep"))
data = np.random.default_rng(1).integers(0, 255, 64 << 20, np.uint8)
untouched = session.array(data[: 1 << 18])
untouched_there = await there.array(data[: 1 << 18])
big, into = session.array(data), np.empty_like(data)
big_there = await there.empty(data.shape, "uint8")
expected = zlib.crc32(data[: 1 << 18])

def check(number):
    assert session.state not in ("lost", "closed"), session.ended_by
    assert add(number, 1) == number + 1
    assert zlib.crc32(untouched.numpy()) == expected

async def check_there(number):
    assert there.state not in ("lost", "closed"), there.ended_by
    assert await there.call("demo.add", number, 1) == number + 1
    assert zlib.crc32(await untouched_there.numpy()) == expected
"""

# None of these ends by itself. A plain function cannot be stopped at the board, so a slow one there is not very slow.
KINDS = {
    "calls": "while True: add(1, 2)",
    "slow call": "while True: slow(1, 2, 0.2)",
    "calls that answer later": "while True: wait(0.003)",
    "one that answers much later": "wait(60.0)",
    "wait for a submitted call": "while True: wait.submit(0.003).result()",
    "map": "while True: add.map(range(300), range(300))",
    "copy up": "while True: big.copyfrom(data)",
    "copy down": "while True: big.numpy(into)",
    "small copies": "while True: big.view((1 << 16,)).copyfrom(data[: 1 << 16]).numpy()",
    "remote cell": "%%rpc\nimport time\nwhile True: time.sleep(0.01)",
    "remote cell with output": "%%rpc\nimport time\nwhile True: time.sleep(0.01), print(1)",
    "remote cells": "while True: session.run_cell('1 + 1')",
    "awaited calls": "while True: await there.call('demo.sleep', 0.003)",
    "awaited call": "await there.call('demo.sleep', 60.0)",
    "awaited copy": "while True: await big_there.copyfrom(data)",
    "awaited submitted call": "await wait.submit(60.0)",
    "gathered": "await asyncio.gather(*(there.call('demo.sleep', 60.0) for _ in range(3)))",
    "await, then blocking": "await there.call('demo.add', 1, 2)\nwait(60.0)",
    "await and blocking": "while True:\n    await there.call('demo.sleep', 0.002)\n    wait(0.002)\n    add(1, 2)",
    "await and copy": "while True:\n    await asyncio.sleep(0.002)\n    big.copyfrom(data)",
    "quiet await": "await asyncio.sleep(60)",
}


@dataclass
class Presses:
    """What was seen.

    Attributes:
        seconds: From each press to an idle kernel, by the kind of cell.
        lost: Sessions lost, wrong results and wrong memory, as tracebacks.
        again: Presses that had to be repeated, by the kind of cell.
        ended: What the cells raised; nothing if the press came before their first line.
        odd: Tracebacks of cells that ended late, or by anything but an interrupt.
        deaf: Kernels that took no further cell up, as bare ones of ipykernel 7.3.0 do after some hundred.
    """

    seconds: dict[str, list[float]] = field(default_factory=dict)
    lost: list[str] = field(default_factory=list)
    again: Counter[str] = field(default_factory=Counter)
    ended: Counter[str] = field(default_factory=Counter)
    odd: list[str] = field(default_factory=list)
    deaf: int = 0

    @property
    def count(self) -> int:
        """How many presses."""
        return sum(map(len, self.seconds.values()))

    def share(self, share: float) -> float:
        """Return a quantile of all times."""
        times = sorted(second for seconds in self.seconds.values() for second in seconds)
        return times[min(len(times) - 1, int(len(times) * share))]


class _Deaf(Exception):
    """The kernel takes no cell up."""


def _begin(kernel: Kernel, source: str) -> Cell:
    try:
        return kernel.begin(source, _DEAF)
    except TimeoutError:
        raise _Deaf from None


def _press(kernel: Kernel, kind: str, delay: float, seen: Presses) -> None:
    """Run a cell and stop it after ``delay``."""
    cell = _begin(kernel, KINDS[kind])
    time.sleep(delay)
    pressed = kernel.interrupt()
    try:
        cell.wait(_LOST_PRESS)
    except TimeoutError:
        seen.again[kind] += 1
        kernel.interrupt()
        cell.wait(_DEAF)
    assert cell.ended is not None
    seen.seconds.setdefault(kind, []).append(cell.ended - pressed)
    seen.ended[cell.error or "nothing"] += 1
    if cell.ended - pressed > P99 or cell.error not in ("KeyboardInterrupt", "CancelledError"):
        seen.odd.append(
            f"{cell.ended - pressed:.3f} s after a press in {kind!r}:\n{cell.trace or cell.messages}{cell.err}"
        )


def _check(kernel: Kernel, number: int, kind: str, seen: Presses) -> None:
    for source in (f"check({number})", f"await check_there({number})"):
        cell = _begin(kernel, f"{source}\nprint('right')").wait(60)
        if cell.error or cell.out != "right\n":
            seen.lost.append(f"after a press in {kind!r}:\n{cell.trace}{cell.out}")


def _press_in_one_kernel(presses: int, chance: random.Random, seen: Presses, longest: float) -> None:
    with Kernel(traced=False) as kernel:
        setup = kernel.run(SETUP, 60)
        assert not setup.error, setup.trace
        kinds: list[str] = []
        for number in range(presses):
            kinds = kinds or chance.sample(list(KINDS), len(KINDS))
            kind = kinds.pop()
            try:
                _press(kernel, kind, chance.random() ** 2 * longest, seen)
                _check(kernel, number, kind, seen)
            except _Deaf:
                seen.deaf += 1
                return


def press_often(kernels: int, presses: int, seed: int = 1, longest: float = _LONGEST) -> Presses:
    """Press ``presses`` times in each of ``kernels`` kernels, one after the other."""
    chance, seen = random.Random(seed), Presses()
    for _ in range(kernels):
        goal = seen.count + presses
        while seen.count < goal:  # a kernel that has gone deaf is replaced
            _press_in_one_kernel(goal - seen.count, chance, seen, longest)
    return seen


def _main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kernels", type=int, default=4)
    parser.add_argument("--presses", type=int, default=250, help="in each kernel")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    began = time.monotonic()
    seen = press_often(options.kernels, options.presses, options.seed)
    write = sys.stdout.write
    for kind, seconds in seen.seconds.items():
        seconds.sort()
        again = f", pressed again {seen.again[kind]} times" if seen.again[kind] else ""
        write(f"{kind:30} {len(seconds):4} p50 {seconds[len(seconds) // 2]:.3f} s, max {seconds[-1]:.3f} s{again}\n")
    write(f"cells ended by {dict(seen.ended)}; kernels that took no further cell: {seen.deaf}\n")
    write("".join(f"{text}\n" for text in (*seen.odd, *seen.lost)))
    write(
        f"{seen.count} presses in {time.monotonic() - began:.0f} s: p50 {seen.share(0.5):.3f} s, "
        f"p99 {seen.share(0.99):.3f} s, max {seen.share(1):.3f} s; {len(seen.lost)} lost\n"
    )
    return 0 if not seen.lost and seen.share(0.99) <= P99 else 1


if __name__ == "__main__":
    sys.exit(_main())
