"""Servers by name: the file of hosts, and where a token comes from that nobody has given."""

from __future__ import annotations

import os
import stat
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import rpcnb
from rpcnb.errors import HostsUnreadable
from rpcnb.link import hosts
from rpcnb.link.hosts import Host, find_host, find_secret, list_hosts, remember_host
from rpcnb.protocol.secret import Secret
from rpcnb.transport.address import parse_address

TOKEN = "canary-of-the-file-of-hosts"
PIN = "sha256=" + "A" * 43


@pytest.fixture(autouse=True)
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("RPCNB_CONFIG_DIR", str(tmp_path / "config"))
    monkeypatch.delenv("RPCNB_TOKEN", raising=False)
    return tmp_path / "config"


def write(config: Path, text: str, mode: int = 0o600) -> None:
    config.mkdir(mode=0o700)
    (config / "hosts.toml").write_text(text)
    (config / "hosts.toml").chmod(mode)


def test_without_a_file_nobody_is_known() -> None:
    assert list_hosts() == []
    assert find_host("bench-07") is None
    assert find_secret(parse_address("bench-07:9090")) is None


def test_a_server_is_remembered_and_found(config: Path) -> None:
    remember_host(Host("bench-07", "bench-07.lab:9090", "rpi", TOKEN, PIN, trust_output=True))
    found = find_host("bench-07")
    assert found == Host("bench-07", "bench-07.lab:9090", "rpi", TOKEN, PIN, trust_output=True)
    assert TOKEN not in repr(found)
    assert found is not None
    assert found.whole == f"rpcs://bench-07.lab:9090#{PIN}"
    assert Host("x", "rpcs://y", fingerprint=PIN).whole == f"rpcs://y#{PIN}"
    assert Host("x", "rpcs://y#z", fingerprint=PIN).whole == "rpcs://y#z"
    file = config / "hosts.toml"
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert find_secret(parse_address("bench-07.lab:9090")) is None, "the entry is of another scheme"


def test_one_that_is_remembered_again_is_replaced_and_others_stay(config: Path) -> None:
    write(
        config,
        '# mine\n[other]\naddress = "x:1"\n\n[bench]\naddress = "old:1"\ntoken = "t"\n\n[last]\naddress = "y:2"\n',
    )
    remember_host(Host("bench", 'odd "name"', token=TOKEN))
    assert [(one.name, one.address) for one in list_hosts()] == [
        ("other", "x:1"), ("last", "y:2"), ("bench", 'odd "name"'),
    ]  # fmt: skip
    text = (config / "hosts.toml").read_text()
    assert text.startswith("# mine\n")
    assert "old:1" not in text


@pytest.mark.parametrize("name", ["", "a b", "a.b", "x:1", "rpc://x", "../x"])
def test_what_is_no_name_is_not_looked_up(config: Path, name: str) -> None:
    write(config, "not even TOML")
    assert find_host(name) is None
    with pytest.raises(ValueError, match="expected a name of letters, digits"):
        remember_host(Host(name, "x:1"))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("not even TOML", "is no TOML"),
        ('address = "x"', r"\[address\] names no address"),
        ("[a]\ntoken = 'x'", r"\[a\] names no address"),
        ("[a]\naddress = 5", r"\[a\] names no address"),
        ("[a]\naddress = 'x'\ntoken = 5", r"\[a\] has a text as token"),
        ("[a]\naddress = 'x'\ntrust_output = 'yes'", r"\[a\] has true or false as trust_output"),
        ("[a]\naddress = 'x'\npassword = 'y'", r"\[a\] has no password; expected address, key, token"),
    ],
)
def test_a_file_that_says_something_else_is_named(config: Path, text: str, said: str) -> None:
    write(config, text)
    with pytest.raises(HostsUnreadable, match=said):
        find_host("a")
    with pytest.raises(HostsUnreadable):
        remember_host(Host("b", "x:1"))


def test_a_file_that_others_can_read_is_refused(config: Path) -> None:
    write(config, "[a]\naddress = 'x'", 0o640)
    with pytest.raises(HostsUnreadable, match="holds tokens, and others can read it: chmod 600"):
        list_hosts()


def test_without_a_reader_of_toml_it_is_said_how_to_get_one(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(config, "[a]\naddress = 'x'")
    monkeypatch.setattr(sys, "version_info", (3, 10, 0))
    monkeypatch.setitem(sys.modules, "tomli", None)
    with pytest.raises(HostsUnreadable, match=r"pip install 'rpcnb\[hosts\]'"):
        list_hosts()


def test_a_token_comes_from_the_nearest_place(
    config: Path, monkeypatch: pytest.MonkeyPatch, serve: Callable[..., Any], caplog: pytest.LogCaptureFixture
) -> None:
    """``token=``, else this user's own server there, else the environment, else the file."""
    server = serve(token=TOKEN)
    write(
        config,
        f"[board]\naddress = '127.0.0.1:{server.port}'\ntoken = '{TOKEN}'\n[else]\naddress='127.0.0.1:{server.port}'",
    )
    assert find_secret(parse_address(server.address)) == TOKEN
    rpcnb.connect("board").close()
    rpcnb.connect(server.address).close()
    monkeypatch.setenv("RPCNB_TOKEN", "another-one")
    assert find_secret(parse_address(server.address)) == "another-one"
    with pytest.raises(rpcnb.KeyMismatch):
        rpcnb.connect("board")
    caplog.clear()
    rpcnb.connect("board", token=TOKEN).close()
    monkeypatch.setattr(hosts, "find_own", lambda *where: {"token": TOKEN})
    rpcnb.connect("board").close()
    monkeypatch.setattr(hosts, "find_own", lambda *where: {})
    assert find_secret(parse_address(server.address)) is None, "an own one without a token"


def test_a_file_that_cannot_be_replaced_stays_as_it_is(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(config, "[a]\naddress = 'x'\n")

    def refuse(*_: Any) -> None:
        raise OSError(28, "no room")

    with monkeypatch.context() as changed:
        changed.setattr(os, "replace", refuse)
        with pytest.raises(OSError, match="no room"):
            remember_host(Host("b", "y"))
    assert [one.name for one in config.iterdir()] == ["hosts.toml"]
    assert (config / "hosts.toml").read_text() == "[a]\naddress = 'x'\n"


def shown_locals(error: BaseException) -> str:
    """What a verbose traceback shows of our frames."""
    found, trace = [], error.__traceback__
    while trace is not None:
        if "/rpcnb/" in trace.tb_frame.f_code.co_filename:
            found.append(repr(trace.tb_frame.f_locals))
        trace = trace.tb_next
    return "\n".join([*found, str(error), repr(error)])


@pytest.mark.parametrize(
    "text",
    [
        f"[a]\naddress = 'x:1'\ntoken = '{TOKEN}'\nnot TOML",
        f"[a]\naddress = 'x:1'\ntoken = '{TOKEN}'\nwrong = 1",
        f"[a]\ntoken = '{TOKEN}'",
        f"[a]\naddress = '127.0.0.1:1'\ntoken = '{TOKEN}'",
        f"[b]\naddress = 'x:1'\n[a]\naddress = 'nowhere.invalid:y'\ntoken = '{TOKEN}'",
    ],
)
def test_no_verbose_traceback_shows_a_token_of_the_file(config: Path, text: str) -> None:
    write(config, text)
    with pytest.raises((ValueError, OSError)) as caught:
        rpcnb.connect("a", timeout=2)
    assert TOKEN not in shown_locals(caught.value)


def test_nor_of_one_that_is_remembered(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(config, f"[a]\naddress = 'x:1'\ntoken = '{TOKEN}'\n")

    def refuse(*_: Any) -> None:
        raise OSError(28, "no room")

    with monkeypatch.context() as changed:
        changed.setattr(os, "replace", refuse)
        with pytest.raises(OSError, match="no room") as caught:
            remember_host(Host("b", "y", token=Secret(TOKEN)))
    assert TOKEN not in shown_locals(caught.value)
    monkeypatch.setenv("RPCNB_TOKEN", TOKEN)
    with pytest.raises(rpcnb.ConnectFailed) as failed:
        rpcnb.connect("127.0.0.1:1")
    assert TOKEN not in shown_locals(failed.value)
