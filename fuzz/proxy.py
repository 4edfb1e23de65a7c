"""Handshakes and the pairing of a proxy, with four peers; the first byte says whether a tracker hands servers out.

The rest is segments: the lowest two bits of the first byte name the peer, the next two say what happens (bytes arrive;
the peer leaves; a match key is issued; the bytes stand behind a magic word and a length that fit).
"""

from __future__ import annotations

from fuzz.promises import PromiseBroken, bounded, segments
from rpcnb.errors import RemoteProtocolError
from rpcnb.farm.pairing import DUPLICATE, MISMATCH, WAITS, Pairing
from rpcnb.protocol.codes import MAGIC
from rpcnb.protocol.handshake import Handshake, KeyText, describe_strangers

__all__ = ["one_input"]

_PEERS = 4
_WORD = MAGIC.to_bytes(4, "little")


class _Peer:
    def __init__(self) -> None:
        self.handshake = Handshake()
        self.text = ""


class _Proxy:
    def __init__(self, tracked: bool) -> None:
        self.tracked = tracked
        self.pairing: Pairing[_Peer] = Pairing(tracked)
        self.peers = [_Peer() for _ in range(_PEERS)]
        self.issued: dict[str, str] = {}

    def feed(self, number: int, data: bytes) -> None:
        """Do as the proxy's connection does; an error ends the peer, and another comes in its place."""
        peer = self.peers[number]
        try:
            found = peer.handshake.receive_data(data)
            if found is None:
                return
            if not isinstance(found, str) or peer.handshake.rest:
                raise RemoteProtocolError("expected nothing behind the key before a peer is found")
            peer.text = found
            other = self.pairing.arrive(peer, found)
        except RemoteProtocolError:
            self.leave(number)
            return
        if isinstance(other, _Peer):
            self._check_pair(peer, other)
        elif other not in (WAITS, DUPLICATE, MISMATCH):
            raise PromiseBroken(f"expected a peer or a word, got {other!r}")
        if other != WAITS:
            self.leave(number)

    def leave(self, number: int) -> None:
        """End a connection."""
        self.pairing.leave(self.peers[number])
        self.peers[number] = _Peer()

    def _check_pair(self, peer: _Peer, other: _Peer) -> None:
        mine, theirs = KeyText.parse(peer.text), KeyText.parse(other.text)
        if {mine.role, theirs.role} != {"client", "server"}:
            raise PromiseBroken(f"expected a client and a server, got {peer.text!r} and {other.text!r}")
        if (self.issued.get(mine.key) if self.tracked else mine.key) != theirs.key:
            raise PromiseBroken(f"expected peers of one key, got {peer.text!r} and {other.text!r}")
        self.pairing.leave(other)
        self.peers[self.peers.index(other)] = _Peer()

    def issue(self, number: int) -> None:
        """Hand out a match key; the peer of this number presents it, or it is withdrawn."""
        found = self.pairing.issue()
        if found is not None:
            key, match_key = found
            self.issued[match_key] = key
            if self.peers[number].text:
                self.pairing.withdraw(match_key)
            else:
                text = f"client:{match_key}".encode()
                self.feed(number, _WORD + len(text).to_bytes(4, "little") + text)


def one_input(data: bytes) -> None:
    """Let four peers come and go."""
    with bounded(len(data)):
        describe_strangers(data[:4])
        proxy = _Proxy(bool(data[:1] and data[0] & 1))
        for head, content in segments(data[1:]):
            number, act = head & 3, head >> 2 & 3
            if act == 1:
                proxy.leave(number)
            elif act == 2:
                proxy.issue(number)
            elif act == 3:
                proxy.feed(number, _WORD + len(content).to_bytes(4, "little") + content)
            else:
                proxy.feed(number, content)
            if len(proxy.pairing) > _PEERS:
                raise PromiseBroken(f"expected at most {_PEERS} peers that wait, got {len(proxy.pairing)}")
        for number in range(_PEERS):
            proxy.leave(number)
        if len(proxy.pairing):
            raise PromiseBroken("expected nobody to wait once all have left")
