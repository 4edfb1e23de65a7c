"""Proving a token without sending it: both sides, without sockets."""

from __future__ import annotations

import struct
from collections.abc import Generator
from types import SimpleNamespace
from typing import Any

import pytest

from rpcnb.errors import KeyMismatch, RemoteError
from rpcnb.protocol import flows
from rpcnb.protocol.codes import Code
from rpcnb.protocol.flows import Send, Wait
from rpcnb.protocol.messages import InitServer, Raised, Return, Syscall, encode_packet
from rpcnb.protocol.proof import Challenge, Proof, new_nonce, proof_of_end, proving
from rpcnb.protocol.secret import Secret, hidden

CLIENT, SERVER = "client:k -rpcnb=1.0 -nonce=a", "server:k -rpcnb=1.0,lanes -nonce=b"
PROOF = Proof("token", CLIENT, SERVER)
INIT = b"".join(encode_packet(InitServer(())))
LOOK_UP = b"".join(encode_packet(Syscall(Code.GET_GLOBAL_FUNC, (PROOF.name,))))


def test_both_sides_come_to_the_same_and_nothing_of_it_is_the_token() -> None:
    same = Proof("token", CLIENT, SERVER)
    assert (same.name, same.answer, same.lanes) == (PROOF.name, PROOF.answer, PROOF.lanes)
    assert len({PROOF.name[-64:], PROOF.answer, PROOF.lanes, proof_of_end(PROOF.lanes)}) == 4
    assert "token" not in repr(PROOF)
    assert PROOF.name not in repr(PROOF)


@pytest.mark.parametrize(
    ("secret", "client", "server"),
    [
        ("other", CLIENT, SERVER),
        ("token", CLIENT.replace("client:k", "client:other"), SERVER),
        ("token", CLIENT.replace("=a", "=x"), SERVER),
        ("token", CLIENT, SERVER.replace("=b", "=x")),
        ("token", CLIENT, SERVER.replace(",lanes", "")),
        ("token", CLIENT + SERVER[:1], SERVER[1:]),
        ("token", SERVER, CLIENT),
    ],
)
def test_it_holds_for_one_token_and_one_connection(secret: str, client: str, server: str) -> None:
    other = Proof(secret, client, server)
    assert not {other.name, other.answer, other.lanes} & {PROOF.name, PROOF.answer, PROOF.lanes}


def test_nonces_are_long_and_never_the_same() -> None:
    found = {new_nonce() for _ in range(100)}
    assert len(found) == 100
    assert all(len(one) >= 22 for one in found)


def test_a_secret_does_not_show_itself() -> None:
    secret = Secret("canary")
    assert secret == "canary"
    assert f"{secret}" == "canary"
    assert "canary" not in f"{secret!r} {[secret]!r} {(hidden('canary'),)!r}"
    assert hidden(None) is None


# -- the server's side -----------------------------------------------------------------------------------------------


def test_a_proof_may_stand_before_a_long_init() -> None:
    challenge = Challenge(PROOF)
    assert challenge.receive_data(LOOK_UP[:20]) is None
    assert challenge.receive_data(LOOK_UP[20:] + struct.pack("<Q", 1 << 20)) is True


@pytest.mark.parametrize("cut", [1, 7, 8, 9, len(INIT), len(INIT) + 8, len(INIT) + 20])
def test_a_proof_may_come_in_any_cut(cut: int) -> None:
    challenge = Challenge(PROOF)
    data = INIT + LOOK_UP
    assert challenge.receive_data(data[:cut]) is None
    assert challenge.receive_data(data[cut:] + b"more") is True
    assert challenge.data == data + b"more"


@pytest.mark.parametrize(
    "data",
    [
        INIT + b"".join(encode_packet(Syscall(Code.GET_GLOBAL_FUNC, (PROOF.name[:-1] + "x",)))),
        INIT + b"".join(encode_packet(Syscall(Code.GET_GLOBAL_FUNC, (PROOF.name[:-1],)))),
        INIT + b"".join(encode_packet(Syscall(Code.GET_GLOBAL_FUNC, ("rpc.PopenSession",)))),
        INIT + INIT + LOOK_UP,
        LOOK_UP[:-1] + b"x" + INIT + INIT + INIT + INIT + INIT + INIT,
        struct.pack("<Q", 1 << 17),
        struct.pack("<Q", (1 << 64) - 1),
    ],
    ids=["wrong", "truncated", "another call", "later", "wrong one first", "long", "longest"],
)
def test_anything_else_proves_nothing(data: bytes) -> None:
    assert Challenge(PROOF).receive_data(data) is False


# -- the client's side -----------------------------------------------------------------------------------------------


def drive(flow: Any, replies: list[Any]) -> tuple[list[Any], Any]:
    """Run a flow; returns what it has sent, and its result."""
    sent: list[Any] = []
    owed = iter(replies)
    try:
        step = next(flow)
        while True:
            if isinstance(step, Send):
                sent.append(step.request)
                step = flow.send(SimpleNamespace(number=len(sent)))
                continue
            if not isinstance(step, Wait):
                sent.append(step)
            reply = next(owed)
            step = flow.throw(reply) if isinstance(reply, BaseException) else flow.send(reply)
    except StopIteration as end:
        return sent, end.value


def looks_up(tickets: bool) -> Generator[Any, Any, Any]:
    """A flow that begins with kInitServer, asks for a function, and survives that it is not there."""
    if tickets:
        flows.result_of((yield Wait((yield Send(InitServer(()))))))
    else:
        flows.result_of((yield InitServer(())))
    try:
        return (yield Syscall(Code.GET_GLOBAL_FUNC, ("f",)))
    except LookupError:
        return "none"


@pytest.mark.parametrize("tickets", [True, False])
@pytest.mark.parametrize("last", [Return((5,)), LookupError("f")])
def test_a_flow_goes_on_behind_the_proof(tickets: bool, last: Any) -> None:
    replies = [Return(), Return((PROOF.answer,)), *([Return()] if tickets else []), last]
    sent, result = drive(proving(looks_up(tickets), PROOF, "board"), replies)
    assert result == ("none" if isinstance(last, LookupError) else last)
    assert [type(one).__name__ for one in sent] == ["InitServer", "Syscall", "Syscall"]
    assert sent[1].args == (PROOF.name,)


def test_a_long_init_follows_its_proof() -> None:
    flow = proving(flows.initialize(("c", b"x" * (1 << 17))), PROOF, "board")
    sent, _ = drive(flow, [Return(), Return((PROOF.answer,))])
    assert [type(one).__name__ for one in sent] == ["Syscall", "InitServer"]


def test_a_flow_may_end_with_the_proof() -> None:
    sent, result = drive(proving(flows.initialize(("c", 1)), PROOF, "board"), [Return(), Return((PROOF.answer,))])
    assert result is None
    assert sent[0] == InitServer(("c", 1))


@pytest.mark.parametrize(
    "answer", [Return(("0" * 64,)), Return((5,)), Return(), Return((None,)), Return((PROOF.answer, 1))]
)
def test_a_server_that_does_not_know_the_token_is_left(answer: Return) -> None:
    with pytest.raises(KeyMismatch, match="the server does not know it"):
        drive(proving(flows.initialize(), PROOF, "board"), [Return(), answer])


def test_what_a_server_says_instead_is_raised() -> None:
    with pytest.raises(RemoteError, match="full"):
        drive(proving(flows.initialize(), PROOF, "board"), [Raised("full")])
    with pytest.raises(ConnectionError):
        drive(proving(flows.initialize(), PROOF, "board"), [Return(), ConnectionError()])
