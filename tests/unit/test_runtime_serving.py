"""The interface of serving sessions, and what a registered function sees of its session."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from runtime_wire import Client, Loop, Outcome

import rpcnb
from rpcnb.errors import InvalidHandle, ResultError
from rpcnb.protocol.codes import Code
from rpcnb.protocol.messages import (
    CallFunc,
    CopyAck,
    CopyFromRemote,
    CopyToRemote,
    Raised,
    Return,
    Shutdown,
    Syscall,
)
from rpcnb.runtime.completion import Callback
from rpcnb.runtime.environment import Environment
from rpcnb.runtime.local import current_session, workpath
from rpcnb.runtime.registry import Registry
from rpcnb.runtime.served import Module
from rpcnb.runtime.serving import ServingSession
from rpcnb.values import CPU, NULL, DType, Pointer, TensorMeta, Value, dtype

VOID, NULL_RESULT = Return((None,)), Return((NULL,))
META = TensorMeta(9, CPU, (4,), dtype("uint8"))
NEVER = "handle 0x9 was never issued in this session"


@pytest.fixture
def loop() -> Iterator[Loop]:
    loop = Loop()
    yield loop
    loop.close()


@pytest.mark.parametrize(
    ("request_", "reply"),
    [
        (Syscall(Code.GET_GLOBAL_FUNC, ("f",)), NULL_RESULT),
        (CallFunc(9), Raised(NEVER)),
        (CallFunc(9, ("x", bytes(100_000))), Raised(NEVER)),
        (Syscall(Code.FREE_HANDLE, (Pointer(9),)), VOID),
        (Syscall(Code.DEV_SET_DEVICE, (CPU,)), VOID),
        (Syscall(Code.DEV_GET_ATTR, (CPU, 0)), VOID),
        (Syscall(Code.DEV_ALLOC_DATA, (CPU, 4, 64, DType(0, 8))), Raised("session ServingSession allocates no memory")),
        (
            Syscall(Code.DEV_ALLOC_DATA_WITH_SCOPE, (META, None)),
            Raised("session ServingSession allocates no memory"),
        ),
        (Syscall(Code.DEV_FREE_DATA, (CPU, Pointer(9))), VOID),
        (CopyFromRemote(META, 4), Raised(NEVER)),
        (CopyToRemote(META, 4, b"abcd"), Raised(NEVER)),
        (Syscall(Code.COPY_AMONG_REMOTE, (META, META, NULL)), Raised(NEVER)),
        (Syscall(Code.DEV_CREATE_STREAM, (CPU,)), NULL_RESULT),
        (Syscall(Code.DEV_FREE_STREAM, (CPU, NULL)), VOID),
        (Syscall(Code.DEV_SET_STREAM, (CPU, NULL)), VOID),
        (Syscall(Code.DEV_GET_CURRENT_STREAM, (CPU,)), NULL_RESULT),
        (Syscall(Code.DEV_STREAM_SYNC, (CPU, NULL)), VOID),
    ],
)
def test_the_base_session_refuses_or_does_nothing(request_: Any, reply: Any) -> None:
    client = Client(Environment(local_session=ServingSession))
    assert client.ask(request_) == reply
    assert client.ask(Syscall(Code.DEV_GET_ATTR, (CPU, 0))) == VOID
    client.send(Shutdown())


class Small(ServingSession):
    """Overrides synchronous methods only."""

    def __init__(self) -> None:
        self.data = bytearray(4)

    def call(self, handle: int, args: tuple[Value, ...]) -> tuple[Value, ...]:
        return (1, handle + len(args))

    def copy_to_remote(self, data: memoryview, meta: TensorMeta, nbytes: int) -> None:
        self.data[:] = data

    def copy_from_remote(self, meta: TensorMeta, into: memoryview, nbytes: int) -> None:
        into[:] = self.data


def test_synchronous_methods_serve_the_asynchronous_points() -> None:
    client = Client(Environment(local_session=Small))
    assert client.ask(CallFunc(5, (1, 2))) == Return((1, 7))
    assert client.write(META, b"abcd") == VOID
    assert client.read(META) == b"abcd"
    assert client.servant.session is not None
    assert client.servant.session.placement(CallFunc(1)) == "any"
    client.send(Shutdown())


# -- inside a registered function ------------------------------------------------------------------------------------


def test_workpath_is_in_the_calling_sessions_directory(loop: Loop, registry: Registry) -> None:
    sessions: list[Any] = []

    def plain(name: str) -> str:
        sessions.append(current_session())
        return workpath(name)

    async def coroutine(name: str) -> str:
        return plain(name)

    def callback(done: Callback, name: str) -> None:
        done(plain(name))

    registry.register("plain", plain)
    registry.register("coroutine", coroutine)
    registry.register("callback", callback, callback=True)
    clients = [Client(Environment(registry=registry, spawn=loop.spawn)) for _ in range(2)]
    for client in clients:
        root = str(client.local.files.root)
        for name in ("plain", "coroutine", "callback"):
            client.send(CallFunc(client.find(name), ("a",)))
            loop.run()
            assert client.reply() == Return((65, f"{root}/a"))
            assert sessions.pop() is client.local
        assert "is refused" in client.call_error("plain", "../a")
    assert current_session() is None
    for client in clients:
        client.send(Shutdown())


def test_workpath_outside_a_call_says_where_it_works() -> None:
    with pytest.raises(LookupError, match=r"workpath\(\) works inside a registered function that a session is calling"):
        rpcnb.workpath("x")


# -- Callback --------------------------------------------------------------------------------------------------------


def test_a_callback_encodes_its_result_once_somebody_waits() -> None:
    done = Outcome()
    callback = Callback(done, lambda value: (1, value))
    callback(5)
    assert done.results == [(1, 5)]
    done.cancelled = True
    assert callback.cancelled
    callback(6)
    assert done.results == [(1, 5)]
    assert [str(error) for error in done.errors] == ["nobody waits for the result any more"]


def test_a_callback_turns_what_cannot_be_encoded_and_texts_into_errors() -> None:
    def refuse(value: Any) -> Any:
        raise ResultError("no")

    done = Outcome()
    callback = Callback(done, refuse)
    callback(object())
    callback.error("text")
    callback.error(KeyError("k"))
    assert [(type(error).__name__, str(error)) for error in done.errors] == [
        ("ResultError", "no"),
        ("RuntimeError", "text"),
        ("KeyError", "'k'"),
    ]


# -- Module ----------------------------------------------------------------------------------------------------------


def test_a_module_finds_functions_in_its_imports_when_asked() -> None:
    child, grandchild, other = Module({"a": len}), Module({"b": max}), Module()
    module = Module({"c": min}, kind="demo")
    module.import_module(other)
    module.import_module(child)
    child.import_module(grandchild)
    assert module.kind == "demo"
    assert module.get_function("a") is None
    assert [module.get_function(name, True) for name in "abcd"] == [len, max, min, None]


def test_the_base_sessions_synchronous_methods_raise() -> None:
    session = ServingSession()
    with pytest.raises(InvalidHandle, match="never issued"):
        session.call(1, ())
    assert session.sink_for(1, (), 5) is None
    assert session.send_exception(ValueError("x")) == Raised("x", "ValueError", "")


def test_an_empty_read_is_an_empty_ack() -> None:
    client = Client()
    assert client.ask(CopyFromRemote(client.tensor((0,)), 0, memoryview(b""))) == CopyAck()
    client.send(Shutdown())
