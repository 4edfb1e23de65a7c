"""Packed sequences: ``i32 count``, then per value ``i32 type_index`` and its payload.

Payloads are little-endian without padding: 8 bytes for scalars, handles, dtype and device; ``u64 len`` and the
bytes for raw strings (8) and byte arrays (9); for strings and bytes in object form (11, 12, 65, 66) an inner
type word before the length; a DLTensor is ``u64 data, 2 x i32 device, i32 ndim, u8 code, u8 bits, u16 lanes,
i64 shape[ndim], u64 byte_offset``.

Three styles of writing text and bytes exist on the wire, see :class:`Style`; a reader accepts all of them.

Source:
    RPCReference::SendPackedSeq / RecvPackedSeq, src/runtime/rpc/rpc_reference.h, protocol 0.8.0.
"""

from __future__ import annotations

import struct
from enum import Enum
from typing import TYPE_CHECKING, Any

from rpcnb.errors import ArgumentError, LimitExceeded, RemoteProtocolError
from rpcnb.protocol.codes import Limits
from rpcnb.values import (
    NULL,
    Device,
    DType,
    FunctionRef,
    ModuleRef,
    ObjectRef,
    Pointer,
    TensorMeta,
    Value,
    plain,
    read_dtype,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["Buffer", "Style", "decode_tensor", "decode_values", "encode_call_result", "encode_tensor", "encode_values"]

Buffer = bytes | bytearray | memoryview


class Style(Enum):
    """How text and bytes are written: as call arguments, as results, as constructor arguments."""

    ARGUMENT = 0  # text raw (8), bytes in object form (12/66)
    RESULT = 1  # text raw (8), bytes as byte array (9)
    CONSTRUCTOR = 2  # text (11/65) and bytes (12/66) in object form


_INDEX = struct.Struct("<i")
_WORD = struct.Struct("<iq")  # type index and one signed 64-bit payload word
_FLOAT = struct.Struct("<id")
_UWORD = struct.Struct("<iQ")
_INNER = struct.Struct("<iIQ")  # object form: outer index, inner index, length or handle
_DTYPE = struct.Struct("<iBBHi")
_DTYPE_PAYLOAD = struct.Struct("<BBH")
_DEVICE = struct.Struct("<iii")
_TENSOR_HEAD = struct.Struct("<QiiiBBH")
_U64 = struct.Struct("<Q")
_DOUBLE = struct.Struct("<d")

_BULK = 1 << 16  # payloads from here on travel as buffers of their own, uncopied
_I64_MIN, _I64_MAX = -(1 << 63), (1 << 63) - 1
_NONE_BYTES = _INDEX.pack(0)
_TEXT_INDICES = frozenset({11, 65})
_BYTES_INDICES = frozenset({12, 66})


def _encode_bytes(data: Buffer, head: bytes, parts: list[Buffer]) -> None:
    if len(data) < _BULK:
        parts.append(head + bytes(data))
    else:
        parts.append(head)
        parts.append(data)


def encode_tensor(meta: TensorMeta) -> bytes:
    """Encode a DLTensor, ``32 + 8 * ndim`` bytes."""
    kind, ndim = meta.dtype, len(meta.shape)
    head = _TENSOR_HEAD.pack(meta.data, meta.device[0], meta.device[1], ndim, kind.code, kind.bits, kind.lanes)
    return head + struct.pack(f"<{ndim}qQ", *meta.shape, meta.byte_offset)


def _encode_text(text: str, style: Style, parts: list[Buffer], index: int) -> None:
    try:
        data = text.encode()
    except UnicodeEncodeError as error:
        raise ArgumentError(
            index, f"text that is not Unicode ({error.reason})", "text without lone surrogates"
        ) from None
    if style is Style.CONSTRUCTOR or b"\0" in data:  # a raw string would end at the NUL
        outer = 11 if len(data) <= 7 else 65
        _encode_bytes(data, _INNER.pack(outer, 65, len(data)), parts)
    else:
        _encode_bytes(data, _UWORD.pack(8, len(data)), parts)


def _encode_rare(value: Any, style: Style, parts: list[Buffer], index: int) -> None:
    """Encode what is neither int, float, None nor str; exact types first, subclasses behind them."""
    if isinstance(value, bool):
        parts.append(_WORD.pack(2, value))
    elif isinstance(value, Pointer):
        parts.append(_UWORD.pack(4, value))
    elif isinstance(value, TensorMeta):
        parts.append(_INDEX.pack(7) + encode_tensor(value))
    elif isinstance(value, Device):
        parts.append(_DEVICE.pack(6, value[0], value[1]))
    elif isinstance(value, DType):
        parts.append(_DTYPE.pack(5, value.code, value.bits, value.lanes, 0))
    elif isinstance(value, (bytes, bytearray, memoryview)):
        value = plain(value)  # the length announced is that of what is sent
        if isinstance(value, memoryview) and not (value.ndim == value.itemsize == 1 and value.c_contiguous):
            value = value.tobytes()  # len() must count bytes
        if style is Style.RESULT:
            _encode_bytes(value, _UWORD.pack(9, len(value)), parts)
        else:
            _encode_bytes(value, _INNER.pack(12 if len(value) <= 7 else 66, 66, len(value)), parts)
    elif isinstance(value, ModuleRef):
        parts.append(_UWORD.pack(73, value.handle))
    elif isinstance(value, FunctionRef):
        parts.append(_UWORD.pack(68, value.handle))
    elif isinstance(value, ObjectRef):
        parts.append(_INNER.pack(115, 115, value.handle))
    elif isinstance(value, int):
        _encode_int(plain(value), parts, index)
    elif isinstance(value, float):
        parts.append(_FLOAT.pack(3, value))
    elif isinstance(value, str):
        _encode_text(plain(value), style, parts, index)
    else:
        raise ArgumentError(index, f"of type {type(value).__name__}")


def _encode_int(value: int, parts: list[Buffer], index: int) -> None:
    if not _I64_MIN <= value <= _I64_MAX:
        raise ArgumentError(
            index, f"the int {value if value.bit_length() < 200 else 'of many digits'}", "64 signed bits"
        )
    parts.append(_WORD.pack(1, value))


def encode_values(values: Sequence[Value], style: Style, parts: list[Buffer]) -> None:
    """Append the packed sequence of ``values`` to ``parts``; bulk bytes stay buffers of their own.

    Raises:
        ArgumentError: A value cannot travel; ``parts`` is then of no use.
    """
    parts.append(_INDEX.pack(len(values)))
    for index, value in enumerate(values):
        kind = type(value)
        if kind is int:
            _encode_int(value, parts, index)  # type: ignore[arg-type]  # an exact int
        elif kind is float:
            parts.append(_FLOAT.pack(3, value))
        elif kind is str:
            _encode_text(value, style, parts, index)  # type: ignore[arg-type]  # an exact str
        elif value is None:
            parts.append(_NONE_BYTES)
        else:
            _encode_rare(value, style, parts, index)


def encode_call_result(value: Value) -> tuple[Value, ...]:
    """Return the sequence of a kReturn to kCallFunc for a plain value: its type index, then itself.

    Tensors, functions, modules and objects need handles and are the serving session's business.
    """
    if value is None:
        return (0, None)
    value = plain(value)
    if isinstance(value, DType):
        return (5, value)
    if isinstance(value, str):
        return (11 if len(value.encode("utf-8", "surrogatepass")) <= 7 else 65, value)
    if isinstance(value, (bytes, bytearray, memoryview)):
        return (12 if memoryview(value).nbytes <= 7 else 66, value)
    for kind, index in ((bool, 2), (Pointer, 4), (int, 1), (float, 3), (Device, 6)):
        if isinstance(value, kind):
            return (index, value)
    raise ArgumentError(0, f"of type {type(value).__name__}")


def decode_tensor(data: memoryview, start: int, end: int, limits: Limits) -> tuple[TensorMeta, int] | None:
    """Decode the DLTensor at ``start``; None while it is not complete before ``end``.

    Returns:
        The tensor and the position behind it.
    """
    if end - start < 32:
        return None
    handle, kind, index, ndim, code, bits, lanes = _TENSOR_HEAD.unpack_from(data, start)
    if not 0 <= ndim <= limits.ndim:
        raise LimitExceeded(f"tensor of {ndim} dimensions exceeds ndim={limits.ndim}")
    if end - start < 32 + 8 * ndim:
        return None
    *shape, offset = struct.unpack_from(f"<{ndim}qQ", data, start + 24)
    if bits == 0 or lanes == 0 or (shape and min(shape) < 0):
        raise RemoteProtocolError(
            f"expected a tensor shape and type, got shape {tuple(shape)}, {bits} bits, {lanes} lanes"
        )
    meta = TensorMeta(handle, Device(kind, index), tuple(shape), read_dtype(code, bits, lanes), offset)
    if meta.nbytes > _I64_MAX or offset > _I64_MAX:
        raise LimitExceeded(f"tensor of shape {tuple(shape)} at offset {offset} exceeds 2**63 bytes")
    return meta, start + 32 + 8 * ndim


def _text(data: memoryview, limits: Limits) -> str:
    if len(data) > limits.text:
        raise LimitExceeded(f"text of {len(data)} bytes exceeds text={limits.text}")
    try:
        return str(data, "utf-8")
    except UnicodeDecodeError as error:
        raise RemoteProtocolError(f"expected UTF-8 text, got {error.reason} at byte {error.start}") from None


def _object_form(data: memoryview, pos: int, end: int, limits: Limits, out: list[Value]) -> int:
    """Decode a value in object form; -1 while it is not complete."""
    if end - pos < 16:
        return -1
    outer, inner, word = _INNER.unpack_from(data, pos)
    if inner == 115:
        out.append(ObjectRef(word))
        return pos + 16
    if inner not in (65, 66):
        raise RemoteProtocolError(f"expected an object of type 65, 66 or 115, got {inner} (outer type {outer})")
    stop = pos + 16 + int(word)
    if stop > end:
        return -1
    body = data[pos + 16 : stop]
    out.append(_text(body, limits) if inner == 65 else bytes(body))
    return stop


def _decode_rare(data: memoryview, pos: int, end: int, limits: Limits, out: list[Value], index: int) -> int:
    """Decode one value that is not None, int, bool, float or opaque; -1 while it is not complete."""
    if index in (8, 9):
        stop = pos + 12 + int(_U64.unpack_from(data, pos + 4)[0])
        if stop > end:
            return -1
        body = data[pos + 12 : stop]
        out.append(_text(body, limits) if index == 8 else bytes(body))
        return stop
    if index == 7:
        found = decode_tensor(data, pos + 4, end, limits)
        if found is None:
            return -1
        out.append(found[0])
        return found[1]
    if index == 5:
        out.append(read_dtype(*_DTYPE_PAYLOAD.unpack_from(data, pos + 4)))
        return pos + 12
    if index == 6:
        out.append(Device(*_DEVICE.unpack_from(data, pos)[1:]))
        return pos + 12
    if index == 68 or index == 73:
        handle = _U64.unpack_from(data, pos + 4)[0]
        out.append(FunctionRef(handle) if index == 68 else ModuleRef(handle))
        return pos + 12
    if index in (11, 12) or (index >= 64 and index != 70):
        return _object_form(data, pos, end, limits, out)
    raise RemoteProtocolError(f"expected a value's type index, got {index}")


def decode_values(data: memoryview, pos: int, end: int, count: int, limits: Limits, out: list[Value]) -> int:
    """Append up to ``count`` whole values found in ``data[pos:end]`` to ``out``.

    Args:
        data: Bytes of a packet.
        pos: Where the next value begins.
        end: How far bytes have arrived.
        count: Values wanted; fewer are appended when the bytes run short.
        limits: What is refused.
        out: Receives the values.

    Returns:
        The position behind the last whole value.

    Raises:
        RemoteProtocolError: An illegal type index or text.
        LimitExceeded: A dimension count or text above its limit.
    """
    for _ in range(count):
        if end - pos >= 12:
            index, word = _WORD.unpack_from(data, pos)
            if index == 1:
                out.append(word)
                pos += 12
            elif index == 3:
                out.append(_DOUBLE.unpack_from(data, pos + 4)[0])
                pos += 12
            elif index == 0:
                out.append(None)
                pos += 4
            elif index == 2:
                out.append(word != 0)
                pos += 12
            elif index == 4:
                out.append(Pointer(word & 0xFFFFFFFFFFFFFFFF) if word else NULL)
                pos += 12
            else:
                after = _decode_rare(data, pos, end, limits, out, index)
                if after < 0:
                    break
                pos = after
        elif end - pos >= 4:
            index = _INDEX.unpack_from(data, pos)[0]
            if index != 0:
                break
            out.append(None)
            pos += 4
        else:
            break
    return pos


def is_bulk(data: memoryview, pos: int, end: int, threshold: int) -> tuple[int, int, int] | None:
    """Tell whether the value at ``pos`` is text or bytes of at least ``threshold`` bytes.

    Returns:
        ``(65 or 66, length of its head, length of its payload)``, or None if it is not or cannot be told yet.
    """
    if end - pos < 12:
        return None
    index, word = _UWORD.unpack_from(data, pos)
    if index in (8, 9):
        return (65 if index == 8 else 66, 12, word) if word >= threshold else None
    if end - pos < 16 or not (index in _TEXT_INDICES or index in _BYTES_INDICES):
        return None
    _, inner, length = _INNER.unpack_from(data, pos)
    return (inner, 16, length) if inner in (65, 66) and length >= threshold else None
