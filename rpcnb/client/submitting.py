"""From a bound method to what it would do: ``session.submit(tensor.numpy)``.

The method is run with a stand-in for its object; what it would run is taken as the work of a
:class:`~rpcnb.client.pending.Pending`, so that every method that blocks can be submitted, also a user's own.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rpcnb.client.moving import BULK
from rpcnb.client.names import FunctionNames
from rpcnb.client.pending import Work
from rpcnb.client.remote import RemoteFunction, raise_first
from rpcnb.link.order import names_of
from rpcnb.values import is_array

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from rpcnb.client.owner import Owner
    from rpcnb.protocol.flows import Flow

__all__ = ["record", "work_of_call"]

_OVERLAPPING = ("call", "run_cell", "status")  # methods that call one function, which may answer later


class _Recorded(Exception):  # not an error: it carries the operation out of the method
    def __init__(
        self, make: Callable[[Any], Flow[Any]], what: str, uses: Iterable[Any], moving: Any, on_output: Any
    ) -> None:
        self.make = make
        self.what = what
        self.uses = uses
        self.moving = moving
        self.on_output = on_output


class _Recorder:
    """Stands in for an object whose method is submitted: what it would run is recorded instead."""

    _target: Any

    def __init__(self, target: Any) -> None:
        object.__setattr__(self, "_target", target)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._target, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._target, name, value)

    @property
    def session(self) -> _Recorder:
        return _Recorder(self._target.session)

    def _run(
        self,
        make: Callable[[Any], Flow[Any]],
        timeout: float | None,
        what: str,
        uses: Any = (),
        moving: Any = None,
        progress: Any = None,
        on_output: Any = None,
        ordered: bool = True,
    ) -> Any:
        raise _Recorded(make, what, uses, moving, on_output)


def work_of_call(ops: Any, function: RemoteFunction, args: tuple[Any, ...]) -> Work:
    """Return the call of a function."""
    later = bool(function.handle & 1)
    names = names_of(args)
    queued = not later and not any(map(is_array, args))
    return Work(ops, ops.call(function, args), function.name, names, later, False, queued, None, function)


def record(session: Owner, operation: Callable[..., Any], args: tuple[Any, ...], options: dict[str, Any]) -> Work:
    """Return what a bound method would do.

    Raises:
        TypeError: It is not a method of ``session`` or of something of it.
    """
    ops = session._ops
    if isinstance(operation, FunctionNames) and operation._session is session:
        name = operation._prefix[:-1]
        return Work(ops, ops.call_named(name, args), name, names_of(args), may_overlap=True)
    owner = operation if isinstance(operation, RemoteFunction) else getattr(operation, "__self__", None)
    if owner is None or (owner is not session and getattr(owner, "session", None) is not session):
        raise TypeError(f"expected a method of this session or of something of it, got {operation!r}")
    if isinstance(owner, RemoteFunction) and (owner is operation or operation.__name__ == "__call__"):
        return work_of_call(ops, owner, args)
    try:
        operation.__func__(_Recorder(owner), *args, **options)  # type: ignore[attr-defined]  # a bound method
    except _Recorded as recorded:
        flow, moving = recorded.make(ops), recorded.moving
        if operation.__name__ == "copyfrom":
            flow = _then(flow, owner)
        elif operation.__name__ == "map" and not options.get("return_errors"):
            flow = _raising(flow)
        names = names_of((owner, *args, *recorded.uses))
        bulk = moving is not None and moving.total >= BULK
        overlaps = operation.__name__ in _OVERLAPPING
        return Work(ops, flow, recorded.what, names, overlaps, bulk, moving=moving, on_output=recorded.on_output)
    raise TypeError(f"{operation.__name__} needs no exchange with the server; call it")


def _raising(flow: Flow[list[Any]]) -> Flow[list[Any]]:
    return raise_first((yield from flow))


def _then(flow: Flow[Any], result: Any) -> Flow[Any]:
    yield from flow
    return result
