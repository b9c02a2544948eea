"""Trainable parameters as the papers print them, on programs of the real sizes without weights; and the pages of docs/
that are made from what passes say and do there."""

from __future__ import annotations

import method_pages
import pytest
import survey_costs
from published import MODELS, ROWS, SHALLOW, Row, rounds_to, traced, trainable

from peftgraph import passes
from peftgraph.authoring import Pass
from peftgraph.passes import LoRA


@pytest.mark.parametrize("model", MODELS)
def test_counts(model: str) -> None:
    wanted, found = {}, {}
    for row in (row for row in ROWS if row.model == model):
        count = trainable(row)
        key = f"{row.method} ({row.printed}, {row.source})"
        found[key] = (count, rounds_to(count, row.printed, row.of))
        wanted[key] = (row.exact, row.agrees)
    assert found == wanted
    assert found, "no row for this model"


def test_every_row_has_a_model() -> None:
    assert {row.model for row in ROWS} == set(MODELS)
    assert set(MODELS) >= set(SHALLOW)


def test_a_count_is_linear_in_the_layers() -> None:
    row = Row("roberta-base", LoRA(rank=8), 294_912, "295K", "")
    assert sum(p.numel() for p in traced("roberta-base").apply(row.method).table.trainable.values()) == trainable(row)


def test_the_pages_in_the_documentation_are_what_the_passes_say_and_do() -> None:
    made = method_pages.files()
    for path, text in made.items():
        assert (method_pages.DOCS / path).read_text(encoding="utf-8") == text, (
            f"run tests/support/method_pages.py: {path}"
        )
    kept = set((method_pages.DOCS / "methods").iterdir())
    assert kept == {method_pages.DOCS / path for path in made} - {method_pages.DOCS / "methods.md"}


def test_every_pass_has_a_page() -> None:
    exported = {item for item in vars(passes).values() if isinstance(item, type) and issubclass(item, Pass)}
    assert {type(method) for page in method_pages.PAGES for method in page.methods} == exported


def test_every_page_says_where_other_libraries_differ() -> None:
    for page in method_pages.PAGES:
        text = (method_pages.DOCS / "methods" / f"{page.name}.md").read_text(encoding="utf-8")
        assert len(text.partition(method_pages.HAND)[2].split()) > 8, page.name


def test_the_survey_s_table_is_what_is_computed() -> None:
    text = (method_pages.DOCS / "methods.md").read_text(encoding="utf-8")
    assert survey_costs.section() in text, "run tests/support/method_pages.py --survey"
