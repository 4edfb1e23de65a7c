"""What benchmarks make of figures: ratios, the table, bars, the check against disasters."""

from __future__ import annotations

import json

import pytest

from benchmarks.__main__ import COMMITTED, SECTIONS
from benchmarks.cases import CASES, Bar, Case
from benchmarks.report import HEADER, committable, disasters, meets, row, shown
from benchmarks.rounds import Ratios, markdown

NULL = Case("calls", "null call", "ours", "us", "stock", "raw", (Bar(1.2, "stock"),), watched=True)
COPY = Case("calls", "copy", "copy", "GB/s", "", "floor", (Bar(0.9, "floor", least=True),), watched=True)
IDLE = Case("weight", "idle", "idle", "MiB", bars=(Bar(32 << 20),))


@pytest.fixture
def ratios() -> Ratios:
    found = Ratios()
    for ours, stock, raw in ((20e-6, 10e-6, 8e-6), (11e-6, 10e-6, 10e-6), (12e-6, 12e-6, 12e-6)):
        found.add("calls/ours", ours)
        found.add("calls/stock", stock)
        found.add("calls/raw", raw)
        found.add("calls/copy", 1.5e9)
        found.add("calls/floor", 2e9)
    found.add("weight/idle", 30 << 20)
    return found


def test_ratios_are_taken_within_a_round_and_then_their_median(ratios: Ratios) -> None:
    assert ratios.median("calls/ours") == 12e-6
    assert ratios.ratio("calls/ours", "calls/stock") == pytest.approx(1.1)  # of 2.0, 1.1 and 1.0


def test_a_ratio_to_what_was_measured_less_often_uses_the_rounds_that_both_have(ratios: Ratios) -> None:
    ratios.add("calls/once", 5e-6)
    assert ratios.ratio("calls/ours", "calls/once") == pytest.approx(4)


def test_figures_are_taken_over_under_a_prefix(ratios: Ratios) -> None:
    whole = Ratios()
    whole.take(ratios, "same/")
    assert "same/calls/ours" in whole
    assert whole.medians()["same/weight/idle"] == 30 << 20
    assert len(whole.names()) == len(ratios.names())


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [
        (17.26e-6, "us", "17.3 us"),
        (0.00516, "ms", "5.16 ms"),
        (2.5e9, "GB/s", "2.50 GB/s"),
        (123456.7, "calls/s", "123,457 calls/s"),
        (1.5 * 2**20, "MiB", "1.5 MiB"),
        (1536, "KiB", "1.5 KiB"),
        (0.984, "ratio", "0.98"),
    ],
)
def test_figures_are_shown_in_their_unit(value: float, unit: str, text: str) -> None:
    assert shown(value, unit) == text


def test_a_row_shows_ratios_bar_and_verdict(ratios: Ratios) -> None:
    ratios.add("calls/ours p99", 40e-6)
    assert row(ratios, NULL, "same") == [
        "null call", "same", "12.0 us", "40.0 us", "1.10", "1.10", "≤ 1.2 stock", "yes",
    ]  # fmt: skip
    assert row(ratios, COPY, "cross") == ["copy", "cross", "1.50 GB/s", "-", "-", "0.75", "≥ 0.9 floor", "NO"]
    assert row(ratios, IDLE, "none") == ["idle", "none", "30.0 MiB", "-", "-", "-", "≤ 32.0 MiB", "yes"]


def test_what_was_not_measured_has_no_row_and_no_verdict(ratios: Ratios) -> None:
    assert row(Ratios(), NULL, "same") is None
    other = Case("calls", "null call", "ours", bars=(Bar(2, "missing"),))
    assert meets(ratios, other, other.bars[0]) is None
    found = row(ratios, other, "same")
    assert found is not None
    assert found[-1] == "-"


def test_a_table_is_markdown() -> None:
    assert markdown(("a", "b"), [["1", "2"]]) == ["| a | b |", "|---|---|", "| 1 | 2 |"]


def test_the_watched_ratios_are_committed(ratios: Ratios) -> None:
    assert committable(ratios, (NULL, COPY, IDLE)) == {"calls: null call": 1.1, "calls: copy": 0.75}


@pytest.mark.parametrize(
    ("committed", "said"),
    [
        ({"calls: null call": 1.1, "calls: copy": 0.75}, []),
        ({"calls: null call": 0.56, "calls: copy": 1.49}, []),
        ({"calls: null call": 0.54, "calls: copy": 0.75}, ["calls: null call: 1.10 x stock, committed 0.54"]),
        ({"calls: null call": 1.1, "calls: copy": 1.51}, ["calls: copy: 0.75 x floor, committed 1.51"]),
        ({"calls: copy": 0.75}, ["calls: null call: not committed"]),
    ],
)
def test_twice_as_bad_as_committed_is_a_disaster(ratios: Ratios, committed: dict[str, float], said: list[str]) -> None:
    assert [text for _, text in disasters(ratios, (NULL, COPY, IDLE), committed)] == said


def test_a_disaster_shows_in_the_quick_tenth_too(ratios: Ratios) -> None:
    """A process that wakes all the time on the same CPU disturbs most calls, one peer's more than another's."""
    ratios.add("calls/ours p10", 9e-6)
    ratios.add("calls/stock p10", 9e-6)
    assert committable(ratios, (NULL,)) == {"calls: null call": 1.0}
    assert disasters(ratios, (NULL,), {"calls: null call": 0.51}) == []
    assert [text for _, text in disasters(ratios, (NULL,), {"calls: null call": 0.49})] == [
        "calls: null call: 1.00 x stock, committed 0.49"
    ]


def test_a_watched_case_that_was_not_measured_is_a_disaster_too() -> None:
    assert [text for _, text in disasters(Ratios(), (NULL,), {"calls: null call": 1.0})] == [
        "calls: null call: not measured"
    ]


def test_every_case_has_a_section_and_a_name_of_its_own() -> None:
    names = [f"{case.section}: {case.label}" for case in CASES]
    assert len(set(names)) == len(names)
    assert {case.section for case in CASES} == {*SECTIONS, "panels"}
    assert len(HEADER) == 8


def test_every_watched_case_is_committed() -> None:
    committed = json.loads(COMMITTED.read_text())
    assert set(committed) == {f"{case.section}: {case.label}" for case in CASES if case.watched}
