"""Systems without epoll, run files, the two words of TVM for arrays, devices by name, remote cells' neighbours."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import stat
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import rpcnb
from rpcnb.runtime.registry import Registry
from rpcnb.server import host as host_module
from rpcnb.server.workers import WorkerPool
from rpcnb.transport import runfiles, tcptable
from rpcnb.transport.address import Address, is_loopback, parse_address, show_address
from rpcnb.transport.shaper import parse_link
from rpcnb.transport.watcher import LoopWatcher, make_watcher

Serve = Callable[..., Any]


def test_a_server_without_epoll_serves_alike(serve: Serve, registry: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    async def later(value: int) -> int:
        await asyncio.sleep(0.01)
        return value

    registry.register("later", later)
    registry.register("plain", lambda value: value)
    monkeypatch.setattr(host_module, "make_watcher", LoopWatcher)
    server = serve()
    assert isinstance(server.watcher, LoopWatcher)
    with rpcnb.connect(server.address) as session, rpcnb.connect(server.address) as other:
        for number in range(20):
            assert session.call("plain", number) == number
            assert other.call("later", number) == number
            assert session.call("later", number) == number
        data = np.random.default_rng(0).random(1 << 19)
        np.testing.assert_array_equal(session.array(data).numpy(), data)


def test_the_watcher_is_the_systems_best(monkeypatch: pytest.MonkeyPatch, serve: Serve) -> None:
    import select

    io_loop = serve().io_loop
    monkeypatch.delattr(select, "epoll")
    assert isinstance(make_watcher(io_loop), LoopWatcher)


def test_tensor_and_empty_are_tvms_words(serve: Serve) -> None:
    with rpcnb.connect(serve().address) as session:
        made = rpcnb.tensor(np.arange(4), session.cpu())
        np.testing.assert_array_equal(made.numpy(), np.arange(4))
        assert rpcnb.empty((2, 3), "int8", session.cpu()).nbytes == 6
        with pytest.raises(TypeError, match=r"\.numpy\(\) copies it here"):
            np.asarray(made)
        made.free()
        with pytest.raises(rpcnb.errors.StaleHandle, match="argument 0 is a tensor that was freed"):
            session.call("testing.echo", made)


def test_names_of_the_package_can_be_completed() -> None:
    assert {"connect", "RemoteError", "events", "Server"} <= set(dir(rpcnb))
    assert "importlib" not in dir(rpcnb)


def test_a_process_that_just_ends_leaves_no_directory() -> None:
    script = (
        "import rpcnb; server = rpcnb.Server(port=0, silent=True); session = rpcnb.connect(server.address);"
        "session.upload(b'x', 'x'); print(session.call('tvm.rpc.server.workpath', ''))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=30, check=True)
    assert not Path(done.stdout.strip()).exists()


def test_devices_have_tvms_names(serve: Serve) -> None:
    with rpcnb.connect(serve().address) as session:
        kinds = ("cpu", "cuda", "cl", "vulkan", "metal", "rocm", "ext_dev", "hexagon", "webgpu")
        assert [getattr(session, kind)(1).type for kind in kinds] == [1, 2, 4, 7, 8, 10, 12, 16, 15]
        assert session.device("cuda:3") == session.device(2, 3)
        assert len({session.cpu(), session.cpu(0), session.cpu(1)}) == 2
        assert not session.cuda().attribute("exist")
        assert session.cpu().attribute("total_global_memory") > 0
        with pytest.raises(rpcnb.errors.ArgumentError, match="expected one of"):
            session.cpu().attribute("colour")


def test_run_files_are_private_and_those_of_the_dead_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "run"
    monkeypatch.setenv("RPCNB_RUNTIME_DIR", str(folder))
    path = runfiles.publish(1234, {"host": "127.0.0.1", "port": 1234, "pid": os.getpid(), "token": "t"})
    assert path is not None
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert runfiles.find_token("127.0.0.1", 1) is None
    dead = folder / "server-1-2.json"
    runfiles.write_atomically(dead, {"port": 1, "pid": 2**22 + 1})
    (folder / "server-9-9.json").write_text("no json")
    os.chmod(folder / "server-9-9.json", 0o600)
    readable = folder / "server-8-8.json"
    readable.write_text(json.dumps({"port": 8, "pid": os.getpid()}))
    os.chmod(readable, 0o644)
    assert [one["port"] for one in runfiles.list_servers()] == [1234]
    assert not dead.exists()
    os.chmod(folder, 0o755)
    assert runfiles.list_servers() == []
    assert runfiles.publish(1, {}) is None


@pytest.mark.parametrize(
    ("published", "dialled", "found"),
    [
        ("127.0.0.1", "127.0.0.1", True),
        ("127.0.0.1", "localhost", True),
        ("localhost", "127.0.0.1", True),
        ("0.0.0.0", "127.0.0.1", True),
        ("0.0.0.0", "::1", False),
        ("::", "::1", True),
        ("127.0.0.1", "127.0.0.2", False),
        ("127.0.0.2", "127.0.0.1", False),
        ("127.0.0.1", "10.0.0.5", False),
        ("192.168.0.7", "127.0.0.1", False),
    ],
)
def test_a_token_found_by_itself_is_for_the_address_that_was_published(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, published: str, dialled: str, found: bool
) -> None:
    monkeypatch.setenv("RPCNB_RUNTIME_DIR", str(tmp_path / "run"))
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        runfiles.publish(port, {"host": published, "port": port, "pid": os.getpid(), "token": "t"})
        assert runfiles.find_token(dialled, port) == ("t" if found else None)
        assert runfiles.find_token(dialled, port + 1) is None
    assert runfiles.find_token(dialled, port) is None, "who does not listen there any more"


def test_a_token_is_not_for_another_process_of_the_same_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RPCNB_RUNTIME_DIR", str(tmp_path / "run"))
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        path = runfiles.publish(port, {"host": "127.0.0.1", "port": port, "pid": os.getpid(), "token": "t"})
        assert path is not None
        content = json.loads(path.read_text())
        assert runfiles.find_token("127.0.0.1", port) == "t"
        runfiles.write_atomically(path, {**content, "started": content["started"] - 1})
        assert runfiles.find_token("127.0.0.1", port) is None
        assert not path.exists()


def test_where_processes_cannot_be_looked_at_the_rest_decides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> Any:
        raise OSError

    monkeypatch.setattr(tcptable, "_lines", refuse)
    monkeypatch.setattr("builtins.open", refuse)
    assert tcptable.may_listen(os.getpid(), 1)
    assert runfiles._started(os.getpid()) is None


def test_the_runtime_directory_follows_the_system(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("RPCNB_RUNTIME_DIR")
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    assert runfiles.runtime_directory() == tmp_path / "rpcnb"
    monkeypatch.delenv("XDG_RUNTIME_DIR")
    assert runfiles.runtime_directory().name == f"rpcnb-{os.getuid()}"


def test_addresses_are_read_as_users_write_them() -> None:
    assert parse_address("board") == Address("board", 9090, "")
    assert parse_address("board:1", key="k") == Address("board", 1, "k")
    assert parse_address("rpc://board:1/rpi%20x") == Address("board", 1, "rpi x")
    assert parse_address("[::1]:2") == Address("::1", 2, "")
    assert parse_address("::1") == Address("::1", 9090, "")
    assert show_address("::1", 2) == "[::1]:2"
    for bad in ("http://x", "[::1", "[::1]x", ":1", "x:0", "x:y", "x:70000"):
        with pytest.raises(ValueError, match="expected"):
            parse_address(bad)
    assert is_loopback("localhost")
    assert not is_loopback("example.invalid")


def test_links_are_read_as_users_write_them() -> None:
    assert parse_link("10M,20ms") == (10e6, 0.02)
    assert parse_link("1.5G") == (1.5e9, 0.0)
    assert parse_link("500kB/s, 1s") == (500e3, 1.0)
    for bad in ("", "x", "0,1ms", "1M,-1", "1M,100s", "1T"):
        with pytest.raises(ValueError, match="expected"):
            parse_link(bad)


def test_a_full_pool_keeps_jobs_waiting_and_a_failing_job_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    pool = WorkerPool("test", running=1)
    release, done = threading.Event(), threading.Event()

    def fail() -> None:
        release.wait(10)
        raise RuntimeError("job failed")

    pool.submit(fail)
    pool.submit(done.set)
    release.set()
    assert done.wait(10)
    pool.close(5)
    assert "a worker's job failed" in caplog.text
    caplog.clear()


def test_a_server_lives_on_localhost_and_needs_a_token_elsewhere() -> None:
    with pytest.raises(rpcnb.errors.AccessDenied, match="insecure=True"):
        rpcnb.Server("0.0.0.0", 0, token=False)
    with rpcnb.Server("0.0.0.0", 0, silent=True) as server:
        assert server.token
        assert "token set" in repr(server)
        assert server.token not in repr(server)
        with rpcnb.connect("127.0.0.1", server.port, token=server.token) as session:
            assert session.call("rpc.test.addone", 1) == 2
    assert server.closed
    with rpcnb.Server("0.0.0.0", 0, token=False, insecure=True, silent=True) as server:
        assert server.token is None
    with pytest.raises(ValueError, match="letters, digits"):
        rpcnb.Server(port=0, token="a b")
    with pytest.raises(ValueError, match="without white space"):
        rpcnb.Server(port=0, key="a b")


def test_taken_ports_are_passed_over(serve: Serve) -> None:
    taken = serve()
    with rpcnb.Server(port=taken.port, port_end=taken.port + 50, silent=True) as server:
        assert server.port > taken.port
    with pytest.raises(OSError, match=f"no free port: port {taken.port} on"):
        rpcnb.Server(port=taken.port, port_end=taken.port + 1)
    prepared: list[int] = []
    with rpcnb.Server(port=0, server_init_callback=lambda: prepared.append(1), silent=True):
        assert prepared == [1]
