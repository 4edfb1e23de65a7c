"""The event-driven server: reference transcripts of every asynchronous point, and of stock's recorded calls."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from runtime_wire import BOTH, READ, VOID, WRITE, Client, packet

from rpcnb.errors import RemoteProtocolError
from rpcnb.protocol.codes import Code
from rpcnb.protocol.messages import (
    CallFunc,
    CopyAck,
    CopyFromRemote,
    CopyToRemote,
    InitServer,
    Raised,
    Return,
    Shutdown,
    Syscall,
)
from rpcnb.runtime import devices
from rpcnb.runtime.devices import DeviceAPI, Memory
from rpcnb.runtime.environment import Environment
from rpcnb.runtime.eventdriven import create_event_driven_server
from rpcnb.runtime.local import LocalServingSession
from rpcnb.runtime.registry import Registry
from rpcnb.values import CPU, NULL, Device, TensorMeta

BOARD = Device(12)
EXISTS = Syscall(Code.DEV_GET_ATTR, (CPU, 0))
ONE = packet(Return((1,)))


class Later:
    """Holds a completion until the test says so; with ``inside`` it comes before the handler returns."""

    def __init__(self) -> None:
        self.inside = False
        self.broken = False
        self.acts: list[Callable[[], object]] = []
        self.dones: list[Any] = []

    def take(self, act: Callable[[], object], done: Any) -> None:
        if self.broken:
            raise OSError("refused at once")
        self.dones.append(done)
        if self.inside:
            act()
        else:
            self.acts.append(act)

    def finish(self) -> None:
        (act,) = self.acts
        act()


class Point:
    """One asynchronous point: a server where the request parks, and the reply that must come."""

    def __init__(self, name: str, patch: pytest.MonkeyPatch) -> None:
        self.later = later = Later()
        registry = Registry()
        registry.register("plain", lambda: 7)
        registry.register("coroutine", self._coroutine)
        registry.register("callback", lambda done: later.take(lambda: done(7), done), callback=True)

        class Slow(LocalServingSession):
            is_async = True

            def async_call(self, handle: int, args: Any, done: Any) -> None:
                call = super().async_call
                later.take(lambda: call(handle, args, done), done)

            def async_copy_to(self, data: memoryview, meta: TensorMeta, nbytes: int, done: Any) -> None:
                copy = super().async_copy_to
                later.take(lambda: copy(data, meta, nbytes, done), done)

            def async_copy_from(self, meta: TensorMeta, into: memoryview, nbytes: int, done: Any) -> None:
                copy = super().async_copy_from
                later.take(lambda: copy(meta, into, nbytes, done), done)

            def async_stream_wait(self, device: Device, stream: int, done: Any) -> None:
                wait = super().async_stream_wait
                later.take(lambda: wait(device, stream, done), done)

        class Board(DeviceAPI):
            def allocate(self, device: Device, nbytes: int, alignment: int, scope: str) -> Memory:
                return Memory(device, nbytes, bytearray(b"abcd"))

            def copy_in(self, memory: Memory, start: int, data: memoryview, stream: Any, done: Any) -> None:
                later.take(lambda: done(None), done)

            def copy_out(self, memory: Memory, start: int, data: memoryview, stream: Any, done: Any) -> None:
                def act() -> None:
                    data[:] = memory.storage
                    done(None)

                later.take(act, done)

            def synchronize(self, device: Device, stream: Any, done: Any) -> None:
                later.take(lambda: done(None), done)

        patch.setitem(devices._APIS, 12, Board())
        where, _, what = name.partition(" ")
        self.is_coroutine = where == "coroutine"
        environment = Environment(
            registry=registry, spawn=self._spawn, local_session=Slow if where == "session" else None
        )
        self.client = Client(environment)
        self.reply = self._prepare(where, what)
        self.client.chunks.clear()
        self.client.results.clear()

    def _prepare(self, where: str, what: str) -> bytes:
        client = self.client
        if what == "call":
            handle = client.find("plain" if where == "session" else where)
            self.request: Any = CallFunc(handle)
            return packet(Return((1, 7)))
        device = BOARD if where == "device" else CPU
        meta = client.tensor((4,), device=device)
        if where == "session":
            self.client.local.tensor(meta).numpy()[:] = list(b"abcd")
        if what == "copy to":
            self.request = CopyToRemote(meta, 4, b"1234")
            return VOID
        if what == "copy from":
            self.request = CopyFromRemote(meta, 4, memoryview(bytearray(4)))
            return packet(CopyAck(b"abcd"))
        self.request = Syscall(Code.DEV_STREAM_SYNC, (device, NULL))
        return VOID

    @staticmethod
    async def _coroutine() -> int:
        return 7

    def _spawn(self, awaitable: Any, done: Any) -> Callable[[], object]:
        def act() -> None:
            with pytest.raises(StopIteration) as end:
                awaitable.send(None)
            done(end.value.value)

        try:
            self.later.take(act, done)
        except OSError:
            awaitable.close()
            raise
        closed = awaitable.close
        return lambda: closed()

    def send_with_three_behind(self) -> int:
        return self.client.send(self.request, EXISTS, EXISTS, EXISTS, Shutdown())


POINTS = ["coroutine call", "callback call"]
POINTS += [f"{where} {what}" for where in ("session", "device") for what in ("copy to", "copy from", "stream wait")]
POINTS += ["session call"]


@pytest.fixture(params=POINTS)
def point(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Point:
    return Point(request.param, monkeypatch)


def test_completed_inside_the_handler_the_reply_is_flushed_at_once(point: Point) -> None:
    point.later.inside = True
    session = point.client.local
    assert point.send_with_three_behind() == 0
    assert point.client.chunks == [point.reply, ONE * 3]
    assert session._closed


def test_completed_inside_without_the_write_flag_the_reply_is_flushed_too(point: Point) -> None:
    point.later.inside = True
    data = b"".join(bytes(part) for message in (point.request, EXISTS) for part in point.client.endpoint.send(message))
    assert point.client.feed(data, READ) == 2
    assert point.client.chunks == [point.reply]
    assert point.client.feed(b"", WRITE) == 1
    assert point.client.chunks == [point.reply, ONE]
    point.client.servant.cancel()


def test_completed_from_another_thread_the_requests_behind_go_on(point: Point) -> None:
    session = point.client.local
    assert point.send_with_three_behind() == 1
    assert point.client.servant.parked is not None
    assert point.client.chunks == []
    thread = threading.Thread(target=point.later.finish)
    thread.start()
    thread.join()
    assert point.client.chunks == [point.reply, ONE * 3]
    assert session._closed
    assert point.client.feed() == 0
    assert point.client.chunks == [point.reply, ONE * 3]


def test_completed_after_the_end_of_the_stream_nothing_is_sent(point: Point) -> None:
    session = point.client.local
    assert point.send_with_three_behind() == 1
    parked = point.client.servant.parked
    assert parked is not None
    point.client.servant.cancel()
    assert parked.cancelled
    assert session._closed
    assert getattr(point.later.dones[0], "cancelled", True)  # a device's completion has no such word
    if point.is_coroutine:
        point.later.dones[0](7)  # its coroutine has been closed
    else:
        point.later.finish()
    assert point.client.chunks == []
    assert point.client.feed() == 0


def test_completed_twice_only_the_first_counts(point: Point) -> None:
    point.client.send(point.request, EXISTS)
    point.later.finish()
    expected = [point.reply, ONE]
    assert point.client.chunks == expected
    done = point.later.dones[0]
    if hasattr(done, "error"):
        done()
        done.error(ValueError("late"))
    else:
        done(None)
        done(ValueError("late"))
    assert point.client.chunks == expected
    assert point.client.feed(packet(EXISTS)) == 1
    assert point.client.chunks == [*expected, ONE]
    point.client.servant.cancel()


def test_never_completed_the_requests_behind_wait(point: Point) -> None:
    assert point.send_with_three_behind() == 1
    assert point.client.feed(packet(EXISTS)) == 1
    assert point.client.feed() == 1
    assert point.client.chunks == []
    point.client.servant.cancel()
    assert point.client.feed() == 0


def test_an_exception_before_the_completion_is_taken_is_one_exception(point: Point) -> None:
    point.later.broken = True
    assert point.client.send(point.request, EXISTS) == 1
    assert point.client.sent == packet(Raised("refused at once")) + ONE
    point.client.servant.cancel()


@pytest.mark.parametrize("accepted", [1, 5])
def test_a_completion_repeats_until_everything_is_sent(point: Point, accepted: int) -> None:
    point.client.accept = accepted
    point.client.send(point.request)
    point.later.finish()
    assert point.client.sent == point.reply
    assert max(map(len, point.client.chunks)) == accepted
    assert point.client.writes_wanted == 0
    point.client.servant.cancel()


def test_a_completion_that_is_not_accepted_asks_to_be_called_when_writable(point: Point) -> None:
    point.client.accept = 0
    point.client.send(point.request, EXISTS)
    point.later.finish()
    assert point.client.writes_wanted >= 1
    point.client.accept = None
    assert point.client.feed(b"", WRITE) == 1
    assert point.client.sent == point.reply + ONE
    point.client.servant.cancel()


def test_a_completion_on_a_broken_connection_ends_the_session(point: Point) -> None:
    session = point.client.local
    point.client.send(point.request, EXISTS)
    point.client.accept = -1
    point.later.finish()
    assert session._closed
    assert point.client.chunks == []
    assert point.client.feed(packet(EXISTS)) == 0


@pytest.mark.parametrize("where", ["coroutine", "callback", "session"])
@pytest.mark.parametrize(
    ("result", "text"),
    [
        (1 << 70, "the int result of 71 bits does not fit the wire's 64 signed bits"),
        ("\ud800", "the text result is not Unicode (surrogates not allowed)"),
        (Device(1 << 40), "'i' format requires -2147483648 <= number <= 2147483647"),
    ],
)
def test_a_result_that_cannot_be_encoded_is_exactly_one_exception(
    where: str, result: Any, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    point = Point(f"{where} call", monkeypatch)
    if where == "coroutine":

        async def bad() -> Any:
            return result

        point.client.environment.registry.register("coroutine", bad, override=True)
    elif where == "callback":
        take = point.later.take
        point.client.environment.registry.register(
            "callback", lambda done: take(lambda: done(result), done), override=True, callback=True
        )
    else:
        point.client.environment.registry.register("plain", lambda: result, override=True)
    handle = point.client.find("plain" if where == "session" else where)
    point.client.chunks.clear()
    point.client.send(CallFunc(handle), EXISTS)
    point.later.finish()
    (reply, one) = (point.client.reply(), point.client.reply())
    assert isinstance(reply, Raised)
    assert reply.text == text
    assert one == Return((1,))
    assert point.client.reply() is None
    point.client.servant.cancel()


# -- the handler itself ----------------------------------------------------------------------------------------------


def test_stocks_recorded_handler_calls_are_answered_alike(vectors: Path) -> None:
    calls = json.loads((vectors / "event_handler.json").read_text())["calls"]
    sent: list[bytes] = []
    accepts: int | None = None

    def fsend(data: bytes | bytearray | memoryview) -> int:
        sent.append(bytes(data)[:accepts])
        return len(sent[-1])

    handler = create_event_driven_server(fsend, "test", "%toinit")
    stock = ours = b""
    for call in calls:
        accepts = call["fsend_accepts"]
        expected = [bytes.fromhex(chunk) for chunk in call["sent_hex"]]
        data = bytes.fromhex(call["in_hex"])
        sent.clear()
        result = handler(data.replace(stock, ours) if stock else data, call["event_flag"])
        if not stock and call["decoded"] == "kGetGlobalFunc":
            stock, ours = expected[0][-8:], sent[0][-8:]
        if call["decoded"].startswith(("fsend accepts", "continue")):
            assert [len(chunk) for chunk in sent] == [len(chunk) for chunk in expected]
        else:
            assert [chunk.replace(ours, stock) if ours else chunk for chunk in sent] == expected, call["decoded"]
        assert result == call["result"], call["decoded"]


HELLO = (len(b"client:gpu -rpcnb=1.0")).to_bytes(4, "little") + b"client:gpu -rpcnb=1.0"


def test_the_handshake_tells_what_the_client_takes() -> None:
    for options, text in (("", 16 << 20), (" -rpcnb=1.0,text=5", 5)):
        handler = create_event_driven_server(len, "test", "%toinit")
        key = b"client:gpu" + options.encode()
        handler(len(key).to_bytes(4, "little") + key, 3)
        assert handler.servant.endpoint.takes.text == text


@pytest.mark.parametrize("cut", [1, 3, 4, 5, len(HELLO), 1000])
def test_the_rest_of_the_handshake_is_read_in_any_cut(cut: int) -> None:
    sent: list[bytes] = []

    def fsend(data: bytes | bytearray | memoryview) -> int:
        sent.append(bytes(data))
        return len(data)

    handler = create_event_driven_server(fsend, "test", "%toinit")
    data = HELLO + packet(InitServer())
    for start in range(0, len(data), cut):
        assert handler(data[start : start + cut], BOTH) == 1
    assert handler.remote_key == "client:gpu -rpcnb=1.0"
    assert handler.servant.extended
    assert sent == [VOID]
    assert handler(packet(Shutdown()), BOTH) == 0


def test_a_stock_client_is_not_taken_for_rpcnb() -> None:
    handler = create_event_driven_server(len, "test", "%toinit")
    handler((7).to_bytes(4, "little") + b"client:", BOTH)
    assert not handler.servant.extended
    assert handler.remote_key == "client:"


def test_a_key_too_long_is_refused() -> None:
    handler = create_event_driven_server(len, "test", "%toinit")
    with pytest.raises(RemoteProtocolError, match="expected a key of 0 to 4096 bytes, got -1"):
        handler(b"\xff\xff\xff\xff", BOTH)
    assert handler(b"", BOTH) == 0


def test_broken_framing_is_raised_and_ends_the_session() -> None:
    client = Client()
    session = client.local
    with pytest.raises(RemoteProtocolError, match="expected a packet"):
        client.feed(b"\xff" * 12)
    assert session._closed
    assert client.feed(packet(EXISTS)) == 0


def test_bytes_are_taken_without_the_read_flag_as_stock_does() -> None:
    client = Client()
    request = packet(EXISTS)
    for flag, result in ((WRITE, 1), (0, 2)):
        client.endpoint.note_sent(EXISTS)
        assert client.feed(request, flag) == result
    assert client.reply() == Return((1,))
    assert client.reply() is None, "it may not be sent yet"
    assert client.feed(b"", WRITE) == 1
    assert client.reply() == Return((1,))


def test_nothing_new_is_performed_while_the_client_does_not_read_its_replies() -> None:
    client = Client()
    meta = client.tensor((5 << 20,))
    client.accept = 0
    assert client.send(CopyFromRemote(meta, meta.nbytes, memoryview(bytearray(meta.nbytes))), EXISTS) == 2
    assert client.servant.output.size == meta.nbytes + 12
    client.accept = None
    assert client.feed(b"", WRITE) == 2
    assert client.feed(b"", WRITE) == 1
    assert client.reply() == CopyAck()
    assert client.reply() == Return((1,))


def test_a_completion_without_a_wish_for_writing_leaves_the_rest_for_the_next_call() -> None:
    later: list[Any] = []
    registry = Registry()
    registry.register("later", later.append, callback=True)
    room, sent = [1000], bytearray()

    def fsend(data: bytes | bytearray | memoryview) -> int:
        sent.extend(bytes(data)[: room[0]])
        return min(len(data), room[0])

    handler = create_event_driven_server(fsend, "test", "", environment=Environment(registry=registry))
    handler(packet(InitServer(), Syscall(Code.GET_GLOBAL_FUNC, ("later",))), BOTH)
    handle = int.from_bytes(sent[-8:], "little")
    assert handler(packet(CallFunc(handle)), BOTH) == 1
    room[0] = 0
    later[0](1)
    assert handler(b"", READ) == 2
    room[0] = 1000
    assert handler(b"", WRITE) == 1
    assert sent.endswith(packet(Return((1, 1))))


# -- subclassing -----------------------------------------------------------------------------------------------------

QUEUE: list[tuple[Callable[..., object], tuple[Any, ...]]] = []


def later(function: Callable[..., object], *args: Any) -> None:
    QUEUE.append((function, args))


class SlowDevice(LocalServingSession):
    is_async = True

    def async_call(self, handle: int, args: Any, done: Any) -> None:
        later(super().async_call, handle, args, done)

    def async_copy_to(self, data: memoryview, meta: TensorMeta, nbytes: int, done: Any) -> None:
        later(super().async_copy_to, data, meta, nbytes, done)

    def async_copy_from(self, meta: TensorMeta, into: memoryview, nbytes: int, done: Any) -> None:
        later(super().async_copy_from, meta, into, nbytes, done)

    def async_stream_wait(self, device: Device, stream: int, done: Any) -> None:
        later(super().async_stream_wait, device, stream, done)


@pytest.mark.parametrize("by_registry", [False, True])
def test_a_slow_device_overrides_four_methods(by_registry: bool) -> None:
    registry = Registry()
    if by_registry:
        registry.register("rpc.LocalSession", SlowDevice)
    client = Client(Environment(registry=registry, local_session=None if by_registry else SlowDevice))
    assert isinstance(client.servant.session, SlowDevice)
    meta, addone = client.tensor((4,)), client.find("rpc.test.addone")
    into = bytearray(4)
    wait = Syscall(Code.DEV_STREAM_SYNC, (CPU, NULL))
    client.send(
        CopyToRemote(meta, 4, b"abcd"), CopyFromRemote(meta, 4, memoryview(into)), CallFunc(addone, (41,)), wait
    )
    for reply in (Return((None,)), CopyAck(), Return((1, 42)), Return((None,))):
        assert client.reply() is None
        function, args = QUEUE.pop()
        function(*args)
        assert client.reply() == reply
    assert QUEUE == []
    assert into == b"abcd"
    client.send(Shutdown())


def test_what_a_slow_device_raises_late_is_answered() -> None:
    client = Client(Environment(local_session=SlowDevice))
    meta, fails = client.tensor((4,)), client.find("rpc.test.except")
    client.free_data(meta)
    absent = Device(2)
    for request, text in (
        (CallFunc(fails, ("no",)), "no"),
        (CallFunc(77), "handle 0x4d was never issued in this session"),
        (CopyToRemote(meta, 4, b"abcd"), f"handle {meta.data:#x} was freed before"),
        (CopyFromRemote(meta, 4), f"handle {meta.data:#x} was freed before"),
        (
            Syscall(Code.DEV_STREAM_SYNC, (absent, NULL)),
            "Check failed: (allow_missing) is false: Device API cuda is not enabled.",
        ),
    ):
        if isinstance(request, (CopyToRemote, CopyFromRemote)):
            assert client.error(request).text == text  # refused before it is begun
            assert QUEUE == []
            continue
        client.send(request)
        function, args = QUEUE.pop()
        function(*args)
        reply = client.reply()
        assert isinstance(reply, Raised)
        assert reply.text == text
    client.send(Shutdown())


def test_requests_behind_a_parked_one_are_performed_though_their_replies_jam() -> None:
    registry = Registry()
    kept: list[Any] = []
    registry.register("keep", lambda done: kept.append(done), callback=True)
    client = Client(Environment(registry=registry))
    meta = client.tensor((3 << 20,))
    assert client.ask(CallFunc(client.find("keep"), ())) is None
    into = [memoryview(bytearray(3 << 20)) for _ in range(4)]
    client.send(*(CopyFromRemote(meta, 3 << 20, part) for part in into))
    kept[0]("done")  # each two fill the output: what waits for that goes on when they have left
    replies = [client.reply() for _ in range(5)]
    assert replies[0].values == (11, "done")
    assert all(isinstance(reply, CopyAck) for reply in replies[1:])
