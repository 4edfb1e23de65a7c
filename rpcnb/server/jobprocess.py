"""What the process of a detached job does: one call, or one cell; its result is written where the server keeps it."""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import os
import signal
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rpcnb.errors import AccessDenied, ArgumentError, FunctionNotFound, IsolationFailed, LimitExceeded
from rpcnb.runtime.current import SESSION
from rpcnb.runtime.local import LocalServingSession
from rpcnb.runtime.parcel import pack, unpack
from rpcnb.runtime.report import format_cell, report

if TYPE_CHECKING:
    from rpcnb.runtime.environment import Environment
    from rpcnb.transport.channel import Channel, Note

__all__ = ["run_job"]

_MOST_TEXT = 100_000  # characters of an error's text, and of its traceback


def run_job(
    environment: Environment, channel: Channel, note: Note, allow_exec: bool, most: int, refusal: str = ""
) -> int:
    """Run a job in the main thread; returns the exit code.

    Args:
        environment: Of the sessions here.
        channel: To the server.
        note: What to do: names, and its arguments as a parcel; and where its output goes.
        allow_exec: Cells may run.
        most: Bytes of its result.
        refusal: Why nothing can be run here.
    """
    words, (output,) = note.words["job"], note.descriptors
    for number in (1, 2):
        os.dup2(output, number)
    os.close(output)
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]  # a text stream
    root = Path(words["directory"])
    environment.directory = str(root)
    session = LocalServingSession(environment)
    session.files.keep_at(root / "files")
    token = SESSION.set(session)

    def run() -> Any:
        if refusal:
            raise IsolationFailed(refusal)
        if words["source"] is not None:
            return _run_cell(words["source"], words["name"], allow_exec)
        return _call(environment, words["function"], unpack(note.data))

    error: dict[str, str] | None = None
    try:  # an interrupt may come wherever the inner one is left
        try:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            channel.send({"began": True})
            parcel = _pack(run())
            if len(parcel) > most:
                raise LimitExceeded(f"the result has {len(parcel)} bytes, job_bytes={most}")
            (root / "result").write_bytes(parcel)
        finally:
            signal.signal(signal.SIGINT, lambda *_: None)
    except BaseException as raised:
        told = report(raised)
        trace = told.traceback if words["source"] is None else format_cell(raised)
        error = {"type": told.type_name, "text": _within(told.text), "traceback": _within(trace)}
    SESSION.reset(token)
    with contextlib.suppress(Exception):
        sys.stdout.flush()
        sys.stderr.flush()
    channel.send({"done": error})
    return 0


def _pack(result: Any) -> bytes:
    """Return the parcel of a job's result.

    Raises:
        TypeError: It is of another kind than can be kept.
    """
    try:
        return pack([result])
    except ArgumentError as error:
        raise TypeError(f"the result of a job is kept as {error.expected}; got one {error.seen}") from None


def _within(text: str) -> str:
    """Return the beginning and the end of a text that is too long to be kept."""
    if len(text) <= _MOST_TEXT:
        return text
    half = _MOST_TEXT // 2
    return f"{text[:half]}\n... {len(text) - 2 * half} characters are not kept ...\n{text[-half:]}"


def _call(environment: Environment, name: str, args: list[Any]) -> Any:
    entry = environment.registry.get(name)
    if entry is None:
        raise FunctionNotFound(f"this server has no function {name!r} that a job could call")
    if entry.kind == "callback":
        return _call_back(entry.call, args)
    result = entry.call(*args)
    return asyncio.run(_awaited(result)) if inspect.isawaitable(result) else result


async def _awaited(result: Any) -> Any:
    return await result


def _call_back(function: Any, args: list[Any]) -> Any:
    """Call a function that answers by a callback, and wait for that."""
    done = _Done()
    function(done, *args)
    done.event.wait()
    if done.failure is not None:
        raise done.failure
    return done.result


class _Done:
    """The ``done`` of a callback function."""

    cancelled = False

    def __init__(self) -> None:
        self.event = threading.Event()
        self.result: Any = None
        self.failure: BaseException | None = None

    def __call__(self, result: Any = None) -> None:
        self.result = result
        self.event.set()

    def error(self, error: BaseException | str) -> None:
        self.failure = error if isinstance(error, BaseException) else RuntimeError(error)
        self.event.set()


def _run_cell(source: str, name: str, allow_exec: bool) -> Any:
    """Run a cell's source in a namespace of its own; returns the value of its last expression, or its text."""
    if not allow_exec:
        raise AccessDenied(
            "this server runs no code of its clients; who owns it may allow that: rpcnb serve --allow-exec"
        )
    from rpcnb.cells.cells import run_source

    value = run_source(source, f"<{name}>", {"__name__": "__main__"})
    try:
        pack([value])
    except TypeError:
        return repr(value)
    return value
