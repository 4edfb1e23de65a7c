"""Running coroutines on a loop."""

from __future__ import annotations

import asyncio
import contextvars
from collections.abc import Iterator
from typing import Any

import pytest
from conftest import eventually
from runtime_wire import Loop, Outcome

from rpcnb.runtime import tasks
from rpcnb.runtime.tasks import spawn_anywhere, spawn_on

WHERE: contextvars.ContextVar[str] = contextvars.ContextVar("where", default="nowhere")


@pytest.fixture
def loop() -> Iterator[Loop]:
    loop = Loop()
    yield loop
    loop.close()


async def give(value: Any) -> Any:
    await asyncio.sleep(0)
    if isinstance(value, BaseException):
        raise value
    return value


def test_a_result_completes_done(loop: Loop) -> None:
    done = Outcome()
    spawn_on(loop.loop, give(5), done)
    loop.run()
    assert done.results == [5]
    assert done.errors == []


def test_an_exception_completes_done_as_error(loop: Loop) -> None:
    done = Outcome()
    error = ValueError("no")
    spawn_on(loop.loop, give(error), done)
    loop.run()
    assert done.errors == [error]


def test_sys_exit_in_a_coroutine_does_not_end_the_loop(loop: Loop) -> None:
    done = Outcome()
    spawn_on(loop.loop, give(SystemExit(3)), done)
    loop.run()
    assert [str(error) for error in done.errors] == ["the function called sys.exit(3)"]


def test_an_exit_code_that_exits_when_it_is_shown_does_not_end_the_loop_either(loop: Loop) -> None:
    class Code:
        def __repr__(self) -> str:
            raise SystemExit(4)

    done = Outcome()
    spawn_on(loop.loop, give(SystemExit(Code())), done)
    loop.run()
    assert [str(error) for error in done.errors] == ["the function called sys.exit(...)"]


def test_cancelling_a_running_task_completes_done_as_cancelled(loop: Loop) -> None:
    done = Outcome()
    cancel = spawn_on(loop.loop, loop.loop.create_future(), done)
    loop.run()
    cancel()
    loop.run()
    assert [type(error) for error in done.errors] == [asyncio.CancelledError]


def test_cancelling_before_the_start_never_starts_it(loop: Loop) -> None:
    done, other = Outcome(), Outcome()
    cancel = spawn_on(loop.loop, give(1), done)
    cancel_other = spawn_on(loop.loop, loop.loop.create_future(), other)
    cancel()
    cancel_other()
    loop.run()
    assert done.results == []
    assert [type(error) for error in (*done.errors, *other.errors)] == [asyncio.CancelledError] * 2


def test_cancelling_after_the_loop_is_closed_does_nothing() -> None:
    loop = Loop()
    done = Outcome()
    cancel = spawn_on(loop.loop, give(1), done)
    loop.run()
    loop.close()
    cancel()
    assert done.results == [1]


def test_on_the_loop_itself_a_task_starts_at_once(loop: Loop) -> None:
    done = Outcome()

    async def outer() -> None:
        spawn_anywhere(give(7), done)
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        await asyncio.sleep(0)

    loop.loop.run_until_complete(outer())
    assert done.results == [7]


def test_a_task_runs_in_the_callers_context(loop: Loop) -> None:
    done = Outcome()

    async def where() -> str:
        return WHERE.get()

    def launch() -> None:
        WHERE.set("here")
        spawn_on(loop.loop, where(), done)

    contextvars.copy_context().run(launch)
    loop.run()
    assert done.results == ["here"]


def test_without_a_running_loop_a_thread_of_our_own_runs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    own = tasks._background_loop.__wrapped__()  # the cached one would outlive the test
    monkeypatch.setattr(tasks, "_background_loop", lambda: own)
    done = Outcome()
    spawn_anywhere(give(9), done)
    eventually(lambda: done.results == [9])
    own.call_soon_threadsafe(own.stop)
    eventually(lambda: not own.is_running())
    own.close()


def test_an_interrupt_of_the_main_thread_is_the_loops_own() -> None:
    async def interrupted() -> None:
        raise KeyboardInterrupt

    loop = asyncio.new_event_loop()
    outcome = Outcome()

    async def main() -> None:
        spawn_on(loop, interrupted(), outcome)
        await asyncio.sleep(10)

    with pytest.raises(KeyboardInterrupt):
        loop.run_until_complete(main())
    for task in asyncio.all_tasks(loop):
        task.cancel()
    loop.run_until_complete(asyncio.sleep(0))
    loop.close()
    assert isinstance(outcome.errors[0], KeyboardInterrupt)


def test_an_interrupt_raised_on_a_loop_of_another_thread_is_the_functions_failure() -> None:
    async def interrupted() -> None:
        raise KeyboardInterrupt

    outcome = Outcome()
    spawn_anywhere(interrupted(), outcome)
    eventually(lambda: outcome.errors)
    assert "raised KeyboardInterrupt" in str(outcome.errors[0])
