"""Trackers, and servers and clients that use them, over real sockets."""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from conftest import eventually

import rpcnb
from rpcnb.farm import registration
from rpcnb.farm import tracker as tracker_module
from rpcnb.farm.messages import GREETING, encode_frame
from rpcnb.jupyter import bridge
from rpcnb.runtime.registry import Registry
from rpcnb.transport.address import Address


@pytest.fixture
def tracker() -> Iterator[rpcnb.Tracker]:
    with rpcnb.Tracker(port=0, silent=True) as tracker:
        yield tracker


@pytest.fixture
def board(registry: Registry, serve: Callable[..., Any], tracker: rpcnb.Tracker) -> Iterator[Callable[..., Any]]:
    """Start servers that are in the tracker's list; they end before it."""
    registry.register("add", lambda a, b: a + b)
    registry.register("later", _later)
    servers = []

    def start(**options: Any) -> Any:
        server = serve(**{"key": "rpi", "tracker_addr": tracker.address_pair, **options})
        servers.append(server)
        eventually(lambda: server.registered, "the registration")
        return server

    yield start
    for server in servers:
        server.close()


async def _later(value: Any) -> Any:
    await asyncio.sleep(0.05)
    return value


def queue(tracker: rpcnb.Tracker, key: str = "rpi") -> tuple[int, int]:
    found = tracker.tracking.summary()["queue_info"].get(key, {"free": 0, "pending": 0})
    return found["free"], found["pending"]


class Raw:
    """A connection to a tracker that says what it likes."""

    def __init__(self, tracker: rpcnb.Tracker, data: bytes = b"") -> None:
        self.sock = socket.create_connection(tracker.address_pair, 10)
        self.sock.sendall(data)

    def ask(self, value: Any) -> None:
        self.sock.sendall(encode_frame(value))

    def reads(self, count: int) -> bytes:
        data = b""
        while len(data) < count:
            more = self.sock.recv(count - len(data))
            if not more:
                break
            data += more
        return data

    def __enter__(self) -> Raw:
        return self

    def __exit__(self, *_: object) -> None:
        self.sock.close()


def ask_for_ever(peer: Raw) -> None:
    while True:
        peer.ask([6])


async def until_queue(tracker: rpcnb.Tracker, expected: tuple[int, int]) -> None:
    await asyncio.get_running_loop().run_in_executor(
        None, lambda: eventually(lambda: queue(tracker) == expected, f"the queue {expected}")
    )


# -- the tracker ---------------------------------------------------------------------------------------------------


def test_the_magic_word_may_come_in_pieces_or_with_the_first_request(tracker: rpcnb.Tracker) -> None:
    whole = GREETING + encode_frame([1])
    answer = GREETING + encode_frame(0)
    with Raw(tracker, whole) as peer:
        assert peer.reads(len(answer)) == answer
    with Raw(tracker) as peer:
        for letter in whole:
            peer.sock.sendall(bytes([letter]))
        assert peer.reads(len(answer)) == answer


# What boards of TVM say, and what they wait for: C++ writes its port as text in its information, Java with blanks.
EXCHANGES = {
    "c++": [
        ('[5, {"key": "server:rpi", "addr": [null, "9090"]}]', "0"),
        ('[3, "rpi", [9090, "rpi:0.25"], null]', "0"),
        ("[7]", '["rpi:0.25"]'),
        ('[3, "rpi", [9090, "rpi:0.5"], null]', "0"),
        ("[7]", '["rpi:0.25", "rpi:0.5"]'),
    ],
    "c++ with an address of its own": [
        ('[5, {"key": "server:rpi", "addr": ["127.0.0.1", "9090"]}]', "0"),
        ('[3, "rpi", [9090, "rpi:0.25"], "127.0.0.1"]', "0"),
    ],
    "java": [
        ('[5, {"key" : "server:rpi", "addr": [null, "9090"]}]', "0"),
        ('[3, "rpi", [9090, "rpi:0.25"], "127.0.0.1"]', "0"),
        ("[7]", '["rpi:0.25"]'),
    ],
    "python": [
        ('[5, {"key": "server:rpi", "addr": [null, 9090]}]', "0"),
        ('[3, "rpi", [9090, "rpi:0.25"], null]', "0"),
        ("[1]", "0"),
    ],
}


@pytest.mark.parametrize("name", EXCHANGES)
def test_boards_of_every_language_are_handed_out(tracker: rpcnb.Tracker, name: str) -> None:
    with Raw(tracker, GREETING) as board, Raw(tracker, GREETING) as client:
        assert board.reads(4) == client.reads(4) == GREETING
        for said, answer in EXCHANGES[name]:
            board.sock.sendall(struct.pack("<i", len(said)) + said.encode())
            assert board.reads(4 + len(answer)) == struct.pack("<i", len(answer)) + answer.encode()
        client.ask([4, "rpi", "", 1])
        answer = '[0, ["127.0.0.1", 9090, "rpi:0.25"]]'
        assert client.reads(4 + len(answer))[4:] == answer.encode()
        servers = tracker.tracking.summary()["server_info"]
        assert servers == [{"key": "server:rpi", "addr": ["127.0.0.1", 9090]}]


BAD = {
    "zero": struct.pack("<i", 0),
    "negative": struct.pack("<i", -1),
    "too large": struct.pack("<i", (1 << 20) + 1),
    "largest": struct.pack("<i", 2**31 - 1),
    "no json": struct.pack("<i", 3) + b"{[}",
    "deep": struct.pack("<i", 10_000) + b"[" * 10_000,
    "wrong types": encode_frame([3, "rpi", "port"]),
    "unknown code": encode_frame([99]),
    "not a list": encode_frame({"code": 1}),
}


@pytest.mark.parametrize("name", BAD)
def test_t2_a_bad_peer_loses_its_own_connection_alone(
    tracker: rpcnb.Tracker, board: Callable[..., Any], name: str, caplog: pytest.LogCaptureFixture
) -> None:
    board()
    with Raw(tracker, GREETING + BAD[name]) as peer:
        assert peer.reads(100) == GREETING
    eventually(lambda: caplog.records, "the line in the log")
    (record,) = caplog.records
    assert "expected" in record.getMessage()
    caplog.clear()
    with rpcnb.connect(f"tracker://{tracker.address}/rpi") as session:
        assert session.call("add", 1, 2) == 3


def raw_frame(text: bytes) -> bytes:
    return struct.pack("<i", len(text)) + text


SAID = {
    "sessions: 5": encode_frame([5, {"key": "server:a", "addr": ["h", 1], "rpcnb": {"sessions": 5}}]),
    "a number that is none": raw_frame(b'[5, {"key": "server:a", "addr": ["h", 1], "x": 1e999}]'),
    "half a letter": raw_frame(b'[5, {"key": "server:a", "addr": ["h", 1], "rpcnb": {"instance": "\\ud800"}}]'),
    "deep": raw_frame(b'[5, {"key": "server:a", "addr": ["h", 1], "x": ' + b"[" * 900 + b"]" * 900 + b"}]"),
    "escape codes": encode_frame([5, {"key": "server:\x1b]0;owned\x07\x1b[2J", "addr": ["h", 1]}]),
    "a holder's name": encode_frame([4, "x", "\x1b[2J", 1]) + encode_frame([3, "x", [1, "x:1"], None]),
    "300 long keys": b"".join(encode_frame([3, f"{n}" + "k" * 4000, [1, f"{n}:m"], None]) for n in range(300)),
}


@pytest.mark.parametrize("name", SAID)
def test_what_a_stranger_says_hides_no_board(
    tracker: rpcnb.Tracker, board: Callable[..., Any], name: str, caplog: pytest.LogCaptureFixture
) -> None:
    board()
    with Raw(tracker, GREETING + SAID[name] + encode_frame([1])) as peer:
        peer.reads(4 + 5 * (301 if name == "300 long keys" else 2))
        text = rpcnb.connect_tracker(tracker.address).text_summary()
        json.dumps(bridge._devices_of(Address(*tracker.address_pair)), ensure_ascii=False).encode()
        assert "\x1b" not in text
        assert " rpi " in text
        with rpcnb.connect(f"tracker://{tracker.address}/rpi") as session:
            assert session.call("add", 1, 2) == 3
    caplog.clear()


def test_a_key_with_letters_that_the_terminal_lacks_hides_no_board(tracker: rpcnb.Tracker) -> None:
    with Raw(tracker, GREETING + encode_frame([5, {"key": "server:\u00e4\u4e2d", "addr": ["h", 1]}])) as peer:
        peer.reads(9)
        command = [sys.executable, "-m", "rpcnb", "devices", tracker.address]
        environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=30, check=True)
    assert "\\xe4\\u4e2d" in done.stdout


def test_a_server_with_very_many_sessions_stays_in_the_list(tracker: rpcnb.Tracker, board: Callable[..., Any]) -> None:
    server = board(max_sessions=2000)
    eventually(lambda: queue(tracker)[0] == 1000, "as many offers as a tracker takes")
    for number in range(1000):
        server._registration.opened(f"rpi:{number}", f"203.0.113.77:{number}", 60.0)
    eventually(
        lambda: len(tracker.tracking.summary()["server_info"][0]["rpcnb"]["sessions"]) == 64, "the sessions it tells of"
    )
    assert server.registered


@pytest.mark.parametrize("awaited", [False, True])
def test_a_board_whose_address_is_none_is_not_the_last_word(serve: Callable[..., Any], awaited: bool) -> None:
    server = serve(key="rpi")
    boards = [["\x1b[2J", 1, "rpi"], ["127.0.0.1", server.port, "two words"], ["127.0.0.1", server.port, "rpi"]]
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def hand_out() -> None:
            """Be a stock tracker that passes on whatever boards have said."""
            for one in boards:
                with listener.accept()[0] as sock:
                    sock.recv(4, socket.MSG_WAITALL)
                    sock.sendall(GREETING)
                    sock.recv(4096)
                    sock.sendall(encode_frame([0, one]))
                    sock.recv(1)

        thread = threading.Thread(target=hand_out)
        thread.start()
        url = f"tracker://127.0.0.1:{listener.getsockname()[1]}/rpi"

        async def story() -> Any:
            async with await rpcnb.connect_async(url) as session:
                return await session.call("rpc.test.addone", 1)

        if awaited:
            assert asyncio.run(story()) == 2
        else:
            with rpcnb.connect(url) as session:
                assert session.call("rpc.test.addone", 1) == 2
        thread.join()


def test_what_is_asked_costs_by_its_bytes(tracker: rpcnb.Tracker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracker_module, "_RATE", 200.0)
    monkeypatch.setattr(tracker_module, "_BURST", 10.0)
    with Raw(tracker, GREETING) as peer:
        peer.ask([5, {"key": "server:" + "x" * 4000}])
        peer.reads(9)
        start = time.monotonic()
        peer.sock.sendall(encode_frame([6]) * 40)
        for _ in range(40):
            peer.reads(struct.unpack("<i", peer.reads(4))[0])
        assert time.monotonic() - start > (2 * 40 - 10) / 200.0 * 0.9, "each as much as two"


def test_a_peer_that_asks_too_fast_is_read_slowly(tracker: rpcnb.Tracker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracker_module, "_RATE", 200.0)
    monkeypatch.setattr(tracker_module, "_BURST", 10.0)
    with Raw(tracker, GREETING) as peer:
        start = time.monotonic()
        peer.sock.sendall(encode_frame([1]) * 60)
        assert peer.reads(4 + 60 * 5) == GREETING + encode_frame(0) * 60
        assert time.monotonic() - start > 0.1


def test_a_peer_that_does_not_read_is_dropped(
    tracker: rpcnb.Tracker, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(tracker_module, "_RATE", 1e9)
    monkeypatch.setattr(tracker_module, "_BURST", 1e9)
    with Raw(tracker, GREETING) as info, Raw(tracker, GREETING) as peer:
        info.ask([5, {"key": "server:" + "x" * 4000}])
        info.reads(9)
        peer.sock.settimeout(10)
        with pytest.raises(OSError):  # noqa: PT011  # reset, or a full pipe
            ask_for_ever(peer)
    eventually(lambda: caplog.records, "the line in the log")
    assert ["dropped" in record.getMessage() for record in caplog.records] == [True]
    caplog.clear()


def test_t3_a_client_that_vanishes_leaves_the_queue(tracker: rpcnb.Tracker, board: Callable[..., Any]) -> None:
    clients = [Raw(tracker, GREETING + encode_frame([4, "rpi", "", 1])) for _ in range(200)]
    eventually(lambda: queue(tracker) == (0, 200), "the queue")
    dead = set(random.Random(1).sample(range(200), 100))
    for number in dead:
        clients[number].sock.close()
    eventually(lambda: queue(tracker) == (0, 100), "the end of their waits", 1.0)
    with Raw(tracker, GREETING) as peer:
        for number in range(100):
            peer.ask([3, "rpi", [1, f"rpi:{number}"]])
        for number, client in enumerate(clients):
            if number not in dead:
                client.sock.settimeout(5)
                assert client.reads(30)[4:]
        assert queue(tracker) == (0, 0)
    for client in clients:
        client.sock.close()


def test_the_tracker_needs_insecure_beyond_loopback() -> None:
    with pytest.raises(rpcnb.AccessDenied, match="--insecure"):
        rpcnb.Tracker("0.0.0.0", 0)
    with pytest.raises(rpcnb.AccessDenied, match="--insecure"):
        rpcnb.Proxy("0.0.0.0", 0)
    with rpcnb.Tracker("0.0.0.0", 0, silent=True, insecure=True) as tracker:
        assert "running" in repr(tracker)
    assert tracker.closed
    tracker.close()


def test_the_stop_key_ends_the_tracker() -> None:
    tracker = rpcnb.Tracker(port=0, silent=True)
    with Raw(tracker, GREETING + encode_frame([2, "wrong"]) + encode_frame([2, tracker.stop_key])) as peer:
        assert peer.reads(15) == GREETING + encode_frame(-1) + encode_frame(0)
        assert tracker.ended.wait(5)
    assert tracker.closed


# -- boards --------------------------------------------------------------------------------------------------------


def test_one_session_at_a_time_and_the_board_comes_back(tracker: rpcnb.Tracker, board: Callable[..., Any]) -> None:
    board()
    session = rpcnb.connect_tracker(tracker.address)
    with session.request("rpi") as first:
        assert first.call("add", 1, 2) == 3
        with pytest.raises(rpcnb.DeadlineExceeded):
            session.request("rpi", timeout=0.3)
        eventually(lambda: session.summary()["boards"][0]["state"] == "busy", "the board's state")
        told = session.summary()["boards"][0]
        assert told["holders"][0]["name"]
        eventually(lambda: session.summary()["boards"][0]["rpcnb"]["sessions"], "the board's own word")
        assert "busy" in session.text_summary()
    with session.request("rpi", session_timeout=30) as second:
        assert second.call("add", 2, 2) == 4
    eventually(lambda: queue(tracker) == (1, 0), "the board's return")


def test_more_sessions_when_the_board_says_so(tracker: rpcnb.Tracker, board: Callable[..., Any]) -> None:
    board(max_sessions=3)
    assert queue(tracker) == (3, 0)
    sessions = [rpcnb.connect(f"tracker://{tracker.address}/rpi") for _ in range(3)]
    assert [session.call("add", 1, 1) for session in sessions] == [2, 2, 2]
    assert queue(tracker) == (0, 0)
    for session in sessions:
        session.close()
    eventually(lambda: queue(tracker) == (3, 0), "the board's return")


def test_a_spent_or_guessed_match_key_is_of_no_use(
    tracker: rpcnb.Tracker, board: Callable[..., Any], caplog: pytest.LogCaptureFixture
) -> None:
    server = board()
    for key in ("rpi", "rpi:0.123", ""):
        with pytest.raises(rpcnb.KeyMismatch):
            rpcnb.connect(server.address, key=key)
    with Raw(tracker, GREETING) as peer:
        peer.ask([4, "rpi", "", 1])
        reply = peer.reads(4 + 4)
        (count,) = struct.unpack_from("<i", reply, 4)
        match_key = peer.reads(count).decode().split('"')[3]
    with rpcnb.connect(server.address, key=match_key):
        pass
    with pytest.raises(rpcnb.KeyMismatch):
        rpcnb.connect(server.address, key=match_key)
    caplog.clear()


@pytest.mark.parametrize(
    ("trusts", "given", "enters"),
    [(False, None, False), (False, "wrong", False), (False, "right", True), (True, None, True), (True, "wrong", False)],
)
def test_s5_a_token_is_asked_for_behind_a_tracker_too(
    tracker: rpcnb.Tracker,
    board: Callable[..., Any],
    trusts: bool,
    given: str | None,
    enters: bool,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(registration, "_POLL", 0.02)
    board(token="right", trust_tracker=trusts)
    session = rpcnb.connect_tracker(tracker.address)
    if enters:
        with session.request("rpi", token=given) as found:
            assert found.call("add", 1, 1) == 2
    else:
        with pytest.raises(rpcnb.KeyMismatch, match=r"'rpi' of .* was tried 2 times"):
            session.request("rpi", token=given)
        caplog.clear()


def test_t9_a_board_that_was_taken_and_not_used_comes_back(
    tracker: rpcnb.Tracker, board: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert registration._POLL * registration._UNUSED <= 7.5, "with a poll's delay still within 8 s"
    monkeypatch.setattr(registration, "_POLL", 0.05)
    board()
    with Raw(tracker, GREETING + encode_frame([4, "rpi", "", 1])) as peer:
        peer.reads(40)
        eventually(lambda: queue(tracker) == (1, 0), "the board's return")
    with rpcnb.connect(f"tracker://{tracker.address}/rpi") as session:
        assert session.call("add", 1, 1) == 2


def test_t4_boards_come_back_after_the_tracker_was_started_again(
    registry: Registry, serve: Callable[..., Any], caplog: pytest.LogCaptureFixture
) -> None:
    tracker = rpcnb.Tracker(port=0, silent=True)
    port = tracker.port
    servers = [serve(key="rpi", tracker_addr=("127.0.0.1", port)) for _ in range(5)]
    eventually(lambda: queue(tracker) == (5, 0), "the boards")
    servers.pop().close()
    eventually(lambda: queue(tracker) == (4, 0), "the end of one", 5)
    for _ in range(3):
        tracker.close()
        eventually(lambda: not any(server.registered for server in servers), "the loss")
        tracker = rpcnb.Tracker(port=port, port_end=port + 1, silent=True)
        eventually(lambda: queue(tracker) == (4, 0), "their return", 10)  # noqa: B023
    for server in servers:
        server.close()
    eventually(lambda: queue(tracker) == (0, 0), "their end")
    tracker.close()
    caplog.clear()


def test_a_server_waits_for_a_tracker_that_is_not_there_yet(
    registry: Registry, serve: Callable[..., Any], caplog: pytest.LogCaptureFixture
) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    server = serve(key="rpi", tracker_addr=("127.0.0.1", port))
    eventually(lambda: "not in the list" in caplog.text, "the word about it")
    caplog.clear()
    with rpcnb.Tracker(port=port, port_end=port + 1, silent=True) as tracker:
        eventually(lambda: server.registered, "the registration")
        assert queue(tracker) == (1, 0)
        server.close()


def test_contradictory_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match="needs a tracker"):
        rpcnb.Server(port=0, trust_tracker=True)


def test_a_server_behind_a_proxy_takes_a_trackers_address_as_stocks_does(tracker: rpcnb.Tracker) -> None:
    with rpcnb.Proxy(port=0, silent=True) as proxy:
        server = rpcnb.Server(
            "127.0.0.1", proxy.port, is_proxy=True, tracker_addr=tracker.address_pair, key="x", silent=True
        )
        with rpcnb.connect("127.0.0.1", proxy.port, "x") as session:
            assert session.status()["sessions"] == 1
        assert tracker.tracking.summary()["server_info"] == []
        server.close()


# -- clients -------------------------------------------------------------------------------------------------------


def test_everything_works_in_a_session_from_a_tracker(tracker: rpcnb.Tracker, board: Callable[..., Any]) -> None:
    board()
    with rpcnb.connect(f"tracker://{tracker.address}/rpi") as session:
        assert session.key == "rpi"
        later = session.get_function("later")
        assert [one.result() for one in [later.submit(number) for number in range(5)]] == list(range(5))
        array = np.arange(1_000_000, dtype="float32")
        assert (session.array(array).numpy() == array).all()
        session.reconnect()
        assert session.call("add", 1, 2) == 3


def test_the_place_in_the_queue_is_told(
    tracker: rpcnb.Tracker, board: Callable[..., Any], capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    monkeypatch.delenv("RPCNB_NONINTERACTIVE", raising=False)
    board()
    session = rpcnb.connect_tracker(tracker.address)
    places: list[tuple[int, int]] = []
    with session.request("rpi"):
        with pytest.raises(rpcnb.DeadlineExceeded):
            session.request("rpi", timeout=0.3, told=lambda place, length: places.append((place, length)))
        with pytest.raises(rpcnb.DeadlineExceeded):
            session.request("rpi", timeout=0.3)
    assert places == [(1, 1)]
    assert capsys.readouterr().err == f"waiting for a board 'rpi' of {tracker.address}: place 1 of 1\n"


def test_a_higher_priority_comes_first(tracker: rpcnb.Tracker, board: Callable[..., Any]) -> None:
    board()
    session = rpcnb.connect_tracker(tracker.address)
    order: list[str] = []

    def ask(name: str, priority: int) -> None:
        with session.request("rpi", priority, told=lambda place, length: None):
            order.append(name)

    first = session.request("rpi")
    threads = []
    for name, priority in (("low", 1), ("high", 5), ("middle", 2)):
        threads.append(threading.Thread(target=ask, args=(name, priority)))
        threads[-1].start()
        eventually(lambda: queue(tracker)[1] == len(threads), "the wait")
    first.close()
    for thread in threads:
        thread.join(10)
    assert order == ["high", "middle", "low"]


def test_ctrl_c_leaves_the_queue(tracker: rpcnb.Tracker) -> None:
    session = rpcnb.connect_tracker(tracker.address)
    sent: list[float] = []

    def interrupt() -> None:
        eventually(lambda: queue(tracker) == (0, 1), "the wait")
        sent.append(time.monotonic())
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    with pytest.raises(KeyboardInterrupt):
        session.request("rpi", told=lambda place, length: None)
    assert time.monotonic() - sent[0] < 0.5
    thread.join()
    eventually(lambda: queue(tracker) == (0, 0), "the end of the wait", 1)


def test_the_awaited_twin_does_the_same(tracker: rpcnb.Tracker, board: Callable[..., Any]) -> None:
    board()

    async def story() -> None:
        session = await rpcnb.connect_tracker_async(tracker.address)
        assert "rpi" in await session.text_summary()
        async with await session.request("rpi") as first:
            assert await first.call("add", 1, 2) == 3
            waiting = asyncio.ensure_future(session.request("rpi", told=lambda place, length: None))
            await until_queue(tracker, (0, 1))
            waiting.cancel()
            with pytest.raises(asyncio.CancelledError):
                await waiting
            await until_queue(tracker, (0, 0))
            with pytest.raises(rpcnb.DeadlineExceeded):
                await session.request("rpi", timeout=0.2, told=lambda place, length: None)
        async with await rpcnb.connect_async(f"tracker://{tracker.address}/rpi") as again:
            assert await again.call("add", 1, 1) == 2
            await again.reconnect()
            assert await again.call("add", 1, 3) == 4
        assert await session.request_and_run("rpi", lambda one: one.call("add", 4, 4)) == 8
        session.close()

    asyncio.run(story())


def test_request_and_run_tries_another_board_when_one_is_lost(
    tracker: rpcnb.Tracker, board: Callable[..., Any]
) -> None:
    board()
    board()
    session = rpcnb.connect_tracker(tracker.address)
    tried: list[str] = []

    def job(one: Any) -> int:
        tried.append(one.peer)
        if len(tried) == 1:
            raise rpcnb.SessionLost("the board fell off the table")
        return int(one.call("add", 1, len(tried)))

    assert session.request_and_run("rpi", job) == 3
    with pytest.raises(rpcnb.SessionLost):
        session.request_and_run("rpi", lambda one: _lose(), max_retry=1)
    with pytest.raises(ValueError, match="max_retry"):
        session.request_and_run("rpi", job, max_retry=0)
    assert "TrackerSession" in repr(session)


def _lose() -> None:
    raise rpcnb.SessionLost("nothing")


def test_what_is_no_tracker_is_said_to_be_none(serve: Callable[..., Any], caplog: pytest.LogCaptureFixture) -> None:
    server = serve()
    for reach in (rpcnb.connect_tracker, lambda where: asyncio.run(rpcnb.connect_tracker_async(where))):
        with pytest.raises(rpcnb.NotAnRpcServer, match=r"tracker"):
            reach(server.address)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        free = "{}:{}".format(*probe.getsockname())
    with pytest.raises(rpcnb.ConnectFailed, match="connection refused"):
        rpcnb.connect_tracker(free)
    with pytest.raises(ValueError, match="not a tracker's"):
        rpcnb.connect_tracker("rpc://host:1")
    caplog.clear()


def test_a_tracker_that_goes_away_ends_the_wait(board: Callable[..., Any], caplog: pytest.LogCaptureFixture) -> None:
    tracker = rpcnb.Tracker(port=0, silent=True)
    session = rpcnb.connect_tracker(tracker.address)
    threading.Timer(0.2, tracker.close).start()
    with pytest.raises(rpcnb.ConnectFailed, match="closed the connection"):
        session.request("rpi", told=lambda place, length: None)
    eventually(lambda: tracker.closed, "its end")
    caplog.clear()
