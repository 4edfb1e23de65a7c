"""The serving session of this process: its functions, modules, memory and files, by handle."""

from __future__ import annotations

import contextvars
import inspect
import threading
from functools import partial
from typing import TYPE_CHECKING, Any

from rpcnb.errors import ArgumentError, DeviceError, InvalidHandle, LimitExceeded, ResultError
from rpcnb.protocol.records import CANCEL, CANCEL_AT, NEXT, START
from rpcnb.protocol.sequence import encode_call_result
from rpcnb.runtime.completion import Callback, bind, errors_to_done, is_ours
from rpcnb.runtime.current import CALL, SESSION
from rpcnb.runtime.devices import ATTRIBUTES, DeviceAPI, DeviceTensor, Memory, find_device
from rpcnb.runtime.environment import ENVIRONMENT, Environment
from rpcnb.runtime.files import SessionFiles
from rpcnb.runtime.handles import HandleKind, HandleTable
from rpcnb.runtime.overlap import Calls
from rpcnb.runtime.registry import Registered
from rpcnb.runtime.served import Module, ServedFunction, Shape
from rpcnb.runtime.serving import ServingSession
from rpcnb.runtime.watched import watch
from rpcnb.runtime.wellknown import JOBS, UPLOAD, find_well_known
from rpcnb.values import (
    NULL,
    Device,
    DType,
    FunctionRef,
    ModuleRef,
    ObjectRef,
    Pointer,
    TensorMeta,
    Value,
    has_item,
    is_array,
    is_bare_enum,
    plain,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from rpcnb.protocol.messages import CallFunc
    from rpcnb.protocol.reader import Sink
    from rpcnb.runtime.completion import Done

__all__ = ["LocalServingSession", "current_session", "workpath"]

# Type indices of stock TVM's counterparts; any other object is "opaque Python object", 74.
_OBJECT_INDICES: dict[type, int] = {Shape: 69, list: 71, tuple: 71, dict: 72}

# What the client of a board may use that is taken by a job.
_LOOKING = frozenset({JOBS, START, NEXT, CANCEL, CANCEL_AT, "rpcnb.status"})

# Values that a registered function gets as they are; everything else is a handle to be looked up.
_PLAIN = frozenset({int, float, str, bytes, bool, type(None), DType, Device, Pointer})


class LocalServingSession(ServingSession):
    """Serves the functions, modules, memory and files of this process.

    Args:
        environment: What the server's sessions share; the serving connection's by default.
    """

    def __init__(self, environment: Environment | None = None) -> None:
        self.environment = environment or ENVIRONMENT.get() or Environment()
        limits = self.environment.limits
        self.table = HandleTable(limits.handles, limits.bad_handles)
        self.files = SessionFiles(
            limits.upload_quota,
            most_parts=limits.uploads,
            trusted_paths=self.environment.trusted_paths,
            directory=self.environment.directory,
        )
        self._by_name: dict[str, ServedFunction] = {}
        self._running: set[Callable[[], object]] = set()  # what cancels the coroutines of this session
        self._uses: dict[Memory, int] = {}  # memory allocated here: its data handle, and copies on their way
        self._closed = False
        self._lock = threading.Lock()
        self._calls: Calls | None = None
        self.peer = ""  # address of the client

    @property
    def calls(self) -> Calls:
        """Calls that the client has started and that overlap."""
        if self._calls is None:
            with self._lock:
                self._calls = self._calls or Calls(self, most_bytes=self.environment.limits.outcomes)
        return self._calls

    # -- functions -----------------------------------------------------------------------------------------------

    def get_function(self, name: str) -> Pointer:
        """Find ``name`` in the registry, among the well-known functions, as ``__async.name``, or in the FFI."""
        if self.environment.visitor and name not in _LOOKING:
            raise LimitExceeded(f"{self.environment.visitor}; until it ends only session.jobs can be used here")
        registry = self.environment.registry
        entry = registry.get(name)
        known = self._by_name.get(name)
        if known is not None and known.source is entry:
            return self._issue(known)
        if entry is not None:
            served = self._serve_registered(entry)
        else:
            other = self._find_elsewhere(name)
            if other is None:
                return NULL
            served = other
        self._by_name[name] = served
        return self._issue(served)

    def _issue(self, served: ServedFunction) -> Pointer:
        told = self.environment.on_call
        if told is not None:
            watch(self, served, partial(told, self.peer))
        return self.table.issue(HandleKind.FUNCTION, served, served.kind in ("coroutine", "callback"))

    def name_of(self, handle: int) -> str:
        """Name the function of a handle, for people."""
        entry = self.table.entry(handle)
        return getattr(entry.thing, "name", "call") if entry is not None else "call"

    def _serve_registered(self, entry: Registered) -> ServedFunction:
        run = entry.run or self.environment.default_run
        served = ServedFunction(entry.name, entry.call, entry.kind, run, entry)
        if entry.context is not None:
            self.environment.registry.hold(entry.name, served)
        return served

    def _find_elsewhere(self, name: str) -> ServedFunction | None:
        found = self.calls.serve(name) if name.startswith("rpcnb.") else None
        found = found or find_well_known(self, name)
        if found is not None:
            return found
        entry = self.environment.registry.get(f"__async.{name}")
        if entry is not None:
            return ServedFunction(name, _legacy_async(entry.call), "callback")
        return None

    def placement(self, request: CallFunc) -> str:
        """Plain functions run where their registration says; everything else on the loop."""
        entry = self.table.entry(request.handle)
        if entry is None or entry.kind is not HandleKind.FUNCTION:
            return "any"
        run: str = entry.thing.run
        return run

    def _function(self, handle: int) -> ServedFunction:
        entry = self.table.entry(handle)
        if entry is not None and entry.kind is HandleKind.FUNCTION:
            function: ServedFunction = entry.thing
            return function
        self.table.find(handle, HandleKind.FUNCTION)
        raise AssertionError("find raised")  # pragma: no cover

    def decode_args(self, args: tuple[Value, ...]) -> Sequence[Any]:
        """Replace handles among arguments by what they name; tensors on the CPU become numpy views."""
        for value in args:
            if type(value) not in _PLAIN:
                return [value if type(value) in _PLAIN else self._resolve(value) for value in args]
        return args

    def _resolve(self, value: Value) -> Any:
        if isinstance(value, TensorMeta):
            tensor = self.tensor(value)
            return tensor.numpy() if value.device.type == 1 else tensor
        if isinstance(value, FunctionRef):
            return self._function(value.handle).own
        if isinstance(value, ModuleRef):
            return self.table.find(value.handle, HandleKind.MODULE)
        if isinstance(value, ObjectRef):
            return self.table.find(value.handle, HandleKind.OBJECT)
        return value  # what a sink made of a bulk argument

    def tensor(self, meta: TensorMeta) -> DeviceTensor:
        """Return the tensor that ``meta`` describes, checked to lie in its memory."""
        memory: Memory = self.table.find(meta.data, HandleKind.DATA)
        if memory.device != meta.device:
            raise InvalidHandle(f"handle {meta.data:#x} is memory on {memory.device}; expected {meta.device}")
        return DeviceTensor(memory, meta.shape, meta.dtype, meta.byte_offset)

    def call(self, handle: int, args: tuple[Value, ...]) -> tuple[Value, ...]:
        """Call a function and wait for its result, of whatever kind it is."""
        waiter = _Waiter()
        self.async_call(handle, args, waiter)
        result: tuple[Value, ...] = waiter.result()
        return result

    def call_plain(self, handle: int, args: tuple[Value, ...]) -> tuple[Value, ...] | None:
        """Call a plain function; returns the encoded return sequence, or None for a function of another kind."""
        entry = self.table.entry(handle)
        if entry is None or entry.kind is not HandleKind.FUNCTION:
            self.table.find(handle, HandleKind.FUNCTION)  # raises
        function: ServedFunction = entry.thing  # type: ignore[union-attr]  # find has raised
        if function.kind != "plain":
            return None
        values = self.decode_args(args) if args else args
        held = self._hold(values) if values is not args else ()
        token = SESSION.set(self)
        try:
            return self.encode_return(function.call(*values))
        finally:
            SESSION.reset(token)
            for memory in held:
                self._drop(memory)

    def _hold(self, values: Sequence[Any]) -> list[Memory]:
        """Keep the devices' memory among arguments until the call has ended, even if the session ends before."""
        held = [value.memory for value in values if isinstance(value, DeviceTensor)]
        if held:
            with self._lock:
                for memory in held:
                    if memory in self._uses:
                        self._uses[memory] += 1
        return held

    @errors_to_done
    def async_call(self, handle: int, args: tuple[Value, ...], done: Done) -> None:
        """Call a function; a coroutine or callback function completes later."""
        values = self.call_plain(handle, args)
        if values is not None:
            done(values)
            return
        function = self._function(handle)
        if function.kind == "raw":
            function.call(done, args)
            return
        arguments = self.decode_args(args)
        held = self._hold(arguments)
        if held:
            done = _Releasing(done, self._drop, held)
        try:
            if function.kind == "coroutine":
                self._start(function, arguments, done)
            else:
                self._call_back(function, arguments, done)
        except BaseException as error:
            done.error(error)
            if is_ours(error):
                raise

    def _call_back(self, function: ServedFunction, arguments: Sequence[Any], done: Done) -> None:
        tokens = SESSION.set(self), CALL.set(done)
        try:
            function.call(Callback(done, self.encode_return), *arguments)
        finally:
            SESSION.reset(tokens[0])
            CALL.reset(tokens[1])

    def _start(self, function: ServedFunction, values: Sequence[Any], done: Done) -> None:
        cancel: Callable[[], object] | None = None
        finished = False

        def end(result: Any, error: BaseException | None) -> None:
            nonlocal finished
            finished = True
            with self._lock:
                self._running.discard(cancel)
            if error is not None:
                done.error(error)
            else:
                Callback(done, self.encode_return)(result)

        def launch() -> Callable[[], object]:
            SESSION.set(self)
            CALL.set(done)
            cancel: Callable[[], object] = self.environment.spawn(function.call(*values), _Ended(end, done))
            return cancel

        # The task inherits the context in which the function was registered, so its output goes to that cell.
        context = function.context.copy() if function.context is not None else contextvars.copy_context()
        cancel = context.run(launch)
        with self._lock:
            if not finished:
                self._running.add(cancel)
        bind(done, cancel)

    def encode_return(self, value: Any) -> tuple[Value, ...]:
        """Encode a function's result as the sequence of its kReturn; what has no wire form gets a handle.

        Raises:
            ResultError: It cannot be encoded (an int beyond 64 bits, an array of objects).
        """
        kind = type(value)
        if kind is int and -(1 << 63) <= value < 1 << 63:
            return (1, value)
        if kind in _PLAIN:
            return self._encode_plain(value)
        if isinstance(value, (str, int, float, bytes, bytearray, memoryview)):
            return self._encode_plain(plain(value))
        if isinstance(value, DeviceTensor):
            return self._encode_tensor(value)
        if is_array(value):
            return self._encode_tensor(DeviceTensor.of_array(value))
        if type(value).__module__.partition(".")[0] in ("numpy", "ml_dtypes"):
            import numpy as np

            if isinstance(value, np.generic) and has_item(value):  # a date is an object like others
                item = value.item()
                return self.encode_return(float(value) if isinstance(item, np.generic) else item)  # longdouble
        if isinstance(value, ServedFunction):
            return (68, self._issue(value))
        if isinstance(value, Module):
            return (73, self.table.issue(HandleKind.MODULE, value))
        if is_bare_enum(value):
            raise ResultError(f"the result is a member of the enum {kind.__name__}, which cannot travel; pass .value")
        index = _OBJECT_INDICES.get(type(value))
        if index is None and callable(value) and not isinstance(value, type):
            is_async = inspect.iscoroutinefunction(value)
            served = ServedFunction(getattr(value, "__name__", "function"), value, "coroutine" if is_async else "plain")
            return (68, self._issue(served))
        return (index or 74, self.table.issue(HandleKind.OBJECT, value))

    @staticmethod
    def _encode_plain(value: Any) -> tuple[Value, ...]:
        if isinstance(value, int) and not isinstance(value, Pointer) and not -(1 << 63) <= value < 1 << 63:
            raise ResultError(f"the int result of {value.bit_length()} bits does not fit the wire's 64 signed bits")
        if isinstance(value, str):
            try:
                value.encode()
            except UnicodeEncodeError as error:
                raise ResultError(f"the text result is not Unicode ({error.reason})") from None
        try:
            return encode_call_result(value)
        except ArgumentError as error:  # pragma: no cover  # every plain kind is known
            raise ResultError(str(error)) from None

    def _encode_tensor(self, tensor: DeviceTensor) -> tuple[Value, ...]:
        data = self.table.issue(HandleKind.DATA, tensor.memory)
        handle = self.table.issue(HandleKind.TENSOR, tensor)
        return (70, tensor.meta._replace(data=int(data)), handle)

    def free_handle(self, handle: int) -> None:
        """Release one reference to a function, module, object or tensor result."""
        kinds = (HandleKind.FUNCTION, HandleKind.MODULE, HandleKind.OBJECT, HandleKind.TENSOR)
        entry = self.table.entry(handle)
        if entry is not None and entry.kind is HandleKind.TENSOR:
            data = self.table.issue(HandleKind.DATA, entry.thing.memory)  # the handle it has already
            self.table.release(data, HandleKind.DATA)
            if self.table.release(data, HandleKind.DATA) is not None:
                self._drop(entry.thing.memory)
        self.table.release(handle, *kinds)

    # -- memory --------------------------------------------------------------------------------------------------

    def device_api(self, device: Device) -> DeviceAPI:
        """Return the API of a device's type: ours, a plug-in's, or TVM's runtime's where native code is allowed.

        Raises:
            DeviceError: There is none; the text is stock's, which clients know.
        """
        try:
            return find_device(device)
        except DeviceError:
            found = None
            if self.environment.native:
                from rpcnb.runtime.tvmdevices import find_runtime_device

                found = find_runtime_device(device, self.environment.runtime)
            if found is None:
                raise
            return found

    def set_device(self, device: Device) -> None:
        """Make ``device`` the current one of its type."""
        self.device_api(device).set_device(device)

    def get_attribute(self, device: Device, kind: int) -> Value:
        """Answer an attribute query; an absent device has existence 0, as in stock."""
        if not 0 <= kind < len(ATTRIBUTES):
            raise ResultError(f"device attribute {kind} is unknown; expected 0 to {len(ATTRIBUTES) - 1}")
        name = ATTRIBUTES[kind]
        if name != "exist":
            return self.device_api(device).attribute(device.index, name)
        try:
            return 1 if self.device_api(device).exists(device.index) else 0
        except RuntimeError:
            return 0

    def allocate(self, device: Device, nbytes: int, alignment: int, hint: DType) -> Pointer:
        """Allocate plain bytes."""
        if nbytes < 0:
            raise ResultError(f"cannot allocate {nbytes} bytes")
        return self._allocate(device, nbytes, alignment, None)

    def allocate_tensor(self, meta: TensorMeta, scope: str | None) -> Pointer:
        """Allocate memory for a tensor, aligned as stock does: ``max(64, bits / 8 * lanes)``."""
        return self._allocate(meta.device, meta.nbytes, meta.dtype.bits // 8 * meta.dtype.lanes, scope)

    def _allocate(self, device: Device, nbytes: int, alignment: int, scope: str | None) -> Pointer:
        memory = self.device_api(device).allocate(device, nbytes, alignment, scope or "global")
        try:
            handle = self.table.issue(HandleKind.DATA, memory)
        except Exception:
            self.device_api(device).free(memory)
            raise
        self._uses[memory] = 1
        return handle

    def free_data(self, device: Device, handle: int) -> None:
        """Free memory that was allocated."""
        entry = self.table.release(handle, HandleKind.DATA)
        if entry is not None:
            self._drop(entry.thing)

    def _drop(self, memory: Memory) -> None:
        """Free memory after its last use; what a function made is the function's own."""
        with self._lock:
            left = self._uses.pop(memory, 0) - 1
            if left > 0:
                self._uses[memory] = left
        if left == 0:
            self.device_api(memory.device).free(memory)

    def _memory(self, meta: TensorMeta, nbytes: int) -> tuple[Memory, int]:
        memory = self.tensor(meta._replace(shape=(nbytes,), dtype=DType(1, 8))).memory
        return memory, meta.byte_offset

    def direct(self, meta: TensorMeta, nbytes: int) -> memoryview | None:
        """Return plain CPU memory itself, checked."""
        memory, start = self._memory(meta, nbytes)
        if self.is_async:
            return None
        return self.device_api(meta.device).direct(memory, start, nbytes)

    def sink_for(self, handle: int, args: Sequence[Value], nbytes: int) -> Sink | None:
        """Stream the content of an uploaded file to disk."""
        entry = self.table.entry(handle)
        if entry is None or entry.kind is not HandleKind.FUNCTION or entry.thing.name != UPLOAD or len(args) != 1:
            return None
        return self.files.begin_upload(nbytes)

    def copy_to_remote(self, data: memoryview, meta: TensorMeta, nbytes: int) -> None:
        """Write and wait until that is done."""
        waiter = _Waiter()
        self.async_copy_to(data, meta, nbytes, waiter)
        waiter.result()

    def copy_from_remote(self, meta: TensorMeta, into: memoryview, nbytes: int) -> None:
        """Read and wait until that is done."""
        waiter = _Waiter()
        self.async_copy_from(meta, into, nbytes, waiter)
        waiter.result()

    @errors_to_done
    def async_copy_to(self, data: memoryview, meta: TensorMeta, nbytes: int, done: Done) -> None:
        """Write through the device's API, which says when it has finished."""
        memory, start = self._memory(meta, nbytes)
        finished = self._pin(memory, data, done)
        try:
            self.device_api(meta.device).copy_in(memory, start, data, None, finished)
        except BaseException as error:
            finished(error)

    @errors_to_done
    def async_copy_from(self, meta: TensorMeta, into: memoryview, nbytes: int, done: Done) -> None:
        """Read through the device's API, which says when it has finished."""
        memory, start = self._memory(meta, nbytes)
        finished = self._pin(memory, into, done)
        try:
            self.device_api(meta.device).copy_out(memory, start, into, None, finished)
        except BaseException as error:
            finished(error)

    def _pin(self, memory: Memory, data: memoryview, done: Done) -> Callable[[BaseException | None], None]:
        """Adapt a device's completion; memory and data stay until it comes, even if the session ends before."""
        with self._lock:
            if memory in self._uses:
                self._uses[memory] += 1
        pinned: list[Any] = [memory, data]

        def finished(error: BaseException | None) -> None:
            if not pinned:
                return
            pinned.clear()
            try:
                _finish(done)(error)
            finally:
                self._drop(memory)

        return finished

    def copy_among_remote(self, source: TensorMeta, target: TensorMeta, stream: int) -> None:
        """Copy between two tensors of equal size: of one device type, or from or to the CPU."""
        one, other = self.tensor(source), self.tensor(target)
        nbytes = one.meta.nbytes
        if nbytes != other.meta.nbytes:
            raise ResultError(f"cannot copy {nbytes} bytes, shape {source.shape}, into {other.meta.nbytes} bytes")
        if source.device.type == target.device.type:
            api = self.device_api(source.device)
            start, at = source.byte_offset, target.byte_offset
            api.copy_among(one.memory, start, other.memory, at, nbytes, self._stream(stream))
            return
        # One side must be plain memory, which the other side's API copies from or to.
        waiter = _Waiter()
        plain = self.device_api(source.device).direct(one.memory, source.byte_offset, nbytes)
        if plain is not None:
            self.async_copy_to(plain, target, nbytes, waiter)
        else:
            plain = self.device_api(target.device).direct(other.memory, target.byte_offset, nbytes)
            if plain is None:
                raise ResultError(f"cannot copy from {source.device} to {target.device}; go through the CPU")
            self.async_copy_from(source, plain, nbytes, waiter)
        waiter.result()

    # -- streams -------------------------------------------------------------------------------------------------

    def _stream(self, handle: int) -> Any:
        return self.table.find(handle, HandleKind.STREAM) if handle else None

    def create_stream(self, device: Device) -> Pointer:
        """Make a stream; NULL on the CPU."""
        stream = self.device_api(device).create_stream(device)
        return NULL if stream is None else self.table.issue(HandleKind.STREAM, stream)

    def free_stream(self, device: Device, stream: int) -> None:
        """Free a stream."""
        if stream:
            entry = self.table.release(stream, HandleKind.STREAM)
            if entry is not None:
                self.device_api(device).free_stream(device, entry.thing)

    def set_stream(self, device: Device, stream: int) -> None:
        """Make a stream the current one."""
        self.device_api(device).set_stream(device, self._stream(stream))

    def current_stream(self, device: Device) -> Pointer:
        """Return the current stream."""
        stream = self.device_api(device).current_stream(device)
        return NULL if stream is None else self.table.issue(HandleKind.STREAM, stream)

    def stream_sync(self, device: Device, stream: int) -> None:
        """Wait for a stream."""
        waiter = _Waiter()
        self.async_stream_wait(device, stream, waiter)
        waiter.result()

    @errors_to_done
    def async_stream_wait(self, device: Device, stream: int, done: Done) -> None:
        """Call ``done`` when the stream's work has ended."""
        self.device_api(device).synchronize(device, self._stream(stream), _finish(done))

    def shutdown(self) -> None:
        """Cancel what runs, free all memory, remove the files."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            running, self._running = self._running, set()
        if self._calls is not None:
            self._calls.close()
        for cancel in running:
            cancel()
        if self.environment.cells is not None:
            self.environment.cells.end(self)
        try:
            for entry in self.table.clear():
                if entry.kind is HandleKind.DATA:
                    self._drop(entry.thing)
        finally:
            self.files.close()


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


class _Waiter:
    """A completion that a thread waits for."""

    cancelled = False

    def __init__(self) -> None:
        self._event = threading.Event()
        self._result: Any = None
        self._error: BaseException | None = None

    def __call__(self, result: Any = None) -> None:
        if not self._event.is_set():
            self._result = result
            self._event.set()

    def error(self, error: BaseException) -> None:
        if not self._event.is_set():
            self._error = error
            self._event.set()

    def result(self) -> Any:
        self._event.wait()
        if self._error is not None:
            raise self._error
        return self._result


class _Releasing:
    """A completion after which what the operation used is given up, once."""

    __slots__ = ("_done", "_drop", "_held")

    def __init__(self, done: Done, drop: Callable[[Memory], None], held: list[Memory]) -> None:
        self._done = done
        self._drop = drop
        self._held: list[Memory] | None = held

    @property
    def cancelled(self) -> bool:
        return self._done.cancelled

    def bind(self, stop: Callable[[], object]) -> None:
        bind(self._done, stop)

    def __call__(self, result: Any = None) -> None:
        self._end(self._done, result)

    def error(self, error: BaseException) -> None:
        self._end(self._done.error, error)

    def _end(self, complete: Callable[[Any], object], outcome: Any) -> None:
        held, self._held = self._held, None
        if held is not None:
            try:
                complete(outcome)
            finally:
                for memory in held:
                    self._drop(memory)


class _Ended:
    """The completion of a coroutine, as :meth:`Environment.spawn` sees it."""

    __slots__ = ("_done", "_end")

    def __init__(self, end: Callable[[Any, BaseException | None], None], done: Done) -> None:
        self._end = end
        self._done = done

    @property
    def cancelled(self) -> bool:
        return self._done.cancelled

    def __call__(self, result: Any = None) -> None:
        self._end(result, None)

    def error(self, error: BaseException) -> None:
        self._end(None, error)


def _finish(done: Done) -> Callable[[BaseException | None], None]:
    """Adapt a device's completion."""

    def finished(error: BaseException | None) -> None:
        if error is None:
            done()
        else:
            done.error(error)

    return finished


def _legacy_async(function: Callable[..., Any]) -> Callable[..., Any]:
    """Adapt TVM's browser convention ``__async.NAME``: an extra last argument ``cb(code, value)``."""

    def call(done: Callback, *args: Any) -> None:
        def callback(code: int, value: Any = None) -> None:
            if code == 4:
                done(value)
            else:
                done.error(str(value))

        function(*args, callback)

    return call
