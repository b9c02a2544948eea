"""The score and the report on made-up rows, and the lists of what is known."""

from __future__ import annotations

from pathlib import Path

from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from .known import CHOSEN, MISSES, REFUSED, UNBUILT, complaints
from .models import choose
from .report import shortfalls, summary, write
from .score import Row, Tally, runs

GOOD = Row("one", "decoder", attention=Tally(99, 99), roles=Tally(8, 8), layers=Tally(97, 100))
POOR = Row("two", "decoder", attention=Tally(0, 2), false=1, misses=["no attention: h.0 (0 of 1)"])


def test_totals_that_fall_short_are_named() -> None:
    assert shortfalls([GOOD]) == []
    assert shortfalls([GOOD, POOR]) == [
        "attention: 99/101 is 98.0 %, below 99.0 %",
        "attention found where there is none: two",
    ]


def test_the_summary_counts_refusals() -> None:
    refused = Row("three", "vision", refusal="three cannot be traced.")
    assert summary([GOOD, refused])[0] == "2 models, 1 traced, 1 refused with a reason, 0 false attention sites"


def test_a_row_survives_the_way_to_another_process() -> None:
    assert Row.from_plain(POOR.plain()) == POOR


def test_the_report_is_written(tmp_path: Path) -> None:
    write([GOOD, POOR], tmp_path / "zoo.md")
    text = (tmp_path / "zoo.md").read_text()
    assert "| two | decoder | yes |  | 0/2 |" in text
    assert "- two: no attention: h.0 (0 of 1)" in text


def test_new_misses_and_refusals_are_complaints() -> None:
    assert complaints(POOR) == ["two has 1 misses, 0 are known:", "no attention: h.0 (0 of 1)"]
    assert complaints(Row("two", "decoder", refusal="no")) == ["two is refused: no"]
    assert complaints(GOOD) == []


def test_ranges_of_columns() -> None:
    assert runs({0, 1, 2, 8, 9}) == "0:3, 8:10"
    assert runs(None) == "all"


def test_every_type_is_in_the_zoo_or_has_a_reason() -> None:
    missing = [name for name in CONFIG_MAPPING if choose(name) is None and name not in UNBUILT]
    assert not missing
    assert not CHOSEN & UNBUILT.keys()
    assert not REFUSED.keys() & MISSES.keys()
