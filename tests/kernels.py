"""Real Jupyter kernels for tests and soaks: no front end, everything that a cell sends is kept.

::

    with Kernel() as kernel:
        assert kernel.run("1 + 1").text == "2"
"""

from __future__ import annotations

import os
import queue
import re
import shutil
import signal
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
from jupyter_client.manager import KernelManager

__all__ = ["Cell", "Kernel"]

_COLOURS = re.compile(r"\x1b\[[0-9;]*m")


class Cell:
    """A cell that was sent, and what has come of it.

    Attributes:
        id: Of the request; messages of the cell name it.
        messages: All of its messages on iopub, in order.
        begun: ``time.monotonic()`` at which the kernel ran it; ``ended`` likewise, when it was idle again. Between
            its word that it is busy and this, ipykernel ignores interrupts.
    """

    def __init__(self, kernel: Kernel, number: str) -> None:
        self._kernel = kernel
        self.id = number
        self.messages: list[dict[str, Any]] = []
        self.begun: float | None = None
        self.ended: float | None = None

    def _contents(self, kind: str) -> list[dict[str, Any]]:
        return [message["content"] for message in self.messages if message["msg_type"] == kind]

    @property
    def out(self) -> str:
        """What it wrote to the standard output."""
        return "".join(one["text"] for one in self._contents("stream") if one["name"] == "stdout")

    @property
    def err(self) -> str:
        """What it wrote to the standard error."""
        return "".join(one["text"] for one in self._contents("stream") if one["name"] == "stderr")

    @property
    def text(self) -> str:
        """Its result as text."""
        return "".join(one["data"].get("text/plain", "") for one in self._contents("execute_result"))

    @property
    def shown(self) -> list[dict[str, Any]]:
        """What it displayed: a dictionary by type for each."""
        return [one["data"] for one in self._contents("display_data")]

    @property
    def error(self) -> str:
        """The name of what it raised; empty if nothing."""
        return "".join(one["ename"] for one in self._contents("error"))

    @property
    def trace(self) -> str:
        """The traceback of that, without colours."""
        return _COLOURS.sub("", "\n".join("\n".join(one["traceback"]) for one in self._contents("error")))

    @property
    def everything(self) -> str:
        """All that was sent on its behalf, as text, to be searched."""
        return repr([message["content"] for message in self.messages])

    def wait(self, seconds: float = 30.0) -> Cell:
        """Return when it has ended."""
        self._kernel.take(lambda: self.ended is not None, "the end of the cell", seconds)
        return self

    def wait_until(self, condition: Callable[[], object], what: str, seconds: float = 30.0) -> None:
        """Take messages until the condition holds."""
        self._kernel.take(condition, what, seconds)


class Kernel:
    """A kernel of this very environment, with directories of its own.

    Args:
        folder: Its runtime directory's parent; a temporary one by default.
        traced: Let coverage, where it runs, trace the kernel; its tracebacks then take ten times as long.
        environment: Further variables of its environment.

    Attributes:
        runtime: Where its servers publish their addresses and tokens.
        temporary: Where it puts temporary files.
        messages: All messages on iopub so far.
    """

    def __init__(self, folder: Path | None = None, *, traced: bool = True, **environment: str) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="rpcnb-kernel-")) if folder is None else folder
        self._own = folder is None
        self.runtime = self._folder / "rpcnb"
        self.temporary = self._folder / "tmp"
        self.temporary.mkdir()
        mine = {"IPYTHONDIR": str(self._folder / "ipython"), "RPCNB_RUNTIME_DIR": str(self.runtime)}
        mine["TMPDIR"] = str(self.temporary)
        inherited = {key: value for key, value in os.environ.items() if traced or not key.startswith("COVERAGE_")}
        self._environment = {**inherited, **mine, "RPCNB_NONINTERACTIVE": "1", **environment}
        self._cells: dict[str, Cell] = {}
        self.messages: list[dict[str, Any]] = []
        self._log = (self._folder / "kernel.log").open("ab")
        self._manager = KernelManager(kernel_name="python3", shutdown_wait_time=2.0)
        self._begin()

    def _begin(self) -> None:
        self._manager.start_kernel(env=self._environment, cwd=str(self._folder), stdout=self._log, stderr=self._log)
        self._connect()

    def _connect(self) -> None:
        self._client = self._manager.client()
        self._client.start_channels()
        self._client.wait_for_ready(timeout=60)

    @property
    def log(self) -> str:
        """What its process has written."""
        return (self._folder / "kernel.log").read_text()

    @property
    def pid(self) -> int:
        """Of its process."""
        found: int = self._manager.provisioner.pid
        return found

    @property
    def children(self) -> list[psutil.Process]:
        """The processes that it has started."""
        found: list[psutil.Process] = psutil.Process(self.pid).children(recursive=True)
        return found

    def start(self, source: str) -> Cell:
        """Send a cell and return at once; it runs also if one before it fails."""
        number = self._client.execute(source, allow_stdin=False, stop_on_error=False)
        cell = self._cells[number] = Cell(self, number)
        return cell

    def run(self, source: str, seconds: float = 30.0) -> Cell:
        """Run a cell to its end."""
        return self.start(source).wait(seconds)

    def begin(self, source: str, seconds: float = 30.0) -> Cell:
        """Send a cell and wait until the kernel runs it."""
        cell = self.start(source)
        self.take(lambda: cell.begun or cell.ended, "the cell's beginning", seconds)
        return cell

    def take(self, condition: Callable[[], object], what: str, seconds: float = 30.0) -> None:
        """Take messages until the condition holds.

        Raises:
            TimeoutError: It did not come to hold.
        """
        give_up = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > give_up:
                raise TimeoutError(f"{what} did not come about within {seconds} s\n{self.log[-3000:]}")
            try:
                message = self._client.get_iopub_msg(timeout=0.05)
            except queue.Empty:
                if not self._manager.is_alive():
                    raise RuntimeError(f"the kernel died\n{self.log[-3000:]}") from None
                continue
            self.messages.append(message)
            cell = self._cells.get(message["parent_header"].get("msg_id", ""))
            if cell is None:
                continue
            cell.messages.append(message)
            if message["msg_type"] == "status":
                if message["content"]["execution_state"] == "idle":
                    cell.ended = time.monotonic()
            elif message["msg_type"] == "execute_input":
                cell.begun = time.monotonic()

    def interrupt(self) -> float:
        """Press the stop button; returns ``time.monotonic()`` of that."""
        pressed = time.monotonic()
        self._manager.interrupt_kernel()
        return pressed

    def kill(self) -> None:
        """Kill it, as a memory limit would."""
        os.kill(self.pid, signal.SIGKILL)

    def restart(self) -> None:
        """Restart it, as a front end does."""
        self._client.stop_channels()
        self._manager.restart_kernel(now=False)
        self._connect()

    def shut_down(self) -> None:
        """End it, as a front end does. Idempotent."""
        self._client.stop_channels()
        if self._manager.has_kernel:
            self._manager.shutdown_kernel(now=False)

    def close(self) -> None:
        """End it, and remove its directories."""
        try:
            self.shut_down()
        finally:
            self._manager.cleanup_resources()
            with suppress(AttributeError):
                self._manager.context.destroy(linger=0)
            self._log.close()
            if self._own:
                shutil.rmtree(self._folder, ignore_errors=True)

    def __enter__(self) -> Kernel:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
