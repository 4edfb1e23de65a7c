"""Being in a tracker's list: a server with its own sessions, a proxy with the servers that wait there.

For every session that could still be taken a fresh match key is put into the tracker's queue. A key that was handed
out and that nobody came with is replaced after some looks; after a session a new one is put. When the tracker goes away
it is tried again, soon at first, then every few seconds, and everything begins anew.

Source:
    _listen_loop of python/tvm/rpc/server.py and _update_tracker of python/tvm/rpc/proxy.py of TVM 0.27.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from typing import TYPE_CHECKING, Any, NamedTuple

from rpcnb.errors import RpcError
from rpcnb.farm.messages import ask_pending_keys, put_board, tell_info
from rpcnb.farm.trackerlink import TrackerLink
from rpcnb.transport.address import Address
from rpcnb.transport.backoff import Backoff
from rpcnb.transport.deadline import Deadline

if TYPE_CHECKING:
    from rpcnb.server.server import Server

__all__ = ["Offer", "Registration", "ServerRegistration"]

log = logging.getLogger(__name__)

_POLL = 1.5  # seconds between two looks at the own keys
_UNUSED = 4  # looks at which a key was gone and nobody had come, after which it is replaced
_CONNECT = 5.0  # seconds
_TOLD = 64  # sessions that are told of: a tracker takes 16 KiB of info
_OFFERS = 1000  # at once; a tracker takes 1,024


class Offer(NamedTuple):
    """One session that may be handed out."""

    key: str
    port: int
    match_key: str
    host: str | None = None


class Registration:
    """Keeps somebody registered, on the running loop, until it is closed.

    Args:
        name: Of who is registered, for messages.
        tracker: Host and port.
        level: At which success is logged.

    Attributes:
        connected: The tracker has us in its list.
    """

    def __init__(self, name: str, tracker: tuple[str, int], level: int) -> None:
        self.connected = False
        self._name = name
        self._tracker = Address(*tracker, "", "tracker")
        self._level = level
        self._offers: dict[str, int] = {}  # match key: looks at which it was gone
        self._changed = asyncio.Event()
        self._told = ""  # what was last logged
        self._closed = False
        self._task = asyncio.ensure_future(self._run())

    # -- what is registered --------------------------------------------------------------------------------------

    def _info(self) -> dict[str, Any]:
        """Return what to say of oneself."""
        raise NotImplementedError

    def _next_offer(self) -> Offer | None:
        """Return a session that could be taken and is not offered yet; its match key is good from now on."""
        raise NotImplementedError

    def _withdraw(self, match_key: str) -> None:
        """Let nobody in with this match key any more."""
        raise NotImplementedError

    def _used(self, match_key: str) -> bool:
        """Note that somebody came with a match key; False if it is not one of ours."""
        return self._offers.pop(match_key, None) is not None

    def changed(self) -> None:
        """Have offers and info looked at."""
        self._changed.set()

    # -- the conversation ----------------------------------------------------------------------------------------

    async def _run(self) -> None:
        backoff = Backoff()
        while not self._closed:
            try:
                await self._stay(backoff)
            except (RpcError, OSError, asyncio.TimeoutError) as error:
                if not self._told:  # once, not at every try
                    log.warning("%s: not in the list of %s: %s", self._name, self._tracker, error)
                self._told = str(error) or type(error).__name__
            except Exception:
                log.exception("%s: the registration at %s failed", self._name, self._tracker)
            await asyncio.sleep(backoff.next())

    async def _stay(self, backoff: Backoff) -> None:
        """Register, and stay so until the tracker goes away."""
        link = await TrackerLink.open(self._tracker, Deadline(_CONNECT, f"connect to {self._tracker}"))
        try:
            await link.run(tell_info(self._info()))
            await self._put_missing(link)
            log.log(self._level, "%s: in the list of %s", self._name, self._tracker)
            backoff.reset()
            self._told = ""
            self.connected = True
            await self._keep(link)
        finally:
            self.connected = False
            self._withdraw_all()
            link.close()

    async def _put_missing(self, link: TrackerLink) -> None:
        while len(self._offers) < _OFFERS and (offer := self._next_offer()) is not None:
            self._offers[offer.match_key] = 0  # before the tracker knows it: a client may come at once
            await link.run(put_board(*offer))

    async def _keep(self, link: TrackerLink) -> None:
        """Replace match keys that were used, or taken and never used."""
        looked = time.monotonic()
        while not self._closed:
            try:
                await asyncio.wait_for(self._changed.wait(), max(0.0, looked + _POLL - time.monotonic()))
            except asyncio.TimeoutError:
                looked = time.monotonic()
                await self._look(link)
            if self._changed.is_set():
                self._changed.clear()
                await self._put_missing(link)
                await link.run(tell_info(self._info()))

    async def _look(self, link: TrackerLink) -> None:
        """See which match keys are gone, and replace those that nobody came with."""
        pending = await link.run(ask_pending_keys())
        for match_key, missed in list(self._offers.items()):
            if match_key in pending:
                self._offers[match_key] = 0
            elif missed + 1 < _UNUSED:
                self._offers[match_key] = missed + 1
            else:
                del self._offers[match_key]
                self._withdraw(match_key)
        await self._put_missing(link)

    def _withdraw_all(self) -> None:
        for match_key in self._offers:
            self._withdraw(match_key)
        self._offers.clear()

    def close(self) -> None:
        """End it; on the loop."""
        self._closed = True  # wait_for may lose a cancellation (before Python 3.12)
        self._task.cancel()
        self._withdraw_all()


class ServerRegistration(Registration):
    """Keeps a server registered.

    Args:
        server: The server; its gate issues the match keys.
        tracker: Host and port.
        port: Under which others reach the server.
        slots: Sessions that may be handed out at once.
    """

    def __init__(self, server: Server, tracker: tuple[str, int], port: int, slots: int) -> None:
        self._server = server
        self._port = port
        self._slots = slots
        self._instance = secrets.token_hex(8)
        self._busy: dict[str, dict[str, Any]] = {}  # by match key: the session that came with it
        super().__init__(server.name, tracker, server.log_level)

    def _info(self) -> dict[str, Any]:
        server = self._server
        sessions = list(self._busy.values())[:_TOLD]
        own = {"instance": self._instance, "token": server.token is not None, "sessions": sessions}
        if server.draining:
            own["draining"] = [one.function for one in server.draining.values()][:_TOLD]
        if server.jobs:
            own["jobs"] = server.jobs[:_TOLD]
        return {"key": f"server:{server.key}", "addr": [server.custom_addr, self._port], "rpcnb": own}

    def _next_offer(self) -> Offer | None:
        if len(self._offers) + len(self._busy) >= self._slots:
            return None
        server = self._server
        return Offer(server.key, self._port, server.gate.issue(), server.custom_addr)

    def _withdraw(self, match_key: str) -> None:
        self._server.gate.withdraw(match_key)

    def opened(self, match_key: str, peer: str, limit: float | None) -> None:
        """Note that a session came with this match key."""
        self._used(match_key)
        self._busy[match_key] = {"peer": peer, "limit": limit}
        self.changed()

    def ended(self, match_key: str) -> None:
        """Note that its session has ended."""
        if self._busy.pop(match_key, None) is not None:
            self.changed()
