"""Reads off sessions, servers and trackers what a panel shows of them; asks nobody, and may run in any thread."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from rpcnb.client.base import all_sessions
from rpcnb.client.pending import Pending
from rpcnb.client.transfers import Measured
from rpcnb.errors import RpcError
from rpcnb.jupyter.models import Facts, cut
from rpcnb.server.server import all_servers

if TYPE_CHECKING:
    from collections.abc import Iterable

    from rpcnb.client.base import SessionBase
    from rpcnb.client.session import Session
    from rpcnb.server.connection import ClientState
    from rpcnb.server.server import Server

__all__ = ["Scope", "collect", "jobs_of"]

_WAITS = {
    "queued": "an earlier operation on the same thing",
    "running": "a callback at the server",
    "copying": "the link",
    "draining": "what is still on the way",
}


class Scope:
    """What a panel is about: everything, or one session, operation or server.

    Args:
        session: Only this session.
        pending: Only this operation.
        server: Only this server.
    """

    def __init__(self, session: SessionBase | None = None, pending: Any = None, server: Server | None = None) -> None:
        self._session = session
        self._pending = pending
        self._server = server
        self._everything = session is None and pending is None and server is None

    def sessions(self) -> Iterable[SessionBase]:
        """Return the sessions to show."""
        if self._session is not None:
            return [self._session]
        return [one for one in all_sessions() if one.state != "closed"] if self._everything else []

    def operations(self) -> list[Any]:
        """Return the operations to show, oldest first."""
        if self._pending is not None:
            return [self._pending]
        return sorted((one for session in self.sessions() for one in session.pending), key=lambda one: one.id)  # type: ignore[attr-defined]  # both have it

    def servers(self) -> Iterable[Server]:
        """Return the servers to show."""
        if self._server is not None:
            return [self._server]
        return sorted(all_servers(), key=lambda server: server.port) if self._everything else []


def collect(scope: Scope, epoch: float, devices: list[dict[str, Any]], jobs: list[dict[str, Any]]) -> Facts:
    """Return the rows of all sections.

    Args:
        scope: What to look at.
        epoch: Seconds since the epoch at ``time.monotonic() == 0``.
        devices: The rows of that section: they come from trackers, which have to be asked.
        jobs: Likewise, from servers; of all sessions.
    """
    peers = {session.peer for session in scope.sessions()}
    facts = Facts(devices=devices, jobs=[row for row in jobs if row["peer"] in peers])
    for one in scope.operations():
        if one.function == "jobs":
            continue  # the panel's own question
        if isinstance(one, Measured):
            facts.transfers.append(_transfer(one, epoch))
        else:
            facts.pending.append(_operation(one, epoch))
    facts.sessions = [_session(session, epoch) for session in scope.sessions()]
    facts.servers = [_server(server, epoch) for server in scope.servers()]
    return facts


def _transfer(one: Any, epoch: float) -> dict[str, Any]:
    row: dict[str, Any] = {
        "id": one.id,
        "way": one.direction,
        "what": cut(one.what),
        "session": one.session.name,
        "moved": one.moved,
        "total": one.total,
        "rate": round(one.rate),
        "state": one.state,
    }
    if one.done() if isinstance(one, Pending) else one.finished is not None:
        outcome = one._outcome()
        row["state"] = "done" if outcome == "" else "cancelled" if outcome == "cancelled" else "failed"
        if row["state"] == "failed":
            row["error"] = cut(outcome or "")
    return row


def _operation(one: Any, epoch: float) -> dict[str, Any]:
    state = one.state
    row: dict[str, Any] = {
        "id": one.id,
        "function": cut(one.function or "operation"),
        "session": one.session.name,
        "state": state,
        "since": round(epoch + one.submitted, 2),
        "waits": _waits_for(one, state),
        "remote": one.session.is_rpcnb,  # cancelling reaches the server
    }
    if one.deadline is not None:
        row["deadline"] = round(epoch + one.deadline, 2)
    if one.finished is not None:
        row["ended"] = round(epoch + one.finished, 2)
    return row


def _waits_for(one: Any, state: str) -> str:
    """Say why an operation waits: the queue, the link, a callback, or a function that runs."""
    if state == "running" and one.runs_cell:
        return "the cell on the device"
    if state in _WAITS:
        return _WAITS[state]
    if state != "sent":
        return ""
    if one.session.state == "unresponsive":
        return "a server that says nothing"
    earlier = sum(other.id < one.id and other.state == "sent" for other in one.session.pending)
    if not earlier:
        return "the function at the server"
    return "an earlier call" if earlier == 1 else f"{earlier} earlier calls"


def jobs_of(session: Session, seconds: float) -> list[dict[str, Any]]:
    """Ask a session's server for its detached jobs; none where it does not answer in time, or has none."""
    if not session.has_jobs or session.state not in ("ready", "busy", "idle"):
        return []
    try:
        found = session.jobs.facts(seconds)
    except (RpcError, OSError):
        return []
    rows = []
    for facts in found:
        row = {name: facts[name] for name in ("name", "state", "since", "ended", "output")}
        row |= {"session": session.name, "peer": session.peer, "function": cut(facts["function"] or "a cell")}
        error = facts["error"]
        if facts["state"] == "failed":
            row["error"] = cut(f"{error['type']}: {error['text']}" if error else facts["how"])
        rows.append(row)
    return rows


def _session(session: SessionBase, epoch: float) -> dict[str, Any]:
    traffic = session.traffic
    row: dict[str, Any] = {
        "name": session.name,
        "peer": session.peer,
        "key": session.server_key,
        "kind": "rpcnb" if session.is_rpcnb else "stock TVM",
        "state": session.state,
        "requests": traffic.requests,
        "sent": traffic.sent,
        "received": traffic.received,
        "held": session.held_bytes,
        "reconnects": session.can_reconnect and session.state == "lost",
    }
    if session.expires is not None:
        row["expires"] = round(epoch + session.expires, 1)
    if session.ended_by is not None:
        row["error"] = cut(str(session.ended_by))
    return row


def _server(server: Server, epoch: float) -> dict[str, Any]:
    clients = server.pending
    row: dict[str, Any] = {
        "name": server.name,
        "address": server.address,
        "key": server.key,
        "token": server.token is not None,
        "functions": len(server.environment.registry.names()),
        "clients": [_client(client, epoch) for client in clients[:20]],
        "more": max(0, len(clients) - 20),
    }
    busy = server.kernel_busy
    if busy is not None:
        row["busy"] = round(epoch + time.monotonic() - busy, 1)
    return row


def _client(client: ClientState, epoch: float) -> dict[str, Any]:
    now = epoch + time.monotonic()
    row: dict[str, Any] = {"peer": client.peer, "state": client.state, "function": cut(client.function)}
    if client.age:
        row["since"] = round(now - client.age, 1)
    if client.queued:
        row["queued"] = client.queued
    if client.calls:
        row["calls"] = [[cut(name), round(now - age, 1)] for _, name, age in client.calls[:8]]
        row["more"] = max(0, len(client.calls) - 8)
    return row
