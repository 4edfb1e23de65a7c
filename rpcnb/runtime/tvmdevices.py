"""Devices of TVM's runtime: its device API behind ours, where the runtime is loaded or can be.

Memory is a flat tensor of apache-tvm-ffi on the device; what is copied, or passed to compiled code, is a view of it.
TVM's current streams and devices are each thread's own: a session of a loaded runtime keeps to one thread.

Source:
    src/runtime/device_api.cc, src/runtime/tensor.cc (``runtime.*``), include/tvm/runtime/device_api.h.
"""

from __future__ import annotations

import ctypes
import math
from typing import TYPE_CHECKING, Any

from rpcnb.errors import DeviceError, LibraryError
from rpcnb.runtime.backend import ffi, find_global, runtime_is_loaded
from rpcnb.runtime.devices import ATTRIBUTES, DeviceAPI, DeviceTensor, Memory
from rpcnb.runtime.tvmruntime import AUTO, NEVER, find_runtime, load_runtime
from rpcnb.values import Device
from rpcnb.values import dtype as as_dtype

if TYPE_CHECKING:
    from rpcnb.runtime.devices import Finished

__all__ = ["find_runtime_device", "from_ffi_tensor", "to_ffi_tensor"]

_devices: dict[int, RuntimeDevice] = {}


def find_runtime_device(device: Device, runtime: str) -> DeviceAPI | None:
    """Return TVM's API of a device's type, loading the runtime if it is there; None if there is none.

    Args:
        device: Of the type.
        runtime: What the operator says of the runtime.
    """
    found = _devices.get(device.type)
    if found is None and runtime != NEVER:
        if not runtime_is_loaded():
            try:
                if runtime in ("", AUTO) and find_runtime() is None:
                    return None
                load_runtime(runtime or AUTO)
            except LibraryError:
                return None
        if _find(f"device_api.{device.name}") is not None:
            found = _devices.setdefault(device.type, RuntimeDevice(device.type))
    return found


def _find(name: str) -> Any:
    try:
        return find_global(name)
    except LibraryError:
        return None


def _function(name: str) -> Any:
    found = _find(f"runtime.{name}")
    if found is None:
        raise DeviceError(f"TVM's runtime has no function runtime.{name}: it is another version's")
    return found


class RuntimeDevice(DeviceAPI):
    """One type of device of TVM's runtime.

    Args:
        device_type: DLPack's number.
    """

    def __init__(self, device_type: int) -> None:
        self.device_type = device_type
        self._attribute = _function("GetDeviceAttr")
        self._allocate = _function("TVMTensorAllocWithScope")
        self._copy_in = _function("TVMTensorCopyFromBytes")
        self._copy_out = _function("TVMTensorCopyToBytes")
        self._copy_among = _function("TVMTensorCopyFromTo")

    def exists(self, index: int) -> bool:
        """Ask the device's API."""
        return bool(self._attribute(self.device_type, index, 0))

    def attribute(self, index: int, name: str) -> int | str | None:
        """Ask the device's API, which has an answer for a device that exists."""
        found = self._attribute(self.device_type, index, ATTRIBUTES.index(name)) if self.exists(index) else None
        return str(found) if isinstance(found, str) else found

    def allocate(self, device: Device, nbytes: int, alignment: int, scope: str) -> Memory:
        """Return new memory; the runtime aligns it for its largest types."""
        package = ffi()
        if not self.exists(device.index):
            raise DeviceError(f"there is no device {device}")
        wanted = None if scope == "global" else scope
        try:
            tensor = self._allocate(package.Shape((nbytes,)), package.dtype("uint8"), _ffi_device(device), wanted)
        except Exception as error:
            raise DeviceError(f"cannot allocate {nbytes} bytes on {device}: {_last_line(error)}") from None
        return Memory(device, nbytes, tensor)

    def free(self, memory: Memory) -> None:
        """Let the runtime have it back."""
        memory.storage = None

    def copy_in(self, memory: Memory, start: int, data: memoryview, stream: Any, done: Finished) -> None:
        """Copy and wait for the device."""
        self._move(self._copy_in, memory, start, data)
        done(None)

    def copy_out(self, memory: Memory, start: int, data: memoryview, stream: Any, done: Finished) -> None:
        """Copy and wait for the device."""
        self._move(self._copy_out, memory, start, data)
        done(None)

    @staticmethod
    def _move(move: Any, memory: Memory, start: int, data: memoryview) -> None:
        import numpy as np

        memory.check(start, len(data))
        if len(data):
            here = np.frombuffer(data, np.uint8)
            move(_view(memory, (len(data),), "uint8", start), ctypes.c_void_p(here.ctypes.data), len(data))

    def copy_among(self, source: Memory, start: int, target: Memory, at: int, nbytes: int, stream: Any) -> None:
        """Copy in the order of the current stream."""
        source.check(start, nbytes)
        target.check(at, nbytes)
        if nbytes:
            self._copy_among(_view(source, (nbytes,), "uint8", start), _view(target, (nbytes,), "uint8", at))

    def create_stream(self, device: Device) -> Any:
        """Make one, if the device has more than the default."""
        return int(_function("Device_StreamCreate")(_ffi_device(device))) or None

    def free_stream(self, device: Device, stream: Any) -> None:
        """Free one."""
        _function("Device_StreamFree")(_ffi_device(device), stream)

    def set_stream(self, device: Device, stream: Any) -> None:
        """Make it this thread's current one."""
        _function("Device_SetStream")(_ffi_device(device), stream or 0)

    def synchronize(self, device: Device, stream: Any, done: Finished) -> None:
        """Wait for the device."""
        _function("Device_StreamSync")(_ffi_device(device), stream or 0)
        done(None)


def _ffi_device(device: Device) -> Any:
    return ffi().device(device.type, device.index)


def _view(memory: Memory, shape: tuple[int, ...], dtype: str, start: int) -> Any:
    package = ffi()
    if memory.storage is None:
        raise DeviceError(f"this memory on {memory.device} has been freed")
    return _function("TVMTensorCreateView")(memory.storage, package.Shape(shape), package.dtype(dtype), start)


def to_ffi_tensor(tensor: DeviceTensor) -> Any:
    """Return a device's tensor as compiled code takes it.

    Raises:
        DeviceError: It is on a device of a plug-in, whose memory TVM does not know.
    """
    meta = tensor.meta
    if not isinstance(tensor.memory.storage, ffi().Tensor):
        why = "cannot be passed to compiled code: TVM's runtime has no such memory"
        raise DeviceError(f"a tensor on {meta.device} {why}")
    return _view(tensor.memory, meta.shape, str(meta.dtype), meta.byte_offset)


def from_ffi_tensor(tensor: Any) -> DeviceTensor:
    """Return what compiled code has made on a device as a tensor of ours."""
    package = ffi()
    device = Device(int(tensor.device.dlpack_device_type()), int(tensor.device.index))
    kind, shape = as_dtype(str(tensor.dtype)), tuple(map(int, tensor.shape))
    nbytes = kind.nbytes(math.prod(shape))
    flat = _function("TVMTensorCreateView")(tensor, package.Shape((nbytes,)), package.dtype("uint8"), 0)
    return DeviceTensor(Memory(device, nbytes, flat), shape, kind)


def _last_line(error: BaseException) -> str:
    return next((line.strip() for line in reversed(str(error).splitlines()) if line.strip()), type(error).__name__)
