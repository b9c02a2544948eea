"""The language: what is read, what is printed, and the words for what is neither."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import peftgraph as pg
from peftgraph.sites.patterns.terms import Call, Either, Literal, Term, Through, Var, Window, Word

SWIGLU = "down = linear(mul(act(~gate), ~up)); gate = linear(x); up = linear(x); act = silu:swiglu|gelu:geglu"

LEAVES: list[Term] = [
    Var("x"),
    Var("h"),
    Word("weight"),
    Word("_"),
    Word("number"),
    Literal(2.0),
    Literal(-3),
    Literal(1e-6),
    Literal(True),
    Literal("tanh"),
    Literal((1, 2)),
]
HEADS = ["linear", "mul", "softmax", "nonlinear", "dropout", "conv2d", "norm"]
OPTIONS = st.lists(
    st.tuples(st.sampled_from(["dim", "groups"]), st.sampled_from([-1, 0.5, "none", None, (0, 1)])),
    max_size=2,
    unique_by=lambda item: item[0],
).map(tuple)


def grow(inner: st.SearchStrategy[Term]) -> st.SearchStrategy[Term]:
    some = st.lists(inner, min_size=1, max_size=3).map(tuple)
    tags = st.sampled_from(["", "one", "two"])
    return st.one_of(
        st.builds(Call, st.sampled_from(HEADS), some, OPTIONS, st.booleans()).filter(
            lambda call: call.head != "norm" or (len(call.args) == 1 and not call.options)
        ),
        st.builds(Through, inner),
        st.builds(lambda terms: Either(tuple(terms)), st.lists(st.tuples(inner, tags), min_size=2, max_size=3)),
    )


TERMS = st.recursive(st.sampled_from(LEAVES), grow, max_leaves=8)


@settings(deadline=None)
@given(TERMS, TERMS, st.booleans())
def test_a_pattern_prints_and_parses_back(first: Term, second: Term, cut: bool) -> None:
    body = Call("linear", (Var("h"), second))
    pattern = pg.Pattern(
        "own.unit", Call("add", (first, Var("y"))).named("z"), (Window(body, 0, 4) if cut else body).named("y")
    )
    assert pg.Pattern.parse(str(pattern)) == pattern
    assert hash(pg.Pattern.parse(str(pattern))) == hash(pattern)
    selector = pattern["y"] & pg.layers(0, 2)
    assert pg.parse_selector(str(selector)) == selector
    assert pg.parse_selector("own.unit.y&layers(0,2)", {"own.unit": pattern}) == selector


def test_python_and_text_make_the_same_value() -> None:
    x = pg.var("x")
    gate, up = pg.op.linear(x).named("gate"), pg.op.linear(x).named("up")
    built = pg.Pattern("swiglu", pg.op.linear(pg.op.act(~gate) * ~up).named("down"), "act = silu:swiglu | gelu:geglu")
    assert built == pg.Pattern("swiglu", SWIGLU)
    assert str(built) == f"swiglu: {SWIGLU}"


def test_operators_of_python_are_operators_of_the_graph() -> None:
    a, b = pg.var("a"), pg.var("b")
    term = (2 * a + b / 3 - a @ b) | ~b.tag("plain")
    assert str(term) == "sub(add(mul(2, a), div(b, 3)), matmul(a, b))|~(b:plain)"
    assert str(pg.op.softmax("~a|b", dim=-1)) == "softmax(~a|b, dim=-1)"
    assert str(pg.op.linear(a)[:8].named("y").inner) == "linear(a)[0:8]"  # pyright: ignore[reportAttributeAccessIssue]


def test_the_order_and_the_layout_of_the_text_are_free() -> None:
    text = """
        act  = silu:swiglu | gelu:geglu
        up   = linear(x)
        gate = linear(x); down = linear(mul(
            act(~gate),
            ~up,
        ))
    """.replace("~up,\n", "~up\n")
    assert pg.Pattern("swiglu", text) == pg.Pattern("swiglu", SWIGLU)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("y = liner(x)", "there is no operator 'liner'; did you mean 'linear'?"),
        ("y = linear(x", r"expected ',', found the end"),
        ("y = linear(x) z", "did not expect 'z' here"),
        ("y = linear($)", r"cannot read '\$'"),
        ("linear(x)", r"expected an equation, linear = \.\.\., or a condition"),
        ("y = silu?", r"only an operator is optional: silu\?\(\.\.\.\)"),
        ("y = silu?()", "an optional operator needs the value that may stand without it"),
        ("y = softmax(dim=-1, x)", "a term cannot follow name=value"),
        ("y = linear(x)[4:4]", r"is not empty, got \[4:4\]"),
        ("y = mul(a, linear(x)[0:4])", "a window belongs to a whole equation"),
        ("y = x", "it names no operator, so it would match anything"),
        ("y = ~linear(x)", r"write ~y where it is read"),
        ("y = linear(x); z = linear(x)", "exactly one value is read by no other equation; here: y, z"),
        ("y = linear(z); z = linear(y)", "none, the equations run in a circle"),
        ("y = linear(x); a = linear(b); b = linear(a)", "the equations of a, b run in a circle"),
        ("y = linear(y)", "none, the equations run in a circle"),
        ("y = linear(x); y = silu(x)", r"y is defined twice, as linear\(x\) and as silu\(x\)"),
        ("mean = linear(mean(x))", r"mean is used as an operator, so mean = \.\.\. lists operators"),
        ("weight = linear(x)", "'weight' cannot name a value"),
        ("y = act(x); act = silu(x)", r"act is used as an operator, so act = \.\.\. lists operators, not silu\(x\)"),
        ("y = act(x); act = silu|projection", "lists operators, not projection"),
        ("y = projection(x, w)", r"projection is written projection\(x\)"),
        ("y = linear(x); size(q, 0) == 1", "there is no value q"),
        ("y = linear(x); 1 == 2", "it speaks of no value"),
        ("y = linear(x); size(x, 0.5) == 1", "expected a whole number, found '0.5'"),
        ("y = linear(x); size(x, 0) = 1", "expected one of == != <= >= < >, found '='"),
    ],
)
def test_what_is_no_pattern_says_why(text: str, words: str) -> None:
    with pytest.raises(pg.PeftGraphError, match=words):
        pg.Pattern("own", text)


def test_an_error_points_at_its_place() -> None:
    with pytest.raises(pg.PeftGraphError) as raised:
        pg.Pattern("own", "y = linear(z)\nz = mul(x, $)")
    assert str(raised.value).splitlines()[1:] == ["  z = mul(x, $)", "             ^"]


@pytest.mark.parametrize("name", ["attention.mine", "ffn", "layers", "pattern", "two words", "", "a..b"])
def test_names_that_mean_something_else_are_refused(name: str) -> None:
    with pytest.raises(pg.PeftGraphError, match="pattern"):
        pg.Pattern(name, "y = linear(x)")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("swiglu", "swiglu is no value of the pattern; there are swiglu.down, swiglu.gate, swiglu.up, swiglu.*"),
        ("swiglu.gat", "swiglu.gat is no value of the pattern"),
        ("swiglu.x", "swiglu.x is no value of the pattern"),
        ("swigl.gate", "unknown word 'swigl.gate'"),
        ('pattern("y = linear(x)").y', "name is made of identifiers|expected name: equations"),
        ('pattern("own: y = linear(x)")', "own is no value of the pattern; there are own.y"),
    ],
)
def test_selectors_that_name_no_value_are_refused(text: str, words: str) -> None:
    with pytest.raises(pg.PeftGraphError, match=words):
        pg.parse_selector(text, {"swiglu": pg.Pattern("swiglu", SWIGLU)})


def test_a_pattern_of_one_value_is_its_own_selector() -> None:
    from peftgraph.passes import LoRA

    one = pg.Pattern("own", "y = linear(x)")
    assert LoRA(at=one).at == one["y"]  # pyright: ignore[reportArgumentType]
    with pytest.raises(pg.PeftGraphError, match=r"there are swiglu\.down"):
        LoRA(at=pg.Pattern("swiglu", SWIGLU))  # pyright: ignore[reportArgumentType]
