"""The panel in a real JupyterLab: live during a blocking cell, clicks, reload, a second view, light and dark."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from lab import CHROMIUM, Lab, write_notebook

pytestmark = [pytest.mark.browser, pytest.mark.timeout(240), pytest.mark.filterwarnings("ignore")]

PICTURES = os.environ.get("RPCNB_PICTURES")  # a folder for pictures to look at
CONNECT = "import rpcnb, time, numpy as np\n%load_ext rpcnb\nsession = %rpc_connect demo"
MOVES = """before => {
  const bar = document.querySelector('[role=progressbar]');
  return !bar || Number(bar.getAttribute('aria-valuenow')) > before;
}"""
SLOW = 'slow = session.get_function("demo.slow_add")\nwait = session.get_function("demo.sleep")'


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("notebooks")


@pytest.fixture(scope="module")
def lab(folder: Path) -> Iterator[Lab]:
    if not Path(CHROMIUM).exists():
        assert os.environ.get("CI") != "true", "CI has no chromium"
        pytest.skip("no chromium")
    before = set(psutil.Process().children(recursive=True))
    with Lab(folder) as running:
        yield running
    left = set(psutil.Process().children(recursive=True)) - before
    assert not psutil.wait_procs(left, 10)[1]  # kernels, demo boards and the browser are gone


def section(page: Any, name: str) -> Any:
    return page.get_by_role("region", name=re.compile(f"^{name}"))


def named(page: Any, name: str) -> Any:
    return page.locator(".rpcnb-main", has_text=name)


def picture(lab: Lab, page: Any, name: str) -> None:
    if PICTURES:
        lab.picture(page, Path(PICTURES) / f"{name}.png")


def quiet(lab: Lab) -> None:
    """Nothing went wrong in the page, and nothing went outside."""
    assert lab.troubles == []
    assert lab.outside == []


def test_the_panel_is_live_during_a_blocking_cell_and_clicks_cancel(lab: Lab, folder: Path) -> None:
    write_notebook(
        folder / "live.ipynb",
        CONNECT,
        "rpcnb.panel()",
        f"""{SLOW}
job = wait.submit(60.0)
x = session.empty((64 << 20,), "uint8")
session.observers.subscribe(lambda event: None)
move = session.submit(x.copyfrom, np.zeros(64 << 20, "uint8"))   # 40 MB/s: 1.6 s
begun = time.monotonic()
try:
    slow(1, 2, 30.0)                                              # blocks
except BaseException as error:
    print(type(error).__name__, time.monotonic() - begun < 25)
move.result()
print(job.state)""",
        "session.close()\n%rpc_close --all",
    )
    page = lab.open("live.ipynb")
    lab.start(page)
    bar = section(page, "Transfers").get_by_role("progressbar")
    bar.wait_for()
    before = int(bar.get_attribute("aria-valuenow") or 0)
    page.wait_for_function(MOVES, arg=before)
    pending = section(page, "Pending")
    pending.get_by_text("demo.slow_add").wait_for()  # the blocking cell's own call
    pending.get_by_text("demo.sleep").wait_for()
    section(page, "Sessions").get_by_text(re.compile("busy")).wait_for()
    picture(lab, page, "panel-light")
    pending.get_by_role("button", name="cancel demo.sleep").click()
    page.wait_for_function(
        "() => ![...document.querySelectorAll('.rpcnb-main')].some(n => n.textContent == 'demo.sleep')"
    )
    pending.get_by_role("button", name="cancel demo.slow_add").click()
    assert lab.wait_over(page) == "ok"
    assert lab.texts(page)[2].splitlines() == ["CancelledError True", "cancelled"]
    quiet(lab)
    page.close()


def test_the_panel_survives_a_reload_and_has_a_second_view(lab: Lab, folder: Path) -> None:
    write_notebook(
        folder / "reload.ipynb",
        CONNECT,
        "panel = rpcnb.panel()\npanel",
        "from ipywidgets import HBox\nHBox([panel.widget])",
        f"{SLOW}\njob = wait.submit(100.0)",
    )
    page = lab.open("reload.ipynb")
    assert lab.run_all(page) == "ok"
    assert page.locator(".rpcnb-panel").count() == 2
    named(page, "demo.sleep").nth(1).wait_for()
    page.evaluate("() => window.jupyterapp.commands.execute('docmanager:save')")
    page.reload()
    lab.wait_ready(page)
    named(page, "demo.sleep").nth(1).wait_for()
    button = page.get_by_role("button", name="cancel demo.sleep").first
    button.focus()
    page.keyboard.press("Enter")  # the keyboard will do
    page.wait_for_function(
        "() => document.querySelectorAll('.rpcnb-panel').length == 2 && "
        "![...document.querySelectorAll('.rpcnb-main')].some(n => n.textContent == 'demo.sleep')"
    )
    quiet(lab)
    page.close()


def test_sessions_are_closed_and_the_server_is_shown(lab: Lab, folder: Path) -> None:
    write_notebook(
        folder / "server.ipynb",
        """import rpcnb, asyncio
%load_ext rpcnb
@rpcnb.register_func("my.answer", override=True)
async def answer(seconds):
    await asyncio.sleep(seconds)
server = %rpc_serve --key mine
session = rpcnb.connect(server.address, key="mine")""",
        "rpcnb.panel()",
        'job = session.get_function("my.answer").submit(60.0)',
    )
    page = lab.open("server.ipynb", width=500)
    assert lab.run_all(page) == "ok"
    section(page, "Server").get_by_text("my.answer").wait_for()
    picture(lab, page, "panel-narrow")
    assert page.evaluate(
        "() => { const p = document.querySelector('.rpcnb-panel'); return p.scrollWidth <= p.clientWidth + 1; }"
    )
    section(page, "Sessions").get_by_role("button", name=re.compile("^close session")).click()
    page.get_by_text("no session is open").wait_for()
    section(page, "Server").get_by_text("my.answer").wait_for(state="detached")
    quiet(lab)
    page.close()


def test_a_panel_whose_kernel_was_restarted_says_so(lab: Lab, folder: Path) -> None:
    write_notebook(folder / "restart.ipynb", CONNECT, "rpcnb.panel()", f"{SLOW}\njob = wait.submit(60.0)")
    page = lab.open("restart.ipynb")
    assert lab.run_all(page) == "ok"
    named(page, "demo.sleep").wait_for()
    page.evaluate("() => window.jupyterapp.shell.currentWidget.sessionContext.session.kernel.restart()")
    page.get_by_text("the kernel says nothing").wait_for()
    assert page.get_by_role("button", name="cancel demo.sleep").is_disabled()
    assert lab.run_all(page) == "ok"  # the cell draws a new one
    named(page, "demo.sleep").wait_for()
    assert page.get_by_role("button", name="cancel demo.sleep").is_enabled()
    quiet(lab)
    page.close()


def test_where_no_widget_is_drawn_static_html_takes_over(lab: Lab, folder: Path) -> None:
    write_notebook(
        folder / "html.ipynb",
        "from unittest import mock\nimport rpcnb, anywidget\nimport rpcnb.jupyter.widget as w\n"
        "w.PanelWidget._module = anywidget.AnyWidget._module = 'not-there'\n"
        "w.PanelWidget.send = lambda *a, **k: None\n%load_ext rpcnb\nsession = %rpc_connect demo",
        "panel = rpcnb.panel()\npanel._on_message = None\npanel.widget._msg_callbacks.callbacks.clear()\npanel",
    )
    page = lab.open("html.ipynb")
    assert lab.run_all(page) == "ok"
    page.get_by_text("pip install anywidget there").wait_for()
    page.get_by_role("cell", name="session-1", exact=True).wait_for()
    page.close()


def test_the_panel_in_dark(lab: Lab, folder: Path) -> None:
    write_notebook(folder / "dark.ipynb", CONNECT, "rpcnb.panel()", f"{SLOW}\njob = wait.submit(60.0)")
    page = lab.open("dark.ipynb")
    lab.darken(page)
    assert lab.run_all(page) == "ok"
    named(page, "demo.sleep").wait_for()
    picture(lab, page, "panel-dark")
    back = page.evaluate("() => getComputedStyle(document.querySelector('.rpcnb-panel')).backgroundColor")
    assert max(map(int, re.findall(r"\d+", back)[:3])) < 90  # dark, as everything around it
    quiet(lab)
    page.close()
