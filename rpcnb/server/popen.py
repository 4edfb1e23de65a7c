"""Going on to a program of this session's own: the session constructor ``rpc.PopenSession``.

The program speaks the protocol on two descriptors that it is given as arguments, without a handshake: TVM's minrpc
server with a model linked into it, say. It ends with its session.

Source:
    python/tvm/rpc/client.py (rpc.PopenSession), src/runtime/rpc/rpc_pipe_impl.cc.
"""

from __future__ import annotations

import asyncio
import errno
import os
import shutil
import socket
import subprocess
import tempfile
import threading
import time
from typing import Any

from rpcnb.errors import AccessDenied, LibraryError, RemoteProtocolError, SessionLost
from rpcnb.link.aiolink import AsyncLink
from rpcnb.link.wire import Wire
from rpcnb.protocol.codes import Role
from rpcnb.protocol.endpoint import Endpoint
from rpcnb.runtime.environment import ENVIRONMENT
from rpcnb.server.hop import Onward, forward

__all__ = ["popen_constructor"]

_START = 10.0  # seconds until it has answered
_END = 2.0  # seconds for it to end once its session has
_TRIES, _PAUSE = 20, 0.01  # a child that another thread is just forking may have the file open for writing


def popen_constructor(binary: Any) -> Any:
    """Open a session that a program of its own serves: TVM's ``rpc.PopenSession``.

    Args:
        binary: The program, as bytes; or the path of one at the server.

    Raises:
        AccessDenied: The server runs no native code of its clients.
        LibraryError: It cannot be run, or does not speak the protocol.
    """
    environment = ENVIRONMENT.get()
    if environment is None or not environment.native:
        raise AccessDenied(
            "rpc.PopenSession runs a program for its client: give the server a token, or allow_native=True"
        )
    if not isinstance(binary, (str, bytes, bytearray, memoryview)):
        raise TypeError(f"rpc.PopenSession expects a program as bytes, or a path, got {type(binary).__name__}")
    return _open(binary, environment.directory)


async def _open(binary: str | bytes | bytearray | memoryview, directory: str | None) -> Any:
    folder = tempfile.mkdtemp(prefix="popen-", dir=directory)
    try:
        program = _Program(folder, binary)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    try:
        return await forward(program, (), _START)
    except (SessionLost, RemoteProtocolError, asyncio.TimeoutError) as error:
        raise LibraryError(
            f"the program of rpc.PopenSession does not speak the protocol: {program.how(error)}"
        ) from None


class _Program(Onward):
    """The program, and the connection to it."""

    def __init__(self, folder: str, binary: str | bytes | bytearray | memoryview) -> None:
        self._folder = folder
        if isinstance(binary, str):
            path = os.path.abspath(binary)
            if not os.access(path, os.X_OK) or os.path.isdir(path):
                raise LibraryError(f"rpc.PopenSession: {binary} is no program that can be run here")
        else:
            path = os.path.join(folder, "server.minrpc")
            with open(path, "wb") as file:
                file.write(binary)
            os.chmod(path, 0o500)
        ours, theirs = socket.socketpair()
        with theirs:
            try:
                self._process = _run(path, theirs.fileno())
            except OSError as error:
                ours.close()
                raise LibraryError(f"rpc.PopenSession: the program cannot be run: {error.strerror}") from None
        ours.setblocking(False)
        wire = Wire(ours, Endpoint(Role.CLIENT), "the program of rpc.PopenSession")
        wire.is_stock = True
        super().__init__(AsyncLink(wire))

    def how(self, error: BaseException) -> str:
        """Say what has become of it."""
        try:
            code = self._process.wait(0.1)
        except subprocess.TimeoutExpired:
            return f"it has not answered in {_START:g} s" if isinstance(error, asyncio.TimeoutError) else str(error)
        return f"it was ended by signal {-code}" if code < 0 else f"it has exited with code {code}"

    def close(self) -> None:
        """End the session, and the program with it."""
        super().close()
        threading.Thread(target=self._end, name="rpcnb-popen", daemon=True).start()

    def _end(self) -> None:
        try:
            self._process.wait(_END)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        shutil.rmtree(self._folder, ignore_errors=True)


def _run(path: str, descriptor: int) -> subprocess.Popen[bytes]:
    number, left = str(descriptor), _TRIES
    while True:
        try:
            return subprocess.Popen([path, number, number], pass_fds=[descriptor], stdin=subprocess.DEVNULL)
        except OSError as error:  # noqa: PERF203  # it is tried again
            left -= 1
            if error.errno != errno.ETXTBSY or not left:
                raise
            time.sleep(_PAUSE)
