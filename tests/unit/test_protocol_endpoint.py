"""What may be said when: the table, what is owed, refused sends, the end of the stream."""

from __future__ import annotations

import struct

import pytest

from rpcnb.errors import ArgumentError, LocalProtocolError, RemoteProtocolError, RpcError
from rpcnb.protocol.codes import Code, Role
from rpcnb.protocol.endpoint import TRANSITIONS, Endpoint, Kind, State
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
from rpcnb.values import CPU, DType, TensorMeta

META = TensorMeta(7, CPU, (4,), DType(0, 8))
CALL = bytes.fromhex("1000000000000000  03000000  2a00000000000000  00000000")
REQUESTS: list[Message] = [
    InitServer(),
    CallFunc(1),
    Syscall(Code.GET_GLOBAL_FUNC, ("f",)),
    CopyFromRemote(META, 4),
    CopyToRemote(META, 4, b"abcd"),
]
REPLIES: list[Message] = [Return(), Raised("boom"), CopyAck(b"abcd")]


def packet(message: Message) -> bytes:
    return b"".join(encode_packet(message))


def client(*requests: Message) -> Endpoint:
    endpoint = Endpoint(Role.CLIENT)
    for request in requests:
        endpoint.send(request)
    return endpoint


def receive(endpoint: Endpoint, *messages: Message) -> Message | None:
    endpoint.receive_data(b"".join(packet(message) for message in messages))
    return endpoint.next_message()


@pytest.mark.parametrize("cut", [1, 7, 8, 12, len(CALL)])
def test_call_without_arguments_is_parsed_at_any_cut(cut: int) -> None:
    server = Endpoint(Role.SERVER)
    for start in range(0, len(CALL), cut):
        server.receive_data(CALL[start : start + cut])
    assert server.next_message() == CallFunc(handle=42, args=())
    assert server.state is State.BUSY


@pytest.mark.parametrize("state", list(State))
def test_the_table_leads_every_step_to_its_state(state: State) -> None:
    steps = TRANSITIONS[state]
    if state is State.CLOSED:
        assert steps == {}
        return
    assert steps[Role.CLIENT, Kind.REQUEST] is State.BUSY
    assert steps[Role.SERVER, Kind.REPLY] is State.IDLE
    assert steps[Role.CLIENT, Kind.SHUTDOWN] is steps[Role.SERVER, Kind.SHUTDOWN] is State.CLOSED
    assert (Role.SERVER, Kind.REQUEST) not in steps
    assert (Role.CLIENT, Kind.REPLY) not in steps


@pytest.mark.parametrize("request_", REQUESTS, ids=str)
def test_a_client_sends_requests_and_they_are_owed_replies(request_: Message) -> None:
    endpoint = Endpoint(Role.CLIENT)
    assert b"".join(endpoint.send(request_)) == packet(request_)
    assert endpoint.state is State.BUSY
    assert list(endpoint.owed) == [request_]


@pytest.mark.parametrize("reply", REPLIES, ids=str)
def test_a_server_answers_and_is_idle(reply: Message) -> None:
    endpoint = Endpoint(Role.SERVER)
    receive(endpoint, CopyFromRemote(META, 4))
    assert b"".join(endpoint.send(reply)) == packet(reply)
    assert endpoint.state is State.IDLE
    assert not endpoint.owed


def test_a_server_may_announce_the_end_of_the_sessions_time_unasked() -> None:
    server, endpoint = Endpoint(Role.SERVER), Endpoint(Role.CLIENT)
    endpoint.receive_data(b"".join(server.send(Raised("RPCSessionTimeoutError: over"))))
    assert endpoint.next_message() == Raised("RPCSessionTimeoutError: over")
    assert server.state is endpoint.state is State.IDLE


@pytest.mark.parametrize(
    ("role", "message", "words"),
    [
        (Role.CLIENT, Return(), "we cannot send a reply while the conversation is idle"),
        (Role.SERVER, CallFunc(1), "we cannot send a request while the conversation is idle"),
    ],
)
def test_a_message_of_the_other_side_is_refused_and_nothing_changes(role: Role, message: Message, words: str) -> None:
    endpoint = Endpoint(role)
    with pytest.raises(LocalProtocolError, match=words):
        endpoint.send(message)
    assert endpoint.state is State.IDLE
    assert not endpoint.owed


@pytest.mark.parametrize("message", [*REQUESTS, Shutdown()], ids=str)
def test_nothing_is_sent_after_a_shutdown(message: Message) -> None:
    endpoint = client()
    endpoint.send(Shutdown())
    with pytest.raises(LocalProtocolError, match="while the conversation is closed"):
        endpoint.send(message)
    assert endpoint.state is State.CLOSED
    assert not endpoint.owed


def test_a_value_that_cannot_travel_changes_nothing() -> None:
    endpoint = client(CallFunc(1))
    with pytest.raises(ArgumentError):
        endpoint.send(CallFunc(2, ([],)))  # type: ignore[arg-type]  # on purpose
    assert list(endpoint.owed) == [CallFunc(1)]
    assert endpoint.state is State.BUSY
    server = Endpoint(Role.SERVER)
    receive(server, CallFunc(1))
    with pytest.raises(ArgumentError):
        server.send(Return((1 << 64,)))
    assert server.state is State.BUSY
    assert b"".join(server.send(Return())) == packet(Return())


def test_a_server_hands_out_one_request_at_a_time_in_order() -> None:
    server = Endpoint(Role.SERVER)
    assert receive(server, CallFunc(1), CallFunc(2), Shutdown()) == CallFunc(1)
    assert server.next_message() is None
    server.send(Return())
    assert server.next_message() == CallFunc(2)
    assert server.next_message() is None
    server.send(Raised("boom"))
    assert server.next_message() == Shutdown()
    assert server.state is State.CLOSED
    assert server.next_message() is None


def test_what_follows_a_shutdown_is_ignored() -> None:
    server = Endpoint(Role.SERVER)
    assert receive(server, Shutdown(), CallFunc(1)) == Shutdown()
    assert server.next_message() is None
    assert server.buffered == 0


def test_a_malformed_request_is_answered_like_any_other() -> None:
    server = Endpoint(Role.SERVER)
    server.receive_data(struct.pack("<Qi", 4, 99) + CALL)
    found = server.next_message()
    assert isinstance(found, Malformed)
    assert str(found.error) == "expected a request, got code 99"
    assert server.state is State.BUSY
    server.send(Raised(str(found.error)))
    assert server.next_message() == CallFunc(42)


def test_a_copys_header_and_end_are_one_request() -> None:
    server = Endpoint(Role.SERVER)
    assert receive(server, CopyToRemote(META, 4, b"abcd"), CallFunc(1)) == CopyToRemote(META, 4)
    assert server.state is State.BUSY
    into = bytearray(4)
    server.receive_payload(memoryview(into))
    assert server.next_message() == PayloadEnd()
    assert into == b"abcd"
    assert server.next_message() is None
    server.send(Return())
    assert server.next_message() == CallFunc(1)


def test_replies_belong_to_requests_in_order() -> None:
    endpoint = client(CallFunc(1), CallFunc(2), CopyFromRemote(META, 4))
    assert receive(endpoint, Return((1, 5)), Raised("boom"), CopyAck(b"abcd")) == Return((1, 5))
    assert next(iter(endpoint.owed)) == CallFunc(2)
    assert endpoint.state.value == "busy"
    assert endpoint.next_message() == Raised("boom")
    assert endpoint.next_message() == CopyAck()
    assert endpoint.state is State.IDLE
    assert endpoint.next_message() is None


def test_replies_that_come_after_our_shutdown_do_not_reopen_the_conversation() -> None:
    endpoint = client(CallFunc(1))
    endpoint.send(Shutdown())
    assert receive(endpoint, Return()) == Return()
    assert endpoint.state is State.CLOSED


@pytest.mark.parametrize(
    ("requests", "reply", "words"),
    [
        ([], Return(), "expected nothing while no request is on the way, got Return"),
        ([CopyFromRemote(META, 4)], Return(), "expected the reply to CopyFromRemote, got Return"),
        ([Syscall(Code.FREE_HANDLE, (None,))], CopyAck(b""), "expected a reply with no bytes of data, got 0"),
        ([CallFunc(1)], CallFunc(1), "expected a reply, got expected a reply, got code 3"),
    ],
)
def test_an_illegal_reply_closes_and_is_told_ever_after(requests: list[Message], reply: Message, words: str) -> None:
    endpoint = client(*requests)
    with pytest.raises(RemoteProtocolError, match=words) as first:
        receive(endpoint, reply)
    assert endpoint.state is State.CLOSED
    endpoint.receive_data(packet(Return()))
    with pytest.raises(RpcError) as second:
        endpoint.next_message()
    assert (type(second.value), str(second.value)) == (type(first.value), str(first.value))
    assert second.value is not first.value  # or the frames of every raise would gather on it
    with pytest.raises(LocalProtocolError, match="while the conversation is closed"):
        endpoint.send(CallFunc(1))


def test_a_servers_lost_framing_is_told_ever_after() -> None:
    server = Endpoint(Role.SERVER)
    server.receive_data(b"\xff" * 20)
    errors = []
    for _ in range(2):
        with pytest.raises(RemoteProtocolError, match="got a length of 18446744073709551615 bytes") as caught:
            server.next_message()
        errors.append(caught.value)
    assert str(errors[0]) == str(errors[1])
    assert errors[0] is not errors[1]
    assert server.state is State.CLOSED


def test_a_reply_to_another_kind_of_request_is_named() -> None:
    endpoint = client(Syscall(Code.DEV_GET_ATTR, (CPU, 1)), CopyFromRemote(META, 4))
    assert receive(endpoint, Return(), Return()) == Return()
    with pytest.raises(RemoteProtocolError, match="expected the reply to CopyFromRemote, got Return"):
        endpoint.next_message()


def test_an_exception_may_answer_a_copy() -> None:
    assert receive(client(CopyFromRemote(META, 4)), Raised("boom")) == Raised("boom")


@pytest.mark.parametrize("cut", range(1, len(CALL)))
def test_an_end_inside_a_packet_is_an_error(cut: int) -> None:
    server = Endpoint(Role.SERVER)
    server.receive_data(CALL[:cut])
    assert server.next_message() is None
    server.receive_eof()
    with pytest.raises(RemoteProtocolError, match="the peer's stream ended inside a packet"):
        server.next_message()
    assert server.state is State.CLOSED
    with pytest.raises(RemoteProtocolError, match="the peer's stream ended inside a packet"):
        server.next_message()


def test_an_end_between_packets_is_none() -> None:
    for endpoint in (Endpoint(Role.SERVER), client(), client(CallFunc(1))):
        endpoint.receive_eof()
        assert endpoint.next_message() is None


def test_an_end_behind_whole_requests_lets_them_be_answered() -> None:
    server = Endpoint(Role.SERVER)
    assert receive(server, CallFunc(1), CallFunc(2)) == CallFunc(1)
    server.receive_eof()
    assert server.next_message() is None
    server.send(Return())
    assert server.next_message() == CallFunc(2)
    server.send(Return())
    assert server.next_message() is None
    assert server.state is State.IDLE


def test_an_end_after_a_shutdown_is_none() -> None:
    endpoint = client()
    assert receive(endpoint, Shutdown()) == Shutdown()
    endpoint.receive_data(b"\0")
    endpoint.receive_eof()
    assert endpoint.next_message() is None


@pytest.mark.parametrize("cut", [61, 8 + 4 + 32])
def test_an_end_inside_a_copys_data_or_header_is_an_error(cut: int) -> None:
    server = Endpoint(Role.SERVER)
    server.receive_data(packet(CopyToRemote(META, 4, b"abcd"))[:cut])
    if server.next_message() is not None:
        server.receive_payload(None)
    server.receive_eof()
    with pytest.raises(RemoteProtocolError, match="ended inside a packet"):
        server.next_message()
