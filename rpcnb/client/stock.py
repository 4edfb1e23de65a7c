"""TVM's own client on the server of a session: for what wants TVM's types, such as ``relax.VirtualMachine``."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from rpcnb.errors import LocalProtocolError

if TYPE_CHECKING:
    from rpcnb.link.dialer import Dialer
    from rpcnb.transport.address import Address

__all__ = ["open_stock"]


def open_stock(dialer: Dialer | None) -> Any:
    """Open a ``tvm.rpc.RPCSession`` where ``dialer`` leads.

    Raises:
        LocalProtocolError: TVM is not installed here, or its client cannot go there.
    """
    if dialer is None or dialer.address.is_web:
        where = "this process" if dialer is None else str(dialer.address)
        raise LocalProtocolError(f"TVM's client cannot reach {where}: it knows TCP alone")
    try:
        rpc = importlib.import_module("tvm.rpc")
    except ImportError as error:
        raise LocalProtocolError(f"session.tvm() needs TVM here: pip install apache-tvm ({error})") from None
    dialer.renew()
    limit, arguments = dialer.key.session_timeout, [*dialer.constructor] or None
    if dialer.patient:
        tracker: Address = dialer.tracker  # type: ignore[attr-defined]  # a TrackedDialer's
        farm = rpc.connect_tracker(tracker.host, tracker.port)
        return farm.request(tracker.key, session_timeout=limit, session_constructor_args=arguments)
    address = dialer.address
    return rpc.connect(address.host, address.port, dialer.key.stock, limit, session_constructor_args=arguments)
