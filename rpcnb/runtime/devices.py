"""Devices of a server: where memory is, and how bytes get there.

A :class:`DeviceAPI` serves one device type. The CPU's is :class:`CPUDevice`; others plug in by the entry point group
``rpcnb.devices`` (a name as in TVM, ``cuda``, and a DeviceAPI subclass), so that nothing is imported until a client
names such a device. A device whose copies or stream waits end later reports that through the ``done`` callback of
:meth:`DeviceAPI.copy_in`, :meth:`~DeviceAPI.copy_out` and :meth:`~DeviceAPI.synchronize`.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from rpcnb.errors import CopyMismatch, DeviceError
from rpcnb.values import DEVICE_NAMES, Device, DType, TensorMeta

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy as np

    Finished = Callable[[BaseException | None], None]

__all__ = ["ATTRIBUTES", "CPUDevice", "DeviceAPI", "DeviceTensor", "Memory", "find_device"]

# DeviceAttrKind of TVM's device API: what the attribute query's number asks for.
ATTRIBUTES = (
    "exist",
    "max_threads_per_block",
    "warp_size",
    "max_shared_memory_per_block",
    "compute_version",
    "device_name",
    "max_clock_rate",
    "multi_processor_count",
    "max_thread_dimensions",
    "max_registers_per_block",
    "gcn_arch",
    "api_version",
    "driver_version",
    "l2_cache_size_bytes",
    "total_global_memory",
    "available_global_memory",
    "image_pitch_alignment",
)


class Memory:
    """A piece of a device's memory.

    Attributes:
        device: Where it is.
        nbytes: How long it is.
        storage: The device API's own handle on it; a ``uint8`` numpy array for the CPU.
    """

    __slots__ = ("__weakref__", "device", "nbytes", "storage")

    def __init__(self, device: Device, nbytes: int, storage: Any) -> None:
        self.device = device
        self.nbytes = nbytes
        self.storage = storage

    def check(self, start: int, nbytes: int) -> None:
        """Raise CopyMismatch unless ``nbytes`` from ``start`` on lie in this memory."""
        if start < 0 or nbytes < 0 or start + nbytes > self.nbytes:
            raise CopyMismatch(f"bytes {start} to {start + nbytes} lie outside a memory of {self.nbytes} bytes")


class DeviceTensor:
    """A tensor in a server's memory: what a registered function gets for a tensor that is not on the CPU.

    A function may also return one, for instance a view into a larger memory.

    Attributes:
        memory: Where its bytes are.
        meta: Shape, type, device and byte offset; ``data`` is 0 here, inside the server.
    """

    __slots__ = ("memory", "meta")

    def __init__(self, memory: Memory, shape: tuple[int, ...], dtype: DType, byte_offset: int = 0) -> None:
        self.memory = memory
        self.meta = TensorMeta(0, memory.device, shape, dtype, byte_offset)
        memory.check(byte_offset, self.meta.nbytes)

    def numpy(self) -> np.ndarray[Any, Any]:
        """Return a view of CPU memory as an array.

        Raises:
            DeviceError: The memory is not on the CPU.
        """
        if self.memory.device.type != 1:
            raise DeviceError(f"a tensor on {self.memory.device} has no view in the server's own memory")
        from rpcnb.runtime.arrays import TensorView, array_view, is_exact

        array = array_view(self.bytes(), self.meta.dtype, self.meta.shape)
        if is_exact(array, self.meta.dtype):
            return array
        view = array.view(TensorView)
        view.tensor = self
        return view

    def bytes(self) -> np.ndarray[Any, Any]:
        """Return its bytes of CPU memory, as they lie there."""
        start = self.meta.byte_offset
        storage: np.ndarray[Any, Any] = self.memory.storage
        return storage[start : start + self.meta.nbytes]

    @classmethod
    def of_array(cls, array: Any) -> DeviceTensor:
        """Wrap an array of this process; copied only if the wire could not read or write it as it is."""
        import numpy as np

        from rpcnb.runtime.arrays import as_wire_array, dtype_of, pack, plain_array

        array = plain_array(array)
        kind = dtype_of(array)
        ready = as_wire_array(array)
        if kind.bits < 8:
            data = pack(ready, kind)
        else:
            if not ready.flags.writeable:
                ready = ready.copy()
            data = ready.reshape(-1).view(np.uint8)
        return cls(Memory(Device(1, 0), data.nbytes, data), array.shape, kind)


class DeviceAPI:
    """One type of device; subclass it and name the class in the entry point group ``rpcnb.devices``.

    Attributes:
        device_type: DLPack's number of the type.
    """

    device_type = 0

    def exists(self, index: int) -> bool:
        """Tell whether there is a device of this index."""
        return True

    def attribute(self, index: int, name: str) -> int | str | None:
        """Return an attribute of :data:`ATTRIBUTES`, or None if the device has none such."""
        return None

    def allocate(self, device: Device, nbytes: int, alignment: int, scope: str) -> Memory:
        """Return new memory of ``nbytes`` bytes; ``scope`` is ``"global"`` or the device's own word."""
        raise DeviceError(f"device {device} cannot allocate memory")

    def free(self, memory: Memory) -> None:
        """Free ``memory``; nothing uses it any more."""

    def direct(self, memory: Memory, start: int, nbytes: int) -> memoryview | None:
        """Return ``memory`` as plain bytes that a socket may read and write, or None if it is not like that."""
        return None

    def copy_in(self, memory: Memory, start: int, data: memoryview, stream: Any, done: Finished) -> None:
        """Copy ``data`` into ``memory``; call ``done(None)`` or ``done(error)`` when ``data`` may be reused."""
        raise DeviceError(f"device {memory.device} cannot be written")

    def copy_out(self, memory: Memory, start: int, data: memoryview, stream: Any, done: Finished) -> None:
        """Copy from ``memory`` into ``data``; call ``done`` when ``data`` is complete."""
        raise DeviceError(f"device {memory.device} cannot be read")

    def copy_among(self, source: Memory, start: int, target: Memory, at: int, nbytes: int, stream: Any) -> None:
        """Copy within this device type, in the order of ``stream``."""
        raise DeviceError(f"device {source.device} cannot copy to {target.device}")

    def set_device(self, device: Device) -> None:
        """Make ``device`` the current one; most APIs take the device with every request instead."""

    def create_stream(self, device: Device) -> Any:
        """Return a new stream, or None where the default is the only one."""
        return None

    def free_stream(self, device: Device, stream: Any) -> None:
        """Free a stream made by :meth:`create_stream`."""

    def set_stream(self, device: Device, stream: Any) -> None:
        """Make ``stream`` (None: the default) the current one of ``device``."""

    def current_stream(self, device: Device) -> Any:
        """Return the current stream; None for the default."""
        return None

    def synchronize(self, device: Device, stream: Any, done: Finished) -> None:
        """Call ``done`` when all work of ``stream`` has ended."""
        done(None)


class CPUDevice(DeviceAPI):
    """The server's own memory, as numpy arrays; work is done when a call returns, so streams are no-ops.

    Answers to attribute queries are stock's: existence and the bytes of RAM, nothing else (protocol.md 4.3).
    """

    device_type = 1

    def attribute(self, index: int, name: str) -> int | str | None:
        """Return the bytes of RAM for the total memory."""
        if name == "total_global_memory":
            return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        return None

    def allocate(self, device: Device, nbytes: int, alignment: int, scope: str) -> Memory:
        """Return uninitialised memory, aligned to at least 64 bytes."""
        if scope != "global":
            raise DeviceError(f"Device does not support allocate data space with specified memory scope: {scope}")
        import numpy as np

        alignment = min(max(64, alignment), 1 << 16)
        try:
            block = np.empty(nbytes + alignment, np.uint8)
        except (MemoryError, ValueError):
            raise DeviceError(f"cannot allocate {nbytes} bytes on {device}") from None
        start = -block.ctypes.data % alignment
        return Memory(device, nbytes, block[start : start + nbytes])

    def direct(self, memory: Memory, start: int, nbytes: int) -> memoryview | None:
        """Return the bytes themselves."""
        memory.check(start, nbytes)
        return memoryview(memory.storage[start : start + nbytes])

    def copy_in(self, memory: Memory, start: int, data: memoryview, stream: Any, done: Finished) -> None:
        """Copy at once."""
        import numpy as np

        memory.storage[start : start + len(data)] = np.frombuffer(data, np.uint8)
        done(None)

    def copy_out(self, memory: Memory, start: int, data: memoryview, stream: Any, done: Finished) -> None:
        """Copy at once."""
        data[:] = memoryview(memory.storage[start : start + len(data)])
        done(None)

    def copy_among(self, source: Memory, start: int, target: Memory, at: int, nbytes: int, stream: Any) -> None:
        """Copy at once; the two ranges may overlap."""
        target.storage[at : at + nbytes] = source.storage[start : start + nbytes]


_APIS: dict[int, DeviceAPI] = {1: CPUDevice()}


def find_device(device: Device) -> DeviceAPI:
    """Return the API of a device's type, loading its plug-in on first use.

    Raises:
        DeviceError: There is none; the text is stock's, which clients know.
    """
    api = _APIS.get(device.type)
    if api is None:
        api = _load_plugin(device)
        _APIS[device.type] = api
    return api


def _load_plugin(device: Device) -> DeviceAPI:
    from importlib.metadata import entry_points

    name = DEVICE_NAMES.get(device.type, "")
    for point in entry_points(group="rpcnb.devices", name=name) if name else ():
        api = point.load()()
        if isinstance(api, DeviceAPI):
            return api
        raise DeviceError(f"entry point {point.value} of rpcnb.devices is not a DeviceAPI")
    raise DeviceError(f"Check failed: (allow_missing) is false: Device API {device.name} is not enabled.")
