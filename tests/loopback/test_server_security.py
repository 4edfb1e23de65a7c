"""Who may do what over a socket: addresses, tokens, trust, jails, hostile peers, secrets."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
from conftest import eventually
from rawpeer import INIT, SERVER_HELLO, VOID, FakeServer, RawClient, hello, packet, read_hello, read_packet

import rpcnb
from rpcnb import errors
from rpcnb.protocol import flows
from rpcnb.protocol.codes import MAGIC, Code, Limits
from rpcnb.protocol.handshake import refusal
from rpcnb.protocol.messages import CallFunc, CopyAck, Raised, Return, Syscall
from rpcnb.runtime import access
from rpcnb.runtime.registry import Registry
from rpcnb.transport.runfiles import find_token, list_servers, publish, runtime_directory
from rpcnb.values import CPU, DType, ModuleRef, ObjectRef, Pointer, TensorMeta

Serve = Callable[..., Any]
CANARY = "canary-7f3a9e-token"


def listening(port: int) -> set[str]:
    """Where this process listens on ``port``, from the system's socket table."""
    return {
        one.laddr.ip
        for one in psutil.Process().net_connections("tcp")
        if one.status == psutil.CONN_LISTEN and one.laddr.port == port
    }


def test_s1_the_default_address_is_loopback(serve: Serve) -> None:
    server = serve()
    assert listening(server.port) == {"127.0.0.1"}
    assert server.token is None
    server.close()
    assert listening(server.port) == set()


def test_s1_beyond_loopback_there_is_always_a_token(serve: Serve) -> None:
    server = serve(host="0.0.0.0")
    assert listening(server.port) == {"0.0.0.0"}
    assert server.token is not None
    assert len(server.token) >= 22
    with rpcnb.connect("127.0.0.1", server.port, token=server.token) as session:
        assert session.call("rpc.test.addone", 1) == 2
    with pytest.raises(errors.AccessDenied, match="insecure=True"):
        serve(host="0.0.0.0", token=False)
    open_server = serve(host="0.0.0.0", token=False, insecure=True)
    assert open_server.token is None


def test_s1_two_servers_make_different_tokens(serve: Serve) -> None:
    assert serve(token=True).token != serve(token=True).token


def refused(client: RawClient) -> None:
    assert struct.unpack("<i", client.receive(4)) == (MAGIC + 2,)
    assert client.is_closed()


@pytest.mark.parametrize(
    "text",
    [
        "client:",
        "client: -token=",
        "client: -token=wrong",
        "client: -token=right-token",
        f"client: -token={CANARY[:-1]}",
        f"client: -token={CANARY}x",
        f"client: -token={CANARY.upper()}",
        f"client: --token={CANARY}",
        f"client: token={CANARY}",
        f"client:-token={CANARY}",
        f"server: -token={CANARY}",
        f"client:other -token={CANARY}",
        "client: -token=\u00e9",
    ],
)
def test_s2_without_the_token_nothing_is_reached(serve: Serve, caplog: pytest.LogCaptureFixture, text: str) -> None:
    server = serve(token=CANARY)
    look_up = packet(Syscall(Code.GET_GLOBAL_FUNC, ("rpc.test.addone",)))
    with RawClient((server.host, server.port), hello(text) + INIT + look_up) as client:
        refused(client)
    eventually(lambda: caplog.records, "the log line")
    assert len(caplog.records) == 1
    assert "wrong key or token" in caplog.records[0].getMessage()
    assert CANARY not in caplog.text
    caplog.clear()
    assert server.sessions == 0


def test_s2_a_huge_token_and_that_of_another_server_are_refused(serve: Serve, caplog: pytest.LogCaptureFixture) -> None:
    server, other = serve(token=CANARY), serve(token=True)
    with RawClient((server.host, server.port)) as client:
        with contextlib.suppress(ConnectionError):
            client.send(hello("client: -token=" + "x" * (1 << 20)))
        assert client.is_closed()
    with pytest.raises(errors.KeyMismatch, match="wrong key or token") as caught:
        rpcnb.connect(server.address, token=other.token)
    assert other.token not in str(caught.value)
    with rpcnb.connect(server.address, token=CANARY) as session:
        assert session.call("rpc.test.addone", 1) == 2
    eventually(lambda: caplog.records, "the line in the log")
    assert len(caplog.records) == 1, "the second is summed up"
    caplog.clear()


# What a client reaches: operation, with no token on loopback, with a token.
REACHABLE: dict[str, tuple[Callable[[Any], Any], bool, bool]] = {
    "registered function": (lambda session: session.call("registered"), True, True),
    "array": (lambda session: session.array([1, 2]).numpy(), True, True),
    "file": (lambda session: (session.upload(b"x", "f"), session.download("f"), session.listdir()), True, True),
    "file outside": (lambda session: session.download("/etc/hostname"), False, False),
    "device attribute": (lambda session: session.cpu().attribute("exist"), True, True),
    "time evaluator": (lambda session: session.time_evaluator("registered", session.cpu()), True, True),
    "ffi shape": (lambda session: session.call("ffi.Shape", 1, 2), True, True),
    "foreign ffi global": (lambda session: session.call("ffi.ModuleLoadFromFile", "x"), False, False),
    "system calls": (lambda session: session.call("os.system", "true"), False, False),
    "builtins": (lambda session: session.call("builtins.eval", "1"), False, False),
    "unregistered constructor": (
        lambda session: rpcnb.connect(
            session.peer,
            session_constructor_args=["rpc.PopenSession", "true"],
            token=session._dialer.key._secret or None,
        ).close(),
        False,
        False,
    ),
}


@pytest.mark.parametrize("name", REACHABLE)
@pytest.mark.parametrize("token", [None, CANARY], ids=["no token", "token"])
def test_s3_what_is_reached_with_and_without_a_token(
    serve: Serve, registry: Registry, name: str, token: str | None
) -> None:
    registry.register("registered", lambda: 1)
    use, without, within = REACHABLE[name]
    with rpcnb.connect(serve(token=token).address, token=token) as session:
        if within if token else without:
            use(session)
        else:
            with pytest.raises((errors.RemoteError, errors.FunctionNotFound)):
                use(session)


@pytest.mark.parametrize("operation", ["load_module", "download_linked_module"])
def test_s3_native_code_needs_a_token_or_the_switch(serve: Serve, operation: str) -> None:
    for options, trusted in (({}, False), ({"allow_native": True}, True), ({"token": CANARY}, True)):
        with rpcnb.connect(serve(**options).address, token=options.get("token")) as session:
            session.upload(b"not a library", "x.o")
            with pytest.raises(errors.RemoteError) as caught:
                getattr(session, operation)("x.o")
            assert (caught.value.remote_type == "AccessDenied") is not trusted
            assert ("needs trust" in str(caught.value)) is not trusted


@pytest.mark.parametrize("native", [False, True])
def test_s8_nothing_leaves_the_jail_by_any_file_function(serve: Serve, native: bool, tmp_path: Path) -> None:
    secret = tmp_path / "secret.so"
    secret.write_bytes(b"secret")
    with rpcnb.connect(serve(allow_native=native).address) as session:
        for name in (str(secret), f"../{tmp_path.name}/secret.so", "../../../../etc/passwd", "a/../../b"):
            for function in ("workpath", "download", "remove", "listdir", "load_module", "download_linked_module"):
                with pytest.raises(errors.RemoteError):
                    session.call(f"tvm.rpc.server.{function}", name)
            with pytest.raises(errors.RemoteError):
                session.call("tvm.rpc.server.upload", name, b"overwritten")
    assert secret.read_bytes() == b"secret"


def guess(server: Any) -> socket.socket:
    sock = socket.create_connection(("127.0.0.1", server.port))
    sock.sendall(hello("client: -token=wrong"))
    return sock


def is_told(sock: socket.socket) -> bool:
    try:
        return sock.recv(4, socket.MSG_PEEK | socket.MSG_DONTWAIT) == refusal()
    except BlockingIOError:
        return False


@pytest.mark.parametrize("step", [0.01, 100.0])
def test_s13_wrong_tokens_are_told_later_and_the_right_one_enters(
    serve: Serve, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, step: float
) -> None:
    monkeypatch.setattr(access, "_STEP", step)
    monkeypatch.setattr(access, "_LONGEST", 10 * step)
    server = serve(token=CANARY, limits=Limits(exempt_loopback=False, auth_failures=5))
    for _ in range(5):
        with pytest.raises(errors.KeyMismatch):
            rpcnb.connect(server.address, token="wrong")
    guessing = [guess(server) for _ in range(10)]
    eventually(lambda: all(map(is_told, guessing[:2])), "the first of too many that wait")
    with rpcnb.connect(server.address, token=CANARY) as session:
        assert session.call("rpc.test.addone", 1) == 2
    assert step < 1 or not any(map(is_told, guessing[2:]))
    guessing.pop().close()
    if step < 1:
        eventually(lambda: all(map(is_told, guessing)), "the others")
        eventually(lambda: not server._late and not server._half_open, "nothing that is left of them")
    for sock in guessing:
        sock.close()
    eventually(lambda: caplog.records, "the line in the log")
    assert len(caplog.records) == 1, "further ones are summed up"
    caplog.clear()


def test_s13_failed_tokens_of_this_machine_are_not_counted(serve: Serve, caplog: pytest.LogCaptureFixture) -> None:
    server = serve(token=CANARY, limits=Limits(auth_failures=3))
    for _ in range(6):
        with pytest.raises(errors.KeyMismatch):
            rpcnb.connect(server.address, token="wrong")
    with rpcnb.connect(server.address, token=CANARY):
        pass
    eventually(lambda: caplog.records, "the line in the log")
    assert len(caplog.records) == 1, "further ones are summed up"
    caplog.clear()


def test_s13_the_token_is_in_no_log_repr_or_error(
    serve: Serve, registry: Registry, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    registry.register("fail", lambda: 1 / 0)
    server = serve(token=CANARY, silent=False, key="board")
    seen = [repr(server), str(server), repr(server.gate)]

    def note(session: Any) -> None:
        seen.extend([repr(session), repr(session.cpu()), repr(session.fn), repr(session._ops.key.key)])
        try:
            session.call("fail")
        except errors.RemoteError as error:
            seen.append(str(error))

    with rpcnb.connect(server.address, key="board", token=CANARY, enable_logging=True) as session:
        note(session)
    for wrong in ({"key": "other", "token": CANARY}, {"key": "board", "token": CANARY + "x"}, {"token": CANARY[1:]}):
        with pytest.raises(errors.KeyMismatch) as caught:
            rpcnb.connect(server.address, **wrong)
        seen.append(repr(caught.value))
    with RawClient((server.host, server.port), hello(f"client:board -token={CANARY}") + bytes(3)) as client:
        client.greeted()
        client.send(struct.pack("<Q", 2**63) + bytes(100))
    with FakeServer(lambda conn: read_hello(conn)) as fake, pytest.raises(errors.ConnectFailed) as failed:
        rpcnb.connect(fake.address, token=CANARY)
    seen.append(repr(failed.value))
    eventually(lambda: server.sessions == 0, "no session left")
    server.close()
    assert caplog.records
    assert CANARY[1:] not in caplog.text
    assert not [text for text in seen if CANARY[1:] in text]
    caplog.clear()


def test_s14_run_files_are_the_owners_only(serve: Serve, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("RPCNB_RUNTIME_DIR", str(tmp_path / "run"))
    server = serve(token=CANARY)
    before = os.umask(0)
    try:
        path = publish(server.port, {"host": "127.0.0.1", "port": server.port, "pid": os.getpid(), "token": CANARY})
    finally:
        os.umask(before)
    assert path is not None
    assert path.stat().st_mode & 0o777 == 0o600
    assert runtime_directory().stat().st_mode & 0o777 == 0o700
    with rpcnb.connect(server.address) as session:  # finds the token by itself
        assert session.call("rpc.test.addone", 1) == 2
    path.chmod(0o644)
    assert find_token("127.0.0.1", server.port) is None
    path.chmod(0o600)
    runtime_directory().chmod(0o755)
    assert list_servers() == []
    assert publish(server.port, {}) is None


# -- hostile servers against our client -----------------------------------------------------------------------------


def hostile(answer: Callable[[bytes], bytes]) -> FakeServer:
    """A server that answers every request after init with ``answer(body)``."""

    def script(conn: socket.socket) -> None:
        read_hello(conn)
        conn.sendall(SERVER_HELLO)
        read_packet(conn)
        conn.sendall(VOID)
        while True:
            conn.sendall(answer(read_packet(conn)))

    return FakeServer(script)


META = TensorMeta(0xDEAD, CPU, (1 << 40,), DType(2, 32))
ANSWERS = {
    "none": packet(Return()),
    "text": packet(Return(("surprise",))),
    "float": packet(Return((1.5,))),
    "three values": packet(Return((1, 2, 3))),
    "huge handle": packet(Return((Pointer(2**64 - 1),))),
    "tensor": packet(Return((70, META, Pointer(5)))),
    "huge shape": packet(Return((70, META._replace(shape=(1 << 62, 1 << 62)), Pointer(5)))),
    "negative shape": packet(Return((70, META._replace(shape=(-1, 5)), Pointer(5)))),
    "int result": packet(Return((1, 1 << 40))),
    "negative int result": packet(Return((1, -5))),
    "float result": packet(Return((3, 1.5))),
    "text result": packet(Return((8, "surprise"))),
    "deep text result": packet(Return((8, "[" * 100_000))),
    "deep text": packet(Return(("[" * 100_000,))),
    "bytes result": packet(Return((9, b"123"))),
    "device result": packet(Return((6, CPU))),
    "pointer result": packet(Return((4, Pointer(2**64 - 1)))),
    "function": packet(Return((68, Pointer(9)))),
    "module": packet(Return((73, Pointer(9)))),
    "object": packet(Return((74, Pointer(9)))),
    "unknown kind": packet(Return((1234, Pointer(9)))),
    "copy ack": packet(CopyAck(b"abc")),
    "exception": packet(Raised("boom", "os.system", "trace")),
    "unknown code": struct.pack("<Qi", 4, 77),
    "request": packet(CallFunc(1)),
    "nargs": struct.pack("<Qii", 8, Code.RETURN, 2**31 - 1),
    "negative nargs": struct.pack("<Qii", 8, Code.RETURN, -1),
    "long text": struct.pack("<QiiiQ", 20, Code.RETURN, 1, 8, 1 << 62),
    "garbage": os.urandom(64),
    "huge packet": struct.pack("<Qi", 1 << 60, Code.RETURN) + bytes(100),
    "nested object form": struct.pack("<QiiIIIQ", 28, Code.RETURN, 1, 65, 66, 65, 3) + b"abc",
}
USES: dict[str, Callable[[Any], Any]] = {
    "get_function": lambda session: session.get_function("f", timeout=1),
    "call": lambda session: session._run(lambda ops: ops.call(ops.function_type(ops, 5, "f"), (1,)), 1, "f"),
    "empty": lambda session: session.empty((4,), timeout=1),
    "attribute": lambda session: session.cpu().attribute("max_thread_dimensions", timeout=1),
    "sync": lambda session: session.cpu().sync(timeout=1),
    "download": lambda session: session.download("x", timeout=1),
    "listdir": lambda session: session.listdir(timeout=1),
    "load_module": lambda session: session.load_module("x", timeout=1),
    "list_functions": lambda session: session.list_functions(timeout=1),
    "array": lambda session: session.array([1.0, 2.0], timeout=1),
    "upload": lambda session: session.upload(b"x", "x", timeout=1),
    "timing": lambda session: session.time_evaluator("f", session.cpu(), timeout=1)(timeout=1),
}


@pytest.mark.parametrize("name", ANSWERS)
def test_s10_a_hostile_servers_answers_are_typed_errors(name: str) -> None:
    before = psutil.Process().memory_info().rss
    with hostile(lambda body: ANSWERS[name]) as fake:
        for use, operation in USES.items():
            with rpcnb.connect(fake.address) as session:
                start = time.monotonic()
                try:
                    result = operation(session)
                except errors.RpcError:
                    pass
                except Exception as error:
                    raise AssertionError(f"{use} raised {error!r}") from error
                else:
                    repr(result)
                    del result
                assert time.monotonic() - start < 5
    assert psutil.Process().memory_info().rss - before < 64 << 20


def test_s10_a_tensor_of_a_hostile_server_is_not_allocated_blindly() -> None:
    answers = {Code.CALL_FUNC: packet(Return((70, META, Pointer(5))))}
    with (
        hostile(lambda body: answers.get(Code(struct.unpack("<i", body[:4])[0]), packet(Return()))) as fake,
        rpcnb.connect(fake.address) as session,
    ):
        function = session._ops.function_type(session._ops, 5, "f")
        tensor = function(1)
        assert tensor.shape == (1 << 40,)
        with pytest.raises((errors.RpcError, MemoryError)):
            tensor.numpy(timeout=1)


def test_s10_handles_of_another_session_are_refused_before_sending(serve: Serve) -> None:
    server = serve()
    with rpcnb.connect(server.address) as one, rpcnb.connect(server.address) as other:
        foreign = [other.array([1]), other.get_function("testing.echo"), other.cpu(), other.call("ffi.Shape", 1)]
        echo = one.get_function("testing.echo")
        for value in foreign:
            with pytest.raises(errors.ArgumentError, match="of another session"):
                echo(value)
        # Sent all the same, they are nothing there.
        handle = foreign[1].handle
        forged = type(echo)(one._ops, handle, "forged")
        with pytest.raises(errors.RemoteError):
            forged(1)
        for reference in (ModuleRef(handle), ObjectRef(handle)):
            with pytest.raises(errors.RemoteError):
                one._run(lambda _, reference=reference: flows.call_function(echo.handle, (reference,)), 5, "echo")
        assert echo(5) == 5
        forged.handle = 0


def test_s10_text_that_looks_like_a_time_limit_from_a_function_is_a_remote_error(
    serve: Serve, registry: Registry
) -> None:
    def fail() -> None:
        raise RuntimeError("RPCSessionTimeoutError is what I say")

    registry.register("fail", fail)
    with rpcnb.connect(serve().address) as session:
        with pytest.raises(errors.RemoteError):
            session.fn.fail()
        assert session.call("rpc.test.addone", 1) == 2
