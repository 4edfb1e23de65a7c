"""Awaiting within a time limit: what was done is returned, what failed is known, and nothing goes on afterwards."""

from __future__ import annotations

import asyncio
import gc
from typing import Any

import pytest

from rpcnb.transport.within import within


def run(main: Any) -> list[dict[str, Any]]:
    """Run a coroutine function; returns what the loop had to report."""
    reported: list[dict[str, Any]] = []

    async def watched() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda _, context: reported.append(context))
        await main()
        gc.collect()
        await asyncio.sleep(0)

    asyncio.run(watched())
    return reported


def test_work_in_time_returns_and_raises_what_it_does() -> None:
    async def main() -> None:
        assert await within(asyncio.sleep(0, "done"), 60) == "done"
        assert await within(asyncio.sleep(0, "done"), None) == "done"
        with pytest.raises(KeyError):
            await within(fails_at_once(), 60)

    async def fails_at_once() -> None:
        raise KeyError("it")

    assert run(main) == []


def test_work_that_takes_too_long_has_ended() -> None:
    ended = []

    async def forever() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            ended.append(True)

    async def main() -> None:
        with pytest.raises(asyncio.TimeoutError):
            await within(forever(), 0)
        assert ended

    assert run(main) == []


@pytest.mark.parametrize("failing", [False, True])
def test_work_that_ends_in_the_moment_of_its_cancellation_is_not_lost(failing: bool) -> None:
    async def late() -> str:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            if failing:
                raise ConnectionError("in the last moment") from None
        return "in the last moment"

    async def main() -> None:
        if failing:
            with pytest.raises(ConnectionError):
                await within(late(), 0)
        else:
            assert await within(late(), 0) == "in the last moment"

    assert run(main) == []


def test_a_cancellation_reaches_the_work_and_is_not_lost_and_its_failure_is_not_reported() -> None:
    began = asyncio.Event()

    async def fails_when_cancelled() -> None:
        began.set()
        try:
            await asyncio.Event().wait()
        finally:
            raise ConnectionError("while it was cancelled")

    async def main() -> None:
        waiting = asyncio.ensure_future(within(fails_when_cancelled(), 60))
        await began.wait()
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting

    assert run(main) == []
