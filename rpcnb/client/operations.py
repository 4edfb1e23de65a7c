"""What both kinds of session can do, written once as flows.

:class:`Operations` holds what a session knows about its peer and turns the user's values into the wire's and back;
its methods return flows, which :class:`~rpcnb.client.session.Session` runs by blocking and
:class:`~rpcnb.client.aio.AsyncSession` by awaiting.
"""

from __future__ import annotations

import contextlib
import difflib
import inspect
import json
import mmap
import os
import weakref
from collections import deque
from typing import TYPE_CHECKING, Any, BinaryIO, TypeVar

from rpcnb.client.answers import expect, load_json
from rpcnb.client.moving import FileSink
from rpcnb.errors import (
    ArgumentError,
    CopyMismatch,
    FunctionNotFound,
    LimitExceeded,
    RemoteProtocolError,
    StaleHandle,
)
from rpcnb.link.order import Order
from rpcnb.link.pace import WHOLE, Pace
from rpcnb.protocol import flows
from rpcnb.protocol.peerlimits import PeerLimits, text_size
from rpcnb.runtime.files import file_digest
from rpcnb.values import (
    CPU,
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
from rpcnb.values import (
    dtype as as_dtype,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    import numpy as np

    from rpcnb.client.moving import Moving
    from rpcnb.link.control import LanesBase
    from rpcnb.protocol.flows import Flow, Result
    from rpcnb.protocol.handshake import KeyText
    from rpcnb.protocol.messages import Request

__all__ = ["Operations"]

T = TypeVar("T")
_PLAIN = frozenset({int, float, str, bytes, bool, type(None), DType})
_PART, _PARTS_AHEAD = 2 << 20, 4  # of files: what is on the way is in memory
_REMEMBERED = 256  # names of functions
_BYTES = (bytes, bytearray, memoryview)
_ATTRIBUTES = {
    "exist": 0,
    "max_threads_per_block": 1,
    "warp_size": 2,
    "max_shared_memory_per_block": 3,
    "compute_version": 4,
    "device_name": 5,
    "max_clock_rate": 6,
    "multi_processor_count": 7,
    "max_thread_dimensions": 8,
    "api_version": 11,
    "driver_version": 12,
    "l2_cache_size_bytes": 13,
    "total_global_memory": 14,
    "available_global_memory": 15,
}


_MOST_NAMES = 1 << 16


class _Known:
    """A function that the session keeps; unlike the user's own it does not hold the session, which holds it."""

    __slots__ = ("found", "handle", "name", "ops")

    def __init__(self, ops: Operations, handle: int, name: str, found: bool) -> None:
        self.ops = ops
        self.handle = handle
        self.name = name
        self.found = found


class Operations:
    """A session's knowledge of one connection, and its operations over it.

    A session that is opened again gets new ones. What came over a connection remembers its operations, so nothing of
    before ever reaches the server of after.

    Args:
        session: Whose operations these are; held weakly, so that a dropped session ends at once.
        types: The proxies' classes: function, module, tensor, object, device.
        link: The connection.
        lanes: Its further ones, or None.
        key: What the server answered in the handshake.

    Attributes:
        order: Who holds what there.
        garbage: Where finalizers note what is to be released.
    """

    def __init__(
        self, session: Any, types: tuple[Any, Any, Any, Any, Any], link: Any, lanes: LanesBase | None, key: KeyText
    ) -> None:
        self._session = weakref.ref(session)
        self.function_type, self.module_type, self.tensor_type, self.object_type, self.device_type = types
        self.link = link
        self.lanes: Any = lanes
        self.order = Order()
        self.peer: str = link.peer
        self.key = key
        self.garbage: deque[Request] = link.garbage
        self.is_rpcnb = key.features is not None
        self.through_stock = False  # the session goes on to another server through a stock one
        self._limit: int | None = 0 if self.is_rpcnb else None  # an rpcnb server has no packet limit
        # Bytes of a text argument; a stock server takes any.
        self._most_text = PeerLimits.told_by(key.features).text if self.is_rpcnb else 1 << 63
        self._surely_short = self._most_text // 4  # characters
        self._helpers: dict[str, int] = {}  # handles of functions that the session keeps
        self._names: list[str] | None = None
        self._names_of: dict[int, str] = {}  # of functions, by handle

    @property
    def session(self) -> Any:
        """The session; it lives as long as somebody runs an operation of it."""
        return self._session()

    # -- functions -----------------------------------------------------------------------------------------------

    def get_function(self, name: str) -> Flow[Any]:
        """Look up a function; an unknown name is an error that names its neighbours."""
        name = plain(name)
        if not isinstance(name, str):
            raise ArgumentError(0, f"of type {type(name).__name__}", "a function's name")
        return self.function_type(self, (yield from self._look_up(name)), name, True)

    def _look_up(self, name: str) -> Flow[int]:
        """Return the handle of a function."""
        handle = yield from flows.get_function(name)
        if not handle:
            raise FunctionNotFound((yield from self._not_found(name)))
        self._note_name(handle, name)
        return handle

    def _note_name(self, handle: int, name: str) -> None:
        """Remember what a function is called; of the last ones."""
        self._names_of[handle] = name
        if len(self._names_of) > _REMEMBERED:
            del self._names_of[next(iter(self._names_of))]

    def name_of(self, handle: int) -> str:
        """Name the function of a handle, for people; empty if that is not known any more."""
        return self._names_of.get(handle, "")

    def _not_found(self, name: str) -> Flow[str]:
        text = f"{self.peer} has no function {name!r}"
        try:
            close = difflib.get_close_matches(name, (yield from self.list_functions()), 3)
        except Exception:  # the peer cannot list; the plain text has to do
            return text
        return f"{text}; did you mean {', '.join(map(repr, close))}?" if close else text

    def helper(self, name: str) -> Flow[Any]:
        """Look up a well-known function once per session."""
        if name not in self._helpers:
            handle = yield from flows.get_function(name)
            if not handle:
                raise FunctionNotFound(f"{self.peer} has no function {name!r}; it does not support this")
            self._note_name(handle, name)
            self._helpers[name] = handle
        return _Known(self, self._helpers[name], name, False)

    def named(self, name: str) -> Flow[Any]:
        """Look up a function once per session, for ``session.fn``."""
        if name not in self._helpers:
            self._helpers[name] = yield from self._look_up(name)
        return _Known(self, self._helpers[name], name, True)

    def call_named(self, name: str, args: tuple[Any, ...]) -> Flow[Any]:
        """Call a function by name, looked up once per session."""
        function = yield from self.named(name)
        return (yield from self.call(function, args))

    def known_names(self) -> list[str]:
        """Return the names listed so far; never asks the server."""
        return self._names or []

    def ask(self, name: str, *args: Any) -> Flow[Any]:
        """Call a well-known function, looked up once per session."""
        function = yield from self.helper(name)
        return (yield from self.call(function, args))

    def list_functions(self) -> Flow[list[str]]:
        """List the names of the server's functions; asked once, all names on the way at once."""
        if self._names is None:
            listing = yield from self.ask("ffi.FunctionListGlobalNamesFunctor")
            expect(listing, self.function_type, "a function that lists names")
            count = expect((yield from self.call(listing, (-1,))), int, "the number of names")
            if count > _MOST_NAMES:
                raise LimitExceeded(f"{self.peer} says that it has {count} functions; at most {_MOST_NAMES} are listed")
            tickets = []
            names = []
            for index in range(count):
                tickets.append((yield flows.Send(_call(listing, index))))
                if len(tickets) == 64:
                    names += yield from _collect(tickets)
            names += yield from _collect(tickets)
            self._names = sorted(names)
        return list(self._names)

    def status(self) -> Flow[dict[str, Any]]:
        """Ask an rpcnb server how it is."""
        found: dict[str, Any] = expect(load_json((yield from self.ask("rpcnb.status"))), dict, "a status")
        return found

    def call(self, function: Any, args: tuple[Any, ...]) -> Flow[Any]:
        """Call a remote function; arrays among the arguments are uploaded for the call."""
        if self._is_found_anew(function):
            return self.call_named(function.name, args)
        handle = function.handle
        self.own(function)
        for value in args:
            if type(value) not in _PLAIN or (type(value) is str and len(value) > self._surely_short):
                return self._call_with_objects(handle, args)
        return flows.call_function(handle, args, self.wrap)

    def _call_with_objects(self, handle: int, args: tuple[Any, ...]) -> Flow[Any]:
        uploads: list[Any] = []
        values = []
        for index, value in enumerate(args):
            values.append(self.argument(index, value) if not is_array(value) else value)
        for index, value in enumerate(values):
            if is_array(value):
                try:
                    tensor = yield from self.tensor(value, CPU)
                except CopyMismatch as error:
                    raise ArgumentError(index, f"an array that cannot travel ({error})") from None
                uploads.append(tensor)
                values[index] = tensor.meta
        result = yield from flows.call_function(handle, tuple(values), self.wrap)
        for tensor in uploads:
            tensor.free()
        return result

    def map_calls(self, function: Any, calls: Iterable[tuple[Any, ...]], window: int) -> Flow[list[Any]]:
        """Call a function for each of many arguments, ``window`` calls in one go."""
        if self._is_found_anew(function):
            return self._map_named(function.name, calls, window)
        self.own(function)
        return flows.map_calls(function.handle, map(self.arguments, calls), window, self.wrap)

    def _map_named(self, name: str, calls: Iterable[tuple[Any, ...]], window: int) -> Flow[list[Any]]:
        function = yield from self.get_function(name)
        return (yield from self.map_calls(function, calls, window))

    def _is_found_anew(self, function: Any) -> bool:
        """Tell whether a function is looked up again: in a forked child, which has a connection of its own."""
        return function.ops is not self and function.found and bool(function.ops.link.wire.is_parents)

    def arguments(self, args: tuple[Any, ...]) -> tuple[Value, ...]:
        """Turn the arguments of one call into wire values; arrays are refused here."""
        for value in args:
            if type(value) not in _PLAIN or (type(value) is str and len(value) > self._surely_short):
                return tuple(self.argument(index, value) for index, value in enumerate(args))
        return args

    def argument(self, index: int, value: Any) -> Value:
        """Turn one argument into a wire value.

        Raises:
            ArgumentError: It cannot travel to this server.
        """
        if isinstance(value, str) and type(value) is not DType:
            return self._text(index, plain(value))
        if type(value) in _PLAIN or isinstance(value, (Pointer, TensorMeta)):
            return value  # type: ignore[no-any-return]  # checked
        if isinstance(value, self.device_type):
            if value.session is not self.session:
                raise ArgumentError(index, f"device {value} of another session")
            return Device(value.type, value.index)
        if isinstance(value, self.tensor_type):
            self._own(index, value, "tensor")
            if value.freed:
                raise StaleHandle(f"argument {index} is a tensor that was freed before")
            meta: TensorMeta = value.meta
            return meta
        if isinstance(value, (self.function_type, self.module_type, self.object_type)):
            self._own(index, value, "function, module or object")
            return self._reference(index, value)
        if is_array(value):
            raise ArgumentError(index, "a numpy array, which is not uploaded here", "a tensor: session.array(...)")
        found = plain(value)
        if type(found) in _PLAIN:
            return found  # type: ignore[no-any-return]  # checked
        kind = type(value).__module__.partition(".")[0]
        if kind in ("numpy", "ml_dtypes") and has_item(value):
            return value.item()  # type: ignore[no-any-return]  # a numpy scalar
        if isinstance(found, (bytearray, memoryview)):
            return bytes(found)
        if isinstance(value, Device):
            return value
        raise ArgumentError(index, _describe(value))

    def _text(self, index: int, text: str) -> str:
        nbytes = text_size(text, self._most_text)
        if nbytes > self._most_text:
            raise ArgumentError(
                index,
                f"a text of {nbytes} bytes",
                f"at most {self._most_text}, the server's limit for text (Limits.text); longer values travel as bytes",
            )
        return text

    def _reference(self, index: int, value: Any) -> Value:
        if isinstance(value, self.module_type):
            return ModuleRef(value.handle)
        if isinstance(value, self.object_type):
            return ObjectRef(value.handle)
        if not self.is_rpcnb:
            raise ArgumentError(index, "a remote function, which stock TVM servers do not accept")
        return FunctionRef(value.handle)

    def _own(self, index: int, value: Any, what: str) -> None:
        if value.session is not self.session:
            raise ArgumentError(index, f"a {what} of another session")
        self.own(value)

    def own(self, thing: Any) -> None:
        """Raise StaleHandle for something of before a reconnect; nothing has been sent."""
        if thing.ops is not self:
            name = thing.session.name
            ended = "this process was forked" if thing.ops.link.wire.is_parents else f"{name} was opened again"
            raise StaleHandle(f"{thing!r} is of before {ended}; get it anew")

    def wrap(self, result: Result) -> Any:
        """Turn a call's result into what the user holds."""
        if type(result) in _PLAIN:
            return result
        if isinstance(result, flows.TensorResult):
            return self.tensor_type(self, result.meta, result.handle)
        if isinstance(result, FunctionRef):
            return self.function_type(self, result.handle, "")
        if isinstance(result, ModuleRef):
            return self.module_type(self, result.handle)
        if isinstance(result, ObjectRef):
            return self.object_type(self, result.handle)
        if isinstance(result, Device):
            return self.device_type(self.session, result.type, result.index)
        return result

    # -- memory --------------------------------------------------------------------------------------------------

    def empty(
        self, shape: Sequence[int] | int, dtype: Any = "float32", device: Any = None, mem_scope: str | None = None
    ) -> Flow[Any]:
        """Allocate an uninitialised tensor."""
        extents = (plain(shape),) if isinstance(shape, int) else tuple(int(plain(extent)) for extent in shape)
        meta = TensorMeta(0, self.wire_device(device), extents, _wire_dtype(dtype))
        if extents and min(extents) < 0:
            raise CopyMismatch(f"cannot allocate shape {extents}")
        handle = yield from flows.allocate(meta, mem_scope)
        self.session._count_memory(meta.nbytes)
        return self.tensor_type(self, meta._replace(data=handle), 0)

    def wire_device(self, device: Any) -> Device:
        """Return the wire's device; None is the server's CPU."""
        if device is None:
            return CPU
        if isinstance(device, self.device_type) and device.session is not self.session:
            raise ArgumentError(0, f"device {device} of another session", "a device of this session")
        return Device(device.type, device.index)

    def tensor(self, source: Any, device: Any = None) -> Flow[Any]:
        """Allocate a tensor and copy an array into it."""
        from rpcnb.runtime.arrays import dtype_of

        array = _local_array(source)
        made = yield from self.empty(array.shape, dtype_of(array), device)
        yield from self.copy_to(made, array)
        return made

    def _copy_limit(self) -> Flow[int]:
        if self._limit is None:
            self._limit = yield from flows.chunk_limit()
        return self._limit

    def _pace(self, nbytes: int) -> Pace | None:
        """Say in which parts much data moves to an rpcnb server; None: whole."""
        return Pace() if self.is_rpcnb and nbytes > WHOLE else None

    def copy_to(self, tensor: Any, source: Any) -> Flow[None]:
        """Copy a local array into a remote tensor of the same shape and type."""
        from rpcnb.runtime.arrays import dtype_of, lane_shape, wire_bytes

        meta = self._live(tensor)
        array = _local_array(source, meta)
        kind, shape = meta.dtype, lane_shape(meta.dtype, meta.shape)
        if array.shape != shape or dtype_of(array) != kind.lane:
            raise CopyMismatch(
                f"cannot copy {array.nbytes} bytes, shape {array.shape} {array.dtype}, "
                f"into {meta.nbytes} bytes, shape {meta.shape} {kind}"
            )
        data = wire_bytes(array, kind)
        limit = yield from self._copy_limit()
        tensor.defined = False
        if self._offset_gets_lost(meta):
            stage = yield from self.empty(meta.shape, kind, tensor.device)
            yield from flows.copy_to_remote(stage.meta, data, limit=limit)
            yield from flows.copy_among_remote(stage.meta, meta)
        else:
            sync = self._needs_sync(meta)
            yield from flows.copy_to_remote(meta, data, limit=limit, sync=sync, pace=self._pace(meta.nbytes))
        tensor.defined = True

    def copy_from(self, tensor: Any, out: np.ndarray[Any, Any] | None = None) -> Flow[np.ndarray[Any, Any]]:
        """Copy a remote tensor into ``out``, or into a new array."""
        import numpy as np

        from rpcnb.runtime.arrays import byte_view, dtype_of, lane_shape, numpy_dtype, plain_array, unpack

        meta = self._live(tensor)
        kind, shape = meta.dtype, lane_shape(meta.dtype, meta.shape)
        packed = kind.bits < 8
        given, out = out, None if out is None else plain_array(out)
        if out is not None and (out.shape != shape or dtype_of(out) != kind.lane or not out.flags.writeable):
            raise CopyMismatch(
                f"cannot copy {meta.nbytes} bytes, shape {meta.shape} {kind}, "
                f"into a {'writeable' if out.flags.writeable else 'read-only'} array of shape {out.shape} {out.dtype}"
            )
        direct = out is not None and out.flags.c_contiguous and out.dtype.byteorder != ">" and not packed
        if direct:
            assert out is not None
            target = out
        else:
            target = np.empty(meta.nbytes, np.uint8) if packed else np.empty(shape, numpy_dtype(kind))
        limit = yield from self._copy_limit()
        if self._offset_gets_lost(meta):
            stage = yield from self.empty(meta.shape, kind, tensor.device)
            yield from flows.copy_among_remote(meta, stage.meta)
            meta = stage.meta
        sync = self._needs_sync(meta)
        yield from flows.copy_from_remote(meta, byte_view(target), limit=limit, sync=sync, pace=self._pace(meta.nbytes))
        if packed:
            target = unpack(target, kind.lane, shape)
        if out is not None and not direct:
            out[...] = target
        return target if given is None else given

    def _offset_gets_lost(self, meta: TensorMeta) -> bool:
        """Tell whether a copy through a view would go wrong: a stock server that hops on drops the view's offset."""
        return self.through_stock and meta.byte_offset != 0 and meta.nbytes > 0

    def _needs_sync(self, meta: TensorMeta) -> bool:
        """Ask stock peers to sync after a copy on an accelerator, as their own client does."""
        return meta.device.type != 1 and not self.is_rpcnb

    def copy_tensor(self, source: Any, target: Any) -> Flow[None]:
        """Copy between two tensors of this session, within the server."""
        one, other = self._live(source), self._live(target)
        if one.nbytes != other.nbytes:
            raise CopyMismatch(
                f"cannot copy {one.nbytes} bytes, shape {one.shape} {one.dtype}, "
                f"into {other.nbytes} bytes, shape {other.shape} {other.dtype}"
            )
        if one.nbytes:
            yield from flows.copy_among_remote(one, other)

    def free(self, handle: int, request: Request) -> None:
        """Release memory now, or once the operation that uses it has ended."""
        hold = self.order.holder(handle)
        if hold is None or not hold.then(lambda: self.garbage.append(request)):
            self.garbage.append(request)

    def _live(self, tensor: Any) -> TensorMeta:
        self.own(tensor)
        if tensor.freed:
            raise StaleHandle("this tensor was freed before")
        meta: TensorMeta = tensor.meta
        return meta

    def attribute(self, device: Any, name: str) -> Flow[Any]:
        """Ask for a device attribute by name."""
        kind = _ATTRIBUTES.get(name)
        if kind is None:
            raise ArgumentError(1, repr(name), f"one of {', '.join(_ATTRIBUTES)}")
        value = yield from flows.get_attribute(self.wire_device(device), kind)
        if name == "exist":
            return bool(value)
        if name == "max_thread_dimensions" and isinstance(value, str):
            try:
                return json.loads(value)
            except (ValueError, RecursionError):
                raise RemoteProtocolError(f"expected thread dimensions, got {value[:60]!r}") from None
        return value

    # -- files and modules ---------------------------------------------------------------------------------------

    def upload(self, data: Any, target: str | None = None) -> Flow[None]:
        """Put a local file, or bytes under a name, into the session's directory."""
        data = plain(data)
        if isinstance(data, _BYTES):
            if not target:
                raise ArgumentError(1, "missing", "the name that the bytes get on the server")
            blob: bytes | memoryview = bytes(data)
        else:
            path = os.fspath(data)
            target = target or os.path.basename(path)
            if self.is_rpcnb and os.path.getsize(path) > WHOLE:
                yield from self._put(path, target)
                return
            with open(path, "rb") as file:
                blob = _content(file)
        yield from self.ask("tvm.rpc.server.upload", target, blob)

    def _put(self, path: str, target: str) -> Flow[None]:
        """Upload a large file in parts; nothing of it moves if the server has it already."""
        with open(path, "rb") as file:
            total = os.fstat(file.fileno()).st_size
            known = yield from self.ask("rpcnb.digest", target, total)
            if known and known == file_digest(path):
                return
            put = yield from self.helper("rpcnb.put")
            pace, offset = Pace(), 0
            tickets: deque[tuple[Any, int]] = deque()
            while offset < total:
                data = file.read(min(pace.size, _PART, total - offset))
                if not data:
                    raise CopyMismatch(f"{path} has shrunk to {offset} of {total} bytes while it was uploaded")
                tickets.append(((yield flows.Send(_call(put, target, total, offset, data))), len(data)))
                offset += len(data)
                if len(tickets) > _PARTS_AHEAD:
                    yield from _arrived(tickets.popleft(), pace)
            while tickets:
                yield from _arrived(tickets.popleft(), pace)

    def download(
        self, path: str, to: str | os.PathLike[str] | None = None, moving: Moving | None = None
    ) -> Flow[bytearray]:
        """Return the content of a file of the session's directory, or write it to the local file ``to``."""
        if to is None:
            return (yield from self._content_of(path))
        whole = os.fspath(to)
        partial = f"{whole}.part"
        try:
            with open(partial, "wb") as file:
                if self.is_rpcnb:
                    yield from self._get(path, file, moving)
                else:
                    yield from self._stream(path, file, moving)
            os.replace(partial, whole)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(partial)
            raise
        return bytearray()

    def _stream(self, path: str, file: BinaryIO, moving: Moving | None) -> Flow[None]:
        """Download in one piece, written as it comes: from a stock server."""
        download = yield from self.helper("tvm.rpc.server.download")
        sink = FileSink(file, moving)
        call = _call(download, path)
        call.sink = sink
        data = expect(flows.call_result(flows.result_of((yield call))), _BYTES, "a file's bytes")
        if sink.error is not None:
            raise sink.error
        file.write(data)  # a small one came whole

    def _get(self, path: str, file: BinaryIO, moving: Moving | None) -> Flow[None]:
        """Download in parts to a local file."""
        total = expect((yield from self.ask("rpcnb.size", path)), int, "a file's size")
        if moving is not None:
            moving.total = total
        get = yield from self.helper("rpcnb.get")
        pace, offset = Pace(), 0
        tickets: deque[tuple[Any, int]] = deque()
        while offset < total or tickets:
            if offset < total and len(tickets) <= _PARTS_AHEAD:
                nbytes = min(pace.size, _PART, total - offset)
                tickets.append(((yield flows.Send(_call(get, path, offset, nbytes))), nbytes))
                offset += nbytes
                continue
            nbytes = tickets[0][1]
            data = expect((yield from _arrived(tickets.popleft(), pace)), _BYTES, "a part of a file")
            if len(data) != nbytes:
                raise CopyMismatch(f"{path} has changed at the server while it was downloaded")
            file.write(data)

    def _content_of(self, path: str) -> Flow[bytearray]:
        return bytearray(expect((yield from self.ask("tvm.rpc.server.download", path)), _BYTES, "a file's bytes"))

    def remove(self, path: str) -> Flow[None]:
        """Delete a file of the session's directory."""
        yield from self.ask("tvm.rpc.server.remove", path)

    def listdir(self, path: str = ".") -> Flow[list[str]]:
        """List the names in a directory of the session."""
        text: str = expect((yield from self.ask("tvm.rpc.server.listdir", path)), str, "names with commas")
        return [name for name in text.split(",") if name]  # TVM's C++ server ends with a comma

    def load_module(self, path: str) -> Flow[Any]:
        """Load an uploaded library as a module."""
        return expect((yield from self.ask("tvm.rpc.server.load_module", path)), self.module_type, "a module")

    def download_linked_module(self, path: str) -> Flow[bytearray]:
        """Link an uploaded object file or archive at the server; returns the shared library's bytes."""
        data = yield from self.ask("tvm.rpc.server.download_linked_module", path)
        return bytearray(expect(data, _BYTES, "a library's bytes"))

    def system_lib(self) -> Flow[Any]:
        """Return the module of statically linked functions."""
        return expect((yield from self.ask("ffi.SystemLib")), self.module_type, "a module")

    def module_function(self, module: Any, name: str, query_imports: bool = True) -> Flow[Any]:
        """Look up a function of a module."""
        found = yield from self.ask("tvm.rpc.server.ModuleGetFunction", module, name, query_imports)
        if found is None:
            raise FunctionNotFound(f"module has no function {name!r}")
        expect(found, self.function_type, "a function").name = name
        self._note_name(found.handle, name)
        return found

    def import_module(self, parent: Any, child: Any) -> Flow[None]:
        """Make the functions of one module reachable through another."""
        yield from self.ask("tvm.rpc.server.ImportModule", parent, child)

    def time_evaluator(self, module: Any, name: str, device: Any, options: dict[str, Any]) -> Flow[Any]:
        """Make the remote function that measures another one."""
        where = self.wire_device(device)
        numbers = [int(plain(options[key])) for key in _TIMING[:-1]]
        evaluator = yield from self.ask(
            "runtime.RPCTimeEvaluator", module, name, where.type, where.index, *numbers, options["f_preproc"]
        )
        return expect(evaluator, self.function_type, "a function that measures")


_TIMING = (
    "number",
    "repeat",
    "min_repeat_ms",
    "limit_zero_time_iterations",
    "cooldown_interval_ms",
    "repeats_to_cooldown",
    "cache_flush_bytes",
    "f_preproc",
)


def _content(file: Any) -> bytes | memoryview:
    """Return a file's content without reading it into memory, where it is large."""
    if os.fstat(file.fileno()).st_size <= WHOLE:
        found: bytes = file.read()
        return found
    return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))


def _arrived(part: tuple[Any, int], pace: Pace) -> Flow[Any]:
    result = flows.call_result(flows.result_of((yield flows.Wait(part[0]))))
    pace.moved(part[1])
    return result


def _call(function: Any, *args: Value) -> Any:
    from rpcnb.protocol.messages import CallFunc

    return CallFunc(function.handle, args)


def _collect(tickets: list[Any]) -> Flow[list[str]]:
    replies = []
    for ticket in tickets:
        replies.append((yield flows.Wait(ticket)))  # noqa: PERF401  # a comprehension cannot yield
    names = [flows.call_result(flows.result_of(reply)) for reply in replies]
    tickets.clear()
    return [name for name in names if isinstance(name, str)]


def _local_array(source: Any, meta: TensorMeta | None = None) -> np.ndarray[Any, Any]:
    """Return a numpy array of what the user gave: an array, anything with DLPack, or (for a known type) a sequence."""
    import numpy as np

    from rpcnb.runtime.arrays import plain_array

    if isinstance(source, np.ndarray):
        return plain_array(source)
    if hasattr(source, "__dlpack__"):
        from rpcnb.runtime.dlpack import from_dlpack

        return from_dlpack(source)
    if isinstance(source, (list, tuple)):
        source = [plain_array(one) if isinstance(one, np.ndarray) else one for one in source]
    if meta is not None:
        from rpcnb.runtime.arrays import numpy_dtype

        return np.asarray(source, dtype=numpy_dtype(meta.dtype))
    return np.asarray(source)


def _wire_dtype(dtype: Any) -> DType:
    if isinstance(dtype, (str, DType)):
        return as_dtype(dtype)
    import numpy as np

    from rpcnb.runtime.arrays import dtype_of

    return dtype_of(np.empty(0, dtype))


def _count(shape: tuple[int, ...]) -> int:
    count = 1
    for extent in shape:
        count *= extent
    return count


def _describe(value: Any) -> str:
    if inspect.isfunction(value) or inspect.isbuiltin(value):
        return "a local function"
    if is_bare_enum(value):
        return f"a member of the enum {type(value).__name__}; pass .value"
    if isinstance(value, (list, tuple)):
        return f"a {type(value).__name__}; pass its elements, or a numpy array"
    return f"of type {type(value).__name__}"
