"""Every exception of rpcnb.

Each has the builtin base a caller would catch anyway. Facts are attributes; the text is made from them::

    RpcError
    ├── ConnectFailed (ConnectionError)      no session came about: .address, .phase
    │   ├── NotAnRpcServer                   the peer speaks something else
    │   ├── KeyMismatch                      wrong key or token
    │   ├── DuplicateKey                     a proxy already has such a peer waiting
    │   ├── CertificateUnknown               nothing says that its certificate is the right one
    │   │   └── CertificateChanged           it shows another one than it had: .shown, .expected
    │   └── VersionMismatch                  another protocol version
    ├── HostsUnreadable (ValueError)         the file of this user's servers cannot be used as it is
    ├── ProtocolError (ConnectionError)
    │   ├── LocalProtocolError               our side asked for something illegal
    │   └── RemoteProtocolError              the peer sent something illegal
    ├── SessionLost (ConnectionError)        the connection ended under a session
    │   ├── ForkedSession                    opened before a fork, used in the child
    │   └── SessionCrashed                   its process at the server crashed: .how, .function
    ├── SessionClosed (ConnectionError)      used after close()
    ├── SessionTimeout (TimeoutError)        the server's session time limit is over
    ├── DeadlineExceeded (TimeoutError)      our own ``timeout=`` is over
    ├── RemoteError (RuntimeError)           the remote function raised
    │   └── CellError                        a remote cell raised
    ├── FunctionNotFound (AttributeError)    no such remote or registered function
    ├── ArgumentError (TypeError)            a value cannot travel as an argument
    ├── ResultError (TypeError)              a result cannot be encoded
    ├── InvalidHandle (LookupError)          never issued, of another session, or of the wrong kind
    │   └── StaleHandle                      freed before
    ├── CopyMismatch (ValueError)            sizes of a copy differ, or it leaves its memory
    ├── LimitExceeded (ValueError)           more than a limit allows
    ├── AccessDenied (PermissionError)       no trust was given for this
    ├── DeviceError (RuntimeError)           no such device, scope or attribute
    ├── LibraryError (RuntimeError)          a compiled library cannot be loaded
    ├── IsolationFailed (RuntimeError)       sessions cannot have processes of their own
    ├── WrongLoop (RuntimeError)             an awaited session is used in another event loop
    └── DeadlockError (RuntimeError)         a wait that only the waiting thread could end
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from typing import Any

    from typing_extensions import Self

__all__ = [
    "AccessDenied",
    "ArgumentError",
    "CellError",
    "CertificateChanged",
    "CertificateUnknown",
    "ConnectFailed",
    "CopyMismatch",
    "DeadlineExceeded",
    "DeadlockError",
    "DeviceError",
    "DuplicateKey",
    "ForkedSession",
    "FunctionNotFound",
    "HostsUnreadable",
    "InvalidHandle",
    "IsolationFailed",
    "KeyMismatch",
    "LibraryError",
    "LimitExceeded",
    "LocalProtocolError",
    "NotAnRpcServer",
    "ProtocolError",
    "RemoteError",
    "RemoteProtocolError",
    "ResultError",
    "RpcError",
    "SessionClosed",
    "SessionCrashed",
    "SessionLost",
    "SessionTimeout",
    "StaleHandle",
    "VersionMismatch",
    "WrongLoop",
]

TRAVELLERS = (
    "None, bool, int, float, str, bytes, a dtype, a device, a numpy array, "
    "or a tensor, function, module or object of the same session"
)


class RpcError(Exception):
    """Anything rpcnb raises on purpose; it can be pickled and copied, with its facts."""

    def __reduce__(self) -> tuple[Any, ...]:
        # Not the base's: that would call the class with the text, where its own constructor takes the facts.
        return _made_again, (type(self), self.args, self.__dict__)

    def again(self) -> Self:
        """Return a fresh exception like this one.

        What is kept and raised more than once (why a session was lost) is raised anew each time: an exception that is
        raised again and again gathers the frames of all its raisers, and keeps their variables.
        """
        return copy.copy(self)


def _made_again(kind: type[RpcError], args: tuple[Any, ...], facts: dict[str, Any]) -> RpcError:
    made = kind.__new__(kind)
    made.args = args
    made.__dict__.update(facts)
    return made


class HostsUnreadable(RpcError, ValueError):
    """The file with this user's servers, ``hosts.toml``, cannot be used as it is."""


class ConnectFailed(RpcError, ConnectionError):
    """No session came about.

    Attributes:
        address: What was dialled, ``host:port`` or a URL.
        phase: ``resolve``, ``connect``, ``handshake`` or ``init``.
        seen: What was seen.
    """

    def __init__(self, address: str, phase: str, seen: str) -> None:
        self.address = address
        self.phase = phase
        self.seen = seen
        super().__init__(f"cannot connect to {address}: {seen} (during {phase})")


class NotAnRpcServer(ConnectFailed):
    """The peer answered with something that is not the RPC protocol."""


class KeyMismatch(ConnectFailed):
    """The server refused the key or the token; it does not say which."""


class DuplicateKey(ConnectFailed):
    """A proxy already has a peer of this role and key waiting."""


class CertificateUnknown(ConnectFailed):
    """Nothing says that a server's certificate is the right one; nothing was sent to it."""

    def __init__(self, address: str, seen: str) -> None:
        super().__init__(address, "connect", f"its certificate is not trusted: {seen}")


class CertificateChanged(CertificateUnknown):
    """A server shows another certificate than it had: somebody may be in between.

    Attributes:
        shown: Its fingerprint.
        expected: That of the one it had.
    """

    def __init__(self, address: str, shown: str, expected: str, *, kept: bool) -> None:
        self.shown = shown
        self.expected = expected
        whence = "kept since the first visit (known_hosts)" if kept else "in the address"
        super().__init__(
            address,
            f"it has the fingerprint sha256={shown}, expected sha256={expected}, {whence}; if its owner has renewed "
            "it, connect once with the address that the server prints now; else somebody is in between",
        )


class VersionMismatch(ConnectFailed):
    """The server speaks another version of the protocol."""


class ProtocolError(RpcError, ConnectionError):
    """The rules of the wire were broken."""


class LocalProtocolError(ProtocolError):
    """Our side asked the endpoint for something illegal; nothing was sent."""


class RemoteProtocolError(ProtocolError):
    """The peer sent something illegal; the connection ends."""


class SessionLost(RpcError, ConnectionError):
    """The connection ended under a session; what was pending will not be answered."""


class ForkedSession(SessionLost):
    """Something of a session that was opened before a fork is used in the child; the connection stays the parent's."""


class SessionCrashed(SessionLost):
    """The process of a session, or of a job, at the server has ended: by a crash, or as it used more than it may.

    Other sessions of that server go on, and it takes new ones: ``session.reconnect()`` opens one.

    Attributes:
        how: ``signal:SIGSEGV``, ``exit:3``, ``memory`` or ``cpu``.
        signal: Name of the signal that ended it; empty if none did.
        function: The call that was in progress, the oldest if there were several; empty if none was.
    """

    def __init__(self, peer: str, how: str, function: str = "", job: str = "") -> None:
        kind, _, fact = how.partition(":")
        self.how = how
        self.signal = fact if kind == "signal" else ""
        self.function = function
        words = {
            "signal": f"its process there was ended by {fact}",
            "exit": f"its process there has exited with code {fact}",
            "closed": "its process there has exited with code 0, without a result",
            "memory": "its process there used more memory than the server gives a session (--memory)",
            "cpu": "its process there used more processor time than the server gives a session (--cpu-time)",
        }
        hint = ", perhaps as memory was short" if fact == "SIGKILL" else ""
        during = f" during {function!r}" if function else ""
        why = f"{words.get(kind, f'its process there has ended ({how})')}{hint}{during}"
        if job:
            super().__init__(f"the job {job!r} at {peer} has crashed: {why}; its output is kept")
        else:
            super().__init__(f"session lost: {peer}: {why}; the server goes on: reconnect() opens a fresh session")


class SessionClosed(RpcError, ConnectionError):
    """The session was closed by its user before this operation."""


class IsolationFailed(RpcError, RuntimeError):
    """Sessions cannot have processes of their own here, or the operator's modules cannot be imported there."""


class SessionTimeout(RpcError, TimeoutError):
    """The session's time limit at the server is over (``session_timeout``)."""


class DeadlineExceeded(RpcError, TimeoutError):
    """An operation did not end within its ``timeout``.

    Attributes:
        operation: What was being done.
        elapsed: Seconds it had taken.
    """

    def __init__(self, operation: str, elapsed: float, timeout: float) -> None:
        self.operation = operation
        self.elapsed = elapsed
        super().__init__(f"{operation} took {elapsed:.3g} s; its timeout is {timeout:g} s")

    def explain(self, why: str) -> None:
        """Add what it may have waited for."""
        if why:
            self.args = (f"{self.args[0]}; {why}",)


class RemoteError(RpcError, RuntimeError):
    """A remote function, or the server on behalf of a request, raised.

    Attributes:
        message: The remote text, unchanged.
        remote_type: Name of the remote exception class; empty if the peer does not tell (stock TVM).
        remote_traceback: Remote traceback text; empty if the peer does not tell.
    """

    def __init__(self, message: str, remote_type: str = "", remote_traceback: str = "") -> None:
        self.message = message
        self.remote_type = remote_type
        self.remote_traceback = remote_traceback
        text = f"{remote_type}: {message}" if remote_type else message
        if remote_traceback:
            text = f"{text}\n\nremote traceback:\n{remote_traceback.rstrip()}"
        super().__init__(text)


class CellError(RemoteError):
    """A remote cell raised; a notebook shows the remote traceback, with the cell's own lines."""

    def __str__(self) -> str:
        return f"{self.remote_type}: {self.message}" if self.message else self.remote_type

    def _render_traceback_(self) -> list[str]:
        """Return what IPython shows instead of where the error came out here."""
        return self.remote_traceback.splitlines() or [str(self)]


class FunctionNotFound(RpcError, AttributeError):
    """No function of this name; ``AttributeError`` is what TVM's users catch."""


class ArgumentError(RpcError, TypeError):
    """A value cannot travel as an argument; nothing was sent.

    Attributes:
        index: Its position, from 0.
        seen: What it is.
        expected: What could travel.
    """

    def __init__(self, index: int, seen: str, expected: str = TRAVELLERS) -> None:
        self.index = index
        self.seen = seen
        self.expected = expected
        super().__init__(f"argument {index} is {seen}; expected {expected}")


class ResultError(RpcError, TypeError):
    """A function's result cannot be encoded."""


class InvalidHandle(RpcError, LookupError):
    """A handle that was never issued in this session, or is of another kind."""


class StaleHandle(InvalidHandle):
    """A handle that was valid once and has been freed, or whose session is lost."""


class CopyMismatch(RpcError, ValueError):
    """The two sides of a copy differ in size, or it would leave its memory."""


class LimitExceeded(RpcError, ValueError):
    """Something is larger than a limit allows; the text names the limit."""


class AccessDenied(RpcError, PermissionError):
    """The server gives no trust for this; the text names the switch that would."""


class DeviceError(RpcError, RuntimeError):
    """No such device, or it cannot do what was asked."""


class LibraryError(RpcError, RuntimeError):
    """A compiled library cannot be loaded or linked."""


class WrongLoop(RpcError, RuntimeError):
    """An awaited session belongs to the event loop in which it was opened."""


class DeadlockError(RpcError, RuntimeError):
    """A blocking wait on the very thread whose loop would have to end it."""
