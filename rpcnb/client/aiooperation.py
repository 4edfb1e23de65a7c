"""One awaited operation: what it waits for, how far it is, and how to give it up."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING, Any

from rpcnb.client.moving import BULK
from rpcnb.client.transfers import Measured
from rpcnb.client.watch import Watch, new_number
from rpcnb.errors import DeadlineExceeded, RpcError
from rpcnb.link.aiorunning import await_flow
from rpcnb.link.control import Route, StartedTicket
from rpcnb.link.order import moves_data, release_when_drained
from rpcnb.transport.within import within
from rpcnb.values import StaysHere

if TYPE_CHECKING:
    from collections.abc import Callable

    from rpcnb.client.moving import Moving
    from rpcnb.client.operations import Operations
    from rpcnb.client.owner import Owner
    from rpcnb.link.aiolanes import AsyncLanes
    from rpcnb.link.aiolink import AsyncLink
    from rpcnb.link.order import Hold
    from rpcnb.protocol.flows import Flow

__all__ = ["AsyncOperation", "AsyncTransfer", "AwaitedCall"]


class AsyncOperation(StaysHere):
    """An operation that a task awaits; listed in ``session.pending`` meanwhile.

    Attributes:
        id: Number, unique in this process.
        session: Where it was begun.
        function: What it does, for people.
        submitted: ``time.monotonic()`` of the beginning; ``finished`` likewise, None before.
        deadline: ``time.monotonic()`` at which it is given up, or None.
    """

    _instead = "pass on what its session returns"

    def __init__(
        self,
        session: Owner,
        ops: Operations,
        flow: Flow[Any],
        function: str,
        timeout: float | None,
        names: frozenset[int],
        on_output: Callable[[bytes], object] | None = None,
    ) -> None:
        self.id = new_number()
        self.session: Any = session
        self.function = function
        self.submitted = time.monotonic()
        self.finished: float | None = None
        self.deadline = None if timeout is None else self.submitted + timeout
        self._ops = ops
        self._flow = flow
        self._timeout = timeout
        self._names = names
        self._on_output = on_output
        self._queued = False
        self._tickets: list[Any] = []
        self._waits = False
        self._was_cancelled = False
        self._failed: str | None = None  # with what; no exception, whose frames would hold this
        self._task: asyncio.Task[Any] | None = None
        self._loop: asyncio.AbstractEventLoop | None = None

    @property
    def state(self) -> str:
        """``queued``, ``sent``, ``running``, ``done``, ``failed`` or ``cancelled``; as :attr:`Pending.state`."""
        if self.finished is None:
            if self._waits:
                return "queued"
            begun = self._tickets and isinstance(self._tickets[-1], StartedTicket) and self._tickets[-1].begun
            return "running" if begun else "sent"
        if self._failed is None:
            return "done"
        return "cancelled" if self._was_cancelled else "failed"

    @property
    def runs_cell(self) -> bool:
        """Tell whether it is a remote cell."""
        return self._on_output is not None

    @property
    def moved(self) -> int:
        """Bytes of bulk data that have moved so far."""
        return sum(ticket.moved for ticket in list(self._tickets))

    def cancel(self) -> bool:
        """Give the operation up: the task that awaits it gets ``CancelledError``. False if it had finished."""
        return self.finished is None and self._task is not None and self._task.cancel()

    def cancel_soon(self) -> None:
        """Give it up, from any thread."""
        if self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self.cancel)

    def forked(self) -> None:
        """In a forked child, where its loop does not run: nothing."""

    async def run(self, queued: bool = False) -> Any:
        """Perform it; called once, by the session.

        Args:
            queued: It is one request on the session's first connection.
        """
        session = self.session
        watch = Watch(session, self.function) if session.observers else None
        self._task = asyncio.current_task()
        self._loop = asyncio.get_running_loop()
        self._queued = queued
        session._pending[self.id] = self
        hold, before = self._ops.order.enter(self._names, queued)
        try:
            if self._timeout is None:
                result = await self._perform(before)
            else:
                result = await within(self._perform(before), self._timeout)
        except BaseException as error:
            failure: BaseException = error
            if isinstance(error, asyncio.TimeoutError) and not isinstance(error, RpcError):  # a session's time limit is
                failure = self._exceeded()
            self._end(hold, failure)
            if watch is not None:
                watch.ended(failure)
            try:
                if failure is not error:
                    raise failure from None
                raise
            finally:
                del failure  # its frames hold this one
        self._end(hold, None)
        if watch is not None:
            watch.ended(None)
        return result

    def _exceeded(self) -> DeadlineExceeded:
        error = DeadlineExceeded(self.function, time.monotonic() - self.submitted, self._timeout or 0.0)
        error.explain(self._ops.link.wire.behind(self._tickets))
        return error

    async def _perform(self, before: list[Hold]) -> Any:
        for earlier in before:
            self._waits = True
            await _released(earlier)
        self._waits = False
        lanes = self._ops.lanes
        control = None if lanes is None else lanes.opened
        route = Route(await self._choose_link(), control, self._seconds_left, self._on_output)
        return await await_flow(route, self._flow, None if lanes is None else lanes.control, self._tickets)

    async def _choose_link(self) -> Any:
        return self._ops.link

    def _seconds_left(self) -> float:
        return 0.0 if self.deadline is None else max(0.001, self.deadline - time.monotonic())

    def _end(self, hold: Hold, error: BaseException | None) -> None:
        self._note_end(error)
        owed = [] if error is None else [ticket for ticket in self._tickets if moves_data(ticket)]
        release_when_drained(hold, self._ops.link, owed)

    def _note_end(self, error: BaseException | None) -> None:
        self.finished = time.monotonic()
        self._failed = None if error is None else str(error)
        self._was_cancelled = isinstance(error, asyncio.CancelledError)
        self._task = None
        self.session._pending.pop(self.id, None)

    def __repr__(self) -> str:
        age = (self.finished or time.monotonic()) - self.submitted
        name = type(self).__name__
        return f"<{name} {self.id}: {self.function or 'operation'}, {self.state}, {age:.1f} s, {self.session.name}>"


class AwaitedCall(AsyncOperation):
    """A plain call that a task awaits, sent the short way: no flow, nothing named, no time limit, no observers."""

    finished = None
    deadline = None
    _waits = False
    _failed = None
    _was_cancelled = False
    _tickets = ()  # type: ignore[assignment]  # its one ticket moves no bulk data
    _on_output = None

    def __init__(self, session: Owner, link: AsyncLink, function: str) -> None:
        self.id = new_number()
        self.session = session
        self.function = function
        self.submitted = time.monotonic()
        self._task = asyncio.current_task()
        self._loop = link.loop
        session._pending[self.id] = self

    def end(self, error: BaseException | None = None) -> None:
        """Note the end."""
        self._note_end(error)


class AsyncTransfer(Measured, AsyncOperation):
    """A copy, upload or download that a task awaits."""

    def __init__(
        self,
        session: Owner,
        ops: Operations,
        flow: Flow[Any],
        function: str,
        timeout: float | None,
        names: frozenset[int],
        moving: Moving,
        progress: Callable[[Any], object] | None,
    ) -> None:
        AsyncOperation.__init__(self, session, ops, flow, function, timeout, names)
        self._measure(moving, progress)
        self._timer: asyncio.TimerHandle | None = None

    async def run(self, queued: bool = False) -> Any:
        """Perform it, and report."""
        self._report_start()
        self._tick()
        try:
            return await super().run(queued)
        finally:
            if self._timer is not None:
                self._timer.cancel()
            self._report()

    async def _choose_link(self) -> Any:
        lanes: AsyncLanes | None = self._ops.lanes
        found = await lanes.bulk() if lanes is not None and self.total >= BULK else None
        return found or self._ops.link

    def _tick(self) -> None:
        if self.moved:
            self._report()
        self._timer = asyncio.get_running_loop().call_later(self.TICK, self._tick)

    def _outcome(self) -> str | None:
        if self.finished is None:
            return None
        if self._failed is None:
            return ""
        return "cancelled" if self._was_cancelled else self._failed

    def _count(self) -> int:
        return sum(ticket.moved for ticket in list(self._tickets))


async def _released(hold: Hold) -> None:
    future: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def release() -> None:
        if not future.done():
            future.set_result(None)

    if hold.then(release):
        await future
