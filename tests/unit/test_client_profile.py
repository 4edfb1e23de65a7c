"""A virtual machine's profile as text, as a table in a notebook, and as a server's words."""

from __future__ import annotations

import json

import pytest

from rpcnb.client.profile import Profile, ProfileRow
from rpcnb.errors import RemoteProtocolError


def text(**facts: object) -> str:
    rows = [["matmul", "float32[4, 8]", 2, 3e-6], ["<odd>", "", 1.0, 1e-6]]
    return json.dumps({"seconds": 5e-6, "rows": rows, **facts})


def test_it_is_a_table_with_bars() -> None:
    found = Profile.read("main", 10, text())
    assert found.rows[0] == ProfileRow("matmul", "float32[4, 8]", 2.0, 3e-6)
    assert repr(found).splitlines() == [
        "main: 5 us a run, of 10 runs",
        "                               time  calls",
        " 75% ███████████████           3 us      2  matmul  float32[4, 8]",
        " 25% █████                     1 us      1  <odd>",
    ]
    shown = found._repr_html_()
    assert "width:75.0%" in shown
    assert "&lt;odd&gt;" in shown
    assert json.loads(found.json())["rows"][1]["name"] == "<odd>"


def test_many_rows_are_summed_up() -> None:
    rows = [[f"f{number}", "", 1, 1.0] for number in range(50)]
    found = Profile.read("main", 1, text(rows=rows))
    assert found.table().splitlines()[0] == "main: 5 us a run, of 1 run"
    assert found.table().splitlines()[-1] == "and 10 more"
    assert len(found.table().splitlines()) == 43
    assert "and 10 more" in found._repr_html_()


@pytest.mark.parametrize(("seconds", "shown"), [(2e-9, "2 ns"), (2e-6, "2 us"), (2e-3, "2 ms"), (2.0, "2 s")])
def test_times_have_units(seconds: float, shown: str) -> None:
    assert f" {shown} " in repr(Profile("f", 1, seconds, []))
    assert repr(Profile("f", 1, 0.0, [ProfileRow("g", "", 1, 0.0)])).splitlines()[2].startswith("  0% ")


@pytest.mark.parametrize(
    "wrong", [5, "", "[]", "{}", text(rows=[[1]]), text(rows=[["a", "b", "c", 1]]), text(seconds=float("nan"))]
)
def test_another_answer_is_refused(wrong: object) -> None:
    with pytest.raises(RemoteProtocolError, match="expected a profile"):
        Profile.read("main", 1, wrong)
