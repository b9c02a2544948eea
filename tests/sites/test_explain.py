"""Explanations: why a site is one, and what came closest where there is none; golden texts."""

# ruff: noqa: E501
from __future__ import annotations

import copy
import re
from collections.abc import Callable
from functools import cache

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import peftgraph as pg
from peftgraph.sites.explanations.explanation import reasons_for

D = 12


class Net(nn.Module):
    """Linear layers a, b, ... of the given widths, and a function of them and the input."""

    def __init__(self, forward: Callable[..., torch.Tensor], *parts: nn.Module) -> None:
        super().__init__()
        for name, part in zip("abcdefg", parts, strict=False):
            self.add_module(name, part)
        self.function = forward

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.function(*self.children(), x)


class Block(nn.Module):
    """A pre-norm block: one linear for q, k and v, explicit softmax, a gated feed-forward."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.norm2 = nn.LayerNorm(D), nn.LayerNorm(D)
        self.qkv, self.out = nn.Linear(D, 3 * D), nn.Linear(D, D)
        self.gate, self.up, self.down = nn.Linear(D, 20), nn.Linear(D, 20), nn.Linear(20, D)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (part.unflatten(-1, (3, 4)).transpose(1, 2) for part in self.qkv(self.norm(x)).split(D, dim=-1))
        mixed = torch.softmax(q @ k.transpose(-1, -2) / 2, dim=-1) @ v
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        y = self.norm2(x)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))


def linears(*sizes: tuple[int, int]) -> list[nn.Module]:
    return [nn.Linear(i, o) for i, o in sizes]


def two_products(a: nn.Module, b: nn.Module, c: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Linear attention but for its keys, which nothing projects."""
    return x + c(F.elu(a(x)) @ (F.elu(x).transpose(1, 2) @ b(x)))


class Pooling(nn.Module):
    """Attention whose query is learned."""

    def __init__(self) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.randn(1, 2, D))
        self.k, self.v, self.o = nn.Linear(D, D), nn.Linear(D, D), nn.Linear(D, D)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.o(F.scaled_dot_product_attention(self.query.expand(x.shape[0], -1, -1), self.k(x), self.v(x)))


MODELS: dict[str, Callable[[], nn.Module]] = {
    "blocks": lambda: nn.Sequential(Block(), Block()),
    "convolution": lambda: Net(lambda a, x: F.relu(a(x.mT)).mean(-1), nn.Conv1d(D, D, 3, padding=1)),
    "recurrent": lambda: Net(lambda a, x: a(x)[0], nn.GRU(D, D, batch_first=True)),
    "classifier": lambda: Net(lambda a, x: torch.softmax(a(x), -1), nn.Linear(D, 5)),
    "no value": lambda: Net(lambda a, b, x: torch.softmax(a(x) @ b(x).mT, -1).sum(-1), *linears((D, D), (D, D))),
    "two products": lambda: Net(two_products, *linears(*[(D, D)] * 3)),
    "learned query": Pooling,
    "no join": lambda: Net(lambda a, b, x: b(F.relu(a(x))), *linears((D, 8), (8, 4))),
    "no bend": lambda: Net(lambda a, b, c, x: x + c(a(x) * b(x)), *linears((D, 8), (D, 8), (8, D))),
    "no gate": lambda: Net(lambda a, b, x: x + b(F.gelu(a(x))), *linears((D, 8), (8, D))),
    "no statistic": lambda: Net(lambda a, x: a(x) * torch.ones(D), nn.Linear(D, D)),
    "no root": lambda: Net(lambda a, x: (y := a(x)) / y.abs().amax(-1, keepdim=True), nn.Linear(D, D)),
    "light branch": lambda: Net(lambda a, x: a(x + F.relu(x)), nn.Linear(D, 4)),
    "positions": lambda: Net(lambda a, b, x: a(x) + b(torch.arange(x.shape[1])), nn.Linear(D, D), nn.Embedding(20, D)),
}


@cache
def traced(name: str) -> pg.Program:
    torch.manual_seed(0)
    return pg.trace(MODELS[name](), (torch.randn(3, 7, D),))


WHY = {
    "attention.q": """
1.attention.q at 1.qkv (12 x 12, columns 0:12)
  1. the argument of the softmax %1.softmax leads back to %1.matmul, a product of two signals (q k^T), and its result on to %1.attention.core, a product with a third (v)
  2. q is %1.transpose, the factor along whose axis the softmax does not run; it leads back through split, unflatten, transpose to %1.attention.q+k+v, a projection by @1.qkv.weight
  3. columns 0:12 of 36 arrive there, as 3 heads of 4; the projection reads %1.norm.0 (a norm)
  4. q and k are projections of one value, %1.norm.0: self attention
  5. layer 1 of 2: the stream from %input repeats (self attention, feed-forward) 2 times, here in %1.add, %1.add_2

    %1.norm.0: f32[B, S, 12] = layer_norm(%0.add_2, [12], @1.norm.weight, @1.norm.bias, 1e-05, False)
    %1.attention.q+k+v: f32[B, S, 36] = linear(%1.norm.0, @1.qkv.weight, @1.qkv.bias)
    %1.split: (f32[B, S, 12], f32[B, S, 12], f32[B, S, 12]) = split(%1.attention.q+k+v, 12, -1)
    %1.getitem: f32[B, S, 12] = getitem(%1.split, 0)
    %1.unflatten: f32[B, S, 3, 4] = unflatten(%1.getitem, -1, [3, 4])
    %1.transpose: f32[B, 3, S, 4] = transpose(%1.unflatten, 1, 2)
    %1.matmul: f32[B, 3, S, S] = matmul(%1.transpose, %1.transpose_4)
    %1.softmax: f32[B, 3, S, S] = softmax(%1.div, -1)
    %1.attention.core: f32[B, 3, S, 4] = matmul(%1.softmax, %1.transpose_3)
    %1.add: f32[B, S, 12] = add(%0.add_2, %1.attention.o)
    %1.add_2: f32[B, S, 12] = add(%1.add, %1.ffn.down)
""",
    "ffn.gate": """
1.ffn.gate at 1.gate (20 x 12)
  1. %1.ffn.down is a projection by @1.down.weight whose result enters a residual add
  2. %1.add_2 adds %1.ffn.down to %1.add, the value it started from: a residual add
  3. its input leads back through silu, mul to projections only, %1.ffn.gate, %1.ffn.up, with a nonlinearity: %1.silu (silu)
  4. its two sides of a multiplication carry different columns; the one of all 20 columns is nonlinear: gate
  5. layer 1 of 2: the stream from %input repeats (self attention, feed-forward) 2 times, here in %1.add, %1.add_2

    %1.add: f32[B, S, 12] = add(%0.add_2, %1.attention.o)
    %1.ffn.gate: f32[B, S, 20] = linear(%1.norm.1, @1.gate.weight, @1.gate.bias)
    %1.silu: f32[B, S, 20] = silu(%1.ffn.gate)
    %1.ffn.up: f32[B, S, 20] = linear(%1.norm.1, @1.up.weight, @1.up.bias)
    %1.ffn.hidden: f32[B, S, 20] = mul(%1.silu, %1.ffn.up)
    %1.ffn.down: f32[B, S, 12] = linear(%1.ffn.hidden, @1.down.weight, @1.down.bias)
    %1.add_2: f32[B, S, 12] = add(%1.add, %1.ffn.down)
""",
}


@pytest.mark.parametrize("selector", WHY)
def test_why(selector: str) -> None:
    assert str(traced("blocks").sites.explain(selector, layer=1)) == WHY[selector].strip("\n")


def test_every_site_has_evidence_and_its_excerpt_is_the_printed_text() -> None:
    program = traced("blocks")
    lines = {line.strip() for line in program.text().splitlines()}
    for site in program.sites:
        answer = program.sites.explain(site.role, layer=site.layer, path=re.escape(site.path))
        reasons = [one for one in answer.reasons if one.site == site]
        assert len(reasons) == 1, site.id
        assert reasons[0].steps, site.id
        assert reasons[0].excerpt, site.id
        assert lines.issuperset(reasons[0].excerpt), site.id


@pytest.mark.parametrize("name", ["BertModel", "MixtralForCausalLM", "T5ForConditionalGeneration"])
def test_every_site_of_a_family_has_evidence(sites_of: Callable[..., pg.Sites], name: str) -> None:
    sites = sites_of(name)
    assert sites.origin is not None
    for site in sites:
        reasons = reasons_for(sites.origin, site)
        assert reasons.steps, site.id
        assert reasons.excerpt, site.id
        assert (site.layer is not None) == reasons.steps[-1].startswith("layer "), site.id


NEAREST = {
    ("convolution", "attention.q"): """
attention.q: 0 sites in 4 nodes
    nothing plays attention.q
    no softmax, no scaled_dot_product_attention and no two products of signals one after the other; what mixes positions is %conv1d (conv1d)
    roles found: conv (1), bias (1)
""",
    ("recurrent", "attention"): """
attention: 0 sites in 4 nodes
    nothing plays attention
    no softmax, no scaled_dot_product_attention and no two products of signals one after the other; what mixes positions is %gru (gru)
    roles found: matrix (2)
""",
    ("classifier", "attention.q"): """
attention.q: 0 sites in 2 nodes
    nothing plays attention.q
    closest: attention.core at %head.softmax, 1 of 5 conditions
    expected a product of two signals (q k^T) behind it, found %head (linear)
        %head: f32[B, S, 5] = linear(%x, @a.weight, @a.bias)
      > %head.softmax: f32[B, S, 5] = softmax(%head, -1)
    roles found: head (1), bias (1)
""",
    ("no value", "attention.v"): """
attention.v: 0 sites in 6 nodes
    nothing plays attention.v
    closest: attention.core at %head.1.softmax, 2 of 5 conditions
    expected a product of the result with a third value (v), found %head.1.sum (sum)
        %head.1.matmul: f32[B, S, S] = matmul(%head.0, %head.1.mT)
      > %head.1.softmax: f32[B, S, S] = softmax(%head.1.matmul, -1)
        %head.1.sum: f32[B, S] = sum(%head.1.softmax, [-1])
    roles found: head (2), bias (2)
""",
    ("two products", "attention.q"): """
attention.q: 0 sites in 9 nodes
    nothing plays attention.q
    closest: attention.core at %0.matmul_2, 2 of 5 conditions
    expected a softmax, found no operator between %0.matmul and %0.matmul_2, two products of signals (linear attention)
        %0.matmul: f32[B, 12, 12] = matmul(%0.transpose, %0.projection.1)
      > %0.matmul_2: f32[B, S, 12] = matmul(%0.elu, %0.matmul)
    roles found: projection (3), bias (3), block (1)
""",
    ("learned query", "attention.q"): """
attention.q: 0 sites in 6 nodes
    nothing plays attention.q
    closest: attention.q at %cross.attention.core, 4 of 5 conditions
    expected operands that lead back to projections, found @query behind q, %expand
        %expand: f32[B, 2, 12] = expand(@query, [%sym_size, -1, -1])
      > %cross.attention.core: f32[B, 2, 12] = scaled_dot_product_attention(%expand, %cross.attention.k, %cross.attention.v)
    roles found: matrix (1), attention.k (1), bias (3), attention.v (1), attention.core (1), attention.o (1)
""",
    ("learned query", "attention"): """
attention: 0 sites in 6 nodes
    nothing plays attention
    closest: attention at %cross.attention.o, 1 of 2 conditions
    expected a residual add that its result enters, found the model's output
        %cross.attention.core: f32[B, 2, 12] = scaled_dot_product_attention(%expand, %cross.attention.k, %cross.attention.v)
      > %cross.attention.o: f32[B, 2, 12] = linear(%cross.attention.core, @o.weight, @o.bias)
    roles found: matrix (1), attention.k (1), bias (3), attention.v (1), attention.core (1), attention.o (1)
""",
    ("no join", "ffn.down"): """
ffn.down: 0 sites in 3 nodes
    nothing plays ffn.down
    closest: ffn.down at %head, 3 of 4 conditions
    expected a projection whose result enters a residual add, found the model's output
        %projection: f32[B, S, 8] = linear(%x, @a.weight, @a.bias)
        %relu: f32[B, S, 8] = relu(%projection)
      > %head: f32[B, S, 4] = linear(%relu, @b.weight, @b.bias)
    roles found: projection (1), bias (2), head (1)
""",
    ("no bend", "ffn.up"): """
ffn.up: 0 sites in 5 nodes
    nothing plays ffn.up
    closest: ffn.down at %0.projection.2, 2 of 4 conditions
    expected a nonlinearity between it and the projection before it, found mul
        %0.projection.0: f32[B, S, 8] = linear(%x, @a.weight, @a.bias)
        %0.projection.1: f32[B, S, 8] = linear(%x, @b.weight, @b.bias)
        %0.mul: f32[B, S, 8] = mul(%0.projection.0, %0.projection.1)
      > %0.projection.2: f32[B, S, 12] = linear(%0.mul, @c.weight, @c.bias)
        %0.add: f32[B, S, 12] = add(%x, %0.projection.2)
    roles found: projection (3), bias (3), block (1)
""",
    ("no gate", "ffn.gate"): """
ffn.gate: 0 sites in 4 nodes
    nothing plays ffn.gate
    closest: ffn.gate at %0.ffn.down, 1 of 2 conditions
    expected a multiplication of two values of different columns behind it, found gelu
        %0.ffn.hidden: f32[B, S, 8] = gelu(%0.ffn.up)
      > %0.ffn.down: f32[B, S, 12] = linear(%0.ffn.hidden, @b.weight, @b.bias)
    roles found: ffn.up (1), bias (2), ffn.hidden (1), ffn.down (1), block (1), ffn (1)
""",
    ("no gate", "head"): """
head: 0 sites in 4 nodes
    nothing plays head
    closest: head at %0.ffn.down, 1 of 2 conditions
    expected no residual add, attention or other projection that reads what follows from it, found %0.add (add)
      > %0.ffn.down: f32[B, S, 12] = linear(%0.ffn.hidden, @b.weight, @b.bias)
        %0.add: f32[B, S, 12] = add(%x, %0.ffn.down)
    roles found: ffn.up (1), bias (2), ffn.hidden (1), ffn.down (1), block (1), ffn (1)
""",
    ("no statistic", "norm"): """
norm: 0 sites in 3 nodes
    nothing plays norm
    closest: norm at %head.mul, 1 of 4 conditions
    expected a second factor that depends on the first, found a constant
        %head: f32[B, S, 12] = linear(%x, @a.weight, @a.bias)
        %head.ones: f32[12] = ones([12], device=cpu)
      > %head.mul: f32[B, S, 12] = mul(%head, %head.ones)
    roles found: head (1), bias (1)
""",
    ("no root", "norm"): """
norm: 0 sites in 4 nodes
    nothing plays norm
    closest: norm at %head.div, 3 of 4 conditions
    expected a reduction and a root of the first factor alone, found abs, amax on the way from %head to %head.amax
        %head.abs: f32[B, S, 12] = abs(%head)
        %head.amax: f32[B, S, 1] = amax(%head.abs, [-1], True)
      > %head.div: f32[B, S, 12] = div(%head, %head.amax)
    roles found: head (1), bias (1)
""",
    ("light branch", "block"): """
block: 0 sites in 3 nodes
    nothing plays block
    closest: block at %add, 3 of 5 conditions
    expected a projection, attention, convolution or pooling on the branch, found no projection, attention or convolution from %x on
        %relu: f32[B, S, 12] = relu(%x)
      > %add: f32[B, S, 12] = add(%x, %relu)
    roles found: head (1), bias (1)
""",
    ("positions", "embedding"): """
embedding: 0 sites in 5 nodes
    nothing plays embedding
    closest: embedding at %head.embedding, 1 of 2 conditions
    expected an index that comes from an input, found %head.arange (arange)
        %head.arange: i64[S] = arange(%sym_size, device=cpu)
      > %head.embedding: f32[S, 12] = embedding(@b.weight, %head.arange)
    roles found: head (1), bias (1), matrix (1)
""",
    ("blocks", "attention.q&layers(5)"): """
attention.q&layers(5): 0 sites in 56 nodes
    layers(5) is beyond the model, which has layers 0 to 1
    the stream from %input repeats (self attention, feed-forward) 2 times
""",
    ("blocks", 'ffn.up.where(out_features=">20")'): """
ffn.up.where(out_features=">20"): 0 sites in 56 nodes
    where(out_features=">20") removed all 2 sites of ffn.up; their shapes (out x in): 20 x 12
""",
}


@pytest.mark.parametrize(("name", "selector"), NEAREST)
def test_the_nearest_miss(name: str, selector: str) -> None:
    with pytest.raises(pg.NoMatch) as raised:
        traced(name).sites.require(selector)
    assert str(raised.value) == NEAREST[name, selector].strip("\n")
    assert str(traced(name).sites.explain(selector)) == str(raised.value)


def test_sites_without_a_role_come_with_a_reason() -> None:
    assert (
        str(traced("two products").sites.unmatched)
        == """\
projection      path  shape    closest    why not
0.projection.0  a     12 x 12  attention  its result enters the product %0.matmul_2, which belongs to no attention
0.projection.1  b     12 x 12  attention  its result enters the product %0.matmul, which belongs to no attention
0.projection.2  c     12 x 12  ffn.down   expected projections alone behind its input, none of them of attention, found %0.matmul_2 (matmul)"""
    )
    assert str(traced("blocks").sites.unmatched) == "Every projection belongs to a site."
    assert [(one.site.path, one.closest) for one in traced("no join").sites.unmatched] == [("a", "ffn.up")]


def test_an_explanation_narrows_by_keyword_and_lists_what_it_does_not_spell_out() -> None:
    sites = traced("blocks").sites
    assert sites.explain("attention.q", layer=-1).reasons == sites.explain("attention.q&layers(1)").reasons
    assert sites.explain("norm", path="0.*").selector == 'norm.where(path="0.*")'
    many = sites.explain("attention.*")
    assert [one.site.id for one in many.reasons] == [f"0.attention.{letter}" for letter in "qkvo"]
    assert many.others == tuple(f"1.attention.{letter}" for letter in "qkvo")
    assert str(many).endswith("and 4 more: 1.attention.q, 1.attention.k, 1.attention.v, 1.attention.o")


def test_sites_are_a_value_and_keep_no_weights() -> None:
    program = traced("blocks")
    origin = program.sites.origin
    assert origin is not None
    assert not origin.integers
    assert copy.deepcopy(program.sites) is program.sites
    bare = copy.copy(program.sites).__getstate__()
    assert bare["origin"] is None
    assert pg.Sites(program.sites.items, program.sites.misses) == program.sites


def test_explaining_reads_the_base_and_changes_nothing() -> None:
    program = traced("blocks")
    before = program.text()
    first = str(program.sites.explain("attention.k", layer=0))
    assert program.text() == before
    assert str(program.sites.explain("attention.k", layer=0)) == first
