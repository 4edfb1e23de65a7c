"""Calls that overlap: started by one request, their outcomes collected by another.

Between rpcnb peers a call that may answer later goes as ``rpcnb.start(call_id, timeout_s, handle, *args)``, which is
answered at once. The long poll ``rpcnb.next()`` returns the outcomes as one bytes value: records ``(call_id, kind,
length)`` and a packed sequence each; what a call puts out while it runs (a remote cell) travels so, too.
``rpcnb.cancel(call_id)`` ends one; ``rpcnb.cancel_at(lane, *ordinals)`` ends the requests with these numbers of a
connection of the session, kInitServer being the first. A cancel may arrive before its call.

A parked ``rpcnb.next`` gives way: it is answered when a further request arrives behind it, so that one connection
carries starts, cancels and the poll.
"""

from __future__ import annotations

import itertools
import threading
import time
import weakref
from collections import deque
from typing import TYPE_CHECKING, Any

from rpcnb.errors import ArgumentError, LimitExceeded
from rpcnb.protocol.messages import CallFunc, Raised, Return
from rpcnb.protocol.peerlimits import PeerLimits
from rpcnb.protocol.records import CANCEL, CANCEL_AT, NEXT, START, Emitted, read_records, write_record
from rpcnb.runtime.completion import Stoppable
from rpcnb.runtime.current import CALL
from rpcnb.runtime.served import ServedFunction
from rpcnb.runtime.serving import raised_by

if TYPE_CHECKING:
    from collections.abc import Callable

    from rpcnb.runtime.completion import Done
    from rpcnb.runtime.serving import HandleSession
    from rpcnb.values import Value

__all__ = ["Calls", "Started", "read_records"]  # what takes its polls' answers apart stands in the protocol

POLL_SECONDS = 20.0  # a poll is answered within this time, so it tells that the server lives
_MOST_EARLY = 1024  # cancels that are remembered for calls still to come
_ROOM = 4 << 20  # bytes of output that wait for the client; then the cell waits
_SHORT = 200  # characters of an error for whose whole text there is no room
_SIZED = (str, bytes, bytearray, memoryview)
_LOOK = 0.02  # seconds after which a cell that waits looks again


class Started(Stoppable):
    """The ``done`` of a call that was started; exactly the first outcome counts.

    Attributes:
        id: The client's number.
        name: What runs, for people.
        since: ``time.monotonic()`` of its start.
        for_kernel: It runs on the notebook kernel's loop, or waits for it.
        args: Its arguments, until it has ended.
        nbytes: Of them.
    """

    __slots__ = ("_calls", "args", "finished", "for_kernel", "id", "name", "nbytes", "since", "timer")

    def __init__(self, calls: Calls, number: int, name: str, args: tuple[Value, ...] = ()) -> None:
        super().__init__()
        self._calls = calls
        self.timer: Callable[[], object] | None = None  # what cancels its time limit
        self.id = number
        self.name = name
        self.since = time.monotonic()
        self.finished = False
        self.for_kernel = False
        self.args = args
        self.nbytes = 0
        for value in args:
            if isinstance(value, _SIZED):
                self.nbytes += len(value)

    def __call__(self, result: Any = None) -> None:
        """Complete with an encoded return sequence."""
        self._calls.finish(self, Return(result))

    def error(self, error: BaseException) -> None:
        """Complete with an exception."""
        self._calls.finish(self, self._calls.raised(error))

    def emit(self, data: bytes) -> None:
        """Send part of its output while it runs; never waits."""
        self._calls.emit(self, data)

    @property
    def has_room(self) -> bool:
        """Tell whether the client keeps up with the output of its calls, or wants none of this one any more."""
        return self._calls.has_room or self.finished or self.cancelled

    def await_room(self) -> None:
        """Wait until it does, or nobody wants the output any more."""
        self._calls.await_room(self)


class Calls:
    """The started calls of one session.

    Args:
        session: Whose functions are called.
        most: Calls at once, those included whose outcome has not been collected.
        most_bytes: Of outcomes that have not been collected, and of arguments of calls that have not ended.
    """

    def __init__(self, session: HandleSession, most: int = 65536, most_bytes: int = 256 << 20) -> None:
        self._session = weakref.proxy(session)
        self._most = most
        self._most_bytes = most_bytes
        self._lock = threading.Lock()
        self._running: dict[int, Started] = {}
        self._early: dict[int, None] = {}  # cancelled before they came
        self._outcomes: list[bytes] = []
        self._kept = 0  # bytes of them
        self._held = 0  # bytes of the arguments of calls that have not ended
        self.takes = PeerLimits()  # what the client does
        self._waiting = 0  # bytes of output among them
        self._poll: Done | None = None
        self._polled = 0.0
        self._timed = False
        self._closed = False
        self._plain: deque[tuple[Started, int]] = deque()
        self._plain_runs = False
        self.in_thread: Started | None = None  # the one that a worker runs, also after the session's end
        # The servants of the session's connections, by lane.
        self.lanes: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()

    @property
    def running(self) -> list[Started]:
        """Calls that have not ended, oldest first."""
        with self._lock:
            return list(self._running.values())

    def serve(self, name: str) -> ServedFunction | None:
        """Return the function of this name for the session's client."""
        found = {START: self.start, NEXT: self.next, CANCEL: self.cancel, CANCEL_AT: self.cancel_at}.get(name)
        return None if found is None else ServedFunction(name, found, "raw")

    # -- requests: each gets its completion and the wire's values ---------------------------------------------------

    def start(self, done: Done, args: tuple[Value, ...]) -> None:
        """``rpcnb.start(call_id, timeout_s, handle, *args)``: begin a call and answer at once."""
        number, seconds, handle, *rest = _expect(args, START, (int, (int, float), int))
        call = Started(self, number, self._session.name_of(handle), tuple(rest))
        with self._lock:
            if number in self._running:
                raise ArgumentError(0, f"{number}, the number of a call that is running", "a new number")
            if len(self._running) + len(self._outcomes) >= self._most or len(self._plain) >= self._most:
                raise LimitExceeded(f"{self._most} started calls are not collected yet; collect some first")
            before = self._kept + self._held
            if before + call.nbytes > self._most_bytes and before:
                raise LimitExceeded(
                    f"started calls hold {before} bytes of arguments and outcomes, outcomes={self._most_bytes}; "
                    "collect some first"
                )
            self._held += call.nbytes
            cancelled = self._early.pop(number, self) is None
            self._running[number] = call
        done((0, None))
        if cancelled:
            call.stop()
            return
        if seconds > 0:
            call.timer = self._session.environment.later(seconds, call.stop)
        self._begin(call, handle)

    def _begin(self, call: Started, handle: int) -> None:
        session = self._session
        try:
            place = session.placement(CallFunc(handle, call.args))
        except BaseException as error:
            call.error(error)
            return
        if place == "kernel" and session.environment.run_in_kernel is not None:
            call.for_kernel = True
            session.environment.run_in_kernel(lambda: self._perform_if_wanted(call, handle))
        elif place in ("thread", "kernel"):
            with self._lock:
                self._plain.append((call, handle))
                if self._plain_runs:
                    return
                self._plain_runs = True
            try:
                session.environment.run_in_thread(self._run_plain)
            except LimitExceeded as error:
                self._refuse_plain(error)
        else:
            self._perform_if_wanted(call, handle)

    def _refuse_plain(self, error: LimitExceeded) -> None:
        """Answer what has been started of the plain functions: there is no worker for it."""
        with self._lock:
            refused, self._plain = self._plain, deque()
            self._plain_runs = False
        for call, _ in refused:
            call.error(error)

    def _run_plain(self) -> None:
        """In a worker: run what has been started of the plain functions, one at a time and in order."""
        while True:
            with self._lock:
                if not self._plain:
                    self._plain_runs = False
                    self.in_thread = None
                    return
                call, handle = self._plain.popleft()
                self.in_thread = call
            self._perform_if_wanted(call, handle)

    def _perform_if_wanted(self, call: Started, handle: int) -> None:
        """Perform a call, unless it was given up while it waited."""
        args = call.args  # before the look: who ends a call takes them away
        if call.finished:
            return
        token = CALL.set(call)
        try:
            self._session.async_call(handle, args, call)
        except BaseException as error:  # also that the session has ended meanwhile
            call.error(error)
        finally:
            CALL.reset(token)

    def next(self, done: Done, args: tuple[Value, ...]) -> None:
        """``rpcnb.next()``: wait for outcomes; returns their records, none when it took too long."""
        with self._lock:
            before, self._poll = self._poll, None
            data = self._take() if self._outcomes else None
            if data is None:
                self._poll = done
                self._polled = time.monotonic()
                arm = not self._timed
                self._timed = True
        if before is not None:
            before((66, b""))
        if data is not None:
            done((66, data))
            return
        done.gives_way = self.give_way  # type: ignore[attr-defined]  # a servant's completion has it
        if arm:
            self._session.environment.later(POLL_SECONDS, self._answer_in_time)

    def _take(self) -> bytes:
        """Return the records that wait, as many as the client takes at once. Lock held."""
        count = len(self._outcomes)
        if self._kept > self.takes.bytes:
            together = itertools.accumulate(map(len, self._outcomes))
            count = max(1, sum(nbytes <= self.takes.bytes for nbytes in together))
        data, self._outcomes = b"".join(self._outcomes[:count]), self._outcomes[count:]
        self._kept -= len(data)
        self._waiting = min(self._waiting, self._kept)
        return data

    def give_way(self) -> None:
        """Answer the poll with what there is; without one nothing is taken, as nobody would get it."""
        with self._lock:
            poll, self._poll = self._poll, None
            if poll is None:
                return
            data = self._take()
        poll((66, data))

    def _answer_in_time(self) -> None:
        with self._lock:
            self._timed = False
            left = self._polled + POLL_SECONDS - time.monotonic()
            waits = self._poll is not None
            if waits and left > 0.5:
                self._timed = True
        if waits and left > 0.5:
            self._session.environment.later(left, self._answer_in_time)
        elif waits:
            self.give_way()

    def cancel(self, done: Done, args: tuple[Value, ...]) -> None:
        """``rpcnb.cancel(call_id)``: end a call early; one that is not there yet will not begin."""
        (number,) = _expect(args, CANCEL, (int,))
        with self._lock:
            call = self._running.get(number)
            if call is None:
                self._early[number] = None
                if len(self._early) > _MOST_EARLY:
                    del self._early[next(iter(self._early))]
        done((0, None))
        if call is not None:
            call.stop()

    def cancel_at(self, done: Done, args: tuple[Value, ...]) -> None:
        """``rpcnb.cancel_at(lane, *ordinals)``: end requests of another connection of this session early."""
        lane, *ordinals = _expect(args, CANCEL_AT, (int,))
        done((0, None))
        servant = self.lanes.get(lane)
        for ordinal in ordinals:
            if servant is not None and isinstance(ordinal, int):
                servant.cancel_request(ordinal)

    # -- outcomes ------------------------------------------------------------------------------------------------

    def raised(self, error: BaseException) -> Raised:
        """Return what reports an exception."""
        return raised_by(self._session, error)

    def finish(self, call: Started, reply: Raised | Return) -> None:
        """Keep the outcome of a call for the poll; from any thread."""
        try:
            record = write_record(call.id, self.takes.fit(reply))  # type: ignore[arg-type]  # one of the two
            if len(record) > self.takes.bytes:
                self.takes.check_bytes(len(record), "encoded", "bytes_argument", self.takes.bytes)
        except BaseException as error:
            record = write_record(call.id, self.takes.fit(self.raised(error)))  # type: ignore[arg-type]  # likewise
        with self._lock:
            if call.finished:
                return
            if self._poll is None and self._kept + len(record) > self._most_bytes:
                record = write_record(call.id, self.takes.fit(self._shortened(reply)))  # type: ignore[arg-type]  # an error
            call.finished = True
            self._held -= call.nbytes
            call.args = ()
            self._running.pop(call.id, None)
            timer, call.timer = call.timer, None
            poll, data = self._keep(record)
        if timer is not None:
            timer()
        if poll is not None:
            poll((66, data))

    def _shortened(self, reply: Raised | Return) -> Raised:
        """Return what stands for an outcome for which there is no room: an error in few words."""
        if isinstance(reply, Raised):
            return Raised(reply.text[:_SHORT], reply.type_name[:_SHORT])
        text = f"{self._kept} bytes of outcomes are not collected, outcomes={self._most_bytes}; collect some first"
        return self.raised(LimitExceeded(text))

    def emit(self, call: Started, data: bytes) -> None:
        """Keep part of a call's output for the poll; one that the client does not take ends the call."""
        record = write_record(call.id, Emitted(data))
        try:
            self.takes.check_bytes(len(record), "shown", "bytes_argument", self.takes.bytes)
        except LimitExceeded as error:
            call.error(error)
            return
        with self._lock:
            if call.finished or call.cancelled:
                return
            self._waiting += len(record)
            poll, taken = self._keep(record)
        if poll is not None:
            poll((66, taken))

    @property
    def has_room(self) -> bool:
        """Tell whether the output that waits for the client is not too much yet."""
        return self._waiting < _ROOM

    def await_room(self, call: Started) -> None:
        """Wait until there is room, or nobody wants the output of ``call`` any more; an interrupt may end it."""
        while not (call.has_room or self._closed):
            time.sleep(_LOOK)

    def _keep(self, record: bytes) -> tuple[Done | None, bytes]:
        """Note a record; returns the poll that takes it at once with what else there is, if one waits."""
        self._outcomes.append(record)
        self._kept += len(record)
        poll, self._poll = self._poll, None
        return poll, self._take() if poll is not None else b""

    def close(self) -> None:
        """End all calls with their session."""
        with self._lock:
            running, self._poll = list(self._running.values()), None
            self._plain.clear()
            self._closed = True
            self._outcomes.clear()
            self._waiting = self._kept = 0
        for call in running:
            call.stop()


def _expect(args: tuple[Value, ...], name: str, kinds: tuple[Any, ...]) -> Any:
    if len(args) < len(kinds) or not all(map(isinstance, args, kinds)):
        raise ArgumentError(0, f"{args[: len(kinds)]!r} of {name}", f"{len(kinds)} numbers")
    return args
