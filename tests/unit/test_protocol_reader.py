"""Reading packets: every kind, at any cut; large ones piece by piece; the data of copies; what is refused."""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any

import pytest

from rpcnb.errors import LimitExceeded, RemoteProtocolError
from rpcnb.protocol.codes import Code, Limits, Role
from rpcnb.protocol.endpoint import Endpoint, Sink, State
from rpcnb.protocol.messages import (
    CallFunc,
    CopyAck,
    CopyFromRemote,
    CopyToRemote,
    InitServer,
    Malformed,
    Message,
    PayloadEnd,
    Raised,
    Return,
    Shutdown,
    Syscall,
    encode_packet,
)
from rpcnb.protocol.shortcut import NOT_PLAIN
from rpcnb.values import CPU, NULL, DType, ModuleRef, Pointer, TensorMeta, Value

KIB = 1 << 10
META = TensorMeta(7, CPU, (4,), DType(2, 32), 8)
BULK = bytes(range(256)) * 800  # 200 KiB
TEXT = "é世1" * 30_000  # 180 KiB

REQUESTS: list[Message] = [
    InitServer(),
    InitServer(("rpc.Connect", "host", 9090, b"12345678")),
    CallFunc(1),
    CallFunc(1, (1, None, "text", b"bytes", 2.5, True, Pointer(3), CPU, DType(0, 8), META, ModuleRef(2))),
    CopyFromRemote(META, 16),
    Syscall(Code.GET_GLOBAL_FUNC, ("f",)),
    Syscall(Code.FREE_HANDLE, (Pointer(1),)),
    Syscall(Code.FREE_HANDLE, (None,)),
    Syscall(Code.DEV_SET_DEVICE, (CPU,)),
    Syscall(Code.DEV_GET_ATTR, (CPU, 3)),
    Syscall(Code.DEV_ALLOC_DATA, (CPU, 8, 64, DType(0, 8))),
    Syscall(Code.DEV_FREE_DATA, (CPU, Pointer(1))),
    Syscall(Code.DEV_STREAM_SYNC, (CPU, NULL)),
    Syscall(Code.COPY_AMONG_REMOTE, (META, META, NULL)),
    Syscall(Code.DEV_ALLOC_DATA_WITH_SCOPE, (META, None)),
    Syscall(Code.DEV_ALLOC_DATA_WITH_SCOPE, (META, "global")),
    Syscall(Code.DEV_CREATE_STREAM, (CPU,)),
    Syscall(Code.DEV_FREE_STREAM, (CPU, NULL)),
    Syscall(Code.DEV_SET_STREAM, (CPU, NULL)),
    Syscall(Code.DEV_GET_CURRENT_STREAM, (CPU,)),
    Shutdown(),
]
REPLIES: list[Message] = [
    Return(),
    Return((1, 42)),
    Return((1, True)),
    Return((11, "text")),
    Return((70, META, Pointer(9))),
    Raised("boom"),
    Raised("boom", "ValueError", "traceback"),
]
LARGE_REQUESTS: list[Message] = [
    CallFunc(1, (BULK,)),
    CallFunc(1, ("name", BULK, 5)),
    CallFunc(1, (TEXT, b"x", TEXT)),
    CallFunc(1, (BULK, None, BULK, "a")),
    CallFunc(1, tuple("x" * 60_000 for _ in range(4))),
    InitServer(("rpc.WasmSession", BULK)),
    Syscall(Code.GET_GLOBAL_FUNC, (TEXT,)),
]
LARGE_REPLIES: list[Message] = [Return((66, BULK)), Return((65, TEXT)), Return((65, "\0" * 200_000)), Raised(TEXT)]


def packet(message: Message) -> bytes:
    return b"".join(encode_packet(message))


def framed(text: str | bytes) -> bytes:
    body = bytes.fromhex(text) if isinstance(text, str) else text
    return struct.pack("<Q", len(body)) + body


def server(limits: Limits | None = None, sink_for: Callable[..., Sink | None] | None = None) -> Endpoint:
    return Endpoint(Role.SERVER, limits, sink_for)


def client(*requests: Message) -> Endpoint:
    endpoint = Endpoint(Role.CLIENT)
    for request in requests:
        endpoint.send(request)
    return endpoint


def feed(endpoint: Endpoint, data: bytes, cut: int) -> list[Message]:
    """Feed pieces of ``cut`` bytes; a server answers every request at once, and gives a copy's data no place."""
    found: list[Message] = []
    for start in range(0, len(data), cut):
        endpoint.receive_data(data[start : start + cut])
        while (message := endpoint.next_message()) is not None:
            found.append(message)
            if isinstance(message, CopyToRemote):
                endpoint.receive_payload(None)
            elif endpoint.role is Role.SERVER and endpoint.state is State.BUSY:
                endpoint.send(Return())
    return found


# -- small packets, whole, byte by byte and with bytes left over ---------------------------------------------------


@pytest.mark.parametrize("cut", [1, 3, 8, 12, 13, 1000])
@pytest.mark.parametrize("request_", REQUESTS, ids=str)
def test_a_request_is_read_at_any_cut(request_: Message, cut: int) -> None:
    assert feed(server(), packet(request_), cut) == [request_]


@pytest.mark.parametrize("cut", [1, 3, 8, 12, 13, 1000])
@pytest.mark.parametrize("reply", REPLIES, ids=str)
def test_a_reply_is_read_at_any_cut(reply: Message, cut: int) -> None:
    endpoint = client(CallFunc(1))
    assert feed(endpoint, packet(reply), cut) == [reply]
    assert endpoint.state is State.IDLE


@pytest.mark.parametrize("request_", REQUESTS[:-1], ids=str)
def test_bytes_behind_a_request_are_left_for_the_next_one(request_: Message) -> None:
    endpoint = server()
    after = packet(CallFunc(2))
    endpoint.receive_data(packet(request_) + after[:5])
    assert endpoint.next_message() == request_
    assert endpoint.buffered == 5
    endpoint.send(Return())
    assert endpoint.next_message() is None
    endpoint.receive_data(after[5:])
    assert endpoint.next_message() == CallFunc(2)
    assert endpoint.buffered == 0


@pytest.mark.parametrize("cut", [1, 5, 8, 100])
def test_empty_packets_mean_nothing(cut: int) -> None:
    empty = bytes(8)
    data = empty + packet(CallFunc(1)) + empty * 2 + packet(CallFunc(2)) + empty
    assert feed(server(), data, cut) == [CallFunc(1), CallFunc(2)]
    assert feed(client(CallFunc(1)), empty * 3 + packet(Return()), cut) == [Return()]


# -- large packets, piece by piece ---------------------------------------------------------------------------------


@pytest.mark.parametrize("cut", [977, 4096, 65536, 1 << 20])
@pytest.mark.parametrize("request_", LARGE_REQUESTS, ids=range(len(LARGE_REQUESTS)))
def test_a_large_request_is_read_at_any_cut(request_: Message, cut: int) -> None:
    assert feed(server(), packet(request_) + packet(CallFunc(2)), cut) == [request_, CallFunc(2)]


@pytest.mark.parametrize("cut", [977, 65536, 1 << 20])
@pytest.mark.parametrize("reply", LARGE_REPLIES, ids=range(len(LARGE_REPLIES)))
def test_a_large_reply_is_read_at_any_cut(reply: Message, cut: int) -> None:
    assert feed(client(CallFunc(1), CallFunc(2)), packet(reply) + packet(Return()), cut) == [reply, Return()]


def test_a_large_packet_is_read_byte_by_byte() -> None:
    message = CallFunc(1, (1, "a", BULK[: 129 * KIB], None))
    assert feed(server(), packet(message), 1) == [message]


@pytest.mark.parametrize("cut", [1, 4096, 1 << 20])
def test_bulk_of_a_declared_index_that_does_not_fit_is_told_by_its_inner_word(cut: int) -> None:
    body = struct.pack("<iQi", 3, 1, 1) + struct.pack("<iIQ", 12, 65, 132 * KIB) + b"x" * (132 * KIB)
    assert feed(server(), framed(body), cut) == [CallFunc(1, ("x" * (132 * KIB),))]


# -- malformed content: the next packet is still right --------------------------------------------------------------

MALFORMED = {
    "01": "expected a packet with a code, got 1 bytes",
    "0300": "expected a packet with a code, got 2 bytes",
    "030000": "expected a packet with a code, got 3 bytes",
    "63000000": "expected a request, got code 99",
    "00000000": "expected a request, got code 0",
    "04000000 01000000 00000000": "expected a request, got code 4",
    "08000000 61": "expected a request, got code 8 in a packet of 5 bytes",
    "ffffffff": "expected a request, got code -1",
    "03000000": "expected a function handle, got the end of the packet",
    "03000000 0100000000000000": "expected a function handle, got the end of the packet",
    "03000000 0100000000000000 ffffffff": "expected a count of values, got -1",
    "03000000 0100000000000000 ffffff7f": "sequence of 2147483647 values exceeds args=1024",
    "03000000 0100000000000000 01040000": "sequence of 1025 values exceeds args=1024",
    "03000000 0100000000000000 02000000 00000000": "expected 2 values, got the end of the packet after 1",
    "03000000 0100000000000000 00000000 00": "expected the end of the packet after 0 values, got 1 bytes more",
    "03000000 0100000000000000 01000000 00000000 0000": "after 1 values, got 2 bytes more",
    "03000000 0100000000000000 01000000 0a000000 0000000000000000": "expected a value's type index, got 10",
    "03000000 0100000000000000 01000000 08000000 0000000000000080": "expected 1 values, got the end of the packet",
    "09000000": "expected a packed sequence, got the end of the packet",
    "09000000 00000000": "GET_GLOBAL_FUNC expected 1 arguments, got 0",
    "09000000 01000000 01000000 0000000000000000": "GET_GLOBAL_FUNC expected str as argument 0, got int",
    "0a000000 01000000 08000000 0000000000000000": "FREE_HANDLE expected Pointer or NoneType as argument 0, got str",
    "06000000": "expected a tensor and a byte count in 0 bytes",
    "02000000 05000000": "expected a version, got the end of the packet",
    "02000000 4100000000000000" + "30" * 65 + "00000000": "expected a version of at most 64 bytes, got 65",
    "02000000 0500000000000000 3030": "expected a version of at most 64 bytes, got 5",
    "02000000 0100000000000000 30": "expected a packed sequence, got the end of the packet",
    "07000000": "expected a tensor and a byte count in 0 bytes",
    "07000000" + "00" * 20: "expected a tensor and a byte count in 20 bytes",
}


@pytest.mark.parametrize("cut", [1, 12, 1000])
@pytest.mark.parametrize(("body", "words"), MALFORMED.items())
def test_malformed_content_is_told_and_the_next_packet_is_right(body: str, words: str, cut: int) -> None:
    found = feed(server(), framed(body) + packet(CallFunc(2)), cut)
    assert len(found) == 2
    assert isinstance(found[0], Malformed)
    assert words in str(found[0].error)
    assert found[1] == CallFunc(2)


def large(text: str) -> bytes:
    """Return a body that is too long to be decoded whole."""
    data = bytes.fromhex(text)
    return data + bytes(150 * KIB - len(data))


LARGE_MALFORMED = {
    large("63000000"): "expected a request, got code 99 in a packet of 153600 bytes",
    large("06000000"): "expected a request, got code 6 in a packet of 153600 bytes",
    large("01000000"): "expected a request, got code 1 in a packet of",
    large("03000000 0100000000000000 ffffffff"): "expected a count of values, got -1",
    large("03000000 0100000000000000 ffffff7f"): "exceeds args=1024",
    large("03000000 0100000000000000 01000000 00000000"): "expected the end of the packet after 1 values, got",
    large("03000000 0100000000000000 01000000 0a000000"): "expected a value's type index, got 10",
    large("03000000 0100000000000000 01000000 08000000 0000000000000080"): "exceeds call=67108864",
    large("03000000 0100000000000000 01000000 09000000 0000000000000080"): "exceeds bytes_argument=1073741824",
    large("03000000 0100000000000000 01000000 09000000 0000100000000000"): "expected 1048576 bytes, got the end of the",
    large("03000000 0100000000000000 01000000 08000000 0000100000000000"): "expected 1048576 bytes, got the end of the",
    large("02000000 4100000000000000"): "expected a version of at most 64 bytes, got 65",
    large("09000000 01000000 01000000"): "expected the end of the packet after 1 values",
    large("09000000 02000000" + "00000000" * 2): "expected the end of the packet after 2 values",
    large("07000000" + "00" * 16 + "ffffff7f"): "tensor of 2147483647 dimensions exceeds ndim=64",
    large("07000000" + "00" * 16 + "00000000 00200100" + "00" * 8 + "01"): "expected 1 bytes of data, got 153556",
    struct.pack("<iQii", 3, 1, 2, 9) + struct.pack("<Q", 140 * KIB) + bytes(140 * KIB): "after 1",
    struct.pack("<iQii", 3, 1, 1, 8) + struct.pack("<Q", 140 * KIB) + b"\xff" * (140 * KIB): "expected UTF-8 text, got",
    struct.pack("<iQii", 3, 1, 2, 9) + struct.pack("<Q", 140 * KIB) + bytes(140 * KIB) + b"\1\0\0\0\0": "after 1",
}


@pytest.mark.parametrize("cut", [4096, 1 << 20])
@pytest.mark.parametrize("number", range(len(LARGE_MALFORMED)))
def test_malformed_content_of_a_large_packet_is_skipped(number: int, cut: int) -> None:
    body, words = list(LARGE_MALFORMED.items())[number]
    found = feed(server(), framed(body) + packet(CallFunc(2)), cut)
    assert len(found) == 2
    assert isinstance(found[0], Malformed)
    assert words in str(found[0].error)
    assert found[1] == CallFunc(2)


@pytest.mark.parametrize("nbytes", [1 << 48, (1 << 63) - 1, (1 << 64) - 1])
@pytest.mark.parametrize("cut", [1, 12])
def test_an_absurd_length_ends_the_conversation(nbytes: int, cut: int) -> None:
    endpoint = server()
    with pytest.raises(RemoteProtocolError, match=f"expected a packet, got a length of {nbytes} bytes"):
        feed(endpoint, struct.pack("<Qi", nbytes, 3), cut)
    assert endpoint.state is State.CLOSED


def test_an_announced_length_allocates_nothing() -> None:
    endpoint = server()
    assert feed(endpoint, struct.pack("<QiQi", (1 << 48) - 1, 3, 1, 2), 1) == []
    assert len(endpoint.get_buffer()) <= 128 * KIB


# -- limits --------------------------------------------------------------------------------------------------------

LIMITED = [
    (Limits(text=100_000), CallFunc(1, ("x" * 100_001, b"y" * 40_000)), "of 100001 bytes exceeds text=100000"),
    (Limits(text=1000), CallFunc(1, ("x" * 1001, b"y" * 140_000)), "text of 1001 bytes exceeds text=1000"),
    (Limits(bytes_argument=150_000), CallFunc(1, (BULK,)), "value of 204800 bytes exceeds bytes_argument=150000"),
    (
        Limits(call=150_000),
        CallFunc(1, ("x" * 70_000,) * 3),
        "call packet of more than 210036 bytes exceeds call=150000",
    ),
    (
        Limits(call=150_000),
        CallFunc(1, ("x" * 60_000,) * 3),
        "call packet of more than 180036 bytes exceeds call=150000",
    ),
    (Limits(args=3), CallFunc(1, (BULK, 1, 2, 3)), "sequence of 4 values exceeds args=3"),
    (Limits(ndim=0), CallFunc(1, (BULK, META)), "tensor of 1 dimensions exceeds ndim=0"),
]


@pytest.mark.parametrize("cut", [4096, 1 << 20])
@pytest.mark.parametrize(("limits", "message", "words"), LIMITED, ids=[words for *_, words in LIMITED])
def test_a_limit_refuses_the_packet_at_any_cut(limits: Limits, message: Message, words: str, cut: int) -> None:
    found = feed(server(limits), packet(message) + packet(CallFunc(2)), cut)
    assert isinstance(found[0], Malformed)
    assert isinstance(found[0].error, LimitExceeded)
    assert words in str(found[0].error)
    assert found[1:] == [CallFunc(2)]


@pytest.mark.parametrize("cut", [4096, 1 << 20])
def test_bytes_arguments_do_not_count_as_call(cut: int) -> None:
    message = CallFunc(1, (BULK, BULK))
    assert feed(server(Limits(call=100)), packet(message), cut) == [message]


# -- sinks ---------------------------------------------------------------------------------------------------------


class Bucket:
    """A sink that collects, and may refuse after some bytes."""

    def __init__(self, room: int | None = None, error: type[Exception] = LimitExceeded) -> None:
        self.data = bytearray()
        self.room = room
        self.error = error

    def write(self, data: memoryview) -> None:
        if self.room is not None and len(self.data) + len(data) > self.room:
            raise self.error("the bucket is full")
        self.data += data

    def finish(self) -> Value:
        return f"bucket of {len(self.data)}"


@pytest.mark.parametrize("cut", [977, 4096, 1 << 20])
def test_a_bulk_argument_goes_to_its_sink(cut: int) -> None:
    bucket = Bucket()
    asked: list[Any] = []

    def sink_for(handle: int, args: list[Value], nbytes: int) -> Sink | None:
        asked.append((handle, tuple(args), nbytes))
        return bucket if len(args) == 1 else None

    endpoint = server(Limits(bytes_argument=len(BULK)), sink_for)
    found = feed(endpoint, packet(CallFunc(9, ("name", BULK, BULK, TEXT))), cut)
    assert found == [CallFunc(9, ("name", f"bucket of {len(BULK)}", BULK, TEXT))]
    assert bucket.data == BULK
    assert [(handle, args[:1], nbytes) for handle, args, nbytes in asked] == [(9, ("name",), len(BULK))] * 2


def test_a_length_beyond_its_packet_opens_no_sink() -> None:
    opened: list[int] = []

    def sink_for(handle: int, args: list[Value], nbytes: int) -> Sink | None:
        opened.append(nbytes)
        return None

    endpoint = server(sink_for=sink_for)
    data = bytearray(b"".join(bytes(part) for part in encode_packet(CallFunc(5, (BULK,)))))
    assert struct.unpack_from("<Q", data, 32) == (len(BULK),)
    struct.pack_into("<Q", data, 32, len(BULK) + 1)
    endpoint.receive_data(data)
    assert isinstance(endpoint.next_message(), Malformed)
    assert opened == []


def test_a_sink_takes_more_than_memory_would() -> None:
    endpoint = server(Limits(bytes_argument=1000), lambda handle, args, nbytes: Bucket())
    assert feed(endpoint, packet(CallFunc(9, (BULK,))), 4096) == [CallFunc(9, (f"bucket of {len(BULK)}",))]


@pytest.mark.parametrize("error", [LimitExceeded, OSError])
@pytest.mark.parametrize("room", [0, 100_000])
def test_a_sink_that_refuses_has_the_rest_of_the_packet_skipped(room: int, error: type[Exception]) -> None:
    endpoint = server(None, lambda handle, args, nbytes: Bucket(room, error))
    found = feed(endpoint, packet(CallFunc(9, ("n", BULK, 1))) + packet(CallFunc(2)), 4096)
    assert isinstance(found[0], Malformed)
    assert type(found[0].error) is error
    assert str(found[0].error) == "the bucket is full"
    assert found[1:] == [CallFunc(2)]


# -- the data of copies --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cut", [1, 7, 60, 61, 1000])
def test_a_copys_data_goes_straight_to_the_given_memory(cut: int) -> None:
    endpoint = server()
    data = packet(CopyToRemote(META, 16, b"0123456789abcdef")) + packet(CallFunc(2))
    into = bytearray(16)
    found: list[Message] = []
    for start in range(0, len(data), cut):
        endpoint.receive_data(data[start : start + cut])
        while (message := endpoint.next_message()) is not None:
            found.append(message)
            if isinstance(message, CopyToRemote):
                assert (message.meta, message.nbytes, message.payload) == (META, 16, b"")
                endpoint.receive_payload(memoryview(into))
            else:
                endpoint.send(Return())
    assert found[1:] == [PayloadEnd(), CallFunc(2)]
    assert into == b"0123456789abcdef"


def test_the_driver_receives_into_the_destination_itself() -> None:
    endpoint = server()
    endpoint.receive_data(packet(CopyToRemote(META, 16, b"0123456789abcdef"))[:-14])
    assert endpoint.next_message() == CopyToRemote(META, 16)
    into = bytearray(16)
    endpoint.receive_payload(memoryview(into))
    assert into == b"01" + bytes(14)
    assert endpoint.payload_left == endpoint.bytes_needed == 14
    assert endpoint.next_message() is None
    for byte in b"23456789abcdef":
        view = endpoint.get_buffer()
        view[0] = byte
        endpoint.received(1)
    assert into == b"0123456789abcdef"
    assert endpoint.next_message() == PayloadEnd()
    assert endpoint.payload_left == 0


@pytest.mark.parametrize("cut", [1, 100, 5000, 1 << 20])
def test_refused_data_is_skipped(cut: int) -> None:
    data = packet(CopyToRemote(META, 70_000, bytes(70_000))) if cut > 1 else packet(CopyToRemote(META, 5, b"12345"))
    found = feed(server(), data + packet(CallFunc(2)), cut)
    assert isinstance(found[0], CopyToRemote)
    assert found[1:] == [PayloadEnd(), CallFunc(2)]


def test_skipped_data_is_received_in_large_pieces() -> None:
    endpoint = server()
    endpoint.receive_data(packet(CopyToRemote(META, 200_000, bytes(200_000)))[:60])
    assert isinstance(endpoint.next_message(), CopyToRemote)
    endpoint.receive_payload(None)
    assert len(endpoint.get_buffer()) == 64 * KIB
    endpoint.received(64 * KIB)
    assert len(endpoint.get_buffer()) == 64 * KIB
    endpoint.received(200_000 - 64 * KIB - 10)
    assert len(endpoint.get_buffer()) == 10


def test_a_copy_of_nothing_has_its_end_at_once() -> None:
    assert feed(server(), packet(CopyToRemote(META, 0)), 1) == [CopyToRemote(META, 0), PayloadEnd()]


@pytest.mark.parametrize("cut", [1, 12, 13, 20, 1000])
def test_a_replys_data_goes_straight_into_the_requests_memory(cut: int) -> None:
    into = bytearray(16)
    endpoint = client(CopyFromRemote(META, 16, memoryview(into)), CallFunc(2))
    found = feed(endpoint, packet(CopyAck(b"0123456789abcdef")) + packet(Return((1, 5))), cut)
    assert found == [CopyAck(), Return((1, 5))]
    assert into == b"0123456789abcdef"


def test_only_the_head_of_a_copys_reply_is_received_into_the_buffer() -> None:
    into = bytearray(16)
    endpoint = client(CopyFromRemote(META, 16, memoryview(into)))
    assert endpoint.bytes_needed == len(endpoint.get_buffer()) == 12
    endpoint.receive_data(packet(CopyAck(b"0123456789abcdef"))[:12])
    assert endpoint.next_message() is None
    assert endpoint.bytes_needed == len(endpoint.get_buffer()) == 16
    endpoint.get_buffer()[:4] = b"0123"
    endpoint.received(4)
    assert endpoint.next_message() is None
    endpoint.receive_data(b"456789abcdef")
    assert endpoint.next_message() == CopyAck()
    assert into == b"0123456789abcdef"


@pytest.mark.parametrize("before", [0, 10, 12, 14])
def test_discarded_data_goes_nowhere_and_its_reply_still_comes(before: int) -> None:
    into = bytearray(16)
    request = CopyFromRemote(META, 16, memoryview(into))
    endpoint = client(request, CallFunc(1))
    data = packet(CopyAck(b"0123456789abcdef")) + packet(Return())
    endpoint.receive_data(data[:before])
    assert endpoint.next_message() is None
    endpoint.discard(request)
    endpoint.receive_data(data[before:])
    assert endpoint.next_message() == CopyAck()
    assert endpoint.next_message() == Return()
    assert into == b"0123456789abcdef"[: max(0, before - 12)].ljust(16, b"\0")


def test_discarding_one_copy_leaves_the_one_in_progress_alone() -> None:
    one, other = bytearray(4), bytearray(4)
    requests = [CopyFromRemote(META, 4, memoryview(one)), CopyFromRemote(META, 4, memoryview(other))]
    endpoint = client(*requests)
    endpoint.receive_data(packet(CopyAck(b"abcd"))[:14])
    assert endpoint.next_message() is None
    endpoint.discard(requests[1])
    assert feed(endpoint, b"cd" + packet(CopyAck(b"efgh")), 3) == [CopyAck(), CopyAck()]
    assert (bytes(one), bytes(other)) == (b"abcd", bytes(4))


@pytest.mark.parametrize(
    ("endpoint", "words"),
    [
        (client(CopyFromRemote(META, 5)), "expected a reply with 5 bytes of data, got 4"),
        (client(CallFunc(1)), "expected a reply with no bytes of data, got 4"),
        (client(), "expected a reply with no bytes of data, got 4"),
    ],
)
def test_data_that_nobody_asked_for_is_refused(endpoint: Endpoint, words: str) -> None:
    with pytest.raises(RemoteProtocolError, match=words):
        feed(endpoint, packet(CopyAck(b"abcd")), 1)
    assert endpoint.state is State.CLOSED


# -- the buffer ----------------------------------------------------------------------------------------------------


def test_bytes_needed_names_the_least_that_says_something_new() -> None:
    endpoint = server()
    assert endpoint.bytes_needed == 8
    data = packet(CallFunc(1, (BULK,)))
    endpoint.receive_data(data[:3])
    assert (endpoint.next_message(), endpoint.bytes_needed, endpoint.buffered) == (None, 5, 3)
    endpoint.receive_data(data[3:8])
    assert (endpoint.next_message(), endpoint.bytes_needed) == (None, 4)
    endpoint.receive_data(data[8:12])
    assert (endpoint.next_message(), endpoint.bytes_needed) == (None, 1)
    waiting = client(CallFunc(1))
    assert waiting.bytes_needed == 12
    waiting.receive_data(packet(Return())[:14])
    assert waiting.bytes_needed == 1
    short = server()
    short.receive_data(struct.pack("<Q", 2))
    assert short.bytes_needed == 2


def test_the_buffer_grows_for_a_burst_and_shrinks_behind_it() -> None:
    endpoint = server()
    first = len(endpoint.get_buffer())
    burst = packet(CallFunc(1, ("x" * 5000,))) * 40
    endpoint.receive_data(burst)
    assert endpoint.buffered == len(burst)
    count = 0
    while endpoint.next_message() is not None:
        endpoint.send(Return())
        count += 1
    assert count == 40
    assert len(endpoint.get_buffer()) == first


def test_a_full_buffer_of_which_half_is_read_is_reused() -> None:
    endpoint = server()
    size = len(endpoint.get_buffer())
    small = packet(CallFunc(1))
    data = small * (size // len(small) + 1)
    endpoint.get_buffer()[:] = data[:size]
    endpoint.received(size)
    for _ in range(100):
        assert endpoint.next_message() == CallFunc(1)
        endpoint.send(Return())
    assert len(endpoint.get_buffer()) == size - endpoint.buffered == 100 * len(small)
    assert len(feed(endpoint, data[size:], 1)) == len(data) // len(small) - 100


def test_the_cost_of_reading_is_linear_in_the_number_of_pieces() -> None:
    """F7: the parser is resumed once per piece; never is what came before read again."""
    message = CallFunc(1, ("name", bytes(1 << 20)))
    data = packet(message)
    endpoint = server()
    steps = 0
    for start in range(0, len(data), 16):
        endpoint.receive_data(data[start : start + 16])
        assert endpoint.buffered <= 64, "nothing piles up to be read again"
        steps += 1
        if (found := endpoint.next_message()) is not None:
            assert found == message
    assert steps == -(-len(data) // 16)
    assert endpoint.state is State.BUSY


# -- replies -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("05000000 00000000", "expected an exception's text, got 0 values"),
        ("05000000 01000000 01000000 0000000000000000", "expected an exception's text, got 1 values"),
        ("05000000 02000000 08000000 0000000000000000 00000000", "expected an exception's text, got 2 values"),
        ("03000000 0100000000000000 00000000", "expected a reply, got code 3"),
        ("07000000", "expected a reply, got code 7 in a packet of 4 bytes"),
        ("04000000", "expected a packed sequence, got the end of the packet"),
        ("04000000 02000000 01000000 0100000000000000 0a000000 0000000000000000", "type index, got 10"),
    ],
)
def test_a_malformed_reply_ends_the_conversation(body: str, words: str) -> None:
    endpoint = client(CallFunc(1))
    with pytest.raises(RemoteProtocolError, match=words):
        feed(endpoint, framed(body), 1)
    assert endpoint.state is State.CLOSED


def test_a_servers_shutdown_is_read() -> None:
    endpoint = client()
    assert feed(endpoint, packet(Shutdown()), 1) == [Shutdown()]
    assert endpoint.state is State.CLOSED


def test_texts_behind_an_exceptions_traceback_are_ignored() -> None:
    text = struct.pack("<iQ", 8, 1) + b"a"
    assert feed(client(CallFunc(1)), framed(struct.pack("<ii", 5, 4) + text * 4), 1000) == [Raised("a", "a", "a")]


def test_whole_plain_results_are_taken_from_the_buffer() -> None:
    client = Endpoint(Role.CLIENT)
    plain, text, other = (b"".join(encode_packet(Return(values))) for values in ((1, 5), (11, "abc"), (12, b"x")))
    client.receive_data(plain + text + other + plain[:20])
    assert client.take_result() == 5
    assert client.take_result() == "abc"
    assert client.take_result() is NOT_PLAIN  # not a plain one
    client.note_sent(CallFunc(1))
    assert client.next_message() == Return((12, b"x"))
    assert client.take_result() is NOT_PLAIN  # not whole
    client.receive_data(plain[20:35])
    assert client.take_result() is NOT_PLAIN  # nor now
    client.receive_data(plain[35:])
    assert client.take_result() == 5
    assert client.take_result() is NOT_PLAIN
    assert client.buffered == 0


def test_what_was_served_the_short_way_is_left_out() -> None:
    server = Endpoint(Role.SERVER)
    first, second = (b"".join(encode_packet(CallFunc(handle))) for handle in (1, 2))
    server.receive_data(first + second)
    server.skip(len(first))
    assert server.next_message() == CallFunc(2)


def test_bulk_left_counts_a_packet_that_is_taken_piece_by_piece() -> None:
    server = Endpoint(Role.SERVER)
    assert server.bulk_left == 0
    data = b"".join(encode_packet(CallFunc(1, (bytes(1 << 18),))))
    server.receive_data(data[:1000])
    assert server.next_message() is None
    assert server.bulk_left == len(data) - 1000
    server.receive_data(data[1000:])
    assert server.next_message() == CallFunc(1, (bytes(1 << 18),))
    assert server.bulk_left == 0


def test_packets_that_wait_are_counted() -> None:
    server = Endpoint(Role.SERVER)
    assert server.waiting == 0
    call = bytes.fromhex("1000000000000000 03000000 2a00000000000000 00000000")
    server.receive_data(call * 3 + call[:10])
    assert server.waiting == 4
    server.next_message()
    assert server.waiting == 3
    piecewise = Endpoint(Role.SERVER)
    piecewise.receive_data(struct.pack("<Qi", 1 << 20, 3) + call)
    piecewise.next_message()  # a large one, read as it comes
    assert piecewise.waiting == 0
