"""Every way in, with every wrong token: what each gets; and all there is with the right one."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import eventually
from isolatedboard import add

import rpcnb
from rpcnb.server.isolation import Isolation

assert callable(add)  # the board's functions are registered
TOKEN = "the-right-token-of-the-entries"
OTHER = "of-another-server-0123456789ab"
WRONG = {"none": None, "wrong": "wrong" + TOKEN[5:], "truncated": TOKEN[:-1], "longer": TOKEN + "x", "another's": OTHER}
BOARD = str(Path(__file__).with_name("isolatedboard.py"))


class Entry:
    """A server and how one comes in."""

    def __init__(self, server: Any, address: str, **options: Any) -> None:
        self.server, self.address, self.options = server, address, options

    def connect(self, token: str | None) -> Any:
        return rpcnb.connect(self.address, token=token, **self.options)

    async def connect_async(self, token: str | None) -> Any:
        return await rpcnb.connect_async(self.address, token=token, **self.options)


def board(**options: Any) -> Any:
    given = {"port": 0, "silent": True, "token": TOKEN, "key": "rpi", "allow_exec": True, "isolate": Isolation([BOARD])}
    return rpcnb.Server(**{**given, **options})


def by_tcp(stack: ExitStack) -> Entry:
    server = stack.enter_context(board())
    return Entry(server, server.address, key="rpi")


def by_tls(stack: ExitStack) -> Entry:
    server = stack.enter_context(board(tls=True))
    return Entry(server, server.address, key="rpi")


def by_plain_port(stack: ExitStack) -> Entry:
    server = stack.enter_context(board(tls=True, plain_port=0))
    return Entry(server, f"127.0.0.1:{server.plain_port}", key="rpi")


def by_websocket(stack: ExitStack) -> Entry:
    server = stack.enter_context(board(web_port=0))
    return Entry(server, f"ws://127.0.0.1:{server.web_port}/ws", key="rpi")


def by_tracker(stack: ExitStack) -> Entry:
    tracker = stack.enter_context(rpcnb.Tracker(port=0, silent=True))
    server = stack.enter_context(board(tracker_addr=(tracker.host, tracker.port)))
    eventually(lambda: server.registered, "the tracker")
    return Entry(server, f"tracker://{tracker.address}/rpi")


def by_proxy(stack: ExitStack) -> Entry:
    proxy = stack.enter_context(rpcnb.Proxy(port=0, silent=True))
    server = stack.enter_context(board(host=proxy.host, port=proxy.port, is_proxy=True))
    eventually(lambda: proxy.waiting == 1, "the board")
    return Entry(server, proxy.address, key="rpi")


WAYS = {
    "tcp": by_tcp,
    "tls": by_tls,
    "plain port": by_plain_port,
    "websocket": by_websocket,
    "tracker": by_tracker,
    "proxy": by_proxy,
}


@pytest.fixture
def entry(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> Iterator[Entry]:
    monkeypatch.setenv("RPCNB_CONFIG_DIR", str(tmp_path / "config"))
    monkeypatch.setenv("RPCNB_NONINTERACTIVE", "1")
    with ExitStack() as stack:
        yield WAYS[request.param](stack)
    assert TOKEN not in caplog.text
    caplog.get_records("call").clear()


@pytest.mark.parametrize("entry", WAYS, indirect=True)
def test_a_wrong_token_gets_nothing_and_the_right_one_all(entry: Entry, tmp_path: Path) -> None:
    for kind, token in WRONG.items():
        if kind != "truncated" and entry.address.startswith("tracker://"):
            continue  # each costs the time for which a board is kept for its client
        with pytest.raises(rpcnb.ConnectFailed) as caught:
            entry.connect(token)
        assert isinstance(caught.value, rpcnb.KeyMismatch) or "wrong key or token" in str(caught.value), kind
        assert TOKEN not in str(caught.value)
    assert entry.server.sessions == 0
    with entry.connect(TOKEN) as session:
        assert session.call("b.add", 1, 2) == 3
        assert session.get_function("b.add").submit(2, 3).result(20) == 5
        data = np.arange(1 << 18, dtype="float32")
        assert (session.array(data).numpy() == data).all()
        session.upload(b"content", "file")
        assert session.download("file") == b"content"
        assert session.run_cell("20 + 22").data["text/plain"] == "42"
        assert list(session.jobs) == []


@pytest.mark.parametrize("entry", ["tcp", "tls", "websocket"], indirect=True)
def test_an_awaited_session_likewise(entry: Entry) -> None:
    async def story() -> None:
        for token in WRONG.values():
            with pytest.raises(rpcnb.KeyMismatch):
                await entry.connect_async(token)
        async with await entry.connect_async(TOKEN) as session:
            assert await session.call("b.add", 1, 2) == 3

    asyncio.run(story())


@pytest.mark.parametrize("entry", ["tcp", "tls", "websocket", "proxy"], indirect=True)
def test_a_client_without_extensions_gives_its_token_as_stock_does(
    entry: Entry, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = {**entry.options, "extensions": False}
    connect: Callable[..., Any] = rpcnb.connect
    for token in filter(None, WRONG.values()):
        with pytest.raises(rpcnb.ConnectFailed):
            connect(entry.address, token=token, plain_token=True, **options)
    with connect(entry.address, token=TOKEN, plain_token=True, **options) as session:
        assert session.call("b.add", 1, 2) == 3
