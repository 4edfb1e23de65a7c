"""Relax's virtual machine on the device, driven from here; TVM is not needed on this side.

A function is called by ``set_input``, ``invoke_stateful``, ``get_output_arity`` and ``get_output``, which every server
with TVM's runtime has, and which travel together: one round trip, a second one for a tuple's fields. The machine keeps
arguments and results between them, so operations of one machine wait for each other, whoever begins them.

Source:
    python/tvm/runtime/vm.py, src/runtime/vm/vm.cc.
"""

from __future__ import annotations

import os
import tempfile
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from rpcnb.client.profile import Profile
from rpcnb.errors import ArgumentError, DeviceError, FunctionNotFound, LibraryError, RemoteError
from rpcnb.protocol import flows
from rpcnb.protocol.flows import Send, Wait
from rpcnb.protocol.messages import CallFunc
from rpcnb.values import CPU, StaysHere, is_array

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from rpcnb.client.operations import Operations
    from rpcnb.protocol.flows import Flow

__all__ = ["VM", "AsyncVM", "VMFunction", "open_vm"]

_NAIVE, _POOLED = 1, 2  # allocators
_MOST_FIELDS = 4096  # of one tuple
_TENSOR = "a tensor of the session: session.array(x)"


def open_vm(ops: Operations, library: Any, devices: Any, memory_cfg: Any) -> Flow[tuple[Any, list[Any]]]:
    """Load a library's virtual machine and initialize it.

    Returns:
        Its module and its devices.
    """
    chosen = [*devices] if isinstance(devices, (list, tuple)) else [devices or ops.device_type(ops.session, CPU.type)]
    wired = [ops.wire_device(device) for device in chosen]
    for device, wire in zip(chosen, wired, strict=True):
        if wire.type != CPU.type and not (yield from ops.attribute(device, "exist")):
            raise DeviceError(f"{ops.peer} has no device {wire}")
    if wired[-1].type != CPU.type:  # shapes are computed there
        wired.append(CPU)
    setup: list[int] = []
    for index, device in enumerate(wired):
        setup += [device.type, device.index, _allocator(memory_cfg, chosen[index] if index < len(chosen) else None)]
    module = library if isinstance(library, ops.module_type) else (yield from _load(ops, library))
    try:
        load = yield from ops.module_function(module, "vm_load_executable")
    except FunctionNotFound:
        raise LibraryError(
            "this library has no Relax executable; its functions are called directly: module['name'](...)"
        ) from None
    machine = yield from ops.call(load, ())
    if not isinstance(machine, ops.module_type):
        raise LibraryError(f"vm_load_executable returned {type(machine).__name__}; expected a module")
    begin = yield from ops.module_function(machine, "vm_initialization")
    yield from ops.call(begin, tuple(setup))
    return machine, chosen


def _allocator(memory_cfg: Any, device: Any) -> int:
    kind = memory_cfg.get(device, "pooled") if isinstance(memory_cfg, dict) else memory_cfg or "pooled"
    if kind not in ("naive", "pooled"):
        raise ValueError(f"memory_cfg expects 'naive' or 'pooled', or a dict of these by device, got {kind!r}")
    return _NAIVE if kind == "naive" else _POOLED


def _load(ops: Operations, library: Any) -> Flow[Any]:
    """Upload a library, which moves nothing if the server has it, and load it."""
    if hasattr(library, "export_library"):  # TVM's executable
        with tempfile.TemporaryDirectory() as folder:
            path = os.path.join(folder, f"{getattr(library, 'name', None) or 'relax'}.so")
            library.export_library(path)
            yield from ops.upload(path)
    else:
        path = os.fspath(library)
        yield from ops.upload(path)
    return (yield from ops.load_module(os.path.basename(path)))


class VM(StaysHere):
    """Relax's virtual machine on the device: ``vm["main"](x, w)``.

    Attributes:
        session: Whose it is.
        module: The server's module.
        devices: On which it runs.
    """

    _instead = "open one in a session of that process"

    def __init__(self, session: Any, module: Any, devices: Sequence[Any]) -> None:
        self.session = session
        self.module = module
        self.devices = list(devices)
        self._names: dict[str, list[str]] = {}  # of parameters, by function
        self._given: dict[str, list[Any]] = {}  # arguments by set_input, of each function
        self._replaced: set[str] = set()  # where a call has replaced them since

    def __repr__(self) -> str:
        where = ", ".join(f"{device.name}:{device.index}" for device in self.devices)
        return f"{type(self).__name__}({where} of {self.session.name})"

    def __getitem__(self, name: str) -> VMFunction:
        return VMFunction(self, name)

    def set_input(self, func_name: str, *args: Any, timeout: float | None = None, **kwargs: Any) -> Any:
        """Give a function its arguments; :meth:`invoke_stateful` calls it."""
        make = lambda ops: self._set_input(ops, func_name, args, kwargs)  # noqa: E731
        return self.session._run(make, timeout, "set_input", self._uses(args, kwargs), ordered=True)

    def invoke_stateful(self, func_name: str, *, timeout: float | None = None) -> Any:
        """Call a function with the arguments it was given."""
        return self.session._run(
            lambda ops: self._invoke(ops, func_name), timeout, func_name, self._uses(), ordered=True
        )

    def get_outputs(self, func_name: str, *, timeout: float | None = None) -> Any:
        """Return what a function has returned: a tensor, or (nested) tuples of them; of the last call, whoever's."""
        make = lambda ops: self._outputs(ops, func_name)  # noqa: E731
        return self.session._run(make, timeout, "get_outputs", self._uses(), ordered=True)

    invoke = invoke_stateful
    outputs = get_outputs

    def save_function(
        self,
        func_name: str,
        saved_name: str,
        *args: Any,
        include_return: bool = True,
        timeout: float | None = None,
        **kwargs: Any,
    ) -> Any:
        """Keep a function with its arguments under another name, to be measured or called without any; as in TVM."""
        make = lambda ops: self._save(ops, func_name, saved_name, include_return, args, kwargs)  # noqa: E731
        return self.session._run(make, timeout, "save_function", self._uses(args, kwargs), ordered=True)

    def time_evaluator(self, func_name: str, dev: Any = None, *numbers: Any, **options: Any) -> Any:
        """Return a function that measures ``func_name`` at the server; options as :meth:`Session.time_evaluator`."""
        return self.module.time_evaluator(func_name, dev or self.devices[0], *numbers, **options)

    def profile(self, func_name: str, *args: Any, runs: int = 10, timeout: float | None = None, **kwargs: Any) -> Any:
        """Measure where the time of a function goes, call by call; returns a :class:`Profile`: a table with bars.

        Args:
            func_name: The function.
            args: Its arguments.
            runs: How often it runs, after one run that is not measured.
            timeout: Seconds for all of it.
            kwargs: Arguments by name.

        Raises:
            FunctionNotFound: Only rpcnb's servers do that.
        """
        make = lambda ops: self._profile(ops, func_name, runs, args, kwargs)  # noqa: E731
        return self.session._run(make, timeout, f"profile {func_name}", self._uses(args, kwargs), ordered=True)

    def _uses(self, args: Iterable[Any] = (), named: Mapping[str, Any] = MappingProxyType({})) -> list[Any]:
        """Return what an operation holds as long as it goes on: the machine, and the arguments."""
        return [self.module, *args, *named.values()]

    # -- flows -------------------------------------------------------------------------------------------------------

    def _function(self, ops: Operations, name: str) -> Flow[Any]:
        return (yield from self.module._lookup(ops, name, False))

    def _do(self, ops: Operations, name: str, *args: Any) -> Flow[Any]:
        return (yield from ops.call((yield from self._function(ops, name)), args))

    def _parameters(self, ops: Operations, name: str) -> Flow[list[str]]:
        """Return the names of a function's parameters; asked for once."""
        if name not in self._names:
            try:
                count = yield from self._do(ops, "get_function_arity", name)
            except RemoteError as error:
                raise FunctionNotFound(f"the virtual machine has no function {name!r}: {_first(error)}") from None
            if not isinstance(count, int) or not 0 <= count <= _MOST_FIELDS:
                raise FunctionNotFound(f"the virtual machine has no function {name!r}")
            ask = yield from self._function(ops, "get_function_param_name")
            self._names[name] = yield from _together(ops, [(ask, (name, index)) for index in range(count)])
        return self._names[name]

    def _arguments(
        self, ops: Operations, name: str, args: tuple[Any, ...], named: Mapping[str, Any]
    ) -> Flow[list[Any]]:
        """Return the arguments in the order of the parameters; numbers as tensors without dimensions."""
        values: list[Any] = [*args]
        if named:
            names = yield from self._parameters(ops, name)
            unknown = [key for key in named if key not in names]
            open_places = [index for index, one in enumerate(names) if one not in named]
            if unknown or len(open_places) != len(args):
                shown = ", ".join(names)
                wrong = f"no parameter {unknown[0]!r}" if unknown else f"{len(args) + len(named)} arguments"
                raise TypeError(f"{name}({shown}) got {wrong}")
            values = [named.get(one) for one in names]
            for index, value in zip(open_places, args, strict=True):
                values[index] = value
        for index, value in enumerate(values):
            values[index] = yield from self._argument(ops, index, value)
        return values

    @staticmethod
    def _argument(ops: Operations, index: int, value: Any) -> Flow[Any]:
        if isinstance(value, (list, tuple)):
            raise ArgumentError(index, "a tuple", "one tensor each: RPC carries no tuples to a virtual machine")
        if is_array(value) or hasattr(value, "__dlpack__"):
            raise ArgumentError(index, "an array of this process", _TENSOR)
        if isinstance(value, (bool, int, float)):
            import numpy as np

            kind = "float32" if isinstance(value, float) else "int32"
            return (yield from ops.tensor(np.array(value, kind), CPU))
        if value is None:
            raise ArgumentError(index, "None", _TENSOR)
        try:
            ops.argument(index, value)
        except ArgumentError as error:
            raise ArgumentError(index, error.seen, _TENSOR) from None
        return value

    def _set_input(self, ops: Operations, name: str, args: tuple[Any, ...], named: Mapping[str, Any]) -> Flow[None]:
        values = yield from self._arguments(ops, name, args, named)
        yield from self._do(ops, "set_input", name, *values)
        self._given[name] = values
        self._replaced.discard(name)

    def _invoke(self, ops: Operations, name: str) -> Flow[Any]:
        if name in self._replaced and name in self._given:
            yield from self._do(ops, "set_input", name, *self._given[name])
            self._replaced.discard(name)
        return (yield from self._do(ops, "invoke_stateful", name))

    def _call(self, ops: Operations, name: str, args: tuple[Any, ...], named: Mapping[str, Any]) -> Flow[Any]:
        values = yield from self._arguments(ops, name, args, named)
        steps = []
        unknown: FunctionNotFound | None = None
        for step in ("set_input", "invoke_stateful", "get_output_arity", "get_output"):
            steps.append((yield from self._function(ops, step)))  # noqa: PERF401  # it yields
        first, *others = steps
        self._replaced.add(name)
        try:
            found = yield from _together(ops, [(first, (name, *values)), *((one, (name,)) for one in others)], spared=1)
        except RemoteError as error:
            if "Unknown function" not in error.message and "Cannot find" not in error.message:
                raise
            unknown = FunctionNotFound(f"the virtual machine has no function {name!r}: {_first(error)}")
        if unknown is not None:
            return (yield from self._call_saved(ops, name, values, unknown))
        if found[2] == -1:
            if isinstance(found[3], RemoteError):
                raise found[3]
            return found[3]
        return (yield from self._fields(ops, name, (), found[2]))

    def _call_saved(self, ops: Operations, name: str, values: list[Any], why: FunctionNotFound) -> Flow[Any]:
        """Call what ``save_function`` has kept; ``why`` tells that it is none of the executable's functions."""
        try:
            saved = yield from self._function(ops, name)
        except FunctionNotFound:
            raise why from None
        if values:
            raise TypeError(f"{name}() was saved with its arguments; it takes none, got {len(values)}")
        return (yield from ops.call(saved, ()))

    def _outputs(self, ops: Operations, name: str, place: tuple[int, ...] = ()) -> Flow[Any]:
        """Return the output at a place of nested tuples, or all below it."""
        return (yield from self._fields(ops, name, place, (yield from self._do(ops, "get_output_arity", name, *place))))

    def _fields(self, ops: Operations, name: str, place: tuple[int, ...], arity: Any) -> Flow[Any]:
        if arity == -1:
            return (yield from self._do(ops, "get_output", name, *place))
        if not isinstance(arity, int) or not 0 <= arity <= _MOST_FIELDS:
            raise LibraryError(f"{name} says that it returns {arity!r} values")
        ask = yield from self._function(ops, "get_output_arity")
        get = yield from self._function(ops, "get_output")
        places = [(*place, index) for index in range(arity)]
        arities = yield from _together(ops, [(ask, (name, *one)) for one in places])
        plain = [one for one, inner in zip(places, arities, strict=True) if inner == -1]
        values = iter((yield from _together(ops, [(get, (name, *one)) for one in plain])))
        found = []
        for one, inner in zip(places, arities, strict=True):
            found.append(next(values) if inner == -1 else (yield from self._fields(ops, name, one, inner)))
        return tuple(found)

    def _save(
        self, ops: Operations, name: str, saved: str, returns: bool, args: tuple[Any, ...], named: Mapping[str, Any]
    ) -> Flow[None]:
        values = yield from self._arguments(ops, name, args, named)
        yield from self._do(ops, "save_function", name, saved, int(returns), *values)

    def _profile(
        self, ops: Operations, name: str, runs: int, args: tuple[Any, ...], named: Mapping[str, Any]
    ) -> Flow[Profile]:
        try:
            ask = yield from ops.named("rpcnb.vm_profile")
        except FunctionNotFound:
            raise FunctionNotFound(
                f"{ops.peer} cannot profile: that takes an rpcnb server; time_evaluator measures a function as a whole"
            ) from None
        yield from self._set_input(ops, name, args, named)
        device = ops.wire_device(self.devices[0])
        found = yield from ops.call(ask, (self.module, name, runs, device.type, device.index))
        return Profile.read(name, runs, found)


def _first(error: RemoteError) -> str:
    return error.message.strip().splitlines()[0] if error.message.strip() else "no reason told"


def _together(ops: Operations, calls: Sequence[tuple[Any, tuple[Any, ...]]], spared: int = 0) -> Flow[list[Any]]:
    """Make calls that are on the way together; returns their results.

    Args:
        ops: Of the session.
        calls: Functions and their arguments.
        spared: So many of the last ones may fail: their errors are returned.
    """
    tickets = []
    for function, args in calls:
        ops.own(function)
        tickets.append((yield Send(CallFunc(function.handle, ops.arguments(args)))))
    found: list[Any] = []
    for index, ticket in enumerate(tickets):
        try:
            found.append(ops.wrap(flows.call_result(flows.result_of((yield Wait(ticket))))))
        except RemoteError as error:  # noqa: PERF203  # it must go on
            if index < len(tickets) - spared:
                raise
            found.append(error)
    return found


class VMFunction(StaysHere):
    """A function of a virtual machine: call it with tensors of the session, by place or by name.

    Of an awaited session's machine the call, and ``params``, are awaited.
    """

    __slots__ = ("machine", "name")
    _instead = "get it from a virtual machine that is opened there"

    def __init__(self, machine: Any, name: str) -> None:
        self.machine = machine
        self.name = name

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.name!r}, {self.session.name})"

    @property
    def session(self) -> Any:
        """The machine's."""
        return self.machine.session

    @property
    def params(self) -> Any:
        """Names of its parameters."""
        return self.session._run(lambda ops: self.machine._parameters(ops, self.name), None, self.name)

    def __call__(self, *args: Any, timeout: float | None = None, **named: Any) -> Any:
        """Call it; returns a tensor of the session, or (nested) tuples of them.

        Raises:
            ArgumentError: An argument is no tensor of this session; ``session.array(x)`` makes one.
            FunctionNotFound: The machine has no such function.
            RemoteError: It has failed: shapes do not match, say.
            TypeError: Names do not fit the parameters.
        """
        make = lambda ops: self.machine._call(ops, self.name, args, named)  # noqa: E731
        return self.session._run(make, timeout, self.name, self.machine._uses(args, named), ordered=True)

    def submit(self, *args: Any, timeout: float | None = None, **named: Any) -> Any:
        """Start a call and return at once: a Pending; arguments as for a call."""
        return self.session.submit(self.__call__, *args, timeout=timeout, **named)


class AsyncVM(VM):
    """An awaited session's virtual machine: ``await vm["main"](x, w)``; what :class:`VM` returns is awaited here."""
