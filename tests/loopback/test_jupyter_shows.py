"""How rpcnb's objects look in a notebook, what completes in its lines, and the line under a cell that waits."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import eventually
from IPython.core.completer import provisionalcompleter

import rpcnb
from rpcnb.jupyter.completion import complete, complete_names
from rpcnb.jupyter.progress import ProgressLine
from rpcnb.jupyter.sessions import BOOK
from rpcnb.runtime.registry import Registry

EVIL = "<script>alert(1)</script>"
ROOT = Path(__file__).parent.parent.parent


@pytest.fixture(autouse=True)
def _closed(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("RPCNB_NONINTERACTIVE", "1")
    yield
    BOOK.close_all()


@pytest.fixture
def session(serve: Callable[..., Any], registry: Registry) -> Iterator[rpcnb.Session]:
    registry.register(EVIL, lambda: object())
    registry.register("slow", time.sleep)
    with rpcnb.connect(serve().address) as made:
        yield made


def html(shell: Any, thing: Any) -> str:
    data, _ = shell.display_formatter.format(thing)
    assert data["text/plain"] == repr(thing)
    return str(data["text/html"])


def test_everything_has_text_and_static_html_that_is_escaped(
    shell: Any, session: rpcnb.Session, serve: Callable[..., Any]
) -> None:
    session.name = EVIL
    function = session.get_function(EVIL)
    pending = session.submit(function)
    thing = pending.result()
    x = session.array(np.zeros((2, 3), "float32"))
    sent = session.traffic.sent
    transfer = session.submit(x.numpy)
    transfer.result()
    moved = session.traffic.sent
    shown = [html(shell, one) for one in (session, function, pending, thing, x, transfer)]
    assert not [one for one in shown if "<script>" in one]
    assert session.traffic.sent == moved > sent, "looking at a tensor fetches nothing"
    assert "24 bytes, not fetched" in shown[4]
    assert "24 B of 24 B" in shown[5]
    assert "&lt;script&gt;" in shown[0]
    server = serve(key="evil")
    assert server.address in html(shell, server)
    assert "mean" in html(shell, rpcnb.client.remote.TimingResult((1.0, 2.0)))


def test_a_saved_notebook_shows_them_too() -> None:
    nbconvert = pytest.importorskip("nbconvert")  # comes with jupyterlab
    page, _ = nbconvert.HTMLExporter().from_filename(str(ROOT / "notebooks" / "01_quickstart.ipynb"))
    assert "not fetched" in page  # the tensor's table
    assert "<b>Sessions</b>" in page  # the panel's static form


@pytest.mark.parametrize(
    ("text", "fragment", "found"),
    [
        ("%rpc_connect --ti", "--ti", ["--timeout"]),
        ("%rpc_connect --k", "--k", ["--key"]),
        ("session = 3", None, None),
        ("%rpc_connect", None, None),
        ("%rpc_serve --run ", "", ["kernel", "thread"]),
        ("%rpc_panel tr", "tr", ["transfers"]),
        ("%rpc_functions --session na", "na", ["named"]),
        ("%rpc_close n", "n", ["named"]),
        ("%rpc_functions demo.a", "demo.a", ["demo.add"]),
        ('%rpc_timeit "open', '"open', []),
        ("%rpc_connect de", "de", ["demo"]),
        ("%rpc_upload fi", None, None),
        ("%%rpc --no", "--no", ["--noblock"]),
    ],
)
def test_lines_complete(
    shell: Any, serve: Callable[..., Any], registry: Registry, text: str, fragment: str | None, found: list[str] | None
) -> None:
    registry.register("demo.add", lambda a, b: a + b)
    BOOK.connect(serve().address, key="", name="named", new=False)
    magics = {name: one for kind in shell.magics_manager.magics.values() for name, one in kind.items()}
    outcome = complete({name: one for name, one in magics.items() if name.startswith("rpc")}, text)
    assert outcome == (None if fragment is None else (fragment, found))


def test_names_of_functions_complete_behind_fn(shell: Any, serve: Callable[..., Any], registry: Registry) -> None:
    registry.register("demo.add", lambda a, b: a + b)
    registry.register("demo.sub", lambda a, b: a - b)
    with rpcnb.connect(serve().address) as session:
        shell.user_ns["there"] = session
        assert complete_names(shell.user_ns, "x = there.fn.de") == ("de", ["demo"])
        assert complete_names(shell.user_ns, "there.fn.demo.") == ("", ["add", "sub"])
        assert complete_names(shell.user_ns, "other.fn.") is None
        assert complete_names(shell.user_ns, "there") is None
        with provisionalcompleter():
            offered = [one.text for one in shell.Completer.completions("there.fn.demo.a", 15)]
        assert offered == ["add"]
    assert complete_names(shell.user_ns, "there.fn.demo.") == ("", ["add", "sub"]), "known, although it is closed"


def test_a_server_that_does_not_answer_completes_nothing(serve: Callable[..., Any], registry: Registry) -> None:
    registry.register("ffi.FunctionListGlobalNamesFunctor", lambda: time.sleep(0.5))
    with rpcnb.connect(serve().address) as session:
        assert complete_names({"there": session}, "there.fn.") == ("", [])


def test_the_shell_offers_only_what_fits(shell: Any) -> None:
    with provisionalcompleter():
        offered = [one.text for one in shell.Completer.completions("%rpc_connect --ti", len("%rpc_connect --ti"))]
        nothing = [one.text for one in shell.Completer.completions("%rpc_uplo", len("%rpc_uplo"))]
    assert offered == ["--timeout"]
    assert "%rpc_upload" in nothing


def test_a_cell_that_waits_shows_what_for(
    shell: Any, session: rpcnb.Session, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("RPCNB_NONINTERACTIVE")
    line = ProgressLine(shell)
    line._begin()
    session.get_function("slow")(1.2)
    line._end()
    eventually(lambda: not line._shown, "the end of the line")
    line._removed = True
    line._wake.set()
    assert line._thread is not None
    line._thread.join()
    text = capsys.readouterr().err
    assert f"slow at {session.peer}, 0." in text
    assert text.endswith("\r"), "nothing is left"


class Kernel:
    """Stands in for a notebook's shell: what it displays is kept."""

    kernel = True


def test_in_a_notebook_the_line_is_a_display_that_is_updated(monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[str] = []

    class Handle:
        def update(self, html: Any) -> None:
            shown.append(html._html)

    def display(html: Any, display_id: bool) -> Handle:
        shown.append(html._html)
        return Handle()

    monkeypatch.setattr("IPython.display.display", display)
    line = ProgressLine(Kernel())
    line._show("↑ (4,) <f4>: 2 B of 4 B", 0.5, 1.0)
    line._show("slow at p", None, 2.0)
    line._clear(None)
    line._clear(None)
    assert "█" * 10 + "░" * 10 + "  50%" in shown[0]
    assert "&lt;f4&gt;" in shown[0]
    assert "slow at p, 2.0 s" in shown[1]
    assert shown[2:] == [""]
