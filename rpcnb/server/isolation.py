"""What an operator says of sessions that have processes of their own."""

from __future__ import annotations

import logging
import os
import sys
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from rpcnb.errors import IsolationFailed
from rpcnb.server.modules import is_path, loads_program, main_program
from rpcnb.server.zygote import ONE_THREAD, SOON_ASLEEP

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rpcnb.server.host import SessionHost

__all__ = ["CAN_ISOLATE", "Isolation"]

_LEAST_MEMORY = 64 << 20  # bytes: Python with numpy needs so much before anything is done
_MOST = 1 << 50  # more is a mistake, and too much for the system's own numbers before long
CAN_ISOLATE = sys.platform.startswith("linux")
# What a session's process would import as it begins.
_WARM = ("resource", "rpcnb.server.popen", "tornado.platform.asyncio")
_WARM_CELLS = ("rpcnb.cells.cells", "rpcnb.cells.runners", "IPython.display", "IPython.core.interactiveshell")
_INTERVAL = 0.005  # Python's own


@dataclass(frozen=True)
class Isolation:
    """How sessions are isolated: ``rpcnb.Server(isolate=rpcnb.Isolation(load=["board.py"], memory=2 << 30))``.

    Attributes:
        load: Modules (names or paths) that each session's process imports when it begins; they register functions.
        preload: Modules that are imported once, and shared by all processes: none that start threads, or open ports,
            cameras or GPUs.
        main: Import the program that makes the server, too, as ``multiprocessing`` does: under the name
            ``__mp_main__``.
        memory: Bytes that a session's process may use; None for no limit.
        cpu_time: Seconds of processor time that a session's process may use; None for no limit.
        session: Name of the registered session constructor that serves clients.
    """

    load: Sequence[str] = ()
    preload: Sequence[str] = ()
    main: bool = False
    memory: int | None = None
    cpu_time: float | None = None
    session: str | None = None

    def __post_init__(self) -> None:
        if not CAN_ISOLATE:
            raise IsolationFailed("sessions have processes of their own on Linux only")
        for name in self.load:
            if is_path(name) and not os.path.isfile(name):
                raise FileNotFoundError(f"cannot load {name}: no such file")
        if self.memory is not None and not _LEAST_MEMORY <= self.memory <= _MOST:
            raise ValueError(
                f"expected between {_LEAST_MEMORY >> 20} MiB and {_MOST >> 40} TiB of memory for a session, "
                f"got {self.memory} bytes"
            )
        if self.cpu_time is not None and not 1 <= self.cpu_time <= _MOST:  # nor nan
            raise ValueError(
                f"expected one second of processor time or more for a session, got {self.cpu_time}; "
                "without --cpu-time there is no limit"
            )

    def options(
        self,
        server: SessionHost,
        allow_exec: bool,
        libraries: Sequence[str],
        switch_interval: float | None,
        watched: bool | None = None,
    ) -> dict[str, Any]:
        """Return what travels to the processes of a server's sessions: nothing secret.

        Args:
            server: The server.
            allow_exec: Clients may run source.
            libraries: To be loaded.
            switch_interval: The processes'.
            watched: Calls are told one by one; False: they are counted; None: neither.

        Raises:
            IsolationFailed: There is no program that a process could import.
        """
        environment = server.environment
        program = main_program() if self.main else None
        if self.main and program is None:
            raise IsolationFailed(
                "isolate=True needs a program in a file, whose functions each process imports; "
                "a notebook or a prompt is none (rpcnb serve --load FILE)"
            )
        if loads_program():
            raise IsolationFailed('put rpcnb.Server(isolate=True) under if __name__ == "__main__":')
        return {
            "key": server.key,
            "limits": asdict(server.limits),
            "native": environment.native,
            "runtime": environment.runtime,
            "expose_ffi": environment.expose_ffi,
            "trusted_paths": environment.trusted_paths,
            "default_run": environment.default_run,
            "ffi_names": sorted(environment.ffi_names),
            "allow_exec": allow_exec,
            "load": [*self.load],
            "load_library": [*libraries],
            "session": self.session,
            "main": program,
            "preload": [*self.preload],
            # Of "module:function" the module does nothing yet.
            "warm": [
                *_WARM,
                *(name.partition(":")[0] for name in self.load if ":" in name),
                *(_WARM_CELLS if allow_exec else ()),
            ],
            "memory": self.memory,
            "cpu_time": self.cpu_time,
            "watched": watched,
            "switch_interval": switch_interval or _INTERVAL,
            "path": list(sys.path),
            "argv": list(sys.argv),
            "log_level": logging.getLogger().getEffectiveLevel(),
            "threads": {name: os.environ[name] for name in (*ONE_THREAD, *SOON_ASLEEP) if name in os.environ},
        }
