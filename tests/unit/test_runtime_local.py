"""The serving session of this process: values both ways, handles, coroutine and callback functions."""

from __future__ import annotations

import asyncio
import contextvars
import enum
import sys
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from runtime_wire import Client, Loop, function_of, handle_of, module_of, object_of

import rpcnb
from rpcnb.errors import DeviceError
from rpcnb.protocol.codes import Code
from rpcnb.protocol.messages import CallFunc, Raised, Return, Shutdown, Syscall
from rpcnb.runtime.devices import DeviceTensor
from rpcnb.runtime.environment import Environment
from rpcnb.runtime.local import LocalServingSession
from rpcnb.runtime.registry import Registry
from rpcnb.runtime.served import Module, ServedFunction, Shape
from rpcnb.values import CPU, NULL, Device, DType, FunctionRef, ModuleRef, ObjectRef, Pointer, TensorMeta, dtype

VOID = Return((None,))


@pytest.fixture
def loop() -> Iterator[Loop]:
    loop = Loop()
    yield loop
    loop.close()


@pytest.fixture
def client(registry: Registry, loop: Loop) -> Iterator[Client]:
    client = Client(Environment(registry=registry, spawn=loop.spawn))
    yield client
    client.send(Shutdown())


def give(client: Client, value: Any) -> tuple[Any, ...]:
    """What a function's result becomes on the wire."""
    client.environment.registry.register("give", lambda: value, override=True)
    return client.call("give")


def seen(client: Client, value: Any) -> Any:
    """What a function gets for an argument."""
    got: list[Any] = []
    client.environment.registry.register("see", got.append, override=True)
    assert client.call("see", value) == (0, None)
    return got[0]


# -- arguments -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "value",
    [
        None,
        True,
        -(1 << 63),
        (1 << 63) - 1,
        1.5,
        float("inf"),
        "",
        "seven77",
        "eight888",
        "with\0nul",
        "ü" * 5000,
        b"",
        b"1234567",
        b"12345678",
        DType(2, 32, 4),
        Device(2, 1),
        Pointer(1 << 63),
        NULL,
    ],
)
def test_plain_arguments_arrive_as_they_are(client: Client, value: Any) -> None:
    got = seen(client, value)
    assert got == value
    assert type(got) is type(value)


def test_plain_and_other_arguments_mix(client: Client) -> None:
    got: list[Any] = []
    client.environment.registry.register("all", lambda *args: got.extend(args))
    meta = client.tensor((2,), "int16")
    thing = object()
    ref = object_of(give(client, thing))
    client.call("all", 1, meta, "x", ref)
    assert (got[0], got[1].shape, got[2], got[3] is thing) == (1, (2,), "x", True)


def test_a_function_argument_can_be_called(client: Client) -> None:
    ref = function_of(client.call("rpc.test.add_to_lhs", 10))
    assert seen(client, ref)(5) == 15


def test_a_module_argument_is_the_module(client: Client) -> None:
    module = Module()
    assert seen(client, module_of(give(client, module))) is module


@pytest.mark.parametrize("thing", [object(), [1, "a"], (1,), {"a": 1}, {1}, Shape((1, 2)), ValueError("x"), int])
def test_an_object_comes_back_as_the_original_object(client: Client, thing: Any) -> None:
    assert seen(client, object_of(give(client, thing))) is thing


@pytest.mark.parametrize(
    ("argument", "text"),
    [
        (FunctionRef(5), "handle 0x5 was never issued in this session"),
        (ModuleRef(5), "handle 0x5 was never issued in this session"),
        (ObjectRef(5), "handle 0x5 was never issued in this session"),
        (TensorMeta(5, CPU, (1,), dtype("int8")), "handle 0x5 was never issued in this session"),
    ],
)
def test_an_argument_that_was_never_issued_is_refused(client: Client, argument: Any, text: str) -> None:
    assert client.call_error("testing.echo", argument) == text
    assert client.call("testing.echo", 1) == (1, 1)


def test_a_handle_of_the_wrong_kind_is_refused_by_name(client: Client) -> None:
    thing, function = handle_of(give(client, object())), client.find("testing.echo")
    for argument, text in (
        (FunctionRef(thing), f"handle {thing:#x} is a object; expected a function"),
        (ModuleRef(thing), f"handle {thing:#x} is a object; expected a module"),
        (ObjectRef(function), f"handle {function:#x} is a function; expected a object"),
    ):
        assert client.call_error(function, argument) == text
    assert client.error(CallFunc(thing)).text == f"handle {thing:#x} is a object; expected a function"
    free = Syscall(Code.DEV_FREE_DATA, (CPU, Pointer(thing)))
    assert client.error(free).text == f"handle {thing:#x} is a object; expected a data"
    meta = client.tensor((1,))
    assert "is a data; expected a function or module or object or tensor" in client.free(meta.data).text
    assert client.call(function, 1) == (1, 1)


def test_handles_of_another_session_are_refused(client: Client) -> None:
    other = Client()
    foreign = other.find("testing.echo")
    assert client.error(CallFunc(foreign)).text == f"handle {foreign:#x} was never issued in this session"
    assert client.call("testing.echo", 1) == (1, 1)
    other.send(Shutdown())


def test_freed_handles_are_told_from_invented_ones(client: Client) -> None:
    echo = client.find("testing.echo")
    assert client.find("testing.echo") == echo
    assert client.free(echo) == VOID
    assert client.call(echo, 2) == (1, 2)
    assert client.free(echo) == VOID
    text = f"handle {echo:#x} was freed before"
    assert client.error(CallFunc(echo)).text == text
    assert client.free(echo).text == text
    assert not client.local.table.exhausted


# -- results ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "wire"),
    [
        (None, (0, None)),
        (5, (1, 5)),
        (-(1 << 63), (1, -(1 << 63))),
        (True, (2, True)),
        (2.5, (3, 2.5)),
        (Pointer((1 << 64) - 1), (4, Pointer((1 << 64) - 1))),
        (dtype("float32x4"), (5, DType(2, 32, 4))),
        (Device(2, 1), (6, Device(2, 1))),
        ("1234567", (11, "1234567")),
        ("12345678", (65, "12345678")),
        ("üüüü", (65, "üüüü")),
        ("a\0b", (11, "a\0b")),
        (b"1234567", (12, b"1234567")),
        (bytearray(b"12345678"), (66, b"12345678")),
        (memoryview(b"x"), (12, b"x")),
        (np.int8(-3), (1, -3)),
        (np.uint64(7), (1, 7)),
        (np.float32(0.5), (3, 0.5)),
        (np.float64(0.5), (3, 0.5)),
        (np.longdouble(0.5), (3, 0.5)),
        (np.bool_(True), (2, True)),
        (np.str_("ab"), (11, "ab")),
        (np.bytes_(b"ab"), (12, b"ab")),
        (ml_dtypes.bfloat16(0.5), (3, 0.5)),
        (ml_dtypes.int4(-3), (1, -3)),
    ],
)
def test_plain_results_travel_as_stock_writes_them(client: Client, value: Any, wire: tuple[Any, ...]) -> None:
    got = give(client, value)
    assert got == wire
    assert type(got[1]) is type(wire[1])


class Number(int):
    pass


class Real(float):
    pass


class Text(str):
    pass


def test_subclasses_of_plain_types_travel_as_these(client: Client) -> None:
    assert give(client, Number(5)) == (1, 5)
    assert give(client, Real(0.5)) == (3, 0.5)
    assert give(client, Text("x")) == (11, "x")


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (1 << 63, "the int result of 64 bits does not fit the wire's 64 signed bits"),
        (np.uint64((1 << 64) - 1), "the int result of 64 bits does not fit the wire's 64 signed bits"),
        ("\ud800", "the text result is not Unicode (surrogates not allowed)"),
        (np.array([object()]), "an array of type object has no counterpart on the wire"),
        (np.array(["x"]), "an array of type <U1 has no counterpart on the wire"),
    ],
)
def test_a_result_without_a_wire_form_is_one_clear_error(client: Client, value: Any, text: str) -> None:
    client.environment.registry.register("give", lambda: value)
    assert client.call_error("give") == text
    assert client.call("testing.echo", 1) == (1, 1)


@pytest.mark.parametrize(
    ("value", "index"),
    [
        (Shape((1,)), 69),
        ([1], 71),
        ((1,), 71),
        ({}, 72),
        (object(), 74),
        (int, 74),
        (1j, 74),
        (np.complex64(1j), 74),
        (np.datetime64("2020-01-01"), 74),
        (np.dtype("f4"), 74),
        (len, 68),
        (Module(), 73),
    ],
)
def test_other_results_are_handles_under_stocks_type_index(client: Client, value: Any, index: int) -> None:
    got = give(client, value)
    assert got[0] == index
    assert handle_of(got) != 0


def test_an_enum_without_a_base_that_travels_is_no_result(client: Client) -> None:
    class Colour(enum.Enum):
        RED = 1

    client.environment.registry.register("give", lambda: Colour.RED)
    assert client.call_error("give") == ("the result is a member of the enum Colour, which cannot travel; pass .value")


def test_an_array_of_a_subclass_is_a_plain_result_and_a_masked_one_is_refused(client: Client) -> None:
    class Own(np.ndarray[Any, Any]):
        pass

    for array in (
        np.array([[1.0, 2.0]]).view(np.matrix),
        np.ma.masked_array([[1.0, 2.0]]),
        np.array([[1.0, 2.0]]).view(Own),
    ):
        index, meta, _ = give(client, array)
        assert (index, meta.shape) == (70, (1, 2))
        assert np.frombuffer(client.read(meta)).tolist() == [1.0, 2.0]
    client.environment.registry.register("give", lambda: np.ma.masked_array([1.0], mask=[True]), override=True)
    assert "pass .filled(value)" in client.call_error("give")


def test_equal_objects_give_equal_handles_counted(client: Client) -> None:
    thing = object()
    client.environment.registry.register("same", lambda: thing)
    first = handle_of(client.call("same"))
    assert handle_of(client.call("same")) == first
    client.free(first)
    assert seen(client, ObjectRef(first)) is thing
    client.free(first)
    assert "was freed before" in client.call_error("testing.echo", ObjectRef(first))


def test_function_results_can_be_called(client: Client, loop: Loop) -> None:
    async def twice(x: int) -> int:
        await asyncio.sleep(0)
        return 2 * x

    plain = handle_of(give(client, lambda x: x + 1))
    assert client.call(plain, 1) == (1, 2)
    later = handle_of(give(client, twice))
    client.send(CallFunc(later, (21,)))
    loop.run()
    assert client.reply() == Return((1, 42))
    served = ServedFunction("served", len)
    assert client.call(handle_of(give(client, served)), "abc") == (1, 3)


class CallableObject:
    def __call__(self) -> int:
        return 4


def test_a_callable_object_is_a_function_result(client: Client) -> None:
    assert client.call(handle_of(give(client, CallableObject()))) == (1, 4)


@pytest.mark.parametrize(
    "array",
    [
        np.arange(6, dtype="<i4").reshape(2, 3),
        np.arange(6, dtype=">i4").reshape(2, 3),
        np.arange(12, dtype="<f8").reshape(3, 4).T,
        np.arange(10, dtype="<i2")[::3],
        np.array(5.0),
        np.zeros((0, 3), "<f4"),
        np.array([True, False]),
        np.array([1, 2, 3]).astype(ml_dtypes.bfloat16),
        np.array([1, -2, 3]).astype(ml_dtypes.int4),
        np.array([1j]),
        np.frombuffer(b"abcd", np.uint8),
    ],
)
def test_array_results_are_tensors_with_memory_of_their_own_handle(client: Client, array: np.ndarray[Any, Any]) -> None:
    index, meta, handle = give(client, array)
    assert (index, meta.shape, meta.device) == (70, array.shape, CPU)
    assert client.local.tensor(meta).numpy().tolist() == array.tolist()
    if meta.nbytes:
        assert len(client.read(meta)) == meta.nbytes
    assert client.free(handle) == VOID
    assert len(client.local.table) == 1  # the function
    assert "was freed before" in client.call_error("testing.echo", meta)


def test_a_writable_array_result_is_the_functions_own_memory(client: Client) -> None:
    array = np.zeros(4, np.uint8)
    _, meta, _ = give(client, array)
    client.write(meta, b"\1\2\3\4")
    assert array.tolist() == [1, 2, 3, 4]
    _, view, _ = give(client, DeviceTensor(client.local.tensor(meta).memory, (2,), dtype("uint8"), 2))
    assert view.byte_offset == 2
    assert client.read(view) == b"\3\4"


def test_a_read_only_array_result_is_copied(client: Client) -> None:
    array = np.frombuffer(b"abcd", np.uint8)
    _, meta, _ = give(client, array)
    client.write(meta, b"1234")
    assert array.tobytes() == b"abcd"


def test_a_tensor_whose_data_was_freed_wrongly_is_a_clear_error(client: Client) -> None:
    _, meta, handle = give(client, np.zeros(4))
    assert client.free_data(meta) == VOID
    assert "was freed before" in client.free(handle).text


# -- errors ----------------------------------------------------------------------------------------------------------


def fail(kind: str) -> None:
    raise {"KeyError": KeyError("k"), "ValueError": ValueError("abc")}[kind]


def test_errors_carry_stocks_text_and_for_rpcnb_peers_the_traceback(registry: Registry) -> None:
    registry.register("fail", fail)
    stock, ours = Client(Environment(registry=registry)), Client(Environment(registry=registry), extended=True)
    assert stock.call_error("fail", "KeyError") == "'k'"
    assert stock.call_error("fail", "ValueError") == "abc"
    reply = ours.error(CallFunc(ours.find("fail"), ("ValueError",)))
    assert (reply.text, reply.type_name) == ("abc", "ValueError")
    assert __file__ in reply.traceback
    assert "in fail" in reply.traceback
    assert "rpcnb/runtime" not in reply.traceback
    missing = ours.error(CallFunc(ours.find("fail")))
    assert missing.type_name == "TypeError"
    assert missing.traceback == ""
    for client in (stock, ours):
        client.send(Shutdown())


# -- looking functions up --------------------------------------------------------------------------------------------


def test_an_unknown_function_is_null_and_no_exception(client: Client) -> None:
    assert client.find("no.such") == 0
    assert client.ask(Syscall(Code.GET_GLOBAL_FUNC, ("no.such",))) == Return((NULL,))


def test_a_replaced_function_is_found_anew_while_the_old_handle_lives_on(
    client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=lambda: None))  # remote cells make a shell
    registry = client.environment.registry
    registry.register("f", lambda: 1)
    old = client.find("f")
    registry.register("f", lambda: 2, override=True)
    new = client.find("f")
    assert (client.call(old), client.call(new)) == ((1, 1), (1, 2))
    registry.remove("f")
    assert client.find("f") == 0
    assert client.call(new) == (1, 2)


def test_a_registered_function_overrides_a_well_known_one(client: Client) -> None:
    assert client.call("rpc.test.addone", 1) == (1, 2)
    client.environment.registry.register("rpc.test.addone", lambda x: x + 100)
    assert client.call("rpc.test.addone", 1) == (1, 101)


def test_placement_follows_registration_and_the_servers_default(registry: Registry) -> None:
    async def coroutine() -> None: ...

    registry.register("default", len)
    registry.register("loop", len, run="loop")
    registry.register("coroutine", coroutine, run="thread")
    client = Client(Environment(registry=registry, default_run="kernel"))
    places = {name: client.local.placement(CallFunc(client.find(name))) for name in registry.names()}
    assert places == {"default": "kernel", "loop": "loop", "coroutine": "loop"}
    assert client.local.placement(CallFunc(5)) == "any"
    client.send(Shutdown())


def test_the_browsers_async_convention_is_served(client: Client) -> None:
    held: list[Any] = []

    def legacy(*args: Any) -> None:
        held.extend(args)

    client.environment.registry.register("__async.slow", legacy)
    client.environment.registry.register("__async.plain", legacy)
    client.environment.registry.register("plain", lambda: "plain wins")
    assert client.call("plain")[1] == "plain wins"
    for code, value, reply in ((4, 42, Return((1, 42))), (5, "no luck", Raised("no luck"))):
        client.send(CallFunc(client.find("slow"), (1, 2)))
        assert client.reply() is None
        one, two, callback = held
        held.clear()
        assert (one, two) == (1, 2)
        callback(code, value)
        callback(code, value)
        assert client.reply() == reply
        assert client.reply() is None


# -- coroutine and callback functions --------------------------------------------------------------------------------


def test_a_coroutine_that_fails_is_one_error(client: Client, loop: Loop) -> None:
    async def fails() -> None:
        await asyncio.sleep(0)
        raise KeyError("k")

    async def wants(argument: int) -> None: ...

    client.environment.registry.register("fails", fails)
    client.environment.registry.register("wants", wants)
    client.send(CallFunc(client.find("fails")))
    assert client.reply() is None
    loop.run()
    assert client.reply() == Raised("'k'")
    assert "missing 1 required positional argument" in client.call_error("wants")
    assert client.local._running == set()


def test_a_cancelled_coroutine_is_told_and_leaves_nothing_running(client: Client, loop: Loop) -> None:
    ended: list[str] = []

    async def waits() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            ended.append("ended")

    client.environment.registry.register("waits", waits)
    client.send(CallFunc(client.find("waits")))
    loop.run()
    session = client.local
    assert len(session._running) == 1
    client.servant.cancel()
    loop.run()
    assert ended == ["ended"]
    assert session._running == set()
    session.shutdown()


def test_a_coroutine_that_ends_before_it_is_noted_leaves_nothing_running(registry: Registry) -> None:
    async def quick() -> int:
        return 3

    def eager(awaitable: Any, done: Any) -> Any:
        assert not done.cancelled
        with pytest.raises(StopIteration) as end:
            awaitable.send(None)
        done(end.value.value)
        return lambda: None

    registry.register("quick", quick)
    client = Client(Environment(registry=registry, spawn=eager))
    assert client.call("quick") == (1, 3)
    assert client.local._running == set()
    client.send(Shutdown())


WHERE: contextvars.ContextVar[str] = contextvars.ContextVar("where", default="nowhere")


def test_functions_run_in_the_context_of_their_cell(
    client: Client, loop: Loop, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=object))

    async def coroutine() -> str:
        await asyncio.sleep(0)
        return WHERE.get()

    def callback(done: Any) -> None:
        done(WHERE.get())

    def cell() -> None:
        WHERE.set("cell 3")
        client.environment.registry.register("plain", WHERE.get)
        client.environment.registry.register("coroutine", coroutine)
        client.environment.registry.register("callback", callback, callback=True)

    contextvars.copy_context().run(cell)
    for name in ("plain", "coroutine", "callback"):
        client.send(CallFunc(client.find(name)))
        loop.run()
        assert client.reply() == Return((11, "cell 3"))
    assert WHERE.get() == "nowhere"


# -- the synchronous interface ---------------------------------------------------------------------------------------


def test_the_synchronous_methods_wait_for_any_kind_of_function(registry: Registry) -> None:
    async def coroutine() -> int:
        return 5

    def eager(awaitable: Any, done: Any) -> Any:
        with pytest.raises(StopIteration) as end:
            awaitable.send(None)
        done(end.value.value)
        done.error(ValueError("late"))
        return lambda: None

    def callback(done: Any) -> None:
        done.error(ValueError("first"))
        done(1)

    registry.register("coroutine", coroutine)
    registry.register("callback", callback, callback=True)
    session = LocalServingSession(Environment(registry=registry, spawn=eager))
    assert session.call(session.get_function("coroutine"), ()) == (1, 5)
    with pytest.raises(ValueError, match="first"):
        session.call(session.get_function("callback"), ())
    meta = TensorMeta(0, CPU, (4,), dtype("uint8"))
    meta = meta._replace(data=int(session.allocate_tensor(meta, None)))
    session.copy_to_remote(memoryview(b"abcd"), meta, 4)
    into = bytearray(4)
    session.copy_from_remote(meta, memoryview(into), 4)
    assert into == b"abcd"
    session.stream_sync(CPU, 0)
    with pytest.raises(DeviceError):
        session.stream_sync(Device(2), 0)
    session.shutdown()


def test_a_session_without_an_environment_serves_the_global_registry() -> None:
    session = LocalServingSession()
    assert session.environment.registry.names() == rpcnb.list_global_func_names()
    session.shutdown()


def test_an_encoding_of_a_subclass_is_honoured(registry: Registry) -> None:
    class Loud(LocalServingSession):
        def encode_return(self, value: Any) -> tuple[Any, ...]:
            return super().encode_return(value * 2)

    client = Client(Environment(registry=registry, local_session=Loud))
    assert client.call("testing.echo", 21) == (1, 42)
    client.send(Shutdown())
