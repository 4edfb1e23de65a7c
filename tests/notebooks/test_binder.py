"""What Binder builds: installed from ``binder/`` alone, it runs the quickstart, and is not larger than promised."""

from __future__ import annotations

import json
import os
import subprocess
import venv
from pathlib import Path

import pytest

pytestmark = pytest.mark.timeout(400)

ROOT = Path(__file__).parent.parent.parent
LARGEST = 400e6  # bytes


def test_binder_installs_what_the_quickstart_needs(tmp_path: Path) -> None:
    home = tmp_path / "venv"
    venv.create(home, with_pip=True)
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("COV", "PYTHON", "VIRTUAL"))}
    environment["RPCNB_NONINTERACTIVE"] = "1"

    def run(*words: str) -> None:
        done = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]

    run(str(home / "bin/pip"), "install", "--quiet", "--disable-pip-version-check", "-r", "binder/requirements.txt")
    result = tmp_path / "quickstart.ipynb"
    run(str(home / "bin/jupyter"), "execute", "notebooks/01_quickstart.ipynb", f"--output={result}")
    cells = [cell for cell in json.loads(result.read_text())["cells"] if cell["cell_type"] == "code"]
    assert all(cell["execution_count"] for cell in cells)
    assert not [output for cell in cells for output in cell["outputs"] if output["output_type"] == "error"]
    own = sum(file.stat().st_size for file in home.rglob("*") if file.is_file() and "__pycache__" not in file.parts)
    assert own < LARGEST, f"{own / 1e6:.0f} MB"


def test_what_binder_asks_for_comes_from_the_package_index() -> None:
    lines = (ROOT / "binder/requirements.txt").read_text().splitlines()
    words = [line for line in lines if line and not line.startswith("#")]
    assert words[0] == ".[notebook,exec]"
    assert not [word for word in words if "://" in word or "@" in word]
    assert (ROOT / "binder/runtime.txt").read_text() == "python-3.12\n"
