"""All cases of ``python -m benchmarks``: which figure each shows, what it is compared with, and its bar.

A figure's name is that of its section, a slash, and the name that the section's module gave it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

__all__ = ["CASES", "Bar", "Case"]


@dataclass(frozen=True)
class Bar:
    """What a case should reach.

    Attributes:
        limit: The bound.
        of: The figure that the case's is divided by; none: the bound is on the figure itself.
        least: The bound is a lower one.
    """

    limit: float
    of: str = ""
    least: bool = False


@dataclass(frozen=True)
class Case:
    """One row of the table.

    Attributes:
        section: Who measures it.
        label: What it is, for people.
        figure: Name of its figure within the section.
        unit: How the figure is shown.
        stock: Figure of stock's pair to which the ratio is shown.
        raw: The same of the raw socket.
        bars: What it should reach.
        watched: Steady enough on any machine for the check against disasters.
    """

    section: str
    label: str
    figure: str
    unit: str = "us"
    stock: str = ""
    raw: str = ""
    bars: tuple[Bar, ...] = ()
    watched: bool = False


def _calls() -> Iterator[Case]:
    same, cross = "calls same", "calls cross"
    null = ("null stock", "null raw")
    yield Case(same, "null call", "null ours", "us", *null, (Bar(1.2, "null stock"),), watched=True)
    bars = (Bar(0.4, "null stock"), Bar(0.5, "null raw"))
    yield Case(cross, "null call", "null ours", "us", *null, bars)
    for section in (same, cross):
        bars = (Bar(1.4, "small stock"),) if section == same else ()
        small = ("small stock", "small raw")
        yield Case(section, "int, float, 32 characters", "small ours", "us", *small, bars, watched=section == same)
        at_same = section == same
        yield Case(section, "awaited", "null awaited", "us", *null, (Bar(2, "null raw"),) * at_same, at_same)
        yield Case(section, "awaited, uvloop", "null uvloop", "us", *null, (Bar(1.5, "null raw"),) * at_same)
        yield Case(section, "get_function", "lookup ours", "us", "lookup stock", "")
        bars = (Bar(2, "pause stock"),)
        yield Case(section, "first call after 50 ms", "pause ours", "us", "pause stock", "", bars)
    for bar, figure, name in (
        (1.1, "ours->stock", "our client, stock's server"),
        (1.3, "stock->ours", "stock's, ours"),
    ):
        bars = (Bar(bar, "null stock"),)
        yield Case(same, f"null call, {name}", f"null {figure}", "us", *null, bars, watched=True)
    yield Case(same, "connect and first call", "connect ours", "us", "connect stock", "")
    bars = (Bar(0.2, "connect stock"),)
    name = "connect and first call, stock's, ours"
    yield Case(same, name, "connect stock->ours", "us", "connect stock", "", bars)


_SIZES = (("64 KiB", 64 << 10, 0.6), ("1 MiB", 1 << 20, 0.8), ("64 MiB", 64 << 20, 0.95), ("256 MiB", 256 << 20, 0.95))


def _copies() -> Iterator[Case]:
    for section in ("copies same", "copies cross"):
        for name, size, bound in _SIZES:
            for way in ("up", "down"):
                stock, raw = f"{way} {size} stock", f"{way} {size} raw"
                bars = (Bar(bound, raw, least=True), *((Bar(40, stock, least=True),) * (size >= 64 << 20)))
                watched = section == "copies same" and size == 1 << 20
                yield Case(section, f"copy {way} {name}", f"{way} {size} ours", "GB/s", stock, raw, bars, watched)
    for way in ("up", "down"):
        stock = f"{way} {1 << 20} stock"
        name, figure = f"copy {way} 1 MiB, stock's, ours", f"{way} {1 << 20} stock->ours"
        yield Case("copies same", name, figure, "GB/s", stock, "", (Bar(1.3, stock, least=True),), watched=True)
    for end in ("client", "server"):
        bars = (Bar(1 << 20),)
        yield Case("memory", f"extra memory of a 256 MiB copy, {end}", f"memory {end}", "MiB", bars=bars)


def _windows() -> Iterator[Case]:
    bounds = {("ours", "pipeline", 100): 4.0, ("ours", "map", 100): 10.0}
    for name, way, label in (
        ("ours", "pipeline", "submitted"),
        ("ours", "map", "mapped"),
        ("ours", "overlap", "submitted, async def"),
        ("awaited", "gathered", "awaited together"),
        ("ours->stock", "pipeline", "submitted, stock's server"),
    ):
        for window in (1, 10, 100, 1000):
            bound = bounds.get((name, way, window))
            bars = () if bound is None else (Bar(bound, "raw sequential", least=True),)
            if name != "ours" and way == "pipeline" and window == 100:
                bars = (Bar(3, "stock sequential", least=True),)
            compared = ("stock sequential", "raw sequential")
            yield Case("pipeline", f"{window} {label}", f"{name} {way} {window}", "calls/s", *compared, bars)


def _rest() -> Iterator[Case]:
    hop = (Bar(2, "in turn hop", least=True),)
    yield Case("sessions", "50 sessions in turn", "in turn add", "calls/s", bars=hop)
    yield Case("sessions", "opening 500 sessions, each", "open", "ms", bars=(Bar(1e-3),))
    yield Case("sessions", "a call in each of 500 at once", "at once", "calls/s")
    for end in ("server", "client"):
        yield Case("sessions", f"1000 idle, {end}, each", f"idle {end}", "KiB", bars=(Bar(64 << 10),))
    yield Case("mixed", "null call, idle", "idle p50", "us")
    for way in ("up", "down"):
        yield Case("mixed", f"null call beside a copy {way}", f"{way} p50", "us", bars=(Bar(2, "idle p50"),))
        yield Case("mixed", f"the same, p99, {way}", f"{way} p99", "ms", bars=(Bar(0.01),))
    yield Case("busy", "busy kernel, Python, 5 ms", "busy", "ms", bars=(Bar(0.0055),))
    yield Case("busy", "busy kernel, Python, 0.3 ms", "short", "ms", bars=(Bar(0.0005),))
    yield Case("busy", "busy kernel, numpy", "numpy", "ms")
    for way in ("up", "down"):
        yield Case("links", f"copy {way}, 10 MB/s, share of the link", f"share {way}", "ratio")
    for what in ("single call", "map", "submit", "overlap"):
        label = "call" if what == "single call" else f"100 calls, {what}"
        yield Case("links", f"{label}, 20 ms link", what, "ms")
    yield Case("weight", "import rpcnb", "import rpcnb", "ms", "import tvm", bars=(Bar(0.04),), watched=True)
    yield Case("weight", "import rpcnb and connect", "import connect", "ms", "import tvm", watched=True)
    yield Case("weight", "rpcnb serve, idle", "idle", "MiB", bars=(Bar(32 << 20),))
    yield Case("weight", "installed", "installed", "MiB")
    yield Case("observers", "copy with an observer, of its time without", "observed", "ratio")
    yield Case("panels", "panel's share of 8 sessions' copies", "share", "ratio", bars=(Bar(0.05),))


def _all() -> Iterable[Case]:
    yield from _calls()
    yield from _copies()
    yield from _windows()
    yield from _rest()


CASES: tuple[Case, ...] = tuple(_all())
