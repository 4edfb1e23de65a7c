"""Remote cells as methods of the blocking and of the awaited session."""

from __future__ import annotations

import asyncio
import contextvars
from collections.abc import Iterator, MutableMapping
from typing import TYPE_CHECKING, Any

from rpcnb.client import cells
from rpcnb.client.answers import load_json
from rpcnb.client.cells import CellOutput, CellResult, QueuedCell
from rpcnb.link import iothread
from rpcnb.values import StaysHere

if TYPE_CHECKING:
    from collections.abc import Callable


__all__ = ["AsyncCellMethods", "CellMethods", "Namespace"]


class CellMethods:
    """What a blocking session does with remote cells."""

    name: str
    _run: Any

    def run_cell(
        self,
        source: str,
        name: str = "cell",
        *,
        timeout: float | None = None,
        on_output: Callable[[CellOutput], object] | None = None,
    ) -> CellResult:
        """Run Python source at the server, in a namespace that lives as long as the session.

        The server must allow it (``rpcnb serve --allow-exec``). Cells of all clients run one at a time. An interrupt
        or a time limit here interrupts the cell there.

        Args:
            source: Statements; the value of a last expression is the result.
            name: What tracebacks and the server's queue call it.
            timeout: Seconds for it all, waiting for its turn included.
            on_output: Called in the I/O thread with each piece of output, while the cell runs.

        Raises:
            CellError: The cell raised; the remote traceback names its lines.
            AccessDenied: The server does not allow it; the text (a RemoteError's, too) says how it can.
        """
        take = _in_io_thread(on_output)
        result: CellResult = self._run(
            lambda ops: cells.run(ops, source, name, take), timeout, name, on_output=_reading(take)
        )
        return result

    def list_cells(self, *, timeout: float | None = None) -> list[QueuedCell]:
        """Return the cells that the server has not finished, of all its clients."""
        found: list[QueuedCell] = self._run(cells.queue, timeout, "list_cells")
        return found

    @property
    def namespace(self) -> Namespace:
        """The variables of remote cells: ``session.namespace["x"]``."""
        return Namespace(self)

    def get_variable(self, name: str, *, pickle: bool = False, timeout: float | None = None) -> Any:
        """Return a variable of the session's remote cells; arrays come as they are.

        Args:
            name: Of the variable.
            pickle: The server is trusted to send pickled objects, which may run any code here.
            timeout: Seconds for it all.
        """
        return self._run(lambda ops: cells.get_variable(ops, name, pickle), timeout, f"variable {name}")

    def set_variable(self, name: str, value: Any, *, pickle: bool = False, timeout: float | None = None) -> None:
        """Set a variable for the session's remote cells; ``pickle=True`` for any object."""
        self._run(lambda ops: cells.set_variable(ops, name, value, pickle), timeout, f"variable {name}")

    def delete_variable(self, name: str, *, timeout: float | None = None) -> None:
        """Remove a variable of the session's remote cells."""
        self._run(lambda ops: cells.delete_variable(ops, name), timeout, f"variable {name}")

    def list_variables(self, *, timeout: float | None = None) -> dict[str, str]:
        """Return the names of the variables of the session's remote cells, and their types."""
        found: dict[str, str] = self._run(cells.variables, timeout, "list_variables")
        return found


class Namespace(StaysHere, MutableMapping[str, Any]):
    """The variables that a session's remote cells have made; ``session.namespace``.

    Numbers, text, bytes, lists and dicts of them, and arrays go there and back. Other objects need
    ``session.set_variable(..., pickle=True)`` and ``session.get_variable(..., pickle=True)``.
    """

    _instead = "dict(session.namespace) has the variables themselves"

    def __init__(self, session: CellMethods) -> None:
        self._session = session

    def __getitem__(self, name: str) -> Any:
        names = self._session.list_variables()
        if name not in names:
            raise KeyError(name)
        return self._session.get_variable(name)

    def __setitem__(self, name: str, value: Any) -> None:
        self._session.set_variable(name, value)

    def __delitem__(self, name: str) -> None:
        self._session.delete_variable(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._session.list_variables())

    def __len__(self) -> int:
        return len(self._session.list_variables())

    def __repr__(self) -> str:
        return f"<Namespace of {self._session.name}>"

    def _ipython_key_completions_(self) -> list[str]:
        return list(self)


class AsyncCellMethods:
    """What an awaited session does with remote cells."""

    _run: Any

    async def run_cell(
        self,
        source: str,
        name: str = "cell",
        *,
        timeout: float | None = None,
        on_output: Callable[[CellOutput], object] | None = None,
    ) -> CellResult:
        """Run Python source at the server; as :meth:`Session.run_cell`. ``on_output`` is called in the loop."""
        take = _in_loop(on_output)
        result: CellResult = await self._run(
            lambda ops: cells.run(ops, source, name, take), timeout, name, on_output=_reading(take)
        )
        return result

    async def list_cells(self, *, timeout: float | None = None) -> list[QueuedCell]:
        """Return the cells that the server has not finished, of all its clients."""
        found: list[QueuedCell] = await self._run(cells.queue, timeout, "list_cells")
        return found

    async def get_variable(self, name: str, *, pickle: bool = False, timeout: float | None = None) -> Any:
        """Return a variable of the session's remote cells; as :meth:`Session.get_variable`."""
        return await self._run(lambda ops: cells.get_variable(ops, name, pickle), timeout, f"variable {name}")

    async def set_variable(self, name: str, value: Any, *, pickle: bool = False, timeout: float | None = None) -> None:
        """Set a variable for the session's remote cells; ``pickle=True`` for any object."""
        await self._run(lambda ops: cells.set_variable(ops, name, value, pickle), timeout, f"variable {name}")

    async def delete_variable(self, name: str, *, timeout: float | None = None) -> None:
        """Remove a variable of the session's remote cells."""
        await self._run(lambda ops: cells.delete_variable(ops, name), timeout, f"variable {name}")

    async def list_variables(self, *, timeout: float | None = None) -> dict[str, str]:
        """Return the names of the variables of the session's remote cells, and their types."""
        found: dict[str, str] = await self._run(cells.variables, timeout, "list_variables")
        return found


def _in_io_thread(take: Callable[[CellOutput], object] | None) -> Callable[[CellOutput], object] | None:
    """Have a user's function called in the I/O thread, in the context in which it was given, outside all locks."""
    if take is None:
        return None
    context = contextvars.copy_context()
    return lambda piece: iothread.IO_THREAD.call(lambda: context.run(take, piece))


def _reading(take: Callable[[CellOutput], object] | None) -> Callable[[bytes], object]:
    """Return what takes the bytes of a piece of output."""
    return lambda data: None if take is None else take(cells.read_output(load_json(data)))


def _in_loop(take: Callable[[CellOutput], object] | None) -> Callable[[CellOutput], object] | None:
    """Have a user's function called by the running loop, in the context in which it was given."""
    if take is None:
        return None
    loop, context = asyncio.get_running_loop(), contextvars.copy_context()
    return lambda piece: loop.call_soon_threadsafe(take, piece, context=context)
