"""One client: ``python -m benchmarks.client_process raw|stock|ours PORT``; reads cases as JSON lines, answers so."""

from __future__ import annotations

import json
import resource
import socket
import struct
import sys
import time
from collections import deque
from collections.abc import Callable
from typing import Any


def quantiles(times: list[float]) -> dict[str, float]:
    """Return median and 99th percentile."""
    times.sort()
    return {"p50": times[len(times) // 2], "p99": times[len(times) * 99 // 100]}


def timed(function: Callable[[], Any], count: int) -> dict[str, float]:
    """Call ``count`` times; return the quantiles of the single calls."""
    clock = time.perf_counter
    times = []
    for _ in range(count):
        start = clock()
        function()
        times.append(clock() - start)
    return quantiles(times)


class Raw:
    """The floor: a blocking socket and no protocol."""

    def __init__(self, port: int) -> None:
        self.sock = socket.create_connection(("127.0.0.1", port))
        self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.memory = memoryview(bytearray(1))

    def null(self, count: int) -> Any:
        """Ping-pong of a null call's sizes."""
        sock, ping, pong = self.sock, bytes(24), bytearray(32)

        def call() -> None:
            sock.sendall(ping)
            sock.recv_into(pong)

        return timed(call, count)

    small = null

    def _copy(self, nbytes: int, up: bool) -> None:
        self.sock.sendall(struct.pack("<qqq", nbytes if up else -nbytes, 0, 0))
        if up:
            self.sock.sendall(self.memory[:nbytes])
            left = 32
            while left:
                left -= len(self.sock.recv(left))
            return
        left = nbytes
        while left:
            left -= self.sock.recv_into(self.memory[nbytes - left : nbytes])

    def up(self, nbytes: int, count: int) -> Any:
        """Send."""
        if len(self.memory) < nbytes:
            self.memory = memoryview(bytearray(nbytes))
        self._copy(nbytes, True)
        return timed(lambda: self._copy(nbytes, True), count)

    def down(self, nbytes: int, count: int) -> Any:
        """Receive."""
        if len(self.memory) < nbytes:
            self.memory = memoryview(bytearray(nbytes))
        self._copy(nbytes, False)
        return timed(lambda: self._copy(nbytes, False), count)


class Rpc:
    """What stock and ours share: the API is the same."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.session = self.open()
        self.add = self.session.get_function("bench.add")

    def open(self) -> Any:
        """Open a session."""
        raise NotImplementedError

    def null(self, count: int) -> Any:
        """Call without arguments."""
        return timed(self.add, count)

    def small(self, count: int) -> Any:
        """Call with an int, a float and a text of 32 characters."""
        add, text = self.add, "x" * 32
        return timed(lambda: add(1, 2.5, text), count)

    def lookup(self, count: int) -> Any:
        """Look a function up."""
        return timed(lambda: self.session.get_function("bench.add"), count)

    def pause(self, count: int) -> Any:
        """First call after 50 ms of silence."""
        times = []
        for _ in range(count):
            time.sleep(0.05)
            start = time.perf_counter()
            self.add()
            times.append(time.perf_counter() - start)
        return quantiles(times)

    def connect(self, count: int) -> Any:
        """Connect and call once."""

        def once() -> None:
            session = self.open()
            session.get_function("bench.add")()
            self.end(session)

        return timed(once, count)

    def end(self, session: Any) -> None:
        """End a session."""

    def tensor(self, nbytes: int) -> Any:
        """Allocate at the server."""
        raise NotImplementedError


class Stock(Rpc):
    """apache-tvm's client."""

    def open(self) -> Any:
        """Open a session."""
        from tvm import rpc

        return rpc.connect("127.0.0.1", self.port)

    def connect(self, count: int) -> Any:
        """Connect and call once; a stock server serves one session at a time."""
        del self.add, self.session
        found = super().connect(count)
        self.session = self.open()
        self.add = self.session.get_function("bench.add")
        return found

    def up(self, nbytes: int, count: int) -> Any:
        """Copy an array to the server."""
        import numpy as np
        import tvm

        data = np.ones(nbytes // 4, "float32")
        remote = tvm.runtime.empty(data.shape, "float32", self.session.cpu())
        remote.copyfrom(data)
        return timed(lambda: remote.copyfrom(data), count)

    def down(self, nbytes: int, count: int) -> Any:
        """Copy an array from the server."""
        import tvm

        remote = tvm.runtime.empty((nbytes // 4,), "float32", self.session.cpu())
        local = tvm.runtime.empty((nbytes // 4,), "float32", tvm.cpu())
        remote.copyto(local)
        return timed(lambda: remote.copyto(local), count)


class Ours(Rpc):
    """rpcnb's client."""

    def open(self) -> Any:
        """Open a session."""
        import rpcnb

        return rpcnb.connect("127.0.0.1", self.port)

    def end(self, session: Any) -> None:
        """End a session."""
        session.close()

    def up(self, nbytes: int, count: int) -> Any:
        """Copy an array to the server."""
        import numpy as np

        data = np.ones(nbytes // 4, "float32")
        remote = self.session.array(data)
        return timed(lambda: remote.copyfrom(data), count)

    def down(self, nbytes: int, count: int) -> Any:
        """Copy an array from the server."""
        import numpy as np

        data = np.ones(nbytes // 4, "float32")
        remote = self.session.array(data)
        return timed(lambda: remote.numpy(data), count)

    def pipeline(self, window: int, count: int) -> float:
        """Submit null calls, ``window`` on the way; returns calls a second."""
        return self._keep_on_the_way(self.add, window, count)

    def overlap(self, window: int, count: int) -> float:
        """Submit calls that may answer later, ``window`` running; returns calls a second."""
        return self._keep_on_the_way(self.session.get_function("bench.async"), window, count)

    def _keep_on_the_way(self, function: Any, window: int, count: int) -> float:
        function.submit().result()
        waiting: deque[Any] = deque()
        start = time.perf_counter()
        for _ in range(count):
            if len(waiting) == window:
                waiting.popleft().result()
            waiting.append(function.submit())
        while waiting:
            waiting.popleft().result()
        return count / (time.perf_counter() - start)

    def map(self, window: int, count: int) -> float:
        """Map a function over numbers, ``window`` calls in one go; returns calls a second."""
        start = time.perf_counter()
        self.add.map(range(count), window=window)
        return count / (time.perf_counter() - start)

    def sleeps(self, calls: int) -> float:
        """Submit calls that sleep 100 ms each, all at once; returns the seconds until all have answered."""
        sleep = self.session.get_function("bench.sleep")
        sleep.submit().result()
        start = time.perf_counter()
        for job in [sleep.submit() for _ in range(calls)]:
            job.result()
        return time.perf_counter() - start

    def mixed(self, nbytes: int, count: int) -> Any:
        """Null calls alone, and beside a copy in each direction on the same session."""
        import numpy as np

        data = np.ones(nbytes // 4, "float32")
        remote = self.session.array(data)
        found: dict[str, Any] = {"idle": timed(self.add, count)}
        for way, submit in (
            ("up", lambda: self.session.submit(remote.copyfrom, data)),
            ("down", lambda: self.session.submit(remote.numpy, data)),
        ):
            start = time.perf_counter()
            submit().result()
            alone = time.perf_counter() - start
            times: list[float] = []
            start = time.perf_counter()
            transfer = submit()
            while not transfer.done():
                before = time.perf_counter()
                self.add()
                times.append(time.perf_counter() - before)
            took = time.perf_counter() - start
            found[way] = {**quantiles(times), "calls": len(times), "slowdown": took / alone, "rate": nbytes / took}
        return found

    def memory(self, nbytes: int) -> Any:
        """Copy there and back; returns the peak memory beyond source and destination, in bytes."""
        import numpy as np

        data = np.ones(nbytes // 4, "float32")
        back = np.ones(nbytes // 4, "float32")
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        self.session.array(data).numpy(back)
        return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024


class OverWeb(Ours):
    """rpcnb's client over a WebSocket."""

    def open(self) -> Any:
        """Open a session."""
        import rpcnb

        return rpcnb.connect(f"ws://127.0.0.1:{self.port}")


class ThroughProxy(Ours):
    """rpcnb's client through a proxy."""

    def open(self) -> Any:
        """Open a session."""
        import rpcnb

        return rpcnb.connect("127.0.0.1", self.port, "bench")


KINDS = {"raw": Raw, "stock": Stock, "ours": Ours, "web": OverWeb, "proxy": ThroughProxy}


def main() -> None:
    """Serve cases until end of input."""
    client = KINDS[sys.argv[1]](int(sys.argv[2]))
    for line in sys.stdin:
        case, *args = json.loads(line)
        print(json.dumps(getattr(client, case)(*args)), flush=True)


if __name__ == "__main__":
    main()
