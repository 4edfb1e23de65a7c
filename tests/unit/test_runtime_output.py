"""The queue of what is to be sent."""

from __future__ import annotations

import pytest

from rpcnb.runtime.output import Output, staging


def test_buffers_leave_in_order_at_any_cut() -> None:
    output = Output()
    output.add([b"abc", b"", bytearray(b"de"), memoryview(b"fgh")])
    assert output.size == 8
    assert output.first(2) == [b"abc", b"de"]
    sent = b""
    for count in (1, 2, 3, 2):
        front = b"".join(bytes(buffer) for buffer in output.first(64))
        sent += front[:count]
        output.consume(count)
    assert sent == b"abcdefgh"
    assert not output


def test_clear_drops_everything() -> None:
    output = Output()
    output.add([b"abc"])
    assert output
    output.clear()
    assert not output
    assert output.first(1) == []


@pytest.mark.parametrize("nbytes", [0, 1, 1 << 16, (1 << 16) + 1, 1 << 30])
def test_staging_memory_is_writable_and_of_the_size_asked(nbytes: int) -> None:
    view = staging(nbytes)
    assert len(view) == nbytes
    if nbytes:
        view[-1] = 7
        assert view[0] == 0 or nbytes == 1
