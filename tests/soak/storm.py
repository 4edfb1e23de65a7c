"""Everything at once, at random: python tests/soak/storm.py --minutes 10 [--seed S] [--scenarios threads,tasks,...]

A server in a process of its own; eight threads use one session, or fifty tasks an awaited one: calls of every kind,
submitted, cancelled, out of time, mapped, gathered; copies, files, remote cells; the session opened again under way;
Ctrl-C at random instants; children forked in between. Every reply is checked against its argument. A wrong one, an
exception that is not of rpcnb.errors, and an operation that does not end are findings (exit 1).
"""

from __future__ import annotations

import argparse
import asyncio
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
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import numpy as np

import rpcnb
from rpcnb.errors import RpcError
from rpcnb.runtime.registry import Registry

if __name__ == "__main__":
    sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))

from users import LIMIT, Awaited, Blocking, Book, right

__all__ = ["SCENARIOS", "TOKEN", "start_server"]

SLICE = 5.0  # seconds with one session
TOKEN = "storm"


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
