"""Where patterns match, where near ones do not and why, and what must make no difference."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx, nn
from torch.nn import functional as F

import peftgraph as pg
from peftgraph.sites import find_sites
from peftgraph.sites.dataflow import ops

Trace = Callable[..., pg.Program]
SWIGLU = pg.Pattern(
    "swiglu", "down = linear(mul(act(~gate), ~up)); gate = linear(x); up = linear(x); act = silu:swiglu | gelu:geglu"
)
FUSED = pg.Pattern(
    "fused", "out = linear(mul(silu(~c), sigmoid(~z))); c = conv1d(~u, w); w = weight; u = linear(x); z = linear(x)"
)


def paths(program: pg.Program, selector: pg.Selector) -> list[str]:
    return [site.path for site in program.with_patterns(selector).sites.select(selector)]


def miss(program: pg.Program, pattern: pg.Pattern) -> str:
    """The words of a search without a match."""
    with pytest.raises(pg.NoMatch) as raised:
        program.with_patterns(pattern).sites.require(pattern[pattern.root])
    return "\n".join(str(raised.value).splitlines()[-2:])


def test_a_gated_unit(gated: pg.Program) -> None:
    assert paths(gated, SWIGLU["gate"]) == ["0.g", "1.g"]
    assert paths(gated, SWIGLU["up"]) == ["0.u", "1.u"]
    assert paths(gated, SWIGLU["down"]) == ["0.w", "1.w"]
    assert paths(gated, SWIGLU["*"]) == ["0.g", "0.u", "0.w", "1.g", "1.u", "1.w"]


@pytest.mark.parametrize(("act", "tag"), [(F.silu, "swiglu"), (F.gelu, "geglu")])
@pytest.mark.parametrize("swap", [False, True])
def test_alternatives_are_tagged_and_products_commute(
    gated_with: Callable[..., nn.Module], trace: Trace, act: Callable[[Tensor], Tensor], tag: str, swap: bool
) -> None:
    program = trace(gated_with(act, swap)).with_patterns(SWIGLU)
    (gate,) = program.sites.select(SWIGLU["gate"])
    assert (gate.path, gate.tags, gate.role, gate.shape) == ("g", (tag,), "swiglu.gate", (20, 12))


def test_the_wrong_activation_is_named(gated_with: Callable[..., nn.Module], trace: Trace) -> None:
    assert miss(trace(gated_with(torch.tanh)), SWIGLU) == (
        "    closest: swiglu, 2 of 5 operators\n"
        "    down : expected silu or gelu, found tanh    <- %tanh = tanh(%projection.0)"
    )


def test_a_shared_variable_ties_two_values(trace: Trace) -> None:
    class Apart(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.g, self.u, self.w = nn.Linear(12, 20), nn.Linear(12, 20), nn.Linear(20, 12)

        def forward(self, x: Tensor) -> Tensor:
            return self.w(F.silu(self.g(x)) * self.u(x.tanh()))

    words = miss(trace(Apart()), SWIGLU)
    assert words == (
        "    closest: swiglu, 5 of 5 operators\n    up : expected x, which is %x, found tanh    <- %tanh = tanh(%x)"
    )


def test_columns_are_those_that_arrive(fused: pg.Program) -> None:
    sites = fused.with_patterns(FUSED).sites
    found = [(site.id, str(site.columns), site.layer) for site in sites.select(FUSED["u"] | FUSED["z"])]
    assert found == [
        ("0.fused.u", "0:20", 0),
        ("0.fused.z", "20:40", 0),
        ("1.fused.u", "0:20", 1),
        ("1.fused.z", "20:40", 1),
    ]
    (convolution, _) = sites.select(FUSED["c"])
    assert (convolution.weight, convolution.feature_axis) == (None, -2)


def test_a_site_says_in_which_match_it_stands(fused: pg.Program) -> None:
    text = str(fused.with_patterns(FUSED).sites.explain(FUSED["z"] & pg.layers(1)))
    assert (
        "%1.projection.0 is `z` in a match of the pattern fused, where c is %1.conv1d, out is %1.projection.1, "
        "u is %1.projection.0, w is @1.conv.weight, x is %0.add"
    ) in text


def test_a_window_names_columns_and_must_fit(gated: pg.Program) -> None:
    cut = pg.Pattern("cut", "y = linear(mul(~g, _)); g = silu(h); h = linear(x)[4:10]")
    (site, _) = gated.with_patterns(cut).sites.select(cut["h"])
    assert (str(site.columns), site.shape, site.bias) == ("4:10", (6, 12), pg.sites.site.Bias("0.g.bias", site.columns))
    whole = pg.Pattern("cut", "y = linear(mul(~g, _)); g = silu(h); h = linear(x)[:]")
    assert gated.with_patterns(whole).sites.select(whole["h"])[0].columns is None
    wide = pg.Pattern("cut", "y = linear(mul(~g, _)); g = silu(h); h = linear(x)[4:21]")
    assert "h : expected a projection with the columns of linear(x)[4:21], found 20 columns" in miss(gated, wide)


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("y = projection(mul(~g, ~u)); g = nonlinear(h); h = projection(x); u = projection(x)", 2),
        ("y = linear(dropout?(relu?(mul(silu(g), u)))); g = linear(x); u = linear(x)", 2),
        ("y = linear(x, w); w = weight; size(w, 0) == 12", 2),
        ("y = linear(x, w); w = weight; size(w, 0) > size(w, 1)", 4),
        ("y = linear(x, w); w = weight; size(w, 0) >= 2 * size(w, 1)", 0),
        ("y = linear(x, weight, none)", 2),
        ("y = linear(x, weight, weight)", 4),
        ("y = linear(mul(silu(g), u)|silu(g)); g = linear(x); u = linear(x)", 2),
        ("y = linear(number)", 0),
        ("y = mul(z, 2.0); z = linear(x)", 0),
    ],
)
def test_what_terms_mean(gated: pg.Program, text: str, count: int) -> None:
    pattern = pg.Pattern("own", text)
    assert len(paths(gated, pattern["y"])) == count


class Scaled(nn.Module):
    """tanh-gelu, a number, a softmax along an axis, and a concatenation."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.n = nn.Linear(12, 12), nn.LayerNorm(12)

    def forward(self, x: Tensor) -> Tensor:
        y = F.gelu(self.a(self.n(x)), approximate="tanh") * 0.5
        return torch.softmax(torch.cat([y, x], -1), -1)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("y = gelu(z, approximate='tanh'); z = linear(norm(x))", ""),
        ("y = gelu(z, approximate='none'); z = linear(x)", "expected approximate='none', found approximate='tanh'"),
        ("y = gelu(z, exact=true); z = linear(x)", "found exact=nothing, it has no such argument"),
        ("y = mul(gelu(z), 0.5); z = linear(x)", ""),
        ("y = mul(0.5, gelu(z)); z = linear(x)", ""),
        ("y = mul(gelu(z), number); z = linear(x)", ""),
        ("y = mul(gelu(z), 2); z = linear(x)", "expected 2, found 0.5"),
        ("y = mul(gelu(z), w); z = linear(x); w = weight", "expected weight, found 0.5"),
        ("y = mul(gelu(z), w); z = linear(x)", "expected a value, w, found 0.5"),
        ("y = softmax(cat(a, b), dim=-1); a = mul(g, _); g = gelu(z)", ""),
        ("y = softmax(cat(a, b), -1); a = mul(g, _); g = gelu(z)", ""),
        ("y = gelu(z, 1); z = linear(x)", "expected 2 arguments, found 1"),
        ("y = softmax(cat(a, b), dim=1); a = mul(g, _); g = gelu(z)", "expected dim=1, found dim=-1"),
        ("y = conv2d(x, weight)", "expected conv2d, found none in"),
    ],
)
def test_arguments(trace: Trace, text: str, reason: str) -> None:
    program, pattern = trace(Scaled()), pg.Pattern("own", text)
    if not reason:
        assert len(paths(program, pattern["y"])) == 1
    else:
        assert reason in miss(program, pattern)


def test_norms_and_attention_in_every_spelling(trace: Trace) -> None:
    class Reader(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k, self.v = (nn.Linear(12, 12) for _ in range(3))
            self.gain = nn.Parameter(torch.rand(12))

        def forward(self, x: Tensor) -> Tensor:
            h = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * self.gain
            scores = self.q(h) @ self.k(h).transpose(-1, -2) / 12**0.5
            return torch.softmax(scores, -1) @ self.v(h)

    pattern = pg.Pattern("own", "a = attention(~q, ~k, ~v); q = linear(h); k = linear(h); v = linear(h); h = norm(x)")
    program = trace(Reader()).with_patterns(pattern)
    found = {site.role: site for site in program.sites.select(pattern["*"])}
    assert [found[f"own.{name}"].path for name in ("q", "k", "v")] == ["q", "k", "v"]
    assert found["own.h"].scale == "gain"


# laws


@given(st.integers(0, 10**6))
@settings(max_examples=15, deadline=None)
def test_names_of_nodes_are_no_evidence(fused: pg.Program, seed: int) -> None:
    graph, names = fx.Graph(), {}
    shuffled = torch.randperm(len(fused.graph.nodes), generator=torch.Generator().manual_seed(seed)).tolist()
    for node, number in zip(fused.graph.nodes, shuffled, strict=True):
        names[node] = graph.create_node(
            node.op, node.target, *fx.map_arg((node.args, node.kwargs), names.__getitem__), name=f"n{number}"
        )
        names[node].meta = dict(node.meta)
    plain = find_sites(fused.graph, fused.table.tensors(), patterns=[FUSED])
    other = find_sites(graph, fused.table.tensors(), patterns=[FUSED])
    renamed = {node.name: new.name for node, new in names.items()}
    assert [renamed[site.op] for site in plain] == [site.op for site in other]
    assert [(s.id, s.columns, s.path, s.layer) for s in plain] == [(s.id, s.columns, s.path, s.layer) for s in other]


def excerpt(node: fx.Node, depth: int, names: dict[fx.Node, str], flips: list[bool]) -> str:
    """The text of a value as the graph computes it, `depth` operators deep; products and sums flipped as told."""
    if node.op == "get_attr":
        return "weight"
    if depth == 0 or node.op != "call_function":
        return names.setdefault(node, f"v{len(names)}")
    operator = ops.name(node)
    sides = [excerpt(one, depth - 1, names, flips) for one in node.all_input_nodes if ops.name(one) != "sym_size"]
    if operator in ("mul", "add") and len(sides) == 2 and flips.pop():
        sides.reverse()
    return f"{operator}({', '.join(sides)})"


@given(st.data())
@settings(max_examples=40, deadline=None)
def test_an_excerpt_of_a_graph_matches_it(fused: pg.Program, data: st.DataObject) -> None:
    nodes = [node for node in fused.graph.nodes if node.op == "call_function" and node.meta.get("label")]
    node = data.draw(st.sampled_from([one for one in nodes if ops.name(one) != "sym_size"]))
    flips = data.draw(st.lists(st.booleans(), min_size=20, max_size=20))
    text = excerpt(node, data.draw(st.integers(1, 4)), {}, flips)
    pattern = pg.Pattern("own", f"y = {text}")
    sites = find_sites(fused.graph, fused.table.tensors(), patterns=[pattern])
    matched = {site.ports["output"] for site in sites.select(pattern["y"])}
    assert node.name in matched, f"{pattern} does not match {node}"
