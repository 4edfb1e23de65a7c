"""Detached jobs, as a client sees them: ``session.jobs``, and what ``submit(..., detach=True)`` returns.

A job has a process of its own at the server and goes on when the session, the notebook or the client's machine is gone.
It is found again by its name, with the same token.
"""

from __future__ import annotations

import codecs
import itertools
import sys
import time
from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from rpcnb.errors import ArgumentError, DeadlineExceeded, FunctionNotFound, RemoteError, SessionCrashed, SessionLost
from rpcnb.runtime.parcel import pack, unpack

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from rpcnb.client.operations import Operations
    from rpcnb.protocol.flows import Flow

__all__ = ["AsyncJob", "AsyncJobs", "Job", "Jobs"]

_numbers = itertools.count(1)
_NO_JOBS = (
    "has no detached jobs: they need a server that gives each session a process of its own "
    "(rpcnb serve; not --shared-state, and not a notebook's)"
)


_changes = 0  # how often jobs were begun, cancelled and forgotten here


def changes() -> int:
    """Return a number that grows when this process has begun, cancelled or forgotten a job."""
    return _changes


def ask(ops: Operations, words: dict[str, Any], data: bytes = b"") -> Flow[tuple[dict[str, Any], bytes]]:
    """Ask the server's jobs for something; returns words and bytes.

    Raises:
        RemoteError: They refuse.
    """
    try:
        answer = yield from ops.ask("rpcnb.jobs", pack([words, data]))
    except FunctionNotFound:
        raise FunctionNotFound(f"{ops.peer} {_NO_JOBS}") from None
    found, rest = unpack(bytes(answer))
    if "error" in found:
        raise RemoteError(str(found["error"]))
    if words["op"] in ("start", "cancel", "forget"):
        global _changes
        _changes += 1
    return found, rest


def start(
    ops: Operations, name: str | None, function: str, source: str | None, args: tuple[Any, ...]
) -> Flow[dict[str, Any]]:
    """Begin a job; returns its facts."""
    chosen = name or f"{function.rpartition('.')[2] or 'job'}-{time.strftime('%Y%m%d-%H%M%S')}-{next(_numbers)}"
    parcel = pack(args)
    found, _ = yield from ask(ops, {"op": "start", "name": chosen, "function": function, "source": source}, parcel)
    return dict(found["job"])


def facts_of(ops: Operations, name: str, until_end: bool = False) -> Flow[dict[str, Any]]:
    """Ask how a job is; with ``until_end`` the answer comes after some time, or when it has ended."""
    found, _ = yield from ask(ops, {"op": "state", "name": name, "until_end": until_end})
    return dict(found["job"])


def list_of(ops: Operations) -> Flow[list[dict[str, Any]]]:
    """List the jobs, oldest first."""
    found, _ = yield from ask(ops, {"op": "list"})
    return list(found["jobs"])


def output_of(ops: Operations, name: str, at: int, wait: bool) -> Flow[tuple[int, bytes, dict[str, Any]]]:
    """Return where output begins that is not older than ``at``, that output, and the job's facts."""
    found, data = yield from ask(ops, {"op": "output", "name": name, "at": at, "wait": wait})
    return int(found["at"]), data, dict(found["job"])


def all_output_of(ops: Operations, name: str) -> Flow[str]:
    """Return what is kept of a job's output; of one that goes on printing what there was at first."""
    parts, at, size = [], 0, None
    while size is None or at < size:
        begin, data, facts = yield from output_of(ops, name, at, False)
        size = facts["output"] if size is None else size
        if not data:
            break
        parts += [_gap(begin - at).encode(), data]
        at = begin + len(data)
    return b"".join(parts).decode("utf-8", "replace")


def _gap(nbytes: int) -> str:
    return f"... {nbytes} bytes are not kept ...\n" if nbytes > 0 else ""


def file_of(ops: Operations, name: str, file: str | None) -> Flow[bytearray]:
    """Return a file that a job has made; None for its result's parcel."""
    whole = bytearray()
    while True:
        found, data = yield from ask(ops, {"op": "read", "name": name, "file": file, "at": len(whole)})
        whole += data
        if not data or len(whole) >= found["size"]:
            return whole


def result_of(ops: Operations, facts: dict[str, Any]) -> Flow[Any]:
    """Return the result of a job that has ended.

    Raises:
        RemoteError: Its function has raised.
        SessionCrashed: Its process has crashed.
        SessionLost: It was cancelled, or ended with its server.
    """
    raise_failure(ops.peer, facts)
    (result,) = unpack(bytes((yield from file_of(ops, facts["name"], None))))
    return result


def raise_failure(peer: str, facts: dict[str, Any]) -> None:
    """Raise what a job has ended with, if that is no result."""
    if facts["state"] == "done":
        return
    error, how, name = facts["error"], facts["how"], facts["name"]
    if facts["state"] == "cancelled":
        raise SessionLost(f"the job {name!r} at {peer} was cancelled")
    if error is not None:
        raise RemoteError(error["text"], error["type"], error["traceback"])
    if how == "restart":
        raise SessionLost(f"the job {name!r} has ended with its server at {peer}, which was stopped or started again")
    if how == "record":
        raise SessionLost(f"what {peer} had noted of the job {name!r} is damaged; its output may be there; forget() it")
    raise SessionCrashed(peer, how, facts["function"], name)


def function_name(function: Any) -> str:
    """Return the name by which a job finds a function in its own process.

    Raises:
        ArgumentError: It has none: it belongs to a module that this session alone has loaded.
    """
    name = function if isinstance(function, str) else function.name if getattr(function, "found", False) else ""
    if not name:
        raise ArgumentError(0, repr(function), "a registered function of the server, which a job finds by its name")
    return name


class _Named:
    """A job, by the session with which it is asked after, and name."""

    def __init__(self, session: Any, facts: dict[str, Any]) -> None:
        self.session = session
        self._facts = facts
        self.name: str = facts["name"]

    @property
    def facts(self) -> dict[str, Any]:
        """What was known of it when it was last asked: name, state, function, since, ended, error, how, output..."""
        return dict(self._facts)

    def _ask(self, make: Callable[[Operations], Flow[Any]], what: str, timeout: float | None = None) -> Any:
        return self.session._run(make, timeout, f"{what} {self.name}", on_output=_nothing)

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.name}: {self._facts['state']}, {self._facts['function'] or 'a cell'}>"


def _nothing(data: bytes) -> None:
    """Take output that there is not: such a call goes beside what is in progress."""


class Job(_Named):
    """A detached job.

    Attributes:
        name: By which it is found again.
        session: With which it is asked after; the job goes on without it.
    """

    def refresh(self) -> dict[str, Any]:
        """Ask how it is; returns its facts: ``state``, ``function``, ``since``, ``ended``, ``error``, ``files``..."""
        self._facts = self._ask(lambda ops: facts_of(ops, self.name), "state")
        return dict(self._facts)

    @property
    def state(self) -> str:
        """``running``, ``done``, ``failed`` or ``cancelled``, asked now."""
        return str(self.refresh()["state"])

    @property
    def files(self) -> list[str]:
        """Names of the files that it has left."""
        return list(self.refresh()["files"])

    def output(self) -> str:
        """Return what it has printed so far: the end of it, if that is much."""
        text: str = self._ask(lambda ops: all_output_of(ops, self.name), "output")
        return text

    def follow(self, write: Callable[[str], object] | None = None) -> None:
        """Show its output as it comes, until it ends; Ctrl-C ends the showing, not the job."""
        at, ended, decode = 0, False, codecs.getincrementaldecoder("utf-8")("replace").decode
        while not ended:
            begin, data, facts = self._ask(partial(output_of, name=self.name, at=at, wait=True), "output")
            ended = facts["state"] != "running" and begin + len(data) >= facts["output"]
            text = _gap(begin - at) + decode(data, ended)
            if text:
                (write or sys.stdout.write)(text)
            at = begin + len(data)

    def wait(self, timeout: float | None = None) -> str:
        """Return its state once it has ended.

        Raises:
            DeadlineExceeded: ``timeout`` seconds went by; it goes on.
        """
        until = None if timeout is None else time.monotonic() + timeout
        state = self.state
        while state == "running":
            left = None if until is None else until - time.monotonic()
            if left is not None and left <= 0:
                raise DeadlineExceeded(f"job {self.name}", timeout or 0.0, timeout or 0.0)
            self._facts = self._ask(lambda ops: facts_of(ops, self.name, True), f"job {self.name}", left)
            state = self._facts["state"]
        return state

    def result(self, timeout: float | None = None) -> Any:
        """Wait for its end and return its result: a value, or a numpy array.

        Raises:
            RemoteError: Its function has raised.
            SessionCrashed: Its process has crashed.
            SessionLost: It was cancelled, or ended with its server.
            DeadlineExceeded: ``timeout`` seconds went by; it goes on.
        """
        self.wait(timeout)
        return self._ask(lambda ops: result_of(ops, self._facts), "result")

    def download(self, file: str) -> bytearray:
        """Return the content of a file that it has left (see ``workpath``)."""
        data: bytearray = self._ask(lambda ops: file_of(ops, self.name, file), "download")
        return data

    def cancel(self) -> bool:
        """Interrupt it, and end its process if that does not help; False if it had ended."""
        found, _ = self._ask(lambda ops: ask(ops, {"op": "cancel", "name": self.name}), "cancel")
        return bool(found["cancelled"])

    def forget(self) -> None:
        """Drop what is kept of it; its name may be used again."""
        self._ask(lambda ops: ask(ops, {"op": "forget", "name": self.name}), "forget")


class Jobs(Mapping[str, Job]):
    """The detached jobs of a server's token, by name: ``session.jobs["burnin"]``."""

    def __init__(self, session: Any) -> None:
        self._session = session

    def start(self, function: Any, *args: Any, name: str | None = None) -> Job:
        """Begin a job that calls a function: ``f.submit(*args, detach=True, name=name)``.

        Args:
            function: One of the server's registered functions, or its name.
            args: Copied in: numbers, texts, bytes, lists and dicts of them, numpy arrays and tensors.
            name: Of the job; made from the function's and the time by default.
        """
        chosen, given = function_name(function), tuple(one.numpy() if hasattr(one, "meta") else one for one in args)
        facts = self._session._run(
            lambda ops: start(ops, name, chosen, None, given), None, f"job {chosen}", on_output=_nothing
        )
        return Job(self._session, facts)

    def start_cell(self, source: str, name: str | None = None) -> Job:
        """Begin a job that runs Python source in a namespace of its own; needs the server's consent (--allow-exec)."""
        facts = self._session._run(lambda ops: start(ops, name, "", source, ()), None, "job", on_output=_nothing)
        return Job(self._session, facts)

    def _list(self) -> list[Job]:
        return [Job(self._session, facts) for facts in self.facts()]

    def facts(self, timeout: float | None = None) -> list[dict[str, Any]]:
        """Ask how all are: the facts of each, oldest first."""
        found: list[dict[str, Any]] = self._session._run(list_of, timeout, "jobs", on_output=_nothing)
        return found

    def __getitem__(self, name: str) -> Job:
        try:
            facts = self._session._run(lambda ops: facts_of(ops, name), None, f"job {name}", on_output=_nothing)
        except RemoteError as error:
            raise KeyError(error.message) from None
        return Job(self._session, facts)

    def __iter__(self) -> Iterator[str]:
        return iter([job.name for job in self._list()])

    def __len__(self) -> int:
        return len(self._list())

    def values(self) -> Any:
        """Return the jobs, oldest first; asked once."""
        return self._list()

    def __repr__(self) -> str:
        return f"<jobs: {', '.join(map(repr, self._list())) or 'none'}>"


class AsyncJob(_Named):
    """A detached job of an awaited session; methods as :class:`Job`."""

    async def refresh(self) -> dict[str, Any]:
        """Ask how it is; returns its facts."""
        self._facts = await self._ask(lambda ops: facts_of(ops, self.name), "state")
        return dict(self._facts)

    async def output(self) -> str:
        """Return what it has printed so far."""
        text: str = await self._ask(lambda ops: all_output_of(ops, self.name), "output")
        return text

    async def wait(self) -> str:
        """Return its state once it has ended."""
        while (await self.refresh())["state"] == "running":
            self._facts = await self._ask(lambda ops: facts_of(ops, self.name, True), "wait")
        return str(self._facts["state"])

    async def result(self) -> Any:
        """Wait for its end and return its result; errors as :meth:`Job.result`."""
        await self.wait()
        return await self._ask(lambda ops: result_of(ops, self._facts), "result")

    async def download(self, file: str) -> bytearray:
        """Return the content of a file that it has left."""
        data: bytearray = await self._ask(lambda ops: file_of(ops, self.name, file), "download")
        return data

    async def cancel(self) -> bool:
        """Interrupt it; False if it had ended."""
        found, _ = await self._ask(lambda ops: ask(ops, {"op": "cancel", "name": self.name}), "cancel")
        return bool(found["cancelled"])

    async def forget(self) -> None:
        """Drop what is kept of it."""
        await self._ask(lambda ops: ask(ops, {"op": "forget", "name": self.name}), "forget")


class AsyncJobs:
    """The detached jobs of a server's token, awaited: ``await session.jobs.get("burnin")``."""

    def __init__(self, session: Any) -> None:
        self._session = session

    async def start(self, function: Any, *args: Any, name: str | None = None) -> AsyncJob:
        """Begin a job that calls a function; arguments as :meth:`Jobs.start`."""
        chosen = function_name(function)
        given = tuple([await one.numpy() if hasattr(one, "meta") else one for one in args])
        facts = await self._session._run(
            lambda ops: start(ops, name, chosen, None, given), None, f"job {chosen}", on_output=_nothing
        )
        return AsyncJob(self._session, facts)

    async def start_cell(self, source: str, name: str | None = None) -> AsyncJob:
        """Begin a job that runs Python source in a namespace of its own."""
        facts = await self._session._run(lambda ops: start(ops, name, "", source, ()), None, "job", on_output=_nothing)
        return AsyncJob(self._session, facts)

    async def get(self, name: str) -> AsyncJob:
        """Return a job.

        Raises:
            KeyError: There is none of this name.
        """
        try:
            facts = await self._session._run(lambda ops: facts_of(ops, name), None, f"job {name}", on_output=_nothing)
        except RemoteError as error:
            raise KeyError(error.message) from None
        return AsyncJob(self._session, facts)

    async def list(self) -> list[AsyncJob]:
        """List the jobs, oldest first."""
        found = await self._session._run(list_of, None, "jobs", on_output=_nothing)
        return [AsyncJob(self._session, facts) for facts in found]
