"""Who has called what, and how that ended: told where an operator keeps a record or counts. Values are never told."""

from __future__ import annotations

import asyncio
import hashlib
import time
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

from rpcnb.runtime.parcel import unpack

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator
    from pathlib import Path

    from rpcnb.runtime.served import ServedFunction

    Tell = Callable[[str, float, str, dict[str, Any]], object]

__all__ = ["Tell", "watch"]

# What rpcnb's own clients ask beside their user's calls; files that come in parts are told with their last one.
_QUIET = frozenset(
    {"rpcnb.get", "rpcnb.size", "rpcnb.digest", "rpcnb.status", "rpcnb.cells", "rpcnb.variables", "rpcnb.variable"}
)
_OPENING = frozenset({"start"})


def watch(session: Any, served: ServedFunction, tell: Tell) -> None:
    """Have the calls of a function told: its name, the seconds, the outcome and what it was about.

    Args:
        session: Whose function it is.
        served: The function.
        tell: Gets the name, seconds, ``ok``, ``cancelled`` or the error's type, and details: a file's name and hash.
    """
    if served.kind == "raw" or served.name in _QUIET:  # the calls that those start are told themselves
        return
    wrap = {"plain": _watch_plain, "coroutine": _watch_coroutine, "callback": _watch_callback}[served.kind]

    def ended(args: tuple[Any, ...], since: float, error: BaseException | None) -> None:
        details = _details(session, served.name, args, error)
        if details is not None:
            tell(served.name, time.monotonic() - since, _outcome(error), details)

    served.watch(lambda function: wrap(function, ended))


def _outcome(error: BaseException | None) -> str:
    if error is None:
        return "ok"
    return "cancelled" if isinstance(error, asyncio.CancelledError) else type(error).__name__


@contextmanager
def _telling(ended: Callable[..., None], args: tuple[Any, ...]) -> Iterator[None]:
    """Tell how what is done inside ends."""
    since = time.monotonic()
    try:
        yield
    except BaseException as error:
        ended(args, since, error)
        raise
    ended(args, since, None)


def _watch_plain(function: Callable[..., Any], ended: Callable[..., None]) -> Callable[..., Any]:
    def call(*args: Any) -> Any:
        with _telling(ended, args):
            return function(*args)

    return call


def _watch_coroutine(function: Callable[..., Awaitable[Any]], ended: Callable[..., None]) -> Callable[..., Any]:
    async def call(*args: Any) -> Any:
        with _telling(ended, args):
            return await function(*args)

    return call


def _watch_callback(function: Callable[..., Any], ended: Callable[..., None]) -> Callable[..., Any]:
    def call(done: Any, *args: Any) -> Any:
        once = _Once(done, partial(ended, args, time.monotonic()))
        try:
            return function(once, *args)
        except BaseException as error:
            once.note(error)
            raise

    return call


class _Once:
    """A completion that tells its first outcome."""

    def __init__(self, done: Any, ended: Callable[[BaseException | None], None]) -> None:
        self._done = done
        self._ended: Callable[[BaseException | None], None] | None = ended

    def note(self, error: BaseException | None) -> None:
        """Tell an outcome, unless one has been."""
        ended, self._ended = self._ended, None
        if ended is not None:
            ended(error)

    def __call__(self, *result: Any) -> None:
        self._done(*result)
        self.note(None)

    def error(self, error: BaseException) -> None:
        """Complete with an exception."""
        self._done.error(error)
        self.note(error)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._done, name)


def _details(session: Any, name: str, args: tuple[Any, ...], error: BaseException | None) -> dict[str, Any] | None:
    """Say what a call was about; None where it is not to be told."""
    try:
        if name == "tvm.rpc.server.upload":
            return _upload(session, args[0], error)
        if name == "rpcnb.put":
            file, total, offset, data = args
            return _upload(session, file, error) if error is not None or offset + len(data) >= total else None
        if name in ("tvm.rpc.server.load_module", "tvm.rpc.server.download", "tvm.rpc.server.remove"):
            return {"file": str(args[0])}
        if name == "rpcnb.cell":
            return {"sha256": _hash(str(args[0]).encode())}
        if name in ("rpcnb.set_variable", "rpcnb.del_variable"):
            return {"variable": str(args[0])}
        if name == "rpcnb.jobs":
            return _job(args[0])
    except Exception as failed:  # odd arguments: the call itself says so
        return {"unclear": type(failed).__name__}
    return {}


def _upload(session: Any, file: str, error: BaseException | None) -> dict[str, Any]:
    if error is not None:
        return {"file": str(file)}
    path = session.files.path(file)
    return {"file": str(file), "bytes": path.stat().st_size, "sha256": _file_hash(path)}


def _job(question: bytes) -> dict[str, Any] | None:
    words, _ = unpack(question)
    if words["op"] not in _OPENING:
        return None
    found = {"job": str(words["name"]), "function": str(words.get("function") or "")}
    source = words.get("source")
    return found if source is None else {**found, "sha256": _hash(str(source).encode())}


def _file_hash(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while data := file.read(1 << 20):
            digest.update(data)
    return digest.hexdigest()


def _hash(data: Any) -> str:
    return hashlib.sha256(data).hexdigest()
