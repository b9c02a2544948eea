"""Selectors: text and objects mean the same; errors point at the word."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from peftgraph.errors import PeftGraphError
from peftgraph.sites import (
    Selector,
    Site,
    Sites,
    attention,
    bias,
    block,
    expert,
    ffn,
    head,
    kind,
    layers,
    norm,
    parse_selector,
    stack,
)

ATOMS: list[Selector] = [
    attention,
    attention.q,
    attention.all,
    attention.core,
    ffn,
    ffn.all,
    ffn.hidden,
    norm,
    bias,
    head,
    block,
    layers(2, 6),
    layers(3),
    stack("encoder"),
    kind("cross"),
    expert(2),
]


def grow(inner: st.SearchStrategy[Selector]) -> st.SearchStrategy[Selector]:
    paths = st.sampled_from(["self.*", r"a\.b\d+", 'say "x"', "it's"])
    return st.one_of(
        st.builds(lambda a, b: a | b, inner, inner),
        st.builds(lambda a, b: a & b, inner, inner),
        st.builds(lambda a: ~a, inner),
        st.builds(lambda a, p: a.where(path=p), inner, paths),
    )


@given(st.recursive(st.sampled_from(ATOMS), grow, max_leaves=6))
def test_text_round_trips(selector: Selector) -> None:
    assert parse_selector(str(selector)) == selector


@pytest.mark.parametrize(
    ("selector", "text"),
    [
        (attention.q | attention.v, "attention.q|attention.v"),
        (attention.all & layers(2, 6), "attention.*&layers(2,6)"),
        (attention.q.where(path="self.*"), 'attention.q.where(path="self.*")'),
        (~norm, "~norm"),
        ((attention.q | attention.v) & layers(3), "(attention.q|attention.v)&layers(3)"),
        (~(norm | bias), "~(norm|bias)"),
    ],
)
def test_text(selector: Selector, text: str) -> None:
    assert str(selector) == text
    assert parse_selector(f"  {text} ") == selector


def test_precedence_is_not_and_or() -> None:
    assert parse_selector("norm|~bias&head") == norm | (~bias & head)


def test_strings_combine_with_objects() -> None:
    assert "attention.q" | attention.v == attention.q | attention.v
    assert attention.q & "layers(0,1)" == attention.q & layers(0, 1)


@pytest.mark.parametrize(
    ("text", "problem", "caret"),
    [
        ("atention.q", "unknown word 'atention.q'; did you mean 'attention.q'?", 0),
        ("norm|", "expected a role or a filter, found 'the end'", 5),
        ("norm|layer[2]", "cannot read '['", 10),
        ("norm|lairs(2)", "unknown word 'lairs'; did you mean 'layers'?", 5),
        ("norm.where(shape=3)", "expected '(', found '3'", 17),
        ("norm.where(shapes=(3))", "expected one of path, shape, out_features, in_features, each once; found", 11),
        ('norm.where(path="a",path="b")', "expected one of path, shape, out_features, in_features, each once", 20),
        ('norm.where(in_features="about 3")', "'about 3' compares with nothing: write a number", 10),
        ("layers(4,2)", "layers(4,2) holds no layer", 7),
        ("(norm", "expected ')', found 'the end'", 5),
        ("norm $", "cannot read '$'", 5),
        ("layers(x)", "expected a number, found 'x'", 7),
    ],
)
def test_errors_show_a_caret_and_the_words(text: str, problem: str, caret: int) -> None:
    with pytest.raises(PeftGraphError) as raised:
        parse_selector(text)
    lines = str(raised.value).splitlines()
    assert lines[0].startswith(f"cannot read the selector: {problem}")
    assert lines[1:3] == [f"  {text}", "  " + " " * caret + "^"]
    assert "attention.q" in lines[3]


def test_a_bad_regular_expression_is_refused() -> None:
    with pytest.raises(PeftGraphError, match="no regular expression"):
        attention.q.where(path="(")


def a_model() -> Sites:
    found = [
        Site(role=role, path=f"m.{layer}.{role}", op=f"n{layer}", layer=layer, kind="self")
        for layer in range(3)
        for role in ("attention.q", "attention.v")
    ]
    return Sites((*found, Site(role="head", path="head", op="h")))


def test_select_and_require() -> None:
    sites = a_model()
    assert [site.id for site in sites.require("attention.q&layers(1,3)")] == [
        "1.attention.q",
        "2.attention.q",
    ]
    assert sites.select("ffn") == ()
    assert len(sites.select("~head")) == 6


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("ffn.up", "ffn.up: 0 sites\n    nothing plays ffn.up\n    roles found: attention.q (3), attention.v (3)"),
        ('attention.q.where(path="x.*")', 'where(path="x.*") removed all 3 sites of attention.q'),
        ("attention.q&layers(7)", "layers(7) lies beyond the model, which has layers 0 to 2"),
        ("attention.q&layers(1,9)", "layers(1,9) reaches beyond the last layer, 2"),
        ("attention.q&head", "3 sites were left before head removed them all"),
        ("attention.q|ffn.up", "part of attention.q|ffn.up never matched"),
        ('attention.q&kind("cross")', 'kind("cross") matches no site; the model has self'),
        ('(attention.q|head)&stack("encoder")', 'stack("encoder") matches no site; the model has none'),
    ],
)
def test_no_match_says_why(text: str, reason: str) -> None:
    with pytest.raises(PeftGraphError) as raised:
        a_model().require(text)
    assert reason in str(raised.value)
