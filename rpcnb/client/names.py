"""``session.fn``: remote functions as attributes."""

from __future__ import annotations

from typing import Any

from rpcnb.values import StaysHere

__all__ = ["FunctionNames"]


class FunctionNames(StaysHere):
    """``session.fn``: remote functions as attributes, ``session.fn.demo.add(1, 2)``; names are looked up on use."""

    __slots__ = ("_prefix", "_session")
    _instead = "use .fn of a session that is opened there"

    def __init__(self, session: Any, prefix: str = "") -> None:
        self._session = session
        self._prefix = prefix

    def __getattr__(self, name: str) -> FunctionNames:
        if name.startswith("_"):
            raise AttributeError(name)
        return FunctionNames(self._session, f"{self._prefix}{name}.")

    def __call__(self, *args: Any, timeout: float | None = None) -> Any:
        """Look the function up (once per session) and call it."""
        name = self._prefix[:-1]
        return self._session._run(lambda ops: ops.call_named(name, args), timeout, name, args)

    def __dir__(self) -> list[str]:
        names = self._session._ops.known_names()
        return sorted({name[len(self._prefix) :].partition(".")[0] for name in names if name.startswith(self._prefix)})

    def __repr__(self) -> str:
        return f"<functions {self._prefix}* of {self._session.name}>"
