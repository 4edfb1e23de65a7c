"""The demo board as a child process: what ``%rpc_connect demo`` and ``rpcnb demo`` start."""

from __future__ import annotations

import atexit
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from types import TracebackType

__all__ = ["DemoBoard"]

_START_SECONDS = 20.0


class DemoBoard:
    """A demo board in a process of its own; it ends with this process, also if that is killed, or at ``close()``.

    Args:
        link: ``RATE,LATENCY`` of its link, for example ``"20M,5ms"``; None for the plain loopback.

    Attributes:
        address: ``host:port`` to connect to; the token is found by itself.
        pid: Of its process.
    """

    def __init__(self, link: str | None = None) -> None:
        with tempfile.TemporaryDirectory(prefix="rpcnb-demo-") as folder:
            file = Path(folder) / "ready.json"
            self._start(file, link)
            try:
                content = self._await(file)
            except BaseException:  # an interrupt, say
                self.close()
                raise
        self.address = f"{content['host']}:{content['port']}"
        self.pid = self._process.pid

    def _start(self, file: Path, link: str | None) -> None:
        command = [sys.executable, "-m", "rpcnb", "serve", "--demo", "--port", "0", "--key", "demo"]
        command += ["--silent", "--allow-exec"]  # it has a token, and is this user's own
        command += ["--until-eof"]  # nobody writes to it: the pipe ends with this process
        command += ["--ready-file", str(file), *(["--link", link] if link else [])]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, start_new_session=True
        )
        self._owner = os.getpid()
        atexit.register(self.close)

    def _await(self, file: Path) -> dict[str, Any]:
        """Return what the process writes when it is ready."""
        from rpcnb.command.serve import ready

        give_up = time.monotonic() + _START_SECONDS
        while (content := ready(file)) is None:
            if self._process.poll() is not None or time.monotonic() > give_up:
                raise RuntimeError("the demo board did not start; try `rpcnb serve --demo` in a terminal")
            time.sleep(0.02)
        return content

    @property
    def alive(self) -> bool:
        """Tell whether its process runs."""
        return self._process.poll() is None

    def close(self) -> None:
        """End its process and wait for that. Idempotent; a forked child's end leaves it alone."""
        atexit.unregister(self.close)
        if os.getpid() != self._owner:
            return
        if self._process.poll() is None:
            self._process.terminate()
            try:
                self._process.wait(5)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        if self._process.stdin is not None:
            self._process.stdin.close()

    def __enter__(self) -> DemoBoard:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
