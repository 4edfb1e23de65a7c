"""Bytes recorded from stock TVM's tracker and proxy: ours answers with the same."""

from __future__ import annotations

import socket
import struct
from collections.abc import Iterator
from typing import Any

import pytest
from conftest import eventually
from recorded import Step, load, steps

import rpcnb
from rpcnb.farm.messages import (
    GREETING,
    ask_pending_keys,
    ask_summary,
    encode_frame,
    put_board,
    request_board,
    tell_info,
)
from rpcnb.link.dial import connect_socket
from rpcnb.link.interrupt import Guard
from rpcnb.transport.address import Address
from rpcnb.transport.deadline import Deadline

REFUSED = {
    "tracker_bad_json": "expected JSON",
    "tracker_bad_magic": "magic word",
    "tracker_negative": "frame of 1 to",
    "tracker_oversize": "frame of 1 to",
    "tracker_unknown_code": "known shape",
}


def receive(sock: Any, count: int) -> bytes:
    data = b""
    while len(data) < count:
        more = receive_some(sock, count - len(data))
        assert more, f"the end of the stream after {data!r}"
        data += more
    return data


def receive_some(sock: Any, count: int) -> bytes:
    while True:
        try:
            return bytes(sock.recv(count))
        except BlockingIOError:  # noqa: PERF203  # a WebSocket's header alone
            continue


def ends(sock: Any) -> bool:
    try:
        return receive_some(sock, 1) == b""
    except ConnectionError:
        return True


def dial(port: int) -> socket.socket:
    return socket.create_connection(("127.0.0.1", port), 10)


@pytest.fixture
def tracker() -> Iterator[rpcnb.Tracker]:
    with rpcnb.Tracker(port=0, silent=True) as tracker:
        yield tracker


def play(sock: socket.socket, recorded: list[Step], own: str) -> None:
    """Send the recorded bytes of one side; the tracker's must be the same."""
    for step in recorded:
        if step.sender == own:
            sock.sendall(step.data)
        else:
            assert step.masked(receive(sock, len(step.data))) == step.masked(step.data), step.decoded


def test_every_request_has_the_recorded_reply(tracker: rpcnb.Tracker) -> None:
    with dial(tracker.port) as sock:
        play(sock, steps("tracker_raw"), "client")


def test_a_stock_servers_conversation_is_the_recorded_one(tracker: rpcnb.Tracker) -> None:
    recorded = steps("tracker_server_side")
    with dial(tracker.port) as sock:
        *before, put, reply = recorded
        play(sock, before, "server")
        with dial(tracker.port) as client:  # somebody takes the board, as it was when this was recorded
            client.sendall(GREETING + encode_frame([4, "rasp", "", 1]))
            receive(client, 60)
        play(sock, [put, reply], "server")


def test_a_stock_clients_conversation_is_the_recorded_one(tracker: rpcnb.Tracker) -> None:
    recorded = steps("tracker_client_side")
    board = [step for step in steps("tracker_server_side") if step.sender == "server"]
    with dial(tracker.port) as server, dial(tracker.port) as client:
        server.sendall(b"".join(step.data for step in board[:3]))
        receive(server, 14)
        play(client, recorded, "client")


@pytest.mark.parametrize("name", REFUSED)
def test_what_stock_refuses_is_refused(tracker: rpcnb.Tracker, name: str, caplog: pytest.LogCaptureFixture) -> None:
    with dial(tracker.port) as sock:
        play(sock, steps(name), "client")
        assert ends(sock)
    eventually(lambda: caplog.records, "the line in the log")
    (record,) = caplog.records
    assert REFUSED[name] in record.getMessage()
    caplog.clear()


def test_our_exchanges_are_the_recorded_bytes() -> None:
    def first(flow: Any) -> bytes:
        return encode_frame(next(flow))

    client = [step.data for step in steps("tracker_client_side") if step.sender == "client"]
    assert client == [GREETING, first(request_board("rasp")), first(ask_summary(False))]
    server = [step.data for step in steps("tracker_server_side") if step.sender == "server"]
    assert server[:4] == [
        GREETING,
        first(tell_info({"key": "server:rasp", "addr": [None, 41785]})),
        first(put_board("rasp", 41785, "rasp:0.17204508125240392")),
        first(ask_pending_keys()),
    ]


# -- the proxy -----------------------------------------------------------------------------------------------------


@pytest.fixture
def proxy() -> Iterator[rpcnb.Proxy]:
    with rpcnb.Proxy(port=0, web_port=0, timeout_client=2, silent=True) as proxy:
        yield proxy


def greeting(text: bytes) -> bytes:
    return struct.pack("<ii", 0xFF271, len(text)) + text


def open_side(proxy: rpcnb.Proxy, transport: str) -> Any:
    if transport == "tcp":
        return dial(proxy.port)
    assert proxy.web_port is not None
    with Guard() as guard:
        sock = connect_socket(Address("127.0.0.1", proxy.web_port, "", "ws"), Deadline(10, "connect"), guard)
    sock.setblocking(True)
    return sock


def send_all(sock: Any, data: bytes) -> None:
    while data:
        data = data[sock.send(data) :]


PAIRS = {
    "proxy_tcp_client_side": ("client", "tcp", "tcp"),
    "proxy_tcp_server_side": ("server", "tcp", "tcp"),
    "proxy_ws_server_side": ("server", "ws", "tcp"),
    "proxy_ws_client_side": ("client", "tcp", "ws"),
    "proxy_client_first_client": ("client", "tcp", "tcp"),
    "proxy_client_first_server": ("server", "tcp", "tcp"),
}


@pytest.mark.parametrize("name", PAIRS)
def test_a_joined_pair_sees_the_recorded_bytes(proxy: rpcnb.Proxy, name: str) -> None:
    own, transport, others = PAIRS[name]
    recorded = [step for step in load(name)["steps"] if step["hex"] and "http head" not in step.get("transport", "")]
    ours = b"".join(bytes.fromhex(step["hex"]) for step in recorded if step["from"] == own)
    theirs = b"".join(bytes.fromhex(step["hex"]) for step in recorded if step["from"] == "proxy")
    own_text = ours[8 : 8 + struct.unpack_from("<i", ours, 4)[0]]
    other_text = theirs[8 : 8 + struct.unpack_from("<i", theirs, 4)[0]]
    one, two = open_side(proxy, transport), open_side(proxy, others)
    try:
        send_all(one, greeting(own_text))
        eventually(lambda: proxy.waiting == 1, "the wait of the first")
        send_all(two, greeting(other_text))
        assert receive(one, len(greeting(other_text))) == greeting(other_text)
        assert receive(two, len(greeting(own_text))) == greeting(own_text)
        met = 0
        for step in recorded:
            data = bytes.fromhex(step["hex"])
            met += len(data)
            source, target = (one, two) if step["from"] == own else (two, one)
            if met > len(greeting(own_text)) + len(greeting(other_text)):
                send_all(source, data)
                assert receive(target, len(data)) == data, step["decoded"]
        one.close()
        assert ends(two)
    finally:
        one.close()
        two.close()


@pytest.mark.parametrize("name", ["proxy_duplicate_server", "proxy_unmatched_timeout"])
def test_who_cannot_be_joined_is_told_the_recorded_word(
    proxy: rpcnb.Proxy, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    with dial(proxy.port) as first, dial(proxy.port) as sock:
        if "duplicate" in name:
            first.sendall(greeting(b"server:k2"))
            eventually(lambda: proxy.waiting == 1, "the wait of the first")
        own = load(name)["steps"][0]["from"]
        play(sock, steps(name), own)
        assert ends(sock)
    caplog.clear()
