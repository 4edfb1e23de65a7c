"""Remote cells: Python that a client sends, run here in a namespace that lives as long as its session.

The one module of rpcnb that runs text; it is imported only where the operator gave consent
(``rpcnb serve --allow-exec``, ``%rpc_serve --allow-exec``).

Clients call ``rpcnb.cell(source, name)``, which answers when the cell has ended, with JSON as bytes: ``data`` and
``metadata`` (a MIME bundle of the last expression), ``error`` (``type``, ``text``, ``traceback``) or null,
``seconds``, ``outputs``. What the cell prints and shows travels meanwhile as records of ``rpcnb.next``
(``runtime/overlap.py``): JSON again, ``{"stream", "text"}`` or ``{"display", "metadata"}``; where that is not possible
it is in ``outputs``. ``rpcnb.cells()`` is the queue; ``rpcnb.variable``, ``rpcnb.set_variable``,
``rpcnb.del_variable`` and ``rpcnb.variables`` reach the namespace (``cells/variables.py``).
"""

from __future__ import annotations

import ast
import asyncio
import inspect
import itertools
import json
import linecache
import threading
import time
import weakref
from collections import deque
from typing import TYPE_CHECKING, Any

from rpcnb.cells.output import CellOutput, mime_json, output_to
from rpcnb.cells.show import display, figures_shown, mime_bundle, prepare_display
from rpcnb.cells.variables import dump_variable, load_variable
from rpcnb.errors import ArgumentError
from rpcnb.runtime.completion import Callback, bind
from rpcnb.runtime.current import CALL, SESSION
from rpcnb.runtime.report import format_cell, text_of
from rpcnb.runtime.served import ServedFunction
from rpcnb.values import type_name

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import CodeType

    from rpcnb.cells.runners import Runner
    from rpcnb.runtime.local import LocalServingSession

__all__ = ["Cells", "run_source"]

_FLAGS = ast.PyCF_ALLOW_TOP_LEVEL_AWAIT
_numbers = itertools.count(1)


def _no_input(prompt: str = "") -> str:
    raise EOFError("a remote cell cannot ask for input; pass values with session.namespace")


class _Cell:
    """One cell of a client: queued, running, then over."""

    def __init__(self, cells: Cells, session: LocalServingSession, done: Callback, source: str, name: str) -> None:
        self.id = next(_numbers)
        self.name = name
        self.source = source
        self.since = time.monotonic()
        self.state = "queued"
        self.begun = False
        self._cells = cells
        self.session = session
        self._done = done
        self._outcome: dict[str, Any] | None = None
        completion = CALL.get()
        self._completion = completion
        way: Any = completion if hasattr(completion, "emit") else None
        self.output = CellOutput(way, session.environment.later, cells.runner.shield)

    def run(self) -> None:
        """Run it; an interrupt may come at any moment."""
        if self.state == "cancelled":
            return
        self.state, self.since, self.begun = "running", time.monotonic(), True
        tokens = SESSION.set(self.session), CALL.set(self._completion)
        try:
            self._outcome = self._cells.execute(self.session, self)
        finally:
            SESSION.reset(tokens[0])
            CALL.reset(tokens[1])

    def finish(self) -> None:
        """Answer."""
        outcome = self._outcome or _failure(KeyboardInterrupt(""))
        self._cells.over(self)
        seconds = 0.0 if self.state == "cancelled" else time.monotonic() - self.since
        told = {**outcome, "seconds": seconds, "outputs": self.output.kept}
        try:
            data = json.dumps(told, default=str)
        except BaseException as error:  # a representation that JSON cannot hold, or whose text raises
            failure = _failure(TypeError(f"the result cannot be shown: {type_name(error)}"))
            data = json.dumps({**failure, "seconds": seconds, "outputs": []})
        self._done(data.encode())

    def stop(self) -> None:
        """End it early for its client; from any thread."""
        self.state = "cancelled" if self.state == "queued" else "interrupting"
        self._cells.runner.interrupt(self)


class Cells:
    """The remote cells of one server.

    Args:
        runner: Where they run.
    """

    def __init__(self, runner: Runner) -> None:
        self.runner = runner
        self._lock = threading.Lock()
        self._queue: deque[_Cell] = deque()
        self._namespaces: weakref.WeakKeyDictionary[LocalServingSession, dict[str, Any]] = weakref.WeakKeyDictionary()

    def serve(self, session: LocalServingSession, name: str) -> ServedFunction | None:
        """Return the function of this name for a session's client."""
        if name == "rpcnb.cell":
            return ServedFunction(name, lambda done, *args: self._submit(session, done, *args), "callback")
        found: dict[str, Callable[..., Any]] = {
            "rpcnb.cells": lambda: self.queue(session),
            "rpcnb.variable": lambda variable, pickles=False: dump_variable(self._variable(session, variable), pickles),
            "rpcnb.set_variable": lambda variable, value: self._set(session, variable, value),
            "rpcnb.del_variable": lambda variable: self._delete(session, variable),
            "rpcnb.variables": lambda: self._list(session),
        }
        return ServedFunction(name, found[name]) if name in found else None

    def queue(self, session: LocalServingSession) -> str:
        """Return the cells that have not ended, as JSON: number, name, state, age in seconds, and whose."""
        now = time.monotonic()
        with self._lock:
            cells = list(self._queue)
        return json.dumps(
            [
                {
                    "id": cell.id,
                    "name": cell.name,
                    "state": cell.state,
                    "age": now - cell.since,
                    "mine": cell.session is session,
                }
                for cell in cells
            ]
        )

    def _submit(self, session: LocalServingSession, done: Callback, source: str, name: str = "cell") -> None:
        if not isinstance(source, str) or not isinstance(name, str):
            raise ArgumentError(0, f"of type {type(source).__name__}", "the text of a cell, and its name")
        cell = _Cell(self, session, done, source, name)
        with self._lock:
            self._queue.append(cell)
        completion = CALL.get()
        if completion is not None:
            bind(completion, cell.stop)  # type: ignore[arg-type]  # a completion's
        self.runner.submit(cell)

    def over(self, cell: _Cell) -> None:
        """Forget a cell that has ended."""
        with self._lock:
            self._queue.remove(cell)

    def runs(self, session: LocalServingSession) -> str:
        """Name the cell of a session that is running; empty if none is."""
        with self._lock:
            running = [cell.name for cell in self._queue if cell.session is session and cell.begun]
        return running[0] if running else ""

    def end(self, session: LocalServingSession) -> None:
        """Drop the variables of a session that is over."""
        namespace = self._namespaces.pop(session, None)
        if namespace is not None:
            session.environment.run_in_thread(namespace.clear)  # users' destructors may take long

    # -- the namespace ---------------------------------------------------------------------------------------------

    def namespace(self, session: LocalServingSession) -> dict[str, Any]:
        """Return a session's variables."""
        with self._lock:
            found = self._namespaces.get(session)
            if found is None:
                found = self._namespaces[session] = {"__name__": "__main__", "display": display, "input": _no_input}
            return found

    def _variable(self, session: LocalServingSession, name: str) -> Any:
        namespace = self.namespace(session)
        if name not in namespace:
            raise LookupError(f"no variable {name!r}; there are {', '.join(_own(namespace)) or 'none'}")
        return namespace[name]

    def _set(self, session: LocalServingSession, name: str, value: Any) -> None:
        if not isinstance(name, str) or not name.isidentifier():
            raise ValueError(f"expected a variable's name, got {name!r}")
        self.namespace(session)[name] = load_variable(value, True) if isinstance(value, bytes) else value.copy()

    def _delete(self, session: LocalServingSession, name: str) -> None:
        self._variable(session, name)
        del self.namespace(session)[name]

    def _list(self, session: LocalServingSession) -> str:
        namespace = dict(self.namespace(session))  # a cell may be changing it
        return json.dumps([[name, type_name(namespace[name])] for name in _own(namespace)])

    # -- running ---------------------------------------------------------------------------------------------------

    def execute(self, session: LocalServingSession, cell: _Cell) -> dict[str, Any]:
        """Run a cell's source; returns its outcome. An interrupt may come at any moment."""
        filename = f"<{cell.name} #{cell.id}>"
        source = _Source(cell.source, filename)
        try:
            with source, output_to(cell.output):
                prepare_display()
                with figures_shown(cell.output) as shown:
                    value = _run(source, self.namespace(session))
                    shown.value = value
                data, metadata = mime_bundle(value)
            return {"data": mime_json(data), "metadata": metadata, "error": None}
        except BaseException as error:  # SystemExit too: a cell does not end the server
            return _failure(error)


def _own(namespace: dict[str, Any]) -> list[str]:
    """Return the names that cells have made."""
    hidden = {"display": display, "input": _no_input}
    return [name for name, value in namespace.items() if not name.startswith("_") and hidden.get(name) is not value]


class _Source:
    """A cell's source, which tracebacks show as long as code of it exists: a function that it has defined, say."""

    def __init__(self, text: str, filename: str) -> None:
        self.text = text
        self.filename = filename
        self._pieces = 0  # of code, and one while the cell runs
        linecache.cache[filename] = (len(text), None, text.splitlines(True), filename)

    def compile(self, tree: Any, mode: str) -> CodeType:
        """Compile part of it."""
        code: CodeType = compile(tree, self.filename, mode, _FLAGS, True)
        todo = [code]
        while todo:
            piece = todo.pop()
            todo += [one for one in piece.co_consts if isinstance(one, type(code))]
            self._pieces += 1
            weakref.finalize(piece, self._one_is_gone).atexit = False
        return code

    def _one_is_gone(self) -> None:
        self._pieces -= 1
        if not self._pieces:
            linecache.cache.pop(self.filename, None)

    def __enter__(self) -> _Source:
        self._pieces += 1
        return self

    def __exit__(self, *_: object) -> None:
        self._one_is_gone()


def run_source(text: str, filename: str, namespace: dict[str, Any]) -> Any:
    """Run the source of a cell that is nobody's: a detached job; returns the value of its last expression."""
    with _Source(text, filename) as source:
        prepare_display()
        return _run(source, {"display": display, "input": _no_input, **namespace})


def _run(source: _Source, namespace: dict[str, Any]) -> Any:
    """Run statements, and return the value of a last expression; ``await`` works at the top."""
    tree = ast.parse(source.text, source.filename)
    last = tree.body[-1] if tree.body and not _silent(source.text) else None
    if not isinstance(last, ast.Expr):
        _perform(source.compile(tree, "exec"), namespace)
        return None
    tree.body.pop()
    _perform(source.compile(tree, "exec"), namespace)
    value = namespace["_"] = _perform(source.compile(ast.Expression(last.value), "eval"), namespace)
    return value


def _silent(source: str) -> bool:
    """Tell whether a cell ends in a semicolon: its value is not shown, as in IPython."""
    return source.rstrip().endswith(";")


def _perform(code: CodeType, namespace: dict[str, Any]) -> Any:
    value = eval(code, namespace)
    if code.co_flags & inspect.CO_COROUTINE:
        return asyncio.run(value)
    return value


def _failure(error: BaseException) -> dict[str, Any]:
    """Return the outcome that reports an exception: with the cell's own lines, without ours."""
    shown = {"type": type_name(error), "text": text_of(error), "traceback": format_cell(error)}
    return {"data": {}, "metadata": {}, "error": shown}
