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
        tracked: Clients come with match keys that a tracker hands out, each good for one session, instead of the key.
        trusts_tracker: Such a match key is enough; else the token is needed as well.
    """

    def __init__(
        self,
        key: str,
        token: str | None,
        clock: Callable[[], float],
        failures: int = 10,
        *,
        tracked: bool = False,
        trusts_tracker: bool = False,
    ) -> None:
        self.key = key
        self.token = token
        self._match_keys: set[str] | None = set() if tracked else None
        self._needs_token = token is not None and not (tracked and trusts_tracker)
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
        keys = [self.key] if self._match_keys is None else list(self._match_keys)
        known = any([hmac.compare_digest(word.encode(), f"client:{key}".encode()) for key in keys])  # noqa: C419  # all
        known &= self.has_token(text)
        if not known and address is not None:
            self.note_failure(address)
        if known and self._match_keys is not None:
            self._match_keys.discard(word.removeprefix("client:"))
        return known

    def has_token(self, text: str) -> bool:
        """Tell whether a client with this key text has the token, if it needs one."""
        if not self._needs_token or self.token is None:
            return True
        given = KeyText.parse(text).options.get("-token", "")
        return hmac.compare_digest(given.encode(), self.token.encode())

    def is_visit(self, key: KeyText) -> bool:
        """Tell whether a client comes by itself to a server that its tracker hands out; it may look after jobs."""
        return self._match_keys is not None and key.key == self.key and key.features is not None

    def lets_visit(self, text: str) -> bool:
        """Tell whether a client with this key text comes so, and has the token."""
        key = KeyText.parse(text)
        given = key.options.get("-token", "")
        return self.is_visit(key) and (self.token is None or hmac.compare_digest(given.encode(), self.token.encode()))

    def issue(self) -> str:
        """Return a fresh match key of 128 bits, good for one session."""
        assert self._match_keys is not None, "tracked"
        match_key = f"{self.key}:{secrets.token_urlsafe(16)}"
        self._match_keys.add(match_key)
        return match_key

    def withdraw(self, match_key: str) -> None:
        """Let nobody in with this match key any more."""
        assert self._match_keys is not None, "tracked"
        self._match_keys.discard(match_key)

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
