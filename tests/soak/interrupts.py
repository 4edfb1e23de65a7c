"""Ctrl-C at random instants: python tests/soak/interrupts.py [COUNT] [LANES]

A helper thread sends SIGINT while the main thread calls, copies both ways, maps and waits. After each interrupt the
next call must be right; at the end the kernel's byte totals of every connection must be ours, and memory that nobody
wrote must be as it was.
"""

from __future__ import annotations

import os
import signal
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np

import rpcnb
from rpcnb.runtime.registry import Registry

_ACKED_AND_RECEIVED = struct.Struct("=QQ")
_AT = 120  # tcpi_bytes_acked and tcpi_bytes_received in Linux's struct tcp_info


def totals(link: Any) -> tuple[int, int]:
    """Bytes that the kernel has sent and received on a connection."""
    info = link.wire.sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _AT + 16)
    sent, received = _ACKED_AND_RECEIVED.unpack_from(info, _AT)
    return sent, received


class Storm:
    """Sends one SIGINT at a random instant of whatever runs inside :meth:`during`."""

    def __init__(self, seed: int) -> None:
        self._random = np.random.default_rng(seed)
        self._go = threading.Semaphore(0)
        self._armed = False
        self._ended = False
        self.lock = threading.Lock()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while True:
            self._go.acquire()
            if self._ended:
                return
            time.sleep(float(self._random.random()) ** 2 * 0.006)
            with self.lock:
                if self._armed:
                    os.kill(os.getpid(), signal.SIGINT)
                    self._armed = False

    def during(self, operation: Callable[[], object]) -> bool:
        """Repeat ``operation`` until it is interrupted."""
        try:
            self._armed = True
            self._go.release()
            while True:
                operation()
                if not self._armed:
                    time.sleep(0.05)  # the signal is on its way
        except KeyboardInterrupt:
            return True

    def end(self) -> None:
        """Stop."""
        self._ended = True
        self._go.release()
        self._thread.join()


def soak(count: int, lanes: int = 3, seed: int = 1) -> dict[str, int]:
    """Interrupt ``count`` times; returns what was counted.

    Raises:
        AssertionError: Something was lost.
    """
    registry = Registry()
    registry.register("echo", lambda x: x)

    async def later(x: int) -> int:
        import asyncio

        await asyncio.sleep(0.002)
        return x

    registry.register("later", later)
    random = np.random.default_rng(seed)
    storm = Storm(seed)
    counted: dict[str, int] = {}
    with (
        rpcnb.Server(port=0, registry=registry, silent=True) as server,
        rpcnb.connect(server.address, lanes=lanes) as session,
    ):
        echo, wait = session.get_function("echo"), session.get_function("later")
        data = random.integers(0, 255, 6 << 20, np.uint8)
        small, blob = data[: 1 << 16], data[:200_000].tobytes()
        untouched = session.array(data[::-1].copy())
        big, little = session.empty(data.shape, "uint8"), session.empty(small.shape, "uint8")
        into = np.empty_like(data)
        wait.submit(1).result()
        session.submit(big.copyfrom, data).result()
        links = [session._link, *(session._lanes.links() if session._lanes is not None else [])]
        time.sleep(0.3)  # until everything is acknowledged
        before = [(totals(link), link.wire.bytes_sent, link.wire.bytes_received) for link in links]
        operations: dict[str, Callable[[], object]] = {
            "call": lambda: echo(1),
            "call with data": lambda: echo(blob),
            "call that answers later": lambda: wait(3),
            "upload": lambda: big.copyfrom(data),
            "download": lambda: big.numpy(into),
            "small upload": lambda: little.copyfrom(small),
            "small download": lambda: little.numpy(),
            "wait for a submitted call": lambda: wait.submit(2).result(),
            "map": lambda: echo.map(range(300)),
            "look-up": lambda: session.get_function("echo"),
        }
        names = list(operations)
        slowest = 0.0
        for number in range(count):
            name = names[int(random.integers(len(names)))]
            storm.during(operations[name])
            counted[name] = counted.get(name, 0) + 1
            start = time.perf_counter()
            assert echo(number) == number, f"after an interrupt of {name}"
            slowest = max(slowest, time.perf_counter() - start)
        storm.end()
        np.testing.assert_array_equal(big.copyfrom(data).numpy(), data)
        np.testing.assert_array_equal(untouched.numpy(), data[::-1])
        give_up = time.monotonic() + 10
        while session.state != "ready":
            assert time.monotonic() < give_up, session.state
            time.sleep(0.01)
        for link, (kernel, sent, received) in zip(links, before, strict=True):
            while True:
                with link.wire.lock:
                    assert link.wire.ended is None, f"lane {link.lane} was lost"
                    now = totals(link)
                    ours = (link.wire.bytes_sent - sent, link.wire.bytes_received - received)
                if ours == (now[0] - kernel[0], now[1] - kernel[1]):
                    break
                assert time.monotonic() < give_up, f"lane {link.lane}: {ours} are not {kernel} to {now}"
                time.sleep(0.01)  # the last bytes are not acknowledged yet
        counted["slowest next call, ms"] = round(slowest * 1e3)
    return counted


if __name__ == "__main__":
    started = time.monotonic()
    total = int(sys.argv[1]) if len(sys.argv) > 1 else 5000
    found = soak(total, int(sys.argv[2]) if len(sys.argv) > 2 else 3)
    sys.stdout.write(f"{found}\n{total} interrupts in {time.monotonic() - started:.0f} s: nothing was lost\n")
