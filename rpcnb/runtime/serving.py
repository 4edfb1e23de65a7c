"""Serving sessions: what answers a client's requests.

:class:`ServingSession` is the interface, TVM's ``RPCSession`` seen from the server: synchronous methods, and four
asynchronous ones (call, copy to, copy from, stream wait) that end in a completion callback.
:class:`LocalServingSession` serves this process. Subclass it method by method::

    class SlowDevice(rpcnb.LocalServingSession):
        is_async = True

        def async_call(self, handle, args, done):
            later(0.05, super().async_call, handle, args, done)

    rpcnb.Server(session=SlowDevice)

``done(result)`` or ``done.error(exception)`` must be called once, from any thread; later calls do nothing.
"""

from __future__ import annotations

import contextvars
import functools
import traceback
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from rpcnb.errors import InvalidHandle, ResultError, SessionClosed
from rpcnb.protocol.codes import Code, Limits
from rpcnb.protocol.messages import Raised
from rpcnb.runtime.current import SESSION
from rpcnb.runtime.registry import REGISTRY, Registered, Registry
from rpcnb.runtime.tasks import call_cancelled, later_anywhere, spawn_anywhere, thread_anywhere
from rpcnb.values import (
    NULL,
    Device,
    DType,
    Pointer,
    TensorMeta,
    Value,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from rpcnb.protocol.messages import CallFunc, Syscall
    from rpcnb.protocol.reader import Sink
    from rpcnb.runtime.cells import Cells
    from rpcnb.runtime.local import LocalServingSession

__all__ = [
    "Callback",
    "Done",
    "Environment",
    "Module",
    "ServedFunction",
    "ServingSession",
    "Shape",
    "current_session",
    "workpath",
]


class Done(Protocol):
    """The completion of an asynchronous operation; exactly the first call counts."""

    @property
    def cancelled(self) -> bool:
        """Tell whether nobody waits any more."""

    def __call__(self, result: Any = None) -> None:
        """Complete with a result."""

    def error(self, error: BaseException) -> None:
        """Complete with an exception."""


def raised_by(session: ServingSession, error: BaseException) -> Raised:
    """Return the session's report of an exception, also of one that cannot say what it is."""
    try:
        return session.send_exception(error)
    except Exception as broken:
        return Raised(f"{type(error).__name__} without a text: {type(broken).__name__} while making it")


class Stoppable:
    """A completion whose operation can be ended early for its client."""

    __slots__ = ("_stop", "_stopped")

    def __init__(self) -> None:
        self._stop: Callable[[], object] | None = None
        self._stopped = False

    @property
    def cancelled(self) -> bool:
        """Tell whether nobody waits for the result any more."""
        return self._stopped

    def bind(self, stop: Callable[[], object]) -> None:
        """Say what ends the operation early."""
        self._stop = stop
        if self._stopped:
            stop()

    def stop(self) -> None:
        """Cancel for the client: a coroutine ends by CancelledError; anything else is answered now, and may ask."""
        self._stopped = True
        if self._stop is not None:
            self._stop()
        else:
            self.error(call_cancelled())

    def error(self, error: BaseException) -> None:
        """Complete with an exception; each kind of completion says how."""


def bind(done: Done, stop: Callable[[], object]) -> None:
    """Tell a completion what ends its operation early, if it wants to know."""
    take = getattr(done, "bind", None)
    if take is not None:
        take(stop)


@dataclass
class Environment:
    """What the sessions of one server share.

    Attributes:
        registry: Functions that clients find.
        native: Compiled libraries may be loaded and linked.
        expose_ffi: All globals of apache-tvm-ffi may be called, not only the allow-list.
        ffi_names: Globals of apache-tvm-ffi that may be called besides the allow-list: what the operator loaded.
        trusted_paths: File names may leave the session's directory, as in stock TVM.
        default_run: Where plain functions run unless their registration says otherwise.
        spawn: Starts an awaitable and completes ``done`` with its outcome; returns what cancels it.
        run_in_thread: Runs a function in a worker.
        run_in_kernel: Runs a function on the notebook kernel's loop; None where there is none.
        later: Calls a function after some seconds; returns what cancels that.
        local_session: Default session constructor of this server; None for the registry's ``rpc.LocalSession``.
        constructors: Further session constructors of this server, by name (``rpc.Connect``).
        cells: Runs clients' source; None where the operator gave no consent.
        status: Says how the server is, now or a moment later: what ``rpcnb.status()`` answers.
    """

    registry: Registry = REGISTRY
    limits: Limits = field(default_factory=Limits)
    native: bool = False
    expose_ffi: bool = False
    ffi_names: frozenset[str] = frozenset()
    trusted_paths: bool = False
    default_run: str = "thread"
    spawn: Callable[[Any, Done], Callable[[], object]] = spawn_anywhere
    run_in_thread: Callable[[Callable[[], None]], object] = thread_anywhere
    run_in_kernel: Callable[[Callable[[], None]], object] | None = None
    later: Callable[[float, Callable[[], object]], Callable[[], object]] = later_anywhere
    local_session: Callable[..., Any] | None = None
    constructors: dict[str, Callable[..., Any]] = field(default_factory=dict)
    cells: Cells | None = None
    status: Callable[[Callable[[dict[str, Any]], object]], object] = lambda say: say({"state": "READY"})


_ENVIRONMENT: contextvars.ContextVar[Environment | None] = contextvars.ContextVar("rpcnb_environment", default=None)


def current_session() -> LocalServingSession | None:
    """Inside a registered function: the session that is calling it. Elsewhere None."""
    session: LocalServingSession | None = SESSION.get()
    return session


def workpath(name: str = "") -> str:
    """Inside a registered function: the absolute path of ``name`` in the calling session's directory.

    The process's current directory is never changed, so use this where a stock server's function would open a
    relative path.

    Raises:
        LookupError: No session is calling.
    """
    session = SESSION.get()
    if session is None:
        raise LookupError("workpath() works inside a registered function that a session is calling")
    return str(session.files.path(name))


class Module:
    """A module that clients can hold: functions by name, and imported modules.

    Args:
        functions: Its functions.
        kind: Its type key, as in TVM.
    """

    def __init__(self, functions: dict[str, Callable[..., Any]] | None = None, kind: str = "python") -> None:
        self.kind = kind
        self._functions = functions or {}
        self._imports: list[Module] = []

    def get_function(self, name: str, query_imports: bool = False) -> Callable[..., Any] | None:
        """Return the function of this name, or None."""
        found = self._functions.get(name)
        if found is None and query_imports:
            for child in self._imports:
                found = child.get_function(name, True)
                if found is not None:
                    return found
        return found

    def import_module(self, child: Module) -> None:
        """Make the functions of ``child`` reachable through this module."""
        self._imports.append(child)


class Shape(tuple[int, ...]):
    """The result of ``ffi.Shape``."""

    __slots__ = ()


class ServedFunction:
    """A function that a client holds: how to call it, and where it runs."""

    __slots__ = ("__weakref__", "call", "context", "kind", "name", "run", "source")

    def __init__(
        self,
        name: str,
        call: Callable[..., Any],
        kind: str = "plain",
        run: str = "thread",
        source: Registered | None = None,
    ) -> None:
        self.name = name
        self.call = call
        self.kind = kind
        self.run = run if kind == "plain" else "loop"
        self.source = source
        self.context = source.context if source is not None else None

    def follow(self, entry: Registered) -> None:
        """Serve what a notebook's cell has registered anew, if it is of the same kind: the handle tells that."""
        if entry.kind == self.kind:
            self.call, self.context, self.source = entry.call, entry.context, entry


class Callback:
    """The ``done`` that a callback function receives: ``done(result)`` or ``done.error(exception)``, once."""

    __slots__ = ("_done", "_encode")

    def __init__(self, done: Done, encode: Callable[[Any], tuple[Value, ...]]) -> None:
        self._done = done
        self._encode = encode

    @property
    def cancelled(self) -> bool:
        """Tell whether the client is gone or has cancelled; the result will be dropped."""
        return self._done.cancelled

    def __call__(self, result: Any = None) -> None:
        """Complete the call with ``result``; what cannot be encoded becomes one remote exception."""
        if self._done.cancelled:
            self._done.error(SessionClosed("nobody waits for the result any more"))  # what the call used is given up
            return
        try:
            values = self._encode(result)
        except Exception as error:
            self._done.error(error)
        else:
            self._done(values)

    def error(self, error: BaseException | str) -> None:
        """Complete the call with an exception (or a message)."""
        self._done.error(error if isinstance(error, BaseException) else RuntimeError(error))


Method = TypeVar("Method", bound="Callable[..., None]")


def errors_to_done(method: Method) -> Method:
    """Give what an asynchronous method raises to its ``done``: a subclass may run it late, where nobody looks."""

    @functools.wraps(method)
    def call(*args: Any) -> None:
        try:
            method(*args)
        except (Exception, SystemExit) as error:
            args[-1].error(error)

    return call  # type: ignore[return-value]  # the same parameters


class ServingSession:
    """What answers requests at a server; every method may raise, which the client sees as a remote error.

    The base class refuses everything; its asynchronous methods call the synchronous ones.

    Attributes:
        is_async: The asynchronous methods complete later, so only an event-driven server may host this session.
    """

    is_async = False

    def get_function(self, name: str) -> Pointer:
        """Return a handle of the global function ``name``, or NULL."""
        return NULL

    def call(self, handle: int, args: tuple[Value, ...]) -> tuple[Value, ...]:
        """Call a function; returns the encoded return sequence (see :meth:`encode_return`)."""
        raise InvalidHandle(f"handle {handle:#x} was never issued in this session")

    def free_handle(self, handle: int) -> None:
        """Release one reference."""

    def placement(self, request: CallFunc) -> str:
        """Tell where a call runs: ``loop``, ``thread``, ``kernel``, or ``any`` where the driver happens to be."""
        return "any"

    def direct(self, meta: TensorMeta, nbytes: int) -> memoryview | None:
        """Return the memory at ``meta`` if the socket may use it directly, so that no copy method is called."""
        return None

    def sink_for(self, handle: int, args: Sequence[Value], nbytes: int) -> Sink | None:
        """Return where a bulk bytes argument of a call goes while it arrives; None for memory."""
        return None

    def copy_to_remote(self, data: memoryview, meta: TensorMeta, nbytes: int) -> None:
        """Write ``data`` at ``meta``."""
        raise InvalidHandle(f"handle {meta.data:#x} was never issued in this session")

    def copy_from_remote(self, meta: TensorMeta, into: memoryview, nbytes: int) -> None:
        """Read ``nbytes`` bytes at ``meta`` into ``into``."""
        raise InvalidHandle(f"handle {meta.data:#x} was never issued in this session")

    def copy_among_remote(self, source: TensorMeta, target: TensorMeta, stream: int) -> None:
        """Copy between two tensors of this session."""
        raise InvalidHandle(f"handle {source.data:#x} was never issued in this session")

    def set_device(self, device: Device) -> None:
        """Make ``device`` the current one."""

    def get_attribute(self, device: Device, kind: int) -> Value:
        """Answer an attribute query."""
        return None

    def allocate(self, device: Device, nbytes: int, alignment: int, hint: DType) -> Pointer:
        """Allocate plain bytes; returns a data handle."""
        raise ResultError(f"session {type(self).__name__} allocates no memory")

    def allocate_tensor(self, meta: TensorMeta, scope: str | None) -> Pointer:
        """Allocate memory for a tensor; returns a data handle."""
        return self.allocate(meta.device, meta.nbytes, 64, meta.dtype)

    def free_data(self, device: Device, handle: int) -> None:
        """Free memory that was allocated."""

    def create_stream(self, device: Device) -> Pointer:
        """Make a stream."""
        return NULL

    def free_stream(self, device: Device, stream: int) -> None:
        """Free a stream."""

    def set_stream(self, device: Device, stream: int) -> None:
        """Make a stream the current one."""

    def current_stream(self, device: Device) -> Pointer:
        """Return the current stream."""
        return NULL

    def stream_sync(self, device: Device, stream: int) -> None:
        """Wait for a stream."""

    @errors_to_done
    def async_call(self, handle: int, args: tuple[Value, ...], done: Done) -> None:
        """Call a function; ``done`` gets the encoded return sequence."""
        done(self.call(handle, args))

    @errors_to_done
    def async_copy_to(self, data: memoryview, meta: TensorMeta, nbytes: int, done: Done) -> None:
        """Write ``data`` at ``meta``; ``data`` is valid until ``done`` has been called."""
        self.copy_to_remote(data, meta, nbytes)
        done()

    @errors_to_done
    def async_copy_from(self, meta: TensorMeta, into: memoryview, nbytes: int, done: Done) -> None:
        """Read into ``into``; it is valid until ``done`` has been called."""
        self.copy_from_remote(meta, into, nbytes)
        done()

    @errors_to_done
    def async_stream_wait(self, device: Device, stream: int, done: Done) -> None:
        """Call ``done`` when the stream's work has ended."""
        self.stream_sync(device, stream)
        done()

    def async_syscall(self, request: Syscall, done: Done) -> None:
        """Perform any other request; ``done`` gets its single result."""
        done(_SYSCALLS[request.code](self, *request.args))

    def send_exception(self, error: BaseException) -> Raised:
        """Turn an exception into the reply that reports it: its text, and for rpcnb peers class and traceback."""
        frames = traceback.extract_tb(error.__traceback__)
        own = [frame for frame in frames if "/rpcnb/runtime/" not in frame.filename.replace("\\", "/")]
        lines = traceback.format_list(own) if own else []
        return Raised(str(error) or type(error).__name__, type(error).__name__, "".join(lines))

    def shutdown(self) -> None:
        """Release everything; called once, when the conversation is over."""


def _free_handle(session: ServingSession, handle: Pointer | None) -> None:
    if handle:
        session.free_handle(handle)


_SYSCALLS: dict[Code, Callable[..., Any]] = {
    Code.GET_GLOBAL_FUNC: lambda session, name: session.get_function(name),
    Code.FREE_HANDLE: _free_handle,
    Code.DEV_SET_DEVICE: lambda session, device: session.set_device(device),
    Code.DEV_GET_ATTR: lambda session, device, kind: session.get_attribute(device, kind),
    Code.DEV_ALLOC_DATA: lambda session, *args: session.allocate(*args),
    Code.DEV_ALLOC_DATA_WITH_SCOPE: lambda session, meta, scope: session.allocate_tensor(meta, scope),
    Code.DEV_FREE_DATA: lambda session, device, handle: session.free_data(device, int(handle or 0)),
    Code.COPY_AMONG_REMOTE: lambda session, source, target, stream: session.copy_among_remote(
        source, target, int(stream or 0)
    ),
    Code.DEV_CREATE_STREAM: lambda session, device: session.create_stream(device),
    Code.DEV_FREE_STREAM: lambda session, device, stream: session.free_stream(device, int(stream or 0)),
    Code.DEV_SET_STREAM: lambda session, device, stream: session.set_stream(device, int(stream or 0)),
    Code.DEV_GET_CURRENT_STREAM: lambda session, device: session.current_stream(device),
}
