"""What rpcnb's clients are asked to measure."""

from __future__ import annotations

import resource
import time
from collections import deque
from typing import Any

from benchmarks.clients import Rpc
from benchmarks.raw_client import quantiles, timed

__all__ = ["Ours", "OverWeb", "ThroughProxy"]


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

        small = np.ones(64, "float32")
        self.session.array(small).numpy(small)  # both ends have what a first copy takes for good
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
