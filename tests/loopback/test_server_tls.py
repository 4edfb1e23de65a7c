"""TLS on a server's own port: who is let in, who is not and why, sessions of every kind, and what a listener hears."""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import os
import signal
import socket
import ssl
import struct
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import trustme
from conftest import eventually
from test_server_proofs import Relay, relay

import rpcnb
from rpcnb import errors
from rpcnb.runtime.registry import Registry
from rpcnb.server.isolation import Isolation
from rpcnb.transport.certificates import known_fingerprint, own_certificate

__all__ = ["relay"]
TOKEN = "canary-behind-the-curtain-0123456789"
Serve = Callable[..., Any]


@pytest.fixture(autouse=True)
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("RPCNB_CONFIG_DIR", str(tmp_path / "config"))
    return tmp_path / "config"


@pytest.fixture(autouse=True)
def _refusals_are_expected(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    yield
    records = caplog.get_records("call")
    assert not [one for one in records if one.exc_info or " refused 127.0.0.1:" not in one.getMessage()]
    records.clear()


class Authority:
    """One that signs certificates for this test's servers and clients."""

    def __init__(self, folder: Path) -> None:
        self._ca, self._folder = trustme.CA(), folder
        self.file = str(folder / "ca.pem")
        self._ca.cert_pem.write_to_path(self.file)

    def issue(self, *names: str, **options: Any) -> rpcnb.Tls:
        path = self._folder / f"{len(os.listdir(self._folder))}.pem"
        self._ca.issue_cert(*names, **options).private_key_and_cert_chain_pem.write_to_path(path)
        return rpcnb.Tls(str(path))


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    (tmp_path / "authority").mkdir()
    return Authority(tmp_path / "authority")


FUNCTIONS = """
import asyncio, os, rpcnb
def add(a, b):
    return a + b
async def later(x):
    await asyncio.sleep(0.05)
    return x
def register(registry):
    registry.register("t.add", add)
    registry.register("t.later", later)
    registry.register("t.crash", os.abort)
"""


@pytest.fixture(params=["one process", "isolated"])
def board(request: pytest.FixtureRequest, serve: Serve, registry: Registry, tmp_path: Path) -> Any:
    if request.param == "one process":
        scope: dict[str, Any] = {}
        exec(FUNCTIONS, scope)  # the same as in the other case
        scope["register"](registry)
        return serve(token=TOKEN, tls=True, key="rpi")
    return serve(token=TOKEN, tls=True, key="rpi", **isolated(tmp_path))


def isolated(folder: Path) -> dict[str, Any]:
    (folder / "functions.py").write_text(f"{FUNCTIONS}\nregister(rpcnb.runtime.registry.REGISTRY)\n")
    return {"registry": None, "isolate": Isolation([str(folder / "functions.py")])}


DIAL: dict[str, Callable[..., Any]] = {
    "blocking": rpcnb.connect,
    "awaited": lambda *args, **options: asyncio.run(rpcnb.connect_async(*args, **options)),
}


def connect(board: Any, **options: Any) -> Any:
    return rpcnb.connect(board.address, key="rpi", token=TOKEN, **options)


def test_a_session_is_as_without_it(board: Any, tmp_path: Path) -> None:
    assert board.address == f"rpcs://127.0.0.1:{board.port}#{board.fingerprint}"
    with connect(board) as session:
        assert session.call("t.add", 1, 2) == 3
        data = np.random.default_rng(1).integers(0, 255, 5 << 20, np.uint8)
        remote = session.array(data)
        later = session.get_function("t.later")
        pending = [later.submit(number) for number in range(20)]
        back = session.submit(remote.numpy)
        assert [one.result(20) for one in pending] == list(range(20))
        assert (back.result(20) == data).all()
        session.upload(data.tobytes(), "file")
        assert session.download("file") == data.tobytes()
        assert repr(session).startswith(f"<Session {session.name}: rpcs://127.0.0.1:{board.port}, key 'rpi'")


def test_an_awaited_one_too(board: Any) -> None:
    async def story() -> None:
        async with await rpcnb.connect_async(board.address, key="rpi", token=TOKEN) as session:
            assert await session.call("t.add", 1, 2) == 3
            later = await session.get_function("t.later")
            assert await asyncio.gather(*map(later, range(10))) == list(range(10))

    asyncio.run(story())


def test_an_interrupt_and_a_time_limit_end_a_call_alone(board: Any) -> None:
    with connect(board) as session:
        later = session.get_function("t.later")
        later(1)
        timer = threading.Timer(0.02, lambda: os.kill(os.getpid(), signal.SIGINT))
        timer.start()
        with contextlib.suppress(KeyboardInterrupt):
            while True:
                later(1)
        timer.join()
        with pytest.raises(errors.DeadlineExceeded):
            later(1, timeout=0.01)
        assert later(7) == 7


def test_a_crash_is_told_over_it(serve: Serve, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    board = serve(token=TOKEN, tls=True, **isolated(tmp_path))
    with rpcnb.connect(board.address, token=TOKEN) as session, pytest.raises(errors.SessionCrashed, match="SIGABRT"):
        session.call("t.crash")
    caplog.clear()


def test_a_relay_hears_nothing(board: Any, relay: Callable[..., Relay]) -> None:
    between = relay(board.port)
    with rpcnb.connect(f"rpcs://{between.address}#{board.fingerprint}", key="rpi", token=TOKEN) as session:
        session.upload(b"a secret of the session", "secret")
        assert session.get_function("t.later").submit(1).result(10) == 1
    heard = b"".join(between.heard)
    assert heard
    for word in (TOKEN.encode(), b"secret", b"t.later", b"rpi", struct.pack("<I", 0xFF271)):
        assert word not in heard


def test_a_server_is_known_after_the_first_visit(board: Any, config: Path) -> None:
    bare = board.address.partition("#")[0]
    with pytest.raises(
        errors.CertificateUnknown, match=r"self-signed certificate; the address that the server printed"
    ):
        rpcnb.connect(bare, key="rpi", token=TOKEN)
    connect(board).close()
    assert f"sha256={known_fingerprint('127.0.0.1', board.port)}" == board.fingerprint
    rpcnb.connect(bare, key="rpi", token=TOKEN).close()
    file = config / "known_hosts"
    file.write_text(file.read_text().replace(board.fingerprint, "sha256=" + "A" * 43))
    with pytest.raises(errors.CertificateChanged, match=r"kept since the first visit \(known_hosts\)") as caught:
        rpcnb.connect(bare, key="rpi", token=TOKEN)
    assert (f"sha256={caught.value.shown}", caught.value.expected) == (board.fingerprint, "A" * 43)
    connect(board).close()  # the owner's new word
    rpcnb.connect(bare, key="rpi", token=TOKEN).close()


def test_certificates_of_one_s_own(serve: Serve, authority: Authority) -> None:
    board = serve(token=TOKEN, tls=authority.issue("127.0.0.1"))
    bare = f"rpcs://127.0.0.1:{board.port}"
    with rpcnb.connect(bare, token=TOKEN, tls=rpcnb.Tls(ca=authority.file)) as session:
        assert session.key == ""
    rpcnb.connect(board.address, token=TOKEN).close()


def test_a_server_may_ask_clients_for_certificates(serve: Serve, authority: Authority, tmp_path: Path) -> None:
    own = authority.issue("127.0.0.1")
    board = serve(tls=rpcnb.Tls(own.cert, own.key, authority.file))
    rpcnb.connect(board.address, tls=authority.issue("engineer@bench")).close()
    (tmp_path / "other").mkdir()
    stranger = Authority(tmp_path / "other").issue("engineer@bench")
    for given in (None, stranger):
        with pytest.raises(errors.ConnectFailed):
            rpcnb.connect(board.address, tls=given)


# -- S7: each wrong case has an error that says what to do; nothing is sent --------------------------------------------


def expired(authority: Authority) -> rpcnb.Tls:
    old = datetime.datetime(2001, 1, 1)
    return authority.issue("127.0.0.1", not_before=old, not_after=old + datetime.timedelta(9))


WRONG: dict[str, tuple[Callable[[Authority], Any], Callable[[Any, Authority], dict[str, Any]], str]] = {
    "self-signed, not pinned": (lambda _: True, lambda board, _: {}, "self-signed certificate"),
    "another pin": (lambda _: True, lambda board, _: {"pin": "A" * 43}, "it has the fingerprint .* expected .* in the"),
    "expired": (expired, lambda board, authority: {"ca": authority.file}, "certificate has expired"),
    "expired, pinned": (expired, lambda board, _: {"pin": board.fingerprint[7:]}, "has expired on 2001-01-10"),
    "another host": (
        lambda authority: authority.issue("elsewhere.example"),
        lambda board, authority: {"ca": authority.file},
        "IP address mismatch",
    ),
    "another authority": (lambda authority: authority.issue("127.0.0.1"), lambda board, _: {}, "not trusted: .*issuer"),
}


@pytest.mark.parametrize("case", WRONG)
@pytest.mark.parametrize("kind", ["blocking", "awaited"])
def test_a_certificate_that_is_not_right_is_refused(serve: Serve, authority: Authority, case: str, kind: str) -> None:
    make, choose, text = WRONG[case]
    board = serve(token=TOKEN, tls=make(authority))
    chosen = choose(board, authority)
    pin = f"#sha256={chosen['pin']}" if "pin" in chosen else ""
    tls = rpcnb.Tls(ca=chosen["ca"]) if "ca" in chosen else None
    with pytest.raises(errors.CertificateUnknown, match=text) as caught:
        DIAL[kind](f"rpcs://127.0.0.1:{board.port}{pin}", token=TOKEN, tls=tls)
    assert caught.value.phase == "connect"
    assert board.sessions == 0


def test_old_versions_are_refused_by_both_ends(serve: Serve, caplog: pytest.LogCaptureFixture) -> None:
    board = serve(token=TOKEN, tls=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    with pytest.warns(DeprecationWarning, match="TLS"):
        context.minimum_version = context.maximum_version = ssl.TLSVersion.TLSv1_1
    context.set_ciphers("ALL:@SECLEVEL=0")
    with socket.create_connection(("127.0.0.1", board.port)) as sock, pytest.raises((ssl.SSLError, ConnectionError)):
        context.wrap_socket(sock)
    eventually(lambda: "no TLS (" in caplog.text, "the log")
    old = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    old.load_cert_chain(*own_certificate())
    with pytest.warns(DeprecationWarning, match="TLS"):
        old.minimum_version = old.maximum_version = ssl.TLSVersion.TLSv1_1
    old.set_ciphers("ALL:@SECLEVEL=0")
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def answer() -> None:
            sock, _ = listener.accept()
            with contextlib.suppress(OSError), sock:
                old.wrap_socket(sock, server_side=True)

        thread = threading.Thread(target=answer)
        thread.start()
        with pytest.raises(errors.ConnectFailed, match="TLS failed"):
            rpcnb.connect(f"rpcs://127.0.0.1:{listener.getsockname()[1]}#{board.fingerprint}")
        thread.join()


def test_plain_and_encrypted_meet_with_a_clear_word(serve: Serve, caplog: pytest.LogCaptureFixture) -> None:
    encrypted, plain = serve(token=TOKEN, tls=True), serve(token=TOKEN)
    with pytest.raises(errors.NotAnRpcServer, match="it speaks TLS: connect to rpcs://HOST:PORT"):
        rpcnb.connect(f"127.0.0.1:{encrypted.port}", token=TOKEN)
    with pytest.raises(errors.ConnectFailed, match="a server without TLS is reached by rpc://"):
        rpcnb.connect(f"rpcs://127.0.0.1:{plain.port}#{encrypted.fingerprint}", token=TOKEN)
    assert "no TLS (WRONG_VERSION_NUMBER)" in caplog.text
    assert "got a TLS hello" in caplog.text
    assert TOKEN not in caplog.text
    caplog.clear()


def test_stock_peers_use_a_plain_port_that_is_opened_for_them(serve: Serve) -> None:
    board = serve(token=TOKEN, tls=True, plain_port=0)
    assert board.plain_port not in (None, board.port)
    rpcnb.connect(f"127.0.0.1:{board.plain_port}", token=TOKEN).close()
    rpcnb.connect(board.address, token=TOKEN).close()
    assert board.whereabouts["plain_port"] == board.plain_port
    with pytest.raises(ValueError, match="plain_port= is for a server with tls="):
        rpcnb.Server(port=0, plain_port=0)
    with pytest.raises(ValueError, match="who comes through a tracker speaks without it"):
        rpcnb.Server(port=0, tls=True, tracker_addr=("127.0.0.1", 9190))
    with pytest.raises(ValueError, match="tls= is for rpcs:// and wss://"):
        rpcnb.connect("127.0.0.1", tls=rpcnb.Tls())


def test_files_that_are_no_certificates_are_named(serve: Serve, tmp_path: Path) -> None:
    (tmp_path / "junk.pem").write_text("junk")
    for given in (rpcnb.Tls(str(tmp_path / "junk.pem")), rpcnb.Tls(str(tmp_path / "none.pem"))):
        with pytest.raises(OSError, match=r"junk\.pem|none\.pem|No such file"):
            serve(tls=given)


# -- who stands between ------------------------------------------------------------------------------------------------


class Curtain:
    """Stands between with a certificate of its own, and passes on what it decrypts."""

    def __init__(self, board: Any, given: rpcnb.Tls) -> None:
        self._server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self._server.load_cert_chain(str(given.cert))
        self._client = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        self._client.check_hostname, self._client.verify_mode = False, ssl.CERT_NONE
        self._port = board.port
        self._ends: list[ssl.SSLSocket] = []
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port = self.listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                sock, _ = self.listener.accept()
                client = self._server.wrap_socket(sock, server_side=True)
                server = self._client.wrap_socket(socket.create_connection(("127.0.0.1", self._port)))
                self._ends += [client, server]
                for one, other in ((client, server), (server, client)):
                    threading.Thread(target=self._pass_on, args=(one, other), daemon=True).start()

    @staticmethod
    def _pass_on(one: ssl.SSLSocket, other: ssl.SSLSocket) -> None:
        with contextlib.suppress(OSError, ValueError):
            while data := one.recv(65536):
                other.sendall(data)
        with contextlib.suppress(OSError):
            other.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        for sock in (self.listener, *self._ends):
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
            sock.close()


def test_the_proof_is_bound_to_the_certificate(board: Any, authority: Authority) -> None:
    """Who has been given a certificate that the client trusts still cannot pass the proof on."""
    curtain = Curtain(board, authority.issue("127.0.0.1"))
    address = f"rpcs://127.0.0.1:{curtain.port}"
    with pytest.raises(errors.KeyMismatch):
        rpcnb.connect(address, key="rpi", token=TOKEN, tls=rpcnb.Tls(ca=authority.file))
    curtain.close()
    assert board.sessions == 0


# -- strangers ---------------------------------------------------------------------------------------------------------


def test_strangers_do_not_hurt_it(serve: Serve) -> None:
    board = serve(token=TOKEN, tls=True, limits=rpcnb.Limits(handshake_timeout=0.5))
    socks = [socket.create_connection(("127.0.0.1", board.port)) for _ in range(20)]
    for index, sock in enumerate(socks):
        sock.sendall(
            (b"", b"\x16\x03\x01\x02\x00\x01", b"GET / HTTP/1.1\r\n\r\n", b"\x00" * 600, os.urandom(99))[index % 5]
        )
    with rpcnb.connect(board.address, token=TOKEN) as session:
        assert session.call("rpc.test.addone", 1) == 2

        def gone() -> bool:
            for sock in socks:
                sock.settimeout(0.01)
                try:
                    while sock.recv(4096):
                        pass
                except TimeoutError:
                    return False
                except OSError:
                    pass
            return True

        eventually(gone, "the end of those who say nothing that counts")
        eventually(lambda: len(board._tls._relays) == 1, "that nothing of them is left")
        assert session.call("rpc.test.addone", 2) == 3
    eventually(lambda: not board._tls._relays, "the end of the session's")
    for sock in socks:
        sock.close()


def test_a_client_that_breaks_off_in_the_middle_ends_its_session(board: Any) -> None:
    session = connect(board)
    session.array(np.zeros(1 << 20, np.uint8))
    assert board.sessions == 1
    os.close(os.dup(session._ops.link.wire.sock.fileno()))
    session._ops.link.wire.sock.shutdown(socket.SHUT_RDWR)
    eventually(lambda: board.sessions == 0, "its end")
    session.close()


@pytest.fixture
def deaf() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield listener


@pytest.mark.parametrize("kind", ["blocking", "awaited"])
def test_a_server_that_says_nothing_costs_the_time_limit(deaf: socket.socket, kind: str) -> None:
    address = f"rpcs://127.0.0.1:{deaf.getsockname()[1]}#sha256={'A' * 43}"
    with pytest.raises(errors.ConnectFailed, match=r"timeout|no answer"):
        DIAL[kind](address, timeout=0.3)
