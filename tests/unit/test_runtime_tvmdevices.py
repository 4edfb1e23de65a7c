"""TVM's device API behind ours, with a runtime that the test plays: its functions on memory of apache-tvm-ffi."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
import pytest
import tvm_ffi
from runtime_wire import Client

from rpcnb.errors import CopyMismatch, DeviceError, LibraryError
from rpcnb.protocol.messages import Shutdown
from rpcnb.runtime import tvmdevices
from rpcnb.runtime.devices import DeviceTensor, Memory
from rpcnb.runtime.environment import Environment
from rpcnb.runtime.libraries import _to_ffi
from rpcnb.runtime.registry import Registry
from rpcnb.values import Device
from rpcnb.values import dtype as as_dtype

EXT = Device(12, 0)
TYPES = {"uint8": np.uint8, "float32": np.float32}


class Runtime:
    """What a runtime registers; its device keeps bytes in this process."""

    def __init__(self) -> None:
        self.calls: list[Any] = []
        self.functions: dict[str, Any] = {
            "device_api.ext_dev": object(),
            "runtime.GetDeviceAttr": self.attribute,
            "runtime.TVMTensorAllocWithScope": self.allocate,
            "runtime.TVMTensorCopyFromBytes": lambda to, at, n: ctypes.memmove(to.data_ptr(), at, n),
            "runtime.TVMTensorCopyToBytes": lambda of, at, n: ctypes.memmove(at, of.data_ptr(), n),
            "runtime.TVMTensorCopyFromTo": lambda of, to: ctypes.memmove(to.data_ptr(), of.data_ptr(), of.numel()),
            "runtime.TVMTensorCreateView": self.view,
            "runtime.Device_StreamCreate": lambda device: 7,
            "runtime.Device_StreamFree": lambda device, stream: self.calls.append(("free", stream)),
            "runtime.Device_SetStream": lambda device, stream: self.calls.append(("set", stream)),
            "runtime.Device_StreamSync": lambda device, stream: self.calls.append(("sync", stream)),
        }

    @staticmethod
    def attribute(kind: int, index: int, number: int) -> Any:
        return {0: int(index == 0), 5: tvm_ffi.convert("a name"), 14: 99}.get(number)

    @staticmethod
    def allocate(shape: Any, dtype: Any, device: Any, scope: Any) -> Any:
        if shape[0] > 1000:
            raise RuntimeError("Check failed\n  no memory\n")
        assert scope in (None, "texture")
        return tvm_ffi.from_dlpack(np.zeros(tuple(shape), np.uint8))

    @staticmethod
    def view(tensor: Any, shape: Any, dtype: Any, start: int) -> Any:
        bytes_ = np.from_dlpack(tensor).reshape(-1).view(np.uint8)
        size = int(np.prod(tuple(shape))) * np.dtype(TYPES[str(dtype)]).itemsize
        return tvm_ffi.from_dlpack(bytes_[start : start + size].view(TYPES[str(dtype)]).reshape(tuple(shape)))


@pytest.fixture
def runtime(monkeypatch: pytest.MonkeyPatch) -> Runtime:
    played = Runtime()
    monkeypatch.setattr(tvmdevices, "find_global", played.functions.get)
    monkeypatch.setattr(tvmdevices, "runtime_is_loaded", lambda: True)
    monkeypatch.setattr(tvmdevices, "_devices", {})
    return played


@pytest.fixture
def device(runtime: Runtime) -> Any:
    found = tvmdevices.find_runtime_device(EXT, "")
    assert found is tvmdevices.find_runtime_device(EXT, "auto")
    return found


def test_attributes_are_the_runtimes(device: Any) -> None:
    assert device.exists(0)
    assert not device.exists(1)
    assert device.attribute(0, "device_name") == "a name"
    assert type(device.attribute(0, "device_name")) is str
    assert device.attribute(0, "total_global_memory") == 99
    assert device.attribute(1, "total_global_memory") is None


def test_bytes_go_in_out_and_among(device: Any) -> None:
    memory, other = (device.allocate(EXT, 16, 64, "global") for _ in range(2))
    told: list[Any] = []
    device.copy_in(memory, 4, memoryview(b"abcdefgh"), None, told.append)
    device.copy_in(memory, 0, memoryview(b""), None, told.append)
    device.copy_among(memory, 4, other, 0, 8, None)
    device.copy_among(memory, 4, other, 0, 0, None)
    into = bytearray(8)
    device.copy_out(other, 0, memoryview(into), None, told.append)
    assert into == b"abcdefgh"
    assert told == [None] * 3
    with pytest.raises(CopyMismatch):
        device.copy_in(memory, 10, memoryview(b"abcdefgh"), None, told.append)
    for start, at in ((10, 0), (0, 10)):
        with pytest.raises(CopyMismatch):
            device.copy_among(memory, start, other, at, 8, None)
    device.free(memory)
    with pytest.raises(DeviceError, match="has been freed"):
        device.copy_in(memory, 0, memoryview(b"a"), None, told.append)


def test_what_cannot_be_allocated_is_one_line(device: Any) -> None:
    assert device.allocate(EXT, 4, 64, "texture").nbytes == 4
    with pytest.raises(DeviceError, match=r"^cannot allocate 2000 bytes on ext_dev:0: no memory$"):
        device.allocate(EXT, 2000, 64, "global")
    with pytest.raises(DeviceError, match="there is no device ext_dev:1"):
        device.allocate(Device(12, 1), 4, 64, "global")


def test_streams_are_numbers(device: Any, runtime: Runtime) -> None:
    told: list[Any] = []
    assert device.create_stream(EXT) == 7
    device.set_stream(EXT, 7)
    device.set_stream(EXT, None)
    device.synchronize(EXT, None, told.append)
    device.free_stream(EXT, 7)
    assert runtime.calls == [("set", 7), ("set", 0), ("sync", 0), ("free", 7)]
    assert told == [None]
    runtime.functions["runtime.Device_StreamCreate"] = lambda device: 0
    assert device.create_stream(EXT) is None


def test_compiled_code_takes_views_and_what_it_makes_is_a_tensor(device: Any) -> None:
    memory = device.allocate(EXT, 16, 64, "global")
    device.copy_in(memory, 0, memoryview(np.arange(4, dtype="float32").tobytes()), None, lambda _: None)
    passed = _to_ffi(DeviceTensor(memory, (3,), as_dtype("float32"), 4))
    assert (np.from_dlpack(passed) == [1, 2, 3]).all()

    class OnDevice:
        """A tensor of the runtime, as the package shows it."""

        dtype, shape = tvm_ffi.dtype("float32"), (3,)
        device = type("", (), {"dlpack_device_type": lambda self: 12, "index": 0})()

        def __dlpack__(self, **options: Any) -> Any:
            return passed.__dlpack__(**options)

        def __dlpack_device__(self) -> Any:
            return passed.__dlpack_device__()

    made = tvmdevices.from_ffi_tensor(OnDevice())
    assert made.meta.device == EXT
    assert made.meta.shape == (3,)
    assert str(made.meta.dtype) == "float32"
    assert bytes(np.from_dlpack(made.memory.storage)) == np.arange(1, 4, dtype="float32").tobytes()
    foreign = DeviceTensor(Memory(EXT, 4, "a plug-in's handle"), (4,), as_dtype("uint8"))
    with pytest.raises(DeviceError, match="runtime has no such memory"):
        _to_ffi(foreign)


def test_a_runtime_is_loaded_where_there_is_one(runtime: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded: list[str] = []
    find = tvmdevices.find_runtime_device
    assert find(Device(2, 0), "") is None, "it has no such API"
    assert find(EXT, "none") is None
    monkeypatch.setattr(tvmdevices, "runtime_is_loaded", lambda: False)
    monkeypatch.setattr(tvmdevices, "find_runtime", lambda: None)
    monkeypatch.setattr(tvmdevices, "load_runtime", loaded.append)
    assert find(EXT, "") is None
    assert loaded == []
    monkeypatch.setattr(tvmdevices, "find_runtime", lambda: "there")
    assert find(EXT, "") is not None
    assert loaded == ["auto"]

    def fail(where: str) -> None:
        raise LibraryError("it cannot be loaded")

    monkeypatch.setattr(tvmdevices, "load_runtime", fail)
    assert find(Device(2, 0), "/some/file") is None


def test_another_versions_runtime_says_so(runtime: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    del runtime.functions["runtime.TVMTensorCopyFromTo"]
    with pytest.raises(DeviceError, match=r"no function runtime.TVMTensorCopyFromTo"):
        tvmdevices.find_runtime_device(EXT, "")

    def no_package(name: str) -> Any:
        raise LibraryError("no apache-tvm-ffi")

    monkeypatch.setattr(tvmdevices, "find_global", no_package)
    assert tvmdevices.find_runtime_device(EXT, "") is None


def test_an_error_without_words_is_named() -> None:
    assert tvmdevices._last_line(ValueError()) == "ValueError"


@pytest.mark.parametrize("native", [False, True])
def test_sessions_have_it_where_native_code_is_allowed(
    native: bool, registry: Registry, runtime: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = Client(Environment(registry=registry, native=native))
    attribute = client.local.get_attribute
    assert attribute(EXT, 0) == int(native)
    assert attribute(Device(2, 0), 0) == 0
    client.send(Shutdown())
