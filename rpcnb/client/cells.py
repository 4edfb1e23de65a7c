"""Remote cells, seen from the client: what they put out, what they result in, and the variables they leave.

::

    session.run_cell("x = 21")
    session.run_cell("print('hello'); x * 2", on_output=print)     # the value is in .data["text/plain"]
    session.namespace["x"] += 1                                    # arrays without pickle
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

from rpcnb.cells.variables import dump_variable, load_variable
from rpcnb.client.answers import load_json
from rpcnb.client.untrusted import tame, tame_text
from rpcnb.errors import AccessDenied, CellError, RemoteError, RemoteProtocolError

if TYPE_CHECKING:
    from collections.abc import Callable

    from rpcnb.client.operations import Operations
    from rpcnb.protocol.flows import Flow

__all__ = [
    "CellOutput",
    "CellResult",
    "QueuedCell",
    "delete_variable",
    "get_variable",
    "queue",
    "read_output",
    "run",
    "set_variable",
    "variables",
]


class CellOutput(NamedTuple):
    """A piece of what a cell puts out while it runs.

    Attributes:
        kind: ``stdout``, ``stderr`` or ``display``.
        text: What was printed.
        data: What was displayed, by MIME type.
        metadata: Of ``data``.
    """

    kind: str
    text: str = ""
    data: dict[str, Any] = {}  # noqa: RUF012  # a default that nobody changes
    metadata: dict[str, Any] = {}  # noqa: RUF012  # likewise

    def shown(self, whose: str) -> CellOutput:
        """Return what a notebook's page, or a terminal, may show of it if the session ``whose`` is not trusted."""
        if self.kind != "display":
            return self._replace(text=tame_text(self.text))
        data, metadata = tame(self.data, self.metadata, whose)
        return self._replace(data=data, metadata=metadata)


class QueuedCell(NamedTuple):
    """A cell that a server has not finished.

    Attributes:
        id: Its number there.
        name: What its client calls it.
        state: ``queued``, ``running``, ``interrupting`` or ``cancelled``.
        age: Seconds in this state, or since it came.
        mine: It is of this session.
    """

    id: int
    name: str
    state: str
    age: float
    mine: bool


@dataclass(frozen=True)
class CellResult:
    """What a cell resulted in.

    Attributes:
        data: Its last expression by MIME type; empty if that was None, or a statement.
        metadata: Of ``data``.
        seconds: How long it ran.
        whose: Name of the session if its output is not trusted; empty if it is. A notebook shows accordingly.
    """

    data: dict[str, Any]
    metadata: dict[str, Any]
    seconds: float
    whose: str = field(default="", compare=False, repr=False)

    @classmethod
    def decode(cls, found: Any, whose: str = "") -> CellResult:
        """Read what ``rpcnb.cell`` returned.

        Raises:
            CellError: The cell raised.
            RemoteProtocolError: It is nothing of the kind.
        """
        try:
            result = cls(dict(found["data"]), dict(found["metadata"]), float(found["seconds"]), whose)
            error = found["error"]
            facts = None if error is None else (str(error["text"]), str(error["type"]), str(error["traceback"]))
        except (KeyError, TypeError, ValueError, OverflowError) as odd:
            raise RemoteProtocolError(f"expected the outcome of a cell, got {type(odd).__name__}: {odd}") from None
        if facts is not None:
            raise CellError(*facts)
        return result

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> tuple[dict[str, Any], dict[str, Any]]:
        return tame(self.data, self.metadata, self.whose) if self.whose else (self.data, self.metadata)

    def __repr__(self) -> str:
        text = str(self.data.get("text/plain", ""))
        return tame_text(text) if self.whose else text


def read_output(piece: Any) -> CellOutput:
    """Read a piece of output."""
    if isinstance(piece, dict) and piece.get("stream") in ("stdout", "stderr"):
        return CellOutput(piece["stream"], str(piece.get("text", "")))
    metadata = piece.get("metadata", {}) if isinstance(piece, dict) else None
    if isinstance(piece, dict) and isinstance(piece.get("display"), dict) and isinstance(metadata, dict):
        return CellOutput("display", "", piece["display"], metadata)
    raise RemoteProtocolError(f"expected output of a remote cell, got {piece!r}")


def _ask(ops: Operations, name: str, *args: Any) -> Flow[Any]:
    """Call a function of remote cells.

    Raises:
        AccessDenied: The server allows none; the text says how it can.
    """
    if not ops.is_rpcnb:
        raise AccessDenied(f"{ops.peer} is stock TVM, which runs no cells; serve with: rpcnb serve --allow-exec")
    try:
        return (yield from ops.ask(name, *args))
    except RemoteError as error:
        if error.remote_type == "AccessDenied":
            raise AccessDenied(error.message) from None
        raise


def run(ops: Operations, source: str, name: str, on_output: Callable[[CellOutput], object] | None) -> Flow[CellResult]:
    """Have a cell run at the server."""
    found = load_json((yield from _ask(ops, "rpcnb.cell", source, name)))
    if isinstance(found, dict) and on_output is not None:
        outputs = found.get("outputs", [])
        for piece in outputs if isinstance(outputs, list) else ():
            on_output(read_output(piece))
    return CellResult.decode(found, "" if ops.session.trust_output else ops.session.name)


def queue(ops: Operations) -> Flow[list[QueuedCell]]:
    """Ask for the cells that the server has not finished, of all clients."""
    found = load_json((yield from _ask(ops, "rpcnb.cells")))
    try:
        return [QueuedCell(**cell) for cell in found]
    except TypeError as odd:
        raise RemoteProtocolError(f"expected a list of cells: {odd}") from None


def get_variable(ops: Operations, name: str, pickle: bool) -> Flow[Any]:
    """Fetch a variable."""
    found = yield from _ask(ops, "rpcnb.variable", name, pickle)
    if isinstance(found, ops.tensor_type):
        array = yield from ops.copy_from(found)
        found.free()
        return array
    if not isinstance(found, bytes):
        raise RemoteProtocolError(f"expected a variable, got {found!r}")
    return load_variable(found, pickle)


def set_variable(ops: Operations, name: str, value: Any, pickle: bool) -> Flow[None]:
    """Put a variable there."""
    yield from _ask(ops, "rpcnb.set_variable", name, dump_variable(value, pickle))


def delete_variable(ops: Operations, name: str) -> Flow[None]:
    """Remove a variable there."""
    yield from _ask(ops, "rpcnb.del_variable", name)


def variables(ops: Operations) -> Flow[dict[str, str]]:
    """Ask for the names of the variables, and their types."""
    found = load_json((yield from _ask(ops, "rpcnb.variables")))
    try:
        return {str(name): str(kind) for name, kind in found}
    except (TypeError, ValueError) as odd:
        raise RemoteProtocolError(f"expected names and types: {odd}") from None
