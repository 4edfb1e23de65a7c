"""Replays what stock TVM's peers said to each other: our server and our client say the same bytes.

Where ours says something else on purpose, :data:`DIFFERENT` and :data:`NOT_REPLAYED` say why.
"""

from __future__ import annotations

import re
import struct
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
from recorded import CLIENT, SERVER, Step, data_plane, load, packets, recorded_environment, recorded_registry, steps

from rpcnb.errors import RemoteError, RemoteProtocolError, SessionTimeout
from rpcnb.protocol import flows
from rpcnb.protocol.codes import MAGIC_MISMATCH, Code, Role
from rpcnb.protocol.endpoint import Endpoint, State
from rpcnb.protocol.flows import Flow, Send, SendCalls, Wait
from rpcnb.protocol.handshake import Handshake, KeyText, hello, key_text, refusal
from rpcnb.protocol.messages import (
    CallFunc,
    CopyFromRemote,
    CopyToRemote,
    InitServer,
    Malformed,
    Message,
    PayloadEnd,
    Raised,
    Request,
    Return,
    Shutdown,
    Syscall,
    encode_packet,
)
from rpcnb.protocol.sequence import Buffer
from rpcnb.runtime.completion import Done
from rpcnb.runtime.environment import Environment
from rpcnb.runtime.eventdriven import EventHandler, create_event_driven_server
from rpcnb.runtime.forwarding import ForwardingSession
from rpcnb.values import CPU, DType, Pointer, TensorMeta


def exception(text: str) -> bytes:
    """Return the packet of a kException with ``text``."""
    data = text.encode()
    body = struct.pack("<iiiQ", 5, 1, 8, len(data)) + data
    return struct.pack("<Q", len(body)) + body


@dataclass
class Different:
    """Why ours differs from the recording, and what ours says: exact bytes, or a pattern of an exception's text.

    By ``chance`` it may be the same.
    """

    why: str
    ours: bytes = b""
    text: str = ""
    chance: bool = False


NEED_INIT = (
    "Check failed: (serving_session_ != nullptr) is false: "
    "Need to call InitRemoteSession first before any further actions"
)

# (recording, number of the frame, ends of streams not counted): what our server says there.
DIFFERENT: dict[tuple[str, int], Different] = {
    ("device_attrs", 29): Different(
        "bytes of RAM of the machine, not marked as volatile in the recording; ours may be as large", chance=True
    ),
    ("files", 19): Different(
        "an error's text names the directory and is not stock's failed C++ check",
        text=r"Cannot open .*dat\.bin: no such file in the session's directory",
    ),
    ("files", 21): Different("stock's client has a method for listdir but its server no such function; ours has"),
    ("raw_bad_handle", 7): Different(
        "stock's session process crashes; ours answers", exception("handle 0x1234 was never issued in this session")
    ),
    ("raw_call_before_init", 5): Different("stock's session process dies with a kShutdown", exception(NEED_INIT)),
    ("raw_missing_argument", 7): Different(
        "stock's session process dies", exception("GET_GLOBAL_FUNC expected 1 arguments, got 0")
    ),
    ("raw_unknown_code", 7): Different(
        "stock's session process dies with a kShutdown", exception("expected a request, got code 99")
    ),
    ("raw_unknown_type_index", 7): Different(
        "stock's session process dies with a kShutdown", exception("expected a value's type index, got 13")
    ),
    ("returns_plain", 57): Different(
        "stock cuts a str result at its NUL byte; ours sends it whole, in object form",
        bytes.fromhex(
            "2900000000000000 04000000 02000000 01000000 0b00000000000000 0b000000 41000000 0500000000000000 6162006364"
        ),
    ),
}

# Recordings of which a side cannot be replayed frame by frame, and why.
NOT_REPLAYED: dict[tuple[str, str], str] = {
    (
        SERVER,
        "load_module",
    ): "its upload is recorded only in part (512 of 13264 bytes); native code is refused by default",
    (SERVER, "session_timeout"): "the clock ends it; see test_the_end_of_the_sessions_time_has_stocks_bytes",
    (CLIENT, "load_module"): "two packets are recorded only in part",
    (CLIENT, "session_timeout"): "its last requests are never answered",
    (CLIENT, "raw_bad_magic"): "not a client",
    (CLIENT, "raw_bad_version"): "our flow knows one version; its packets are rewritten below",
    (CLIENT, "connect_mismatch"): "no packets: the server refuses the key",
    (CLIENT, "raw_unknown_code"): "no client of ours can send code 99",
    (CLIENT, "raw_unknown_type_index"): "no client of ours can send type index 13",
    (CLIENT, "raw_missing_argument"): "no client of ours can leave out a syscall's argument",
    (CLIENT, "raw_bad_handle"): "the call is never answered",
    (CLIENT, "raw_call_before_init"): "the call is never answered",
    (CLIENT, "raw_rare_syscalls"): "its last name is in object form (65), ours is a raw string (8), as stock's own",
}


# -- (a) the server ------------------------------------------------------------------------------------------------


class Peer:
    """Our server's side of one connection: handshake, then packets; ``out`` is what it has said."""

    def __init__(self, key: str, environment: Environment) -> None:
        self.out = bytearray()
        self.closed = False
        self._key = key
        self._environment = environment
        self._handshake = Handshake()
        self.handler: EventHandler | None = None

    def feed(self, data: bytes) -> None:
        if self.handler is not None:
            self._handle(data)
            return
        try:
            found = self._handshake.receive_data(data)
        except RemoteProtocolError:
            self.closed = True
            return
        if found is None:
            return
        key = KeyText.parse(str(found))
        if (key.role, key.key) != ("client", self._key):
            self.out += refusal()
            self.closed = True
            return
        self.out += hello(key_text(Role.SERVER, self._key, {}))
        self.handler = create_event_driven_server(
            self._send, "SockServerLoop", str(found), environment=self._environment
        )
        self._handle(self._handshake.rest)

    def _send(self, data: Buffer) -> int:
        self.out += data
        return len(data)

    def _handle(self, data: bytes) -> None:
        assert self.handler is not None
        result = self.handler(data, 3)
        while result == 2:
            result = self.handler(b"", 3)
        self.closed = result == 0

    def close(self) -> None:
        if self.handler is not None:
            self.handler.servant.cancel()

    def take(self, nbytes: int) -> bytes:
        data = bytes(self.out[:nbytes])
        del self.out[:nbytes]
        return data

    def take_packet(self) -> bytes:
        return self.take(8 + int.from_bytes(self.out[:8], "little"))


class InMemory:
    """The connection of a hop: a second server of ours, without a socket."""

    def __init__(self, peer: Peer) -> None:
        self._endpoint = Endpoint(Role.CLIENT)
        self._peer = peer
        peer.feed(hello("client:x1"))
        assert Handshake().receive_data(peer.take(len(peer.out))) == "server:x1"

    def exchange(self, request: Request, done: Done) -> None:
        for buffer in self._endpoint.send(request):
            self._peer.feed(bytes(buffer))
        self._endpoint.receive_data(self._peer.take(len(self._peer.out)))
        done(self._endpoint.next_message())

    def close(self) -> None:
        self._peer.feed(b"".join(self._endpoint.send(Shutdown())))


def hop(host: str, port: int, key: str, logging: bool) -> ForwardingSession:
    assert (host, key, logging) == ("127.0.0.1", "x1", False)
    onward = InMemory(Peer(key, Environment(registry=recorded_registry())))
    done: list[Any] = []

    class Opened:
        cancelled = False

        def __call__(self, result: Any = None) -> None:
            done.append(result)

        def error(self, error: BaseException) -> None:
            raise error

    onward.exchange(InitServer(), Opened())
    assert done == [Return()]
    return ForwardingSession(onward)


def peer_of(name: str) -> Peer:
    said = [step.data for step in steps(name) if step.sender == SERVER]
    key = said[1][4:].decode().removeprefix("server:") if len(said) > 1 else "x1"
    environment = recorded_environment(name)
    environment.constructors["rpc.Connect"] = hop
    return Peer(key, environment)


def check(name: str, number: int, step: Step, got: bytes) -> None:
    """Compare one frame of ours with the recorded one."""
    different = DIFFERENT.get((name, number))
    if different is None:
        assert step.masked(got) == step.masked(step.data), step.decoded
        return
    assert different.chance or got != step.data, "it is as recorded: take it off the list"
    if different.ours:
        assert got == different.ours
    elif different.text:
        assert re.fullmatch(different.text, got[28:].decode())
        assert got == exception(got[28:].decode())
    else:
        assert got[:20] == step.data[:20], "the same kind of reply"


@pytest.mark.parametrize("name", [name for name in data_plane() if (SERVER, name) not in NOT_REPLAYED])
def test_our_server_says_what_stocks_server_said(name: str) -> None:
    peer = peer_of(name)
    ours: dict[bytes, bytes] = {}  # handles: recorded -> of our server
    try:
        for number, step in enumerate(steps(name)):
            if step.sender == CLIENT:
                data = bytearray(step.data)
                for start in step.handles:
                    data[start : start + 8] = ours.get(step.data[start : start + 8], step.data[start : start + 8])
                peer.feed(bytes(data))
                different = DIFFERENT.get((name, number + 1))
                if number + 1 == len(steps(name)) and different is not None:
                    assert peer.take_packet() == different.ours  # stock said nothing more
                continue
            got = peer.take(len(step.data)) if peer.handler is None or number < 4 else peer.take_packet()
            for start in step.handles:
                ours[step.data[start : start + 8]] = got[start : start + 8]
            check(name, number, step, got)
        assert peer.out == b""
        assert peer.closed == (steps(name)[-1].decoded == "kShutdown" and steps(name)[-1].sender == CLIENT) or (
            name in ("connect_mismatch", "raw_bad_magic")
        )
    finally:
        peer.close()


def test_every_difference_names_a_recorded_frame_and_says_why() -> None:
    assert all(different.why for different in DIFFERENT.values())
    assert {name for name, _ in DIFFERENT} <= set(data_plane())
    assert {name for _, name in NOT_REPLAYED} <= set(data_plane())


@pytest.mark.parametrize("size", [1, 7, 64])
@pytest.mark.parametrize("name", ["returns_plain", "copies", "raw_pipeline", "multi_hop_first"])
def test_the_cuts_of_the_stream_do_not_matter(name: str, size: int) -> None:
    whole, cut = peer_of(name), peer_of(name)
    for step in steps(name):
        if step.sender != CLIENT or step.handles:
            continue  # frames without handles, so that both say the same
        whole.feed(step.data)
        for start in range(0, len(step.data), size):
            cut.feed(step.data[start : start + size])
    for peer in (whole, cut):
        peer.close()
    assert len(whole.out) == len(cut.out) > 80


def test_the_end_of_the_sessions_time_has_stocks_bytes() -> None:
    recorded = next(step for step in steps("session_timeout") if "Timeout" in step.decoded)
    text = 'RPCSessionTimeoutError: Your 1.0s session has expired, try to increase the "session_timeout" value.'
    assert b"".join(encode_packet(Raised(text))) == recorded.data
    endpoint = Endpoint(Role.CLIENT)
    endpoint.send(CallFunc(1))
    endpoint.receive_data(recorded.data)
    reply = endpoint.next_message()
    assert isinstance(reply, Raised)
    with pytest.raises(SessionTimeout, match=r"^Your 1.0s session has expired"):
        flows.result_of(reply)


# -- (b) the client ------------------------------------------------------------------------------------------------


class Line:
    """Our client's endpoint at a recorded server; what it sends must be what was recorded."""

    def __init__(self, name: str) -> None:
        self.sent = deque(step.data for step in packets(name, CLIENT) if len(step.data) > 8)
        self.received = deque(step.data for step in packets(name, SERVER))
        self.endpoint = Endpoint(Role.CLIENT)

    def send(self, message: Message) -> None:
        assert b"".join(self.endpoint.send(message)).hex() == self.sent.popleft().hex()

    def reply(self) -> Any:
        self.endpoint.receive_data(self.received.popleft())
        reply = self.endpoint.next_message()
        assert reply is not None
        return reply

    def run(self, flow: Flow[Any]) -> Any:
        """Run one operation; remote errors are its result."""
        outcome: Any = None
        try:
            while True:
                step = flow.send(outcome)
                if isinstance(step, Send):
                    self.send(step.request)
                    outcome = None
                elif isinstance(step, Wait):
                    outcome = self.reply()
                else:
                    assert not isinstance(step, SendCalls)
                    self.send(step)
                    outcome = self.reply()
        except StopIteration as end:
            return end.value
        except RemoteError as error:
            return error

    def peek(self) -> Message:
        """Return what the recorded client sends next."""
        return decode_request(self.sent[0])


def decode_request(data: bytes) -> Message:
    server = Endpoint(Role.SERVER)
    server.receive_data(data)
    message = server.next_message()
    assert message is not None
    if isinstance(message, CopyToRemote):
        into = bytearray(message.nbytes)
        server.receive_payload(memoryview(into))
        assert isinstance(server.next_message(), PayloadEnd)
        message.payload = bytes(into)
    return message


SYSCALL_FLOWS: dict[Code, Callable[..., Flow[Any]]] = {
    Code.GET_GLOBAL_FUNC: flows.get_function,
    Code.FREE_HANDLE: flows.free_handle,
    Code.DEV_SET_DEVICE: flows.set_device,
    Code.DEV_GET_ATTR: flows.get_attribute,
    Code.DEV_ALLOC_DATA: flows.allocate_bytes,
    Code.DEV_ALLOC_DATA_WITH_SCOPE: flows.allocate,
    Code.DEV_FREE_DATA: flows.free_data,
    Code.DEV_STREAM_SYNC: flows.sync_stream,
    Code.DEV_CREATE_STREAM: flows.create_stream,
    Code.DEV_FREE_STREAM: flows.free_stream,
    Code.DEV_SET_STREAM: flows.set_stream,
    Code.DEV_GET_CURRENT_STREAM: flows.current_stream,
    Code.COPY_AMONG_REMOTE: lambda source, destination, stream: flows.copy_among_remote(source, destination),
}


def flow_of(line: Line, message: Message, limit: int) -> Flow[Any]:
    """Return the operation of which ``message`` is the first request."""
    if isinstance(message, InitServer):
        return flows.initialize(message.args)
    if isinstance(message, CallFunc):
        return flows.call_function(message.handle, message.args)
    if isinstance(message, Syscall):
        if message.args == ("tvm.rpc.server.GetCRTMaxPacketSize",):
            return flows.chunk_limit()
        return SYSCALL_FLOWS[message.code](*message.args)
    assert isinstance(message, (CopyToRemote, CopyFromRemote))
    copies = [message]
    for data in list(line.sent)[1:]:
        after = decode_request(data)
        if limit and isinstance(after, type(message)):
            copies.append(after)
            continue
        break
    sync = isinstance(after, Syscall) and after.code is Code.DEV_STREAM_SYNC
    if isinstance(message, CopyToRemote):
        payload = b"".join(bytes(copy.payload) for copy in copies if isinstance(copy, CopyToRemote))
        return flows.copy_to_remote(message.meta, memoryview(payload), limit=limit, sync=sync)
    into = memoryview(bytearray(sum(copy.nbytes for copy in copies)))
    return flows.copy_from_remote(message.meta, into, limit=limit, sync=sync)


@pytest.mark.parametrize("name", [name for name in data_plane() if (CLIENT, name) not in NOT_REPLAYED])
def test_our_clients_flows_say_what_stocks_client_said(name: str) -> None:
    line = Line(name)
    limit = 0
    results = 0
    while line.sent:
        message = line.peek()
        if isinstance(message, Shutdown):
            line.send(message)
            assert line.endpoint.state is State.CLOSED
            continue
        flow = flow_of(line, message, limit)
        result = line.run(flow)
        results += 1
        if name == "copy_chunked" and result == 100:
            limit = result
    assert not line.received
    assert not line.endpoint.owed
    assert results


@pytest.mark.parametrize("name", data_plane())
def test_our_clients_handshake_is_stocks(name: str) -> None:
    own = [step.data for step in steps(name) if step.sender == CLIENT]
    if name == "raw_bad_magic":
        return
    assert hello(own[1][4:].decode()) == own[0] + own[1]
    reader = Handshake()
    found = [reader.receive_data(step.data) for step in steps(name) if step.sender == SERVER][:2]
    if name == "connect_mismatch":
        assert found == [MAGIC_MISMATCH]
    else:
        assert KeyText.parse(str(found[1])).role == "server"


# Packets that we read and would write in another form.
REWRITTEN = {
    ("raw_rare_syscalls", "09000000"): "a name in object form (65); ours is a raw string (8), as a stock client's",
}


def client_packets() -> Iterator[tuple[str, bytes]]:
    for name in data_plane():
        for step in packets(name, CLIENT):
            if len(step.data) > 8:
                yield name, step.data


def test_every_recorded_request_is_written_as_it_was_read() -> None:
    rewritten, malformed = set(), set()
    count = 0
    for name, data in client_packets():
        message = decode_request(data)
        if isinstance(message, Malformed):
            malformed.add(name)
            continue
        count += 1
        if b"".join(encode_packet(message)) != data:
            rewritten.add((name, data[8:12].hex()))
    assert rewritten == set(REWRITTEN)
    assert malformed == {"raw_unknown_code", "raw_unknown_type_index", "raw_missing_argument"}
    assert count > 300


def test_a_view_is_copied_from_where_it_begins() -> None:
    """Stock's client overwrites the view's own byte offset (copy_views, returns_tensor_view); ours adds the chunk's."""
    recorded = next(step.data for step in packets("returns_tensor_view", CLIENT) if step.data[8:12] == b"\x06\0\0\0")
    message = decode_request(recorded)
    assert isinstance(message, CopyFromRemote)
    view = message.meta._replace(byte_offset=8)
    flow = flows.copy_from_remote(view, memoryview(bytearray(8)))
    step = next(flow)
    assert isinstance(step, Send)
    ours = b"".join(encode_packet(step.request))
    assert message.meta.byte_offset == 0
    assert ours == recorded[:-16] + struct.pack("<QQ", 8, 8)


def test_a_constructors_text_is_in_object_form() -> None:
    args = ("rpc.NoSuchConstructor", 1, "a")
    recorded = next(packets("init_unknown_ctor", CLIENT)).data
    assert b"".join(encode_packet(InitServer(args))) == recorded


def test_a_tensor_argument_has_stocks_bytes() -> None:
    recorded = [step.data for step in packets("args_tensor", CLIENT) if step.data[8:12] == b"\x03\0\0\0"][1]
    function, data = struct.unpack_from("<Q", recorded, 12)[0], struct.unpack_from("<Q", recorded, 28)[0]
    meta = TensorMeta(data, CPU, (2,), DType(2, 32), 8)
    assert b"".join(encode_packet(CallFunc(function, (meta,)))) == recorded


# -- (c) the event-driven handler, call by call --------------------------------------------------------------------


def test_the_event_driven_handler_answers_call_by_call_as_stocks() -> None:
    sent: list[bytes] = []
    accepts: int | None = None

    def fsend(data: Buffer) -> int:
        count = len(data) if accepts is None else min(accepts, len(data))
        sent.append(bytes(data[:count]))
        return count

    handler = create_event_driven_server(
        fsend, "server", "%toinit", environment=Environment(registry=recorded_registry())
    )
    calls = load("event_handler")["calls"]
    theirs = bytes.fromhex(calls[5]["sent_hex"][0])[-8:]
    ours = theirs
    stream: list[bytes] = []
    for number, call in enumerate(calls):
        sent.clear()
        accepts = call["fsend_accepts"]
        result = handler(bytes.fromhex(call["in_hex"]).replace(theirs, ours), call["event_flag"])
        if number == 5:
            ours = sent[0][-8:]
        recorded = [bytes.fromhex(chunk) for chunk in call["sent_hex"]]
        assert result == call["result"], call["decoded"]
        assert [len(chunk) for chunk in sent] == [len(chunk) for chunk in recorded], call["decoded"]
        stream += sent
        if call["fsend_accepts"] is None:
            assert [chunk.replace(ours, theirs) for chunk in sent] == recorded, call["decoded"]
    everything = b"".join(bytes.fromhex(chunk) for call in calls for chunk in call["sent_hex"])
    assert b"".join(stream).replace(ours, theirs) == everything
    assert handler.remote_key == "client:x"


def test_a_pointer_result_is_what_it_was() -> None:
    recorded = [step for step in steps("returns_plain") if step.decoded.startswith("kReturn [int 4,")]
    assert len(recorded) == 1
    ours = b"".join(encode_packet(Return((4, Pointer(0x1234)))))
    assert recorded[0].masked(ours) == recorded[0].masked(recorded[0].data)
