"""What the users of the storm do, and the books that are kept of it; ``storm.py`` says what for."""

from __future__ import annotations

import asyncio
import concurrent.futures
import faulthandler
import os
import random
import sys
import threading
import time
import traceback
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import numpy as np

from rpcnb.errors import DeadlineExceeded, RemoteError, RpcError

__all__ = ["ADDED", "LIMIT", "Awaited", "Blocking", "Book", "right"]

LIMIT = 20.0  # seconds that an operation may take
HANGS = 60.0  # after which it hangs: a loaded machine, and what an operation still does behind its limit
ADDED = {"plain": 1, "later": 2, "callback": 3, "slow": 4, "loop": 5}
KNOWN = (RpcError, asyncio.CancelledError, concurrent.futures.CancelledError)


class Book:
    """What was done, what came of it, what is in progress, and what should not have happened."""

    def __init__(self, seed: int) -> None:
        self.counts: Counter[str] = Counter()
        self.findings: list[str] = []
        self.seed = seed
        self._flying: dict[object, tuple[str, float]] = {}
        self._lock = threading.Lock()
        self._watcher = threading.Thread(target=self._watch, daemon=True)
        self._watcher.start()

    def _watch(self) -> None:
        while True:
            time.sleep(1)
            with self._lock:
                late = [name for name, since in self._flying.values() if time.monotonic() - since > HANGS]
            if late:
                sys.stderr.write(f"HANGS (seed {self.seed}): {late}\n")
                faulthandler.dump_traceback(all_threads=True)
                os._exit(1)

    @contextmanager
    def operation(self, name: str) -> Iterator[None]:
        """Note an operation; errors of rpcnb are its good right, anything else is a finding."""
        key = object()
        with self._lock:
            self._flying[key] = name, time.monotonic()
        try:
            yield
            came = name
        except KNOWN as error:
            came = type(error).__name__
        except Exception:
            came = "finding"
            self.found(f"{name}:\n{traceback.format_exc()}")
        finally:
            with self._lock:
                self._flying.pop(key, None)
        with self._lock:
            self.counts[came] += 1

    def found(self, text: str) -> None:
        """Note a finding."""
        with self._lock:
            self.findings.append(text)

    def forget_interrupted(self) -> None:
        """Forget an operation whose end an interrupt has swallowed; nobody else is at work."""
        with self._lock:
            self._flying.clear()


def right(found: Any, expected: Any) -> None:
    """Check a reply against what its argument asks for."""
    assert found == expected, f"expected {expected!r:.80}, got {found!r:.80}"


# -- what a blocking session does ------------------------------------------------------------------------------------


class Blocking:
    """Operations of a blocking session, chosen at random."""

    def __init__(self, session: Any, book: Book, seed: int, reconnects: bool) -> None:
        self.session = session
        self.book = book
        self.rng = random.Random(seed)
        ways = [self.call] * 6 + [self.fail, self.submit, self.submit, self.late, self.map, self.copy, self.file]
        self.ways: list[Callable[[], object]] = [*ways, self.cell, self.ask]
        self.reconnects = reconnects

    def step(self) -> None:
        """Do one thing."""
        way = self.rng.choice(self.ways)
        if self.reconnects and self.rng.random() < 0.01:
            way = self.reconnect
        with self.book.operation(way.__name__):
            way()

    def number(self) -> int:
        """Return an argument that no other call has."""
        return self.rng.randrange(1 << 40)

    def call(self) -> None:
        name, x = self.rng.choice([*ADDED]), self.number()
        right(self.session.call(name, x, timeout=LIMIT), x + ADDED[name])

    def fail(self) -> None:
        x = self.number()
        try:
            result = self.session.call("fail", x, timeout=LIMIT)
        except RemoteError as error:
            result = str(error)
        assert str(x) in str(result), f"expected the failure of {x}, got {result!r:.80}"

    def submit(self) -> None:
        name, numbers = self.rng.choice([*ADDED]), [self.number() for _ in range(self.rng.choice((1, 5, 40)))]
        function = self.session.get_function(name, timeout=LIMIT)
        pending = [function.submit(x, timeout=LIMIT) for x in numbers]
        cancelled = [one for one in pending if self.rng.random() < 0.3 and one.cancel()]
        for x, one in zip(numbers, pending, strict=True):
            if one in cancelled:
                with suppress(concurrent.futures.CancelledError):
                    right(one.result(), x + ADDED[name])
            else:
                right(one.result(), x + ADDED[name])

    def late(self) -> None:
        name, x = self.rng.choice([*ADDED]), self.number()
        with suppress(DeadlineExceeded):
            right(self.session.call(name, x, timeout=self.rng.random() * 0.004), x + ADDED[name])

    def map(self) -> None:
        name, x = self.rng.choice([*ADDED]), self.number()
        function = self.session.get_function(name, timeout=LIMIT)
        found = list(function.map(range(x, x + self.rng.choice((3, 50)))))
        right(found, [x + index + ADDED[name] for index in range(len(found))])

    def copy(self) -> None:
        data = self.rng.randbytes(8 * self.rng.choice((1, 100, 10_000, 10_000, 700_000)))
        array = np.frombuffer(data, "int64") >> 24
        tensor = self.session.array(array, timeout=LIMIT)
        assert (tensor.numpy(timeout=LIMIT) == array).all(), "expected the tensor that was sent"
        right(self.session.call("total", tensor, timeout=LIMIT), int(array.sum()))

    def file(self) -> None:
        name, data = f"file{self.number()}", self.rng.randbytes(self.rng.choice((0, 1, 5000, 300_000)))
        self.session.upload(data, name, timeout=LIMIT)
        right(self.session.download(name, timeout=LIMIT), data)
        self.session.remove(name, timeout=LIMIT)

    def cell(self) -> None:
        x = self.number()
        said: list[Any] = []
        result = self.session.run_cell(f"print({x})\n{x} + 1", timeout=LIMIT, on_output=said.append)
        right(result.data, {"text/plain": str(x + 1)})
        right("".join(piece.text for piece in said), f"{x}\n")

    def ask(self) -> None:
        assert "plain" in self.session.list_functions(timeout=LIMIT)
        right(self.session.status(timeout=LIMIT)["state"], "READY")

    def reconnect(self) -> None:
        self.session.reconnect(timeout=LIMIT)


# -- what an awaited session does ------------------------------------------------------------------------------------


class Awaited:
    """Operations of an awaited session, chosen at random; the same as :class:`Blocking`."""

    def __init__(self, session: Any, book: Book, seed: int, reconnects: bool) -> None:
        self.session = session
        self.book = book
        self.rng = random.Random(seed)
        ways = [self.call] * 6 + [self.fail, self.gather, self.gather, self.late, self.give_up, self.copy, self.file]
        self.ways: list[Callable[[], Awaitable[object]]] = [*ways, self.cell, self.ask]
        self.reconnects = reconnects

    async def step(self) -> None:
        """Do one thing."""
        way = self.rng.choice(self.ways)
        if self.reconnects and self.rng.random() < 0.002:
            way = self.reconnect
        with self.book.operation(way.__name__):
            await way()

    def number(self) -> int:
        """Return an argument that no other call has."""
        return self.rng.randrange(1 << 40)

    async def call(self) -> None:
        name, x = self.rng.choice([*ADDED]), self.number()
        right(await self.session.call(name, x, timeout=LIMIT), x + ADDED[name])

    async def fail(self) -> None:
        x = self.number()
        try:
            result = await self.session.call("fail", x, timeout=LIMIT)
        except RemoteError as error:
            result = str(error)
        assert str(x) in str(result), f"expected the failure of {x}, got {result!r:.80}"

    async def gather(self) -> None:
        name, numbers = self.rng.choice([*ADDED]), [self.number() for _ in range(self.rng.choice((2, 10)))]
        function = await self.session.get_function(name, timeout=LIMIT)
        calls = (function(x, timeout=LIMIT) for x in numbers)
        for x, found in zip(numbers, await asyncio.gather(*calls, return_exceptions=True), strict=True):
            if not isinstance(found, KNOWN):
                right(found, x + ADDED[name])

    async def late(self) -> None:
        name, x = self.rng.choice([*ADDED]), self.number()
        with suppress(DeadlineExceeded):
            right(await self.session.call(name, x, timeout=self.rng.random() * 0.02), x + ADDED[name])

    async def give_up(self) -> None:
        way = self.rng.choice((self.call, self.copy, self.file, self.cell, self.gather))
        task = asyncio.ensure_future(way())
        await asyncio.sleep(self.rng.random() * 0.02)
        task.cancel()
        await task

    async def copy(self) -> None:
        data = self.rng.randbytes(8 * self.rng.choice((1, 100, 10_000, 10_000, 300_000)))
        array = np.frombuffer(data, "int64") >> 24
        tensor = await self.session.array(array, timeout=LIMIT)
        assert (await tensor.numpy(timeout=LIMIT) == array).all(), "expected the tensor that was sent"
        right(await self.session.call("total", tensor, timeout=LIMIT), int(array.sum()))

    async def file(self) -> None:
        name, data = f"file{self.number()}", self.rng.randbytes(self.rng.choice((0, 1, 5000, 300_000)))
        await self.session.upload(data, name, timeout=LIMIT)
        right(await self.session.download(name, timeout=LIMIT), data)
        await self.session.remove(name, timeout=LIMIT)

    async def cell(self) -> None:
        x = self.number()
        result = await self.session.run_cell(f"{x} + 1", timeout=LIMIT)
        right(result.data, {"text/plain": str(x + 1)})

    async def ask(self) -> None:
        assert "plain" in await self.session.list_functions(timeout=LIMIT)
        right((await self.session.status(timeout=LIMIT))["state"], "READY")

    async def reconnect(self) -> None:
        await self.session.reconnect(timeout=LIMIT)
