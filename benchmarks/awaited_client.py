"""rpcnb's awaited client, on asyncio's own loop and on uvloop's."""

from __future__ import annotations

import asyncio
import time
from typing import Any

from benchmarks.raw_client import quantiles

__all__ = ["Awaited", "AwaitedOnUvloop"]


class Awaited:
    """An awaited session; each case is one task of its loop."""

    def __init__(self, port: int) -> None:
        self.loop = self.make_loop()
        self.loop.run_until_complete(self._open(port))

    def make_loop(self) -> asyncio.AbstractEventLoop:
        """Return the loop."""
        return asyncio.new_event_loop()

    async def _open(self, port: int) -> None:
        import rpcnb

        self.session = await rpcnb.connect_async("127.0.0.1", port)
        self.add = await self.session.get_function("bench.add")

    def null(self, count: int) -> Any:
        """Await calls without arguments, one after the other."""
        return self.loop.run_until_complete(self._null(count))

    async def _null(self, count: int) -> Any:
        clock, add = time.perf_counter, self.add
        times = []
        for _ in range(count):
            start = clock()
            await add()
            times.append(clock() - start)
        return quantiles(times)

    def gathered(self, window: int, count: int) -> float:
        """Await ``window`` calls together, again and again; returns calls a second."""
        return self.loop.run_until_complete(self._gathered(window, count))

    async def _gathered(self, window: int, count: int) -> float:
        start = time.perf_counter()
        for _ in range(count // window):
            await asyncio.gather(*(self.add() for _ in range(window)))
        return count // window * window / (time.perf_counter() - start)


class AwaitedOnUvloop(Awaited):
    """The same on uvloop."""

    def make_loop(self) -> asyncio.AbstractEventLoop:
        """Return the loop."""
        import uvloop

        loop: asyncio.AbstractEventLoop = uvloop.new_event_loop()
        return loop
