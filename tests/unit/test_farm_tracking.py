"""What a tracker decides, without sockets."""

from __future__ import annotations

import json
import logging
from collections import deque
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rpcnb.errors import RemoteProtocolError
from rpcnb.farm.messages import PendingKeys, Ping, Put, RequestBoard, Stop, Summary, UpdateInfo
from rpcnb.farm.tracking import Board, BoardQueue, Tracking, Waiter


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


class FakePeer:
    """A connection that keeps what it is sent."""

    def __init__(self, tracking: Tracking, host: str = "10.0.0.1") -> None:
        self.host = host
        self.got: list[Any] = []
        self.frames: list[bytes] = []
        self.tracking = tracking
        tracking.arrive(self)

    def send(self, value: Any) -> None:
        self.got.append(value)

    def send_frame(self, frame: bytes) -> None:
        assert len(frame) - 4 <= 1 << 20, "what our own client can read"
        self.frames.append(frame)
        self.got.append(json.loads(frame[4:]))

    def ask(self, request: Any) -> list[Any]:
        """Make a request; returns what has come since the last one."""
        self.got.clear()
        self.tracking.handle(self, request)
        return self.got


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def tracking(clock: Clock) -> Tracking:
    return Tracking(clock)


def test_a_board_goes_to_who_asks(tracking: Tracking) -> None:
    board, client = FakePeer(tracking, "10.0.0.7"), FakePeer(tracking)
    assert board.ask(UpdateInfo({"key": "server:k", "addr": [None, 1]})) == [0]
    assert board.ask(Put("k", 1, "k:1")) == [0]
    assert board.ask(PendingKeys()) == [["k:1"]]
    assert client.ask(RequestBoard("k")) == [[0, ["10.0.0.7", 1, "k:1"]]]
    assert board.ask(PendingKeys()) == [[]]
    assert client.ask(Ping()) == [0]


def test_a_custom_address_is_what_others_see(tracking: Tracking) -> None:
    board, client = FakePeer(tracking, "10.0.0.7"), FakePeer(tracking)
    board.ask(Put("k", 1, "k:1", "board.lan"))
    assert client.ask(RequestBoard("k")) == [[0, ["board.lan", 1, "k:1"]]]


def test_who_waits_gets_the_board_before_its_put_is_answered(tracking: Tracking) -> None:
    peer = FakePeer(tracking)
    assert peer.ask(RequestBoard("k")) == []
    assert peer.ask(Put("k", 1, "k:1")) == [[0, ["10.0.0.1", 1, "k:1"]], 0]


def test_the_summary_counts_and_lists(tracking: Tracking) -> None:
    board, client, other = FakePeer(tracking, "h"), FakePeer(tracking), FakePeer(tracking)
    board.ask(UpdateInfo({"key": "server:k", "addr": [None, 1]}))
    other.ask(UpdateInfo({"key": "client:x", "addr": ["h", 1]}))
    board.ask(Put("k", 1, "k:1"))
    client.ask(RequestBoard("other"))
    assert client.ask(Summary()) == [
        [
            0,
            {
                "queue_info": {"k": {"free": 1, "pending": 0}, "other": {"free": 0, "pending": 1}},
                "server_info": [{"key": "server:k", "addr": ["h", 1]}],
            },
        ]
    ]


def test_what_a_vanished_client_asked_for_is_forgotten(tracking: Tracking) -> None:
    board, client, next_one = FakePeer(tracking), FakePeer(tracking), FakePeer(tracking)
    client.ask(RequestBoard("k"))
    next_one.ask(RequestBoard("k"))
    tracking.leave(client)
    tracking.leave(client)
    assert tracking.summary()["queue_info"]["k"] == {"free": 0, "pending": 1}
    client.got.clear()
    board.ask(Put("k", 1, "k:1"))
    assert client.got == []
    assert next_one.got == [[0, ["10.0.0.1", 1, "k:1"]]]


def test_the_boards_of_a_vanished_server_are_forgotten(tracking: Tracking) -> None:
    board, other, client = FakePeer(tracking), FakePeer(tracking), FakePeer(tracking)
    board.ask(Put("k", 1, "k:1"))
    other.ask(Put("k", 2, "k:2"))
    tracking.leave(board)
    assert client.ask(RequestBoard("k")) == [[0, ["10.0.0.1", 2, "k:2"]]]
    assert client.ask(RequestBoard("k")) == []


def test_keys_that_nobody_has_any_more_are_forgotten(tracking: Tracking) -> None:
    board, stranger = FakePeer(tracking), FakePeer(tracking)
    board.ask(Put("k", 1, "k:1"))
    for number in range(60):
        stranger.ask(RequestBoard(f"random {number}"))
    tracking.leave(stranger)
    assert list(tracking.summary()["queue_info"]) == ["k"]


def test_a_match_key_that_was_put_twice_is_handed_out_twice(tracking: Tracking) -> None:
    board, client = FakePeer(tracking), FakePeer(tracking)
    board.ask(Put("k", 1, "k:1"))
    board.ask(Put("k", 1, "k:1"))
    assert client.ask(RequestBoard("k")) == client.ask(RequestBoard("k"))
    assert board.ask(PendingKeys()) == [[]]


def test_one_connection_may_not_fill_the_tracker(tracking: Tracking) -> None:
    peer, client = FakePeer(tracking), FakePeer(tracking)
    for number in range(1024):
        peer.ask(Put("k", 1, f"k:{number}"))
    for _ in range(64):
        client.ask(RequestBoard("nothing"))
    with pytest.raises(RemoteProtocolError, match="at most 1024 boards"):
        peer.ask(Put("k", 1, "one more"))
    with pytest.raises(RemoteProtocolError, match="at most 64 requests"):
        client.ask(RequestBoard("nothing"))
    client.ask(UpdateInfo({"a": "x" * 10_000}))
    with pytest.raises(RemoteProtocolError, match="at most 16384 bytes of info"):
        client.ask(UpdateInfo({"b": "x" * 10_000}))


def test_one_match_key_put_again_and_again_counts_each_time(tracking: Tracking) -> None:
    peer = FakePeer(tracking)
    for _ in range(1024):
        peer.ask(Put("k", 1, "k:1"))
    with pytest.raises(RemoteProtocolError, match="at most 1024 boards"):
        peer.ask(Put("k", 1, "k:1"))


def test_keys_of_which_nothing_is_offered_any_more_make_room(tracking: Tracking) -> None:
    board, client = FakePeer(tracking), FakePeer(tracking)
    board.ask(Put("kept", 1, "kept:1"))
    for number in range(3000):
        board.ask(Put(f"{number}", 1, f"{number}:1"))
        client.ask(RequestBoard(f"{number}"))
    queues = tracking.summary()["queue_info"]
    assert queues["kept"] == {"free": 1, "pending": 0}
    assert len(tracking._queues) <= 1024
    tracking.leave(board)
    assert tracking._queues == {}


def test_a_key_that_had_a_board_is_shown_for_a_day(clock: Clock, tracking: Tracking) -> None:
    board, client = FakePeer(tracking), FakePeer(tracking)
    board.ask(Put("k", 1, "k:1"))
    client.ask(RequestBoard("k"))
    client.ask(RequestBoard("k"))
    tracking.leave(board)
    assert tracking.summary()["queue_info"] == {"k": {"free": 0, "pending": 1}}
    tracking.leave(client)
    assert tracking.summary()["queue_info"] == {"k": {"free": 0, "pending": 0}}, "as stock's tracker"
    clock.now += 86399
    tracking.sweep()
    assert list(tracking.summary()["queue_info"]) == ["k"]
    other = FakePeer(tracking)
    other.ask(Put("k", 1, "k:1"))
    tracking.leave(other)
    clock.now += 86399
    tracking.sweep()
    assert list(tracking.summary()["queue_info"]) == ["k"]
    clock.now += 2
    tracking.sweep()
    assert tracking.summary()["queue_info"] == {}


def test_so_many_keys_without_boards_are_shown(tracking: Tracking) -> None:
    for number in range(5):
        board = FakePeer(tracking)
        for one in range(1000):
            board.ask(Put(f"{number}.{one}", 1, "a"))
        tracking.leave(board)
    assert len(tracking.summary()["queue_info"]) == 4096
    client = FakePeer(tracking)
    client.ask(RequestBoard("asked for"))
    tracking.leave(client)
    assert "asked for" not in tracking.summary()["queue_info"]


def test_who_waits_twice_for_a_key_is_answered_twice(tracking: Tracking) -> None:
    board, client = FakePeer(tracking), FakePeer(tracking)
    client.ask(RequestBoard("k"))
    client.ask(RequestBoard("k"))
    for number in range(3):
        board.ask(Put("k", 1, f"k:{number}"))
    assert [one[1][2] for one in client.got] == ["k:0", "k:1"]
    tracking.leave(client)
    assert tracking.summary()["queue_info"] == {"k": {"free": 1, "pending": 0}}


def test_who_neither_offers_nor_asks_is_of_little_use(tracking: Tracking) -> None:
    peers = [FakePeer(tracking) for _ in range(5)]
    peers[0].ask(Ping())
    peers[1].ask(UpdateInfo({"key": "server:k"}))
    peers[2].ask(Put("k", 1, "k:1"))
    peers[3].ask(RequestBoard("other"))
    tracking.leave(peers[4])
    assert [tracking.use_of(peer) for peer in peers] == [0, 1, 2, 2, 0]


# -- the summary, of strangers too ---------------------------------------------------------------------------------


def test_many_long_keys_of_a_stranger_leave_room_for_others(tracking: Tracking) -> None:
    strangers, client = [FakePeer(tracking) for _ in range(3)], FakePeer(tracking)
    for number, stranger in enumerate(strangers):
        stranger.ask(UpdateInfo({"key": "server:" + "k" * 4000, "addr": ["h", 1]}))
        for one in range(300):
            stranger.ask(Put(f"{number}.{one}" + "k" * 4000, 1, f"{number}.{one}"))
    board = FakePeer(tracking, "h")
    board.ask(UpdateInfo({"key": "server:rpi", "addr": [None, 1]}))
    board.ask(Put("rpi", 1, "rpi:1"))
    for boards in (False, True):
        (found,) = client.ask(Summary(boards))
        assert found[1]["queue_info"]["rpi"] == {"free": 1, "pending": 0}
        assert {"key": "server:rpi", "addr": ["h", 1]} in found[1]["server_info"]
        assert found[1]["left_out"]["queue_info"] == 901 - len(found[1]["queue_info"])
    assert found[1]["boards"][0]["key"] == ["rpi"], "the short ones first"
    assert sum(len(key) for key in found[1]["boards"][1]["key"]) <= 64 * 256


class Working(Clock):
    """A clock on which every look takes some time: so does making a summary of many boards."""

    step = 0.0

    def __call__(self) -> float:
        self.now += self.step
        return self.now


def test_a_dear_summary_is_made_a_few_times_a_second_at_most() -> None:
    clock = Working()
    tracking = Tracking(clock)
    board, client = FakePeer(tracking), FakePeer(tracking)
    board.ask(Put("k", 1, "k:1"))
    clock.step = 0.01
    for number in range(12):
        board.ask(Put("k", 1, f"k:{number}"))
        client.ask(Summary())
    clock.step = 0.0
    assert len(set(map(id, client.frames))) == 2, "in half a second"
    clock.now += 1
    assert client.ask(Summary())[0][1]["queue_info"] == {"k": {"free": 13, "pending": 0}}


def test_a_cheap_summary_is_exactly_fresh_and_made_once_while_nothing_changes(tracking: Tracking, clock: Clock) -> None:
    board, client = FakePeer(tracking), FakePeer(tracking)
    for number in range(1, 4):
        board.ask(Put("k", 1, f"k:{number}"))
        for _ in range(5):
            assert client.ask(Summary())[0][1]["queue_info"]["k"]["free"] == number
    assert len(set(map(id, client.frames))) == 3
    clock.now += 0.2
    client.ask(Summary())
    assert len(set(map(id, client.frames))) == 4, "what it says of times is of now"


def test_a_long_queue_is_told_its_places_in_portions(tracking: Tracking) -> None:
    first, *others = [FakePeer(tracking) for _ in range(401)]
    for peer in (first, *others):
        peer.ask(RequestBoard("k", "", 1, True))
        peer.got.clear()
    tracking.leave(first)
    tracking.sweep()
    assert [bool(peer.got) for peer in others] == [True] * 250 + [False] * 150
    tracking.sweep()
    assert [peer.got[0][1]["place"] for peer in others] == list(range(1, 401))


# -- stopping ------------------------------------------------------------------------------------------------------


def test_only_the_stop_key_stops_it(clock: Clock) -> None:
    stopped: list[bool] = []
    tracking = Tracking(clock, lambda: stopped.append(True))
    peer, other = FakePeer(tracking), FakePeer(tracking, "10.0.0.2")
    assert peer.ask(Stop("wrong")) == [-1]
    assert not stopped
    assert other.ask(Stop(tracking.stop_key)) == [0]
    assert stopped


def test_a_stop_key_that_is_no_text_is_a_wrong_one(tracking: Tracking) -> None:
    assert FakePeer(tracking).ask(Stop("\ud800")) == [-1]


def test_who_guesses_the_stop_key_is_told_the_later_the_more_often(clock: Clock) -> None:
    tracking = Tracking(clock)
    peer, gone = FakePeer(tracking), FakePeer(tracking)
    for _ in range(10):
        assert peer.ask(Stop("wrong")) == [-1]
    assert peer.ask(Stop("wrong")) == gone.ask(Stop("wrong")) == []
    tracking.leave(gone)
    tracking.sweep()
    assert peer.got == []
    clock.now += 1
    tracking.sweep()
    assert (peer.got, gone.got) == ([-1], [])
    assert peer.ask(Stop(tracking.stop_key))[-1] == 0


def test_stop_keys_are_long_and_never_the_same(clock: Clock) -> None:
    keys = {Tracking(clock).stop_key for _ in range(100)}
    assert len(keys) == 100
    assert min(map(len, keys)) >= 22  # 128 bits in letters of 6


# -- what rpcnb adds -----------------------------------------------------------------------------------------------


def test_a_client_that_wants_to_know_is_told_its_place(tracking: Tracking) -> None:
    first, second, third = (FakePeer(tracking) for _ in range(3))
    assert first.ask(RequestBoard("k")) == []
    assert second.ask(RequestBoard("k", "", 1, True)) == [[100, {"place": 2, "of": 2}]]
    assert third.ask(RequestBoard("k", "", 5, True)) == [[100, {"place": 1, "of": 3}]]
    second.got.clear()
    third.got.clear()
    tracking.sweep()
    assert second.got == [[100, {"place": 3, "of": 3}]]
    assert (first.got, third.got) == ([], [])
    tracking.leave(first)
    tracking.sweep()
    tracking.sweep()
    assert second.got[1:] == [[100, {"place": 2, "of": 2}]]


def test_a_queue_of_stock_clients_is_told_nothing(tracking: Tracking) -> None:
    client = FakePeer(tracking)
    client.ask(RequestBoard("k"))
    tracking.sweep()
    assert client.got == []


def test_the_boards_are_told_with_their_states(tracking: Tracking, clock: Clock) -> None:
    board, client = FakePeer(tracking, "h"), FakePeer(tracking, "10.0.0.9")
    info = {"key": "server:k", "addr": [None, 1], "rpcnb": {"instance": "i"}}
    board.ask(UpdateInfo(info))
    board.ask(Put("k", 1, "k:1"))

    def state() -> dict[str, Any]:
        (found,) = client.ask(Summary(True))[0][1]["boards"]
        return dict(found)

    assert state() == {
        "key": ["k"],
        "addr": ["h", 1],
        "state": "free",
        "free": 1,
        "holders": [],
        "rpcnb": {"instance": "i"},
    }
    client.ask(RequestBoard("k", "me@here"))
    clock.now += 3
    assert (state()["state"], state()["holders"]) == ("busy", [{"name": "me@here", "key": "k", "since": 3.0}])
    board.ask(Put("k", 1, "k:2"))
    client.ask(RequestBoard("k"))
    assert state()["holders"] == [{"name": "10.0.0.9", "key": "k", "since": 0.0}]
    board.ask(UpdateInfo({**info, "rpcnb": {"draining": ["train"]}}))
    assert state()["state"] == "draining"


def test_a_board_that_falls_silent_is_not_handed_out(
    tracking: Tracking, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    board, client = FakePeer(tracking), FakePeer(tracking)
    board.ask(Put("k", 1, "k:1"))
    board.ask(PendingKeys())
    clock.now += 5.5
    tracking.sweep()
    tracking.sweep()
    assert [record.getMessage() for record in caplog.records] == [
        "tracker: the board of 10.0.0.1 is silent; it is not handed out until it speaks"
    ]
    caplog.clear()
    assert tracking.summary(boards=True)["boards"][0]["state"] == "unhealthy"
    assert client.ask(RequestBoard("k")) == []
    assert board.ask(PendingKeys()) == [[]], "whoever waited has got it"
    assert client.got == [[0, ["10.0.0.1", 1, "k:1"]]]
    logging.getLogger("rpcnb").debug("silence noted")


def test_a_board_that_never_asks_for_its_keys_is_handed_out_all_the_same(tracking: Tracking, clock: Clock) -> None:
    board, client = FakePeer(tracking), FakePeer(tracking)
    board.ask(Put("k", 1, "k:1"))
    clock.now += 3600
    tracking.sweep()
    assert client.ask(RequestBoard("k")) == [[0, ["10.0.0.1", 1, "k:1"]]]


# -- the queue, against a model ------------------------------------------------------------------------------------


class Model:
    """The rule in the fewest words: boards in order; the highest priority first, then the earliest."""

    def __init__(self) -> None:
        self.free: deque[int] = deque()
        self.waiting: list[tuple[float, int, int]] = []
        self.pairs: list[tuple[int, int]] = []

    def match(self) -> None:
        while self.free and self.waiting:
            best = min(self.waiting)
            self.waiting.remove(best)
            self.pairs.append((self.free.popleft(), best[2]))


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_the_queue_keeps_the_order_of_priorities_and_arrival(data: st.DataObject) -> None:
    class One:
        host = ""

        def __init__(self, number: int) -> None:
            self.number = number

        def send(self, value: Any) -> None:
            """Nothing is sent by a queue."""

        def send_frame(self, frame: bytes) -> None:
            """Nor that."""

    queue, model = BoardQueue(), Model()
    pairs: list[tuple[int, int]] = []
    peers: dict[int, One] = {}
    steps = data.draw(st.lists(st.tuples(st.sampled_from("prrppl"), st.integers(0, 3)), max_size=100))
    for number, (kind, level) in enumerate(steps):
        peer = peers[number] = One(number)
        if kind == "p":
            waiter = queue.put(Board(peer, "k", "h", 1, str(number)))
            model.free.append(number)
            if waiter is not None:
                pairs.append((number, waiter.number))
        elif kind == "r":
            board = queue.request(Waiter(peer, RequestBoard("k", "", level), number))
            model.waiting.append((-level, number, number))
            if board is not None:
                pairs.append((int(board.match_key), number))
        else:
            gone = level % max(1, number)
            if gone in peers:
                queue.leave(peers[gone])
                model.free = deque(one for one in model.free if one != gone)
                model.waiting = [one for one in model.waiting if one[2] != gone]
        model.match()
        assert not (queue.free and queue.waiting)
    assert pairs == model.pairs
    assert (len(queue.free), len(queue.waiting)) == (len(model.free), len(model.waiting))


def test_places_of_long_queues_are_told_seldom(
    tracking: Tracking, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    def tell() -> None:
        told.append(clock.now)
        clock.now += 0.1

    told: list[float] = []
    monkeypatch.setattr(tracking, "_tell_places", tell)
    begun = clock.now
    while clock.now < begun + 5:
        tracking.sweep()
        clock.now += 0.5
    assert [round(at - begun, 3) for at in told] == [0.0, 2.1, 4.2]
