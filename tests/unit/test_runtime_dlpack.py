"""Tensors that numpy's own DLPack refuses: to compiled code and from other libraries, over the same memory."""

from __future__ import annotations

import ctypes
import gc
import weakref
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import tvm_ffi

from rpcnb.errors import CopyMismatch
from rpcnb.runtime.arrays import pack
from rpcnb.runtime.devices import DeviceTensor
from rpcnb.runtime.dlpack import Exported, fill, from_dlpack
from rpcnb.values import DType, dtype

KINDS = ("bfloat16", "float8_e4m3fn", "float8_e5m2", "int4", "uint4", "float4_e2m1fn")


def exported(array: np.ndarray[Any, Any]) -> Any:
    tensor = DeviceTensor.of_array(array)
    return Exported(tensor.bytes(), tensor.meta.dtype, tensor.meta.shape)


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("shape", [(), (7,), (2, 3), (0, 4)])
def test_a_type_goes_there_and_back(name: str, shape: tuple[int, ...]) -> None:
    array = np.arange(np.prod(shape, dtype=int)).reshape(shape).astype(getattr(ml_dtypes, name))
    tensor = tvm_ffi.from_dlpack(exported(array))
    assert (str(tensor.dtype), tuple(tensor.shape)) == (name, shape)
    back = from_dlpack(tensor)
    assert back.dtype == array.dtype
    assert back.shape == shape
    assert back.tobytes() == array.tobytes()


def test_memory_is_shared_and_lives_as_long_as_the_tensor() -> None:
    array = np.zeros(4, ml_dtypes.bfloat16)
    tensor = tvm_ffi.from_dlpack(exported(array))
    there = from_dlpack(tensor)
    there[1] = 2.5
    assert array.tolist() == [0, 2.5, 0, 0]
    alive = weakref.ref(array)
    del array, tensor
    gc.collect()
    assert alive() is not None
    assert there.tolist() == [0, 2.5, 0, 0]
    del there
    gc.collect()
    assert alive() is None


def test_lanes_are_the_type_s_there_and_an_axis_here() -> None:
    data = np.arange(8, dtype="float32").view(np.uint8)
    tensor = tvm_ffi.from_dlpack(Exported(data, dtype("float32x4"), (2,)))
    assert (str(tensor.dtype), tuple(tensor.shape)) == ("float32x4", (2,))
    assert from_dlpack(tensor).shape in ((2, 4), (2,))


class Given:
    """A tensor of another library: the description is the test's."""

    def __init__(self, source: Any, **change: Any) -> None:
        self.source, self.change = source, change

    def __dlpack_device__(self) -> tuple[int, int]:
        return 1, 0

    def __dlpack__(self, **_: Any) -> Any:
        from rpcnb.runtime import dlpack

        capsule = self.source.__dlpack__()
        for name, value in self.change.items():
            setattr(dlpack._described(capsule), name, value)
        return capsule


BFLOAT16 = {"code": 4, "bits": 16}


def test_other_devices_and_strides_are_refused() -> None:
    plain = np.zeros((2, 4), np.uint16)
    assert from_dlpack(Given(plain, **BFLOAT16)).shape == (2, 4)
    with pytest.raises(CopyMismatch, match="this Given is on cuda:1; copy it into this process's memory first"):
        from_dlpack(Given(plain, **BFLOAT16, device_type=2, device_index=1))
    with pytest.raises(CopyMismatch, match="this Given of bfloat16 is not contiguous; make it so first"):
        from_dlpack(Given(plain[:, ::2], **BFLOAT16))
    assert from_dlpack(Given(plain[:1, :], **BFLOAT16)).shape == (1, 4)
    with pytest.raises(CopyMismatch, match="cannot read this ndarray: "):
        from_dlpack(np.array([object()]))


def test_a_tensor_without_strides_is_compact() -> None:
    null = ctypes.POINTER(ctypes.c_int64)()
    assert from_dlpack(Given(np.zeros((2, 4), np.uint16), **BFLOAT16, strides=null)).shape == (2, 4)


def test_compiled_code_writes_into_packed_elements_and_lanes() -> None:
    """What numpy shows of them is a copy, or has another shape: the memory itself is passed on."""
    from rpcnb.runtime.libraries import _to_ffi

    packed = pack(np.array([1, 2, 3], ml_dtypes.int4), DType(0, 4))
    storage = DeviceTensor.of_array(np.zeros(8, np.uint8))
    assert packed.tolist() == [0x21, 0x03]
    for name, shape in (("int4", (3,)), ("float32x2", (1,))):
        storage.memory.storage[:2] = packed
        view: Any = DeviceTensor(storage.memory, shape, dtype(name)).numpy()
        tensor = _to_ffi(view)
        assert (str(tensor.dtype), tuple(tensor.shape)) == (name, shape)
        assert view[:1].tensor is None, "a part of it is an array like others"


def test_packed_elements_are_written_where_another_library_has_them() -> None:
    target = tvm_ffi.from_dlpack(exported(np.zeros(3, ml_dtypes.int4)))
    fill(target, np.array([1, -2, 3], ml_dtypes.int4))
    assert from_dlpack(target).tolist() == [1, -2, 3]
    with pytest.raises(CopyMismatch, match=r"cannot copy uint4 of shape \(3,\) into int4 of shape \(3,\)"):
        fill(target, np.zeros(3, ml_dtypes.uint4))


def test_a_tensor_with_a_way_of_its_own_to_be_written_goes_that_way() -> None:
    class Own:
        def copyfrom(self, array: Any) -> None:
            self.array = array

    target, array = Own(), np.ones(3, ml_dtypes.bfloat16)
    fill(target, array)
    assert target.array is array


def test_numpy_takes_what_is_exported_of_a_type_that_it_has() -> None:
    data = np.arange(4, dtype=np.uint8)
    exported_data = Exported(data, dtype("int16"), (2,))
    assert np.from_dlpack(exported_data).tolist() == data.view("<i2").tolist()
    assert exported_data.__dlpack_device__() == (1, 0), "who asks first gets the CPU"
