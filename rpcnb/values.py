"""What can be an argument or a result, besides Python's own scalars, ``str`` and ``bytes``.

These are the wire's own nouns: small, hashable, without any socket or numpy. A tensor on the wire is a
:class:`TensorMeta` (TVM's ``DLTensor`` without strides); functions, modules and objects are handles.

Source:
    RPCReference, src/runtime/rpc/rpc_reference.h, protocol 0.8.0; DLPack's ``DLDataType`` and ``DLDevice``.
"""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass
from enum import Enum
from functools import lru_cache
from typing import Any, NamedTuple

__all__ = [
    "CPU",
    "DEVICE_NAMES",
    "NULL",
    "DType",
    "Device",
    "FunctionRef",
    "ModuleRef",
    "ObjectRef",
    "Pointer",
    "StaysHere",
    "TensorMeta",
    "Value",
    "device",
    "dtype",
    "has_item",
    "is_array",
    "is_bare_enum",
    "plain",
    "read_dtype",
    "type_name",
]

# DLDataTypeCode. "bool" has been a code of its own since DLPack 1.1 (numpy's bool is code 6, 8 bits).
_CODE_NAMES = {
    0: "int",
    1: "uint",
    2: "float",
    3: "handle",
    4: "bfloat",
    5: "complex",
    6: "bool",
    7: "float8_e3m4",
    8: "float8_e4m3",
    9: "float8_e4m3b11fnuz",
    10: "float8_e4m3fn",
    11: "float8_e4m3fnuz",
    12: "float8_e5m2",
    13: "float8_e5m2fnuz",
    14: "float8_e8m0fnu",
    15: "float6_e2m3fn",
    16: "float6_e3m2fn",
    17: "float4_e2m1fn",
}
_SMALL_FLOAT_BITS = {code: int(name[5]) for code, name in _CODE_NAMES.items() if code >= 7}
_CODES = {name: code for code, name in _CODE_NAMES.items()}
_DTYPE_TEXT = re.compile(rf"({'|'.join(_CODES)})(?:(_?)(\d+))?(?:x(\d+))?")

# DLDeviceType, with the names TVM's sessions use.
DEVICE_NAMES = {
    1: "cpu",
    2: "cuda",
    3: "cuda_host",
    4: "opencl",
    7: "vulkan",
    8: "metal",
    9: "vpi",
    10: "rocm",
    11: "rocm_host",
    12: "ext_dev",
    13: "cuda_managed",
    14: "oneapi",
    15: "webgpu",
    16: "hexagon",
}
_DEVICE_TYPES = {name: number for number, name in DEVICE_NAMES.items()} | {"cl": 4, "llvm": 1}


class DType(str):
    """An element type, as text that numpy and TVM take for one: ``"float32"``, ``"float32x4"``.

    Args:
        code: DLPack's code of its kind.
        bits: Of one lane.
        lanes: ``float32x4`` has four.
    """

    __slots__ = ("bits", "code", "lanes")
    code: int
    bits: int
    lanes: int

    def __new__(cls, code: int, bits: int, lanes: int = 1) -> DType:  # noqa: D102
        name, usual = _CODE_NAMES.get(code, f"code{code}"), _SMALL_FLOAT_BITS.get(code, 8 if code == 6 else 0)
        between = "_" if code in _SMALL_FLOAT_BITS or code not in _CODE_NAMES else ""
        text = name if bits == usual else f"{name}{between}{bits}"
        made = super().__new__(cls, text if lanes == 1 else f"{text}x{lanes}")
        made.code, made.bits, made.lanes = code, bits, lanes
        return made

    def __getnewargs__(self) -> tuple[int, int, int]:  # type: ignore[override]  # of our __new__
        return self.code, self.bits, self.lanes

    def __repr__(self) -> str:
        return f"DType({str.__repr__(self)})"

    @property
    def lane(self) -> DType:
        """The type of one lane."""
        return self if self.lanes == 1 else DType(self.code, self.bits)

    def nbytes(self, elements: int) -> int:
        """Return the bytes that ``elements`` of this type take, sub-byte types packed."""
        return (elements * self.bits * self.lanes + 7) // 8


# The type of what arrives: few are different, and a stranger's do not fill the memory.
read_dtype = lru_cache(maxsize=256)(DType)


def dtype(text: str | DType) -> DType:
    """Read a type's name: ``"float32"``, ``"bfloat16"``, ``"int4"``, ``"bool"``, ``"float32x4"``.

    Raises:
        ValueError: The text names no type of the wire.
    """
    if isinstance(text, DType):
        return text
    found = _DTYPE_TEXT.fullmatch(text)
    if found:
        code, between, lanes = _CODES[found[1]], found[2] or "", int(found[4] or 1)
        size = int(found[3] or _SMALL_FLOAT_BITS.get(code, 8 if code == 6 else 0))
        well_written = found[3] is None or between == ("_" if code in _SMALL_FLOAT_BITS else "")
        if well_written and 0 < size < 256 and 0 < lanes < 65536:
            return DType(code, size, lanes)
    raise ValueError(f"{text!r} names no data type; expected for example 'float32', 'int8', 'bfloat16', 'bool'")


class Device(NamedTuple):
    """A device of a server: DLPack's type number and an index."""

    type: int
    index: int = 0  # type: ignore[assignment]  # a tuple's method, which nobody calls on a device

    @property
    def name(self) -> str:
        """The type's name, ``cpu`` or ``cuda``."""
        return DEVICE_NAMES.get(self.type, f"device{self.type}")

    def __str__(self) -> str:
        return f"{self.name}:{self.index}"


CPU = Device(1, 0)


def device(kind: str | int, index: int = 0) -> Device:
    """Make a device from a name (``"cuda"``, ``"cuda:1"``) or DLPack's number.

    Raises:
        ValueError: No such device name.
    """
    if isinstance(kind, int):
        return Device(kind, index)
    name, _, suffix = kind.partition(":")
    if name in _DEVICE_TYPES and (not suffix or suffix.isdecimal()):
        return Device(_DEVICE_TYPES[name], int(suffix) if suffix else index)
    raise ValueError(f"{kind!r} names no device; expected one of {', '.join(DEVICE_NAMES.values())}")


class Pointer(int):
    """An opaque 64-bit number of the wire (type index 4): a handle, a stream, or null."""

    __slots__ = ()

    def __repr__(self) -> str:
        return f"Pointer({int(self):#x})"


NULL = Pointer(0)


@dataclass(frozen=True, slots=True)
class FunctionRef:
    """A packed function of the server, by handle."""

    handle: int


@dataclass(frozen=True, slots=True)
class ModuleRef:
    """A module of the server, by handle."""

    handle: int


@dataclass(frozen=True, slots=True)
class ObjectRef:
    """Any other object of the server, by handle."""

    handle: int


class TensorMeta(NamedTuple):
    """A contiguous tensor in a server's memory: TVM's ``DLTensor`` without strides.

    Attributes:
        data: Handle of the memory, 0 for none.
        byte_offset: Where the first element is, in bytes from the start of that memory.
    """

    data: int
    device: Device
    shape: tuple[int, ...]
    dtype: DType
    byte_offset: int = 0

    @property
    def size(self) -> int:
        """Number of elements."""
        count = 1
        for extent in self.shape:
            count *= extent
        return count

    @property
    def nbytes(self) -> int:
        """Bytes of the whole tensor."""
        return self.dtype.nbytes(self.size)

    def at(self, start: int) -> TensorMeta:
        """Return the same tensor, ``start`` bytes further into its memory (one chunk of a copy)."""
        return self._replace(byte_offset=self.byte_offset + start)


Value = (
    bool
    | int
    | float
    | str
    | bytes
    | DType
    | Device
    | Pointer
    | TensorMeta
    | FunctionRef
    | ModuleRef
    | ObjectRef
    | None
)


class StaysHere:
    """What lives in this process and cannot be in another, or twice here: a copy or a pickle of it is refused.

    A copy would use the original's connection, and its finalizer would release the original's handle.
    """

    __slots__ = ()
    _instead = "make another one there"  # what to do instead of copying or pickling it

    def __reduce_ex__(self, protocol: object) -> Any:
        name = type(self).__name__
        raise TypeError(f"a {name} belongs to this process and cannot be copied or pickled; {self._instead}")


# How a value of a subclass becomes one of its base: by what it holds, whatever the subclass says of itself.
_BASES: tuple[tuple[type, Any], ...] = (
    (str, str.__str__),
    (int, int.__int__),
    (float, float.__float__),
    (bytes, lambda value: bytes.__getitem__(value, slice(None))),
    (bytearray, lambda value: bytearray.__getitem__(value, slice(None))),
)
_EXACT = frozenset({str, int, float, bytes, bytearray, bool, type(None), Pointer, DType, Device})


def plain(value: Any) -> Any:
    """Return text, number or bytes of a subclass (an enum's member, say) as its base value; anything else as it is.

    A subclass may override ``__str__``, ``__bytes__`` or ``__len__``; what travels is what the value holds.
    """
    if type(value) not in _EXACT:
        for base, convert in _BASES:
            if isinstance(value, base):
                return value if isinstance(value, Pointer) else convert(value)
    return value


def has_item(value: Any) -> bool:
    """Tell whether a numpy scalar's ``item()`` is its value; dates and spans may give a number without their unit."""
    return hasattr(value, "item") and getattr(getattr(value, "dtype", None), "kind", "") not in ("m", "M")


_NAME_OF_TYPE = type.__dict__["__name__"]


def type_name(value: object) -> str:
    """Return the name of a value's class, whatever its metaclass would say or raise."""
    name: str = _NAME_OF_TYPE.__get__(type(value))
    return name


def is_bare_enum(value: Any) -> bool:
    """Tell whether a value is an enum's member that is not text, a number or bytes too, and so cannot travel."""
    return isinstance(value, Enum) and plain(value) is value


def is_array(value: Any) -> bool:
    """Tell whether a value is a numpy array, of a subclass too; numpy is not loaded for that."""
    numpy = sys.modules.get("numpy")
    return numpy is not None and isinstance(value, numpy.ndarray)
