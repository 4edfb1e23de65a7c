"""Trying a few times before sleeping: a call across two CPUs in a third of the time.

Waking a sleeping process on another CPU takes several times as long as a whole call does there. Right after traffic it
is therefore worth to ask the socket again and again for a moment, giving the CPU away at each try. Nothing is done when
idle, and the choice is automatic. Trying pays where the other side answers on another CPU. It does not where

* nothing comes for so long (a function that computes, a user who thinks): after some misses in vain it rests;
* one try takes far longer than a system call, as both sides share a CPU, other processes want it, or another thread
  holds the interpreter: likewise.

``RPCNB_SPIN=0`` in the environment switches it off for a process. Deleting this module and its two callers
(``Wire.receive_soon``, ``Connection._serve_quickly``) changes nothing but times.
"""

from __future__ import annotations

import os
import socket
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["Receive", "spinning"]

Receive = "Callable[..., int]"

_NOW: int = getattr(socket, "MSG_DONTWAIT", 0)
_MOMENT = 50e-6  # seconds of trying: longer than a call takes, shorter than anybody notices
# An answer that came within this time might have come within the other, had both sides tried: neither good nor bad.
_NEARLY = 200e-6
_SLOW = 8e-6  # seconds of one try beyond which somebody else has had the CPU or the interpreter
_MOST = 3  # bad waits before it rests
_REST = 128  # waits without trying: what one try in so many costs is lost in them


class Spinner:
    """One socket's waiting."""

    __slots__ = ("_bad", "_receive", "_resting")

    def __init__(self, receive: Callable[..., int]) -> None:
        self._receive = receive
        self._bad = 0  # waits that did not pay, less those that did
        self._resting = 0  # waits left

    def receive(self, view: memoryview) -> int:
        """Receive, as ``sock.recv_into``: try for a moment, then wait as the socket is set to."""
        receive = self._receive
        if self._resting:
            self._resting -= 1
            return receive(view)
        clock, give_way = time.perf_counter, os.sched_yield
        start = last = clock()
        while True:
            try:
                count = receive(view, 0, _NOW)
            except BlockingIOError:  # noqa: PERF203  # nothing yet
                give_way()
                now = clock()
                if now - last > _SLOW:
                    self._was_bad()
                    return receive(view)
                if now - start > _MOMENT:
                    break
                last = now
            else:
                if self._bad:
                    self._bad -= 1
                return count
        try:
            return receive(view)
        finally:
            if clock() - start > _NEARLY:
                self._was_bad()

    def _was_bad(self) -> None:
        """Rest, if trying has not paid several times."""
        self._bad += 1
        if self._bad >= _MOST:
            self._bad = _MOST - 1  # one more is enough after the rest
            self._resting = _REST


def spinning(receive: Callable[..., int]) -> Callable[..., int]:
    """Return a socket's ``recv_into`` that tries before it waits, where that may pay."""
    if not (_NOW and hasattr(os, "sched_yield")) or os.environ.get("RPCNB_SPIN") == "0":
        return receive
    return Spinner(receive).receive  # a bound method: calling an object costs 0.1 us more
