"""Where the time of a Relax function goes: TVM's virtual machine calls its instrument around each of its calls.

Source:
    python/tvm/runtime/vm.py (set_instrument).
"""

from __future__ import annotations

import json
import time
from typing import Any

from rpcnb.errors import InvalidHandle, LimitExceeded
from rpcnb.runtime.backend import ffi, find_global
from rpcnb.runtime.libraries import FFIModule

__all__ = ["profile"]

_MOST_RUNS = 1000
_MOST_ROWS = 1000
_CPU = 1


class _Instrument:
    """Counts calls and their own time: without that of what they call."""

    def __init__(self, sync: Any) -> None:
        self.rows: dict[tuple[str, str], list[float]] = {}  # calls and seconds, by name and arguments
        self._sync = sync
        self._open: list[tuple[tuple[str, str], float]] = []
        self._inner = [0.0]  # of each open call: seconds of what it has called

    def __call__(self, function: Any, name: str, before: bool, result: Any, *args: Any) -> int:
        if before:
            key = str(name), ", ".join(filter(None, map(_shape, args)))
            self._inner.append(0.0)
            self._sync()
            self._open.append((key, time.perf_counter()))
        else:
            self._sync()
            now = time.perf_counter()
            key, began = self._open.pop()
            row = self.rows.setdefault(key, [0, 0.0])
            row[0] += 1
            row[1] += now - began - self._inner.pop()
            self._inner[-1] += now - began
        return 0  # go on


def _shape(value: Any) -> str:
    if not isinstance(value, ffi().Tensor):
        return ""
    return f"{value.dtype}[{', '.join(map(str, value.shape))}]"


def profile(session: Any, machine: Any, name: str, runs: int, device_type: int, index: int) -> str:
    """Run a function of a virtual machine with the arguments that it was given; returns JSON: seconds and rows.

    Args:
        session: Of the client.
        machine: The virtual machine's module.
        name: Of the function.
        runs: How often.
        device_type: DLPack's number of the device to wait for after each call.
        index: Its index.

    Raises:
        InvalidHandle: ``machine`` is none.
    """
    if not isinstance(machine, FFIModule) or machine.get_function("set_instrument") is None:
        raise InvalidHandle("expected the module of a virtual machine")
    if not 0 < runs <= _MOST_RUNS:
        raise LimitExceeded(f"expected 1 to {_MOST_RUNS} runs, got {runs}")
    instrument = _Instrument(_waits_for(device_type, index))
    set_instrument = machine.module.get_function("set_instrument")
    invoke = machine.module.get_function("invoke_stateful")
    invoke(name)  # what is prepared once is not measured
    set_instrument(ffi().convert(instrument))
    began = time.perf_counter()
    try:
        for _ in range(runs):
            invoke(name)
    finally:
        seconds = time.perf_counter() - began
        set_instrument(None)
    found = sorted(instrument.rows.items(), key=lambda row: -row[1][1])[:_MOST_ROWS]
    rows = [[symbol, shapes, calls / runs, spent / runs] for (symbol, shapes), (calls, spent) in found]
    return json.dumps({"seconds": seconds / runs, "rows": rows})


def _waits_for(device_type: int, index: int) -> Any:
    """Return what waits for a device; the CPU's work is done when a call returns."""
    sync = find_global("runtime.Device_StreamSync") if device_type != _CPU else None
    if sync is None:
        return lambda: None
    device = ffi().device(device_type, index)
    return lambda: sync(device, 0)
