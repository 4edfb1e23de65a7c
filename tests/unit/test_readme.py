"""The README's generated table is current."""

from __future__ import annotations

from pathlib import Path

from rpcnb.protocol.endpoint import TRANSITIONS

README = Path(__file__).parents[2] / "README.md"


def test_the_state_table_is_generated_from_the_transitions() -> None:
    rows = [
        f"| {state.value} | {sender.name.lower()} | {kind.value} | {after.value} |"
        for state, steps in TRANSITIONS.items()
        for (sender, kind), after in steps.items()
    ]
    table = README.read_text().partition("<!-- states -->\n")[2].partition("\n<!-- /states -->")[0]
    assert table.splitlines()[2:] == rows
