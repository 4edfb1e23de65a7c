"""Operations that are submitted: futures, awaitables, cancel, time limits, the end of the session."""

from __future__ import annotations

import asyncio
import concurrent.futures
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from conftest import eventually

import rpcnb
from rpcnb import errors
from rpcnb.client.pending import Pending
from rpcnb.link import interrupt
from rpcnb.link.iothread import IO_THREAD
from rpcnb.runtime.registry import Registry

Serve = Callable[..., Any]


@pytest.fixture(params=["lanes", "socket", "local"])
def session(request: pytest.FixtureRequest, serve: Serve, registry: Registry) -> Iterator[Any]:
    async def later(seconds: float, value: Any) -> Any:
        await asyncio.sleep(seconds)
        return value

    def fail() -> None:
        raise ValueError("boom")

    functions: dict[str, Any] = {"add": lambda a, b: a + b, "later": later, "fail": fail}
    names = {f"pending.{name}": function for name, function in functions.items()}
    if request.param != "local":
        for name, function in names.items():
            registry.register(name, function)
        with rpcnb.connect(serve().address, lanes=3 if request.param == "lanes" else 0) as opened:
            yield opened
        return
    for name, function in names.items():
        rpcnb.register_func(name, function, override=True)
    with rpcnb.LocalSession() as opened:
        yield opened
    for name in names:
        rpcnb.remove_global_func(name)


def test_what_an_operation_sends_when_it_goes_on_leaves_at_once(
    serve: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(interrupt, "TICK", 100.0)  # else the next look at interrupts would send it
    monkeypatch.setattr(interrupt, "_TICK_MS", 100_000)
    with rpcnb.connect(serve().address) as session:
        assert "rpc.test.addone" in session.submit(session.list_functions).result(20)


def test_an_interrupt_while_an_operation_is_cancelled_leaves_nothing_half_done(
    session: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    become_cancelled = Pending._become_cancelled

    def interrupted(pending: Pending) -> None:
        become_cancelled(pending)
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(Pending, "_become_cancelled", interrupted)
    job = session.get_function("pending.later").submit(0.5, 1)
    with pytest.raises(KeyboardInterrupt):
        job.cancel()
    assert job.cancelled()
    assert job._settled  # else its reply, or the end of the session, would finish it once more
    assert session.pending == []
    assert session.get_function("pending.add")(1, 2) == 3


def test_submitted_calls_are_futures(session: Any) -> None:
    add = session.get_function("pending.add")
    jobs = [add.submit(index, 1) for index in range(300)]
    done, rest = concurrent.futures.wait(jobs, 20)
    assert not rest
    assert {job.result() for job in done} == set(range(1, 301))
    assert sum(job.result() for job in concurrent.futures.as_completed(jobs)) == sum(range(1, 301))
    assert {job.state for job in jobs} == {"done"}
    assert session.pending == []


def test_a_failing_one_leaves_the_others_right(session: Any) -> None:
    add, fail = session.get_function("pending.add"), session.get_function("pending.fail")
    jobs = [fail.submit() if index == 50 else add.submit(index, 0) for index in range(100)]
    with pytest.raises(errors.RemoteError, match="boom"):
        jobs[50].result()
    assert jobs[50].state == "failed"
    assert isinstance(jobs[50].exception(), errors.RemoteError)
    assert [job.result() for index, job in enumerate(jobs) if index != 50] == [*range(50), *range(51, 100)]


def test_pending_operations_are_listed_and_shown(session: Any) -> None:
    job = session.get_function("pending.later").submit(0.2, "late")
    assert session.pending == [job]
    assert repr(job).startswith(f"<Pending {job.id}: ")
    assert {"sent", "running"} & {job.state, repr(job).split(", ")[1]}
    assert job.result(timeout=10) == "late"
    assert job.finished is not None
    assert job.finished - job.submitted > 0.15


def test_callbacks_run_in_the_io_thread(session: Any) -> None:
    seen: list[tuple[Any, bool]] = []
    job = session.get_function("pending.add").submit(1, 2)
    job.add_done_callback(lambda future: seen.append((future.result(), IO_THREAD.is_current())))
    eventually(lambda: seen)
    assert seen == [(3, True)]


def test_waiting_in_the_io_thread_is_a_deadlock_error(session: Any) -> None:
    seen: list[BaseException] = []
    slow = session.get_function("pending.later").submit(0.2, 1)

    def wait() -> None:
        try:
            slow.result()
        except BaseException as error:
            seen.append(error)

    IO_THREAD.call(wait)
    eventually(lambda: seen)
    assert isinstance(seen[0], errors.DeadlockError)
    assert slow.result() == 1


def test_pending_operations_can_be_awaited(session: Any) -> None:
    add = session.get_function("pending.add")

    async def main() -> list[Any]:
        return list(await asyncio.gather(*(add.submit(index, index) for index in range(20))))

    assert asyncio.run(main()) == [2 * index for index in range(20)]


def test_a_cancelled_await_gives_the_operation_up(session: Any) -> None:
    job = session.get_function("pending.later").submit(0.3, 1)

    async def main() -> None:
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(job, 0.05)

    asyncio.run(main())
    assert job.state == "cancelled"
    assert session.call("pending.add", 1, 2) == 3


def test_cancel_takes_effect_at_once_and_the_session_drains(session: Any) -> None:
    job = session.get_function("pending.later").submit(0.3, 1)
    assert job.cancel()
    assert not job.cancel()
    assert job.cancelled()
    assert session.state == ("draining" if session._lanes is None else "ready")
    with pytest.raises(concurrent.futures.CancelledError):
        job.result()
    assert session.call("pending.add", 1, 2) == 3
    eventually(lambda: session.state == "ready")


def test_a_time_limit_ends_a_pending_operation(session: Any) -> None:
    job = session.get_function("pending.later").submit(0.4, 1, timeout=0.1)
    with pytest.raises(errors.DeadlineExceeded, match=r"pending\.later took"):
        job.result()
    assert session.call("pending.add", 1, 2) == 3


def test_a_wait_that_is_over_leaves_the_operation_on_its_way(session: Any) -> None:
    job = session.get_function("pending.later").submit(0.3, "here")
    with pytest.raises(errors.DeadlineExceeded):
        job.result(timeout=0.05)
    assert job.state == ("sent" if session._lanes is None else "running")
    assert job.result() == "here"


def test_operations_of_several_steps_are_submitted_too(session: Any) -> None:
    source = np.arange(1 << 16, dtype="int32")
    tensor = session.submit(session.array, source).result()
    np.testing.assert_array_equal(session.submit(tensor.numpy).result(), source)
    assert session.submit(tensor.copyfrom, source * 2).result() is tensor
    np.testing.assert_array_equal(tensor.numpy(), source * 2)
    session.submit(session.upload, b"content", "name").result()
    assert session.submit(session.download, "name").result() == b"content"
    assert session.submit(session.get_function("pending.add"), 1, 2).result() == 3
    assert session.submit(session.fn.pending.add, 1, 2).result() == 3
    with pytest.raises(errors.FunctionNotFound):
        session.submit(session.get_function, "nothing.like.it").result()


def test_only_operations_of_the_session_are_submitted(session: Any) -> None:
    with pytest.raises(TypeError, match="expected a method of this session"):
        session.submit(len, "x")
    with pytest.raises(TypeError, match="needs no exchange"):
        session.submit(session.cpu)
    with pytest.raises(errors.ArgumentError):
        session.get_function("pending.add").submit(object(), 1).result()


def test_the_end_of_the_session_ends_what_is_pending(session: Any) -> None:
    later = session.get_function("pending.later")  # once: a look-up would wait behind the first call
    jobs = [later.submit(30, 1) for _ in range(3)]
    session.close()
    for job in jobs:
        with pytest.raises(errors.SessionClosed):
            job.result(timeout=5)


def test_no_future_waits_for_ever_when_the_server_dies(serve: Serve, registry: Registry) -> None:
    async def later() -> None:
        await asyncio.sleep(30)

    registry.register("later", later)
    server = serve()
    with rpcnb.connect(server.address) as session:
        function = session.get_function("later")
        jobs = [function.submit() for _ in range(3)]
        waiting = threading.Thread(target=server.close)
        waiting.start()
        for job in jobs:
            with pytest.raises(errors.SessionLost):
                job.result(timeout=10)
        waiting.join()
        eventually(lambda: session.state == "lost")  # the idle first connection is looked at once a second


def test_a_blocked_caller_and_pending_operations_share_the_session(session: Any) -> None:
    add = session.get_function("pending.add")
    late = session.get_function("pending.later")
    jobs = [add.submit(index, 0) for index in range(50)]
    assert late(0.05, "blocked") == "blocked"
    results: list[Any] = []
    threads = [threading.Thread(target=lambda: results.append(add(1, 2))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [3] * 4
    assert [job.result() for job in jobs] == list(range(50))


def test_many_threads_submit_and_cancel(serve: Serve, registry: Registry) -> None:
    async def echo(value: int) -> int:
        await asyncio.sleep(0)
        return value

    registry.register("echo", echo)
    wrong: list[Any] = []
    with rpcnb.connect(serve().address) as session:
        function = session.get_function("echo")

        def work(start: int) -> None:
            for index in range(start, start + 150):
                job = function.submit(index)
                if index % 3 == 0:
                    job.cancel()
                elif job.result(timeout=20) != index:
                    wrong.append(index)

        threads = [threading.Thread(target=work, args=(1000 * number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not wrong
        assert function(7) == 7
        eventually(lambda: session.pending == [])


def test_several_threads_wait_for_one_operation(session: Any) -> None:
    job = session.submit(session.get_function("pending.later"), 0.3, 7)
    with concurrent.futures.ThreadPoolExecutor(3) as pool:
        results = list(pool.map(lambda _: job.result(timeout=5), range(3)))
    assert results == [7, 7, 7]
    assert job._waiting == []
