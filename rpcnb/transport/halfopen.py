"""Connections that have not yet said what they want: strangers may hold some, and never all that a process can have."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Generic, TypeVar

from rpcnb.transport.address import is_loopback

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["HalfOpen", "within_descriptors"]

C = TypeVar("C")


def within_descriptors(most: int, share: float = 0.25) -> int:
    """Return ``most``, or this share of the descriptors that the process may have open, if that is less."""
    try:
        import resource
    except ImportError:  # pragma: no cover  # Windows counts no descriptors
        return most
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return most if soft == resource.RLIM_INFINITY else max(1, min(most, int(soft * share)))


class HalfOpen(Generic[C]):
    """Such connections of one listener: few in total, where the oldest goes, and fewer of one address.

    Args:
        close: Ends one; it may call :meth:`forget`.
        most: At most; a quarter of the process's descriptors, if that is less.
        per_address: Of one address at most.
        exempt_loopback: This machine may have any number of them.
    """

    def __init__(
        self, close: Callable[[C], object], most: int = 256, per_address: int = 64, exempt_loopback: bool = True
    ) -> None:
        self._close = close
        self._most = within_descriptors(most)
        self._per_address = per_address
        self._exempt_loopback = exempt_loopback
        self._hosts: dict[C, str] = {}  # in order of arrival
        self._counts: Counter[str] = Counter()

    def __len__(self) -> int:
        return len(self._hosts)

    def admits(self, host: str) -> bool:
        """Tell whether an address may have one more."""
        exempt = self._exempt_loopback and is_loopback(host)
        return exempt or self._counts[host] < self._per_address

    def add(self, one: C, host: str) -> None:
        """Take one more; if there are too many, the oldest goes."""
        while len(self._hosts) >= self._most:
            self.drop_oldest()
        self._hosts[one] = host
        self._counts[host] += 1

    def forget(self, one: C) -> None:
        """Note that it has said what it wants, or ended."""
        host = self._hosts.pop(one, None)
        if host is not None:
            self._counts[host] -= 1
            if not self._counts[host]:
                del self._counts[host]

    def drop_oldest(self) -> bool:
        """End the oldest, if there is one; returns whether."""
        for one in self._hosts:
            self.forget(one)
            self._close(one)
            return True
        return False

    def clear(self) -> None:
        """End all."""
        while self.drop_oldest():
            pass
