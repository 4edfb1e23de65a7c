"""Makes the stop button reach a quiet ``await``.

ipykernel's handler for cells with ``await`` only queues the interrupt on the kernel's loop; a loop that sleeps in its
selector does not look at the queue until something else wakes it. Python writes a byte to the wake-up descriptor for
every signal, and a reader on the loop is all that is needed.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
from typing import Any

from rpcnb.link import interrupt

__all__ = ["WakeUp"]


class WakeUp:
    """The wake-up descriptor of a notebook's kernel, from ``%load_ext`` to ``%unload_ext``."""

    def __init__(self) -> None:
        self._reader: socket.socket | None = None
        self._writer: socket.socket | None = None
        self._loop: asyncio.AbstractEventLoop | None = None

    def install(self) -> bool:
        """Take the descriptor, unless there is no loop or somebody else has it; returns whether it did."""
        if self._reader is not None:
            return True
        try:
            loop = asyncio.get_running_loop()
        except RuntimeError:
            return False
        reader, writer = socket.socketpair()
        reader.setblocking(False)
        writer.setblocking(False)
        try:
            before = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
        except ValueError:  # not the main thread
            before = -2
        if before != -1:
            if before >= 0:
                signal.set_wakeup_fd(before)
            reader.close()
            writer.close()
            return False
        self._reader, self._writer, self._loop = reader, writer, loop
        loop.add_reader(reader, interrupt.drain)
        interrupt.watch(reader)
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=self._forget)
        return True

    def _forget(self) -> None:
        """In a forked child: the parent must not be woken by its signals."""
        if self._writer is not None:
            with contextlib.suppress(ValueError):
                signal.set_wakeup_fd(-1)
            interrupt.watch(None)
            self._reader = self._writer = None

    def remove(self) -> None:
        """Give the descriptor back, if it is still ours."""
        reader, writer, loop = self._reader, self._writer, self._loop
        if reader is None or writer is None or loop is None:
            return
        self._reader = self._writer = self._loop = None
        interrupt.watch(None)
        found: Any = signal.set_wakeup_fd(-1)
        if found not in (-1, writer.fileno()):
            signal.set_wakeup_fd(found)
        if not loop.is_closed():
            loop.remove_reader(reader)
        reader.close()
        writer.close()
