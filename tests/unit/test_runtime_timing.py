"""The time evaluator, on a clock of the test's."""

from __future__ import annotations

import asyncio
import struct
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from runtime_wire import Client, Loop, handle_of, module_of

from rpcnb.protocol.messages import CallFunc, Raised, Return, Shutdown
from rpcnb.runtime import devices, timing
from rpcnb.runtime.devices import DeviceAPI
from rpcnb.runtime.environment import Environment
from rpcnb.runtime.local import LocalServingSession
from rpcnb.runtime.registry import Registry
from rpcnb.runtime.served import Module
from rpcnb.runtime.timing import make_evaluator
from rpcnb.values import Device


class Clock:
    """Time passes only by ``work`` and ``sleep``."""

    def __init__(self) -> None:
        self.now = 100.0
        self.log: list[Any] = []
        self.step = 0.0

    def work(self, *args: Any) -> None:
        self.log.append("call")
        self.now += self.step

    def sleep(self, seconds: float) -> None:
        self.log.append(("sleep", seconds))


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(time, "perf_counter", lambda: clock.now)
    monkeypatch.setattr(time, "sleep", clock.sleep)

    async def sleep(seconds: float) -> None:
        clock.sleep(seconds)

    monkeypatch.setattr(timing.asyncio, "sleep", sleep)  # type: ignore[attr-defined]  # its import
    return clock


@pytest.fixture
def loop() -> Iterator[Loop]:
    loop = Loop()
    yield loop
    loop.close()


@pytest.fixture
def client(registry: Registry, loop: Loop, clock: Clock) -> Iterator[Client]:
    registry.register("work", clock.work)
    client = Client(Environment(registry=registry, spawn=loop.spawn))
    yield client
    client.send(Shutdown())


def evaluator(client: Client, name: str = "work", module: Any = None, **options: Any) -> int:
    defaults = {"number": 1, "repeat": 1, "min_repeat_ms": 0, "zeros": 100, "cooldown": 0, "every": 1, "flush": 0}
    values = {**defaults, **options}
    preproc = values.pop("preproc", "")
    return handle_of(client.call("runtime.RPCTimeEvaluator", module, name, 1, 0, *values.values(), preproc))


def measure(client: Client, *args: Any, **options: Any) -> list[float]:
    index, data = client.call(evaluator(client, **options), *args)
    assert isinstance(data, bytes)
    assert index == 66
    return list(struct.unpack(f"<{len(data) // 8}d", data))


def test_one_warm_up_and_then_number_calls_per_repeat(client: Client, clock: Clock) -> None:
    clock.step = 0.25
    assert measure(client, number=4, repeat=3) == [0.25] * 3
    assert clock.log == ["call"] * (1 + 4 * 3)


def test_one_repeat_is_eight_bytes_under_index_66(client: Client) -> None:
    assert len(measure(client)) == 1


def test_a_short_measurement_is_repeated_with_a_larger_number_that_is_kept(client: Client, clock: Clock) -> None:
    clock.step = 2**-10
    assert measure(client, number=2, repeat=2, min_repeat_ms=10) == [2**-10] * 2
    # 2 calls last 1.95 ms; max(10 / 0.977 + 1, 2 * 1.618) = 11 calls then last long enough, also in the second repeat
    assert len(clock.log) == 1 + 2 + 11 + 11


def test_the_golden_ratio_is_the_smallest_growth(client: Client, clock: Clock) -> None:
    times = iter([0.0, 0.9, *[0.0] * 14, 0.2])  # warm-up; one call: 0.9 ms; then cheaper ones

    def work() -> None:
        clock.log.append("call")
        clock.now += next(times, 1.0) / 1000

    client.environment.registry.register("work", work, override=True)
    measure(client, number=10, min_repeat_ms=1)
    # 10 calls: 0.9 ms, 0.09 each: max(1 / 0.09 + 1, 16.18) = 16
    assert len(clock.log) == 1 + 10 + 16


def test_zero_readings_repeat_the_same_number_until_the_limit(client: Client, clock: Clock) -> None:
    assert measure(client, number=3, min_repeat_ms=5, zeros=4) == [0.0]
    assert len(clock.log) == 1 + 3 * 4


def test_cooldown_sleeps_after_every_nth_repeat(client: Client, clock: Clock) -> None:
    measure(client, repeat=5, cooldown=20, every=2)
    assert clock.log[1:] == ["call", ("sleep", 0.02), "call", "call", ("sleep", 0.02), "call", "call", ("sleep", 0.02)]
    clock.log.clear()
    measure(client, repeat=2, cooldown=20, every=0)
    assert clock.log.count(("sleep", 0.02)) == 2


def test_preproc_runs_before_each_repeat_with_the_arguments(client: Client, clock: Clock) -> None:
    client.environment.registry.register("before", lambda *args: clock.log.append(("before", args)))
    measure(client, 7, "x", repeat=2, number=2, preproc="before")
    assert clock.log == ["call", ("before", (7, "x")), "call", "call", ("before", (7, "x")), "call", "call"]


def test_the_cache_is_flushed_before_each_measurement(
    client: Client, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    def copyto(target: np.ndarray[Any, Any], source: np.ndarray[Any, Any]) -> None:
        clock.log.append(("flush", target.nbytes, source.nbytes))

    monkeypatch.setattr(np, "copyto", copyto)
    measure(client, repeat=2, number=2, flush=1000)
    assert clock.log == ["call", ("flush", 1000, 1000), "call", "call", ("flush", 1000, 1000), "call", "call"]


def test_unknown_names_are_refused_with_stocks_words(client: Client) -> None:
    make = client.find("runtime.RPCTimeEvaluator")
    rest = (1, 0, 1, 1, 0, 100, 0, 1, 0)
    text = "Check failed: (pf.has_value()) is false: Cannot find nothing in the global function"
    assert client.call_error(make, None, "nothing", *rest, "") == text
    assert client.call_error(make, None, "work", *rest, "nothing") == text
    client.environment.registry.register("module", lambda: Module({"f": len}))
    module = module_of(client.call("module"))
    assert client.call_error(make, module, "g", *rest, "") == (
        "Check failed: (pf != nullptr) is false: Cannot find g in the module"
    )
    assert client.call_error(make, 5, "g", *rest, "") == "expected a module, got int"


@pytest.mark.parametrize(("number", "repeat"), [(0, 1), (1, 0), (-1, 1)])
def test_numbers_below_one_are_refused(client: Client, number: int, repeat: int) -> None:
    text = client.call_error("runtime.RPCTimeEvaluator", None, "work", 1, 0, number, repeat)
    assert text == f"expected number and repeat of at least 1, got {number} and {repeat}"


def test_the_looked_up_handle_is_given_back(client: Client) -> None:
    handle = evaluator(client)
    entries = {entry.thing.name for entry in client.local.table._entries.values()}
    assert "work" not in entries
    client.free(handle)


def test_functions_of_a_module_are_measured(client: Client, clock: Clock, loop: Loop) -> None:
    async def later() -> None:
        clock.now += 0.5

    parent, child = Module(), Module({"f": clock.work, "later": later})
    parent.import_module(child)
    client.environment.registry.register("module", lambda: parent)
    module = module_of(client.call("module"))
    clock.step = 0.125
    assert measure(client, module=module, name="f", number=2) == [0.125]
    client.send(CallFunc(evaluator(client, "later", module=module)))
    loop.run()
    assert client.reply() == Return((66, struct.pack("<d", 0.5)))


def finish(client: Client, loop: Loop, handle: int) -> Any:
    client.send(CallFunc(handle))
    loop.run()
    loop.run()
    return client.reply()


def test_a_coroutine_is_measured_until_it_completes(client: Client, clock: Clock, loop: Loop) -> None:
    async def slow() -> None:
        clock.log.append("begin")
        await asyncio.sleep(0)
        clock.now += 0.25
        clock.log.append("end")

    client.environment.registry.register("slow", slow)
    handle = evaluator(client, "slow", number=2, repeat=2, cooldown=10)
    assert finish(client, loop, handle) == Return((66, struct.pack("<2d", 0.25, 0.25)))
    steps = [step for step in clock.log if isinstance(step, str)]
    assert steps == ["begin", "end"] * 5
    assert clock.log.count(("sleep", 0.01)) == 2


def test_a_callback_function_is_measured_until_done(client: Client, clock: Clock, loop: Loop) -> None:
    def slow(done: Any) -> None:
        assert not done.cancelled

        def end() -> None:
            clock.now += 0.25
            done(1)
            done(2)

        loop.loop.call_soon(end)

    client.environment.registry.register("slow", slow, callback=True)
    assert finish(client, loop, evaluator(client, "slow", number=2)) == Return((66, struct.pack("<d", 0.25)))


@pytest.mark.parametrize(("error", "text"), [("no luck", "no luck"), (KeyError("k"), "'k'")])
def test_an_error_of_a_measured_callback_function_ends_the_measurement(
    client: Client, loop: Loop, error: Any, text: str
) -> None:
    def fails(done: Any) -> None:
        done.error(error)

    client.environment.registry.register("fails", fails, callback=True)
    assert finish(client, loop, evaluator(client, "fails")) == Raised(text)


@pytest.mark.parametrize("kind", ["coroutine", "callback"])
@pytest.mark.parametrize("target", ["work", "slow"])
def test_an_asynchronous_preproc_is_waited_for(
    client: Client, clock: Clock, loop: Loop, kind: str, target: str
) -> None:
    async def coroutine() -> None:
        await asyncio.sleep(0)
        clock.log.append("before")

    def callback(done: Any) -> None:
        clock.log.append("before")
        done()

    async def slow() -> None:
        clock.work()

    functions: dict[str, Callable[..., Any]] = {"coroutine": coroutine, "callback": callback}
    client.environment.registry.register("before", functions[kind], callback=kind == "callback")
    client.environment.registry.register("slow", slow)
    assert finish(client, loop, evaluator(client, target, preproc="before")) == Return((66, struct.pack("<d", 0.0)))
    assert [step for step in clock.log if isinstance(step, str)] == ["call", "before", "call"]


def test_an_error_of_the_measured_function_is_the_evaluators(client: Client) -> None:
    handle = evaluator(client, "rpc.test.except")
    assert client.call_error(handle, "abc") == "abc"


class _Lagging(DeviceAPI):
    """A device whose work ends when its stream is waited for."""

    device_type = 12

    def __init__(self) -> None:
        self.waits = 0
        self.error: BaseException | None = None

    def synchronize(self, device: Device, stream: Any, done: Any) -> None:
        self.waits += 1
        done(self.error)


def test_a_devices_stream_is_waited_for_before_the_clock_stops(monkeypatch: pytest.MonkeyPatch) -> None:
    async def later() -> int:
        return 1

    api = _Lagging()
    monkeypatch.setitem(devices._APIS, 12, api)
    registry = Registry()
    registry.register("plain", lambda: 1)
    registry.register("later", later)
    session = LocalServingSession(Environment(registry=registry))
    plain = make_evaluator(session, None, "plain", 12, 0, 3, 2)
    assert len(plain.call()) == 16
    assert api.waits == 3  # after the warm-up and after each repeat
    asyncio.run(make_evaluator(session, None, "later", 12, 0, 3, 2).call())
    assert api.waits == 6
    api.error = RuntimeError("the stream broke")
    with pytest.raises(RuntimeError, match="the stream broke"):
        plain.call()
    session.shutdown()
