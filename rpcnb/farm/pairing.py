"""Who waits at a proxy, without sockets: peers that dial in are joined by role and key.

Without a tracker one peer waits per role and key, and the newcomer of the other role is joined with it. With a tracker
any number of servers may wait under one key; each gets a match key of its own, which a client must present at once.

Source:
    ProxyServerHandler of python/tvm/rpc/proxy.py of TVM 0.27.
"""

from __future__ import annotations

import secrets
from typing import TYPE_CHECKING, Generic, TypeVar

from rpcnb.errors import RemoteProtocolError
from rpcnb.farm.messages import can_be_listed
from rpcnb.protocol.handshake import KeyText

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["DUPLICATE", "MISMATCH", "WAITS", "Pairing"]

P = TypeVar("P")

WAITS, DUPLICATE, MISMATCH = "waits", "duplicate", "mismatch"
_OTHER = {"client": "server", "server": "client"}


def _match_key(key: str) -> str:
    return f"{key}:{secrets.token_urlsafe(16)}"


class Pairing(Generic[P]):
    """The peers that wait.

    Args:
        tracked: Clients come with match keys that a tracker hands out.
    """

    def __init__(self, tracked: bool = False) -> None:
        self._tracked = tracked
        self._waiting: dict[tuple[str, str], P] = {}
        self._servers: dict[P, str] = {}  # that wait, with a tracker: the key of each
        self._match_keys: dict[str, P] = {}

    def __len__(self) -> int:
        return len(self._waiting) + len(self._servers)

    def arrive(self, peer: P, text: str) -> P | str:
        """Note a peer that has presented its key text.

        Returns:
            The peer with which it is joined; or WAITS, DUPLICATE, MISMATCH.

        Raises:
            RemoteProtocolError: The text does not begin with a role.
        """
        key = KeyText.parse(text)
        if not key.role:
            raise RemoteProtocolError(f"expected a key text 'client:...' or 'server:...', got {text[:40]!r}")
        if self._tracked:
            return self._arrive_tracked(peer, key)
        other = self._waiting.pop((_OTHER[key.role], key.key), None)
        if other is not None:
            return other
        if (key.role, key.key) in self._waiting:
            return DUPLICATE
        self._waiting[key.role, key.key] = peer
        return WAITS

    def _arrive_tracked(self, peer: P, key: KeyText) -> P | str:
        if key.role == "server":
            if not can_be_listed(_match_key(key.key)):
                raise RemoteProtocolError(f"expected a key that a tracker lists, got {key.key[:40]!r}")
            self._servers[peer] = key.key
            return WAITS
        server = self._match_keys.pop(key.key, None)
        if server is None:
            return MISMATCH
        del self._servers[server]
        return server

    def leave(self, peer: P) -> None:
        """Forget a peer that waits no longer."""
        self._waiting = {place: waiting for place, waiting in self._waiting.items() if waiting is not peer}
        self._servers.pop(peer, None)
        self._match_keys = {match_key: server for match_key, server in self._match_keys.items() if server is not peer}

    # -- with a tracker ------------------------------------------------------------------------------------------

    @property
    def keys(self) -> list[str]:
        """The keys of the servers that wait."""
        return sorted(set(self._servers.values()))

    def match_keys_of(self, peer: P) -> Iterator[str]:
        """Yield the match keys of a server that waits."""
        yield from (match_key for match_key, server in self._match_keys.items() if server is peer)

    def issue(self) -> tuple[str, str] | None:
        """Return key and a fresh match key of a server that waits and has none; None if all have one."""
        offered = set(map(id, self._match_keys.values()))
        for server, key in self._servers.items():
            if id(server) not in offered:
                match_key = _match_key(key)
                self._match_keys[match_key] = server
                return key, match_key
        return None

    def withdraw(self, match_key: str) -> None:
        """Join nobody with this match key any more."""
        self._match_keys.pop(match_key, None)
