"""The process from which those of isolated sessions are forked: ``python -m rpcnb.server.zygote DESCRIPTOR``.

It has one thread, no client and no secret, only what sessions need imported. Asked over its channel it forks a process
for a session, kills one, and tells of the end of each, with everything that the session's process has left running.

::

    {"fork": n, "check": bool}, the other end of a channel -> {"forked": n, "pid": pid} or {"failed": n, "why": text}
    {"kill": pid, "signal": number}                        (killed without a number)
    {"warm": modules}                                      to be imported here, once, if they start no thread
    (a process has ended)                                  -> {"ended": pid, "status": status, "peak": bytes}
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib
import os
import random
import selectors
import shutil
import signal
import socket
import sys
import time
import traceback
from typing import TYPE_CHECKING, Any

from rpcnb.errors import RemoteProtocolError
from rpcnb.transport.channel import Channel

if TYPE_CHECKING:
    from collections.abc import Callable

    from rpcnb.transport.channel import Note

__all__ = ["ONE_THREAD", "SOON_ASLEEP", "main"]

# What keeps numerical libraries from starting threads, which a fork would lose; a session's process has its own again.
ONE_THREAD = {f"{name}_NUM_THREADS": "1" for name in ("OPENBLAS", "OMP", "MKL", "BLIS", "NUMEXPR")}
# Each new thread of OpenBLAS spins for 2**26 cycles (0.1 s of a CPU in every process that is forked) before it sleeps.
SOON_ASLEEP = {"OPENBLAS_THREAD_TIMEOUT": "20"}  # 2**20 of them; read when the library is loaded
_PATIENCE, _MOMENT = 2.0, 0.005  # seconds for what sessions have left to end, and between two looks
_READINGS = 8  # of the list of children, until two are alike
_IMPORT = 10  # seconds in which a module must be imported
_GOOD = 42  # exit code of the child that has tried; a module may exit with another
_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36
_SETTERS = ("scipy_openblas_set_num_threads64_", "scipy_openblas_set_num_threads", "openblas_set_num_threads64_",
            "openblas_set_num_threads", "MKL_Set_Num_Threads")  # fmt: skip


def threads() -> int:
    """Return how many threads this process has, also of libraries; 1 where that cannot be seen."""
    try:
        return len(os.listdir("/proc/self/task"))
    except OSError:
        return 1


def _prctl(option: int, value: int) -> None:
    with contextlib.suppress(OSError, AttributeError):  # not Linux
        ctypes.CDLL(None).prctl(option, value, 0, 0, 0)


class Zygote:
    """Forks, kills and reaps.

    Args:
        channel: To the server.
        options: What sessions need; ``preload`` names modules that are imported once, here.
    """

    def __init__(self, channel: Channel, options: dict[str, Any]) -> None:
        self._channel = channel
        self._options = options
        self._pids: set[int] = set()
        self._over: set[int] = set()  # processes that have ended, of which something may be left
        self._restore = _blas_setters()
        self._trying = 0  # the child that tries an import
        self._wanted: list[str] = []  # what it imports

    def run(self) -> None:
        """Serve until the server has gone; then end all that is left."""
        wake, signalled = socket.socketpair()
        for end in (wake, signalled):
            end.setblocking(False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.set_wakeup_fd(signalled.fileno(), warn_on_full_buffer=False)
        self._inherited = (wake, signalled)
        try:
            self._serve(wake)
        finally:
            signal.set_wakeup_fd(-1)

    def _serve(self, wake: socket.socket) -> None:
        with selectors.DefaultSelector() as selector:
            selector.register(self._channel.sock, selectors.EVENT_READ)
            selector.register(wake, selectors.EVENT_READ)
            self._selector = selector
            while True:
                for key, _ in selector.select():
                    if key.fileobj is wake:
                        with contextlib.suppress(BlockingIOError):
                            wake.recv(4096)
                        continue
                    try:
                        for note in self._channel.receive_some():
                            self._hear(note)
                    except EOFError:
                        self._end()
                        return
                self._reap()

    def _end(self) -> None:
        if self._trying:
            os.kill(self._trying, signal.SIGKILL)
        for pid in self._pids:
            _kill_group(pid)
        until = time.monotonic() + _PATIENCE
        while self._pids | self._over and time.monotonic() < until:
            self._reap()
            time.sleep(_MOMENT)
        shutil.rmtree(self._options["directory"], ignore_errors=True)  # the server may have been killed

    def _hear(self, note: Note) -> None:
        words = note.words
        if "kill" in words and words["kill"] in self._pids:  # else it has ended meanwhile
            os.kill(words["kill"], int(words.get("signal", signal.SIGKILL)))
        elif "fork" in words:
            self._fork(note)
        elif "warm" in words:
            self._warm(words["warm"])

    def _fork(self, note: Note) -> None:
        """Fork a session's process; it never returns from here."""
        number, (descriptor,) = note.words["fork"], note.descriptors
        why = ""
        count = threads()
        if count != 1:
            why = f"{count} threads run where processes are forked (a module of --preload has started them)"
        else:
            try:
                pid = os.fork()
            except OSError as error:
                why = f"no process can be made: {error.strerror}"
        if why:
            os.close(descriptor)
            self._channel.send({"failed": number, "why": why})
            return
        if pid == 0:
            self._be_session(descriptor, check=bool(note.words.get("check")))
        os.close(descriptor)
        self._pids.add(pid)
        self._over.discard(pid)
        self._channel.send({"forked": number, "pid": pid})

    def _warm(self, names: list[str]) -> None:
        """Import what sessions need, for those to come; a child tries first whether that ends well. Nobody waits."""
        with contextlib.suppress(OSError):
            pid = os.fork()
            if pid:
                self._trying, self._wanted = pid, names
                return
            _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
            signal.set_wakeup_fd(-1)
            signal.alarm(_IMPORT)
            for name in names:
                with contextlib.suppress(Exception):
                    importlib.import_module(name)
            os._exit(_GOOD if threads() == 1 else 1)

    def _tried(self, code: int) -> None:
        """Import what a child could, and say so: processes that wait for a session are without it."""
        self._trying = 0
        if code != _GOOD:
            return
        for name in self._wanted:
            with contextlib.suppress(Exception):  # who needs it is told
                importlib.import_module(name)
        gc.collect()
        gc.freeze()
        self._restore = _blas_setters()
        self._channel.send({"warmed": True})

    def _be_session(self, descriptor: int, *, check: bool) -> None:
        code = 70
        try:
            parent = os.getppid()
            os.setsid()
            _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
            if os.getppid() != parent:
                os._exit(0)
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            signal.signal(signal.SIGINT, lambda *_: None)  # until there is something to interrupt
            self._selector.close()
            for one in (self._channel, *self._inherited):  # with what was sent for the next ones
                one.close()
            self._restore_threads()
            from rpcnb.server.sessionprocess import run_session

            code = run_session(self._options, Channel(socket.socket(fileno=descriptor)), check=check)
        except BaseException:
            traceback.print_exc()
        finally:
            with contextlib.suppress(BaseException):
                sys.stdout.flush()
                sys.stderr.flush()
            os._exit(code)

    def _restore_threads(self) -> None:
        """Let numerical libraries have as many threads as is wanted, and the session random numbers of its own."""
        wanted: dict[str, str] = self._options.get("threads", {})
        for name in (*ONE_THREAD, *SOON_ASLEEP):
            os.environ.pop(name, None)
            if name in wanted:
                os.environ[name] = wanted[name]
        count = wanted.get("OPENBLAS_NUM_THREADS") or wanted.get("OMP_NUM_THREADS") or str(len(os.sched_getaffinity(0)))
        if count.isdecimal() and count != "1":
            for restore in self._restore:
                restore(int(count))
        random.seed()
        if "numpy.random" in sys.modules:
            sys.modules["numpy.random"].seed()

    def _reap(self) -> None:
        while True:
            try:
                found = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            except ChildProcessError:
                found = None
            if found is None:
                break
            pid = found.si_pid
            if pid in self._pids:  # before it is reaped: its number is nobody else's yet
                _kill_group(pid)
            _, status, usage = os.wait4(pid, 0)
            if pid == self._trying:
                with contextlib.suppress(OSError):  # the server has gone
                    self._tried(os.waitstatus_to_exitcode(status))
            if pid in self._pids:
                self._pids.discard(pid)
                self._over.add(pid)
                with contextlib.suppress(OSError):  # the server has gone
                    self._channel.send({"ended": pid, "status": status, "peak": usage.ru_maxrss * 1024})
        if self._over:
            self._kill_orphans()

    def _kill_orphans(self) -> None:
        """Kill what processes have left in other process groups: it has become ours, now or when its parent ends."""
        found = False
        for pid in _children():
            with contextlib.suppress(OSError):
                if os.getsid(pid) in self._over:
                    os.kill(pid, signal.SIGKILL)
                    found = True
        if not found:
            self._over.clear()


def _children() -> set[int]:
    """Return the children of this process: of a list that is read while one of them ends, others may be missing."""
    before: set[int] | None = None
    found: set[int] = set()
    for _ in range(_READINGS):
        with contextlib.suppress(OSError), open(f"/proc/self/task/{os.getpid()}/children") as file:
            found |= set(map(int, file.read().split()))
        if found == before:
            break
        before = set(found)
    return found


def _kill_group(pid: int) -> None:
    with contextlib.suppress(OSError):
        os.killpg(pid, signal.SIGKILL)


def _blas_setters() -> list[Callable[[int], object]]:
    """Find what sets the number of threads of the numerical libraries that are loaded."""
    paths: set[str] = set()
    with contextlib.suppress(OSError), open("/proc/self/maps") as file:
        paths = {line.split(None, 5)[5].strip() for line in file if "blas" in line or "mkl_rt" in line}
    found = []
    for path in sorted(paths):
        with contextlib.suppress(OSError):
            library = ctypes.CDLL(path)
            found += [getattr(library, name) for name in _SETTERS if hasattr(library, name)][:1]
    return found


def _preload(name: str) -> None:
    try:
        importlib.import_module(name)
    except BaseException as error:  # it may exit
        raise ImportError(f"--preload {name}: {type(error).__name__}: {error}") from error


def main() -> int:
    """Import, say so, and serve."""
    channel = Channel(socket.socket(fileno=int(sys.argv[1])))
    note = channel.receive()
    if note is None:
        return 0
    options = note.words
    sys.path[:] = options["path"]
    sys.argv[:] = options["argv"]
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)
    try:
        importlib.import_module("rpcnb.server.sessionprocess")
        for name in options["warm"]:
            with contextlib.suppress(ImportError):  # IPython may not be there
                importlib.import_module(name)
        for name in options["preload"]:
            _preload(name)
        if threads() != 1:
            raise ImportError(f"the modules of --preload ({', '.join(options['preload'])}) start threads; use --load")
    except ImportError as error:
        channel.send({"failed": str(error)})
        os._exit(1)  # also from what a module has started
    gc.collect()
    gc.freeze()
    channel.send({"ready": True})
    with contextlib.suppress(OSError, RemoteProtocolError):
        Zygote(channel, options).run()
    return 0


if __name__ == "__main__":
    sys.exit(main())
