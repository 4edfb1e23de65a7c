"""A server's record of who did what, and its numbers: of a day's session, read back; nothing secret is in them."""

from __future__ import annotations

import hashlib
import json
import os
import stat
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import eventually

import rpcnb
from rpcnb.runtime.registry import Registry
from rpcnb.server import audit
from rpcnb.server.isolation import Isolation

TOKEN = "canary-of-the-record-0123456789"
VALUE = "canary-of-a-value"
Serve = Callable[..., Any]
FUNCTIONS = """
import asyncio, rpcnb
async def later(x):
    await asyncio.sleep(0.01)
    return x
def fail(text):
    raise ValueError(text)
def register(registry):
    registry.register("a.echo", lambda x: x)
    registry.register("a.later", later)
    registry.register("a.fail", fail)
"""


@pytest.fixture(params=["one process", "isolated"])
def start(request: pytest.FixtureRequest, serve: Serve, registry: Registry, tmp_path: Path) -> Serve:
    def begin(**options: Any) -> Any:
        if request.param == "one process":
            scope: dict[str, Any] = {}
            exec(FUNCTIONS, scope)  # the same as in the other case
            scope["register"](registry)
            return serve(token=TOKEN, **options)
        (tmp_path / "functions.py").write_text(f"{FUNCTIONS}\nregister(rpcnb.runtime.registry.REGISTRY)\n")
        return serve(token=TOKEN, registry=None, isolate=Isolation([str(tmp_path / "functions.py")]), **options)

    return begin


def a_day(server: Any) -> None:
    """What an engineer does on a day."""
    with rpcnb.connect(server.address, token=TOKEN, key="") as session:
        assert session.call("a.echo", VALUE) == VALUE
        assert [one.result(10) for one in [session.get_function("a.later").submit(i) for i in range(3)]] == [0, 1, 2]
        with pytest.raises(rpcnb.RemoteError, match=VALUE):
            session.call("a.fail", VALUE)
        session.upload(VALUE.encode(), "small")
        session.upload(bytes(3 << 20), "large")
        assert session.array(np.ones(4)).numpy().sum() == 4
        session.run_cell(f"x = {VALUE!r}")


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_day_is_read_back(start: Serve, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "audit.jsonl"
    server = start(audit=str(path), allow_exec=True)
    with pytest.raises(rpcnb.KeyMismatch):
        rpcnb.connect(server.address, token="wrong" * 8)
    caplog.clear()
    a_day(server)
    eventually(lambda: server.sessions == 0, "the end")
    server.close()
    lines = read(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    text = path.read_text()
    assert TOKEN not in text
    assert VALUE not in text
    assert [line["event"] for line in lines[:2]] == ["refused", "opened"]
    assert lines[0]["reason"] == "wrong key or token"
    assert {name: lines[1][name] for name in ("entry", "encrypted", "certificate", "session")} == {
        "entry": "proof", "encrypted": False, "certificate": "", "session": 1,
    }  # fmt: skip
    calls = [line for line in lines if line["event"] == "call"]
    assert {line["session"] for line in calls} == {1}
    assert {line["peer"] for line in calls} == {lines[1]["peer"]}
    assert Counter((line["function"], line["outcome"]) for line in calls) == {
        ("a.echo", "ok"): 1, ("a.later", "ok"): 3, ("a.fail", "ValueError"): 1,
        ("tvm.rpc.server.upload", "ok"): 2, ("rpcnb.cell", "ok"): 1,
    }  # fmt: skip
    found = {line.get("file", line["function"]): line.get("sha256") for line in calls}
    assert found["small"] == hashlib.sha256(VALUE.encode()).hexdigest()
    assert found["large"] == hashlib.sha256(bytes(3 << 20)).hexdigest()
    assert found["rpcnb.cell"] == hashlib.sha256(f"x = {VALUE!r}".encode()).hexdigest()
    last = lines[-1]
    assert (last["event"], last["how"], last["session"]) == ("ended", "closed", 1)
    assert last["received"] > 3 << 20
    assert 0 < last["sent"] < 1 << 20
    assert all(line["time"] >= lines[0]["time"] for line in lines)


def test_with_tls_the_client_s_certificate_is_in_it(serve: Serve, tmp_path: Path, monkeypatch: Any) -> None:
    import trustme

    monkeypatch.setenv("RPCNB_CONFIG_DIR", str(tmp_path / "config"))
    authority = trustme.CA()
    authority.cert_pem.write_to_path(tmp_path / "ca.pem")
    authority.issue_cert("engineer@bench").private_key_and_cert_chain_pem.write_to_path(tmp_path / "client.pem")
    server = serve(audit=str(tmp_path / "audit"), tls=rpcnb.Tls(ca=str(tmp_path / "ca.pem")))
    rpcnb.connect(server.address, tls=rpcnb.Tls(str(tmp_path / "client.pem"))).close()
    eventually(lambda: len(read(tmp_path / "audit")) == 2, "the end")
    opened = read(tmp_path / "audit")[0]
    assert (opened["entry"], opened["encrypted"], len(opened["certificate"])) == ("open", True, 43)


def test_files_are_rotated_and_private(serve: Serve, registry: Registry, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(audit, "_BYTES", 2000)
    registry.register("a.echo", lambda x: x)
    server = serve(audit=str(tmp_path / "audit"))
    with rpcnb.connect(server.address) as session:
        for number in range(200):
            session.call("a.echo", number)
    eventually(lambda: server.sessions == 0, "the end")
    server.close()
    files = sorted(tmp_path.glob("audit*"))
    assert len(files) == 9
    assert all(stat.S_IMODE(one.stat().st_mode) == 0o600 and one.stat().st_size <= 2000 for one in files)


def test_a_file_that_cannot_be_written_is_said_at_the_start_and_later(
    serve: Serve, registry: Registry, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: Any
) -> None:
    with pytest.raises(OSError, match="No such file"):
        serve(audit=str(tmp_path / "none" / "audit"))
    registry.register("a.echo", lambda x: x)
    server = serve(audit=str(tmp_path / "audit"))

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(server._audit._file, "shouldRollover", full)
    with rpcnb.connect(server.address) as session:
        assert session.call("a.echo", 1) == 1
    eventually(lambda: server.sessions == 0, "the end")
    assert "the audit file" in caplog.text
    caplog.clear()


def ask(server: Any, token: str | None = None) -> str:
    headers = {} if token is None else {"Authorization": f"Bearer {token}"}
    request = urllib.request.Request(f"http://127.0.0.1:{server.web_port}/metrics", headers=headers)
    with urllib.request.urlopen(request, timeout=10) as answer:
        assert answer.headers["Content-Type"] == "text/plain; version=0.0.4"
        text: str = answer.read().decode()
        return text


def test_numbers_for_who_knows_the_token(start: Serve, caplog: pytest.LogCaptureFixture) -> None:
    server = start(web_port=0, allow_exec=True)
    for token in (None, "wrong" * 8):
        with pytest.raises(urllib.error.HTTPError, match="401"):
            ask(server, token)
    with pytest.raises(rpcnb.KeyMismatch):
        rpcnb.connect(server.address, token="wrong" * 8)
    caplog.clear()
    assert "rpcnb_calls_total 0\n" in ask(server, TOKEN)
    a_day(server)
    eventually(lambda: server.sessions == 0, "the end")
    eventually(lambda: 'rpcnb_calls_total{outcome="ok"} 7\n' in ask(server, TOKEN), "all calls")
    text = ask(server, TOKEN)
    for line in (
        "rpcnb_sessions 0", "rpcnb_sessions_opened_total 1", 'rpcnb_calls_total{outcome="ValueError"} 1',
        "rpcnb_errors_total 1", "rpcnb_parked 0", 'rpcnb_refused_total{reason="wrong key or token"} 1',
    ):  # fmt: skip
        assert f"{line}\n" in text
    (received,) = [line for line in text.splitlines() if line.startswith('rpcnb_bytes_total{direction="received"}')]
    assert float(received.split()[1]) > 3 << 20
    assert TOKEN not in text


def test_guesses_at_the_numbers_count_as_guesses(serve: Serve, monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    server = serve(token=TOKEN, web_port=0, limits=rpcnb.Limits(exempt_loopback=False))
    noted: list[str] = []

    def note(host: str) -> float:
        noted.append(host)
        return 0.01

    monkeypatch.setattr(server._guesses, "note", note)
    for _ in range(3):
        with pytest.raises(urllib.error.HTTPError, match="401"):
            ask(server, "wrong" * 8)
    assert noted == ["127.0.0.1"] * 3
    assert "rpcnb_sessions 0" in ask(server, TOKEN)
    caplog.clear()


def test_a_parked_request_is_among_them(start: Serve) -> None:
    server = start(web_port=0)
    with rpcnb.connect(server.address, token=TOKEN, lanes=0) as session:
        assert os.environ  # the session's own connection is parked: it has no lanes
        pending = [session.get_function("a.later").submit(1) for _ in range(30)]
        eventually(lambda: "rpcnb_parked 1\n" in ask(server, TOKEN), "the parked request")
        for one in pending:
            one.result(10)
    eventually(lambda: "rpcnb_parked 0\n" in ask(server, TOKEN), "none")
