"""A relay that shapes a link to a rate and a latency, so that slow links can be seen without one."""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["Shaper", "parse_link"]

_UNITS = {"": 1, "k": 1e3, "m": 1e6, "g": 1e9}
_PIECE = 16 << 10
_CREDIT = 0.01  # seconds
_QUEUE = 64  # pieces on the way at most: the relay's memory is bounded


def parse_link(text: str) -> tuple[float, float]:
    """Read ``RATE,LATENCY``: ``10M,20ms`` is 10 MB/s and 20 ms in each direction.

    Returns:
        Bytes a second, and seconds of one way.

    Raises:
        ValueError: It is not like that.
    """
    rate_text, _, latency_text = text.lower().replace(" ", "").partition(",")
    rate_text = rate_text.removesuffix("/s").removesuffix("b")
    unit = rate_text[-1:] if rate_text[-1:].isalpha() else ""
    scale = 1e-3 if latency_text.endswith("ms") else 1.0
    try:
        rate = float(rate_text.removesuffix(unit)) * _UNITS[unit]
        latency = float(latency_text.removesuffix("ms").removesuffix("s") or 0) * scale
    except (ValueError, KeyError):
        raise ValueError(f"{text!r} is no link; expected RATE,LATENCY such as 10M,20ms") from None
    if rate <= 0 or not 0 <= latency < 60:
        raise ValueError(f"{text!r} is no link; expected a rate above 0 and a latency below 60 s")
    return rate, latency


class Shaper:
    """Relays every connection to another port, delayed and throttled.

    Args:
        target: Host and port to relay to.
        rate: Bytes a second, each direction and connection.
        latency: Seconds of one way.
    """

    def __init__(self, target: tuple[str, int], rate: float, latency: float) -> None:
        self._target = target
        self._rate = rate
        self._latency = latency
        self._server: asyncio.AbstractServer | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self.port = 0

    async def start(self, host: str, port: int) -> None:
        """Listen on ``host`` and ``port`` (0: any)."""
        self._server = await asyncio.start_server(self._relay, host, port)
        self.port = self._server.sockets[0].getsockname()[1]

    async def _relay(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            onward_reader, onward_writer = await asyncio.open_connection(*self._target)
        except OSError:
            writer.close()
            return
        try:
            with contextlib.suppress(asyncio.CancelledError):  # the server's end; asyncio would log it
                await asyncio.gather(
                    self._pump(reader, onward_writer), self._pump(onward_reader, writer), return_exceptions=True
                )
        finally:
            writer.close()
            onward_writer.close()

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Move one direction: pieces leave at the rate, and arrive a latency later."""
        loop = asyncio.get_running_loop()
        on_the_way: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue(
            _QUEUE + int(self._rate * self._latency / _PIECE)
        )
        deliver = asyncio.create_task(self._deliver(on_the_way, writer, loop.time))
        self._tasks.add(deliver)
        free_at = loop.time()
        data = b"-"
        with contextlib.suppress(OSError):
            while data:
                data = await reader.read(_PIECE)
                # A sleep that took too long is made up for, else the link would be slower than it says.
                free_at = max(free_at, loop.time() - _CREDIT) + len(data) / self._rate
                await on_the_way.put((max(free_at, loop.time()) + self._latency, data))
                if free_at - loop.time() > 0.005:
                    await asyncio.sleep(free_at - loop.time())
        await deliver
        self._tasks.discard(deliver)

    @staticmethod
    async def _deliver(
        on_the_way: asyncio.Queue[tuple[float, bytes]], writer: asyncio.StreamWriter, clock: Callable[[], float]
    ) -> None:
        data = b"-"
        with contextlib.suppress(OSError):
            while data:
                at, data = await on_the_way.get()
                if at > clock():
                    await asyncio.sleep(at - clock())
                writer.write(data)
                await writer.drain()
        writer.close()

    def close(self) -> None:
        """Stop listening and relaying."""
        if self._server is not None:
            self._server.close()
        for task in self._tasks:
            task.cancel()
