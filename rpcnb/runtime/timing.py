"""``runtime.RPCTimeEvaluator``: measure a function at the server, without the network.

One warm-up call; then ``repeat`` measurements of ``number`` calls each. A measurement that lasts less than
``min_repeat_ms`` is repeated with more calls, ``max(min_repeat_ms / ms_per_call + 1, 1.618 * number)`` truncated,
until it lasts long enough or read zero ``limit_zero_time_iterations`` times; the grown number is kept. The result is
``repeat`` little-endian f64 of seconds per call. Asynchronous functions are measured until they complete.

Source:
    WrapTimeEvaluator, src/runtime/timer / src/runtime/rpc/rpc_module.cc, protocol.md 11.
"""

from __future__ import annotations

import asyncio
import inspect
import struct
import time
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any

from rpcnb.errors import FunctionNotFound, InvalidHandle
from rpcnb.runtime.completion import call_cancelled
from rpcnb.runtime.current import CALL
from rpcnb.runtime.handles import HandleKind
from rpcnb.runtime.served import Module, ServedFunction
from rpcnb.values import CPU, Device

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Generator, Iterator

    from rpcnb.runtime.devices import DeviceAPI
    from rpcnb.runtime.serving import HandleSession

__all__ = ["make_evaluator"]

_LOOK = 0.05  # seconds between two looks whether anybody waits still


class _Pause:
    """The evaluator wants to sleep."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds


class _Sync:
    """The evaluator wants the work of a device's default stream to end."""

    def __init__(self, api: DeviceAPI, device: Device) -> None:
        self._api = api
        self._device = device

    def block(self) -> None:
        """Wait in this thread."""
        ended: SimpleQueue[BaseException | None] = SimpleQueue()
        self._api.synchronize(self._device, None, ended.put)
        error = ended.get()
        if error is not None:
            raise error


class _Pieces:
    """Calls a compiled function in a loop of its own, which nothing of ours is in; long loops in pieces.

    Args:
        measure: Calls so often and returns the seconds.
        seconds: What one call may take, roughly.
    """

    def __init__(self, measure: Callable[[int], float], seconds: float) -> None:
        self._measure = measure
        self._most = max(1, int(_LOOK / max(seconds, 1e-7)))

    def __call__(self, calls: int) -> Iterator[float]:
        """Yield the seconds of each piece."""
        while calls:
            count = min(calls, self._most)
            seconds = self._measure(count)
            self._most = max(1, int(count * _LOOK / max(seconds, 1e-7)))
            calls -= count
            yield seconds


def make_evaluator(
    session: HandleSession,
    module: Module | None,
    name: str,
    device_type: int,
    device_id: int,
    number: int,
    repeat: int,
    min_repeat_ms: int = 0,
    limit_zero_time_iterations: int = 100,
    cooldown_interval_ms: int = 0,
    repeats_to_cooldown: int = 1,
    cache_flush_bytes: int = 0,
    preproc: str = "",
) -> ServedFunction:
    """Return the function that measures ``name`` with the arguments it is called with.

    Raises:
        FunctionNotFound: No such function in the module, or among the global ones.
    """
    if number < 1 or repeat < 1:
        raise InvalidHandle(f"expected number and repeat of at least 1, got {number} and {repeat}")
    target = _find(session, module, name)
    before = _find(session, None, preproc) if preproc else None
    flush = _cache_flusher(cache_flush_bytes)
    device = Device(device_type, device_id)
    api = session.device_api(device) if device != CPU else None

    def measure(args: tuple[Any, ...]) -> Generator[Any, Any, bytes]:
        """Yield awaitables and pauses; both drivers below run it."""
        start = time.perf_counter()
        yield target.own(*args)
        if api is not None:
            yield _Sync(api, device)
        compiled = getattr(target.own, "measured", None)
        run = None if compiled is None else _Pieces(compiled(args), time.perf_counter() - start)
        calls, results = number, []
        for index in range(repeat):
            if before is not None:
                yield before.own(*args)
            zeros = 0
            while True:
                flush()
                seconds = 0.0
                for piece in run(calls) if run is not None else ():
                    seconds += piece
                    yield None
                if run is None or api is not None:
                    start = time.perf_counter()
                    for _ in range(calls if run is None else 0):
                        yield target.own(*args)
                    if api is not None:
                        yield _Sync(api, device)  # the work that the calls have only begun counts too
                    seconds += time.perf_counter() - start
                milliseconds = seconds * 1000
                zeros += seconds == 0
                if milliseconds >= min_repeat_ms or zeros >= limit_zero_time_iterations:
                    break
                if seconds > 0:  # a zero reading says nothing about the number of calls
                    calls = int(max(min_repeat_ms / (milliseconds / calls) + 1, calls * 1.618))
            results.append(seconds / calls)
            if cooldown_interval_ms > 0 and index % max(repeats_to_cooldown, 1) == 0:
                yield _Pause(cooldown_interval_ms / 1000)
        return struct.pack(f"<{repeat}d", *results)

    if "coroutine" in (target.kind, before and before.kind):

        async def evaluate_async(*args: Any) -> bytes:
            return await _drive_async(measure(args))

        return ServedFunction(f"time_evaluator({name})", evaluate_async, "coroutine")
    return ServedFunction(f"time_evaluator({name})", lambda *args: _drive(measure(args)), "plain")


def _drive(steps: Generator[Any, Any, bytes]) -> bytes:
    call = CALL.get()
    while True:
        if call is not None and call.cancelled:  # a given up measurement of 1,000 x 50 ms would go on for 50 s
            raise call_cancelled()
        try:
            step = next(steps)
        except StopIteration as end:
            result: bytes = end.value
            return result
        if isinstance(step, _Pause):
            left = step.seconds
            while left > 0 and not (call is not None and call.cancelled):
                time.sleep(min(left, _LOOK))
                left -= _LOOK
        elif isinstance(step, _Sync):
            step.block()


async def _drive_async(steps: Generator[Any, Any, bytes]) -> bytes:
    while True:
        try:
            step = next(steps)
        except StopIteration as end:
            result: bytes = end.value
            return result
        if isinstance(step, _Pause):
            await asyncio.sleep(step.seconds)
        elif isinstance(step, _Sync):
            await asyncio.get_running_loop().run_in_executor(None, step.block)
        elif inspect.isawaitable(step):
            await step


def _find(session: HandleSession, module: Module | None, name: str) -> ServedFunction:
    if module is not None:
        if not isinstance(module, Module):
            raise InvalidHandle(f"expected a module, got {type(module).__name__}")
        found = module.get_function(name, True)
        if found is None:
            raise FunctionNotFound(f"Check failed: (pf != nullptr) is false: Cannot find {name} in the module")
        kind = "coroutine" if inspect.iscoroutinefunction(found) else "plain"
        return _awaitable(ServedFunction(name, found, kind))
    handle = session.get_function(name)
    if not handle:
        raise FunctionNotFound(f"Check failed: (pf.has_value()) is false: Cannot find {name} in the global function")
    served: ServedFunction = session.table.find(handle, HandleKind.FUNCTION)
    session.table.release(handle, HandleKind.FUNCTION)
    return _awaitable(served)


def _awaitable(function: ServedFunction) -> ServedFunction:
    """Turn a callback function into a coroutine function, so that two kinds remain."""
    if function.kind != "callback":
        return function

    def call(*args: Any) -> Awaitable[Any]:
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Any] = loop.create_future()
        function.own(_FutureDone(loop, future), *args)
        return future

    return ServedFunction(function.name, call, "coroutine")


class _FutureDone:
    """The ``done`` of a callback function that is being measured."""

    def __init__(self, loop: asyncio.AbstractEventLoop, future: asyncio.Future[Any]) -> None:
        self._loop = loop
        self._future = future

    @property
    def cancelled(self) -> bool:
        return self._future.cancelled()

    def __call__(self, result: Any = None) -> None:
        self._loop.call_soon_threadsafe(self._settle, result, None)

    def error(self, error: BaseException | str) -> None:
        self._loop.call_soon_threadsafe(
            self._settle, None, error if isinstance(error, BaseException) else RuntimeError(error)
        )

    def _settle(self, result: Any, error: BaseException | None) -> None:
        if self._future.done():
            return
        if error is not None:
            self._future.set_exception(error)
        else:
            self._future.set_result(result)


def _cache_flusher(nbytes: int) -> Callable[[], None]:
    if nbytes <= 0:
        return lambda: None
    import numpy as np

    source, target = np.zeros(nbytes, np.uint8), np.zeros(nbytes, np.uint8)
    return lambda: np.copyto(target, source)
