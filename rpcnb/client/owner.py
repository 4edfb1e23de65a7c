"""A session as its operations see it; both kinds are one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from rpcnb.events import Observers

__all__ = ["Owner"]


class Owner(Protocol):
    """Whose operation it is.

    Attributes:
        name: In messages and panels.
        peer: Address of the server.
        observers: Who is told of the session's events.
    """

    name: str
    peer: str
    observers: Observers
    _ops: Any
    _pending: dict[int, Any]
    _told_end: bool

    @property
    def _link(self) -> Any:
        """The connection in use."""

    @property
    def _lanes(self) -> Any:
        """Its further connections, or None."""

    @property
    def state(self) -> str:
        """``ready``, ``busy``, ``draining``, ``unresponsive``, ``lost`` or ``closed``."""

    def _tell(self, kind: type[Any], **facts: Any) -> None:
        """Tell the observers, if there are any."""
