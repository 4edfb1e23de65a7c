"""The servant: init, requests before it, forged handles, who performs what."""

from __future__ import annotations

import contextlib
import itertools
import os
import threading
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from runtime_wire import BOTH, Client, Loop, handle_of, packet

import rpcnb
from rpcnb.protocol.codes import Code, Role
from rpcnb.protocol.endpoint import Endpoint
from rpcnb.protocol.messages import (
    CallFunc,
    CopyFromRemote,
    CopyToRemote,
    InitServer,
    Message,
    Raised,
    Return,
    Shutdown,
    Syscall,
)
from rpcnb.protocol.peerlimits import PeerLimits
from rpcnb.runtime.environment import Environment
from rpcnb.runtime.local import LocalServingSession
from rpcnb.runtime.registry import Registry
from rpcnb.runtime.servant import Servant
from rpcnb.runtime.serving import ServingSession
from rpcnb.values import CPU, NULL, Device, Pointer, TensorMeta, dtype

EXISTS = Syscall(Code.DEV_GET_ATTR, (CPU, 0))
VOID = Return((None,))
META = TensorMeta(1, CPU, (4,), dtype("uint8"))
NEED_INIT = (
    "Check failed: (serving_session_ != nullptr) is false: "
    "Need to call InitRemoteSession first before any further actions"
)


@pytest.fixture
def loop() -> Iterator[Loop]:
    loop = Loop()
    yield loop
    loop.close()


class Noted(LocalServingSession):
    """Counts how often it is shut down."""

    shutdowns = 0

    def shutdown(self) -> None:
        self.shutdowns += 1
        super().shutdown()


# -- init ------------------------------------------------------------------------------------------------------------


def test_an_empty_init_makes_the_default_session() -> None:
    client = Client(init=None)
    assert client.ask(InitServer()) == VOID
    assert type(client.servant.session) is LocalServingSession
    assert client.local.environment is client.environment
    client.send(Shutdown())
    assert client.servant.session is None


def test_the_default_constructor_can_be_overridden_in_the_registry(registry: Registry) -> None:
    registry.register("rpc.LocalSession", Noted)
    for init in (InitServer(), InitServer(("rpc.LocalSession",))):
        client = Client(Environment(registry=registry), init=init)
        session = client.servant.session
        assert type(session) is Noted
        client.send(Shutdown())
        assert session.shutdowns == 1


def test_a_constructor_gets_its_arguments(registry: Registry) -> None:
    got: list[Any] = []

    def make(*args: Any) -> ServingSession:
        got.extend(args)
        return ServingSession()

    client = Client(Environment(registry=registry, constructors={"my.Session": make}), init=None)
    assert client.ask(InitServer(("my.Session", 1, "two", b"three", None))) == VOID
    assert got == [1, "two", b"three", None]
    client.send(Shutdown())


def test_the_name_of_a_constructor_must_be_text() -> None:
    client = Client(init=None)
    assert client.error(InitServer((5,))).text == "expected the name of a session constructor, got int"


def test_an_unknown_constructor_is_refused_with_stocks_words_and_init_can_be_retried() -> None:
    client = Client(init=None)
    text = client.error(InitServer(("no.Such",))).text
    assert text == "Check failed: (fconstructor.has_value()) is false:  Cannot find session constructor no.Such"
    assert client.ask(InitServer()) == VOID
    client.send(Shutdown())


def test_a_version_mismatch_names_both_versions_and_init_can_be_retried() -> None:
    client = Client(init=None)
    assert client.error(InitServer(version="0.7.0")).text == (
        "Check failed: client_protocol_ver == server_protocol_ver (0.7.0 vs. 0.8.0) : "
        "Server[test]: Client protocol version mismatch with the server  "
        "server protocol=0.8.0, client protocol=0.7.0"
    )
    assert client.ask(InitServer()) == VOID
    client.send(Shutdown())


def test_a_second_init_is_refused_and_the_session_stays() -> None:
    client = Client()
    session = client.servant.session
    text = client.error(InitServer()).text
    assert text == "Check failed: (serving_session_ == nullptr) is false: Server has already been initialized"
    assert client.servant.session is session
    client.send(Shutdown())


def test_a_constructor_that_returns_no_session_is_refused(registry: Registry) -> None:
    registry.register("bad", lambda: 5)

    async def also_bad() -> str:
        return "x"

    registry.register("worse", also_bad)
    loop = Loop()
    client = Client(Environment(registry=registry, spawn=loop.spawn), init=None)
    words = "need to return an RPCModule: a session; it returned"
    assert client.error(InitServer(("bad",))).text == f"Server[test]: Constructor bad {words} int"
    client.send(InitServer(("worse",)))
    loop.run()
    assert client.reply() == Raised(f"Server[test]: Constructor worse {words} str")
    assert client.ask(InitServer()) == VOID
    client.send(Shutdown())
    loop.close()


def test_a_constructor_that_raises_is_an_error(registry: Registry) -> None:
    def fail() -> None:
        raise KeyError("board")

    registry.register("fail", fail)
    client = Client(Environment(registry=registry), init=None)
    text = client.error(InitServer(("fail",))).text
    assert text == "Server[test]: Error caught from session constructor fail:\n'board'"
    assert client.ask(InitServer()) == VOID


class Opening:
    """A coroutine constructor that the test lets go on."""

    def __init__(self, loop: Loop) -> None:
        self.gate = loop.loop.create_future()
        self.session = Noted(Environment())

    async def __call__(self) -> ServingSession:
        await self.gate
        return self.session


def test_a_coroutine_constructor_parks_init_and_what_is_behind_it(loop: Loop, registry: Registry) -> None:
    opening = Opening(loop)
    registry.register("slow", opening)
    client = Client(Environment(registry=registry, spawn=loop.spawn), init=None)
    assert client.send(InitServer(("slow",)), EXISTS) == 1
    loop.run()
    assert client.chunks == []
    opening.gate.set_result(None)
    loop.run()
    assert client.reply() == VOID
    assert client.reply() == Return((1,))
    assert client.servant.session is opening.session
    client.send(Shutdown())
    assert opening.session.shutdowns == 1


def test_a_client_that_leaves_during_init_cancels_the_constructor(loop: Loop, registry: Registry) -> None:
    opening = Opening(loop)
    registry.register("slow", opening)
    client = Client(Environment(registry=registry, spawn=loop.spawn), init=None)
    client.send(InitServer(("slow",)))
    loop.run()
    client.servant.cancel()
    loop.run()
    assert opening.gate.cancelled()
    assert client.feed() == 0
    assert client.chunks == []


def test_a_session_made_after_its_client_left_is_shut_down() -> None:
    session = Noted(Environment())
    dones: list[Any] = []

    def spawn(awaitable: Any, done: Any) -> Any:
        awaitable.close()
        dones.append(done)
        return lambda: None

    async def make() -> ServingSession:
        raise AssertionError

    for over_first in (False, True):
        client = Client(Environment(spawn=spawn, constructors={"slow": make}), init=None)
        client.send(InitServer(("slow",)))
        if over_first:
            client.servant.over = True  # the connection broke, nobody has cancelled yet
        else:
            client.servant.cancel()
        for _ in range(2):
            dones[-1](session)
        assert session.shutdowns == 1 + over_first
        assert client.servant.session is None
        client.servant.cancel()
        client.servant.cancel()


# -- before init -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "request_",
    [
        CallFunc(5),
        EXISTS,
        Syscall(Code.DEV_STREAM_SYNC, (CPU, NULL)),
        CopyFromRemote(META, 4),
        CopyToRemote(META, 4, b"abcd"),
        CallFunc(5, ("x", bytes(200_000))),
    ],
)
def test_before_init_requests_are_refused_and_the_conversation_goes_on(request_: Any) -> None:
    client = Client(init=None)
    assert client.error(request_).text == NEED_INIT
    assert client.ask(InitServer()) == VOID
    assert client.ask(EXISTS) == Return((1,))
    client.send(Shutdown())


def test_shutdown_before_init_is_an_ordinary_end() -> None:
    client = Client(init=None)
    assert client.send(Shutdown()) == 0
    assert client.chunks == []


# -- requests --------------------------------------------------------------------------------------------------------


def test_a_malformed_request_is_answered_and_the_session_goes_on() -> None:
    client = Client()
    client.endpoint.send(EXISTS)
    assert client.feed(bytes.fromhex("0400000000000000 63000000")) == 1
    reply = client.reply()
    assert reply == Raised("expected a request, got code 99")
    assert client.ask(EXISTS) == Return((1,))
    client.send(Shutdown())


@pytest.mark.parametrize("extended", [False, True])
def test_forged_handles_end_the_session_after_a_hundred(extended: bool, caplog: pytest.LogCaptureFixture) -> None:
    client = Client(extended=extended)
    meta = client.tensor((4,))
    client.free_data(meta)
    for number in range(99):
        forged = (number + 1) << 40 | 5
        reply = client.error(CallFunc(forged))
        assert reply.text == f"handle {forged:#x} was never issued in this session"
        assert client.results[-1] == 1
        assert "was freed before" in client.error(CopyFromRemote(meta, 4)).text  # does not count
    client.send(CallFunc(1))
    assert isinstance(client.reply(), Raised)
    assert client.results[-1] == 0
    assert client.servant.session is None
    assert "test: session ended after too many handles that were never issued" in caplog.text
    caplog.clear()


@pytest.mark.parametrize("extended", [False, True])
def test_only_rpcnb_peers_get_class_and_traceback(extended: bool, registry: Registry) -> None:
    def outer() -> None:
        raise KeyError("k")

    registry.register("fail", outer)
    client = Client(Environment(registry=registry), extended=extended)
    reply = client.error(CallFunc(client.find("fail")))
    assert reply.text == "'k'"
    if extended:
        assert reply.type_name == "KeyError"
        assert 'raise KeyError("k")' in reply.traceback
        assert "rpcnb/runtime" not in reply.traceback
        assert client.error(CallFunc(1)).traceback == ""
    else:
        assert (reply.type_name, reply.traceback) == ("", "")
    client.send(Shutdown())


def test_an_exception_without_a_text_is_still_one_reply(registry: Registry) -> None:
    class Mute(Exception):
        def __str__(self) -> str:
            raise ValueError

    def fail() -> None:
        raise Mute

    def empty() -> None:
        raise RuntimeError

    def leave() -> None:
        raise SystemExit(3)

    for function in (fail, empty, leave):
        registry.register(function.__name__, function)
    client = Client(Environment(registry=registry))
    assert client.call_error("fail") == "Mute without a text: ValueError while making it"
    assert client.call_error("empty") == "RuntimeError"
    assert client.call_error("leave") == "3"
    client.send(Shutdown())


def test_sys_exit_in_a_callback_function_is_that_functions_failure(registry: Registry) -> None:
    def leave(done: Any) -> None:
        raise SystemExit(4)

    registry.register("leave", leave, callback=True)
    client = Client(Environment(registry=registry))
    assert client.call_error("leave") == "4"
    client.send(Shutdown())


@pytest.mark.parametrize(("kind", "leaves"), [(SystemExit, False), (KeyboardInterrupt, True)])
def test_a_session_that_exits_while_it_is_shut_down_ends_nothing(
    caplog: pytest.LogCaptureFixture, kind: type[BaseException], leaves: bool
) -> None:
    class Leaving(ServingSession):
        def shutdown(self) -> None:
            raise kind

    client = Client(Environment(local_session=Leaving))
    with pytest.raises(KeyboardInterrupt) if leaves else contextlib.nullcontext():
        client.send(Shutdown())
    assert "test: shutdown of Leaving failed" in caplog.text
    caplog.clear()


def test_a_session_that_fails_to_shut_down_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    class Stuck(ServingSession):
        def shutdown(self) -> None:
            raise OSError("stuck")

    client = Client(Environment(local_session=Stuck))
    assert client.send(Shutdown()) == 0
    assert "test: shutdown of Stuck failed" in caplog.text
    caplog.clear()


# -- other drivers ---------------------------------------------------------------------------------------------------


class Driver:
    """A servant without the event handler."""

    def __init__(self, **options: Any) -> None:
        self.routed: list[tuple[Message, str]] = []
        self.completed = 0
        self.client = Endpoint(Role.CLIENT)
        self.servant = Servant(Endpoint(Role.SERVER), options.pop("environment", Environment()), **options)

    def send(self, *messages: Any) -> None:
        for message in messages:
            for part in self.client.send(message):
                self.servant.endpoint.receive_data(part)
        self.servant.advance()

    def reply(self) -> Any:
        output = self.servant.output
        for part in output.first(100):
            self.client.receive_data(part)
        output.clear()
        return self.client.next_message()


class Wide(ServingSession):
    """Its memory is seen in items of 4 bytes, and is as long as it is."""

    def __init__(self) -> None:
        self.memory = bytearray(8)

    def direct(self, meta: TensorMeta, nbytes: int) -> memoryview:
        return memoryview(self.memory).cast("i")


def test_memory_for_the_socket_is_counted_in_bytes_and_must_have_the_size_of_the_copy() -> None:
    driver = Driver(environment=Environment(local_session=Wide))
    driver.send(InitServer())
    assert driver.reply() == VOID
    meta = META._replace(shape=(8,))
    driver.send(CopyToRemote(meta, 8, b"abcdefgh"))
    assert driver.reply() == VOID
    into = bytearray(8)
    driver.send(CopyFromRemote(meta, 8, memoryview(into)))
    driver.reply()
    assert into == b"abcdefgh"
    for request in (CopyFromRemote(meta, 4, memoryview(bytearray(4))), CopyToRemote(meta, 4, b"abcd")):
        driver.send(request)
        assert driver.reply() == Raised("Wide has 8 bytes for a copy of 4 bytes")
    driver.servant.cancel()


class Async(ServingSession):
    is_async = True


def test_a_plain_servant_refuses_an_async_session_with_stocks_words() -> None:
    driver = Driver(plain=True, environment=Environment(local_session=Async))
    driver.send(InitServer())
    assert driver.reply() == VOID
    for request in (CallFunc(1), EXISTS, CopyFromRemote(META, 4), CopyToRemote(META, 4, b"abcd")):
        driver.send(request)
        assert driver.reply() == Raised("Cannot host an async session in a non-Event driven server")
    driver.servant.cancel()


def test_a_plain_servant_serves_a_synchronous_session() -> None:
    driver = Driver(plain=True)
    driver.send(InitServer(), Syscall(Code.GET_GLOBAL_FUNC, ("rpc.test.addone",)))
    assert driver.reply() == VOID
    handle = handle_of(driver.client.next_message().values)  # type: ignore[union-attr]  # a Return
    driver.send(CallFunc(handle, (1,)))
    assert driver.reply() == Return((1, 2))
    driver.servant.cancel()


def test_calls_and_copies_within_a_device_are_offered_to_the_route(registry: Registry) -> None:
    for run in ("thread", "loop", "kernel"):
        place: Any = run
        registry.register(run, lambda: 1, run=place)
    taken: list[tuple[Message, str]] = []
    keep = [False]

    def route(message: Message, place: str) -> bool:
        taken.append((message, place))
        return keep[0]

    driver = Driver(environment=Environment(registry=registry), route=route)
    driver.send(CallFunc(1))
    assert driver.reply() == Raised(NEED_INIT)
    driver.send(InitServer())
    assert driver.reply() == VOID
    handles = {}
    for name in ("thread", "loop", "kernel", "testing.echo", "ffi.Shape"):
        driver.send(Syscall(Code.GET_GLOBAL_FUNC, (name,)))
        handles[name] = handle_of(driver.reply().values)
    assert taken == []
    for name in handles:
        driver.send(CallFunc(handles[name]))
        assert isinstance(driver.reply(), (Return, Raised))
    assert [place for _, place in taken] == ["thread", "loop", "kernel", "thread"]
    driver.send(Syscall(Code.COPY_AMONG_REMOTE, (META, META, NULL)))
    assert taken[-1][1] == "thread"
    assert isinstance(driver.reply(), Raised)
    keep[0] = True
    call = CallFunc(handles["thread"])
    driver.send(call, EXISTS)
    assert driver.reply() is None
    driver.servant.running = driver.servant.describe(taken[-1][0])
    driver.servant.advance()
    assert driver.reply() is None
    driver.servant.perform(taken[-1][0])
    driver.servant.running = None
    driver.servant.advance()
    assert driver.reply() == Return((1, 1))
    assert driver.client.next_message() == Return((1,))
    driver.servant.cancel()


def quickly(client: Client, data: bytes) -> tuple[bytes, int]:
    """What the short way makes of bytes: replies, and how many bytes it has served."""
    with client.servant.entered():
        return client.servant.call_quickly(memoryview(data), len(data))


def short(client: Client, handle: int, *args: Any) -> bytes:
    """What the short way makes of a call; nothing if it leaves it to the general way."""
    data = packet(CallFunc(handle, args))
    reply, served = quickly(client, data)
    assert served in (0, len(data))
    return reply


def test_the_short_way_keeps_to_what_the_client_takes(registry: Registry) -> None:
    registry.register("text", lambda n: "x" * n)
    client = Client(Environment(registry=registry))
    client.servant.endpoint.takes = PeerLimits(text=1000, bytes=1000)
    handle = client.find("text")
    data = packet(CallFunc(handle, (1001,)))
    assert quickly(client, data) == (b"", len(data))
    output = b"".join(bytes(part) for part in client.servant.output.first(10))
    assert b"the text result of 1001 bytes exceeds the client's text=1000" in output
    client.servant.output.clear()
    client.send(Shutdown())


def test_the_short_way_answers_plain_calls_with_the_same_bytes(registry: Registry) -> None:
    registry.register("root", lambda: rpcnb.workpath())
    client = Client(Environment(registry=registry))
    addone, echo = client.find("rpc.test.addone"), client.find("testing.echo")
    assert short(client, addone, 41) == packet(Return((1, 42)))
    assert short(client, echo) == packet(Return((0, None)))
    assert short(client, client.find("root")).endswith(str(client.local.files.root).encode())
    assert client.servant.running is None
    assert not client.servant.output
    client.send(Shutdown())


def test_the_short_way_answers_other_results_and_errors_too(registry: Registry) -> None:
    def leave() -> None:
        raise SystemExit(3)

    registry.register("bytes", lambda: b"x")
    registry.register("huge", lambda: 1 << 64)
    registry.register("no_device", lambda: Device(1 << 40))
    registry.register("leave", leave)
    client = Client(Environment(registry=registry))
    expected = (
        ("bytes", Return((12, b"x"))),
        ("huge", Raised("the int result of 65 bits does not fit the wire's 64 signed bits")),
        ("no_device", Raised("'i' format requires -2147483648 <= number <= 2147483647")),
        ("leave", Raised("3")),
    )
    for name, reply in expected:
        data = packet(CallFunc(client.find(name)))
        assert quickly(client, data) == (b"", len(data))
        output = client.servant.output
        assert b"".join(output.first(9)) == packet(reply)
        output.clear()
    client.send(Shutdown())


def test_the_short_way_keeps_the_order_of_replies_of_all_kinds(registry: Registry) -> None:
    client = Client(Environment(registry=registry))
    addone, echo = client.find("rpc.test.addone"), client.find("testing.echo")
    registry.register("bytes", lambda: b"x")
    calls = packet(CallFunc(addone, (1,)), CallFunc(client.find("bytes")), CallFunc(echo, (2,)))
    assert quickly(client, calls) == (b"", 28 + 8 + 24)
    assert b"".join(client.servant.output.first(9)) == packet(Return((1, 2)), Return((12, b"x")))
    client.servant.output.clear()
    client.send(Shutdown())


def test_the_short_way_serves_many_calls_at_once_and_stops_at_what_is_not_plain(registry: Registry) -> None:
    client = Client(Environment(registry=registry))
    addone = client.find("rpc.test.addone")
    calls = packet(*(CallFunc(addone, (number,)) for number in range(5)))
    replies = packet(*(Return((1, number + 1)) for number in range(5)))
    assert quickly(client, calls) == (replies, len(calls))
    assert quickly(client, calls + calls[:30]) == (replies, len(calls))
    assert quickly(client, bytes(8) + calls) == (b"", 0)
    other = packet(CallFunc(addone, (b"x",)))
    assert quickly(client, calls + other + calls) == (replies, len(calls))
    assert quickly(client, b"12345678") == (b"", 0)
    client.send(Shutdown())


def test_the_short_way_does_not_hold_replies_back(registry: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    registry.register("long", lambda: "x" * 256)
    client = Client(Environment(registry=registry))
    addone, long = client.find("rpc.test.addone"), client.find("long")
    calls = packet(*(CallFunc(addone, (number,)) for number in range(5)))
    times = iter((1.0, 1.0001, 2.0))
    monkeypatch.setattr(time, "monotonic", lambda: next(times))
    replies, served = quickly(client, calls)  # the third call took a second
    monkeypatch.setattr(time, "monotonic", lambda: 5.0)
    assert (replies, served) == (packet(*(Return((1, number + 1)) for number in range(3))), 3 * len(calls) // 5)
    calls = packet(*[CallFunc(long)] * 300)
    replies, served = quickly(client, calls)
    assert 0 < served < len(calls)
    assert 1 << 16 <= len(replies) < 70_000
    client.send(Shutdown())


def test_the_short_way_leaves_everything_else_to_the_general_one(registry: Registry) -> None:
    async def coroutine() -> None: ...

    registry.register("coroutine", coroutine)
    registry.register("loop", len, run="loop")
    client = Client(Environment(registry=registry))
    addone, thing = client.find("rpc.test.addone"), handle_of(client.call("ffi.Shape", 1))
    for handle in (client.find("coroutine"), client.find("loop"), thing, 5):
        assert not short(client, handle)
    assert not short(client, addone, b"bytes")
    client.servant.cancel()  # in another thread, just now
    assert not short(client, addone, 1)


def test_the_short_way_is_silent_once_the_session_is_over(registry: Registry) -> None:
    client = Client(Environment(registry=registry))
    registry.register("end", lambda: client.servant.cancel())
    data = packet(CallFunc(client.find("end")))
    assert quickly(client, data) == (b"", len(data))


@pytest.mark.parametrize("name", ["call", "async_call", "encode_return", "placement"])
def test_a_subclass_that_overrides_calling_is_never_passed_by(name: str) -> None:
    def overridden(self: Any, *args: Any) -> Any:
        return getattr(LocalServingSession, name)(self, *args)

    client = Client(Environment(local_session=type("Sub", (LocalServingSession,), {name: overridden})))
    handle = client.find("rpc.test.addone")
    assert not short(client, handle, 1)
    assert client.call(handle, 1) == (1, 2)
    client.send(Shutdown())
    assert not short(Client(init=None), handle, 1)


def test_the_short_way_after_the_end_says_nothing(registry: Registry) -> None:
    clients: list[Client] = []

    def end() -> int:
        clients[0].servant.cancel()
        return 1

    def end_large() -> bytes:
        clients[0].servant.cancel()
        return b"x"

    registry.register("end", end)
    registry.register("end_large", end_large)
    for name in ("end", "end_large"):
        clients[:] = [Client(Environment(registry=registry))]
        handle = clients[0].find(name)
        assert not short(clients[0], handle)
        assert not clients[0].servant.output


def test_requests_are_described_for_people() -> None:
    client = Client()
    handle = client.find("rpc.test.addone")
    meta = client.tensor((4,))
    describe = client.servant.describe
    assert describe(CallFunc(handle)) == "rpc.test.addone"
    assert describe(CallFunc(meta.data)) == "call"
    assert describe(CallFunc(1)) == "call"
    assert describe(EXISTS) == "DEV_GET_ATTR"
    assert describe(CopyFromRemote(meta, 4)) == "CopyFromRemote"
    client.send(Shutdown())


def test_a_driver_without_callbacks_is_told_nothing(registry: Registry) -> None:
    dones: list[Any] = []
    registry.register("later", dones.append, callback=True)
    driver = Driver(environment=Environment(registry=registry))
    driver.send(InitServer(), Syscall(Code.GET_GLOBAL_FUNC, ("later",)))
    driver.reply()
    handle = handle_of(driver.client.next_message().values)  # type: ignore[union-attr]  # a Return
    driver.send(CallFunc(handle))
    assert driver.servant.parked is not None
    assert driver.servant.parked.name == "later"
    dones[0](1)
    assert driver.reply() == Return((1, 1))
    driver.servant.cancel()
    driver.servant.cancel()


def test_a_completion_in_another_thread_before_the_request_parks_counts(registry: Registry) -> None:
    def at_once(done: Any) -> None:
        thread = threading.Thread(target=done, args=(5,))
        thread.start()
        thread.join()

    registry.register("at_once", at_once, callback=True)
    client = Client(Environment(registry=registry))
    assert client.call("at_once") == (1, 5)
    assert client.servant.parked is None
    client.send(Shutdown())


def test_a_stale_pointer_to_free_is_an_error_and_null_is_ignored() -> None:
    client = Client()
    assert client.ask(Syscall(Code.FREE_HANDLE, (NULL,))) == VOID
    assert client.ask(Syscall(Code.FREE_HANDLE, (None,))) == VOID
    assert "never issued" in client.error(Syscall(Code.FREE_HANDLE, (Pointer(9),))).text
    assert client.feed(packet(Shutdown()), BOTH) == 0


def test_a_full_server_says_so_at_init_and_ends() -> None:
    endpoint, client = Endpoint(Role.SERVER), Endpoint(Role.CLIENT)
    servant = Servant(endpoint, Environment(), refusal="server is full")
    endpoint.receive_data(b"".join(client.send(InitServer())))
    servant.advance()
    assert servant.over
    client.receive_data(b"".join(servant.output.first(9)))
    assert client.next_message() == Raised("server is full")
    servant.cancel()


def test_a_turn_is_bounded_where_there_is_a_route(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = itertools.count(step=0.0001)  # seconds, one step a look
    monkeypatch.setattr("rpcnb.runtime.servant.time", SimpleNamespace(monotonic=lambda: next(clock)))
    driver = Driver(route=lambda message, place: False)
    driver.send(InitServer())
    driver.reply()
    burst = packet(*[Syscall(Code.DEV_SET_DEVICE, (CPU,))] * 700)
    driver.servant.endpoint.receive_data(burst)
    driver.servant.advance()
    assert driver.servant.more
    assert 0 < driver.servant.output.size <= 20 * 20  # 2 ms
    turns = 1
    while driver.servant.more:
        driver.servant.advance()
        turns += 1
    assert turns >= 35
    assert driver.servant.output.size == 700 * 20
    driver.servant.cancel()


@pytest.mark.parametrize("kind", ["plain", "callback"])
def test_an_interrupt_of_the_main_thread_is_answered_and_goes_on(registry: Registry, kind: str) -> None:
    def interrupted(*args: Any) -> None:
        raise KeyboardInterrupt

    registry.register("interrupted", interrupted, callback=kind == "callback")
    driver = Driver(environment=Environment(registry=registry))
    driver.send(InitServer(), Syscall(Code.GET_GLOBAL_FUNC, ("interrupted",)))
    driver.reply()
    handle = handle_of(driver.client.next_message().values)  # type: ignore[union-attr]  # a Return
    with pytest.raises(KeyboardInterrupt):
        driver.send(CallFunc(handle))
    assert driver.reply() == Raised("KeyboardInterrupt")
    driver.servant.cancel()


@pytest.mark.parametrize(("code", "status"), [(None, 0), (7, 7), ("text", 1)])
def test_a_child_that_a_function_has_forked_ends_where_it_leaves_it(
    registry: Registry, monkeypatch: pytest.MonkeyPatch, code: Any, status: int
) -> None:
    class Ended(BaseException):
        pass

    def end(found: int) -> None:
        ended.append(found)
        raise Ended

    def leave() -> None:
        monkeypatch.setattr(os, "getpid", lambda: -1)  # as in a child
        raise SystemExit(code)

    ended: list[int] = []
    monkeypatch.setattr(os, "_exit", end)
    registry.register("leave", leave)
    client = Client(Environment(registry=registry))
    handle = client.find("leave")
    with pytest.raises(Ended):
        client.send(CallFunc(handle))
    assert ended == [status]
