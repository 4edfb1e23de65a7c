"""An explorer of interleavings: real code of several threads, run step by step over all orders up to a bound.

A scenario makes its objects anew for each run and returns the functions of its threads and a check. One thread runs at
a time; at every line of the watched modules, and wherever a lock is taken or waited for, another may go on. All orders
with up to ``bound`` preemptions are tried (a preemption is a switch that nobody had to make), then random ones with
more, by a seed. What fails is told with the order in which it fails, so that it can be run again::

    explore(scenario, [overlap], bound=2)

Locks, conditions and events that the code under test makes while a scenario runs are stand-ins which the explorer
schedules. A wait with a time limit ends by its limit only when nothing else can go on.
"""

from __future__ import annotations

import _thread
import gc
import random
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from types import FrameType, ModuleType
from typing import Any

__all__ = ["Failure", "explore", "run_once"]

Check = Callable[[], object]
Scenario = Callable[[], tuple[list[Callable[[], object]], Check]]

_real_lock = _thread.allocate_lock
_PATIENCE = 20.0  # seconds for one run: only a wait that the explorer does not see takes longer
_MOST_STEPS = 20_000


class Failure(AssertionError):
    """A scenario went wrong in some order."""


class _Abort(BaseException):
    """Ends a thread of a run that has failed."""


class _Lock:
    """Stands in for a lock."""

    def __init__(self) -> None:
        self.taken = False
        self.owner = -1
        self.depth = 0

    def acquire(self, blocking: bool = True, timeout: float = -1) -> bool:
        run = _run
        me = None if run is None else run.me()
        if run is None or me is None:  # the scenario's own set-up, or its check
            assert not self.taken or not blocking, "a lock is still held"
            free, self.taken = not self.taken, True
            return free
        run.step(me)
        while self.taken:
            if not blocking or timeout == 0 or not run.wait(me, self, timeout > 0):
                return False
        self.taken, self.owner = True, me
        return True

    def release(self) -> None:
        if not self.taken:
            raise RuntimeError("release unlocked lock")
        self.taken, self.owner = False, -1
        run = _run
        me = None if run is None else run.me()
        if run is not None and me is not None:
            run.step(me)

    def locked(self) -> bool:
        return self.taken

    def __enter__(self) -> bool:
        return self.acquire()

    def __exit__(self, *_: object) -> None:
        self.release()

    def _at_fork_reinit(self) -> None:
        self.__init__()  # type: ignore[misc]  # as the real ones do


class _RLock(_Lock):
    """Stands in for a lock that its owner may take again."""

    def acquire(self, blocking: bool = True, timeout: float = -1) -> bool:
        if self._is_owned():
            self.depth += 1
            return True
        if not super().acquire(blocking, timeout):
            return False
        self.depth = 1
        return True

    def release(self) -> None:
        self.depth -= 1
        if not self.depth:
            super().release()

    def _is_owned(self) -> bool:
        me = None if _run is None else _run.me()
        return self.taken and self.owner == (-1 if me is None else me)

    def _release_save(self) -> int:
        depth, self.depth = self.depth, 1
        self.release()
        return depth

    def _acquire_restore(self, depth: int) -> None:
        self.acquire()
        self.depth = depth


class _Run:
    """One run of a scenario in one order.

    Args:
        order: What happens at which choice: the choice's number, and the thread that goes on.
        watched: Files whose lines are steps.
        chance: Makes further choices; None: nobody is preempted but by ``order``.
    """

    def __init__(self, order: dict[int, int], watched: frozenset[str], chance: random.Random | None = None) -> None:
        self.order = order
        self.watched = watched
        self.chance = chance
        self.choices: list[tuple[int, list[int], bool]] = []  # who ran, who else could, and whether somebody had to
        self.taken: dict[int, int] = {}
        self.failure: str = ""
        self._threads: dict[int, int] = {}
        self._gates: list[Any] = []
        self._waits: list[tuple[_Lock, bool] | None] = []
        self._expired: list[bool] = []
        self._done: list[bool] = []
        self._where: list[str] = []
        self._aborted = False
        self._over = _real_lock()

    def me(self) -> int | None:
        return self._threads.get(_thread.get_ident())

    def perform(self, functions: list[Callable[[], object]]) -> None:
        """Run the threads to their end."""
        count = len(functions)
        self._gates = [_real_lock() for _ in range(count)]
        self._waits = [None] * count
        self._expired = [False] * count
        self._done = [False] * count
        self._where = ["not begun"] * count
        self._over.acquire()
        for gate in self._gates:
            gate.acquire()
        for number, function in enumerate(functions):
            _thread.start_new_thread(self._thread, (number, function))
        self._gates[self._choose(-1, True)].release()
        if not self._over.acquire(timeout=_PATIENCE):
            self._fail(f"it did not end; the threads are at {self._where}")
        self._threads.clear()

    def _thread(self, number: int, function: Callable[[], object]) -> None:
        self._gates[number].acquire()
        self._threads[_thread.get_ident()] = number
        try:
            if not self._aborted:
                sys.settrace(self._trace)
                try:
                    function()
                finally:
                    sys.settrace(None)
        except _Abort:
            pass
        except BaseException as error:
            self._fail(f"thread {number} raised {type(error).__name__}: {error}")
        self._done[number] = True
        self._threads.pop(_thread.get_ident(), None)
        self._go_on(number)

    def _go_on(self, number: int) -> None:
        """Let another thread run; this one has ended."""
        if all(self._done):
            self._over.release()
            return
        self._gates[self._choose(number, True)].release()

    def _trace(self, frame: FrameType, event: str, argument: Any) -> Any:
        return self._trace_line if frame.f_code.co_filename in self.watched else None

    def _trace_line(self, frame: FrameType, event: str, argument: Any) -> Any:
        if event == "line":
            me = self.me()
            if me is not None:
                self._where[me] = f"{frame.f_code.co_name}:{frame.f_lineno}"
                self.step(me)
        return self._trace_line

    # -- choices -------------------------------------------------------------------------------------------------

    def step(self, me: int) -> None:
        """Another thread may go on here."""
        if self._aborted:
            raise _Abort
        if len(self.choices) > _MOST_STEPS:
            self._fail(f"it does not come to an end; the threads are at {self._where}")
            raise _Abort
        chosen = self._choose(me, False)
        if chosen != me:
            self._switch(me, chosen)

    def wait(self, me: int, lock: _Lock, limited: bool) -> bool:
        """Wait for a lock; False if a time limit has ended the wait."""
        self._waits[me] = (lock, limited)
        self._switch(me, self._choose(me, True))
        self._waits[me] = None
        expired, self._expired[me] = self._expired[me], False
        return not expired

    def _runnable(self) -> list[int]:
        return [
            number
            for number, done in enumerate(self._done)
            if not done and ((waits := self._waits[number]) is None or not waits[0].taken)
        ]

    def _choose(self, me: int, must: bool) -> int:
        """Choose who goes on: this thread, unless it must not or the order says otherwise."""
        able = self._runnable()
        if not able:
            limited = [n for n, waits in enumerate(self._waits) if not self._done[n] and waits is not None and waits[1]]
            if not limited or self._aborted:
                self._fail(f"nobody can go on; the threads are at {self._where}")
                able = [n for n, done in enumerate(self._done) if not done]
            else:
                self._expired[limited[0]] = True
                able = limited[:1]
        if self._aborted:
            return able[0]
        usual = me if me in able and not must else next((n for n in able if n > me), able[0])
        number = len(self.choices)
        self.choices.append((usual, [one for one in able if one != usual], must))
        chosen = self.order.get(number, usual)
        if self.chance is not None and number not in self.order and self.chance.random() < (0.5 if must else 0.05):
            chosen = self.chance.choice(able)
        if chosen not in able:
            chosen = usual
        if chosen != usual:
            self.taken[number] = chosen
        return chosen

    def _switch(self, me: int, other: int) -> None:
        if other != me:
            self._gates[other].release()
            self._gates[me].acquire()
        if self._aborted:
            raise _Abort

    def _fail(self, text: str) -> None:
        if not self.failure:
            self.failure = text
        self._aborted = True


_run: _Run | None = None


@contextmanager
def _stand_ins() -> Iterator[None]:
    """Let everything that is made meanwhile have locks that the explorer schedules."""
    places: list[tuple[Any, str, Any]] = [
        (threading, "Lock", _Lock),
        (threading, "RLock", _RLock),
        (threading, "_allocate_lock", _Lock),
        (_thread, "allocate_lock", _Lock),
    ]
    before = [getattr(module, name) for module, name, _ in places]
    for module, name, stand in places:
        setattr(module, name, stand)
    try:
        yield
    finally:
        for (module, name, _), real in zip(places, before, strict=True):
            setattr(module, name, real)


def run_once(
    scenario: Scenario, watched: frozenset[str], order: dict[int, int], chance: random.Random | None = None
) -> _Run:
    """Run a scenario in one order; its ``failure`` is empty if all went well."""
    global _run
    with _stand_ins():
        functions, check = scenario()
        _run = run = _Run(order, watched, chance)
        gc.disable()  # finalizers of what earlier runs have left would be steps of this one
        try:
            run.perform(functions)
        finally:
            gc.enable()
            _run = None
        if not run.failure:
            try:
                check()
            except AssertionError as error:
                run.failure = str(error) or "the check failed"
    return run


def explore(
    scenario: Scenario,
    modules: Iterable[ModuleType],
    *,
    bound: int = 2,
    most: int = 20_000,
    beyond: int = 200,
    seed: int = 2026,
) -> int:
    """Run a scenario in every order with up to ``bound`` preemptions, then in ``beyond`` random ones.

    Args:
        scenario: Makes the threads and the check.
        modules: Whose lines are steps.
        bound: Preemptions at most.
        most: Orders to try at most; more is an error, so that "every" stays true.
        beyond: Random orders with any number of preemptions.
        seed: Of those.

    Returns:
        How many orders were tried.

    Raises:
        Failure: One of them went wrong; the text has the order.
    """
    watched = frozenset(str(module.__file__) for module in modules)
    orders: list[tuple[dict[int, int], int, int]] = [({}, 0, -1)]  # the order, its preemptions, its last choice
    tried = 0
    while orders:
        order, preempted, last = orders.pop()
        run = run_once(scenario, watched, order)
        tried += 1
        _report(run, order)
        assert tried <= most, f"more than {most} orders; watch fewer modules, or lower the bound"
        for number in range(last + 1, len(run.choices)):
            _, others, must = run.choices[number]
            if must or preempted < bound:
                orders += [({**order, number: other}, preempted + (not must), number) for other in others]
    for offset in range(beyond):
        run = run_once(scenario, watched, {}, random.Random(seed + offset))
        tried += 1
        _report(run, run.taken)
    return tried


def _report(run: _Run, order: dict[int, int]) -> None:
    if run.failure:
        raise Failure(f"{run.failure}\nin the order {order}")
