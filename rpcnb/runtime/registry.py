"""The registry of global functions: what remote callers find by name.

Three kinds of functions answer the same plain call::

    @rpcnb.register_func("demo.add")
    def add(a, b):                       # plain: runs off the loop, may block
        return a + b

    @rpcnb.register_func("demo.wait")
    async def wait(seconds):             # coroutine: runs on the server's loop
        await asyncio.sleep(seconds)

    @rpcnb.register_func("demo.sensor", callback=True)
    def sensor(done, channel):           # callback: returns at once, calls done(...) later, from any thread
        hardware.read(channel, on_value=done)

The names of the plumbing are TVM's: :func:`register_func`, :func:`get_global_func`,
:func:`list_global_func_names`, :func:`remove_global_func`.
"""

from __future__ import annotations

import contextvars
import functools
import inspect
import sys
import threading
import weakref
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeVar, overload

from rpcnb.errors import FunctionNotFound
from rpcnb.runtime.current import run_in

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = [
    "REGISTRY",
    "Registered",
    "Registry",
    "get_global_func",
    "list_global_func_names",
    "register_func",
    "remove_global_func",
]

Run = Literal["thread", "loop", "kernel"]
F = TypeVar("F", bound="Callable[..., Any]")


@dataclass(frozen=True, slots=True)
class Registered:
    """A registered function.

    Attributes:
        run: Where a plain one runs: off the loop (``thread``), on the server's loop (``loop``, for trusted quick
            ones) or on the kernel's main loop (``kernel``). None: the server's default.
        context: The context of registration, so that in a notebook its output goes to the registering cell.
    """

    name: str
    func: Callable[..., Any]
    kind: Literal["plain", "coroutine", "callback"] = "plain"
    run: Run | None = None
    context: contextvars.Context | None = None

    @property
    def call(self) -> Callable[..., Any]:
        """The function, bound to the context in which it was registered."""
        if self.context is None or self.kind == "coroutine":  # a task gets its context when it is made
            return self.func
        context, func = self.context, self.func
        # A context cannot be entered twice at once, so each call gets a copy (a few hundred ns).
        return lambda *args: run_in(context, func, args)


class Follower(Protocol):
    """What serves a registered function."""

    def follow(self, entry: Registered) -> None:
        """Serve this from now on."""


class Registry:
    """Functions by name; reading takes no lock."""

    def __init__(self) -> None:
        self._functions: dict[str, Registered] = {}
        self._held: dict[str, weakref.WeakSet[Follower]] = {}
        self._lock = threading.Lock()

    def register(
        self,
        name: str,
        func: Callable[..., Any],
        *,
        override: bool = False,
        callback: bool = False,
        run: Run | None = None,
    ) -> Registered:
        """Register ``func``.

        Raises:
            ValueError: The name is taken and ``override`` is not set.
            TypeError: ``func`` cannot be called.
        """
        if not callable(func):
            raise TypeError(f"expected a function for {name!r}, got {type(func).__name__}")
        if run not in (None, "thread", "loop", "kernel"):
            raise ValueError(f"expected run='thread', 'loop' or 'kernel', got {run!r}")
        kind: Literal["plain", "coroutine", "callback"] = "plain"
        if callback:
            kind = "callback"
        elif inspect.iscoroutinefunction(inspect.unwrap(func)) or inspect.iscoroutinefunction(
            getattr(func, "__call__", None)  # noqa: B004  # an instance whose __call__ is async
        ):
            kind = "coroutine"
        entry = Registered(name, func, kind, run, _notebook_context())
        with self._lock:
            before = self._functions.get(name)
            if before is not None and not override:
                raise ValueError(f"function {name!r} is registered already; pass override=True to replace it")
            self._functions = {**self._functions, name: entry}
            if before is not None and before.context is not None and entry.context is not None:
                # A cell that is run again: those who hold the function get the new one.
                for held in self._held.get(name, ()):
                    held.follow(entry)
        return entry

    def hold(self, name: str, held: Follower) -> None:
        """Have ``held`` follow the function of this name as long as it lives, when a notebook's cell is run again."""
        with self._lock:
            self._held.setdefault(name, weakref.WeakSet()).add(held)

    def get(self, name: str) -> Registered | None:
        """Return the function of this name, or None."""
        return self._functions.get(name)

    def remove(self, name: str) -> None:
        """Forget a function; unknown names are ignored, as in TVM."""
        with self._lock:
            self._functions = {key: entry for key, entry in self._functions.items() if key != name}

    def names(self) -> list[str]:
        """Return the names, sorted."""
        return sorted(self._functions)


def _notebook_context() -> contextvars.Context | None:
    """Inside IPython return the running cell's context; elsewhere output needs no routing."""
    ipython = sys.modules.get("IPython")
    shell = None if ipython is None else ipython.get_ipython()
    # A bare one is there only for what remote cells display (cells/show.py).
    return None if shell is None or getattr(shell, "is_bare", False) else contextvars.copy_context()


REGISTRY = Registry()


@overload
def register_func(
    name: str, func: None = None, override: bool = False, *, callback: bool = False, run: Run | None = None
) -> Callable[[F], F]: ...
@overload
def register_func(
    name: str, func: F, override: bool = False, *, callback: bool = False, run: Run | None = None
) -> F: ...
@overload
def register_func(name: F) -> F: ...


def register_func(
    name: str | Callable[..., Any],
    func: Callable[..., Any] | None = None,
    override: bool = False,
    *,
    callback: bool = False,
    run: Run | None = None,
) -> Any:
    """Register a function under a name that remote callers use; also a decorator.

    Args:
        name: The global name, ``"demo.add"``; or the function itself, registered under its own name.
        func: The function, if this is not used as a decorator.
        override: Replace an existing function. In a notebook re-running the cell that registered a name
            replaces it without this.
        callback: The function takes a ``done`` object first, returns at once, and calls ``done(result)`` or
            ``done.error(exception)`` exactly once, later and from any thread.
        run: ``"thread"`` (plain functions' default) off the loop; ``"loop"`` on the server's loop, for functions
            that never take long; ``"kernel"`` on the notebook kernel's main loop.

    Returns:
        The function, or a decorator.

    Raises:
        ValueError: The name is taken and ``override`` is not set.
    """
    if not isinstance(name, str):
        register_func(name.__name__, name)
        return name
    if func is None:
        return functools.partial(_register_second, name, override=override, callback=callback, run=run)
    _register_second(name, func, override=override, callback=callback, run=run)
    return func


def _register_second(name: str, func: F, *, override: bool, callback: bool, run: Run | None) -> F:
    REGISTRY.register(name, func, override=override or _same_cell(name, func), callback=callback, run=run)
    return func


def _same_cell(name: str, func: Callable[..., Any]) -> bool:
    """Tell whether a notebook's cell is being run again: the name held a function of ``__main__`` of this name."""
    before = REGISTRY.get(name)
    return (
        before is not None
        and before.context is not None
        and getattr(before.func, "__module__", None) == "__main__" == getattr(func, "__module__", None)
        and getattr(before.func, "__qualname__", 0) == getattr(func, "__qualname__", 1)
    )


def get_global_func(name: str, allow_missing: bool = False) -> Callable[..., Any] | None:
    """Return the function registered under ``name``.

    Raises:
        FunctionNotFound: There is none and ``allow_missing`` is not set.
    """
    entry = REGISTRY.get(name)
    if entry is None and not allow_missing:
        raise FunctionNotFound(f"no function is registered as {name!r}")
    return None if entry is None else entry.func


def list_global_func_names() -> list[str]:
    """Return the names of all registered functions, sorted."""
    return REGISTRY.names()


def remove_global_func(name: str) -> None:
    """Forget a registered function; unknown names are ignored."""
    REGISTRY.remove(name)
