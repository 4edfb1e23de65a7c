"""Where the time of a Relax function goes, with a virtual machine that the test plays."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import tvm_ffi

from rpcnb.errors import InvalidHandle, LimitExceeded
from rpcnb.runtime import vmprofile
from rpcnb.runtime.libraries import FFIModule

TENSOR = tvm_ffi.from_dlpack(np.zeros((2, 3), "float32"))


class Machine:
    """As the package shows a module: its ``main`` calls ``outer``, which calls ``inner`` twice."""

    kind = "vm"

    def __init__(self, *, fails: bool = False) -> None:
        self.instrument: Any = None
        self.runs = 0
        self.fails = fails

    def get_function(self, name: str, query_imports: bool = False) -> Any:
        found = {"set_instrument": self.set, "invoke_stateful": self.invoke}.get(name)
        if found is None:
            raise AttributeError(name)
        return found

    def set(self, instrument: Any) -> None:
        self.instrument = instrument

    def invoke(self, name: str) -> None:
        self.runs += 1
        if self.instrument is None:
            return
        if self.fails:
            raise ValueError("it fails")
        self.instrument(None, "outer", True, None, TENSOR, 5)
        for _ in range(2):
            self.instrument(None, "inner", True, None)
            self.instrument(None, "inner", False, None)
        self.instrument(None, "outer", False, None, TENSOR, 5)


def test_calls_and_their_own_time_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(1000))
    monkeypatch.setattr("time.perf_counter", lambda: float(next(clock)))
    machine = Machine()
    found = json.loads(vmprofile.profile(None, FFIModule(machine), "main", 3, 1, 0))
    assert found["rows"] == [["outer", "float32[2, 3]", 1, 3.0], ["inner", "", 2, 2.0]]
    assert found["seconds"] == pytest.approx(19 / 3)
    assert machine.runs == 4
    assert machine.instrument is None


def test_it_waits_for_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    waited: list[Any] = []
    monkeypatch.setattr(vmprofile, "find_global", lambda name: lambda device, stream: waited.append(stream))
    vmprofile.profile(None, FFIModule(Machine()), "main", 1, 12, 0)
    assert waited == [0] * 6
    monkeypatch.setattr(vmprofile, "find_global", lambda name: None)
    vmprofile.profile(None, FFIModule(Machine()), "main", 1, 12, 0)
    assert waited == [0] * 6


def test_a_function_that_fails_leaves_nothing_behind() -> None:
    machine = Machine(fails=True)
    with pytest.raises(ValueError, match="it fails"):
        vmprofile.profile(None, FFIModule(machine), "main", 1, 1, 0)
    assert machine.instrument is None


def test_what_is_no_machine_is_refused() -> None:
    class Library(Machine):
        def set(self, instrument: Any) -> None: ...

        def get_function(self, name: str, query_imports: bool = False) -> Any:
            raise AttributeError(name)

    for wrong in (5, FFIModule(Library())):
        with pytest.raises(InvalidHandle, match="virtual machine"):
            vmprofile.profile(None, wrong, "main", 1, 1, 0)
    for runs in (0, 1001):
        with pytest.raises(LimitExceeded, match="expected 1 to 1000 runs"):
            vmprofile.profile(None, FFIModule(Machine()), "main", runs, 1, 0)
