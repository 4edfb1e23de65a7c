"""Outcomes of calls that overlap: what ``rpcnb.next()`` returns between rpcnb peers.

One bytes value, a list of records: ``i64 call | i32 kind | u64 nbytes`` and a packed sequence of ``nbytes`` bytes (its
count, then the values). Kind 1 is a result, 2 an error (text, class, traceback), 3 part of what the call puts out.

Source:
    docs/design.md 1; who writes them is ``rpcnb/runtime/overlap.py``, who reads them ``rpcnb/link/control.py``.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Any, NamedTuple

from rpcnb.errors import RemoteProtocolError
from rpcnb.protocol.codes import Limits
from rpcnb.protocol.messages import Raised, Return, printable
from rpcnb.protocol.sequence import Style, decode_values, encode_values

if TYPE_CHECKING:
    from rpcnb.values import Value

__all__ = ["CANCEL", "CANCEL_AT", "NEXT", "START", "Emitted", "read_records", "write_record"]

START, NEXT, CANCEL, CANCEL_AT = "rpcnb.start", "rpcnb.next", "rpcnb.cancel", "rpcnb.cancel_at"
RESULT, ERROR, OUTPUT = 1, 2, 3  # kinds of records
_RECORD = struct.Struct("<qiQ")  # call, kind, bytes of the packed sequence
_COUNT = struct.Struct("<i")


class Emitted(NamedTuple):
    """Part of what a started call puts out while it runs."""

    data: bytes


def write_record(call: int, reply: Raised | Return | Emitted) -> bytes:
    """Return the record that carries the outcome of a started call, or part of its output."""
    parts: list[Any] = []
    if isinstance(reply, Raised):
        kind = ERROR
        texts = (reply.text, reply.type_name, reply.traceback)
        encode_values(tuple(map(printable, texts)), Style.RESULT, parts)
    else:
        kind = RESULT if isinstance(reply, Return) else OUTPUT
        encode_values(reply.values if isinstance(reply, Return) else (reply.data,), Style.RESULT, parts)
    body = b"".join(parts)
    return _RECORD.pack(call, kind, len(body)) + body


def read_records(data: bytes, limits: Limits | None = None) -> list[tuple[int, Raised | Return | Emitted]]:
    """Take apart what ``rpcnb.next`` returned.

    Raises:
        RemoteProtocolError: It is not a list of records.
    """
    limits = limits or Limits()
    view, pos = memoryview(data), 0
    found: list[tuple[int, Raised | Return | Emitted]] = []
    while pos < len(view):
        if len(view) - pos < _RECORD.size + 4:
            raise RemoteProtocolError(f"expected a record of an outcome, got {len(view) - pos} bytes")
        call, kind, nbytes = _RECORD.unpack_from(view, pos)
        pos += _RECORD.size
        end = pos + nbytes
        if end > len(view) or nbytes < 4:
            raise RemoteProtocolError(f"expected an outcome of {nbytes} bytes, got {len(view) - pos}")
        (count,) = _COUNT.unpack_from(view, pos)
        values: list[Value] = []
        if decode_values(view, pos + 4, end, min(count, limits.args), limits, values) != end or len(values) != count:
            raise RemoteProtocolError(f"expected {count} values of an outcome in {nbytes} bytes")
        pos = end
        if kind == RESULT:
            found.append((call, Return(tuple(values))))
        elif kind == ERROR and count == 3 and all(isinstance(value, str) for value in values):
            found.append((call, Raised(*values)))  # type: ignore[arg-type]  # three texts
        elif kind == OUTPUT and count == 1 and isinstance(values[0], bytes):
            found.append((call, Emitted(values[0])))
        else:
            raise RemoteProtocolError(f"expected a result, an error or output, got an outcome of kind {kind}")
    return found
