"""Messages and descriptors between processes of our own."""

from __future__ import annotations

import os
import socket
import struct
import threading
from collections.abc import Iterator

import pytest
from conftest import eventually

from rpcnb.errors import RemoteProtocolError
from rpcnb.transport.channel import Channel, Note
from rpcnb.transport.loopthread import LoopThread, call_in_loop


@pytest.fixture
def ends() -> Iterator[tuple[Channel, Channel]]:
    one, other = (Channel(sock) for sock in socket.socketpair())
    yield one, other
    one.close()
    other.close()


def test_words_bytes_and_descriptors_arrive_together(ends: tuple[Channel, Channel]) -> None:
    one, other = ends
    reading, writing = os.pipe()
    one.send({"a": 1})
    one.send({"b": [2]}, b"data", [writing])
    os.close(writing)
    assert other.receive() == Note({"a": 1}, b"", [])
    note = other.receive()
    assert note is not None
    assert note.words == {"b": [2]}
    assert note.data == b"data"
    os.write(note.descriptors[0], b"x")
    assert os.read(reading, 1) == b"x"
    os.close(note.descriptors[0])
    os.close(reading)
    one.close()
    assert other.receive() is None


@pytest.mark.parametrize(
    "data",
    [
        struct.pack("<II", 5 << 20, 0),
        struct.pack("<II", 2, (1 << 30) + 1),
        struct.pack("<II", 3, 0) + b"{x}",
        struct.pack("<II", 2, 0) + b"[]",
        struct.pack("<II", 17, 0) + b'{"descriptors":1}',
    ],
)
def test_what_is_no_message_is_refused(ends: tuple[Channel, Channel], data: bytes) -> None:
    one, other = ends
    one.sock.sendall(data)
    with pytest.raises(RemoteProtocolError):
        other.receive()


def test_descriptors_that_nobody_names_are_not_gathered(ends: tuple[Channel, Channel]) -> None:
    one, other = ends
    one.sock.sendall(struct.pack("<II", 100, 0))
    with open(os.devnull) as file:
        for _ in range(12):
            socket.send_fds(one.sock, [b"x"], [file.fileno()] * 8)
    with pytest.raises(RemoteProtocolError, match="no message names"):
        other.receive()


def test_a_loop_hears_and_posts_more_than_the_socket_takes(ends: tuple[Channel, Channel]) -> None:
    one, other = ends
    loop = LoopThread("test-channel")
    heard: list[Note] = []
    ended = threading.Event()
    call_in_loop(loop.io_loop, lambda: one.listen(loop.io_loop, heard.append, ended.set))
    large = bytes(3 << 20)

    def post() -> None:
        for number in range(3):
            one.post({"n": number}, large)

    call_in_loop(loop.io_loop, post)
    for number in range(3):
        note = other.receive()
        assert note is not None
        assert (note.words, len(note.data)) == ({"n": number}, len(large))
    eventually(lambda: one.waiting == 0)
    other.send({"hello": 1})
    eventually(lambda: heard)
    other.sock.sendall(b"\xff" * 8)
    assert ended.wait(10), "what breaks the form ends the channel"
    loop.stop()


def test_the_end_of_the_other_side_is_told_once(ends: tuple[Channel, Channel]) -> None:
    one, other = ends
    loop = LoopThread("test-channel")
    told: list[int] = []
    call_in_loop(loop.io_loop, lambda: one.listen(loop.io_loop, lambda note: None, lambda: told.append(1)))
    other.close()
    eventually(lambda: told == [1])
    with pytest.raises(OSError, match=r"."):
        one.send({"a": 1})
    call_in_loop(loop.io_loop, lambda: one.post({"a": 1}, b"", [os.dup(0)]))
    loop.stop()
    assert told == [1]


def test_messages_that_come_together_are_all_heard(ends: tuple[Channel, Channel]) -> None:
    one, other = ends
    for number in range(5):
        one.send({"number": number})
    assert [note.words["number"] for note in other.receive_some()] == [0, 1, 2, 3, 4]
    for number in range(5):
        one.send({"number": number})
    first = other.receive()
    assert first is not None
    loop = LoopThread("channel")
    heard: list[int] = [first.words["number"]]
    call_in_loop(
        loop.io_loop, lambda: other.listen(loop.io_loop, lambda note: heard.append(note.words["number"]), bool)
    )
    eventually(lambda: heard == [0, 1, 2, 3, 4], "those that had come behind the first")
    call_in_loop(loop.io_loop, other.close)
    loop.stop()


def test_the_end_is_told_to_who_waits_for_some(ends: tuple[Channel, Channel]) -> None:
    one, other = ends
    one.close()
    with pytest.raises(EOFError):
        list(other.receive_some())


def test_a_channel_ends_where_there_is_no_memory_for_what_comes(
    ends: tuple[Channel, Channel], monkeypatch: pytest.MonkeyPatch
) -> None:
    one, other = ends
    ended = threading.Event()

    def no_memory(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr(socket, "recv_fds", no_memory)
    thread = LoopThread("test")
    call_in_loop(thread.io_loop, lambda: other.listen(thread.io_loop, lambda _: None, ended.set))
    one.send({"a": 1})
    assert ended.wait(10)
    assert other.out_of_memory
    thread.stop()
