"""The numbers of the wire: magic words, packet codes, type indices, limits.

Source:
    RPCCode and kRPCMagic, src/runtime/rpc; TVMFFITypeIndex of apache-tvm-ffi; protocol 0.8.0.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

__all__ = ["MAGIC", "MAGIC_DUPLICATE", "MAGIC_MISMATCH", "VERSION", "Code", "Limits", "Role", "TypeIndex"]

MAGIC = 0xFF271
MAGIC_DUPLICATE = MAGIC + 1
MAGIC_MISMATCH = MAGIC + 2
VERSION = "0.8.0"


class Role(IntEnum):
    """Which side of a conversation: the caller, or the owner of functions and memory."""

    CLIENT = 0
    SERVER = 1


class Code(IntEnum):
    """The first word of a packet's body."""

    NONE = 0
    SHUTDOWN = 1
    INIT_SERVER = 2
    CALL_FUNC = 3
    RETURN = 4
    EXCEPTION = 5
    COPY_FROM_REMOTE = 6
    COPY_TO_REMOTE = 7
    COPY_ACK = 8
    GET_GLOBAL_FUNC = 9
    FREE_HANDLE = 10
    DEV_SET_DEVICE = 11
    DEV_GET_ATTR = 12
    DEV_ALLOC_DATA = 13
    DEV_FREE_DATA = 14
    DEV_STREAM_SYNC = 15
    COPY_AMONG_REMOTE = 16
    DEV_ALLOC_DATA_WITH_SCOPE = 17
    DEV_CREATE_STREAM = 18
    DEV_FREE_STREAM = 19
    DEV_SET_STREAM = 20
    DEV_GET_CURRENT_STREAM = 21


class TypeIndex(IntEnum):
    """What a value of a packed sequence is."""

    NONE = 0
    INT = 1
    BOOL = 2
    FLOAT = 3
    OPAQUE = 4
    DTYPE = 5
    DEVICE = 6
    DLTENSOR = 7
    RAW_STR = 8
    BYTE_ARRAY = 9
    SMALL_STR = 11
    SMALL_BYTES = 12
    OBJECT = 64
    STR = 65
    BYTES = 66
    FUNCTION = 68
    TENSOR = 70
    MODULE = 73
    RPC_OBJECT_REF = 115


@dataclass(frozen=True, slots=True)
class Limits:
    """How much a peer may ask for; every refusal names the field.

    Attributes:
        key: Bytes of a key text in the handshake.
        call: Bytes of a packet without its bytes payloads and without a copy's data.
        bytes_argument: Bytes of one bytes argument; its buffer grows only as data arrives.
        upload_quota: Bytes on disk per session.
        args: Values of one packed sequence.
        text: Bytes of one string.
        ndim: Dimensions of a tensor.
        handles: Live handles per session.
        bad_handles: Handles that were never issued, after which a session is ended.
        half_open: Connections per server that have not finished the handshake.
        half_open_per_address: The same per remote address (loopback is exempt).
        handshake_timeout: Seconds for a handshake.
        uploads: Files that a session has begun to upload in parts, and not finished.
        outcomes: Bytes that a session's started calls hold: arguments of those that have not ended, and outcomes that
            its client has not collected.
        draining: Functions that go on running after their clients have gone; then no plain function is begun.
        input_buffered: Bytes of requests kept behind one that is parked.
        jobs: Detached jobs of one token, finished ones included.
        job_bytes: Bytes that finished jobs keep: output, result and files; of one result, too.
        job_output: Bytes of a job's output that are kept: the last ones.
        auth_failures: Wrong tokens per minute and remote address; further ones are told the later, up to 2 s.
        exempt_loopback: Do not count connections and failures of this machine per address.
    """

    key: int = 4096
    call: int = 64 << 20
    bytes_argument: int = 1 << 30
    upload_quota: int = 4 << 30
    args: int = 1024
    text: int = 16 << 20
    ndim: int = 64
    handles: int = 65536
    bad_handles: int = 100
    half_open: int = 256
    half_open_per_address: int = 64
    handshake_timeout: float = 5.0
    uploads: int = 64
    outcomes: int = 256 << 20
    draining: int = 512
    input_buffered: int = 8 << 20
    jobs: int = 64
    job_bytes: int = 4 << 30
    job_output: int = 16 << 20
    auth_failures: int = 10
    exempt_loopback: bool = True
