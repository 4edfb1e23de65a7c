"""Trying a few times before sleeping: a call across two CPUs in a third of the time.

Waking a sleeping process on another CPU takes several times as long as a whole call does there. Right after traffic it
is therefore worth to ask the socket again and again for a moment, giving the CPU away at each try. Nothing is done when
idle, and the choice is automatic. Trying pays where the other side answers on another CPU. It does not where

* nothing comes for so long (a function that computes, a user who thinks): after some misses in vain it rests;
* one try takes far longer than a system call, as both sides share a CPU, other processes want it, or another thread
  holds the interpreter: likewise, and longer each time.

``RPCNB_SPIN=0`` in the environment switches it off for a process. Deleting this module and its two callers
(in ``Wire.wait_in_receive`` and ``Connection``) changes nothing but times.
"""

from __future__ import annotations

import os
import socket
import time
from itertools import chain, repeat
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

__all__ = ["receiving"]

_NOW: int = getattr(socket, "MSG_DONTWAIT", 0)
_MOMENT = 50e-6  # seconds of trying: longer than a call takes, shorter than anybody notices
# An answer that came within this time might have come within the other, had both sides tried: so it is worth to go on.
_NEARLY = 200e-6
_SLOW = 4  # times the quickest try (2 us): somebody else has had the CPU or the interpreter meanwhile
# Bad waits, less good ones, before it rests; and again after the rest. Fewer would give up where other processes take
# the CPU now and then: there a null call took 40 us with 3, 12 us with 12.
_MOST, _AGAIN = 12, 3
_REST, _LONGEST = 128, 8192  # waits without trying; longer each time until a wait after it was good


class Spinner:
    """One socket's waiting.

    Args:
        receive: Its ``recv_into``.
        give_way: Lets others have the CPU.
        clock: Seconds.
    """

    __slots__ = ("_bad", "_clock", "_give_way", "_quickest", "_receive")

    def __init__(
        self,
        receive: Callable[..., int],
        give_way: Callable[[], object],
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._receive = receive
        self._give_way = give_way
        self._clock = clock
        self._bad = 0  # waits that did not pay, less those that did
        self._quickest = _MOMENT  # seconds of one try

    def turns(self) -> Iterator[tuple[Callable[..., int]] | repeat[Callable[..., int]]]:
        """Yield what receives next: this, or for a while the socket alone, which then costs nothing more."""
        rest = _REST
        while True:
            if self._bad < _MOST:
                yield (self.receive,)
                if self._bad < _MOST - _AGAIN:
                    rest = _REST
            else:
                self._bad = _MOST - _AGAIN
                yield repeat(self._receive, rest)
                rest = min(2 * rest, _LONGEST)

    def receive(self, view: memoryview) -> int:
        """Receive, as ``sock.recv_into``: try for a moment, then wait as the socket is set to."""
        receive, clock, give_way = self._receive, self._clock, self._give_way
        start = last = clock()
        tries = slow = 0
        while True:
            try:
                count = receive(view, 0, _NOW)
            except BlockingIOError:  # noqa: PERF203  # nothing yet
                give_way()
                now = clock()
                took, last = now - last, now
                tries += 1
                if took < self._quickest:
                    self._quickest = took
                elif took > _SLOW * self._quickest:
                    slow += 1
                    if slow > 1:  # the first one after a long time may be slow by itself
                        break
                if now - start > _MOMENT:
                    break
            else:
                if tries:
                    self._judge(2 * slow >= tries)  # it came as the CPU was given away: sleeping does the same
                return count
        try:
            return receive(view)
        finally:
            self._judge(slow > 1 or clock() - start > _NEARLY)

    def _judge(self, bad: bool) -> None:
        """Note how a wait was."""
        if bad:
            self._bad += 1
        elif self._bad:
            self._bad -= 1


def receiving(receive: Callable[..., int]) -> Iterator[Callable[..., int]]:
    """Yield for one wait after the other what to call instead of a socket's ``recv_into``; for one thread at a time."""
    if not (_NOW and hasattr(os, "sched_yield")) or os.environ.get("RPCNB_SPIN") == "0":
        return repeat(receive)
    return chain.from_iterable(Spinner(receive, os.sched_yield).turns())
