"""A loop in a thread of its own."""

from __future__ import annotations

import asyncio
import errno
import socket
import threading

import pytest

from rpcnb.transport.loopthread import LoopThread


def test_who_cannot_have_a_loop_learns_why(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> None:
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(asyncio, "new_event_loop", refuse)
    with pytest.raises(OSError, match="Too many open files"):
        LoopThread("test")


@pytest.mark.parametrize("when", ["with its task", "just before"])
def test_what_is_closed_as_the_loop_ends_lets_its_socket_go(when: str) -> None:
    loop = LoopThread("ends")
    ours, theirs = socket.socketpair()
    began = threading.Event()

    async def hold() -> None:
        transport, _ = await asyncio.get_running_loop().create_connection(asyncio.Protocol, sock=ours)
        began.set()
        try:
            if when == "with its task":
                await asyncio.sleep(60)
        finally:
            transport.close()
            if when == "just before":
                loop.io_loop.stop()

    loop.io_loop.add_callback(hold)
    assert began.wait(10)
    loop.stop()
    assert ours.fileno() == -1
    assert theirs.recv(1) == b""
    theirs.close()
