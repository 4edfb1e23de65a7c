"""Whether a token can be guessed byte by byte: python tests/soak/timing.py [TRIES]

Wrong tokens that differ in the first byte and in the last one are refused in turn; Welch's t of the two samples, and of
one of them against itself, tells whether the difference could be seen. Below about 4.5 nothing is detected.
"""

from __future__ import annotations

import random
import statistics
import sys
import time

from rpcnb.runtime.access import Gate, new_token


def welch(one: list[int], other: list[int]) -> float:
    """Return Welch's t of two samples, without their slowest tenth (interrupts of the machine)."""
    one, other = sorted(one)[: len(one) * 9 // 10], sorted(other)[: len(other) * 9 // 10]
    spread = statistics.variance(one) / len(one) + statistics.variance(other) / len(other)
    found: float = (statistics.fmean(one) - statistics.fmean(other)) / spread**0.5
    return found


def measure(tries: int) -> tuple[float, float]:
    """Return t of first-byte against last-byte mismatches, and of first-byte ones among themselves."""
    token = new_token()
    gate = Gate("rpi", token)
    head, tail = ("B" if letter == "A" else "A" for letter in (token[0], token[-1]))
    wrong = {"first": head + token[1:], "last": token[:-1] + tail, "again": head + token[1:]}
    samples: dict[str, list[int]] = {name: [] for name in wrong}
    clock, names = time.perf_counter_ns, list(wrong)
    for _ in range(tries):
        random.shuffle(names)  # what came before must not decide
        for name in names:
            text = f"client:rpi -token={wrong[name]}"
            start = clock()
            gate.admits(text)
            samples[name].append(clock() - start)
    return welch(samples["first"], samples["last"]), welch(samples["first"], samples["again"])


if __name__ == "__main__":
    found, floor = measure(int(sys.argv[1]) if len(sys.argv) > 1 else 10_000)
    sys.stdout.write(f"first against last byte: t = {found:.2f}; the same against itself: t = {floor:.2f}\n")
