"""Texts that nobody is to see."""

from __future__ import annotations

__all__ = ["TOKEN_ON_LINE", "Secret", "hidden"]

TOKEN_ON_LINE = "a token on a line stays in the history and in the list of processes; use a file: --token-file FILE"


class Secret(str):
    """A text that does not show itself: tracebacks print what local variables hold."""

    __slots__ = ()

    def __repr__(self) -> str:
        return "'***'"


def hidden(token: str | None) -> Secret | None:
    """Return a token that does not show itself."""
    return None if token is None else Secret(token)
