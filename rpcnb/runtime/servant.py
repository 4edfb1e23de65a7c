"""The servant: performs the requests of one conversation on a serving session, in order, and answers them.

It is driven by whoever moves the bytes and never waits. :meth:`Servant.advance` performs what has arrived until input
runs out, a request is *parked* (its asynchronous completion has not come), or the conversation is over. A completion
may come from any thread: it queues the reply, then ``on_completed`` lets the driver flush and go on. Several
completions of one request, or one after the end, do nothing.

``route`` is the driver's word on where a call runs: it may take it over (to a worker thread, which calls
:meth:`Servant.perform`) and return True.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from rpcnb.errors import (
    CopyMismatch,
    FunctionNotFound,
    LimitExceeded,
    LocalProtocolError,
    ResultError,
    SessionClosed,
)
from rpcnb.protocol.codes import VERSION, Code
from rpcnb.protocol.endpoint import State
from rpcnb.protocol.messages import (
    CallFunc,
    CopyAck,
    CopyFromRemote,
    CopyToRemote,
    InitServer,
    Malformed,
    PayloadEnd,
    Raised,
    Return,
    Shutdown,
    Syscall,
    encode_packet,
)
from rpcnb.protocol.shortcut import CALL_BYTES, MOST_ARGS, MOST_TEXT, call_length, read_call, write_result
from rpcnb.runtime.completion import Stoppable, call_cancelled, is_ours
from rpcnb.runtime.current import CALL, SESSION
from rpcnb.runtime.environment import ENVIRONMENT, Environment
from rpcnb.runtime.handles import HandleKind
from rpcnb.runtime.local import LocalServingSession
from rpcnb.runtime.output import Output, staging
from rpcnb.runtime.serving import ServingSession, raised_by

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Iterator

    from rpcnb.protocol.endpoint import Endpoint
    from rpcnb.protocol.messages import Message, Reply
    from rpcnb.protocol.sequence import Buffer
    from rpcnb.values import TensorMeta

__all__ = ["Completion", "Servant"]

log = logging.getLogger(__name__)

_NOT_INITIALIZED = (
    "Check failed: (serving_session_ != nullptr) is false: "
    "Need to call InitRemoteSession first before any further actions"
)
_VOID = Return()
_PATIENCE = 0.0005  # seconds for which finished replies wait for others that go out with them
_TURN = 0.002  # seconds of one turn: a burst of requests must not hold up other sessions
_MOST_STOPPED = 4096  # cancels that are remembered for requests still to come
_ENOUGH = 1 << 16  # bytes of replies that go out at once
_FUNCTION = HandleKind.FUNCTION  # a member by its class's name costs a look-up
_CONGESTED = 4 << 20  # bytes of unread replies beyond which no further request is performed


# What a subclass may override so that the short way of calls would pass it by.
_CALLING = ("async_call", "call", "call_plain", "decode_args", "encode_return", "placement")


def _as_it_is(reply: Reply) -> Reply:
    return reply


def _nothing() -> None:
    pass


def _ignore(name: str) -> None:
    pass


class Completion(Stoppable):
    """The ``done`` of one request in progress; exactly the first call counts.

    Attributes:
        name: What is in progress, for people.
        since: ``time.monotonic()`` of its start.
        flush: Its reply is sent at once even if it did not park: stock does so for calls, copies and stream waits.
        dropped: The conversation is over; nothing is answered.
        gives_way: What completes it when a further request arrives behind it; None: that waits.
    """

    __slots__ = (
        "_finish", "_servant", "dropped", "finished", "flush", "gives_way", "name", "since",
    )  # fmt: skip

    def __init__(self, servant: Servant, name: str, finish: Callable[[Any], Reply], flush: bool) -> None:
        super().__init__()
        self._servant = servant
        self._finish = finish
        self.flush = flush
        self.name = name
        self.since = time.monotonic()
        self.finished = False
        self.dropped = False
        self.gives_way: Callable[[], object] | None = None

    @property
    def cancelled(self) -> bool:
        """Tell whether nobody waits for the result any more."""
        return self._stopped or self.dropped

    def __call__(self, result: Any = None) -> None:
        """Complete with a result."""
        self._servant.complete(self, self._finish, result)

    def error(self, error: BaseException) -> None:
        """Complete with an exception."""
        if not (self.finished or self.dropped):  # its text is made without the lock: it may take as long as it likes
            self._servant.complete(self, _as_it_is, self._servant.exception(error))


class Servant:
    """Performs one conversation's requests.

    Args:
        endpoint: The server's side of the conversation.
        environment: What the server's sessions share.
        name: Of the server, for messages (stock: ``SockServerLoop``).
        on_completed: Called, in the completing thread, after a parked request has got its reply.
        on_parked: Called with the name of a request that has been parked, under the servant's lock.
        on_reply: Called when a completion has queued a reply that is to be sent at once.
        route: Called with a request and its place (``thread``, ``loop`` or ``kernel``); takes it over and returns True,
            or returns False to have it performed here and now.
        refusal: Why no session can be opened now; the answer to kInitServer, after which the conversation is over.
        why_refused: Says why no plain function can be run now; empty if one can.
        plain: Host only synchronous sessions, as a blocking server does.
        shares: For a further connection of a session, a lane: returns the session, or None once that is over.
        lane: Number of the lane; 0 for the connection that opens the session, and ends it.
    """

    def __init__(
        self,
        endpoint: Endpoint,
        environment: Environment,
        *,
        name: str = "server",
        on_completed: Callable[[], None] = _nothing,
        on_parked: Callable[[str], None] = _ignore,
        on_reply: Callable[[], None] = _nothing,
        route: Callable[[Message, str], bool] | None = None,
        refusal: str = "",
        why_refused: Callable[[], str] = str,
        plain: bool = False,
        shares: Callable[[], ServingSession | None] | None = None,
        lane: int = 0,
    ) -> None:
        self.endpoint = endpoint
        self.shares = shares
        self.lane = lane
        self.ordinal = 0  # of the request in progress, or the last one; kInitServer is the first
        self._stop_at = 0  # the request that was cancelled while in progress
        self._stopped: set[int] = set()  # cancelled before they came
        self.environment = environment
        self.name = name
        self.on_completed = on_completed
        self.on_parked = on_parked
        self.on_reply = on_reply
        self.route = route
        self.refusal = refusal
        self.why_refused = why_refused
        self.plain = plain
        self.lock = threading.RLock()
        self.output = Output()
        self.session: ServingSession | None = None
        self.parked: Completion | None = None
        self.running: str | None = None  # what a worker is performing
        self._plain_session: LocalServingSession | None = None  # the session, if nobody overrides how it calls
        self.extended = False  # the peer is rpcnb: exceptions carry class and traceback
        self.over = False
        self.copies = 0  # copies so far
        self.more = False  # the last turn ended before what has arrived
        self.congested = False  # it ended because replies have not left: to be tried again as soon as they have
        self._copy: tuple[CopyToRemote, memoryview | None, BaseException | None] | None = None
        self._cancel_init: Callable[[], object] | None = None
        self._constructing = ""  # name of the session constructor that runs
        self._process = os.getpid()
        self.peer = ""  # address of the client
        self.proof: tuple[str, str] | None = None  # the look-up that was the proof, and what answers it
        endpoint.sink_for = self._sink_for

    # -- driving -------------------------------------------------------------------------------------------------

    def advance(self) -> bool:
        """Perform the requests that have arrived, as far as possible now.

        A driver with ``route`` gets a turn of bounded length; then ``more`` is set, and it should come again soon.

        Returns:
            True if one was passed to where it runs: from then on the conversation may be somebody else's.

        Raises:
            RemoteProtocolError: The peer broke the framing; the conversation is over.
        """
        self.more = self.congested = False
        begun = time.monotonic()
        while not self.over and self.running is None:
            parked = self.parked
            if parked is not None:
                if parked.gives_way is None or not self.endpoint.buffered:
                    return False
                parked.gives_way()
                if self.parked is parked:
                    return False  # another thread is completing it, and calls again
                continue
            if self.route is not None and time.monotonic() - begun > _TURN:
                self.more = True
                return False
            if self.output.size > _CONGESTED:
                self.congested = True
                return False  # the client does not read its replies; go on when it does
            with self.lock:
                message = self.endpoint.next_message()
            if message is None:
                return False
            if type(message) is not PayloadEnd:
                self.ordinal += 1
                if self._stopped and self._was_stopped(message):
                    continue
            if self.route is not None:
                place = self._placement(message)
                if place != "any":
                    refusal = self.why_refused() if place == "thread" else ""
                    if refusal:
                        message = Malformed(LimitExceeded(refusal))
                    elif self.route(message, place):
                        return True
            self.perform(message)
        return False

    @property
    def cancelled(self) -> bool:
        """Tell whether nobody waits for the request in progress any more."""
        return self.over or self._stop_at == self.ordinal

    def cancel_request(self, ordinal: int) -> None:
        """End the ``ordinal``-th request early, or do not begin it; from any thread."""
        with self.lock:
            if ordinal < self.ordinal or self.over:
                return  # answered
            if ordinal > self.ordinal:
                if len(self._stopped) < _MOST_STOPPED:
                    self._stopped.add(ordinal)
                return
            self._stop_at = ordinal
            parked = self.parked
        if parked is not None:
            parked.stop()

    def _was_stopped(self, message: Message) -> bool:
        """Answer a call that was cancelled before it came; anything else is performed all the same."""
        with self.lock:
            stopped = self.ordinal in self._stopped
            self._stopped = {ordinal for ordinal in self._stopped if ordinal > self.ordinal}
        if not stopped or type(message) is not CallFunc:
            return False
        self.refuse_cancelled()
        return True

    def refuse_cancelled(self) -> None:
        """Answer a call that was given up before it began."""
        self._answer(self.exception(call_cancelled()))

    def _placement(self, message: Message) -> str:
        """Tell where a request should be performed: only calls and copies within a device can take long."""
        if type(message) is CallFunc:
            session = self.session
            return "any" if session is None else session.placement(message)
        return "thread" if type(message) is Syscall and message.code is Code.COPY_AMONG_REMOTE else "any"

    def describe(self, message: Message) -> str:
        """Name what a request does, for people."""
        if isinstance(message, CallFunc) and isinstance(self.session, LocalServingSession):
            entry = self.session.table.entry(message.handle)
            return getattr(entry.thing, "name", "call") if entry is not None else "call"
        return message.code.name if isinstance(message, Syscall) else type(message).__name__

    def perform(self, message: Message) -> None:
        """Perform one request; afterwards it is answered or parked."""
        try:
            if type(message) is CallFunc:
                self._call(message)
            else:
                self._dispatch(message)
        except BaseException as error:  # a function's sys.exit() is its own failure, not the server's end
            self._end_child(error)
            self._answer(self.exception(error))
            if is_ours(error):
                raise

    def _end_child(self, error: BaseException) -> None:
        """End a child that a function has forked and that leaves it by an exception: nobody waits for it here."""
        if os.getpid() != self._process:
            code = getattr(error, "code", 1) if issubclass(type(error), SystemExit) else 1
            os._exit(code if isinstance(code, int) else 0 if code is None else 1)

    def call_quickly(self, data: memoryview, nbytes: int) -> tuple[bytes, int]:
        """Perform plain calls that the bytes begin with, in a worker inside :meth:`entered`, by the short way.

        It stops before what is not plain, and after a call that took long, so that finished replies need not wait.

        Returns:
            The replies, and how many of the bytes have been served; none if the general way must be taken.
        """
        session = self._plain_session
        if session is None or self._stopped:
            return b"", 0
        pos, replies = 0, b""
        give_up = 0.0
        while nbytes - pos >= CALL_BYTES:
            # Most often the bytes are one call.
            found, length = read_call(data, nbytes) if not pos else None, nbytes
            if found is None:
                length = call_length(data, pos)
                if not CALL_BYTES <= length <= nbytes - pos:
                    break
                found = read_call(data[pos : pos + length], length)
            entry = session.table.entry(found[0]) if found is not None else None
            if found is None or entry is None or entry.kind is not _FUNCTION or entry.thing.run != "thread":
                break
            function = entry.thing
            self.running = function.name
            self.ordinal += 1
            pos += length
            try:
                result = function.call(*found[1])
                reply = write_result(result)
                others = [] if reply is not None else self._encode(Return(session.encode_return(result)))
            except BaseException as error:  # in a worker, which no signal reaches: the function raised it
                self._end_child(error)
                reply, others = None, self._encode(self.exception(error))
            self.running = None
            if self.over:
                return b"", pos
            if reply is None:  # perhaps bulk: it goes out from where it is
                with self.lock:
                    self.output.add([replies, *others])
                return b"", pos
            if pos == nbytes and not replies:
                return reply, pos  # a single call, the commonest
            replies += reply
            now = time.monotonic()
            give_up = give_up or now + _PATIENCE
            if now > give_up or len(replies) > _ENOUGH:
                break
        return replies, pos

    def _encode(self, reply: Return | Raised) -> list[Buffer]:
        return encode_packet(self.endpoint.takes.fit(reply))

    @contextmanager
    def entered(self) -> Iterator[None]:
        """Make the session the current one for everything that a worker runs meanwhile."""
        tokens = SESSION.set(self._plain_session), CALL.set(self)
        try:
            yield
        finally:
            SESSION.reset(tokens[0])
            CALL.reset(tokens[1])

    def _dispatch(self, message: Message) -> None:
        if isinstance(message, Syscall):
            self._syscall(message)
        elif isinstance(message, CopyFromRemote):
            self._copy_from(message)
        elif isinstance(message, CopyToRemote):
            self._copy_to_begin(message)
        elif isinstance(message, PayloadEnd):
            self._copy_to_end()
        elif isinstance(message, Malformed):
            raise message.error
        elif isinstance(message, InitServer):
            self._initialize(message)
        else:
            assert isinstance(message, Shutdown), message
            self.over = True

    def _answer(self, reply: Reply) -> None:
        """Queue a reply; a result that cannot be encoded becomes exactly one exception."""
        with self.lock:
            if self.over or self.endpoint.state is not State.BUSY:
                return
            try:
                self.output.add(self.endpoint.send(reply))
            except BaseException as error:  # also struct.error: a device number of 40 bits
                self.output.add(self.endpoint.send(self.exception(error)))
            session = self.session
        if isinstance(session, LocalServingSession) and session.table.exhausted:
            log.warning("%s: session ended after too many handles that were never issued", self.name)
            self.over = True

    def exception(self, error: BaseException) -> Raised:
        """Return the reply that reports ``error``; a stock peer gets the text alone."""
        told = raised_by(self.session or ServingSession(), error, self.extended)
        name, self._constructing = self._constructing, ""
        if name:
            told.text = f"Server[{self.name}]: Error caught from session constructor {name}:\n{told.text}"
        return told

    # -- asynchronous completions ----------------------------------------------------------------------------------

    def _begin(
        self, name: str, finish: Callable[[Any], Reply], start: Callable[[Completion], object], flush: bool = True
    ) -> None:
        """Start an asynchronous operation; park unless it completed before returning."""
        completion = Completion(self, name, finish, flush)
        try:
            start(completion)
        except BaseException as error:
            completion.error(error)
            if is_ours(error):
                raise
        with self.lock:
            if not completion.finished and not self.over:
                self.parked = completion
                self.on_parked(completion.name)
            stopped = self.parked is completion and self._stop_at == self.ordinal
        if stopped:  # cancelled while it was being started
            completion.stop()

    def complete(self, completion: Completion, make: Callable[[Any], Reply], outcome: Any) -> None:
        """Answer the request of ``completion``, once."""
        with self.lock:
            if completion.finished:
                return
            completion.finished = True
            if completion.dropped:
                if isinstance(outcome, ServingSession):
                    outcome.shutdown()  # made for a client that is gone
                return
            try:
                reply = make(outcome)
            except BaseException as error:
                reply = self.exception(error)
            self._answer(reply)
            resumed = self.parked is completion
            if resumed:
                self.parked = None
        if resumed or completion.flush:
            self.on_reply()
        if resumed:
            self.on_completed()

    def cancel(self) -> None:
        """End the conversation: nobody waits for what is parked; the session is shut down."""
        with self.lock:
            if self.over and self.session is None and self._cancel_init is None:
                return
            self.over = True
            parked, self.parked = self.parked, None
            session, self.session, self._plain_session = self.session, None, None
            cancel_init, self._cancel_init = self._cancel_init, None
        if parked is not None:
            parked.dropped = True
        if cancel_init is not None:
            cancel_init()
        if session is not None and self.shares is None:
            try:
                session.shutdown()
            except BaseException as error:
                log.exception("%s: shutdown of %s failed", self.name, type(session).__name__)
                if is_ours(error):
                    raise

    # -- requests ------------------------------------------------------------------------------------------------

    def _ready(self) -> ServingSession:
        session = self.session
        if session is None:
            raise LocalProtocolError(_NOT_INITIALIZED)
        if self.plain and session.is_async:
            raise LocalProtocolError("Cannot host an async session in a non-Event driven server")
        return session

    def _call(self, message: CallFunc) -> None:
        session = self.session
        if session is None or self.plain:
            session = self._ready()
        elif (local := self._plain_session) is not None:
            # A plain function of a plain session, the commonest: 2.5 us less than by a completion.
            token = CALL.set(self)
            try:
                values = local.call_plain(message.handle, message.args)
            finally:
                CALL.reset(token)
            if values is not None:
                self._answer(Return(values))
                self.on_reply()
                return
        name = self.describe(message)
        self._begin(name, Return, lambda done: session.async_call(message.handle, message.args, done))

    def _copy_from(self, message: CopyFromRemote) -> None:
        session, meta, nbytes = self._ready(), message.meta, message.nbytes
        self._check_copy(meta, nbytes)
        view = _direct(session, meta, nbytes)
        if view is not None:
            self._answer(CopyAck(view))
            return
        data = staging(nbytes)
        self._begin(
            "copy from", lambda _: CopyAck(data), lambda done: session.async_copy_from(meta, data, nbytes, done)
        )

    def _copy_to_begin(self, message: CopyToRemote) -> None:
        """Say where the data goes before it is received; a refused copy is skipped, then answered."""
        view: memoryview | None = None
        refused: BaseException | None = None
        direct = False
        try:
            session = self._ready()
            self._check_copy(message.meta, message.nbytes)
            view = _direct(session, message.meta, message.nbytes)
            direct = view is not None
            if view is None:
                view = staging(message.nbytes)
        except BaseException as error:
            refused = error
        self._copy = (message, None if direct else view, refused)
        self.endpoint.receive_payload(view)

    def _check_copy(self, meta: TensorMeta, nbytes: int) -> None:
        """Bound a copy by the size it claims, before memory is made for it (protocol.md 5.2)."""
        self.copies += 1
        if nbytes > meta.nbytes:
            raise CopyMismatch(f"copy of {nbytes} bytes is larger than its tensor of {meta.nbytes} bytes")

    def _copy_to_end(self) -> None:
        assert self._copy is not None
        message, staged, refused = self._copy
        self._copy = None
        if refused is not None:
            raise refused
        if staged is None:
            self._answer(_VOID)
            return
        session, data = self._ready(), staged
        self._begin(
            "copy to", lambda _: _VOID, lambda done: session.async_copy_to(data, message.meta, message.nbytes, done)
        )

    def _syscall(self, message: Syscall) -> None:
        if self.proof is not None and message.args == (self.proof[0],):
            self._answer(Return((self.proof[1],)))
            self.proof = None
            return
        session = self._ready()
        if message.code is Code.DEV_STREAM_SYNC:
            device, stream = message.args
            self._begin(
                "stream wait",
                lambda _: _VOID,
                lambda done: session.async_stream_wait(device, int(stream or 0), done),  # type: ignore[arg-type]  # checked
            )
            return
        self._begin(message.code.name, _single, lambda done: session.async_syscall(message, done), flush=False)

    def _sink_for(self, handle: int, args: list[Any], nbytes: int) -> Any:
        session = self.session
        return None if session is None else session.sink_for(handle, args, nbytes)

    # -- init ----------------------------------------------------------------------------------------------------

    def _initialize(self, message: InitServer) -> None:
        if message.version != VERSION:
            raise LocalProtocolError(
                f"Check failed: client_protocol_ver == server_protocol_ver ({message.version} vs. {VERSION}) : "
                f"Server[{self.name}]: Client protocol version mismatch with the server  "
                f"server protocol={VERSION}, client protocol={message.version}"
            )
        if self.session is not None:
            raise LocalProtocolError(
                "Check failed: (serving_session_ == nullptr) is false: Server has already been initialized"
            )
        if self.refusal:
            self._answer(self.exception(LimitExceeded(self.refusal)))
            self.over = True
            return
        if self.shares is not None:
            shared = self.shares()
            if shared is None:
                raise SessionClosed("the session of this lane is over")
            self._answer(self._initialized(shared))
            return
        name, constructor, args = self._constructor(message)
        self._constructing = name
        token = ENVIRONMENT.set(self.environment)
        try:
            made = constructor(*args)
        finally:
            ENVIRONMENT.reset(token)
        if hasattr(made, "__await__"):
            self._begin("init", self._initialized, lambda done: self._await_session(made, done))
        else:
            self._answer(self._initialized(made))

    def _await_session(self, made: Coroutine[Any, Any, Any], done: Completion) -> None:
        self._cancel_init = self.environment.spawn(made, done)

    def _initialized(self, made: Any) -> Reply:
        self._cancel_init = None
        name, self._constructing = self._constructing, ""
        if not isinstance(made, ServingSession):
            kind = type(made).__name__
            raise ResultError(
                f"Server[{self.name}]: Constructor {name} need to return an RPCModule: a session; it returned {kind}"
            )
        if self.over:
            if self.shares is None:
                made.shutdown()
        else:
            self.session = made
            if self.shares is None and isinstance(made, LocalServingSession):
                made.peer = self.peer
            if self.extended and isinstance(made, LocalServingSession):
                made.calls.lanes[self.lane] = self
                made.calls.takes = self.endpoint.takes.in_records()
            limits = self.environment.limits
            ordinary = limits.args >= MOST_ARGS and limits.text >= MOST_TEXT
            if (
                ordinary
                and isinstance(made, LocalServingSession)
                and all(getattr(type(made), name) is getattr(LocalServingSession, name) for name in _CALLING)
            ):
                self._plain_session = made
        return _VOID

    def _constructor(self, message: InitServer) -> tuple[str, Callable[..., Any], tuple[Any, ...]]:
        name, *args = message.args or ("rpc.LocalSession",)
        if not isinstance(name, str):
            raise TypeError(f"expected the name of a session constructor, got {type(name).__name__}")
        entry = self.environment.registry.get(name)
        if entry is not None:
            return name, entry.call, tuple(args)
        if name == "rpc.LocalSession":
            return name, self.environment.local_session or LocalServingSession, tuple(args)
        known = self.environment.constructors.get(name)
        if known is None:
            raise FunctionNotFound(
                f"Check failed: (fconstructor.has_value()) is false:  Cannot find session constructor {name}"
            )
        return name, known, tuple(args)


def _direct(session: ServingSession, meta: TensorMeta, nbytes: int) -> memoryview | None:
    """Return the memory that the socket uses itself, as bytes, whose number is not taken on trust."""
    view = session.direct(meta, nbytes)
    if view is None:
        return None
    if view.nbytes != nbytes:
        raise CopyMismatch(f"{type(session).__name__} has {view.nbytes} bytes for a copy of {nbytes} bytes")
    return view if view.ndim == view.itemsize == 1 else view.cast("B")


def _single(result: Any) -> Reply:
    return _VOID if result is None else Return((result,))
