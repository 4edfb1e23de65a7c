"""What the system says of TCP connections."""

from __future__ import annotations

import socket
import subprocess
import sys

import pytest
from conftest import eventually

from rpcnb.transport.tcptable import both_ends_are_here, ends_of, established


@pytest.mark.parametrize(("family", "host"), [(socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1")])
def test_both_ends_in_this_process(family: socket.AddressFamily, host: str) -> None:
    with socket.socket(family) as listener:
        try:
            listener.bind((host, 0))
        except OSError:
            pytest.skip("no IPv6 here")
        listener.listen()
        with socket.create_connection(listener.getsockname()[:2]) as client:
            server, _ = listener.accept()
            with server:
                assert both_ends_are_here(server)
                assert both_ends_are_here(client)
                assert ends_of(server).split(" ") == ends_of(client).split(" ")[::-1]
                alive = established()
                assert alive is not None
                assert ends_of(server) in alive
            eventually(lambda: ends_of(client) == "" or ends_of(client) not in (established() or ()))


def test_the_other_end_in_another_process() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        source = f"import socket, sys; s = socket.create_connection({listener.getsockname()!r}); sys.stdin.read()"
        with subprocess.Popen([sys.executable, "-c", source], stdin=subprocess.PIPE):
            server, _ = listener.accept()
            with server:
                assert not both_ends_are_here(server)


def test_what_is_no_tcp_connection_has_no_ends() -> None:
    one, other = socket.socketpair()
    with one, other:
        assert ends_of(one) == ""
        assert not both_ends_are_here(one)
