"""A loop in a thread of its own."""

from __future__ import annotations

import asyncio
import errno

import pytest

from rpcnb.transport.loopthread import LoopThread


def test_who_cannot_have_a_loop_learns_why(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> None:
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(asyncio, "new_event_loop", refuse)
    with pytest.raises(OSError, match="Too many open files"):
        LoopThread("test")
