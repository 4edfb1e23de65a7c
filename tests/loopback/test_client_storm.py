"""The storm for some seconds; ``tests/soak/storm.py`` says what it does, and goes on for longer."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

STORM = Path(__file__).parents[1] / "soak" / "storm.py"


@pytest.mark.timeout(180)  # of which it needs fifteen, and a hang sixty more to be reported with all stacks
def test_a_storm_finds_nothing() -> None:
    command = [sys.executable, str(STORM), "--seconds", "14", "--seed", "7"]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(STORM.parents[2]), os.environ.get("PYTHONPATH", "")]),
    }
    scenarios = ["--scenarios", "threads,tasks,reconnect,interrupts"]
    done = subprocess.run([*command, *scenarios], env=environment, capture_output=True, text=True, timeout=170)
    assert done.returncode == 0, done.stdout + done.stderr
    assert " 0 findings" in done.stdout
