"""Selectors: text and objects mean the same; errors point at the word."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from peftgraph.errors import Ambiguous, NoMatch, PeftGraphError, PeftGraphWarning
from peftgraph.passes import LoRA
from peftgraph.rewrite.recipe import load_recipe, to_toml
from peftgraph.rewrite.spec import parse_pass
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
    layer,
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
    layer(-1),
    layers(-3, None),
    layers(-3, -1),
    layers(0, -1),
    layers(2, None),
    stack("encoder"),
    kind("cross"),
    expert(2),
]


def narrow(
    inner: Selector, given: tuple[str | None, tuple[int, ...] | None, int | str | None, int | str | None]
) -> Selector:
    path, shape, out_features, in_features = given
    return inner.where(path=path, shape=shape, out_features=out_features, in_features=in_features)


def grow(inner: st.SearchStrategy[Selector]) -> st.SearchStrategy[Selector]:
    paths = st.none() | st.sampled_from(["self.*", r"a\.b\d+", 'say "x"', "it's", "a\\\\", r"\"\.", r'\\"', "(a)&b|'"])
    sizes = st.none() | st.sampled_from([8, "<=64", ">0", "!= 3", "==5"])
    shapes = st.none() | st.sampled_from([(48, 144), (7,), (1, 2)])
    options = st.tuples(paths, shapes, sizes, sizes).filter(lambda given: any(one is not None for one in given))
    return st.one_of(
        st.builds(lambda a, b: a | b, inner, inner),
        st.builds(lambda a, b: a & b, inner, inner),
        st.builds(lambda a: ~a, inner),
        st.builds(narrow, inner, options),
    )


SELECTORS = st.recursive(st.sampled_from(ATOMS), grow, max_leaves=6)


@given(SELECTORS)
def test_text_round_trips(selector: Selector) -> None:
    assert parse_selector(str(selector)) == selector


def drawn_sites() -> st.SearchStrategy[Sites]:
    """Sites with every field that a selector asks for, drawn from few values, so that selectors hit them."""
    sizes = st.sampled_from([3, 5, 7, 8, 48, 64, 144])
    site = st.builds(
        Site,
        role=st.sampled_from(["attention.q", "attention", "attention.core", "ffn.up", "norm", "bias", "head"]),
        path=st.sampled_from(["self.a", "a.b12", "b", 'say "x"', "it's"]),
        op=st.just("n"),
        layer=st.none() | st.integers(0, 4),
        depth=st.just(5),
        stack=st.sampled_from([None, "encoder", "decoder"]),
        kind=st.sampled_from([None, "self", "cross"]),
        expert=st.sampled_from([None, 1, 2]),
        shape=st.none() | st.tuples(sizes) | st.tuples(sizes, sizes),
    )
    return st.builds(lambda found: Sites(tuple(found)), st.lists(site, max_size=8, unique_by=id))


@given(drawn_sites(), SELECTORS, SELECTORS)
def test_selectors_are_an_algebra_of_sets(sites: Sites, one: Selector, other: Selector) -> None:
    def chosen(selector: Selector) -> set[int]:
        return {number for number, site in enumerate(sites) if selector.matches(site)}

    everything = set(range(len(sites)))
    assert chosen(one | other) == chosen(one) | chosen(other)
    assert chosen(one & other) == chosen(one) & chosen(other)
    assert chosen(~one) == everything - chosen(one)


@given(
    drawn_sites(),
    SELECTORS,
    st.sampled_from(['path="self.*"', "shape=(48,144)", 'out_features=">=8"', "in_features=5"]),
)
def test_narrowing_only_narrows(sites: Sites, selector: Selector, condition: str) -> None:
    narrower = parse_selector(f"({selector}).where({condition})")
    assert set(map(id, sites.select(narrower))) <= set(map(id, sites.select(selector)))


def layered(depth: int) -> Sites:
    found = [Site(role="norm", path=f"n{i}", op=f"n{i}", layer=i, depth=depth, shape=(8 * i, 5)) for i in range(depth)]
    return Sites(tuple(found))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("layers(1,3)", [1, 2]),
        ("layers(3,end)", [3, 4]),
        ("layers(-2,end)", [3, 4]),
        ("layers(-3,-1)", [2, 3]),
        ("layers(1,-1)", [1, 2, 3]),
        ("layer(-1)", [4]),
        ("layer(0)", [0]),
        ('norm.where(out_features=">=24")', [3, 4]),
        ('norm.where(out_features="!=8",in_features=5)', [0, 2, 3, 4]),
        ("norm.where(shape=(16,5))", [2]),
        ('norm.where(path="n[13]")&layers(-2,end)', [3]),
    ],
)
def test_what_a_filter_keeps(text: str, expected: list[int]) -> None:
    assert [site.layer for site in layered(5).require(text)] == expected


@pytest.mark.parametrize("text", ["layers(-7,end)", "layers(1,9)", "layers(9,end)", "norm&layer(-6)"])
def test_layers_that_are_not_there_are_refused(text: str) -> None:
    with pytest.raises(NoMatch, match=r"reaches beyond the|is beyond the model"):
        layered(5).require(text)


def test_sizes_are_asked_for_in_text_and_in_recipes(tmp_path: Path) -> None:
    chosen = (attention.q | attention.v).where(out_features=">=8", path="(en|de)coder.*") & layers(-2, None)
    method = LoRA(at=chosen, rank=2)
    assert parse_pass(str(method)) == method
    (tmp_path / "recipe.toml").write_text(to_toml(method))
    assert load_recipe(tmp_path / "recipe.toml") == method


@pytest.mark.parametrize(
    ("selector", "text"),
    [
        (attention.q | attention.v, "attention.q|attention.v"),
        (attention.all & layers(2, 6), "attention.*&layers(2,6)"),
        (attention.q.where(path="self.*"), 'attention.q.where(path="self.*")'),
        (~norm, "~norm"),
        ((attention.q | attention.v) & layers(3), "(attention.q|attention.v)&layers(3)"),
        (~(norm | bias), "~(norm|bias)"),
        (norm & layer(2), "norm&layers(2)"),
        (norm & layers(-2, None), "norm&layers(-2,end)"),
        (layer(-1) & norm.where(shape=(7,)), "layers(-1)&norm.where(shape=(7,))"),
        (
            ffn.up.where(in_features=48, out_features="> 64", path="a"),
            'ffn.up.where(path="a",out_features=">64",in_features=48)',
        ),
    ],
)
def test_text(selector: Selector, text: str) -> None:
    assert str(selector) == text
    assert parse_selector(f"  {text} ") == selector


@pytest.mark.parametrize(
    ("selector", "text"),
    [
        (norm | (attention.q & layers(0)), "norm|attention.q&layers(0)"),
        ((attention.q & layers(0)) | norm, "attention.q&layers(0)|norm"),
        (norm & (attention.q | layers(0)), "norm&(attention.q|layers(0))"),
        ((attention.q | layers(0)) & norm, "(attention.q|layers(0))&norm"),
        (norm | (attention.q | ffn), "norm|(attention.q|ffn)"),
        (norm & (attention.q & ffn), "norm&(attention.q&ffn)"),
        (~(norm & ffn) | ~(norm | ffn) & ~~norm, "~(norm&ffn)|~(norm|ffn)&~~norm"),
        (norm & ~ffn, "norm&~ffn"),
        ((norm & ffn).where(path="a"), '(norm&ffn).where(path="a")'),
        ((~norm).where(path="a"), '(~norm).where(path="a")'),
        (~norm.where(path="a"), '~norm.where(path="a")'),
    ],
)
def test_brackets_are_printed_where_they_are_needed_and_nowhere_else(selector: Selector, text: str) -> None:
    assert str(selector) == text
    assert parse_selector(text) == selector


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
        ("layers(4,2)", "layers(4,2) contains no layer", 7),
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
        ("attention.q&layers(7)", "layers(7) is beyond the model, which has layers 0 to 2"),
        ("attention.q&layers(1,9)", "layers(1,9) reaches beyond the last layer, 2"),
        ("attention.q&head", "3 sites were left before head removed them all"),
        ('attention.q&kind("cross")', 'kind("cross") matches no site; the model has self'),
        ('(attention.q|head)&stack("encoder")', 'stack("encoder") matches no site; the model has none'),
    ],
)
def test_no_match_says_why(text: str, reason: str) -> None:
    with pytest.raises(PeftGraphError) as raised:
        a_model().require(text)
    assert reason in str(raised.value)


def test_an_alternative_that_matches_nothing_is_a_warning() -> None:
    with pytest.warns(PeftGraphWarning, match=r"part of attention\.q\|ffn\.up never matched:\nffn\.up: 0 sites"):
        found = a_model().require("attention.q|ffn.up")
    assert {site.role for site in found} == {"attention.q"}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(a_model().require("attention.q|head")) == 4


def two_stacks() -> Sites:
    found = [
        Site(role=role, path=f"{stack}.{i}", op=f"{stack}{role}{i}", layer=i, depth=2, stack=stack)
        for stack in ("encoder", "decoder")
        for role in ("attention.q", "ffn.up")
        for i in range(2)
    ]
    return Sites(tuple(found))


@pytest.mark.parametrize("text", ["attention.q&layers(1)", 'attention.q&layers(-1)|ffn.up&layers(0)&stack("encoder")'])
def test_a_layer_of_several_stacks_is_ambiguous_in_each_alternative(text: str) -> None:
    with pytest.raises(Ambiguous, match=r'Add &stack\("decoder"\) for one of them'):
        two_stacks().require(text)


def test_a_size_does_not_say_which_stack_is_meant_but_a_path_does() -> None:
    with pytest.raises(NoMatch):
        two_stacks().require('(attention.q&layers(1)).where(out_features=">0")')
    (site,) = two_stacks().require('(attention.q&layers(1)).where(path="enc.*")')
    assert site.stack == "encoder"
