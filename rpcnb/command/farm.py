"""``rpcnb tracker``, ``rpcnb proxy`` and ``rpcnb devices``: a farm of boards."""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rpcnb.command.until import until_signal
from rpcnb.transport.address import Address, parse_pair, show_address
from rpcnb.transport.runfiles import write_atomically
from rpcnb.transport.terminal import printable

if TYPE_CHECKING:
    import argparse

    from rpcnb.command.until import Stop
    from rpcnb.transport.listen import Service

__all__ = ["devices", "proxy", "tracker"]

_REFRESH = 1.0  # seconds


def tracker(options: argparse.Namespace) -> int:
    """Run a tracker until SIGINT or SIGTERM, or until somebody with its stop key ends it."""
    from rpcnb.farm.tracker import Tracker

    with (
        until_signal() as stop,
        Tracker(options.host, options.port, options.port_end, True, insecure=options.insecure) as service,
    ):
        where = show_address(service.host, service.port)
        _announce(
            options,
            service,
            [
                f"rpcnb tracker on {where}",
                f"  boards:    rpcnb serve --tracker {where} --key KEY",
                f"  devices:   rpcnb devices {where}",
                f"  notebook:  %rpc_connect tracker://{where}/KEY",
                f"  stock TVM: rpc.connect_tracker({service.host!r}, {service.port}).request(KEY)",
            ],
        )
        threading.Thread(target=_end_with, args=(service, stop), daemon=True).start()
        stop.wait()
    return 0


def _end_with(service: Service, stop: Stop) -> None:
    """End the program when a peer has ended the tracker."""
    service.ended.wait()
    stop.set()


def proxy(options: argparse.Namespace) -> int:
    """Run a proxy until SIGINT or SIGTERM."""
    from rpcnb.farm.proxy import Proxy

    with (
        until_signal() as stop,
        Proxy(
            options.host,
            options.port,
            options.port_end,
            options.web_port,
            options.client_timeout,
            options.server_timeout,
            parse_pair(options.tracker, 9190) if options.tracker else None,
            options.index_page,
            [_resource(text) for text in options.resource],
            silent=True,
            allow_origin=options.allow_origin,
            insecure=options.insecure,
        ) as service,
    ):
        where = show_address(service.host, service.port)
        lines = [
            f"rpcnb proxy on {where}",
            f"  boards:    rpcnb serve --proxy {where} --key KEY",
            f"  notebook:  %rpc_connect {where} --key KEY",
        ]
        if service.web_port is not None:
            web = show_address(service.host, service.web_port)
            lines.append(f"  WebSocket: ws://{web}/ws")
        _announce(options, service, lines, web_port=service.web_port)
        stop.wait()
    return 0


def _resource(text: str) -> tuple[str, str]:
    folder, separator, file = text.partition(":")
    if not separator or not Path(file).is_file():
        raise ValueError(f"--resource {text!r} is not FOLDER:FILE with a file that exists")
    return folder, file


def _announce(options: argparse.Namespace, service: Service, lines: list[str], **more: Any) -> None:
    if options.ready_file:
        content = {"host": service.host, "port": service.port, "pid": os.getpid(), **more}
        write_atomically(Path(options.ready_file), content)
    if not options.silent:
        sys.stdout.write(printable("\n".join(lines)) + "\n")
        sys.stdout.flush()


def devices(options: argparse.Namespace) -> int:
    """List the boards of a tracker, once or until Ctrl-C."""
    from rpcnb.farm.devices import show_as_stock, show_devices
    from rpcnb.farm.trackersession import TrackerSession, tracker_of_environment

    host, port = tracker_of_environment() if options.address is None else parse_pair(options.address, 9190)
    session = TrackerSession(Address(host, port, "", "tracker"))
    while True:
        summary = session.summary(timeout=options.timeout)
        if options.stock:
            text = show_as_stock(show_address(host, port), summary)
        else:
            text = json.dumps(summary) + "\n" if options.json else show_devices(summary)
        text = printable(text)
        if options.watch and not options.json and sys.stdout.isatty():
            text = f"\x1b[H\x1b[2J{text}"  # a fresh screen
        encoding = sys.stdout.encoding or "utf-8"  # a key with letters that a terminal does not have hides no others
        sys.stdout.write(text.encode(encoding, "backslashreplace").decode(encoding))
        sys.stdout.flush()
        if not options.watch:
            return 0
        time.sleep(_REFRESH)
