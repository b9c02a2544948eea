"""Features anywhere: a change of a weight reads the axes of the site's own product, whatever operator multiplies.

Every model here is non-square, so that an axis taken for another one fails.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import peftgraph as pg
from peftgraph.passes import IA3, DoRA, LoRA, ParallelAdapter, Pfeiffer, SerialAdapter

F64 = torch.float64
Product = Callable[[Tensor, Tensor], Tensor]


class Multiplied(nn.Module):
    """x through one product with a bare parameter, so that the product's own algebra is all there is."""

    def __init__(self, product: Product, *shape: int) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(shape, dtype=F64) * 0.3)
        self.product = product

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.product(torch.tanh(x), self.w))


# What is multiplied, the shape of the weight and that of x. None is square, and every size differs from the others.
PRODUCTS: dict[str, tuple[Product, tuple[int, ...], tuple[int, ...]]] = {
    "heads in front": (lambda x, w: torch.einsum("bsi,ihd->bhsd", x, w), (6, 4, 5), (2, 7, 6)),
    "heads turned": (lambda x, w: torch.einsum("bsi,ihd->bsdh", x, w), (6, 4, 5), (2, 7, 6)),
    "heads contracted": (lambda x, w: torch.einsum("bshd,hdo->bso", x, w), (4, 5, 6), (2, 7, 4, 5)),
    "heads contracted from the front": (lambda x, w: torch.einsum("bhsd,ohd->bos", x, w), (6, 4, 5), (2, 4, 7, 5)),
    "weight on the left": (lambda x, w: w @ x, (5, 6), (2, 6, 7)),
    "weight on the left of images": (lambda x, w: torch.matmul(w, x), (5, 6), (2, 3, 6, 7)),
    "token mixing": (lambda x, w: torch.einsum("bsd,ts->btd", x, w), (5, 7), (2, 7, 6)),
    "channels first": (lambda x, w: torch.einsum("bchw,oc->bohw", x, w), (5, 6), (2, 6, 3, 4)),
    "experts": (lambda x, w: torch.einsum("ebi,eio->ebo", x, w), (3, 6, 5), (3, 7, 6)),
    "experts in the middle": (lambda x, w: torch.einsum("bei,ieo->beo", x, w), (6, 3, 5), (7, 3, 6)),
    "wide experts": (lambda x, w: torch.einsum("ebi,eio->ebo", x, w), (3, 50, 5), (3, 2, 50)),
    "batched matrices": (lambda x, w: torch.bmm(w, x), (3, 5, 6), (3, 6, 7)),
    "a split matrix": (lambda x, w: torch.einsum("bsi,hdi->bhsd", x, w.view(4, 5, 6)), (20, 6), (2, 7, 6)),
    "a turned matrix": (lambda x, w: x @ w.t().contiguous(), (5, 6), (2, 7, 6)),
    "a repeated matrix": (
        lambda x, w: torch.einsum("bhid,bhjd->bhij", x, w.expand(x.shape[0], 3, -1, -1)),
        (5, 4),
        (2, 3, 7, 4),
    ),
    "a summed axis": (lambda x, w: torch.einsum("bsi,oi->bo", x, w), (5, 6), (2, 7, 6)),
}


def randomise(tuned: pg.Program, std: float = 0.3) -> pg.Program:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for value in tuned.table.trainable.values():
            value.add_(torch.randn(value.shape, generator=generator, dtype=F64).to(value) * std)
    return tuned


def check_fold(model: nn.Module, x: tuple[Tensor, ...], tuned: pg.Program) -> None:
    """A fresh pass is the identity; a trained one is the plain model with the new weights."""
    model = copy.deepcopy(model).requires_grad_(False)  # matmul takes another routine where an operand requires grad
    torch.testing.assert_close(tuned.module().eval()(*x), model(*x), rtol=0, atol=0)
    net = randomise(tuned).module().eval()
    expected = net(*x)
    assert (expected - model(*x)).abs().max() > 1e-3, "the pass does nothing"
    merged = pg.fold(tuned).write_back(copy.deepcopy(model)).eval()
    torch.testing.assert_close(merged(*x), expected, rtol=0, atol=1e-11)


@pytest.mark.parametrize("name", PRODUCTS)
def test_a_low_rank_change_is_a_change_of_the_weight(name: str) -> None:
    product, shape, of_x = PRODUCTS[name]
    model, x = Multiplied(product, *shape).eval(), (torch.randn(of_x, dtype=F64),)
    program = pg.trace(model, x)
    for method in (LoRA(at="weight", rank=2), DoRA(at="weight", rank=2, alpha=3.0)):
        check_fold(model, x, program.apply(method))


@pytest.mark.parametrize("name", [name for name in PRODUCTS if name not in ("a summed axis",)])
def test_a_scale_trains_one_number_for_each_feature(name: str) -> None:
    product, shape, of_x = PRODUCTS[name]
    model, x = Multiplied(product, *shape).eval(), (torch.randn(of_x, dtype=F64),)
    program = pg.trace(model, x)
    (site,) = program.sites.select("weight")
    tuned = program.apply(IA3(at="weight"))
    assert site.weight is not None
    assert site.shape is not None
    assert tuned.count().trainable == site.shape[0] * (site.weight.experts or 1)
    check_fold(model, x, tuned)


def test_the_product_of_experts_has_the_gradients_of_the_whole_matrix() -> None:
    """With A = 1 a low-rank path trains all of W, so that B's gradient is the weight's own."""
    product, shape, of_x = PRODUCTS["heads in front"]
    model, x = Multiplied(product, *shape).eval(), torch.randn(of_x, dtype=F64)
    tuned = pg.trace(model, (x,)).apply(LoRA(at="weight", rank=6, alpha=6.0))
    a, b = tuned.table.trainable["w_head.lora_A"], tuned.table.trainable["w_head.lora_B"]
    with torch.no_grad():
        a.copy_(torch.eye(6))
    tuned.module()(x).square().sum().backward()
    model(x).square().sum().backward()
    assert b.grad is not None
    assert model.w.grad is not None
    torch.testing.assert_close(b.grad, model.w.grad.reshape(6, 20).t(), rtol=0, atol=1e-11)


class ImageBlock(nn.Module):
    """A feed-forward of 1 x 1 convolutions on a stream of images, or one in channels-last layout between permutes."""

    def __init__(self, turned: bool) -> None:
        super().__init__()
        self.turned = turned
        self.norm = nn.GroupNorm(1, 6, dtype=F64)
        self.up: nn.Module = nn.Linear(6, 10, dtype=F64) if turned else nn.Conv2d(6, 10, 1, dtype=F64)
        self.down: nn.Module = nn.Linear(10, 6, dtype=F64) if turned else nn.Conv2d(10, 6, 1, dtype=F64)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        if self.turned:
            return x + self.down(F.gelu(self.up(h.permute(0, 2, 3, 1)))).permute(0, 3, 1, 2)
        return x + self.down(F.gelu(self.up(h)))


@pytest.mark.parametrize("turned", [False, True])
def test_bottlenecks_of_images_act_on_channels(turned: bool) -> None:
    model, x = ImageBlock(turned).eval(), torch.randn(2, 6, 8, 9, dtype=F64)
    program = pg.trace(model, (x,))
    places = torch.randperm(9)
    for method in (
        SerialAdapter(at="ffn", width=4),
        ParallelAdapter(at="ffn", width=4, layer_norm=True),
        Pfeiffer(width=4),
    ):
        tuned = randomise(program.apply(method))
        net = tuned.module().eval()
        assert {p.shape[-1] for n, p in tuned.table.trainable.items() if n.endswith("down_weight")} == {6}
        torch.testing.assert_close(net(x[..., places]), net(x)[..., places], rtol=0, atol=1e-12)
        assert net(torch.randn(1, 6, 4, 5, dtype=F64)).shape == (1, 6, 4, 5)
        assert tuned.remove().text() == program.text()


def test_a_serial_adapter_of_images_is_its_equation() -> None:
    model, x = ImageBlock(False).eval(), torch.randn(2, 6, 8, 9, dtype=F64)
    tuned = randomise(pg.trace(model, (x,)).apply(SerialAdapter(at="ffn", width=4, activation="relu")))
    p = {name.rpartition(".")[2]: value.detach() for name, value in tuned.table.trainable.items()}
    h = model.down(F.gelu(model.up(model.norm(x)))).permute(0, 2, 3, 1)
    h = h + F.linear(F.relu(F.linear(h, p["down_weight"], p["down_bias"])), p["up_weight"], p["up_bias"])
    torch.testing.assert_close(tuned.module().eval()(x), x + h.permute(0, 3, 1, 2), rtol=0, atol=1e-12)


class Positions(nn.Module):
    """A table of positions behind an axis of one, of which a slice is added twice, and a head of a single output."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(1, 9, 6, dtype=F64))
        self.enter, self.head = nn.Linear(4, 6, dtype=F64), nn.Linear(6, 1, dtype=F64)

    def forward(self, x: Tensor) -> Tensor:
        position = self.table[:, : x.shape[1]]
        return self.head(torch.tanh(self.enter(x) + position) * position)


def test_a_table_of_positions_and_a_head_of_one_output_are_weights() -> None:
    torch.manual_seed(0)
    model, x = Positions().eval(), torch.randn(2, 5, 4, dtype=F64)
    tuned = pg.trace(model, x).apply(LoRA(at="weight", rank=3, alpha=3.0))
    for value in tuned.table.trainable.values():
        value.data.normal_()
    parameters = tuned.table.trainable
    a, b = parameters["table_matrix.lora_A"], parameters["table_matrix.lora_B"]
    assert (tuple(a.shape), tuple(b.shape)) == ((3, 6), (9, 3))
    with torch.no_grad():
        wanted = dict(model.state_dict())
        wanted["table"] = model.table + b @ a
        for name in ("enter", "head"):
            change = parameters[f"{name}.lora_B"] @ parameters[f"{name}.lora_A"]
            wanted[f"{name}.weight"] = wanted[f"{name}.weight"] + change
        expected = torch.func.functional_call(model, wanted, (x,))
    torch.testing.assert_close(tuned.module().eval()(x), expected)
    torch.testing.assert_close(pg.fold(tuned).module().eval()(x), expected)


def test_a_rank_must_fit_one_of_the_sites() -> None:
    program = pg.trace(Positions().eval(), torch.randn(2, 5, 4, dtype=F64))
    with pytest.raises(pg.RecipeError, match="rank 7 is larger than matrix allows: 9 x 6, at most 6"):
        program.apply(LoRA(at="weight", rank=7))
    with pytest.raises(pg.RecipeError, match="rank 3 is larger than head allows: 1 x 6, at most 1"):
        program.apply(LoRA(at="weight", rank=3, init="pissa"))  # a start of the weight's own directions


def test_a_scale_of_a_grouped_convolution_is_for_channels() -> None:
    """A picture as high as it has channels: a scale along the wrong axis would fit as well."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1, groups=2), nn.Tanh()).double().eval()
    x = torch.randn(2, 4, 4, 4, dtype=F64)
    tuned = pg.trace(model, x).apply(IA3(at="weight"))
    (scale,) = tuned.table.trainable.values()
    scale.data.normal_()
    expected = torch.tanh(model[0](x) * scale.detach()[:, None, None])
    torch.testing.assert_close(tuned.module().eval()(x), expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(pg.fold(tuned).module().eval()(x), expected, rtol=0, atol=1e-12)
