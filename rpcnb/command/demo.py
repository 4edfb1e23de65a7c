"""The demo board: a board without a board.

Named functions that are quick, slow, asynchronous or failing, and array work; with ``--link`` the connection is
shaped to a rate and a latency, so that copies and waiting can be seen. ``rpcnb serve --demo`` serves them.
"""

from __future__ import annotations

import asyncio
import threading
import time
from typing import TYPE_CHECKING, Any

from rpcnb.runtime.current import cancelled

if TYPE_CHECKING:
    import numpy as np

    from rpcnb.runtime.completion import Callback
    from rpcnb.runtime.registry import Registry

__all__ = ["register_demo"]


def add(a: Any, b: Any) -> Any:
    """Return ``a + b``: numbers, texts or arrays."""
    return a + b


def slow_add(a: Any, b: Any, seconds: float = 1.0) -> Any:
    """Return ``a + b`` after sleeping; a plain function, which blocks its worker and nobody else.

    It asks now and then whether it was cancelled, as a function that takes long should.
    """
    until = time.monotonic() + seconds
    while time.monotonic() < until and not cancelled():
        time.sleep(min(0.05, max(0.0, until - time.monotonic())))
    return a + b


async def sleep(seconds: float) -> str:
    """Return after ``seconds``; a coroutine on the server's loop."""
    await asyncio.sleep(seconds)
    return f"slept {seconds:g} s"


def sensor(done: Callback, channel: int) -> None:
    """Read a sensor whose value comes later, by a callback from another thread."""
    threading.Timer(0.2, lambda: done(20.0 + channel)).start()


def fail(text: str = "the board is on fire") -> None:
    """Raise a ValueError."""
    raise ValueError(text)


def matmul(a: np.ndarray[Any, Any], b: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Return the matrix product."""
    product: np.ndarray[Any, Any] = a @ b
    return product


def scale(x: np.ndarray[Any, Any], factor: float) -> None:
    """Multiply an array in place."""
    x *= factor


def blur(image: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Return the mean of each pixel and its four neighbours."""
    import numpy as np

    padded = np.pad(image, 1, mode="edge")
    total = padded[1:-1, 1:-1] + padded[:-2, 1:-1] + padded[2:, 1:-1] + padded[1:-1, :-2] + padded[1:-1, 2:]
    mean: np.ndarray[Any, Any] = total / 5
    return mean


def register_demo(registry: Registry) -> None:
    """Register the demo board's functions as ``demo.*``."""
    for function in (add, slow_add, sleep, fail, matmul, scale, blur):
        registry.register(f"demo.{function.__name__}", function, override=True)
    registry.register("demo.sensor", sensor, override=True, callback=True)
