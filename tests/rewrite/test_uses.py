"""One weight at several places takes one adapter, which its uses share and fold together."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import peftgraph as pg
from peftgraph.authoring import Pass
from peftgraph.passes import IA3, DoRA, LoRA, Prefix, SerialAdapter, Train

F64 = torch.float64


class Block(nn.Module):
    """Attention of two heads and a feed-forward, pre-norm."""

    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.first, self.second = (nn.LayerNorm(width, dtype=F64) for _ in range(2))
        self.q, self.k, self.v, self.o = (nn.Linear(width, width, dtype=F64) for _ in range(4))
        self.up, self.down = nn.Linear(width, 10, dtype=F64), nn.Linear(10, width, dtype=F64)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        q, k, v = (one(h).unflatten(-1, (2, -1)).transpose(1, 2) for one in (self.q, self.k, self.v))
        x = x + self.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.second(x))))


class Looped(nn.Module):
    """One block, three times."""

    def __init__(self) -> None:
        super().__init__()
        self.block = Block()

    def forward(self, x: Tensor) -> Tensor:
        return self.block(self.block(self.block(x)))


class TiedHead(nn.Module):
    """A table of tokens that is the head's weight as well, read by a second embedding too where there are `two`."""

    def __init__(self, two: bool = False) -> None:
        super().__init__()
        self.embed, self.body, self.head = nn.Embedding(20, 6), nn.Linear(6, 6), nn.Linear(6, 20, bias=False)
        self.head.weight = self.embed.weight
        self.two = two
        self.double()

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        return self.head(torch.tanh(self.body(x)) + (self.embed(ids.flip(1)) if self.two else 0))


@pytest.fixture(scope="module")
def looped() -> tuple[nn.Module, Tensor, pg.Program]:
    torch.manual_seed(0)
    model, x = Looped().eval(), torch.randn(2, 5, 6, dtype=F64)
    return model, x, pg.trace(model, (x,))


def randomise(tuned: pg.Program) -> pg.Program:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for value in tuned.table.trainable.values():
            value.add_(torch.randn(value.shape, generator=generator, dtype=F64) * 0.3)
    return tuned


def check_fold(model: nn.Module, x: Tensor, tuned: pg.Program) -> None:
    expected = randomise(tuned).module().eval()(x)
    assert (expected - model(x)).abs().max() > 1e-3
    merged = pg.fold(tuned).write_back(copy.deepcopy(model)).eval()
    torch.testing.assert_close(merged(x), expected, rtol=0, atol=1e-11)


def test_uses_share_their_parameters_and_fold_together(looped: tuple[nn.Module, Tensor, pg.Program]) -> None:
    model, x, program = looped
    once = 2 * 2 * (6 + 6)
    tuned = program.apply(LoRA(rank=2))
    assert tuned.count().trainable == tuned.count().added == once
    assert len(tuned.count().changes) == 2
    assert tuned.remove().text() == program.text()
    for passes in ((LoRA(at="linear", rank=2),), (LoRA(rank=2), IA3()), (DoRA(at="attention.*", rank=2), IA3())):
        check_fold(model, x, program.apply(*passes))


def test_the_gradient_is_the_sum_over_the_uses(looped: tuple[nn.Module, Tensor, pg.Program]) -> None:
    model, x, program = looped
    tuned = randomise(program.apply(LoRA(at="ffn.up", rank=2, alpha=2.0)))
    tuned.module().eval()(x).square().sum().backward()
    a, b = (tuned.table.trainable[f"block.up.lora_{name}"] for name in "AB")
    factors = [one.detach().clone().requires_grad_() for one in (a, b)]
    eager = copy.deepcopy(model)
    nn.utils.parametrize.register_parametrization(eager.block.up, "weight", Plus(*factors))
    eager(x).square().sum().backward()
    for ours, theirs in zip((a, b), factors, strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=0, atol=1e-11)


class Plus(nn.Module):
    """W -> W + B A."""

    def __init__(self, a: Tensor, b: Tensor) -> None:
        super().__init__()
        self.factors = a, b

    def forward(self, weight: Tensor) -> Tensor:
        a, b = self.factors
        return weight + b @ a


def test_an_adapter_at_one_use_alone_does_not_fold(looped: tuple[nn.Module, Tensor, pg.Program]) -> None:
    model, x, program = looped
    for narrowed in ("attention.q&layers(1)", "attention.q&layers(1,3)"):
        tuned = randomise(program.apply(LoRA(at=narrowed, rank=2)))
        assert (tuned.module().eval()(x) - model(x)).abs().max() > 1e-3
        with pytest.raises(pg.NoFold, match=r"block\.q\.weight is read in 3 places"):
            pg.fold(tuned)


def test_what_has_no_weight_is_shared_too(looped: tuple[nn.Module, Tensor, pg.Program]) -> None:
    _, x, program = looped
    for method, count in (
        (SerialAdapter(width=2), 2 * (2 * 6 * 2 + 2 + 6)),
        (Prefix(length=2, hidden=None), 2 * 2 * 6),
    ):
        tuned = randomise(program.apply(method))
        assert tuned.count().trainable == count
        tuned.module()(x).sum().backward()
        assert all(p.grad is not None for p in tuned.table.trainable.values())


def test_shared_adapters_are_saved_once(looped: tuple[nn.Module, Tensor, pg.Program], tmp_path) -> None:
    _, x, program = looped
    tuned = randomise(program.apply(LoRA(rank=2), SerialAdapter(width=2)))
    tuned.save_adapter(tmp_path)
    torch.testing.assert_close(
        program.load_adapter(tmp_path).module().eval()(x), tuned.module().eval()(x), rtol=0, atol=0
    )


def test_an_embedding_and_its_tied_head_take_one_adapter() -> None:
    for two in (False, True):
        model, ids = TiedHead(two).eval(), torch.randint(0, 20, (2, 5))
        program = pg.trace(model, (ids,))
        tuned = program.apply(LoRA(at="embedding|head", rank=2, dropout=0.1))
        assert set(tuned.table.trainable) == {"embed.lora_A", "embed.lora_B"}
        check_fold(model, ids, tuned)
        folded = pg.fold(tuned)
        assert folded.table.ties() == program.table.ties() == (("embed.weight", "head.weight"),)


def test_a_norm_of_a_tied_table_changes_the_table_itself() -> None:
    """DoRA scales the rows of one matrix, which are the columns of the other: there is one new table for both."""
    model, ids = TiedHead().eval(), torch.randint(0, 20, (2, 5))
    program = pg.trace(model, (ids,))
    check_fold(model, ids, program.apply(DoRA(at="embedding|head", rank=2)))
    check_fold(
        model, ids, program.apply(LoRA(at="embedding|head", rank=2), DoRA(at="embedding|head", rank=2, name="b"))
    )


class Bag(TiedHead):
    """A bag of tokens, whose table is the head's weight."""

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(torch.tanh(self.body(F.embedding_bag(ids, self.embed.weight))))


def test_a_change_of_the_table_itself_is_for_all_who_read_it() -> None:
    model, ids = Bag().eval(), torch.randint(0, 20, (2, 5))
    program = pg.trace(model, (ids,))
    check_fold(model, ids, program.apply(LoRA(at="embedding|head", rank=2)))
    with pytest.raises(pg.Conflict, match=r"enters the stored tensor itself, and .* reads that too"):
        program.apply(LoRA(at="embedding", rank=2))


def test_named_adapters_have_heads_of_their_own(tmp_path) -> None:
    model, x = (
        nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.ReLU(), nn.Linear(8, 3)).double(),
        torch.randn(4, 6, dtype=F64),
    )
    program = pg.trace(model, (x,))
    both = program.apply(
        *(one for name in "ab" for one in (LoRA(at="projection", rank=2, name=name), Train(at="head|norm", name=name)))
    )
    randomise(both)
    answers = {name: both.only(name).module()(x).detach() for name in "ab"}
    assert (answers["a"] - answers["b"]).abs().max() > 1e-3
    for use in (both.module, lambda: pg.fold(both)):
        with pytest.raises(pg.Conflict, match=r"a and b each train a copy of .*program\.only\('a'\)"):
            use()
    torch.testing.assert_close(
        pg.fold(both.only("b")).write_back(copy.deepcopy(model))(x), answers["b"], rtol=0, atol=1e-12
    )
    both.save_adapter(tmp_path / "both")
    for name, answer in answers.items():
        torch.testing.assert_close(
            program.load_adapter(tmp_path / "both").only(name).module()(x), answer, rtol=0, atol=0
        )
    assert both.only().text() == program.text()
    assert model[3].weight is not None
    assert torch.equal(program.module()(x), model(x))


class TwoAttentions(nn.Module):
    """Heads of one projection that attend in two ways: the first to earlier tokens, the others to all."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(8, 8, bias=False, dtype=F64) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (one(x).unflatten(-1, (4, 2)).transpose(1, 2) for one in (self.q, self.k, self.v))
        first = F.scaled_dot_product_attention(q[:, :1], k[:, :1], v[:, :1], is_causal=True)
        others = F.scaled_dot_product_attention(q[:, 1:], k[:, 1:], v[:, 1:])
        return x + self.o(torch.cat([first, others], 1).transpose(1, 2).flatten(2))


@pytest.mark.parametrize("method", [LoRA(at="attention.q", rank=2), DoRA(at="attention.q", rank=2)], ids=str)
def test_two_attentions_in_one_matrix_have_parameters_of_their_own(method: Pass) -> None:
    torch.manual_seed(0)
    model, x = TwoAttentions().eval(), torch.randn(2, 6, 8, dtype=F64)
    tuned = pg.trace(model, x).apply(method)
    parameters = tuned.table.trainable
    assert [tuple(parameters[f"q.q{i}.lora_B"].shape) for i in range(2)] == [(2, 2), (6, 2)]
    for value in parameters.values():
        value.data.add_(0.3 * torch.randn_like(value))
    expected = tuned.module().eval()(x)
    torch.testing.assert_close(pg.fold(tuned).module().eval()(x), expected, rtol=0, atol=1e-12)
    assert (expected - model(x)).abs().max() > 1e-3


class BothWays(nn.Module):
    """Two streams that attend to one another by one product: the queries of the one are the keys of the other."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.w, self.o, self.p = (nn.Linear(6, 6, dtype=F64) for _ in range(6))

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        q, k = self.q(x), self.k(y)
        score = q @ k.mT * 6**-0.5
        return x + self.o(score.softmax(-1) @ self.v(y)), y + self.p(score.mT.softmax(-1) @ self.w(x))


@pytest.mark.parametrize("method", [LoRA(at="attention.*", rank=2), IA3(at="attention.*")], ids=str)
def test_one_value_in_two_roles_is_adapted_once(method: Pass) -> None:
    torch.manual_seed(0)
    model, inputs = BothWays().eval(), (torch.randn(2, 5, 6, dtype=F64), torch.randn(2, 7, 6, dtype=F64))
    program = pg.trace(model, inputs)
    assert {site.path for site in program.sites.select("attention.q")} == {"q", "k"}
    assert {site.path for site in program.sites.select("attention.k")} == {"q", "k"}
    tuned = program.apply(method)
    for value in tuned.table.trainable.values():
        value.data.add_(0.3 * torch.randn_like(value))
    assert len(tuned.edits) == 6
    for merged, trained in zip(pg.fold(tuned).module().eval()(*inputs), tuned.module().eval()(*inputs), strict=True):
        torch.testing.assert_close(merged, trained, rtol=0, atol=1e-12)
