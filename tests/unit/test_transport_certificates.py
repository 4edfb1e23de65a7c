"""Certificates: fingerprints as people write them, what is known of servers, how long one is valid."""

from __future__ import annotations

import datetime
import shutil
import ssl
import stat
import sys
from pathlib import Path

import pytest
import trustme

from rpcnb.transport import certificates
from rpcnb.transport.address import parse_address, read_fingerprint
from rpcnb.transport.certificates import (
    expiry,
    fingerprint_of,
    known_fingerprint,
    own_certificate,
    remember,
)

DIGEST = bytes(range(32))
TEXT = "AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8"


@pytest.fixture(autouse=True)
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("RPCNB_CONFIG_DIR", str(tmp_path / "config"))
    return tmp_path / "config"


@pytest.mark.parametrize(
    "written", [TEXT, f"{TEXT}=", DIGEST.hex(), DIGEST.hex().upper(), DIGEST.hex(":"), TEXT.replace("=", "")]
)
def test_a_fingerprint_is_read_as_others_print_it(written: str) -> None:
    assert read_fingerprint(f"sha256={written}") == TEXT


@pytest.mark.parametrize("written", ["", "sha256=", "sha1=" + TEXT, "sha256=" + TEXT[:-1], "sha256=%%%", TEXT])
def test_what_is_none_is_refused(written: str) -> None:
    with pytest.raises(ValueError, match="expected the fingerprint of a certificate, sha256="):
        read_fingerprint(written)
    with pytest.raises(ValueError, match="expected the fingerprint"):
        parse_address(f"rpcs://board:9090/rpi#{written}")


def test_an_address_has_it_behind_all_else() -> None:
    address = parse_address(f"rpcs://board/rpi#sha256={TEXT}")
    assert (address.host, address.port, address.key, address.fingerprint) == ("board", 9090, "rpi", TEXT)
    assert str(address) == "rpcs://board:9090"
    assert parse_address("rpcs://board").fingerprint == ""


def test_servers_are_known_by_host_and_port(config: Path) -> None:
    assert known_fingerprint("board", 9090) == ""
    remember("board", 9090, TEXT)
    remember("::1", 9090, TEXT)
    assert known_fingerprint("board", 9090) == known_fingerprint("::1", 9090) == TEXT
    assert known_fingerprint("board", 9091) == ""
    file = config / "known_hosts"
    assert file.read_text() == f"board:9090 sha256={TEXT}\n[::1]:9090 sha256={TEXT}\n"
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert stat.S_IMODE(config.stat().st_mode) == 0o700
    file.write_text("board:9090 sha256=broken\nnonsense\n")
    assert known_fingerprint("board", 9090) == ""


def test_where_nothing_can_be_written_nothing_is_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("RPCNB_CONFIG_DIR", str(tmp_path / "file" / "below"))
    remember("board", 9090, TEXT)
    assert known_fingerprint("board", 9090) == ""


def test_the_directory_is_where_others_have_theirs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RPCNB_CONFIG_DIR")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    assert certificates.config_directory() == tmp_path / "rpcnb"
    monkeypatch.delenv("XDG_CONFIG_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert certificates.config_directory() == tmp_path / ".config" / "rpcnb"


@pytest.mark.parametrize("maker", ["cryptography", "openssl"])
def test_a_server_s_own_is_made_once(config: Path, monkeypatch: pytest.MonkeyPatch, maker: str) -> None:
    if maker == "openssl":
        monkeypatch.setitem(sys.modules, "cryptography", None)
        assert shutil.which("openssl"), "a program that every Linux has"
    cert, key = own_certificate()
    assert own_certificate() == (cert, key)
    before = cert.read_bytes()
    own_certificate()
    assert cert.read_bytes() == before
    assert stat.S_IMODE(key.stat().st_mode) == 0o600
    ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(cert, key)
    found = expiry(ssl.PEM_cert_to_DER_cert(cert.read_text()))
    assert not found.over
    assert found.at is not None
    assert 9 * 365 < (found.at - datetime.datetime.now(datetime.timezone.utc)).days < 11 * 365
    assert [one.name for one in (config / "tls").iterdir() if one.name.startswith("tmp")] == []


def test_without_a_maker_it_is_said_which_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cryptography", None)
    monkeypatch.setattr(shutil, "which", lambda _: None)
    with pytest.raises(OSError, match=r"pip install 'rpcnb\[tls\]'\) or by openssl"):
        own_certificate()


def test_a_maker_that_fails_is_heard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "openssl"
    program.write_text("#!/bin/sh\necho no entropy >&2\nexit 3\n")
    program.chmod(0o755)
    monkeypatch.setitem(sys.modules, "cryptography", None)
    monkeypatch.setattr(shutil, "which", lambda _: str(program))
    with pytest.raises(OSError, match="openssl makes no certificate: no entropy"):
        own_certificate()


def test_the_end_is_read_out_of_a_certificate() -> None:
    authority = trustme.CA()
    for day in (datetime.datetime(2031, 5, 17), datetime.datetime(2055, 1, 2), datetime.datetime(2001, 9, 9)):
        one = authority.issue_cert("board", not_after=day, not_before=datetime.datetime(2000, 1, 1))
        found = expiry(ssl.PEM_cert_to_DER_cert(one.cert_chain_pems[0].bytes().decode()))
        assert str(found) == f"{day:%Y-%m-%d}"
        assert found.over == (day.year == 2001)


@pytest.mark.parametrize("data", [b"", b"\x30", b"\x30\x80", b"junk", bytes(40)])
def test_what_is_no_certificate_counts_as_over(data: bytes) -> None:
    assert expiry(data).over
    assert str(expiry(data)) == "an unknown day"
    assert len(fingerprint_of(data)) == 43
