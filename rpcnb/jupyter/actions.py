"""What clicks in a panel do. A click may arrive in the main thread or in a subshell's, so it only posts."""

from __future__ import annotations

import logging
import threading
from typing import TYPE_CHECKING, Any

from rpcnb.client.aiooperation import AsyncOperation
from rpcnb.client.base import all_sessions
from rpcnb.client.session import Session
from rpcnb.errors import RpcError
from rpcnb.jupyter.bridge import BRIDGE
from rpcnb.link import iothread

if TYPE_CHECKING:
    from collections.abc import Callable

    from rpcnb.client.base import SessionBase

__all__ = ["act"]

log = logging.getLogger(__name__)


def act(message: dict[str, Any]) -> None:
    """Do what a click asks for: ``{"op": "cancel", "id": 12}``; anything else is ignored."""
    found = _OPERATIONS.get(str(message.get("op")))
    if found is None:
        log.debug("a panel sent %r", message)
        return
    iothread.IO_THREAD.call(lambda: found(message))


def _number(message: dict[str, Any]) -> int:
    found = message.get("id")
    return found if isinstance(found, int) else 0


def _cancel(message: dict[str, Any]) -> None:
    for session in all_sessions():
        operation = session._pending.get(_number(message))
        if isinstance(operation, AsyncOperation):
            operation.cancel_soon()
        elif operation is not None:
            operation.cancel()


def _dismiss(message: dict[str, Any]) -> None:
    BRIDGE.dismiss(_number(message))


def _find(message: dict[str, Any]) -> SessionBase | None:
    return next((one for one in all_sessions() if one.name == message.get("session")), None)


def _cancel_job(message: dict[str, Any]) -> None:
    session = _find(message)
    if isinstance(session, Session):
        threading.Thread(target=_cancel_job_now, args=(session, message), name="rpcnb-job", daemon=True).start()


def _cancel_job_now(session: Session, message: dict[str, Any]) -> None:
    try:
        session.jobs[str(message.get("name"))].cancel()
    except (RpcError, LookupError) as error:
        log.info("%s: a job could not be cancelled: %s", session.name, error)


def _close(message: dict[str, Any]) -> None:
    session = _find(message)
    if isinstance(session, Session):
        session.close()
    elif session is not None:
        session._close_now()  # type: ignore[attr-defined]  # an awaited one's


def _reconnect(message: dict[str, Any]) -> None:
    session = _find(message)
    if isinstance(session, Session):
        threading.Thread(target=_reconnect_now, args=(session,), name="rpcnb-reconnect", daemon=True).start()


def _reconnect_now(session: Session) -> None:
    try:
        session.reconnect()
    except RpcError as error:
        log.warning("%s could not be opened again: %s", session.name, error)


_OPERATIONS: dict[str, Callable[[dict[str, Any]], None]] = {
    "cancel": _cancel,
    "dismiss": _dismiss,
    "cancel_job": _cancel_job,
    "close": _close,
    "reconnect": _reconnect,
}
