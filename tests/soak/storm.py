"""Everything at once, at random: python tests/soak/storm.py --minutes 10 [--seed S] [--scenarios threads,tasks,...]

A server in a process of its own; eight threads use one session, or fifty tasks an awaited one: calls of every kind,
submitted, cancelled, out of time, mapped, gathered; copies, files, remote cells; the session opened again under way;
Ctrl-C at random instants; children forked in between. Every reply is checked against its argument. A wrong one, an
exception that is not of rpcnb.errors, and an operation that does not end are findings (exit 1).
"""

from __future__ import annotations

import argparse
import asyncio
import concurrent.futures
import faulthandler
import functools
import os
import random
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import numpy as np

import rpcnb
from rpcnb.errors import DeadlineExceeded, RemoteError, RpcError
from rpcnb.runtime.registry import Registry

__all__ = ["SCENARIOS", "Book", "start_server"]

LIMIT = 20.0  # seconds that an operation may take
HANGS = 60.0  # after which it hangs: a loaded machine, and what an operation still does behind its limit
SLICE = 5.0  # seconds with one session
TOKEN = "storm"
ADDED = {"plain": 1, "later": 2, "callback": 3, "slow": 4, "loop": 5}
KNOWN = (RpcError, asyncio.CancelledError, concurrent.futures.CancelledError)


# -- the server ------------------------------------------------------------------------------------------------------


def serve() -> None:
    """Serve until standard input ends; in a process of its own."""
    registry = Registry()

    async def later(x: int) -> int:
        await asyncio.sleep(random.choice((0, 0, 0.0005, 0.002)))
        return x + 2

    def call_back(done: Any, x: int) -> None:
        if x % 2:
            done(x + 3)
        else:
            threading.Timer(random.choice((0.0, 0.001)), done, (x + 3,)).start()

    def slow(x: int) -> int:
        time.sleep(random.choice((0, 0.0005, 0.001, 0.003)))
        return x + 4

    def fail(x: int) -> None:
        raise ValueError(str(x))

    registry.register("plain", lambda x: x + 1)
    registry.register("later", later)
    registry.register("callback", call_back, callback=True)
    registry.register("slow", slow)
    registry.register("loop", lambda x: x + 5, run="loop")
    registry.register("fail", fail)
    registry.register("total", lambda array: int(np.sum(array, dtype="int64")))
    registry.register("sessions", lambda: server.sessions)
    server = rpcnb.Server(port=0, registry=registry, silent=True, allow_exec=True, token=TOKEN)
    sys.stdout.write(f"{server.port}\n")
    sys.stdout.flush()
    sys.stdin.read()
    server.close()


@contextmanager
def start_server() -> Iterator[str]:
    """Start the server's process; yields its address."""
    command = [sys.executable, __file__, "--serve"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        yield f"127.0.0.1:{int(process.stdout.readline())}"


# -- keeping the books -----------------------------------------------------------------------------------------------


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


# -- scenarios: each gets an address, the book, a seed and the time at which it ends ---------------------------------


def threads(address: str, book: Book, seed: int, end: float, *, reconnects: bool = False) -> None:
    """Let eight threads use one session."""
    with rpcnb.connect(address, token=TOKEN) as session:
        run_threads(session, book, seed, end, reconnects)
        still_right(session, book)
    with book.operation("refused"):
        session.call("plain", 1)
        raise AssertionError("expected a closed session to refuse a call")


def run_threads(session: Any, book: Book, seed: int, end: float, reconnects: bool, count: int = 8) -> None:
    """Let so many threads use a session until ``end``."""

    def work(number: int) -> None:
        user = Blocking(session, book, seed * 100 + number, reconnects)
        while time.monotonic() < end:
            user.step()

    users = [threading.Thread(target=work, args=(number,), daemon=True) for number in range(count)]
    for user in users:
        user.start()
    for user in users:
        user.join()


def still_right(session: Any, book: Book) -> None:
    """See that a session has settled and answers; one that was lost is opened again first."""
    with book.operation("settled"):
        give_up = time.monotonic() + LIMIT
        while session.state in ("busy", "draining"):
            assert time.monotonic() < give_up, f"expected the session to settle, it is {session.state}"
            time.sleep(0.01)
        if session.state != "ready":
            session.reconnect(timeout=LIMIT)
        right(session.call("plain", 41, timeout=LIMIT), 42)


def reconnect(address: str, book: Book, seed: int, end: float) -> None:
    """Let eight threads use one session, which each of them opens again now and then."""
    threads(address, book, seed, end, reconnects=True)


def tasks(address: str, book: Book, seed: int, end: float, *, reconnects: bool = False) -> None:
    """Let fifty tasks use one awaited session."""

    async def work(session: Any, number: int) -> None:
        user = Awaited(session, book, seed * 100 + number, reconnects)
        while time.monotonic() < end:
            await user.step()

    async def main() -> None:
        async with await rpcnb.connect_async(address, token=TOKEN) as session:
            await asyncio.gather(*(work(session, number) for number in range(50)))
            with book.operation("settled"):
                if session.state in ("lost", "closed"):
                    await session.reconnect(timeout=LIMIT)
                right(await session.call("plain", 41, timeout=LIMIT), 42)

    asyncio.run(main())


def reconnect_tasks(address: str, book: Book, seed: int, end: float) -> None:
    """Let fifty tasks use one awaited session, which they open again now and then."""
    tasks(address, book, seed, end, reconnects=True)


def interrupts(address: str, book: Book, seed: int, end: float) -> None:
    """Interrupt the main thread at random instants, alone and beside threads."""
    with rpcnb.connect(address, token=TOKEN) as session:
        user = Blocking(session, book, seed, False)
        rng = random.Random(seed)
        while time.monotonic() < end:
            beside = threading.Thread(target=user_beside, args=(session, book, rng.randrange(1 << 30)), daemon=True)
            if rng.random() < 0.5:
                beside.start()
            struck = threading.Timer(rng.random() ** 2 * 0.05, os.kill, (os.getpid(), signal.SIGINT))
            try:
                struck.start()
                while struck.is_alive():
                    user.step()
                time.sleep(0.2)
                book.counts["interrupt taken by a destructor"] += 1  # where Python can raise nothing
            except KeyboardInterrupt:
                book.counts["interrupt"] += 1
            if beside.ident is not None:
                beside.join()
            struck.join()
            book.forget_interrupted()
            x = user.number()
            with book.operation("after an interrupt"):
                right(session.call("plain", x, timeout=LIMIT), x + 1)
        still_right(session, book)


def user_beside(session: Any, book: Book, seed: int) -> None:
    """Use a session for a moment, in another thread."""
    user = Blocking(session, book, seed, False)
    for _ in range(10):
        user.step()


def sessions(address: str, book: Book, seed: int, end: float) -> None:
    """Open and close sessions in eight threads; each is gone at the server."""

    def work(number: int) -> None:
        rng = random.Random(seed * 100 + number)
        while time.monotonic() < end:
            with book.operation("session"), rpcnb.connect(address, token=TOKEN, lanes=rng.choice((0, 3))) as session:
                user = Blocking(session, book, rng.randrange(1 << 30), False)
                for _ in range(rng.randrange(5)):
                    user.step()
                if rng.random() < 0.3:
                    session.get_function("later").submit(1)  # nobody waits for it

    users = [threading.Thread(target=work, args=(number,), daemon=True) for number in range(8)]
    for user in users:
        user.start()
    for user in users:
        user.join()
    alone(address, book)


def alone(address: str, book: Book) -> None:
    """See that the server has no session left but the one that asks."""
    with book.operation("sessions left"), rpcnb.connect(address, token=TOKEN) as session:
        give_up = time.monotonic() + LIMIT
        while (left := session.call("sessions")) != 1:
            assert time.monotonic() < give_up, f"expected one session at the server, there are {left}"
            time.sleep(0.05)


class ChildEnds(BaseException):
    """Unwinds a forked child up to the end of the script."""


def forks(address: str, book: Book, seed: int, end: float) -> None:
    """Fork children that try to use the session, and end in every way, while threads use it."""
    with rpcnb.connect(address, token=TOKEN) as session:
        beside = threading.Thread(target=run_threads, args=(session, book, seed, end, False, 3), daemon=True)
        beside.start()
        rng = random.Random(seed)
        while time.monotonic() < end:
            way = rng.choice(("_exit", "sys.exit", "normally"))
            with book.operation(f"child that ends by {way}"):
                child = os.fork()
                if not child:
                    in_child(session, way)
                right(wait_for_child(child), 0)
            x = rng.randrange(1 << 40)
            with book.operation("after a fork"):
                right(session.call("plain", x, timeout=LIMIT), x + 1)
            time.sleep(0.05)
        beside.join()
        still_right(session, book)
    alone(address, book)


def in_child(session: Any, way: str) -> None:
    """Use what the parent has; never returns. A right value or a typed error is exit code 0."""
    signal.alarm(10)  # a child that hangs
    code = 3
    try:
        code = 0 if session.call("plain", os.getpid(), timeout=5) == os.getpid() + 1 else 5
    except RpcError:
        code = 0
    except BaseException:
        traceback.print_exc()
        code = 4
    if way == "_exit" or code:
        os._exit(code)
    if way == "sys.exit":
        sys.exit(0)
    raise ChildEnds


def wait_for_child(child: int) -> int:
    """Return a child's exit code, negative for a signal."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


SCENARIOS: dict[str, Callable[[str, Book, int, float], object]] = {
    one.__name__: one for one in (threads, tasks, interrupts, sessions, reconnect, reconnect_tasks, forks)
}


def main() -> int:
    """Run scenarios in turn until the time is over."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--minutes", type=float, default=1.0)
    parser.add_argument("--seconds", type=float)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--scenarios", type=functools.partial(str.split, sep=","), default=[*SCENARIOS])
    options = parser.parse_args()
    if options.serve:
        serve()
        return 0
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job begins with SIG_IGN
    started, total = time.monotonic(), options.seconds or options.minutes * 60
    book, seed = Book(options.seed), options.seed
    with start_server() as address:
        while time.monotonic() - started < total:
            for name in options.scenarios:
                left = total - (time.monotonic() - started)
                share = min(SLICE, max(left / len(options.scenarios), 1.0))
                with book.operation(f"scenario {name}"):
                    SCENARIOS[name](address, book, seed, time.monotonic() + share)
                seed += 1
    for text, times in Counter(book.findings).most_common(20):
        sys.stdout.write(f"FINDING ({times} times) {text}\n")
    counts = ", ".join(f"{name} {count}" for name, count in sorted(book.counts.items()))
    spent = time.monotonic() - started
    sys.stdout.write(f"seed {options.seed}, {spent:.0f} s, {len(book.findings)} findings: {counts}\n")
    return 1 if book.findings else 0


if __name__ == "__main__":
    with suppress(ChildEnds):
        sys.exit(main())
