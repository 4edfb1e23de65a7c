"""What a session gives its user: remote functions, tensors, modules, objects and devices.

Each exists twice with the same names: the plain one blocks, the ``Async`` one is awaited. They are released at the
server when they are garbage collected; a finalizer only notes that, and the next request carries it.
"""

from __future__ import annotations

import math
import struct
import time
from collections import deque
from typing import TYPE_CHECKING, Any, Literal, overload

from rpcnb.client.moving import Moving
from rpcnb.errors import FunctionNotFound, RemoteError, RemoteProtocolError
from rpcnb.link.wire import Ticket
from rpcnb.protocol import flows
from rpcnb.protocol.flows import release_data, release_handle
from rpcnb.protocol.shortcut import NOT_PLAIN
from rpcnb.values import DEVICE_NAMES, Device, StaysHere, is_array, type_name

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    import numpy as np

    from rpcnb.client.jobs import Job
    from rpcnb.client.operations import Operations
    from rpcnb.client.pending import Pending
    from rpcnb.protocol.flows import Flow
    from rpcnb.values import DType, TensorMeta

__all__ = [
    "AsyncRemoteDevice",
    "AsyncRemoteFunction",
    "AsyncRemoteModule",
    "AsyncRemoteTensor",
    "RemoteDevice",
    "RemoteFunction",
    "RemoteModule",
    "RemoteObject",
    "RemoteTensor",
    "TimingResult",
]


CLOSE = "CloseRPCConnection"  # TVM's clients have this function, which ends the session


def fill(target: Any, array: Any) -> None:
    """Copy an array into a local one that :func:`writable` does not show."""
    from rpcnb.runtime import dlpack

    dlpack.fill(target, array)


def writable(target: Any) -> Any:
    """Return a numpy array over a local array's memory, to be written; None if :func:`fill` is needed.

    Raises:
        TypeError: It is no array that can be written.
    """
    import numpy as np

    if isinstance(target, np.ndarray):
        return target
    if hasattr(target, "__dlpack__"):
        from rpcnb.runtime.dlpack import from_dlpack

        array = from_dlpack(target)
        if array.flags.writeable:
            return array
        if hasattr(target, "copyfrom"):
            return None
    raise TypeError(f"expected a tensor, a device, or a local array that can be written, got {type_name(target)}")


class RemoteHandle(StaysHere):
    """Something at the server that this process holds one reference to."""

    __slots__ = ("__weakref__", "handle", "ops", "session")
    _instead = "get it from a session that is opened there"

    def __init__(self, ops: Operations, handle: int) -> None:
        self.ops = ops
        self.session: Any = ops.session
        self.handle = handle

    def free(self) -> None:
        """Release it at the server now (with the next request) instead of at garbage collection.

        Submitted calls of it end first.
        """
        user = self.session._user_of(self)
        if user is not None:
            user.add_done_callback(lambda _: self.free())
        else:
            self._release()

    def _release(self, make: Any = release_handle) -> None:  # bound here: at the interpreter's end globals are gone
        handle, self.handle = self.handle, 0
        if handle:
            self.ops.garbage.append(make(handle))  # no lock, no I/O: a finalizer may call it anywhere

    def __del__(self) -> None:
        self._release()


class RemoteObject(RemoteHandle):
    """An object of the server without a form of its own here; pass it to remote functions."""

    __slots__ = ()

    def __repr__(self) -> str:
        return f"RemoteObject({self.session.name})"


class _Function(RemoteHandle):
    __slots__ = ("found", "name")

    def __init__(self, ops: Operations, handle: int, name: str = "", found: bool = False) -> None:
        self.ops = ops
        self.session: Any = ops.session
        self.handle = handle
        self.name = name
        self.found = found  # by its name, among the global functions

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.name or 'unnamed'!r}, {self.session.name})"


class RemoteFunction(_Function):
    """A function of the server: call it like a local one.

    Arguments are None, bool, int, float, str, bytes, dtypes, devices, numpy arrays (uploaded for the call and freed
    after it), and tensors, functions, modules and objects of the same session.
    """

    __slots__ = ()

    def __call__(self, *args: Any, timeout: float | None = None) -> Any:
        """Call the function and wait for its result.

        Args:
            args: What may travel, see the class.
            timeout: Seconds for the whole call.

        Raises:
            ArgumentError: A value cannot travel; nothing was sent.
            RemoteError: The function raised.
            DeadlineExceeded: It took longer than ``timeout``.
        """
        session, ops = self.session, self.ops
        if timeout is None and session.timeout is None and ops is session._ops and not session.observers:
            found = ops.link.call(self.handle, args)  # the short way, if nothing speaks against it
            if type(found) is Ticket:
                return ops.wrap(flows.call_result(flows.result_of(found.result())))
            if found is not NOT_PLAIN:
                return found
        if self.handle & 1 and (timeout is not None or session.timeout is not None) and ops.lanes is not None:
            return wait_or_cancel(self.submit(*args, timeout=timeout))  # its time limit goes to the server
        return session._run(lambda ops: ops.call(self, args), timeout, self.name, args)

    @overload
    def submit(self, *args: Any, timeout: float | None = None, detach: Literal[False] = False) -> Pending: ...
    @overload
    def submit(self, *args: Any, detach: Literal[True], name: str | None = None) -> Job: ...

    def submit(
        self, *args: Any, timeout: float | None = None, detach: bool = False, name: str | None = None
    ) -> Pending | Job:
        """Start a call and return at once; arguments as for a call.

        With ``detach`` it becomes a job that outlives session and notebook, found again as ``session.jobs[name]``.
        """
        if detach:
            job: Job = self.session.jobs.start(self, *args, name=name)
            return job
        pending: Pending | None = self.session._submit_plainly(self, args) if timeout is None else None
        return pending or self.session.submit(self, *args, timeout=timeout)

    def map(
        self, *iterables: Iterable[Any], window: int = 256, timeout: float | None = None, return_errors: bool = False
    ) -> list[Any]:
        """Call the function for every element (or for elements of several iterables together), many at once.

        ``window`` calls are sent in one go and their replies decoded in bulk: ten times the rate of single calls.

        Args:
            iterables: Arguments, as for the built-in ``map``; plain values and things of this session.
            window: Calls in one go; two windows are on the way.
            timeout: Seconds for all of it.
            return_errors: Put the exception of a call that failed in its place instead of raising the first.

        Returns:
            The results, in order.

        Raises:
            ArgumentError: A value cannot travel.
            RemoteError: A call failed (all have been made nevertheless).
        """
        if window < 1:
            raise ValueError(f"expected a window of at least 1, got {window}")
        ops = self.ops
        if self.handle & 1 and ops.lanes is not None:
            results = self._map_overlapping(zip(*iterables), window, timeout)  # noqa: B905  # as the built-in
            return results if return_errors else raise_first(results)
        calls = zip(*iterables)  # noqa: B905  # as the built-in: the shortest ends it
        results = self.session._run(lambda ops: ops.map_calls(self, calls, window), timeout, f"map {self.name}")
        return results if return_errors else raise_first(results)

    def _map_overlapping(self, calls: Iterable[tuple[Any, ...]], window: int, timeout: float | None) -> list[Any]:
        """Map a function that may answer later: ``window`` calls run at the server at once."""
        until = None if timeout is None else time.monotonic() + timeout
        waiting: deque[Pending] = deque()
        results: list[Any] = []

        def collect() -> None:
            error = waiting[0].exception()
            if isinstance(error, RemoteError):
                results.append(error)
                waiting.popleft()
            else:
                results.append(waiting[0].result())
                waiting.popleft()

        try:
            for args in calls:
                left = None if until is None else max(0.0, until - time.monotonic())
                waiting.append(self.submit(*args, timeout=left))
                if len(waiting) >= window:
                    collect()
            while waiting:
                collect()
        except BaseException:
            for pending in waiting:
                pending.cancel()
            raise
        return results


def wait_or_cancel(pending: Pending) -> Any:
    """Wait for an operation as for a plain call: what ends the wait early ends the operation."""
    try:
        return pending.result()
    except BaseException:
        pending.cancel()
        raise


def raise_first(results: list[Any]) -> list[Any]:
    """Return the results of many calls, or raise the first failure among them."""
    for result in results:
        if isinstance(result, Exception):
            raise result
    return results


class AsyncRemoteFunction(_Function):
    """A function of the server: await its call."""

    __slots__ = ()

    async def __call__(self, *args: Any, timeout: float | None = None) -> Any:
        """Call the function and await its result; arguments and errors as :class:`RemoteFunction`."""
        session, ops = self.session, self.ops
        later = self.handle & 1 and ops.lanes is not None
        plain = not later and timeout is None and session.timeout is None and ops is session._ops
        link = ops.link
        if plain and not session.observers:
            link.check_loop(session.name)
            ticket = link.call(self.handle, args)
        else:
            ticket = None
        if ticket is None:
            queued = not self.handle & 1 and not any(map(is_array, args))
            return await session._run(lambda ops: ops.call(self, args), timeout, self.name, args, queued=queued)
        # The short way: 32 us -> 22 us on one CPU, 25 us -> 19 us with uvloop.
        call = session._awaited_call(session, link, self.name)
        try:
            if not ticket.done:
                await link.settled(ticket)
        except BaseException as error:
            call.end(error)
            link.abandon([ticket])
            raise
        call.end()
        if ticket.value is not NOT_PLAIN:
            return ticket.value
        return ops.wrap(flows.call_result(flows.result_of(ticket.result())))


class _Device(StaysHere):
    """A device of a session's server."""

    __slots__ = ("index", "session", "type")
    _instead = "get it from a session that is opened there"

    def __init__(self, session: Any, type: int, index: int = 0) -> None:
        self.session = session
        self.type = type
        self.index = index

    @property
    def name(self) -> str:
        """The type's name, ``cpu`` or ``cuda``."""
        return DEVICE_NAMES.get(self.type, f"device{self.type}")

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Device) and (self.session, self.type, self.index) == (
            other.session,
            other.type,
            other.index,
        )

    def __hash__(self) -> int:
        return hash((id(self.session), self.type, self.index))

    def __repr__(self) -> str:
        return f"{self.name}:{self.index} of {self.session.name}"

    def __str__(self) -> str:
        return f"remote[{self.session.name}]:{self.name}:{self.index}"  # as TVM writes it

    def dlpack_device_type(self) -> int:
        """Return DLPack's number of the type: TVM's name of :attr:`type`."""
        return self.type

    def _wire(self) -> Device:
        return Device(self.type, self.index)


class _Attribute:
    """A device attribute under TVM's name; asked for at every look."""

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    def __get__(self, device: RemoteDevice | None, owner: type) -> Any:
        return self if device is None else device.attribute(self._name)


class RemoteDevice(_Device):
    """A device of a session's server; TVM's attributes (``exist``, ``device_name``...) are asked for at every look."""

    __slots__ = ()

    exist = _Attribute()
    max_threads_per_block = _Attribute()
    warp_size = _Attribute()
    max_shared_memory_per_block = _Attribute()
    compute_version = _Attribute()
    device_name = _Attribute()
    max_clock_rate = _Attribute()
    multi_processor_count = _Attribute()
    max_thread_dimensions = _Attribute()
    api_version = _Attribute()
    driver_version = _Attribute()
    l2_cache_size_bytes = _Attribute()
    total_global_memory = _Attribute()
    available_global_memory = _Attribute()

    def sync(self, stream: int = 0, *, timeout: float | None = None) -> None:
        """Wait for the work of a stream, the default one if none is named."""
        self.session._run(lambda _: flows.sync_stream(self._wire(), stream), timeout, "sync")

    def attribute(self, name: str, *, timeout: float | None = None) -> Any:
        """Return an attribute such as ``exist``, ``device_name`` or ``total_global_memory``; None if it has none."""
        return self.session._run(lambda ops: ops.attribute(self, name), timeout, f"attribute {name}")

    def create_stream(self, *, timeout: float | None = None) -> int:
        """Make a stream; 0 where the device has only one."""
        stream: int = self.session._run(lambda _: flows.create_stream(self._wire()), timeout, "create_stream")
        return stream

    def set_stream(self, stream: int, *, timeout: float | None = None) -> None:
        """Make ``stream`` the current one."""
        self.session._run(lambda _: flows.set_stream(self._wire(), stream), timeout, "set_stream")

    def free_stream(self, stream: int, *, timeout: float | None = None) -> None:
        """Free a stream."""
        self.session._run(lambda _: flows.free_stream(self._wire(), stream), timeout, "free_stream")

    create_raw_stream, set_raw_stream, free_raw_stream = create_stream, set_stream, free_stream  # TVM's names


class AsyncRemoteDevice(_Device):
    """A device of an async session's server; the same methods, awaited."""

    __slots__ = ()

    async def sync(self, stream: int = 0, *, timeout: float | None = None) -> None:
        """Wait for the work of a stream, the default one if none is named."""
        await self.session._run(lambda _: flows.sync_stream(self._wire(), stream), timeout, "sync")

    async def attribute(self, name: str, *, timeout: float | None = None) -> Any:
        """Return an attribute such as ``exist``, ``device_name`` or ``total_global_memory``; None if it has none."""
        return await self.session._run(lambda ops: ops.attribute(self, name), timeout, f"attribute {name}")

    async def create_stream(self, *, timeout: float | None = None) -> int:
        """Make a stream; 0 where the device has only one."""
        stream: int = await self.session._run(lambda _: flows.create_stream(self._wire()), timeout, "create_stream")
        return stream

    async def set_stream(self, stream: int, *, timeout: float | None = None) -> None:
        """Make ``stream`` the current one."""
        await self.session._run(lambda _: flows.set_stream(self._wire(), stream), timeout, "set_stream")

    async def free_stream(self, stream: int, *, timeout: float | None = None) -> None:
        """Free a stream."""
        await self.session._run(lambda _: flows.free_stream(self._wire(), stream), timeout, "free_stream")

    create_raw_stream, set_raw_stream, free_raw_stream = create_stream, set_stream, free_stream  # TVM's names


class _Tensor(StaysHere):
    """A tensor in the server's memory; what sync and async tensors share.

    Attributes:
        meta: Handle, shape, type and offset.
        defined: False after a copy into it was given up half-way.
    """

    __slots__ = ("__weakref__", "_handle", "_owner", "defined", "freed", "meta", "ops", "session")
    _instead = ".numpy() brings its data, which a session there can make a tensor of"

    def __init__(self, ops: Operations, meta: TensorMeta, handle: int = 0, owner: _Tensor | None = None) -> None:
        self.ops = ops
        self.session: Any = ops.session
        self.meta = meta
        self._handle = handle  # of a tensor that a call returned; 0 for memory of our own
        self._owner = owner  # the tensor that a view keeps alive
        self.freed = False
        self.defined = True

    @property
    def shape(self) -> tuple[int, ...]:
        """Extents."""
        return self.meta.shape

    @property
    def dtype(self) -> DType:
        """Element type; its text is TVM's name."""
        return self.meta.dtype

    @property
    def ndim(self) -> int:
        """Number of dimensions."""
        return len(self.meta.shape)

    @property
    def size(self) -> int:
        """Number of elements."""
        return self.meta.size

    def numel(self) -> int:
        """Return the number of elements: TVM's name of :attr:`size`."""
        return self.meta.size

    @property
    def strides(self) -> tuple[int, ...]:
        """Elements from one to the next along each dimension; tensors at a server are without gaps."""
        found, step = [], 1
        for extent in reversed(self.meta.shape):
            found.append(step)
            step *= extent
        return tuple(reversed(found))

    def is_contiguous(self) -> bool:
        """Tell whether it is without gaps; tensors at a server are."""
        return True

    def same_as(self, other: object) -> bool:
        """Tell whether ``other`` is this very tensor: TVM's name of ``is``."""
        return self is other

    @property
    def nbytes(self) -> int:
        """Bytes of data."""
        return self.meta.nbytes

    @property
    def device(self) -> Any:
        """Where it is."""
        return self.ops.device_type(self.session, self.meta.device.type, self.meta.device.index)

    def view(self, shape: Sequence[int], dtype: str | DType | None = None, byte_offset: int = 0) -> Any:
        """Return a view of the same memory; nothing is sent.

        Args:
            shape: Extents of the view.
            dtype: Its element type, the tensor's by default.
            byte_offset: Where it begins, in bytes from the start of this tensor.

        Raises:
            CopyMismatch: It would leave this tensor.
        """
        from rpcnb.errors import CopyMismatch
        from rpcnb.values import dtype as as_dtype

        meta = self.meta._replace(
            shape=tuple(shape),
            dtype=self.meta.dtype if dtype is None else as_dtype(dtype),
            byte_offset=self.meta.byte_offset + byte_offset,
        )
        if byte_offset < 0 or byte_offset + meta.nbytes > self.nbytes or (meta.shape and min(meta.shape) < 0):
            raise CopyMismatch(f"a view of {meta.nbytes} bytes at {byte_offset} leaves a tensor of {self.nbytes} bytes")
        return type(self)(self.ops, meta, 0, self)

    def _create_view(self, shape: Sequence[int], dtype: Any = None, relative_byte_offset: int = 0) -> Any:
        """Return a view: TVM's name of :meth:`view`."""
        return self.view(shape, dtype, relative_byte_offset)

    def __array__(self, *args: Any, **options: Any) -> Any:
        raise TypeError("this tensor is in the server's memory; .numpy() copies it here")

    def free(self) -> None:
        """Free it at the server now (with the next request) instead of at garbage collection.

        An operation of this session that uses it ends first.
        """
        self._release(lambda request: self.ops.free(self.meta.data, request))

    def _release(self, note: Callable[[Any], object]) -> None:
        if self.freed:
            return
        self.freed = True
        if self._owner is None:
            if not self._handle and self.ops is self.session._ops:
                self.session._count_memory(-self.meta.nbytes)
            note(release_handle(self._handle) if self._handle else release_data(self.meta))

    def __del__(self) -> None:
        if hasattr(self, "freed"):
            self._release(self.ops.garbage.append)  # nothing uses it; a finalizer takes no lock

    def __len__(self) -> int:
        if not self.shape:
            raise TypeError("a tensor without dimensions has no len()")
        return self.shape[0]

    def __repr__(self) -> str:
        state = ", freed" if self.freed else "" if self.defined else ", undefined: a copy into it was given up"
        return (
            f"{type(self).__name__}(shape={self.shape}, {self.dtype}, {self.meta.device} of {self.session.name}{state})"
        )


class RemoteTensor(_Tensor):
    """A tensor in the server's memory."""

    __slots__ = ()

    def numpy(
        self,
        out: np.ndarray[Any, Any] | None = None,
        *,
        timeout: float | None = None,
        progress: Callable[[Any], object] | None = None,
    ) -> np.ndarray[Any, Any]:
        """Copy it into a new local array, or into ``out`` (same shape and type), which is returned.

        ``progress`` is called with the transfer, at most ten times a second and once at the end, in the I/O thread.

        Raises:
            CopyMismatch: ``out`` has another shape or type, or is read-only.
            StaleHandle: The tensor was freed.
            DeadlineExceeded: The copy took longer than ``timeout``; ``out`` is not written any more.
        """
        result: np.ndarray[Any, Any] = self.session._run(
            lambda ops: ops.copy_from(self, out),
            timeout,
            "copy_from",
            (self,),
            moving=Moving("down", self, self.nbytes),
            progress=progress,
        )
        return result

    def copyfrom(
        self, source: Any, *, timeout: float | None = None, progress: Callable[[Any], object] | None = None
    ) -> RemoteTensor:
        """Copy a local array, or another tensor, into this one; returns this one. ``progress`` as :meth:`numpy`."""
        _run_copy(self.session, source, self, timeout, progress)
        return self

    def copyto(self, target: Any, *, timeout: float | None = None) -> Any:
        """Copy to a tensor (same session: within the server; else through here), a device, or a local array.

        A local array is numpy's, TVM's, or any other that DLPack lets be written. Returns the target.
        """
        if isinstance(target, RemoteDevice):
            made = target.session.empty(self.shape, self.dtype, target, timeout=timeout)
            return made.copyfrom(self, timeout=timeout)
        if isinstance(target, RemoteTensor):
            return target.copyfrom(self, timeout=timeout)
        into = writable(target)
        if into is None:
            fill(target, self.numpy(timeout=timeout))
        else:
            self.numpy(into, timeout=timeout)
        return target


def _run_copy(session: Any, source: Any, target: RemoteTensor, timeout: float | None, progress: Any) -> None:
    if isinstance(source, RemoteTensor):
        if source.session is session:
            session._run(lambda ops: ops.copy_tensor(source, target), timeout, "copy", (source, target))
            return
        source = source.numpy(timeout=timeout)
    moving = Moving("up", target, target.nbytes)
    session._run(
        lambda ops: ops.copy_to(target, source), timeout, "copy_to", (target,), moving=moving, progress=progress
    )


class AsyncRemoteTensor(_Tensor):
    """A tensor in the server's memory; its copies are awaited."""

    __slots__ = ()

    async def numpy(
        self,
        out: np.ndarray[Any, Any] | None = None,
        *,
        timeout: float | None = None,
        progress: Callable[[Any], object] | None = None,
    ) -> np.ndarray[Any, Any]:
        """Copy it into a new local array, or into ``out``; as :meth:`RemoteTensor.numpy`."""
        moving = Moving("down", self, self.nbytes)
        result: np.ndarray[Any, Any] = await self.session._run(
            lambda ops: ops.copy_from(self, out), timeout, "copy_from", (self,), moving=moving, progress=progress
        )
        return result

    async def copyfrom(
        self, source: Any, *, timeout: float | None = None, progress: Callable[[Any], object] | None = None
    ) -> AsyncRemoteTensor:
        """Copy a local array, or another tensor, into this one; returns this one."""
        session = self.session
        if isinstance(source, AsyncRemoteTensor):
            if source.session is session:
                await session._run(lambda ops: ops.copy_tensor(source, self), timeout, "copy", (source, self))
                return self
            source = await source.numpy(timeout=timeout)
        moving = Moving("up", self, self.nbytes)
        await session._run(
            lambda ops: ops.copy_to(self, source), timeout, "copy_to", (self,), moving=moving, progress=progress
        )
        return self

    async def copyto(self, target: Any, *, timeout: float | None = None) -> Any:
        """Copy to a tensor, a device or an array; returns the target."""
        if isinstance(target, AsyncRemoteDevice):
            made = await target.session.empty(self.shape, self.dtype, target, timeout=timeout)
            return await made.copyfrom(self, timeout=timeout)
        if isinstance(target, AsyncRemoteTensor):
            return await target.copyfrom(self, timeout=timeout)
        into = writable(target)
        if into is None:
            fill(target, await self.numpy(timeout=timeout))
        else:
            await self.numpy(into, timeout=timeout)
        return target


class TimingResult:
    """What a time evaluator measured, in seconds per call, as in TVM.

    Attributes:
        results: One mean per repeat.
    """

    __slots__ = ("max", "mean", "median", "min", "results", "std")

    def __init__(self, results: tuple[float, ...]) -> None:
        ordered = sorted(results)
        middle = len(ordered) // 2
        self.results = results
        self.mean = sum(results) / len(results)
        self.median = ordered[middle] if len(ordered) % 2 else (ordered[middle - 1] + ordered[middle]) / 2
        self.min = ordered[0]
        self.max = ordered[-1]
        self.std = math.dist(results, [self.mean] * len(results)) / len(results) ** 0.5  # a square may overflow

    @classmethod
    def decode(cls, data: bytes) -> TimingResult:
        """Read the evaluator's bytes: ``repeat`` f64, little-endian (every TVM host is).

        Raises:
            RemoteProtocolError: They are something else.
        """
        if not isinstance(data, bytes) or not data or len(data) % 8:
            raise RemoteProtocolError(f"expected measurements of 8 bytes each, got {data!r:.60}")
        return cls(struct.unpack(f"<{len(data) // 8}d", data))

    def __repr__(self) -> str:
        return (
            f"TimingResult(mean={self.mean:.4g} s, median={self.median:.4g} s, min={self.min:.4g} s, "
            f"max={self.max:.4g} s, std={self.std:.3g} s, {len(self.results)} repeats)"
        )


def _timing_options(given: tuple[Any, ...], options: dict[str, Any]) -> dict[str, Any]:
    known = {
        "number": 10,
        "repeat": 1,
        "min_repeat_ms": 0,
        "limit_zero_time_iterations": 100,
        "cooldown_interval_ms": 0,
        "repeats_to_cooldown": 1,
        "cache_flush_bytes": 0,
        "f_preproc": "",
    }
    if len(given) > len(known):
        raise TypeError(f"time_evaluator() got {len(given)} options; expected {', '.join(known)}")
    for name, value in zip(known, given, strict=False):  # in TVM's order
        if name in options:
            raise TypeError(f"time_evaluator() got {name} twice")
        options[name] = value
    unknown = sorted(set(options) - set(known))
    if unknown:
        raise TypeError(f"time_evaluator() got unknown options {', '.join(unknown)}; expected {', '.join(known)}")
    return {**known, **options}


class _Module(RemoteHandle):
    __slots__ = ("_functions", "imports")

    entry_name = "main"  # TVM's name of a module's main function
    kind = "rpc"  # likewise

    def __init__(self, ops: Operations, handle: int) -> None:
        super().__init__(ops, handle)
        self._functions: dict[tuple[str, bool], Any] = {}
        self.imports: list[Any] = []  # what was imported into it from here

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.session.name})"

    def _lookup(self, ops: Operations, name: str, query_imports: bool) -> Flow[Any]:
        found = self._functions.get((name, query_imports))
        if found is None:
            found = yield from ops.module_function(self, name, query_imports)
            self._functions[name, query_imports] = found
        return found


class RemoteModule(_Module):
    """A module of the server: ``module["f"]`` is one of its functions, ``module(...)`` calls its main one."""

    __slots__ = ()

    def get_function(self, name: str, query_imports: bool = True, *, timeout: float | None = None) -> RemoteFunction:
        """Return a function of the module.

        Raises:
            FunctionNotFound: It has none of this name.
        """
        found: RemoteFunction = self.session._run(
            lambda ops: self._lookup(ops, name, query_imports), timeout, f"get_function {name}"
        )
        return found

    def __getitem__(self, name: str) -> RemoteFunction:
        return self.get_function(name)

    def __call__(self, *args: Any, timeout: float | None = None) -> Any:
        """Call the module's main function."""
        return self.get_function(self.entry_name, timeout=timeout)(*args, timeout=timeout)

    def import_module(self, child: RemoteModule, *, timeout: float | None = None) -> None:
        """Make the functions of ``child`` reachable through this module."""
        self.session._run(lambda ops: ops.import_module(self, child), timeout, "import_module")
        self.imports.append(child)

    def implements_function(self, name: str, query_imports: bool = False, *, timeout: float | None = None) -> bool:
        """Tell whether the module has a function."""
        try:
            self.get_function(name, query_imports, timeout=timeout)
        except FunctionNotFound:
            return False
        return True

    def time_evaluator(self, func_name: str, dev: RemoteDevice, *numbers: Any, **options: Any) -> Any:
        """Return a function that measures ``func_name`` at the server; see :meth:`Session.time_evaluator`."""
        return self.session.time_evaluator(func_name, dev, *numbers, module=self, **options)


class AsyncRemoteModule(_Module):
    """A module of the server; ``await module.get_function("f")``."""

    __slots__ = ()

    async def get_function(
        self, name: str, query_imports: bool = True, *, timeout: float | None = None
    ) -> AsyncRemoteFunction:
        """Return a function of the module; as :meth:`RemoteModule.get_function`."""
        found: AsyncRemoteFunction = await self.session._run(
            lambda ops: self._lookup(ops, name, query_imports), timeout, f"get_function {name}"
        )
        return found

    async def __call__(self, *args: Any, timeout: float | None = None) -> Any:
        """Call the module's main function."""
        function = await self.get_function(self.entry_name, timeout=timeout)
        return await function(*args, timeout=timeout)

    async def import_module(self, child: AsyncRemoteModule, *, timeout: float | None = None) -> None:
        """Make the functions of ``child`` reachable through this module."""
        await self.session._run(lambda ops: ops.import_module(self, child), timeout, "import_module")
        self.imports.append(child)

    async def implements_function(
        self, name: str, query_imports: bool = False, *, timeout: float | None = None
    ) -> bool:
        """Tell whether the module has a function."""
        try:
            await self.get_function(name, query_imports, timeout=timeout)
        except FunctionNotFound:
            return False
        return True

    async def time_evaluator(self, func_name: str, dev: RemoteDevice, *numbers: Any, **options: Any) -> Any:
        """Return a function that measures ``func_name`` at the server; await its calls."""
        return await self.session.time_evaluator(func_name, dev, *numbers, module=self, **options)
