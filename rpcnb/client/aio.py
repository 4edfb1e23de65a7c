"""The awaited session: the same names as :class:`~rpcnb.client.session.Session`, all coroutines.

::

    async with await rpcnb.connect_async("board:9090") as session:
        add = await session.get_function("demo.add")
        await add(1, 2)
        x = await session.array(np.ones(8, "float32"))
        await x.numpy()

A session belongs to the event loop in which it was opened. Cancelling a call gives up its reply, not the session.
"""

from __future__ import annotations

import asyncio
import weakref
from typing import TYPE_CHECKING, Any

from rpcnb.client.aiooperation import AsyncOperation, AsyncTransfer, AwaitedCall
from rpcnb.client.base import SessionBase
from rpcnb.client.cellmethods import AsyncCellMethods
from rpcnb.client.jobs import AsyncJobs
from rpcnb.client.moving import Moving, Progress, describe_upload, moving_array
from rpcnb.client.remote import (
    CLOSE,
    AsyncRemoteDevice,
    AsyncRemoteFunction,
    AsyncRemoteModule,
    AsyncRemoteTensor,
    RemoteObject,
    TimingResult,
    _timing_options,
)
from rpcnb.client.vm import AsyncVM, open_vm
from rpcnb.errors import SessionClosed
from rpcnb.link.aiolanes import AsyncLanes
from rpcnb.link.order import names_of
from rpcnb.transport.deadline import Deadline

if TYPE_CHECKING:
    import os
    from collections.abc import Awaitable, Callable, Iterable, Sequence
    from types import TracebackType

    from rpcnb.client.operations import Operations
    from rpcnb.link.aiolink import AsyncLink
    from rpcnb.link.dial import SessionTicket
    from rpcnb.protocol.flows import Flow
    from rpcnb.protocol.handshake import KeyText

__all__ = ["AsyncSession"]


class AsyncSession(AsyncCellMethods, SessionBase):
    """A session whose operations are awaited; made by :func:`rpcnb.connect_async`."""

    _types = (AsyncRemoteFunction, AsyncRemoteModule, AsyncRemoteTensor, RemoteObject, AsyncRemoteDevice)
    _awaited_call = AwaitedCall

    def _attach(self, link: AsyncLink, answer: KeyText) -> None:
        """Begin to use a connection that has just been opened."""
        self._one_reopens = asyncio.Lock()
        super()._attach(link, answer)
        finalizer = weakref.finalize(self, link.drop, () if self._lanes is None else (self._lanes,))
        finalizer.atexit = False  # the sockets end with the process

    def _make_lanes(self, ticket: SessionTicket) -> AsyncLanes:
        assert self._dialer is not None
        return AsyncLanes(self._dialer, ticket, self.name)

    async def _run(
        self,
        make: Callable[[Operations], Flow[Any]],
        timeout: float | None,
        what: str,
        uses: Iterable[Any] = (),
        *,
        moving: Moving | None = None,
        progress: Any = None,
        queued: bool = False,
        on_output: Callable[[bytes], object] | None = None,
        ordered: bool = True,
    ) -> Any:
        limit = self.timeout if timeout is None else timeout
        ops = self._ops
        ops.link.check_loop(self.name)
        flow = make(ops)
        if moving is None:
            operation = AsyncOperation(self, ops, flow, what, limit, names_of(uses), on_output)
        else:
            operation = AsyncTransfer(self, ops, flow, what, limit, names_of(uses), moving, progress)
        return await operation.run(queued)

    @property
    def jobs(self) -> AsyncJobs:
        """Detached jobs: what goes on at the server without a session; ``await session.jobs.get("burnin")``."""
        return AsyncJobs(self)

    @property
    def pending(self) -> list[AsyncOperation]:
        """Operations that are awaited and have not finished, oldest first."""
        return list(self._pending.values())

    async def get_function(self, name: str, *, timeout: float | None = None) -> AsyncRemoteFunction:
        """Return the remote function registered as ``name``; as :meth:`Session.get_function`."""
        if name == CLOSE:
            return self.close  # type: ignore[return-value]  # it is called, and awaited, like one
        found: AsyncRemoteFunction = await self._run(
            lambda ops: ops.get_function(name), timeout, f"get_function {name}"
        )
        return found

    async def call(self, name: str, *args: Any, timeout: float | None = None) -> Any:
        """Call the remote function registered as ``name``; it is looked up once per session."""
        return await self._run(lambda ops: ops.call_named(name, args), timeout, name)

    async def list_functions(self, *, timeout: float | None = None) -> list[str]:
        """Return the names of the server's functions; asked once per session."""
        names: list[str] = await self._run(lambda ops: ops.list_functions(), timeout, "list_functions")
        return names

    async def status(self, *, timeout: float | None = None) -> dict[str, Any]:
        """Ask an rpcnb server how it is: ``state`` is ``READY``, or ``BUSY`` while a cell keeps its kernel busy."""
        found: dict[str, Any] = await self._run(lambda ops: ops.status(), timeout, "status")
        return found

    async def time_evaluator(
        self,
        func_name: str,
        dev: AsyncRemoteDevice,
        *numbers: Any,
        module: AsyncRemoteModule | None = None,
        **options: Any,
    ) -> Callable[..., Awaitable[TimingResult]]:
        """Return a function that measures ``func_name`` at the server; as :meth:`Session.time_evaluator`."""
        timeout = options.pop("timeout", None)
        chosen = _timing_options(numbers, options)
        evaluator: AsyncRemoteFunction = await self._run(
            lambda ops: ops.time_evaluator(module, func_name, dev, chosen), timeout, "time_evaluator"
        )

        async def evaluate(*args: Any, timeout: float | None = None) -> TimingResult:
            return TimingResult.decode(await evaluator(*args, timeout=timeout))

        return evaluate

    async def array(
        self,
        source: Any,
        device: AsyncRemoteDevice | None = None,
        *,
        timeout: float | None = None,
        progress: Progress | None = None,
    ) -> AsyncRemoteTensor:
        """Copy a local array to a device, the server's CPU by default."""
        made: AsyncRemoteTensor = await self._run(
            lambda ops: ops.tensor(source, device), timeout, "copy_to", moving=moving_array(source), progress=progress
        )
        return made

    async def empty(
        self,
        shape: Sequence[int] | int,
        dtype: Any = "float32",
        device: AsyncRemoteDevice | None = None,
        mem_scope: str | None = None,
        *,
        timeout: float | None = None,
    ) -> AsyncRemoteTensor:
        """Allocate an uninitialised tensor on a device, the server's CPU by default."""
        made: AsyncRemoteTensor = await self._run(
            lambda ops: ops.empty(shape, dtype, device, mem_scope), timeout, "empty"
        )
        return made

    async def upload(
        self,
        data: str | os.PathLike[str] | bytes,
        target: str | None = None,
        *,
        timeout: float | None = None,
        progress: Progress | None = None,
    ) -> None:
        """Put a local file, or bytes as ``target``, into the session's directory."""
        await self._run(
            lambda ops: ops.upload(data, target),
            timeout,
            "upload",
            moving=describe_upload(data, target),
            progress=progress,
        )

    async def download(
        self,
        path: str,
        to: str | os.PathLike[str] | None = None,
        *,
        timeout: float | None = None,
        progress: Progress | None = None,
    ) -> bytearray:
        """Return the content of a file of the session's directory; or write it to the local file ``to`` as it comes.

        With ``to`` nothing is returned but an empty bytearray, and the file is there whole or not at all.
        """
        moving = Moving("down", path, 0)
        data: bytearray = await self._run(
            lambda ops: ops.download(path, to, moving), timeout, f"download {path}", moving=moving, progress=progress
        )
        return data

    async def remove(self, path: str, *, timeout: float | None = None) -> None:
        """Delete a file of the session's directory."""
        await self._run(lambda ops: ops.remove(path), timeout, f"remove {path}")

    async def listdir(self, path: str = ".", *, timeout: float | None = None) -> list[str]:
        """Return the names in a directory of the session (stock servers do not offer it)."""
        names: list[str] = await self._run(lambda ops: ops.listdir(path), timeout, f"listdir {path}")
        return names

    async def load_module(self, path: str, *, timeout: float | None = None) -> AsyncRemoteModule:
        """Load an uploaded library; the server must trust native code to us."""
        module: AsyncRemoteModule = await self._run(lambda ops: ops.load_module(path), timeout, f"load_module {path}")
        return module

    async def vm(
        self, library: Any, device: Any = None, memory_cfg: Any = None, *, timeout: float | None = None
    ) -> AsyncVM:
        """Open Relax's virtual machine for a library; as :meth:`Session.vm`."""
        module, devices = await self._run(lambda ops: open_vm(ops, library, device, memory_cfg), timeout, "vm")
        return AsyncVM(self, module, devices)

    async def download_linked_module(self, path: str, *, timeout: float | None = None) -> bytearray:
        """Have an uploaded object file or archive linked at the server; returns the shared library."""
        data: bytearray = await self._run(lambda ops: ops.download_linked_module(path), timeout, f"link {path}")
        return data

    async def system_lib(self, *, timeout: float | None = None) -> AsyncRemoteModule:
        """Return the module of the server's statically linked functions."""
        module: AsyncRemoteModule = await self._run(lambda ops: ops.system_lib(), timeout, "system_lib")
        return module

    async def reconnect(self, *, timeout: float | None = 10.0) -> None:
        """Open the session again, under the same name; as :meth:`Session.reconnect`."""
        deadline, before = Deadline(timeout, f"connect to {self.peer}"), self._ops
        if not before.link.loop.is_closed():  # a session whose loop is no more may go on in this one
            before.link.check_loop(self.name)
        async with self._one_reopens:
            if self._ops is not before:
                return  # another task has done it meanwhile
            self._detach()
            assert self._dialer is not None
            closes = self._closes
            self._dialer.renew()
            link, answer = await self._dialer.open_awaiting(deadline)
            if closes != self._closes:
                link.close()
                raise SessionClosed(f"{self.name} was closed while it was being opened again")
            self._attach(link, answer)
            self._opened()

    async def close(self) -> None:
        """End the session; the server releases everything it held. Idempotent; never waits."""
        self._close_now()

    def _close_now(self) -> None:
        """Close it, from any thread."""
        ops = self._ops
        if ops.link.runs_elsewhere:
            ops.link.loop.call_soon_threadsafe(self._close_now)
            return
        self._closing()
        if ops.lanes is not None:
            ops.lanes.close()
        ops.link.close()

    async def __aenter__(self) -> AsyncSession:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()
