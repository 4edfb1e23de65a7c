"""Operations, each written once: generators that decide *what* is asked and never wait.

A flow yields what it wants done and is sent the outcome:

* a request: send it and wait for its reply (the common case);
* ``Send(request)``: send it, get a ticket back at once;
* ``Wait(ticket)``: wait for the reply of an earlier ``Send``.

Both sessions run the same flows, one by blocking, the other by awaiting. Replies that are errors are raised inside
the flow, so that it may clean up.

Source:
    RPCClientSession and RPCEndpoint::CopyToRemote, src/runtime/rpc/rpc_endpoint.cc, protocol 0.8.0.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable
from dataclasses import dataclass
from itertools import islice
from typing import Any, Protocol, TypeVar

from rpcnb.errors import RemoteError, RemoteProtocolError, SessionTimeout
from rpcnb.protocol.codes import Code
from rpcnb.protocol.messages import (
    CallFunc,
    CopyAck,
    CopyFromRemote,
    CopyToRemote,
    InitServer,
    Raised,
    Reply,
    Request,
    Return,
    Syscall,
)
from rpcnb.protocol.shortcut import NOT_PLAIN
from rpcnb.values import NULL, Device, DType, FunctionRef, ModuleRef, ObjectRef, Pointer, TensorMeta, Value

__all__ = [
    "Flow",
    "Send",
    "SendCalls",
    "TensorResult",
    "Wait",
    "allocate",
    "call_function",
    "chunk_limit",
    "copy_among_remote",
    "copy_from_remote",
    "copy_to_remote",
    "create_stream",
    "current_stream",
    "free_data",
    "free_handle",
    "get_attribute",
    "get_function",
    "initialize",
    "result_of",
    "set_device",
    "set_stream",
    "sync_stream",
    "undo",
]

TIMEOUT_PREFIX = "RPCSessionTimeoutError: "
_PACKET_LIMIT = "tvm.rpc.server.GetCRTMaxPacketSize"
_AHEAD = 4  # parts on the way; protocol.md 15.6: stock waits for each


@dataclass(slots=True)
class Send:
    """Send ``request``; the flow gets its ticket."""

    request: Request


@dataclass(slots=True)
class SendCalls:
    """Send calls of one function in one go; the flow gets their tickets, whose ``outcome`` may be plain values."""

    handle: int
    calls: list[tuple[Value, ...]]


@dataclass(slots=True)
class Wait:
    """Wait for the reply to an earlier request; the flow gets it."""

    ticket: Any


@dataclass(frozen=True, slots=True)
class TensorResult:
    """A tensor that a call returned: where it is, and the handle that keeps it alive."""

    meta: TensorMeta
    handle: int


class Pace(Protocol):
    """Sizes of the parts in which bulk data moves."""

    @property
    def size(self) -> int:
        """Bytes of the next part."""

    def moved(self, nbytes: int) -> None:
        """Note that a part has arrived."""


T = TypeVar("T")
Result = Value | TensorResult
Flow = Generator[Request | Send | SendCalls | Wait, Any, T]


def result_of(reply: Reply) -> tuple[Value, ...]:
    """Return the values of a kReturn.

    Raises:
        SessionTimeout: The server's time limit for the session is over.
        RemoteError: The peer answered with an exception.
        RemoteProtocolError: The peer answered with something else.
    """
    if type(reply) is Return:
        return reply.values
    if isinstance(reply, Raised):
        if reply.text.startswith(TIMEOUT_PREFIX):
            raise SessionTimeout(reply.text.removeprefix(TIMEOUT_PREFIX))
        raise RemoteError(reply.text, reply.type_name, reply.traceback)
    raise RemoteProtocolError(f"expected a result, got {type(reply).__name__}")


def _single(reply: Reply) -> Value:
    values = result_of(reply)
    if len(values) != 1:
        raise RemoteProtocolError(f"expected one result, got {len(values)}")
    return values[0]


def _pointer(reply: Reply) -> int:
    value = _single(reply)
    if value is None:
        return 0
    if not isinstance(value, Pointer):
        raise RemoteProtocolError(f"expected a handle, got {type(value).__name__}")
    return int(value)


def call_result(values: tuple[Value, ...]) -> Result:
    """Interpret the sequence of a kReturn to kCallFunc; the payload's own type decides (protocol.md 4.2)."""
    if len(values) < 2 or type(values[0]) is not int:
        raise RemoteProtocolError(f"expected a type index and a result, got {len(values)} values")
    index, value = values[0], values[1]
    if index < 64:
        if index == 7 and len(values) == 3:
            index = 70
        else:
            return None if index == 0 else value
    if isinstance(value, (str, bytes)):
        return value
    if index == 70:
        if len(values) != 3 or not isinstance(value, TensorMeta) or not isinstance(values[2], Pointer):
            raise RemoteProtocolError("expected a tensor and its handle")
        return TensorResult(value, int(values[2]))
    if not isinstance(value, Pointer):
        raise RemoteProtocolError(f"expected the handle of an object of type {index}, got {type(value).__name__}")
    handle = int(value)
    return FunctionRef(handle) if index == 68 else ModuleRef(handle) if index == 73 else ObjectRef(handle)


def release_handle(handle: int) -> Request:
    """Return the request that releases a function, module, object or tensor result."""
    return Syscall(Code.FREE_HANDLE, (Pointer(handle),))


def release_data(meta: TensorMeta) -> Request:
    """Return the request that frees a tensor's memory."""
    return Syscall(Code.DEV_FREE_DATA, (meta.device, Pointer(meta.data)))


def undo(request: Request, reply: Reply) -> list[Request]:
    """Return what releases the things a reply brought that nobody waits for any more."""
    if not isinstance(reply, Return) or not reply.values:
        return []
    last = reply.values[-1]
    if not isinstance(last, Pointer) or not last:
        return []
    if isinstance(request, CallFunc):
        return [release_handle(last)] if isinstance(reply.values[0], int) and reply.values[0] >= 64 else []
    if not isinstance(request, Syscall):
        return []
    if request.code is Code.GET_GLOBAL_FUNC:
        return [release_handle(last)]
    if request.code is Code.DEV_ALLOC_DATA:
        return [Syscall(Code.DEV_FREE_DATA, (request.args[0], last))]
    if request.code is Code.DEV_ALLOC_DATA_WITH_SCOPE:
        meta = request.args[0]
        assert isinstance(meta, TensorMeta)
        return [Syscall(Code.DEV_FREE_DATA, (meta.device, last))]
    return []


def _as_it_is(result: Result) -> Result:
    return result


def initialize(args: tuple[Value, ...] = ()) -> Flow[None]:
    """Open the conversation, with the default session or a constructor's name and arguments."""
    result_of((yield InitServer(args)))


def get_function(name: str) -> Flow[int]:
    """Look up a global function; 0 if there is none."""
    return _pointer((yield Syscall(Code.GET_GLOBAL_FUNC, (name,))))


def call_function(handle: int, args: tuple[Value, ...], wrap: Callable[[Result], Any] = _as_it_is) -> Flow[Any]:
    """Call a packed function by handle; ``wrap`` makes the user's object of its result."""
    reply = yield CallFunc(handle, args)
    if type(reply) is Return:
        values = reply.values
        if len(values) == 2 and values[0] == 1:  # an int: the common case
            return values[1]
        return wrap(call_result(values))
    return wrap(call_result(result_of(reply)))


def map_calls(
    handle: int, calls: Iterable[tuple[Value, ...]], window: int, wrap: Callable[[Result], Any] = _as_it_is
) -> Flow[list[Any]]:
    """Call a packed function many times, ``window`` calls in one go and two windows on the way.

    Returns:
        Results in order; in the place of one that failed, its exception.
    """
    results: list[Any] = []
    batches: deque[list[Any]] = deque()
    rest = iter(calls)
    while chunk := list(islice(rest, window)):
        batches.append((yield SendCalls(handle, chunk)))
        if len(batches) > 1:
            yield from _collect_calls(batches.popleft(), results, wrap)
    while batches:
        yield from _collect_calls(batches.popleft(), results, wrap)
    return results


def _collect_calls(tickets: list[Any], results: list[Any], wrap: Callable[[Result], Any]) -> Flow[None]:
    reply = yield Wait(tickets[-1])  # replies come in order: the others are there too
    for ticket in tickets:
        if ticket.value is not NOT_PLAIN:
            results.append(ticket.value)
            continue
        reply = ticket.result()
        try:
            results.append(wrap(call_result(result_of(reply))))
        except (RemoteError, RemoteProtocolError) as error:  # one call's failure is its own
            results.append(error)


def free_handle(handle: int) -> Flow[None]:
    """Release one reference to a function, module, tensor result or object."""
    result_of((yield release_handle(handle)))


def set_device(device: Device) -> Flow[None]:
    """Make ``device`` the server's current one of its type."""
    result_of((yield Syscall(Code.DEV_SET_DEVICE, (device,))))


def get_attribute(device: Device, kind: int) -> Flow[Value]:
    """Ask for a device attribute by its number (protocol.md 4.3); None if the device has none such."""
    return _single((yield Syscall(Code.DEV_GET_ATTR, (device, kind))))


def allocate(meta: TensorMeta, scope: str | None) -> Flow[int]:
    """Allocate memory for a tensor; returns its data handle."""
    return _pointer((yield Syscall(Code.DEV_ALLOC_DATA_WITH_SCOPE, (meta, scope))))


def allocate_bytes(device: Device, nbytes: int, alignment: int, hint: DType) -> Flow[int]:
    """Allocate plain bytes (what C++ callers do); returns the data handle."""
    return _pointer((yield Syscall(Code.DEV_ALLOC_DATA, (device, nbytes, alignment, hint))))


def free_data(device: Device, handle: int) -> Flow[None]:
    """Free memory that was allocated."""
    result_of((yield Syscall(Code.DEV_FREE_DATA, (device, Pointer(handle)))))


def create_stream(device: Device) -> Flow[int]:
    """Make a stream; null where the device has only one."""
    return _pointer((yield Syscall(Code.DEV_CREATE_STREAM, (device,))))


def current_stream(device: Device) -> Flow[int]:
    """Return the device's current stream; null for the default one."""
    return _pointer((yield Syscall(Code.DEV_GET_CURRENT_STREAM, (device,))))


def free_stream(device: Device, stream: int) -> Flow[None]:
    """Free a stream."""
    result_of((yield Syscall(Code.DEV_FREE_STREAM, (device, Pointer(stream)))))


def set_stream(device: Device, stream: int) -> Flow[None]:
    """Make ``stream`` the device's current one."""
    result_of((yield Syscall(Code.DEV_SET_STREAM, (device, Pointer(stream)))))


def sync_stream(device: Device, stream: int = 0) -> Flow[None]:
    """Wait for the work of a stream."""
    result_of((yield Syscall(Code.DEV_STREAM_SYNC, (device, Pointer(stream)))))


def copy_among_remote(source: TensorMeta, destination: TensorMeta) -> Flow[None]:
    """Copy between two tensors of the same server."""
    result_of((yield Syscall(Code.COPY_AMONG_REMOTE, (source, destination, NULL))))


def chunk_limit() -> Flow[int]:
    """Ask how long a packet may be; 0 for no limit.

    The looked-up handle is never freed: stock's own does not free it either, and it is one per session.
    """
    handle = yield from get_function(_PACKET_LIMIT)
    if not handle:
        return 0
    limit = yield from call_function(handle, ())
    return limit if isinstance(limit, int) and limit > 0 else 0


def block_size(limit: int, meta: TensorMeta) -> int:
    """Return how many bytes of data fit into a packet of at most ``limit`` bytes (protocol.md 5.3)."""
    overhead = 44 + 8 * len(meta.shape)
    if limit <= overhead:
        raise RemoteProtocolError(f"expected a packet limit above {overhead} bytes, got {limit}")
    return limit - overhead


def copy_to_remote(
    meta: TensorMeta, data: memoryview, *, limit: int = 0, sync: bool = False, pace: Pace | None = None
) -> Flow[None]:
    """Write ``data`` to ``meta``, and wait for its device's default stream if ``sync``.

    Nothing at all is sent for no bytes.

    Args:
        meta: Destination; its own byte offset counts (stock's client loses it, protocol.md 5.3).
        data: The bytes, sent from where they are.
        limit: Longest packet the server takes, 0 for any.
        sync: Append a stream sync, as stock does after every copy.
        pace: Sizes of the parts in which much data moves, so that the copy can be given up soon.
    """
    yield from _copy(meta, data, CopyToRemote, limit, sync, pace)


def copy_from_remote(
    meta: TensorMeta, into: memoryview, *, limit: int = 0, sync: bool = False, pace: Pace | None = None
) -> Flow[None]:
    """Read the bytes at ``meta`` straight into ``into``; arguments as :func:`copy_to_remote`."""
    yield from _copy(meta, into, CopyFromRemote, limit, sync, pace)


def _copy(
    meta: TensorMeta,
    data: memoryview,
    kind: type[CopyToRemote | CopyFromRemote],
    limit: int,
    sync: bool,
    pace: Pace | None,
) -> Flow[None]:
    total = len(data)
    size = block_size(limit, meta) if limit else max(total, 1)
    tickets: deque[tuple[Any, int]] = deque()
    start = 0
    while start < total:
        part = data[start : start + (size if pace is None else pace.size)]
        tickets.append(((yield Send(kind(meta.at(start), len(part), part))), len(part)))
        start += len(part)
        if len(tickets) > _AHEAD:
            ticket, nbytes = tickets.popleft()
            _copied((yield Wait(ticket)))
            if pace is not None:
                pace.moved(nbytes)
    while tickets:
        _copied((yield Wait(tickets.popleft()[0])))
    if sync:  # not sent ahead: an event-driven server does not look at it while the copy is parked
        yield from sync_stream(meta.device)


def _copied(reply: Reply) -> None:
    if type(reply) is not CopyAck:
        result_of(reply)
