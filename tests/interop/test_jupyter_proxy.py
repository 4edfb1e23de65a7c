"""A colleague's server on a hub: through a real Jupyter server with jupyter-server-proxy, under a prefix."""

from __future__ import annotations

import asyncio
import importlib.util
import os
import secrets
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import eventually

import rpcnb
from rpcnb.runtime.registry import Registry

pytestmark = pytest.mark.timeout(120)

PREFIX = "/user/alice/"


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[int, str]]:
    """Port and token of a Jupyter server with a hub-like base URL."""
    if importlib.util.find_spec("jupyter_server_proxy") is None:
        if os.environ.get("CI") == "true":
            pytest.fail("jupyter-server-proxy is missing; CI needs it", pytrace=False)
        pytest.skip("jupyter-server-proxy is not installed")
    folder: Path = tmp_path_factory.mktemp("hub")
    token = secrets.token_hex(16)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "jupyter_server", "--no-browser", "--allow-root", f"--port={port}"]
    command += [f"--IdentityProvider.token={token}", f"--ServerApp.base_url={PREFIX}", f"--ServerApp.root_dir={folder}"]
    environment = {**os.environ, "JUPYTER_CONFIG_DIR": str(folder), "JUPYTER_RUNTIME_DIR": str(folder)}
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=environment)

    def answers() -> bool:
        assert process.poll() is None, (folder / "log").read_text()
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}{PREFIX}api", timeout=1) as reply:
                return bool(reply.status == 200)
        except OSError:
            return False

    try:
        eventually(answers, "the Jupyter server", 60)
        yield port, token
    finally:
        process.terminate()
        process.wait(20)


@pytest.fixture
def server(registry: Registry, serve: Callable[..., Any]) -> Any:
    registry.register("add", lambda a, b: a + b)
    return serve(web_port=0, token="alices-token")


def test_w4_a_server_behind_a_hub_is_reached(hub: tuple[int, str], server: Any) -> None:
    port, token = hub
    url = f"ws://127.0.0.1:{port}{PREFIX}proxy/{server.web_port}/ws"
    headers = {"Authorization": f"token {token}"}
    with rpcnb.connect(url, token="alices-token", headers=headers) as session:
        assert session.is_rpcnb
        assert session.call("add", 1, 2) == 3
        array = np.random.default_rng(0).random(2_000_000)
        assert (session.array(array).numpy() == array).all()
        assert token not in repr(session)

    async def story() -> None:
        async with await rpcnb.connect_async(url, token="alices-token", headers=headers) as session:
            assert await session.call("add", 1, 2) == 3

    asyncio.run(story())


def test_w4_the_hubs_token_and_ours_are_both_needed(
    hub: tuple[int, str], server: Any, caplog: pytest.LogCaptureFixture
) -> None:
    port, token = hub
    url = f"ws://127.0.0.1:{port}{PREFIX}proxy/{server.web_port}/ws"
    with pytest.raises(rpcnb.KeyMismatch, match=r"403|login"):
        rpcnb.connect(url, token="alices-token")
    with pytest.raises(rpcnb.KeyMismatch, match="wrong key or token"):
        rpcnb.connect(url, headers={"Authorization": f"token {token}"})
    caplog.clear()


def test_w4_a_port_where_nobody_listens_is_explained(hub: tuple[int, str]) -> None:
    port, token = hub
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        nobody = probe.getsockname()[1]
    with pytest.raises(rpcnb.ConnectFailed):
        rpcnb.connect(
            f"ws://127.0.0.1:{port}{PREFIX}proxy/{nobody}/ws", headers={"Authorization": f"token {token}"}, timeout=20
        )
