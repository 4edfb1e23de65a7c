"""Who may open a session: keys, tokens, and how often a stranger may guess."""

from __future__ import annotations

import hmac
import re
import secrets
from collections import deque
from typing import TYPE_CHECKING

from rpcnb.protocol.handshake import KeyText

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["Gate", "check_token", "new_token"]

_TOKEN = re.compile(r"[A-Za-z0-9_-]+")
_WINDOW = 60.0


def new_token() -> str:
    """Return a fresh token of 192 bits."""
    return secrets.token_urlsafe(24)


def check_token(token: str) -> str:
    """Return ``token`` if it can travel as an option of a key text.

    Raises:
        ValueError: It has other characters than letters, digits, ``_`` and ``-``.
    """
    if not _TOKEN.fullmatch(token):
        raise ValueError("a token consists of letters, digits, '_' and '-'")
    return token


class Gate:
    """Decides on the key text of a client.

    Args:
        key: Key that the server serves.
        token: Token that a client must present, or None.
        clock: Seconds, for the rate of failures.
        failures: Wrong attempts per minute and address; further ones are refused unseen.
    """

    def __init__(self, key: str, token: str | None, clock: Callable[[], float], failures: int = 10) -> None:
        self.key = key
        self.token = token
        self._clock = clock
        self._allowed = failures
        self._failed: dict[str, deque[float]] = {}

    def admits(self, text: str, address: str | None = None) -> bool:
        """Tell whether a client with this key text may enter.

        Args:
            text: Key text of the client.
            address: Where it comes from; None is not counted.
        """
        if address is not None and self.throttles(address):
            return False
        # TVM's own rule: the first word, whole.
        word = text.split(None, 1)[0] if text.split() else ""
        known = hmac.compare_digest(word.encode(), f"client:{self.key}".encode())
        if self.token is not None:
            given = KeyText.parse(text).options.get("-token", "")
            known &= hmac.compare_digest(given.encode(), self.token.encode())
        if not known and address is not None:
            self.note_failure(address)
        return known

    def note_failure(self, address: str) -> None:
        """Count a wrong attempt of this address."""
        self._failed.setdefault(address, deque(maxlen=self._allowed)).append(self._clock())

    def throttles(self, address: str) -> bool:
        """Tell whether this address has guessed so often that it is refused unseen."""
        if len(self._failed) > 4096:
            self._failed = {one: times for one, times in self._failed.items() if self._clock() - times[-1] < _WINDOW}
        times = self._failed.get(address)
        return times is not None and len(times) == self._allowed and self._clock() - times[0] < _WINDOW

    def __repr__(self) -> str:
        return f"Gate(key={self.key!r}, token={'set' if self.token else 'none'})"
