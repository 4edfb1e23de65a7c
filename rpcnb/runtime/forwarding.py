"""A serving session that performs every request on another server."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

from rpcnb.errors import RemoteError
from rpcnb.protocol import flows
from rpcnb.protocol.codes import Code
from rpcnb.protocol.messages import CallFunc, CopyAck, CopyFromRemote, CopyToRemote, Raised, Syscall
from rpcnb.runtime.serving import ServingSession
from rpcnb.values import Pointer

if TYPE_CHECKING:
    from collections.abc import Callable

    from rpcnb.protocol.messages import Reply, Request
    from rpcnb.runtime.completion import Done
    from rpcnb.values import Device, TensorMeta, Value

__all__ = ["ForwardingSession", "Onward"]

_PREFIX = "RPCError: Error caught from RPC call:\n"


class Onward(Protocol):
    """A connection to the next server."""

    def exchange(self, request: Request, done: Done) -> None:
        """Send ``request``; call ``done(reply)``, or ``done.error`` if none will come."""

    def close(self) -> None:
        """End it."""


class ForwardingSession(ServingSession):
    """Performs every request on ``onward``; each parks until the reply has come. Handles pass through unchanged."""

    is_async = True

    def __init__(self, onward: Onward) -> None:
        self._onward = onward

    def async_call(self, handle: int, args: tuple[Value, ...], done: Done) -> None:
        """Pass a call on."""
        self._onward.exchange(CallFunc(handle, args), _PassBack(done, flows.result_of))

    def async_copy_to(self, data: memoryview, meta: TensorMeta, nbytes: int, done: Done) -> None:
        """Pass an upload on."""
        self._onward.exchange(CopyToRemote(meta, nbytes, data), _PassBack(done, flows.result_of))

    def async_copy_from(self, meta: TensorMeta, into: memoryview, nbytes: int, done: Done) -> None:
        """Pass a download on."""
        self._onward.exchange(CopyFromRemote(meta, nbytes, into), _PassBack(done, _copied))

    def async_stream_wait(self, device: Device, stream: int, done: Done) -> None:
        """Pass a stream wait on."""
        request = Syscall(Code.DEV_STREAM_SYNC, (device, Pointer(stream)))
        self._onward.exchange(request, _PassBack(done, flows.result_of))

    def async_syscall(self, request: Syscall, done: Done) -> None:
        """Pass any other request on."""
        self._onward.exchange(request, _PassBack(done, lambda reply: flows.result_of(reply)[0]))

    def send_exception(self, error: BaseException) -> Raised:
        """Report an exception of the next server with one prefix for this hop."""
        if isinstance(error, RemoteError):
            return Raised(_PREFIX + error.message)
        return super().send_exception(error)

    def shutdown(self) -> None:
        """End the onward session with the outer one."""
        self._onward.close()


def _copied(reply: Reply) -> None:
    if not isinstance(reply, CopyAck):
        flows.result_of(reply)


class _PassBack:
    """The completion of an onward exchange: what the reply means goes to the outer request."""

    __slots__ = ("_done", "_meaning")

    def __init__(self, done: Done, meaning: Callable[[Reply], Any]) -> None:
        self._done = done
        self._meaning = meaning

    @property
    def cancelled(self) -> bool:
        return self._done.cancelled

    def __call__(self, result: Any = None) -> None:
        try:
            meaning = self._meaning(result)
        except BaseException as error:
            self._done.error(error)
        else:
            self._done(meaning)

    def error(self, error: BaseException) -> None:
        self._done.error(error)
