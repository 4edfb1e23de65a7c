"""Outcomes of started calls (``rpcnb.next``), and the output and results of cells inside them."""

from __future__ import annotations

import contextlib

from fuzz.promises import PromiseBroken, bounded
from rpcnb.client.answers import load_json
from rpcnb.client.cells import CellResult, read_output
from rpcnb.errors import RpcError
from rpcnb.protocol.records import Emitted, read_records, write_record

__all__ = ["one_input"]


def one_input(data: bytes) -> None:
    """Read records; what was read and written is the same when that is done again."""
    with bounded(len(data)):
        try:
            found = read_records(data)
        except RpcError:
            return
        written = b"".join(write_record(call, reply) for call, reply in found)
        again = b"".join(write_record(call, reply) for call, reply in read_records(written))
        if again != written:  # bytes: NaN does not equal itself, and a text's NULs are written out the first time
            raise PromiseBroken(f"expected {written!r} when it is read and written again, got {again!r}")
        for _, reply in found:
            if isinstance(reply, Emitted):
                _read_output(reply.data)


def _read_output(data: bytes) -> None:
    for read in (read_output, CellResult.decode):
        with contextlib.suppress(RpcError):
            read(load_json(data))
