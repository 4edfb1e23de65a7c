"""A real JupyterLab and a headless Chromium, for tests: private directories, a free port, no request to the outside.

::

    with Lab(folder) as lab:
        page = lab.open("a.ipynb")
        lab.run_all(page)
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

import nbformat

CHROMIUM = os.environ.get("CHROMIUM") or "/usr/bin/chromium"
_ARGUMENTS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-background-networking",
    "--no-first-run",
    "--disable-renderer-backgrounding",  # a headless page counts as hidden: its timers would be throttled
    "--disable-background-timer-throttling",
]
_SETTINGS: dict[str, Any] = {
    "@jupyterlab/notebook-extension/tracker": {"windowingMode": "none"},  # every cell is in the page
    "@jupyterlab/docmanager-extension/plugin": {"autosave": False},
    "@jupyterlab/apputils-extension/notification": {
        "checkForUpdates": False,
        "doNotDisturbMode": True,
        "fetchNews": "false",
    },
}
_IS_OPEN = """() => {
  const w = window.jupyterapp && window.jupyterapp.shell.currentWidget;
  return !!(w && w.context && w.context.isReady && w.content && w.content.model);
}"""
_KERNEL_IS_READY = """() => {
  const s = window.jupyterapp.shell.currentWidget.sessionContext, k = s.session && s.session.kernel;
  return s.isReady && k && k.connectionStatus === 'connected' && k.status === 'idle';
}"""
_START = """() => {
  window.__done = null;
  window.jupyterapp.commands.execute('notebook:run-all-cells').then(
    ok => { window.__done = ok ? 'ok' : 'failed'; }, error => { window.__done = String(error); });
}"""
_IS_OVER = """() => {
  const k = window.jupyterapp.shell.currentWidget.sessionContext.session.kernel;
  return window.__done !== null && k.status === 'idle';
}"""
_HEIGHT = """() => {
  const outer = document.querySelector('.jp-WindowedPanel-outer');
  if (outer) outer.scrollTop = 0;
  let bottom = 0;
  for (const cell of document.querySelectorAll('.jp-Cell'))
    bottom = Math.max(bottom, cell.getBoundingClientRect().bottom);
  return Math.ceil(bottom + 80);
}"""


def write_notebook(path: Path, *cells: str) -> None:
    """Write a notebook of code cells."""
    made = nbformat.v4.new_notebook(
        cells=[nbformat.v4.new_code_cell(cell) for cell in cells],
        metadata={"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}},
    )
    nbformat.write(made, path)


class Lab:
    """JupyterLab and a browser, closed together.

    Attributes:
        troubles: Errors of pages: uncaught exceptions, and what they wrote to the console as errors.
        outside: Requests that left this machine; they are refused.
    """

    def __init__(self, root: Path, *, app: str = "jupyterlab", seconds: float = 60.0) -> None:
        self._root = root
        self._app = app
        self._seconds = seconds
        self.troubles: list[str] = []
        self.outside: list[str] = []
        self._folder = Path(tempfile.mkdtemp(prefix="rpcnb-lab-"))
        self._process: subprocess.Popen[bytes] | None = None
        self._playwright: Any = None
        self._browser: Any = None

    def __enter__(self) -> Lab:
        try:
            self._start_lab()
            self._start_browser()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _start_lab(self) -> None:
        for name, value in _SETTINGS.items():
            file = self._folder / "settings" / f"{name}.jupyterlab-settings"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps(value))
        names = ("settings", "workspaces", "config", "runtime", "ipython")
        keys = ("JUPYTERLAB_SETTINGS_DIR", "JUPYTERLAB_WORKSPACES_DIR", "JUPYTER_CONFIG_DIR", "JUPYTER_RUNTIME_DIR")
        folders = {key: str(self._folder / name) for key, name in zip((*keys, "IPYTHONDIR"), names, strict=True)}
        folders["RPCNB_RUNTIME_DIR"] = str(self._folder / "rpcnb")
        environment = {key: value for key, value in os.environ.items() if key != "RPCNB_NONINTERACTIVE"}
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self._token = secrets.token_hex(16)
        self.url = f"http://127.0.0.1:{port}/"
        command = [sys.executable, "-m", self._app, "--no-browser", "--ip=127.0.0.1", f"--port={port}", "--allow-root"]
        command += ["--ServerApp.port_retries=0", f"--IdentityProvider.token={self._token}"]
        command += [f"--ServerApp.root_dir={self._root}", "--LabApp.expose_app_in_browser=True", "--LabApp.news_url="]
        command += ["--JupyterNotebookApp.expose_app_in_browser=True"] if self._app == "notebook" else []
        log = self._folder / "lab.log"
        with log.open("wb") as output:
            self._process = subprocess.Popen(
                command, stdout=output, stderr=output, env={**environment, **folders}, start_new_session=True
            )
        until = time.monotonic() + self._seconds
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        while True:
            if self._process.poll() is not None:
                raise RuntimeError(f"{self._app} did not start:\n{log.read_text()[-3000:]}")
            try:
                with opener.open(f"{self.url}api/status?token={self._token}", timeout=2):
                    return
            except OSError:
                if time.monotonic() > until:
                    raise TimeoutError(f"{self._app} did not answer:\n{log.read_text()[-3000:]}") from None
                time.sleep(0.1)

    def _start_browser(self) -> None:
        from playwright.sync_api import sync_playwright

        self._playwright = sync_playwright().start()
        self._browser = self._playwright.chromium.launch(executable_path=CHROMIUM, args=_ARGUMENTS)
        self._context = self._browser.new_context(viewport={"width": 1200, "height": 900})
        self._context.set_default_timeout(self._seconds * 1000)

        def leaves(url: str) -> bool:
            parts = urlsplit(url)
            return parts.scheme in ("http", "https") and parts.hostname not in ("127.0.0.1", "localhost")

        def refuse(route: Any) -> None:
            self.outside.append(route.request.url)
            route.abort()

        self._context.route(leaves, refuse)

    def close(self) -> None:
        """End both, and remove their directories."""
        for thing, end in ((self._browser, "close"), (self._playwright, "stop")):
            if thing is not None:
                getattr(thing, end)()
        self._browser = self._playwright = None
        if self._process is not None and self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)  # it takes its kernels down with it
            try:
                self._process.wait(15)
            except subprocess.TimeoutExpired:
                os.killpg(self._process.pid, signal.SIGKILL)
                self._process.wait(5)
        shutil.rmtree(self._folder, ignore_errors=True)

    def open(self, name: str, width: int = 1200) -> Any:
        """Open a notebook alone, and wait for its kernel; returns playwright's page."""
        page = self._context.new_page()
        page.set_viewport_size({"width": width, "height": 900})
        page.on("console", lambda message: self.troubles.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: self.troubles.append(str(error)))
        where = f"doc/workspaces/{secrets.token_hex(4)}/tree/" if self._app == "jupyterlab" else "notebooks/"
        page.goto(f"{self.url}{where}{quote(name)}?token={self._token}")
        self.wait_ready(page)
        return page

    def wait_ready(self, page: Any) -> None:
        """Wait until the notebook and its kernel are there; after a reload, too."""
        page.wait_for_function(_IS_OPEN)
        page.wait_for_function(_KERNEL_IS_READY)

    def start(self, page: Any) -> None:
        """Begin to run all cells."""
        page.evaluate(_START)

    def wait_over(self, page: Any, seconds: float = 60.0) -> str:
        """Wait until they have run; returns ``ok`` or what went wrong."""
        page.wait_for_function(_IS_OVER, timeout=seconds * 1000)
        return str(page.evaluate("() => window.__done"))

    def run_all(self, page: Any, seconds: float = 60.0) -> str:
        """Run all cells; returns ``ok`` or what went wrong."""
        self.start(page)
        return self.wait_over(page, seconds)

    def interrupt(self, page: Any) -> None:
        """Press the stop button."""
        page.evaluate("() => window.jupyterapp.commands.execute('notebook:interrupt-kernel')")

    def texts(self, page: Any) -> list[str]:
        """Return what each code cell printed, resulted in, or raised."""
        cells = page.evaluate("() => window.jupyterapp.shell.currentWidget.content.model.toJSON()")["cells"]
        return [
            "".join(_text_of(output) for output in cell["outputs"]) for cell in cells if cell["cell_type"] == "code"
        ]

    def darken(self, page: Any) -> None:
        """Take JupyterLab's dark theme."""
        page.evaluate("() => window.jupyterapp.commands.execute('apputils:change-theme', {theme: 'JupyterLab Dark'})")
        page.wait_for_function("() => document.body.dataset.jpThemeLight === 'false'")

    def picture(self, page: Any, path: Path) -> None:
        """Take a picture of the whole notebook."""
        size = page.viewport_size
        page.set_viewport_size({"width": size["width"], "height": max(400, page.evaluate(_HEIGHT))})
        page.wait_for_timeout(400)  # for the layout, which announces nothing
        page.screenshot(path=str(path))
        page.set_viewport_size(size)


def _text_of(output: dict[str, Any]) -> str:
    if output["output_type"] == "stream":
        text = output["text"]
        return text if isinstance(text, str) else "".join(text)
    if output["output_type"] == "error":
        return f"{output['ename']}: {output['evalue']}"
    found = output["data"].get("text/plain", "")
    return found if isinstance(found, str) else "".join(found)
