"""Proving a token without sending it, to each other.

Both key texts carry a nonce, ``-nonce=``. The client's first request behind kInitServer looks up the global function
``rpcnb.prove.<its proof>``; the answer is the server's proof, a text. Nothing else is served before. (A kInitServer of
more than 64 KiB, with a program, say, stands behind the proof: a stranger's is not kept.) A proof is an HMAC
under a key that is derived from the token and both key texts, so that it holds for one connection, its features and
its match key; the two directions have labels of their own. Further connections of the session prove likewise, with a
key derived from the first one's in the token's place. With TLS the certificate that the server shows is proved too.
Without it a relay that passes everything on learns nothing, but it hears, and may alter, what is said behind the proof.
"""

from __future__ import annotations

import hmac
import secrets
import struct
from functools import partial
from typing import TYPE_CHECKING

from rpcnb.errors import KeyMismatch
from rpcnb.protocol.codes import Code
from rpcnb.protocol.flows import Send, Wait, result_of
from rpcnb.protocol.messages import Syscall, encode_packet

if TYPE_CHECKING:
    from collections.abc import Callable, Generator
    from typing import Any

    from rpcnb.protocol.flows import Flow

__all__ = ["NONCE", "WRONG_TOKEN", "Challenge", "Proof", "new_nonce", "proof_of_end", "proving"]

NONCE = "-nonce"
WRONG_TOKEN = "wrong key or token"  # what a server says behind the handshake, where it cannot refuse there
_PREFIX = "rpcnb.prove."
_LENGTH = struct.Struct("<Q")
_INIT = 1 << 16  # bytes of kInitServer before the proof


def new_nonce() -> str:
    """Return a fresh nonce of 128 bits."""
    return secrets.token_urlsafe(16)


def _mac(key: bytes, label: str, *texts: str) -> bytes:
    parts = [text.encode() for text in (label, *texts)]
    return hmac.digest(key, b"".join(_LENGTH.pack(len(part)) + part for part in parts), "sha256")


def proof_of_end(secret: str) -> str:
    """Return what shows that one may know how a session of this secret has ended."""
    return _mac(secret.encode(), "ended").hex()


class Proof:
    """What both sides of one connection prove.

    Args:
        secret: The token; for a further connection of a session, the first one's ``lanes``.
        client: Key text of the client.
        server: Key text of the server.
        fingerprint: Of the certificate that the server shows; empty without TLS. Who stands between shows another.

    Attributes:
        name: What the client looks up.
        answer: What the server answers.
        lanes: The secret of the session's further connections.
    """

    def __init__(self, secret: str, client: str, server: str, fingerprint: str = "") -> None:
        key = _mac(secret.encode(), "rpcnb 1 connection", client, server, fingerprint)
        self.name = _PREFIX + _mac(key, "client").hex()
        self.answer = _mac(key, "server").hex()
        self.lanes = _mac(key, "lanes").hex()

    def __repr__(self) -> str:
        return "Proof()"


class Challenge:
    """A server's side of a proof: waits for it, and keeps what comes before and behind it.

    Args:
        proof: What the client must prove.

    Attributes:
        data: All that has come.
    """

    def __init__(self, proof: Proof) -> None:
        self.proof = proof
        self.data = bytearray()
        self._expected = b"".join(encode_packet(Syscall(Code.GET_GLOBAL_FUNC, (proof.name,))))

    def receive_data(self, data: bytes) -> bool | None:
        """Take the next bytes; returns whether they prove it, None for more."""
        self.data += data
        if len(self.data) < _LENGTH.size:
            return None
        (nbytes,) = _LENGTH.unpack_from(self.data)
        if nbytes > _INIT:
            return False
        begin = _LENGTH.size + nbytes
        if begin == len(self._expected) <= len(self.data) and hmac.compare_digest(
            bytes(self.data[:begin]), self._expected
        ):
            return True
        given = bytes(self.data[begin : begin + len(self._expected)])
        if len(given) < len(self._expected):
            return None if self._expected[: _LENGTH.size].startswith(given[: _LENGTH.size]) else False
        return hmac.compare_digest(given, self._expected)


def proving(flow: Flow[Any], proof: Proof, address: str) -> Flow[Any]:
    """Run a flow that begins with kInitServer, and prove right behind that.

    Raises:
        KeyMismatch: The server does not know the token, or does not take ours.
    """
    step: Any = next(flow)
    init = step.request if isinstance(step, Send) else step
    look_up = Syscall(Code.GET_GLOBAL_FUNC, (proof.name,))
    if sum(map(len, encode_packet(init))) <= _INIT:
        opened = yield Send(init)
        asked = yield Send(look_up)
    else:
        asked = yield Send(look_up)
        opened = yield Send(init)
    try:
        reply = yield Wait(opened)
        result_of(reply)
        values = result_of((yield Wait(asked)))
        if len(values) != 1 or not hmac.compare_digest(str(values[0]).encode(), proof.answer.encode()):
            raise KeyMismatch(address, "init", "wrong token: the server does not know it; it may be somebody else's")
    except BaseException:
        flow.close()
        raise
    return (yield from _rest(flow, opened if isinstance(step, Send) else reply))


def _rest(flow: Flow[Any], value: Any) -> Generator[Any, Any, Any]:
    """Go on with a flow whose step has been done."""
    advance: Callable[[], Any] = partial(flow.send, value)
    while True:
        try:
            step = advance()
        except StopIteration as end:
            return end.value
        try:
            advance = partial(flow.send, (yield step))
        except BaseException as error:
            advance = partial(flow.throw, error)
