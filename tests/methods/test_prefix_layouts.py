"""Prefixes on hand-written attention, in any order of axes: each against its own code with longer k and v."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
import zoo
from torch import Tensor, nn
from torch.nn import functional as F

import peftgraph as pg
from peftgraph.authoring import Builder, Match, Multiply, Pass, Rule
from peftgraph.authoring.modules import init
from peftgraph.passes import Prefix, SerialAdapter, ZeroInitPrefix

Core = Callable[[Tensor, Tensor, Tensor], Tensor]
D, H, L = 12, 3, 5
E = torch.einsum


def apart(x: Tensor) -> Tensor:
    return x.unflatten(-1, (H, -1)).transpose(1, 2)


def inside(x: Tensor) -> Tensor:
    return x.unflatten(-1, (H, -1))


def joined(x: Tensor) -> Tensor:
    return x.transpose(1, 2).flatten(2)


def flattened(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (apart(x).reshape(x.shape[0] * H, x.shape[1], -1) for x in (q, k, v))
    return joined((torch.bmm(q, k.transpose(1, 2)).softmax(-1) @ v).view(-1, H, *q.shape[1:]))


def written_out(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = apart(q) @ apart(k).mT
    weights = (scores - scores.amax(-1, keepdim=True)).exp()
    return joined((weights / weights.sum(-1, keepdim=True)) @ apart(v))


CORES: dict[str, tuple[Core, int]] = {
    "nothing in between": (lambda q, k, v: joined((apart(q) @ apart(k).mT).softmax(-1) @ apart(v)), D),
    "permuted": (
        lambda q, k, v: joined((apart(q) @ inside(k).permute(0, 2, 3, 1) / 2).softmax(-1) @ apart(v)),
        D,
    ),
    "heads inside": (
        lambda q, k, v: E("bhij,bjhd->bihd", E("bihd,bjhd->bhij", inside(q), inside(k)).softmax(-1), inside(v)).flatten(
            2
        ),
        D,
    ),
    "heads last": (
        lambda q, k, v: E("bijh,bjhd->bihd", E("bihd,bjhd->bijh", inside(q), inside(k)).softmax(2), inside(v)).flatten(
            2
        ),
        D,
    ),
    "shared keys": (
        lambda q, k, v: joined(E("bhij,bjd->bhid", E("bhid,bjd->bhij", apart(q), k).softmax(-1), v)),
        D // H,
    ),
    "one head, features first": (lambda q, k, v: (v.mT @ (q @ k.mT).softmax(-1).mT).mT, D),
    "heads and batch on one axis": (flattened, D),
    "softmax written out": (written_out, D),
    "one operator": (lambda q, k, v: F.scaled_dot_product_attention(q, k, v), D),
}


class Attention(nn.Module):
    def __init__(self, core: Core, shared: int = D) -> None:
        super().__init__()
        self.core = core
        self.q, self.k, self.v, self.o = (nn.Linear(D, wide) for wide in (D, shared, shared, D))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.o(self.core(self.q(x), self.k(x), self.v(x)))


def tuned(model: nn.Module, method: Pass) -> pg.Program:
    torch.manual_seed(1)
    return zoo.randomise(pg.trace(model, (torch.randn(2, 7, D, dtype=torch.float64),)).apply(method), 0.5)


@pytest.mark.parametrize("name", CORES)
def test_rows_stand_in_front_of_keys_and_values(name: str) -> None:
    core, shared = CORES[name]
    model = Attention(core, shared).double().eval()
    program = tuned(model, Prefix(length=L, hidden=None))
    own = {key.rpartition(".")[2]: rows for key, rows in program.table.trainable.items()}

    def longer(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k, v = (torch.cat([own[f"prefix_{n}"].expand(len(x), -1, -1), x], 1) for n, x in (("k", k), ("v", v)))
        if core is not flattened:
            return core(q, k, v)
        return joined(F.scaled_dot_product_attention(*map(apart, (q, k, v)), scale=1.0))

    theirs = Attention(longer, shared).double().eval()
    theirs.load_state_dict(model.state_dict())
    for sizes in ((2, 7), (3, 9)):
        x = torch.randn(*sizes, D, dtype=torch.float64)
        assert float((program.module().eval()(x) - theirs(x)).detach().abs().max()) < 1e-12
        assert float((model(x) - theirs(x)).detach().abs().max()) > 1e-3


@pytest.mark.parametrize("name", ["heads inside", "shared keys", "heads and batch on one axis"])
def test_gates_are_those_of_heads(name: str) -> None:
    core, shared = CORES[name]
    model = Attention(core, shared).double().eval()
    program = tuned(model, ZeroInitPrefix(length=L))
    own = {key.rpartition(".")[2]: value for key, value in program.table.trainable.items()}
    x = torch.randn(3, 9, D, dtype=torch.float64)
    q, rows = model.q(x), own["prefix"]
    k, v = (one(rows).expand(3, -1, -1) for one in (model.k, model.v))
    q, k, v = apart(q), *(apart(one) if shared == D else one[:, None] for one in (k, v))
    more = own["gate"][:, None, None] * F.scaled_dot_product_attention(
        q, k.expand(-1, H, -1, -1), v.expand(-1, H, -1, -1), scale=1.0
    )
    want = x + model.o(core(model.q(x), model.k(x), model.v(x)) + joined(more))
    assert float((program.module().eval()(x) - want).detach().abs().max()) < 1e-12


def channels(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (apart(x).mT for x in (q, k, v))
    return ((q @ k.mT).softmax(-1) @ v).permute(0, 3, 1, 2).flatten(2)


def several_shared(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = (apart(q) @ apart(k).mT).flatten(2)
    return joined((scores * 2).view(-1, H, q.shape[1], k.shape[1]).softmax(-1) @ apart(v))


@pytest.mark.parametrize(
    ("core", "words"),
    [
        (channels, "weighs features, each with a number for every position, and not positions"),
        (several_shared, "past which no rows of keys and values can be led"),
    ],
)
def test_what_takes_no_rows_is_refused_in_words(core: Core, words: str) -> None:
    with pytest.raises(pg.PeftGraphError, match=words):
        pg.trace(Attention(core), (torch.randn(2, 7, D),)).apply(Prefix(length=L, hidden=None))


def test_causal_rows_lie_in_memory_as_the_model_views_them() -> None:
    def core(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        mixed = F.scaled_dot_product_attention(*map(apart, (q, k, v)), is_causal=True)
        return mixed.transpose(1, 2).contiguous().view(*q.shape[:2], D)

    module = tuned(Attention(core).double().eval(), Prefix(length=L, hidden=None)).module().eval()
    x = torch.randn(3, 9, D, dtype=torch.float64)
    first = module(x)
    assert torch.allclose(first[:, :4], module(x[:, :4]), rtol=0, atol=1e-12)


# ports, and what is left out


@dataclass(frozen=True, kw_only=True)
class Scaled(Pass):
    """One operand of an attention times a vector over heads, (H, 1, 1), or over features."""

    word = "scaled"
    port: str
    over_features: bool = False

    def rules(self) -> list[Rule]:
        def delta(m: Match, op: Builder):
            sizes = (D // H,) if self.over_features else (H, 1, 1)
            return op.param("scale", sizes, init.normal(1.0))

        return [Rule(at=pg.attention.core, delta=delta, join=Multiply(port=self.port), fold="no")]


@pytest.mark.parametrize("port", ["q", "k", "v"])
def test_ports_of_written_attention_are_those_of_the_operator(port: str) -> None:
    written = Attention(lambda q, k, v: joined((apart(q) @ apart(k).mT / 2).softmax(-1) @ apart(v)))
    fused = Attention(lambda q, k, v: joined(F.scaled_dot_product_attention(*map(apart, (q, k, v)))))
    fused.load_state_dict(written.state_dict())
    x = torch.randn(3, 9, D, dtype=torch.float64)
    for over_features in (False, True):
        a, b = (
            tuned(one.double().eval(), Scaled(port=port, over_features=over_features)).module().eval()(x)
            for one in (written, fused)
        )
        assert float((a - b).detach().abs().max()) < 1e-12
        assert float((a - written(x)).detach().abs().max()) > 1e-3


def test_the_mask_of_written_attention_is_a_port() -> None:
    def core(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        bias = torch.arange(k.shape[1], dtype=q.dtype, device=q.device) / 4
        return joined((apart(q) @ apart(k).mT + bias).softmax(-1) @ apart(v))

    @dataclass(frozen=True, kw_only=True)
    class Shift(Pass):
        word = "shift"

        def rules(self) -> list[Rule]:
            def delta(m: Match, op: Builder):
                return op.param("by", (H, 1, 1), init.zeros)

            return [Rule(at=pg.attention.core, delta=delta, join=Multiply(port="mask"), fold="no")]

    model = Attention(core).double().eval()
    program = pg.trace(model, (torch.randn(2, 7, D, dtype=torch.float64),)).apply(Shift())
    x = torch.randn(3, 9, D, dtype=torch.float64)
    bare = Attention(CORES["nothing in between"][0]).double().eval()
    bare.load_state_dict(model.state_dict())
    assert float((program.module().eval()(x) - bare(x)).detach().abs().max()) < 1e-12


def test_a_pass_on_sublayers_says_which_it_leaves_out() -> None:
    class Plain(Attention):
        def forward(self, x: Tensor) -> Tensor:
            return self.o(self.core(self.q(x), self.k(x), self.v(x)))

    core = CORES["nothing in between"][0]
    program = pg.trace(nn.Sequential(Attention(core), Plain(core), nn.Linear(D, 2)), (torch.randn(2, 7, D),))
    with pytest.warns(
        pg.LeftOut, match=r"leaves out 1 attention\(s\) of this model:\n  attention at 1: .* no residual"
    ):
        changed = program.apply(SerialAdapter(at=pg.attention, width=4))
    assert [one.site.path for one in changed.left_out] == ["1"]
    assert program.apply(SerialAdapter(at=pg.attention & pg.layers(0), width=4)).left_out == ()
    assert changed.remove().left_out == ()
