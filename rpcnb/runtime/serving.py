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

from typing import TYPE_CHECKING, Any, Protocol

from rpcnb.errors import InvalidHandle, ResultError
from rpcnb.protocol.codes import Code
from rpcnb.protocol.messages import Raised
from rpcnb.runtime.completion import errors_to_done
from rpcnb.runtime.report import report
from rpcnb.values import (
    NULL,
    Device,
    DType,
    Pointer,
    TensorMeta,
    Value,
    type_name,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from rpcnb.protocol.messages import CallFunc, Syscall
    from rpcnb.protocol.reader import Sink
    from rpcnb.runtime.completion import Done
    from rpcnb.runtime.devices import DeviceAPI
    from rpcnb.runtime.environment import Environment
    from rpcnb.runtime.files import SessionFiles
    from rpcnb.runtime.handles import HandleTable

__all__ = ["HandleSession", "ServingSession", "raised_by"]


def raised_by(session: ServingSession | HandleSession, error: BaseException, extended: bool = True) -> Raised:
    """Return the session's report of an exception, also of one that cannot say what it is.

    Where the peer is not ``extended``, it gets the text alone, and no traceback is formatted (1 ms each) for nobody.
    """
    try:
        if extended:
            return session.send_exception(error)
        if type(session).send_exception is ServingSession.send_exception:
            return Raised(report(error, traced=False).text)
        return Raised(session.send_exception(error).text)
    except BaseException as broken:  # also SystemExit: a report does not end the server
        return Raised(f"{type_name(error)} without a text: {type_name(broken)} while making it")


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
        return report(error)

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


class HandleSession(Protocol):
    """A session whose things have handles, as the parts that :class:`LocalServingSession` is made of see it.

    Attributes:
        environment: What the server's sessions share.
        files: The session's own.
        table: Handles and what they name.
    """

    environment: Environment
    files: SessionFiles
    table: HandleTable

    def get_function(self, name: str) -> Pointer:
        """Return a handle of the global function ``name``, or NULL."""

    def name_of(self, handle: int) -> str:
        """Name the function of a handle, for people."""

    def device_api(self, device: Device) -> DeviceAPI:
        """Return the API of a device's type."""

    def placement(self, request: CallFunc) -> str:
        """Tell where a call runs."""

    def async_call(self, handle: int, args: tuple[Value, ...], done: Done) -> None:
        """Call a function; ``done`` gets the encoded return sequence."""

    def send_exception(self, error: BaseException) -> Raised:
        """Turn an exception into the reply that reports it."""
