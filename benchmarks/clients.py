"""What stock's client and ours are asked to measure; the API of both is the same."""

from __future__ import annotations

import time
from typing import Any

from benchmarks.raw_client import quantiles, timed

__all__ = ["Rpc", "Stock"]


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
