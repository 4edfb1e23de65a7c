"""A server that serves as TVM's event-driven handler does: it looks at its input only when bytes arrive."""

from __future__ import annotations

import asyncio
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rpcnb.protocol.codes import MAGIC
from rpcnb.runtime.environment import Environment
from rpcnb.runtime.eventdriven import EventHandler
from rpcnb.runtime.local import LocalServingSession

__all__ = ["SlowMemory", "parked_server"]


class StockHandler(EventHandler):
    """Answers what completes later, and looks at nothing then: what has arrived meanwhile waits for further bytes."""

    def _go_on(self) -> None:
        self._flush_all()


class SlowMemory(LocalServingSession):
    """A device whose copies and stream waits complete later."""

    is_async = True

    def _later(self, work: Callable[[], object]) -> None:
        asyncio.get_running_loop().call_later(0.01, work)

    def async_copy_to(self, data: Any, meta: Any, nbytes: int, done: Any) -> None:
        self._later(lambda: super(SlowMemory, self).async_copy_to(data, meta, nbytes, done))

    def async_copy_from(self, meta: Any, into: Any, nbytes: int, done: Any) -> None:
        self._later(lambda: super(SlowMemory, self).async_copy_from(meta, into, nbytes, done))

    def async_stream_wait(self, device: Any, stream: int, done: Any) -> None:
        self._later(lambda: super(SlowMemory, self).async_stream_wait(device, stream, done))


@contextmanager
def parked_server(environment: Environment) -> Iterator[str]:
    """Serve on a loop of its own; yields its address."""
    loop = asyncio.new_event_loop()
    ready: list[str] = []
    begun = threading.Event()

    async def client(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        (size,) = struct.unpack("<i", (await reader.readexactly(8))[4:])
        await reader.readexactly(size)
        writer.write(struct.pack("<ii", MAGIC, 8) + b"server:x")

        def send(data: Any) -> int:
            writer.write(bytes(data))
            return len(data)

        handler = StockHandler(send, "parked", "client:", environment, None)
        try:
            while data := await reader.read(65536):
                if not handler(data, 3):
                    break
                handler._flush_all()
        finally:
            handler.servant.cancel()
            writer.close()

    async def run() -> None:
        server = await asyncio.start_server(client, "127.0.0.1", 0)
        host, port = server.sockets[0].getsockname()
        ready.append(f"{host}:{port}")
        begun.set()
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            server.close()
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.sleep(0)  # the transports close

    thread = threading.Thread(target=loop.run_until_complete, args=(main := loop.create_task(run()),))
    thread.start()
    begun.wait(10)
    try:
        yield ready[0]
    finally:
        loop.call_soon_threadsafe(main.cancel)
        thread.join(10)
        loop.close()
