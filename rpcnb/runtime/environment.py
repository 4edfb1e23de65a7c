"""What the sessions of one server share, and how they reach its threads and loops."""

from __future__ import annotations

import contextvars
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from rpcnb.protocol.codes import Limits
from rpcnb.runtime.registry import REGISTRY, Registry
from rpcnb.runtime.tasks import later_anywhere, spawn_anywhere, thread_anywhere

if TYPE_CHECKING:
    from collections.abc import Callable

    from rpcnb.runtime.completion import Done
    from rpcnb.runtime.served import ServedFunction

__all__ = ["ENVIRONMENT", "Environment", "RemoteCells"]


class RemoteCells(Protocol):
    """What runs the source of clients, handed in where the operator consents: ``rpcnb.cells.cells.Cells``."""

    runner: Any

    def serve(self, session: Any, name: str) -> ServedFunction | None:
        """Return the function of this name for a session's client."""

    def runs(self, session: Any) -> str:
        """Name the cell of a session that is running; empty if none is."""

    def end(self, session: Any) -> None:
        """Drop the variables of a session that is over."""


@dataclass
class Environment:
    """What the sessions of one server share.

    Attributes:
        registry: Functions that clients find.
        native: Compiled libraries may be loaded and linked.
        expose_ffi: All globals of apache-tvm-ffi may be called, not only the allow-list.
        ffi_names: Globals of apache-tvm-ffi that may be called besides the allow-list: what the operator loaded.
        runtime: Where TVM's runtime is: ``auto`` (beside an installed apache-tvm) or a path, loaded at the start;
            ``none``: it is never loaded; empty: found and loaded when a library needs it.
        trusted_paths: File names may leave the session's directory, as in stock TVM.
        default_run: Where plain functions run unless their registration says otherwise.
        spawn: Starts an awaitable and completes ``done`` with its outcome; returns what cancels it.
        run_in_thread: Runs a function in a worker.
        run_in_kernel: Runs a function on the notebook kernel's loop; None where there is none.
        later: Calls a function after some seconds; returns what cancels that.
        local_session: Default session constructor of this server; None for the registry's ``rpc.LocalSession``.
        constructors: Further session constructors of this server, by name (``rpc.Connect``).
        cells: Runs clients' source; None where the operator gave no consent.
        directory: Where sessions make their directories of files; the system's place for such by default.
        jobs: Passes what a client asks of detached jobs on: words, bytes, and what is called with the answer's; None
            where there are none.
        visitor: Why the sessions here may only look after jobs: the board is taken by one. Empty: they may do all.
        on_call: Told of each call that has ended: client, function, seconds, outcome, details; None where nobody is.
        status: Says how the server is, now or a moment later: what ``rpcnb.status()`` answers.
    """

    registry: Registry = REGISTRY
    limits: Limits = field(default_factory=Limits)
    native: bool = False
    expose_ffi: bool = False
    ffi_names: frozenset[str] = frozenset()
    runtime: str = ""
    trusted_paths: bool = False
    default_run: str = "thread"
    spawn: Callable[[Any, Done], Callable[[], object]] = spawn_anywhere
    run_in_thread: Callable[[Callable[[], None]], object] = thread_anywhere
    run_in_kernel: Callable[[Callable[[], None]], object] | None = None
    later: Callable[[float, Callable[[], object]], Callable[[], object]] = later_anywhere
    local_session: Callable[..., Any] | None = None
    constructors: dict[str, Callable[..., Any]] = field(default_factory=dict)
    cells: RemoteCells | None = None
    directory: str | None = None
    jobs: Callable[[dict[str, Any], bytes, Callable[[dict[str, Any], bytes], object]], object] | None = None
    visitor: str = ""
    on_call: Callable[[str, str, float, str, dict[str, Any]], object] | None = None
    status: Callable[[Callable[[dict[str, Any]], object]], object] = lambda say: say({"state": "READY"})


ENVIRONMENT: contextvars.ContextVar[Environment | None] = contextvars.ContextVar("rpcnb_environment", default=None)
