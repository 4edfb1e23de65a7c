"""The blocking session.

::

    import numpy as np, rpcnb

    with rpcnb.connect("board:9090", key="rpi") as session:
        add = session.get_function("demo.add")
        add(1, 2)                                    # 3
        x = session.array(np.ones((512, 512), "float32"))
        session.upload("conv.so")
        conv = session.load_module("conv.so")
        y = session.empty((512, 512), "float32")
        conv["conv"](x, y)
        y.numpy()
        conv.time_evaluator("conv", session.cpu(), number=10)(x, y).mean

Every method that talks to the server takes ``timeout=``, seconds for the whole operation. Ctrl-C ends any wait
within half a second; the session and its device memory survive, and the next call is right.
"""

from __future__ import annotations

import threading
import weakref
from typing import TYPE_CHECKING, Any

from rpcnb.client.base import SessionBase
from rpcnb.client.cellmethods import CellMethods
from rpcnb.client.jobs import Jobs
from rpcnb.client.moving import BULK, Moving, Progress, describe_upload, moving_array
from rpcnb.client.pending import Pending, Work
from rpcnb.client.plaincall import PlainCall
from rpcnb.client.remote import (
    CLOSE,
    RemoteDevice,
    RemoteFunction,
    RemoteModule,
    RemoteObject,
    RemoteTensor,
    TimingResult,
    _timing_options,
    wait_or_cancel,
)
from rpcnb.client.submitting import record
from rpcnb.client.transfers import Transfer
from rpcnb.client.vm import VM, open_vm
from rpcnb.client.watch import Watch
from rpcnb.errors import DeadlockError, SessionClosed
from rpcnb.link import iothread
from rpcnb.link.interrupt import TICK, Guard
from rpcnb.link.lanes import Lanes
from rpcnb.link.order import names_of
from rpcnb.link.running import Unfinished, run_flow
from rpcnb.protocol.shortcut import write_call
from rpcnb.transport.deadline import NO_DEADLINE, Deadline
from rpcnb.transport.kernel import refuse_deadlock

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Iterable, Sequence
    from types import TracebackType

    from rpcnb.client.operations import Operations
    from rpcnb.link.dial import SessionTicket
    from rpcnb.protocol.flows import Flow
    from rpcnb.protocol.handshake import KeyText

__all__ = ["Session"]

_LAST_WORD = 1.0  # seconds that a report may take, which runs users' code
_BLOCKING_BULK = 4 << 20  # at the speed of a memory copy it makes no difference; below, a Transfer costs too much
_COPY_PATIENCE = 0.5  # seconds after which a small one becomes a Transfer after all
_REOPEN = 10.0  # seconds in which a forked child opens a connection of its own
_PATIENCE = 0.05  # seconds after which any operation is listed in ``pending``, while somebody observes


class Session(CellMethods, SessionBase):
    """A session that blocks its caller; made by :func:`rpcnb.connect`. Safe to use from many threads."""

    _types = (RemoteFunction, RemoteModule, RemoteTensor, RemoteObject, RemoteDevice)

    def _attach(self, link: Any, answer: KeyText) -> None:
        """Begin to use a connection that has just been opened."""
        super()._attach(link, answer)
        iothread.IO_THREAD.watch(link)
        self._finalizer = weakref.finalize(self, _drop, link, self._lanes)
        self._finalizer.atexit = False  # the sockets end with the process; a forked child's end is not the session's

    def _operations(self) -> Operations:
        """Return the operations of the connection in use; in a forked child, of one of its own, opened now."""
        ops = self._ops
        if ops.link.wire.is_parents:
            self._open_in_child(ops)
            ops = self._ops
        return ops

    def _open_in_child(self, parents: Operations) -> None:
        """Open a connection of this process's own; what the parent's session held stays there.

        Raises:
            ForkedSession: It is not to be had twice: a board that a tracker handed out, or a session without address.
        """
        if self._dialer is None or self._dialer.patient:
            raise parents.link.wire.ended.again()
        with self._reopening.held(Deadline(_REOPEN, f"connect to {self.peer}"), self.name):
            if self._ops is parents:
                self._reopen(Deadline(_REOPEN, f"connect to {self.peer}"))

    def _make_lanes(self, ticket: SessionTicket) -> Lanes:
        assert self._dialer is not None
        return Lanes(self._dialer, ticket, self.name)

    def _run(
        self,
        make: Callable[[Operations], Flow[Any]],
        timeout: float | None,
        what: str,
        uses: Iterable[Any] = (),
        moving: Moving | None = None,
        progress: Callable[[Any], object] | None = None,
        on_output: Callable[[bytes], object] | None = None,
        ordered: bool = False,
    ) -> Any:
        if timeout is None:
            timeout = self.timeout
        ops = self._operations()
        flow = make(ops)
        if ordered and not iothread.IO_THREAD.is_current():  # other threads' operations on the same things wait
            pending = Pending(self, Work(ops, flow, what, names_of(uses)), timeout)
            pending.start()
            return wait_or_cancel(pending)
        if on_output is not None:
            pending = Pending(self, Work(ops, flow, what, may_overlap=True, on_output=on_output), timeout)
            return self._wait_with_output(pending)
        if moving is not None and (progress is not None or moving.total >= _BLOCKING_BULK):
            work = Work(ops, flow, what, names_of(uses), bulk=moving.total >= BULK)
            transfer = Transfer(self, work, timeout, moving, progress)
            transfer.start()
            return self._wait_for(transfer, progress is not None)
        deadline = NO_DEADLINE if timeout is None else Deadline(timeout, what)
        if self._pending and uses:
            self._await_earlier(ops, names_of(uses), deadline)
        if moving is not None or self.observers:
            return self._run_patiently(ops, flow, deadline, what, uses, moving)
        with Guard() as guard:
            return run_flow(ops.link, flow, deadline, guard)

    def _run_patiently(
        self,
        ops: Operations,
        flow: Flow[Any],
        deadline: Deadline,
        what: str,
        uses: Iterable[Any],
        moving: Moving | None,
    ) -> Any:
        """Run an operation here; one that takes long becomes a submitted one, for all to see and to cancel.

        That is a copy, or anything while somebody observes.
        """
        link, patience = ops.link, Deadline(_COPY_PATIENCE if moving is not None else _PATIENCE, what)
        watch = Watch(self, what) if self.observers else None
        try:
            with Guard() as guard:
                result = run_flow(link, flow, deadline, guard, patience)
        except Unfinished as unfinished:
            still = unfinished
        except BaseException as error:
            if watch is not None:
                watch.ended(error)
            raise
        else:
            if watch is not None:
                watch.ended(None)
            return result
        try:
            work = Work(ops, flow, what, names_of(uses))
            if moving is not None:
                pending: Pending = Transfer(self, work, deadline.timeout, moving, None)
            else:
                pending = Pending(self, work, deadline.timeout)
            pending.adopt(link, still, deadline, patience.start, watch)
        except BaseException:
            flow.close()
            link.abandon(still.tickets)
            raise
        return self._wait_for(pending, False) if isinstance(pending, Transfer) else wait_or_cancel(pending)

    def _wait_for(self, transfer: Transfer, reports: bool) -> Any:
        """Wait for a transfer, and for its last report where somebody gets it."""
        result = wait_or_cancel(transfer)
        if (reports or self.observers) and not iothread.IO_THREAD.is_current():
            transfer.told.wait(_LAST_WORD)  # the last report comes before this returns
        return result

    @staticmethod
    def _wait_with_output(pending: Pending) -> Any:
        """Start an operation, wait for it, and until the last of its output has been handed over."""
        try:
            pending.start()
            return pending.result()
        except BaseException:  # an interrupt may come between any two lines
            pending.cancel()
            raise
        finally:
            if not iothread.IO_THREAD.is_current():
                told = threading.Event()
                iothread.IO_THREAD.call(told.set)
                told.wait(_LAST_WORD)

    def _await_earlier(self, ops: Operations, names: frozenset[int], deadline: Deadline) -> None:
        """Wait for submitted operations that name one of these things: the order of submission is kept."""
        for hold in ops.order.earlier(names):
            gate = threading.Lock()
            gate.acquire()
            if not hold.then(gate.release):
                continue
            if iothread.IO_THREAD.is_current():
                raise DeadlockError("waiting for an earlier operation in the thread that would have to finish it")
            with Guard() as guard:
                while not guard.wait(lambda limit: gate.acquire(timeout=limit), min(deadline.left(), TICK)):  # noqa: B023
                    for pending in self.pending:
                        if pending._hold is hold:
                            refuse_deadlock(*pending.owed_at())

    def _submit_plainly(self, function: RemoteFunction, args: tuple[Any, ...]) -> Pending | None:
        """Submit a call of a plain function with plain arguments the short way, unless something speaks against it."""
        ops = function.ops
        overlaps = function.handle & 1 and ops.lanes is not None
        if overlaps or self.timeout is not None or ops is not self._ops or self.observers or not ops.link.quick:
            return None
        if ops.link.wire.is_parents:
            return None
        packet = write_call(function.handle, args)
        return None if packet is None else PlainCall(self, function, packet)

    def _user_of(self, thing: Any) -> Pending | None:
        return next((pending for pending in list(self._pending.values()) if pending.keeps is thing), None)

    @property
    def pending(self) -> list[Pending]:
        """Operations that were submitted and have not finished, oldest first."""
        return list(self._pending.values())

    def submit(
        self, operation: Callable[..., Any], *args: Any, timeout: float | None = None, **options: Any
    ) -> Pending:
        """Start an operation of this session and return at once: ``session.submit(tensor.numpy)``.

        Operations that name the same tensor, module or object keep the order of submission. At an rpcnb server
        functions that answer later (``async def``, callbacks) overlap, and large copies travel beside calls; plain
        functions run one at a time. At a stock server one session is one queue.

        Args:
            operation: A bound method of this session, or of its functions, tensors or modules.
            args: Its arguments.
            timeout: Seconds for the whole operation.
            options: Its keyword arguments; and for copies and files ``progress``, called with the transfer at most
                ten times a second and once at the end, in the I/O thread.

        Returns:
            A :class:`Pending`; for copies and files a :class:`~rpcnb.client.transfers.Transfer`.

        Raises:
            TypeError: ``operation`` is not one of this session's.
        """
        progress = options.pop("progress", None)
        if self._ops.link.wire.is_parents:
            self._operations()  # opens a connection of this process's own
        work = record(self, operation, args, options)
        limit = self.timeout if timeout is None else timeout
        if work.moving is None:
            pending = Pending(self, work, limit)
        else:
            pending = Transfer(self, work, limit, work.moving, progress)
        pending.start()
        return pending

    @property
    def jobs(self) -> Jobs:
        """Detached jobs: what goes on at the server without a session; ``session.jobs["burnin"].result()``."""
        return Jobs(self)

    # -- functions -----------------------------------------------------------------------------------------------

    def get_function(self, name: str, *, timeout: float | None = None) -> RemoteFunction:
        """Return the remote function registered as ``name``.

        Raises:
            FunctionNotFound: There is none (an ``AttributeError``, as in TVM); close matches are named.
        """
        if name == CLOSE:  # TVM's clients have it, not servers
            return self.close  # type: ignore[return-value]  # it is called like one
        found: RemoteFunction = self._run(lambda ops: ops.get_function(name), timeout, f"get_function {name}")
        return found

    def call(self, name: str, *args: Any, timeout: float | None = None) -> Any:
        """Call the remote function registered as ``name``; it is looked up once per session."""
        return self._run(lambda ops: ops.call_named(name, args), timeout, name)

    def list_functions(self, *, timeout: float | None = None) -> list[str]:
        """Return the names of the server's functions; asked once per session."""
        names: list[str] = self._run(lambda ops: ops.list_functions(), timeout, "list_functions")
        return names

    def status(self, *, timeout: float | None = None) -> dict[str, Any]:
        """Ask an rpcnb server how it is: ``state`` is ``READY``, or ``BUSY`` while a cell keeps its kernel busy."""
        # Beside what is in progress.
        found: dict[str, Any] = self._run(lambda ops: ops.status(), timeout, "status", on_output=_nothing)
        return found

    def time_evaluator(
        self, func_name: str, dev: RemoteDevice, *numbers: Any, module: RemoteModule | None = None, **options: Any
    ) -> Callable[..., TimingResult]:
        """Return a function that measures ``func_name`` at the server, without the network.

        Args:
            func_name: A global function, or one of ``module``.
            dev: Where it runs.
            numbers: The options in TVM's order.
            module: The module that has it.
            options: TVM's, in this order: ``number`` calls per measurement, ``repeat`` measurements, ``min_repeat_ms``,
                ``cooldown_interval_ms``, ``repeats_to_cooldown``, ``cache_flush_bytes``, ``f_preproc``; and
                ``timeout`` for making the evaluator.

        Returns:
            ``evaluate(*args, timeout=None)`` → :class:`TimingResult`.
        """
        timeout = options.pop("timeout", None)
        chosen = _timing_options(numbers, options)
        evaluator: RemoteFunction = self._run(
            lambda ops: ops.time_evaluator(module, func_name, dev, chosen), timeout, "time_evaluator"
        )

        def evaluate(*args: Any, timeout: float | None = None) -> TimingResult:
            return TimingResult.decode(evaluator(*args, timeout=timeout))

        return evaluate

    # -- arrays --------------------------------------------------------------------------------------------------

    def array(
        self,
        source: Any,
        device: RemoteDevice | None = None,
        *,
        timeout: float | None = None,
        progress: Progress | None = None,
    ) -> RemoteTensor:
        """Copy a local array (numpy, anything with DLPack, a sequence) to a device, the server's CPU by default."""
        made: RemoteTensor = self._run(
            lambda ops: ops.tensor(source, device), timeout, "copy_to", moving=moving_array(source), progress=progress
        )
        return made

    def empty(
        self,
        shape: Sequence[int] | int,
        dtype: Any = "float32",
        device: RemoteDevice | None = None,
        mem_scope: str | None = None,
        *,
        timeout: float | None = None,
    ) -> RemoteTensor:
        """Allocate an uninitialised tensor on a device, the server's CPU by default."""
        made: RemoteTensor = self._run(lambda ops: ops.empty(shape, dtype, device, mem_scope), timeout, "empty")
        return made

    # -- files and modules ---------------------------------------------------------------------------------------

    def upload(
        self,
        data: str | os.PathLike[str] | bytes,
        target: str | None = None,
        *,
        timeout: float | None = None,
        progress: Progress | None = None,
    ) -> None:
        """Put a local file into the session's directory, under its own name or ``target``.

        Args:
            data: Path of a local file, or bytes (then ``target`` is required).
            target: Name at the server.
            timeout: Seconds for the whole upload.
            progress: Called with the transfer, at most ten times a second and once at the end, in the I/O thread.
        """
        self._run(
            lambda ops: ops.upload(data, target),
            timeout,
            "upload",
            moving=describe_upload(data, target),
            progress=progress,
        )

    def download(
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
        data: bytearray = self._run(
            lambda ops: ops.download(path, to, moving), timeout, f"download {path}", moving=moving, progress=progress
        )
        return data

    def remove(self, path: str, *, timeout: float | None = None) -> None:
        """Delete a file of the session's directory."""
        self._run(lambda ops: ops.remove(path), timeout, f"remove {path}")

    def listdir(self, path: str = ".", *, timeout: float | None = None) -> list[str]:
        """Return the names in a directory of the session (stock servers do not offer it)."""
        names: list[str] = self._run(lambda ops: ops.listdir(path), timeout, f"listdir {path}")
        return names

    def load_module(self, path: str, *, timeout: float | None = None) -> RemoteModule:
        """Load an uploaded library; the server must trust native code to us."""
        module: RemoteModule = self._run(lambda ops: ops.load_module(path), timeout, f"load_module {path}")
        return module

    def vm(self, library: Any, device: Any = None, memory_cfg: Any = None, *, timeout: float | None = None) -> VM:
        """Open Relax's virtual machine for a library: ``vm = session.vm("model.so"); vm["main"](x, w)``.

        Args:
            library: A local path, which is uploaded; a module that was loaded; or TVM's executable.
            device: Of this session, or several; its CPU by default.
            memory_cfg: ``"pooled"`` (the default) or ``"naive"``, or a dict of these by device; as in TVM.
            timeout: Seconds for all of it.

        Raises:
            DeviceError: The server has no such device.
            LibraryError: The library has no Relax executable.
            RemoteError: The server has not loaded TVM's runtime, or does not trust native code to us.
        """
        module, devices = self._run(lambda ops: open_vm(ops, library, device, memory_cfg), timeout, "vm")
        return VM(self, module, devices)

    def download_linked_module(self, path: str, *, timeout: float | None = None) -> bytearray:
        """Have an uploaded object file or archive linked at the server; returns the shared library."""
        data: bytearray = self._run(lambda ops: ops.download_linked_module(path), timeout, f"link {path}")
        return data

    def system_lib(self, *, timeout: float | None = None) -> RemoteModule:
        """Return the module of the server's statically linked functions."""
        module: RemoteModule = self._run(lambda ops: ops.system_lib(), timeout, "system_lib")
        return module

    def reconnect(self, *, timeout: float | None = 10.0) -> None:
        """Open the session again, under the same name: after it was lost, or to begin afresh.

        Everything of before is gone at the server. Functions, tensors and modules of before raise ``StaleHandle``
        before anything is sent; what was pending fails with ``SessionLost``; nothing is repeated by itself.

        Raises:
            ConnectFailed: The server is not to be had; the session stays lost, and this may be tried again.
        """
        deadline, before = Deadline(timeout, f"connect to {self.peer}"), self._ops
        with self._reopening.held(deadline, self.name):
            if self._ops is before:  # else another thread has done it meanwhile
                self._detach()
                self._reopen(deadline)

    def _reopen(self, deadline: Deadline) -> None:
        """Open the session's connection anew, unless the session is closed meanwhile."""
        assert self._dialer is not None
        self._finalizer.detach()
        closes = self._closes
        self._dialer.renew()
        with Guard() as guard:
            link, answer = self._dialer.open(deadline, guard)
        with self._one_attaches:
            if closes != self._closes:
                link.close()
                raise SessionClosed(f"{self.name} was closed while it was being opened again")
            self._attach(link, answer)
        self._opened()

    # -- end -----------------------------------------------------------------------------------------------------

    def close(self) -> None:
        """End the session; the server releases everything it held. Idempotent; never waits."""
        self._finalizer.detach()
        self._closing()
        if self._lanes is not None:
            self._lanes.close()
        self._link.close()

    def __enter__(self) -> Session:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _nothing(data: bytes) -> None:
    """Take output that there is not."""


def _drop(link: Any, lanes: Lanes | None) -> None:
    """Have the links of a session that was dropped closed by the I/O thread; a finalizer takes no lock."""
    iothread.IO_THREAD.dropped.append(link)
    if lanes is not None:
        iothread.IO_THREAD.dropped.append(lanes)
