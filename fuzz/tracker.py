"""A tracker with four peers, and a client that believes none of its answers.

The input is segments: the lowest two bits of the first byte name the peer, the next three say what happens (bytes
arrive; the peer leaves; time passes; the bytes are an answer to a client).
"""

from __future__ import annotations

import json
from typing import Any

from fuzz.promises import PromiseBroken, bounded, segments
from rpcnb.errors import RemoteProtocolError
from rpcnb.farm.messages import (
    GREETING,
    NOTHING,
    Flow,
    Frames,
    ask_pending_keys,
    ask_summary,
    encode_frame,
    parse_request,
    put_board,
    request_board,
    tell_info,
)
from rpcnb.farm.tracking import Tracking

__all__ = ["one_input"]

_PEERS = 4


class _Peer:
    """A connection: what it sent, and what it was sent."""

    def __init__(self, number: int) -> None:
        self.host = f"10.0.0.{number}"
        self.frames = Frames()
        self.arrived = False
        self.gone = False

    def send(self, value: Any) -> None:
        """Take an answer; it must be one that can be sent."""
        self.send_frame(encode_frame(value))

    def send_frame(self, data: bytes) -> None:
        """Take an answer that has been encoded."""
        if self.gone:
            raise PromiseBroken(f"expected nothing for a peer that has left, got {data!r}")


class _Tracker:
    def __init__(self) -> None:
        self.now = 0.0
        self.tracking = Tracking(lambda: self.now)
        self.peers = [_Peer(number) for number in range(_PEERS)]

    def feed(self, number: int, data: bytes) -> None:
        """Do as the tracker's connection does; an error ends the peer, and another comes in its place."""
        peer = self.peers[number]
        try:
            peer.frames.receive_data(data)
            if peer.frames.greeted and not peer.arrived:
                peer.arrived = True
                self.tracking.arrive(peer)
            while (value := peer.frames.next_value()) is not NOTHING:
                self.tracking.handle(peer, parse_request(value))
        except RemoteProtocolError:
            self.leave(number)

    def leave(self, number: int) -> None:
        """End a connection."""
        self.tracking.leave(self.peers[number])
        self.peers[number].gone = True
        self.peers[number] = _Peer(number)

    def check(self) -> None:
        """Look at what must always be so."""
        summary = self.tracking.summary(boards=True)
        for key, queue in summary["queue_info"].items():
            if queue["free"] and queue["pending"]:
                raise PromiseBroken(f"boards {key!r} are free while somebody waits: {queue}")
        json.dumps(summary)


def one_input(data: bytes) -> None:
    """Let four peers talk to a tracker; and a client read what it is answered."""
    with bounded(len(data)):
        tracker = _Tracker()
        for head, content in segments(data):
            number, act = head & 3, head >> 2 & 7
            if act == 1:
                tracker.leave(number)
            elif act == 2:
                tracker.now += len(content)
                tracker.tracking.sweep()
            elif act == 3:
                _answer(content)
            else:
                tracker.feed(number, content)
        tracker.check()
        for number in range(_PEERS):
            tracker.leave(number)
        if tracker.tracking.summary(boards=True)["boards"]:
            raise PromiseBroken("expected nothing of peers that have left")


def _answer(data: bytes) -> None:
    """Give every question these answers."""
    flows: list[Flow] = [
        ask_summary(),
        request_board("k", told=lambda *_: None),
        tell_info({}),
        put_board("k", 1, "k:1"),
        ask_pending_keys(),
    ]
    for flow in flows:
        frames = Frames()
        try:
            frames.receive_data(GREETING + data)
            next(flow)
            while (value := frames.next_value()) is not NOTHING:
                flow.send(value)
        except (RemoteProtocolError, StopIteration):
            pass
