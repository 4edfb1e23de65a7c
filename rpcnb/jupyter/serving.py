"""The server in the kernel: what ``%rpc_serve`` starts.

It has a thread and a loop of its own, so it answers while cells run. One kernel has one such server; starting it again
with the same words is harmless, with other words it is replaced. It ends with the kernel, and leaves nothing behind.
"""

from __future__ import annotations

import atexit
import importlib.util
import inspect
import os
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from rpcnb.server.server import Server
from rpcnb.transport.address import is_loopback, outside_address, show_address
from rpcnb.transport.runfiles import publish

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["KernelServer", "hub_names", "kernel_server", "paste_lines", "serve", "share_lines", "stop_serving"]


class KernelServer(Server):
    """A server whose address and token this user's own clients find by themselves."""

    _file: Path | None = None

    def publish(self) -> None:
        """Write the run file, until the server is closed."""
        self._file = publish(self.port, {**self.whereabouts, "token": self.token, "kind": "kernel"})
        atexit.register(self.close)

    def forked(self) -> None:
        """In a forked child: the run file is the parent's too."""
        self._file = None
        super().forked()

    def close(self) -> None:
        """End it, and take its run file away. Idempotent."""
        atexit.unregister(self.close)
        if self._file is not None:
            self._file.unlink(missing_ok=True)
            self._file = None
        super().close()


_running: tuple[KernelServer, dict[str, Any]] | None = None


def kernel_server() -> KernelServer | None:
    """Return this kernel's server, if it runs."""
    return _running[0] if _running is not None and not _running[0].closed else None


def serve(
    port: int = 0, key: str = "", host: str = "127.0.0.1", *, share: bool = False, **options: Any
) -> KernelServer:
    """Serve this kernel's functions: ``%rpc_serve``.

    Functions registered with ``@rpcnb.register_func``, before or after, may be called; registering one again replaces
    it. Called again with the same arguments it returns the server that runs; with others it replaces it.

    Args:
        port: Port to listen on; 0 for any free one.
        key: Key that clients must name.
        host: Address to listen on.
        share: Be reachable through this notebook's hub: listen for WebSockets, for the hub's host name.
        options: Further ones of :class:`rpcnb.Server`. A token is made unless ``token=False``.

    Raises:
        OSError: The port is taken.
        AccessDenied: Beyond loopback without a token and without ``insecure``.
    """
    global _running
    options.setdefault("token", True)
    known = inspect.signature(Server).parameters
    said = {name: value for name, value in options.items() if value not in (known[name].default, [], ())}
    wanted = {"port": port, "key": key, "host": host, **said}
    found = kernel_server()
    plain = share and not (port or key or host != "127.0.0.1" or set(said) - {"token", "allow_origin"})
    if found is None or _running is None or not (_running[1] == wanted or plain):  # sharing needs no other server
        stop_serving()
        found = KernelServer(host, port, port + 1, key=key, silent=True, **options)
        found.publish()
        _running = found, wanted
    if share:
        found.open_web_port(allow_origin=[*options.get("allow_origin", ()), *hub_names()])
    return found


def hub_names() -> list[str]:
    """Return the host names under which a hub's users reach this notebook, as far as it was told."""
    named = os.environ.get("JUPYTERHUB_PUBLIC_URL") or os.environ.get("JUPYTERHUB_PUBLIC_HUB_URL") or ""
    host = urlsplit(named).hostname
    return [host] if host else []


def share_lines(server: Server) -> list[str]:
    """Return what a colleague pastes, and what is missing for it; the token goes by another way."""
    port = server.web_port
    key = f" --key {server.key}" if server.key else ""
    prefix = os.environ.get("JUPYTERHUB_SERVICE_PREFIX")
    asks = "" if server.token is None else "  (asks for the token; tell it by another way)"
    if prefix is None:
        if not is_loopback(server.host):
            address = show_address(server.custom_addr or outside_address(server.host), server.port)
            return [f"  a colleague:                %rpc_connect {address}{key}{asks}"]
        return [
            "  a colleague cannot reach it: it listens on this machine only, and no hub is in front of it;",
            "  %rpc_serve --host 0.0.0.0 lets your network in, by token",
        ]
    names = hub_names()
    host = names[0] if names else "THE-HUB"
    lines = [f"  a colleague:                %rpc_connect wss://{host}{prefix}proxy/{port}/ws{key}{asks}"]
    if not names:
        lines.append("  THE-HUB is the host name in your browser's address line (JUPYTERHUB_PUBLIC_URL is not set);")
        lines.append("  add it: %rpc_serve --share --allow-origin THE-HUB")
    if importlib.util.find_spec("jupyter_server_proxy") is None:
        lines.append("  missing: pip install jupyter-server-proxy where Jupyter runs, and start it again")
    lines.append('  and a token of the hub with access to your server: headers={"Authorization": "token ..."}')
    return lines


def stop_serving() -> bool:
    """End this kernel's server; returns False if none ran."""
    global _running
    found = kernel_server()
    _running = None
    if found is not None:
        found.close()
    return found is not None


def paste_lines(server: Server) -> list[str]:
    """Return what to tell of a server: where it is, and what a client says; never its token."""
    host = server.custom_addr or outside_address(server.host)
    address = show_address(host, server.port)
    key = f" --key {server.key}" if server.key else ""
    lines = [f"this kernel serves on {address}{f', key {server.key}' if server.key else ''}"]
    lines.append(f"  another notebook of yours:  %rpc_connect {address}{key}")
    if server.web_port is not None:
        lines.append(f"  WebSocket:                  ws://{show_address(host, server.web_port)}/ws")
    if server.token is None:
        lines.append("  no token: whoever can reach this port may call its functions")
    else:
        lines.append("  others need its token:      server = %rpc_serve ... (the same words), then server.token")
    return lines
