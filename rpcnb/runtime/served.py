"""What clients can hold of a server: functions, modules, shapes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

    from rpcnb.runtime.registry import Registered

__all__ = ["Module", "ServedFunction", "Shape"]


class Module:
    """A module that clients can hold: functions by name, and imported modules.

    Args:
        functions: Its functions.
        kind: Its type key, as in TVM.
    """

    def __init__(self, functions: dict[str, Callable[..., Any]] | None = None, kind: str = "python") -> None:
        self.kind = kind
        self._functions = functions or {}
        self._imports: list[Module] = []

    def get_function(self, name: str, query_imports: bool = False) -> Callable[..., Any] | None:
        """Return the function of this name, or None."""
        found = self._functions.get(name)
        if found is None and query_imports:
            for child in self._imports:
                found = child.get_function(name, True)
                if found is not None:
                    return found
        return found

    def import_module(self, child: Module) -> None:
        """Make the functions of ``child`` reachable through this module."""
        self._imports.append(child)


class Shape(tuple[int, ...]):
    """The result of ``ffi.Shape``."""

    __slots__ = ()


class ServedFunction:
    """A function that a client holds: how to call it, and where it runs.

    Attributes:
        call: What a request calls.
        own: The function itself, where requests' calls are watched.
    """

    __slots__ = ("__weakref__", "_around", "call", "context", "kind", "name", "own", "run", "source")

    def __init__(
        self,
        name: str,
        call: Callable[..., Any],
        kind: str = "plain",
        run: str = "thread",
        source: Registered | None = None,
    ) -> None:
        self.name = name
        self.call = self.own = call
        self._around: Callable[[Callable[..., Any]], Callable[..., Any]] | None = None
        self.kind = kind
        self.run = run if kind == "plain" else "loop"
        self.source = source
        self.context = source.context if source is not None else None

    def follow(self, entry: Registered) -> None:
        """Serve what a notebook's cell has registered anew, if it is of the same kind: the handle tells that."""
        if entry.kind == self.kind:
            self.own, self.context, self.source = entry.call, entry.context, entry
            self.call = self.own if self._around is None else self._around(self.own)

    def watch(self, around: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
        """Let requests call what ``around`` makes of the function; at the first time."""
        if self._around is None:
            self._around = around
            self.call = around(self.own)
