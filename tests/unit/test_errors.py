"""Every exception: its bases, its facts, its text."""

from __future__ import annotations

import copy
import inspect
import pickle
import traceback
from collections.abc import Callable
from typing import Any

import pytest

from rpcnb import errors

BASES: dict[str, tuple[type, ...]] = {
    "AccessDenied": (errors.RpcError, PermissionError),
    "ArgumentError": (errors.RpcError, TypeError),
    "CellError": (errors.RemoteError,),
    "ConnectFailed": (errors.RpcError, ConnectionError),
    "CopyMismatch": (errors.RpcError, ValueError),
    "DeadlineExceeded": (errors.RpcError, TimeoutError),
    "DeadlockError": (errors.RpcError, RuntimeError),
    "DeviceError": (errors.RpcError, RuntimeError),
    "DuplicateKey": (errors.ConnectFailed,),
    "ForkedSession": (errors.SessionLost,),
    "FunctionNotFound": (errors.RpcError, AttributeError),
    "InvalidHandle": (errors.RpcError, LookupError),
    "IsolationFailed": (errors.RpcError, RuntimeError),
    "CertificateChanged": (errors.CertificateUnknown,),
    "CertificateUnknown": (errors.ConnectFailed,),
    "HostsUnreadable": (errors.RpcError, ValueError),
    "KeyMismatch": (errors.ConnectFailed,),
    "LibraryError": (errors.RpcError, RuntimeError),
    "LimitExceeded": (errors.RpcError, ValueError),
    "LocalProtocolError": (errors.ProtocolError,),
    "NotAnRpcServer": (errors.ConnectFailed,),
    "ProtocolError": (errors.RpcError, ConnectionError),
    "RemoteError": (errors.RpcError, RuntimeError),
    "RemoteProtocolError": (errors.ProtocolError,),
    "ResultError": (errors.RpcError, TypeError),
    "RpcError": (Exception,),
    "SessionClosed": (errors.RpcError, ConnectionError),
    "SessionCrashed": (errors.SessionLost,),
    "SessionLost": (errors.RpcError, ConnectionError),
    "SessionTimeout": (errors.RpcError, TimeoutError),
    "StaleHandle": (errors.InvalidHandle,),
    "VersionMismatch": (errors.ConnectFailed,),
    "WrongLoop": (errors.RpcError, RuntimeError),
}


def test_every_exception_is_listed_and_in_the_tree() -> None:
    classes = {name for name, thing in vars(errors).items() if inspect.isclass(thing)}
    assert classes == set(errors.__all__) == set(BASES)
    assert errors.__doc__ is not None
    assert all(f" {name} " in f"{errors.__doc__} " or f"    {name}\n" in errors.__doc__ for name in errors.__all__)


@pytest.mark.parametrize("name", sorted(BASES))
def test_an_exception_has_the_base_that_a_caller_would_catch(name: str) -> None:
    assert getattr(errors, name).__bases__ == BASES[name]


def test_a_failed_connection_tells_where_and_in_which_phase() -> None:
    error = errors.KeyMismatch("10.0.0.5:9090", "handshake", "the key 'gpu' is not served")
    assert (error.address, error.phase) == ("10.0.0.5:9090", "handshake")
    assert str(error) == "cannot connect to 10.0.0.5:9090: the key 'gpu' is not served (during handshake)"


def test_an_exceeded_deadline_tells_operation_time_and_timeout() -> None:
    error = errors.DeadlineExceeded("call 'conv2d'", 1.23456, 1.0)
    assert (error.operation, error.elapsed) == ("call 'conv2d'", 1.23456)
    assert str(error) == "call 'conv2d' took 1.23 s; its timeout is 1 s"


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("boom",), "boom"),
        (("boom", "ValueError"), "ValueError: boom"),
        (("boom", "ValueError", 'File "a.py"\n\n'), 'ValueError: boom\n\nremote traceback:\nFile "a.py"'),
        (("boom", "", "File"), "boom\n\nremote traceback:\nFile"),
    ],
)
def test_a_remote_error_says_what_the_peer_told(arguments: tuple[str, ...], text: str) -> None:
    error = errors.RemoteError(*arguments)
    assert (error.message, error.remote_type, error.remote_traceback) == (*arguments, "", "")[:3]
    assert str(error) == text


def test_an_argument_error_tells_the_position_and_what_can_travel() -> None:
    error = errors.ArgumentError(2, "of type list")
    assert error.index == 2
    assert str(error) == f"argument 2 is of type list; expected {errors.TRAVELLERS}"
    assert str(errors.ArgumentError(0, "the int 7", "text")) == "argument 0 is the int 7; expected text"


MADE = {
    "CertificateUnknown": errors.CertificateUnknown("rpcs://host:9090", "self-signed"),
    "CertificateChanged": errors.CertificateChanged("rpcs://host:9090", "seen", "before", kept=True),
    "SessionCrashed": errors.SessionCrashed("board:9090", "signal:SIGSEGV", "kernel"),
    "ArgumentError": errors.ArgumentError(3, "a list"),
    "CellError": errors.CellError("bad", "ValueError", "cell #1, line 2"),
    "DeadlineExceeded": errors.DeadlineExceeded("call", 1.5, 1.0),
    "RemoteError": errors.RemoteError("bad", "ValueError", "line 2"),
    **{
        name: getattr(errors, name)("10.0.0.5:9090", "connect", "no answer")
        for name in ("ConnectFailed", "DuplicateKey", "KeyMismatch", "NotAnRpcServer", "VersionMismatch")
    },
}


@pytest.mark.parametrize("name", sorted(BASES))
@pytest.mark.parametrize(
    "way", [copy.copy, copy.deepcopy, lambda e: pickle.loads(pickle.dumps(e))], ids=["c", "d", "p"]
)
def test_an_exception_keeps_its_facts_when_it_is_copied_or_pickled(name: str, way: Callable[[Any], Any]) -> None:
    error = MADE.get(name) or getattr(errors, name)("what was seen")
    error.__dict__["__notes__"] = ["on board 3"]
    made = way(error)
    assert type(made) is type(error)
    assert (str(made), made.args, made.__dict__) == (str(error), error.args, error.__dict__)


def test_what_is_raised_again_is_fresh_each_time() -> None:
    kept = errors.SessionLost("session lost: gone")
    sizes = []
    for _ in range(5):
        with pytest.raises(errors.SessionLost, match="gone") as caught:
            raise kept.again()
        sizes.append(len(traceback.extract_tb(caught.value.__traceback__)))
    assert kept.__traceback__ is None
    assert len(set(sizes)) == 1
