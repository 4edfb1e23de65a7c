"""Who may open a session: keys, tokens, and how often a stranger may guess."""

from __future__ import annotations

import hmac
import re
import secrets
from collections import deque
from typing import TYPE_CHECKING

from rpcnb.protocol.handshake import KeyText
from rpcnb.protocol.proof import NONCE

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["Gate", "Guesses", "check_token", "new_token"]

_TOKEN = re.compile(r"[A-Za-z0-9_-]+")
_WINDOW = 60.0  # seconds for which a wrong attempt counts
_STEP, _LONGEST = 0.25, 2.0  # seconds by which each further refusal comes later, and at most


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


def _word(text: str) -> str:
    """Return what must be the key, by TVM's own rule: the first word, whole."""
    return text.split(None, 1)[0] if text.split() else ""


class Guesses:
    """Delays what wrong attempts are told; the right one of the same address is served at once.

    Args:
        clock: Seconds.
        allowed: Wrong attempts per minute and address that are refused without delay.
    """

    def __init__(self, clock: Callable[[], float], allowed: int = 10) -> None:
        self._clock = clock
        self._allowed = allowed
        self._wrong: dict[str, deque[float]] = {}

    def note(self, address: str) -> float:
        """Note a wrong attempt; returns the seconds after which it may be told."""
        now = self._clock()
        if len(self._wrong) > 4096:
            self._wrong = {one: times for one, times in self._wrong.items() if now - times[-1] < _WINDOW}
        times = self._wrong.setdefault(address, deque(maxlen=self._allowed + int(_LONGEST / _STEP)))
        times.append(now)
        lately = sum(now - one < _WINDOW for one in times)
        return min(_LONGEST, max(0, lately - self._allowed) * _STEP)


class Gate:
    """Decides on the key text of a client.

    Args:
        key: Key that the server serves.
        token: Token that a client must present, or None.
        tracked: Clients come with match keys that a tracker hands out, each good for one session, instead of the key.
        trusts_tracker: Such a match key is enough; else the token is needed as well.
    """

    def __init__(
        self,
        key: str,
        token: str | None,
        *,
        tracked: bool = False,
        trusts_tracker: bool = False,
    ) -> None:
        self.key = key
        self.token = token
        self._match_keys: set[str] | None = set() if tracked else None
        self._needs_token = token is not None and not (tracked and trusts_tracker)

    def admits(self, text: str, *, proved: bool = False) -> bool:
        """Tell whether a client with this key text may enter; with ``proved`` it has proved the token."""
        known = self._knows(text) & (proved or self.has_token(text))
        if known and self._match_keys is not None:
            self._match_keys.discard(_word(text).removeprefix("client:"))
        return known

    def _knows(self, text: str) -> bool:
        keys = [self.key] if self._match_keys is None else list(self._match_keys)
        word = _word(text).encode()
        return any([hmac.compare_digest(word, f"client:{key}".encode()) for key in keys])  # noqa: C419  # all are compared

    def asks_for_proof(self, text: str) -> bool:
        """Tell whether a client with this key text has the right key, and is to prove the token."""
        key = KeyText.parse(text)
        return self.can_prove(key) and (self.is_visit(key) or self._knows(text))

    def can_prove(self, key: KeyText) -> bool:
        """Tell whether a client offers to prove the token, if there is one, instead of giving it."""
        return self.token is not None and NONCE in key.options and "-token" not in key.options

    def has_token(self, text: str) -> bool:
        """Tell whether a client with this key text has the token, if it needs one."""
        if not self._needs_token or self.token is None:
            return True
        given = KeyText.parse(text).options.get("-token", "")
        return hmac.compare_digest(given.encode(), self.token.encode())

    def is_visit(self, key: KeyText) -> bool:
        """Tell whether a client comes by itself to a server that its tracker hands out; it may look after jobs."""
        return self._match_keys is not None and key.key == self.key and key.features is not None

    def lets_visit(self, text: str, *, proved: bool = False) -> bool:
        """Tell whether a client with this key text comes so, and has the token."""
        key = KeyText.parse(text)
        given = key.options.get("-token", "")
        right = proved or self.token is None or hmac.compare_digest(given.encode(), self.token.encode())
        return self.is_visit(key) and right

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

    def __repr__(self) -> str:
        return f"Gate(key={self.key!r}, token={'set' if self.token else 'none'})"
