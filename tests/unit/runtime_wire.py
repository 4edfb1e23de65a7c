"""A client's end of a conversation with the event-driven server, without sockets; for the tests of the runtime."""

from __future__ import annotations

import asyncio
from functools import partial
from typing import Any

from rpcnb.protocol.codes import Code, Role
from rpcnb.protocol.endpoint import Endpoint
from rpcnb.protocol.messages import (
    CallFunc,
    CopyAck,
    CopyFromRemote,
    CopyToRemote,
    InitServer,
    Raised,
    Request,
    Return,
    Shutdown,
    Syscall,
    encode_packet,
)
from rpcnb.protocol.sequence import Buffer
from rpcnb.runtime.environment import Environment
from rpcnb.runtime.eventdriven import EventHandler, create_event_driven_server
from rpcnb.runtime.local import LocalServingSession
from rpcnb.runtime.tasks import spawn_on
from rpcnb.values import CPU, Device, FunctionRef, ModuleRef, ObjectRef, Pointer, TensorMeta, Value, dtype

VOID = bytes.fromhex("0c00000000000000 04000000 01000000 00000000")
READ, WRITE, BOTH = 1, 2, 3


def packet(*messages: Any) -> bytes:
    """The bytes of messages, one after the other."""
    return b"".join(bytes(part) for message in messages for part in encode_packet(message))


class Loop:
    """A loop in this thread that runs only when told; a stand-in for the server's."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self.spawn = partial(spawn_on, self.loop)

    def run(self) -> None:
        """Run what is ready, and what that makes ready, a few rounds."""
        for _ in range(8):
            self.loop.call_soon(self.loop.stop)
            self.loop.run_forever()

    def close(self) -> None:
        for task in asyncio.all_tasks(self.loop):
            task.cancel()
        self.run()
        self.loop.close()


class Client:
    """The other end of an event handler.

    Attributes:
        chunks: What ``fsend`` took, chunk by chunk.
        results: What the handler returned.
        accept: Bytes that ``fsend`` accepts per call; None for all, -1 for a broken connection.
    """

    def __init__(
        self,
        environment: Environment | None = None,
        *,
        init: InitServer | None = InitServer(),  # noqa: B008  # never changed
        extended: bool = False,
        key: str = "client:",
    ) -> None:
        self.chunks: list[bytes] = []
        self.results: list[int] = []
        self.accept: int | None = None
        self.writes_wanted = 0
        self.endpoint = Endpoint(Role.CLIENT)
        self.environment = environment or Environment()
        self.handler: EventHandler = create_event_driven_server(
            self._fsend, "test", key, environment=self.environment, want_write=self._want_write
        )
        self.servant = self.handler.servant
        self.servant.extended = extended
        if init is not None:
            assert isinstance(self.ask(init), Return)
            self.chunks.clear()
            self.results.clear()

    def _fsend(self, data: Buffer) -> int:
        if self.accept is not None and self.accept < 0:
            return -1
        taken = bytes(data)[: self.accept]
        if taken:
            self.chunks.append(taken)
            self.endpoint.receive_data(taken)
        return len(taken)

    def _want_write(self) -> None:
        self.writes_wanted += 1

    @property
    def local(self) -> LocalServingSession:
        session = self.servant.session
        assert isinstance(session, LocalServingSession)
        return session

    @property
    def sent(self) -> bytes:
        """Everything the server has sent since ``chunks`` was cleared."""
        return b"".join(self.chunks)

    def feed(self, data: bytes = b"", flag: int = BOTH) -> int:
        self.results.append(self.handler(data, flag))
        return self.results[-1]

    def send(self, *messages: Request | Shutdown) -> int:
        """Send requests in one piece."""
        return self.feed(b"".join(bytes(part) for message in messages for part in self.endpoint.send(message)))

    def reply(self) -> Any:
        """Return the next reply, or None."""
        return self.endpoint.next_message()

    def ask(self, request: Request) -> Any:
        """Send one request and return its reply."""
        self.send(request)
        return self.reply()

    def error(self, request: Request) -> Raised:
        reply = self.ask(request)
        assert isinstance(reply, Raised), reply
        return reply

    def find(self, name: str) -> int:
        (handle,) = self.values(Syscall(Code.GET_GLOBAL_FUNC, (name,)))
        assert isinstance(handle, Pointer)
        return int(handle)

    def values(self, request: Request) -> tuple[Value, ...]:
        reply = self.ask(request)
        assert isinstance(reply, Return), reply
        return reply.values

    def call(self, function: int | str, *args: Value) -> tuple[Value, ...]:
        handle = self.find(function) if isinstance(function, str) else function
        return self.values(CallFunc(handle, args))

    def call_error(self, function: int | str, *args: Value) -> str:
        handle = self.find(function) if isinstance(function, str) else function
        return self.error(CallFunc(handle, args)).text

    def tensor(self, shape: tuple[int, ...], kind: str = "uint8", device: Device = CPU) -> TensorMeta:
        """Allocate a tensor."""
        meta = TensorMeta(0, device, shape, dtype(kind))
        (data,) = self.values(Syscall(Code.DEV_ALLOC_DATA_WITH_SCOPE, (meta, None)))
        assert isinstance(data, Pointer)
        return meta._replace(data=int(data))

    def write(self, meta: TensorMeta, data: bytes) -> Any:
        return self.ask(CopyToRemote(meta, len(data), data))

    def read(self, meta: TensorMeta, nbytes: int | None = None) -> bytes:
        into = bytearray(meta.nbytes if nbytes is None else nbytes)
        reply = self.ask(CopyFromRemote(meta, len(into), memoryview(into)))
        assert isinstance(reply, CopyAck), reply
        return bytes(into)

    def free(self, handle: int) -> Any:
        return self.ask(Syscall(Code.FREE_HANDLE, (Pointer(handle),)))

    def free_data(self, meta: TensorMeta) -> Any:
        return self.ask(Syscall(Code.DEV_FREE_DATA, (meta.device, Pointer(meta.data))))


def handle_of(values: tuple[Value, ...]) -> int:
    """The handle in a call's result."""
    last = values[-1]
    assert isinstance(last, Pointer)
    return int(last)


def function_of(values: tuple[Value, ...]) -> FunctionRef:
    assert values[0] == 68
    return FunctionRef(handle_of(values))


def module_of(values: tuple[Value, ...]) -> ModuleRef:
    assert values[0] == 73
    return ModuleRef(handle_of(values))


def object_of(values: tuple[Value, ...]) -> ObjectRef:
    return ObjectRef(handle_of(values))


class Outcome:
    """A ``done`` that remembers."""

    def __init__(self) -> None:
        self.results: list[Any] = []
        self.errors: list[BaseException] = []
        self.cancelled = False

    def __call__(self, result: Any = None) -> None:
        self.results.append(result)

    def error(self, error: BaseException) -> None:
        self.errors.append(error)
