"""How variables of remote cells travel: an array as it is, anything else as bytes that say how to read them.

``j`` and JSON (numbers, text, lists and dicts of them), ``b`` and bytes, ``p`` and a pickle. A pickle runs code where
it is read, so the reader has to say that it trusts the writer.
"""

from __future__ import annotations

import json
from typing import Any

from rpcnb.cells.pickles import pickled, unpickled
from rpcnb.errors import AccessDenied, ArgumentError
from rpcnb.values import has_item, is_array, is_bare_enum, plain

__all__ = ["dump_variable", "load_variable"]


def dump_variable(value: Any, pickles: bool) -> Any:
    """Return what carries a variable.

    Raises:
        AccessDenied: It needs pickling, and that was not asked for.
    """
    if is_array(value):
        return value
    if type(value).__module__ == "numpy":
        value = value.item() if has_item(value) else value  # a scalar
    value = plain(value)
    if isinstance(value, (bytes, bytearray)):
        return b"b" + value
    try:
        inside = _plain_inside(value)
        data = json.dumps(inside)
        if repr(json.loads(data)) != repr(inside):  # a tuple, numbers as keys: they would come as something else
            raise ValueError
        return b"j" + data.encode()
    except (TypeError, ValueError, RecursionError):
        if not pickles:
            raise AccessDenied(
                f"objects of type {type(value).__name__} travel only as a pickle, which runs code where it arrives; "
                f"{'pass .value, or ' if is_bare_enum(value) else ''}say pickle=True if you trust the other side"
            ) from None
    return b"p" + pickled(value)


def _plain_inside(value: Any) -> Any:
    """Return what lists and dicts hold by its base value, too."""
    if type(value) is list:
        return [_plain_inside(one) for one in value]
    if type(value) is dict:
        return {plain(key): _plain_inside(one) for key, one in value.items()}
    return plain(value)


def load_variable(data: bytes, pickles: bool) -> Any:
    """Return the variable that bytes carry.

    Raises:
        AccessDenied: It is a pickle, and the receiver has not said that it trusts the sender.
        ArgumentError: It is nothing of the kind.
    """
    form, rest = data[:1], data[1:]
    if form == b"j":
        return json.loads(rest)
    if form == b"b":
        return bytes(rest)
    if form != b"p":
        raise ArgumentError(1, f"bytes that begin with {form!r}", "a variable")
    if not pickles:
        raise AccessDenied(
            "the variable came as a pickle, which runs code here; say pickle=True if you trust the sender"
        )
    return unpickled(rest)
