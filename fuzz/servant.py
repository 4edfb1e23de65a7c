"""A server's side of a conversation, without sockets: ``handler(bytes, flag)`` as an event-driven server has it.

The first byte: bit 0, the key comes first; bit 1, the client is rpcnb's; bit 2, what it answers is taken slowly. The
second says how the rest, which is what a client sends, is cut. Handles are the same in every session, so a recorded
conversation still names what it named.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np  # noqa: F401  # what the first allocation imports is no input's memory

from fuzz.promises import PromiseBroken, bounded, pieces
from rpcnb.errors import DeviceError, RpcError
from rpcnb.protocol.codes import Limits
from rpcnb.runtime import devices
from rpcnb.runtime.environment import Environment
from rpcnb.runtime.eventdriven import SHUTDOWN, WAIT, WRITE, EventHandler, create_event_driven_server
from rpcnb.runtime.local import LocalServingSession
from rpcnb.runtime.registry import Registry
from rpcnb.values import Device

__all__ = ["Conversation", "one_input"]

_BOTH = 3
_ALLOCATION = 4096  # bytes of a tensor: what is asked for in so many words is not "only announced"


class _SmallMemory(devices.CPUDevice):
    def allocate(self, device: Device, nbytes: int, alignment: int, scope: str) -> devices.Memory:
        if nbytes > _ALLOCATION:
            raise DeviceError(f"expected at most {_ALLOCATION} bytes, got {nbytes}")
        return super().allocate(device, nbytes, min(alignment, 64), scope)


class _KnownHandles(LocalServingSession):
    def __init__(self, environment: Environment | None = None) -> None:
        super().__init__(environment)
        self.table._key = bytes(16)


async def _later(x: Any = None) -> Any:
    return x


def _registry(waiting: list[Any]) -> Registry:
    registry = Registry()
    registry.register("echo", lambda *args: args[0] if args else None)
    registry.register("later", _later)
    registry.register("parked", lambda done, *_: waiting.append(done), callback=True)
    registry.register("adder", lambda x: lambda y: x + y)
    # A client may have a function timed for as long as it likes: not what is looked for here.
    registry.register("runtime.RPCTimeEvaluator", lambda *_: None)
    return registry


def _spawn(coroutine: Any, done: Any) -> Callable[[], object]:
    """Run a coroutine that never waits, here and now."""
    try:
        coroutine.send(None)
    except StopIteration as end:
        done(end.value)
    except Exception as error:
        done.error(error)
    else:
        coroutine.close()
        done.error(RuntimeError("it waits"))
    return lambda: None


class Conversation:
    """One conversation with a fresh server.

    Attributes:
        sent: What the server has said.
        ended: It has ended the conversation.
    """

    def __init__(self, options: int) -> None:
        self.sent = bytearray()
        self.ended = False
        self._most = 7 if options & 4 else None
        self._waiting: list[Any] = []
        environment = Environment(
            registry=_registry(self._waiting),
            limits=Limits(upload_quota=1 << 16, handles=256, input_buffered=1 << 16),
            spawn=_spawn,
            run_in_thread=lambda function: function(),
            later=lambda seconds, function: lambda: None,
            local_session=_KnownHandles,
        )
        key = "%toinit" if options & 1 else "client:"
        self._handler: EventHandler = create_event_driven_server(self._take, "fuzz", key, environment=environment)
        if options & 2:
            self._handler.servant.extended = True

    def _take(self, data: Any) -> int:
        taken = bytes(data)[: self._most]
        self.sent += taken
        return len(taken)

    def feed(self, data: bytes) -> None:
        """Let bytes arrive, and take what is answered."""
        try:
            result = self._handler(data, _BOTH)
            while result == WRITE:
                result = self._handler(b"", _BOTH)
        except RpcError:
            self.ended = True
            return
        if result not in (SHUTDOWN, WAIT):
            raise PromiseBroken(f"expected 0 or 1, got {result}")
        self.ended = self.ended or result == SHUTDOWN

    def finish(self) -> None:
        """Answer what waits, end, and look at what was said."""
        while self._waiting and not self.ended:
            self._waiting.pop()(1)
            self.feed(b"")
        if self.ended:
            said = len(self.sent) + self._handler.servant.output.size
            self.feed(b"\x0c" + bytes(7) + b"\x03" + bytes(11))  # a call: nobody performs it
            if len(self.sent) + self._handler.servant.output.size > said:
                raise PromiseBroken("expected nothing more of a conversation that is over")
        self._handler.servant.cancel()
        if self._handler.servant.session is not None:
            raise PromiseBroken("expected the session to end with its conversation")
        self._check_framing()

    def _check_framing(self) -> None:
        start = 0
        while start + 12 <= len(self.sent):
            size = int.from_bytes(self.sent[start : start + 8], "little")
            code = int.from_bytes(self.sent[start + 8 : start + 12], "little")
            if code not in (1, 4, 5, 8) or size < 4:
                raise PromiseBroken(f"expected replies, got code {code} in {size} bytes at {start}")
            start += 8 + size


def one_input(data: bytes) -> None:
    """Let a client say this."""
    if len(data) < 2:
        return
    kept = devices._APIS[1]
    devices._APIS[1] = _SmallMemory()
    try:
        with bounded(len(data)):
            conversation = Conversation(data[0])
            for piece in pieces(data[2:], data[1]):
                conversation.feed(piece)
            conversation.finish()
    finally:
        devices._APIS[1] = kept
