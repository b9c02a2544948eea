"""What pg.trace takes: any call of any module, whatever its code does around the tensors."""

from __future__ import annotations

import threading
from typing import Any, NamedTuple

import pytest
import torch
import torch.utils.checkpoint
from torch import Tensor, nn
from torch.nn import functional as F

import peftgraph as pg
from peftgraph.passes.lora import LoRA

X = torch.randn(3, 7, 6, generator=torch.Generator().manual_seed(1))


class Two(nn.Module):
    """Two projections, (6 -> 5) and (5 -> 4); subclasses say what happens around them."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 5), nn.Linear(5, 4)


def check(model: nn.Module, *args: Any, **kwargs: Any) -> pg.Program:
    """Traces `model` on a call and compares the program with it, there and on a smaller batch."""
    program = pg.trace(model.eval(), args if args else kwargs)
    net = program.module().eval()
    torch.testing.assert_close(net(*args, **kwargs), model(*args, **kwargs), rtol=0, atol=0)
    return program


# how the example is given


def test_positional_keyword_and_bare_examples_agree() -> None:
    model = nn.Sequential(nn.Linear(6, 5))
    texts = {pg.trace(model, example).text() for example in ((X,), {"input": X}, X)}
    assert len(texts) == 1


def test_an_example_that_does_not_fit() -> None:
    with pytest.raises(pg.TraceError, match=r"does not fit Sequential.forward\(input\): missing .*'input'"):
        pg.trace(nn.Sequential(), {"x": X})
    with pytest.raises(pg.TraceError, match="must be a dict of keyword inputs, a tuple .* got str"):
        pg.trace(nn.Sequential(), "x")  # pyright: ignore[reportArgumentType]
    with pytest.raises(pg.TraceError, match="holds no tensor"):
        pg.trace(nn.Sequential(), {"input": None})


def test_aliased_inputs_stay_two() -> None:
    class Sum(Two):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return self.a(x) - self.a(y)

    program = check(Sum(), X, X)
    assert [spec.key for spec in program.signature.inputs] == ["x", "y"]
    assert program.module()(X, 2 * X).abs().max() > 0


def test_a_batch_of_one_is_not_specialised() -> None:
    model = nn.Sequential(nn.Linear(6, 5))
    net = pg.trace(model, X[:1]).module()
    assert torch.equal(net(X), model.requires_grad_(False)(X))


def test_a_batch_that_the_code_fixes_is_that_of_the_example() -> None:
    class Loops(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:  # 3 x 3 x 6: another axis is as long as the batch
            return torch.cat([torch.linalg.vector_norm(super(Loops, self).forward(one)).reshape(1) for one in input])

    program = check(Loops(6, 5), torch.randn(3, 3, 6))
    assert "[3, S, 6]" in program.signature.describe()


def test_the_example_is_not_written() -> None:
    before = X.clone()
    check(nn.Sequential(nn.Linear(6, 5), nn.ReLU(inplace=True)), X)
    assert torch.equal(X, before)


def test_nested_examples() -> None:
    class Nested(Two):
        def forward(self, batch: dict[str, Any], scale: float = 1.0) -> dict[str, Any]:
            return {"out": (self.a(batch["x"]), [batch["rest"][0] * scale]), "none": None, "three": 3}

    batch = {"x": X, "rest": [X[0]]}
    program = check(Nested(), batch)
    assert [spec.key for spec in program.signature.inputs] == ["batch['x']", "batch['rest'][0]"]
    with pytest.raises(pg.CallError, match=r"Missing input .*rest"):
        program.module()({"x": X, "rest": []})


def test_variadic_signatures() -> None:
    class Variadic(Two):
        def forward(self, x: Tensor, *rest: Tensor, power: int = 1, **named: Tensor) -> Tensor:
            return self.a(x) ** power + sum(rest) + sum(named.values())

    y = torch.randn(3, 7, 5)
    assert check(Variadic(), X, y, 2 * y).signature.inputs[2].key == "rest[1]"
    program = check(Variadic(), x=X, extra=y)
    with pytest.raises(pg.CallError, match="cannot take the tensor other: it was traced without it"):
        program.module()(x=X, other=y)
    with pytest.raises(pg.CallError, match="Missing input extra"):
        program.module()(x=X)


def test_defaults_that_are_tensors() -> None:
    class Scaled(Two):
        def forward(self, x: Tensor, scale: Tensor = torch.arange(5.0)) -> Tensor:  # noqa: B008
            return self.a(x) * scale

    program = check(Scaled(), X)
    with pytest.raises(pg.CallError, match="cannot take the tensor scale: it was traced without it"):
        program.module()(X, torch.ones(5))


# what comes out


class Pair(NamedTuple):
    left: Tensor
    right: Tensor


@pytest.mark.parametrize(
    "build",
    [
        lambda y: y,
        lambda y: (y, y + 1),
        lambda y: [y, {"z": y * 2}],
        lambda y: Pair(y, y + 1),
        lambda y: {"y": y, "none": None},
        lambda y: y.sum(),
    ],
    ids=["tensor", "tuple", "nested", "namedtuple", "dict", "scalar"],
)
def test_output_types(build: Any) -> None:
    class Out(Two):
        def forward(self, x: Tensor) -> Any:
            return build(self.a(x))

    net = check(Out(), X).module()
    assert type(net(X)) is type(build(X))


def test_inputs_and_weights_as_outputs() -> None:
    class Returns(Two):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            return self.a(x), x, self.a.weight

    assert check(Returns(), X).module()(X)[1] is X


# what the code does inside


def test_no_grad_regions_stay_without_gradient() -> None:
    class Frozen(Two):
        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                y = self.a(x)
            return self.b(y) + self.b(self.a(x).detach())

    net = check(Frozen(), X).module().requires_grad_(True)
    net(X).sum().backward()
    assert net.get_parameter("a.weight").grad is None
    assert net.get_parameter("b.weight").grad is not None


def test_no_grad_around_what_has_no_gradient_adds_nothing() -> None:
    class Positions(Two):
        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                position = torch.arange(x.shape[1], device=x.device).float().cos()[:, None]
            return self.a(x) * position

    assert "detach" not in check(Positions(), X).text()


def test_checkpoints_are_seen_through() -> None:
    class Checkpointed(Two):
        def forward(self, x: Tensor) -> Tensor:
            y = torch.utils.checkpoint.checkpoint(self.a, x, use_reentrant=True)
            return torch.utils.checkpoint.checkpoint(self.b, y, use_reentrant=False)

    model = Checkpointed()
    with pytest.warns(UserWarning, match="None of the inputs have requires_grad"):
        program = check(model, X)
    net = program.module().requires_grad_(True)
    x = X.clone().requires_grad_()
    model(x).square().sum().backward()
    net(X).square().sum().backward()
    for name, parameter in model.named_parameters():
        assert torch.equal(net.get_parameter(name).grad, parameter.grad)  # pyright: ignore[reportArgumentType]


def test_autocast_switched_off_is_inlined() -> None:
    class Off(Two):
        def forward(self, x: Tensor) -> Tensor:
            with torch.autocast("cpu", enabled=False):
                return self.a(x)

    assert "autocast" not in check(Off(), X).text()


def test_constants_of_the_code_keep_their_dtype() -> None:
    class Constants(Two):
        def __init__(self) -> None:
            super().__init__()
            self.scale = torch.linspace(0.1, 1, 5)  # a plain attribute: .to() does not move it
            self.table = {"shift": torch.linspace(0.3, 2, 5)}

        def forward(self, x: Tensor) -> Tensor:
            return self.a(x) * self.scale + self.table["shift"] * torch.tensor([0.1, 0.2, 0.3, 0.4, 0.5])

    model = Constants().requires_grad_(False)
    net = check(model, X).module().eval()
    assert set(net.state_dict()) == set(model.state_dict())
    for dtype in (torch.bfloat16, torch.float64):
        out = net.to(dtype)(X.to(dtype))
        assert torch.equal(out, model.to(dtype)(X.to(dtype)))
        assert out.dtype == torch.promote_types(dtype, torch.float32)


def test_operations_in_place_leave_the_graph() -> None:
    class InPlace(Two):
        def forward(self, x: Tensor) -> Tensor:
            y = F.relu_(self.a(x)).add_(1.0)
            y *= 2
            return self.b(y).div_(2.0)

    model = InPlace()
    program = check(model, X)
    assert "_(" not in program.text()
    tuned = program.apply(LoRA(at="projection|head", rank=2))
    with torch.no_grad():
        for parameter in tuned.table.trainable.values():
            parameter.normal_()
    merged = pg.fold(tuned).write_back(InPlace().eval())
    torch.testing.assert_close(tuned.module().eval()(X), merged(X), rtol=1e-5, atol=1e-6)


def gradients(net: Any, names: list[str], *args: Any) -> list[Tensor]:
    """The gradients of the sum of squares of the outputs with respect to the parameters called `names`."""
    stored = dict(net.named_parameters())
    chosen = [stored[name].requires_grad_() for name in names]
    out = net(*args)
    total = sum((one.double() ** 2).sum() for one in (out if isinstance(out, tuple) else (out,)))
    assert isinstance(total, Tensor)
    return list(torch.autograd.grad(total, chosen))


def written(model: nn.Module, x: Tensor = X) -> str:
    """Checks outputs and gradients; the program's text."""
    program = check(model, x)
    names = [name for name, _ in model.named_parameters()]
    theirs = gradients(model, names, x)
    for mine, other in zip(gradients(program.module().eval(), names, x), theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=0, atol=0)
    return program.text()


def test_what_is_written_through_views_is_read_through_the_others() -> None:
    class Views(Two):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
            y = self.a(x)
            first, turned = y[:, 0], y.transpose(1, 2)
            first.fill_(0.5)
            z = torch.tanh(y)
            y.add_(1)
            turned[..., 1:3].mul_(2)
            return y, z, first, self.b(turned.transpose(1, 2))

    assert "_(" not in written(Views())


def test_a_value_that_is_filled_piece_by_piece() -> None:
    class Filled(Two):
        def forward(self, x: Tensor) -> Tensor:
            y = self.a(x)
            whole = y.new_empty(x.shape[0], x.shape[1], 12)
            whole[..., :5] = y
            whole[..., 5:10] = y.double()
            whole[..., 10:] = y[:, :1, :1]  # wider than its source
            whole[:, torch.tensor([1, 2])] = 0.3  # has no exact bfloat16 form
            return self.b(whole[..., 3:8])

    text = written(Filled())
    assert "_(" not in text
    assert text.count("= slice_scatter(") == 4


def test_a_write_through_what_may_be_a_copy_stays() -> None:
    class Unclear(Two):
        def forward(self, x: Tensor) -> Tensor:
            y = self.a(x)
            y.reshape(-1, 5).mul_(2)
            return self.b(y)

    assert "mul_(" in written(Unclear())


def test_tensors_that_become_numbers_and_sizes() -> None:
    class Values(Two):
        def forward(self, x: Tensor) -> Tensor:
            rows = x[x[..., 0] > 0]
            return self.a(rows) * x.sum().item()

    program = check(Values(), X)
    assert program.module()(X[:1]).shape[0] == int((X[:1, :, 0] > 0).sum())


def test_what_is_known_of_a_count_of_values_stays_known() -> None:
    class Chosen(nn.Linear):
        def forward(self, input: Tensor, kept: Tensor) -> Tensor:
            rows = super().forward(input)[kept]
            torch._check(rows.shape[0] > 0)
            return rows.transpose(1, 2).reshape(rows.shape[0], -1, 5, 7).mean(0)

    kept = torch.tensor([True, False, True])
    program = check(Chosen(6, 5), X, kept)
    net, model = program.module(), Chosen(6, 5)
    model.load_state_dict(net.state_dict())
    assert torch.equal(net(X, ~kept), model(X, ~kept))


def test_module_state_is_not_touched() -> None:
    class Counting(Two):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("seen", torch.zeros(()))
            self.calls = 0

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            self.seen += 1
            return self.a(x) + self.seen

    model = Counting().eval()
    model.b.requires_grad_(False)
    tensors = {name: (id(t), t._version, t.requires_grad) for name, t in model.state_dict(keep_vars=True).items()}
    program = pg.trace(model, X)
    net = program.module()
    assert not torch.equal(net(X), net(X))
    after = {name: (id(t), t._version, t.requires_grad) for name, t in model.state_dict(keep_vars=True).items()}
    assert tensors == after
    assert not model.training
    assert model.calls == 0
    assert not model._forward_hooks
    assert torch.equal(program.module()(X), model.a(X) + 1)


def test_batch_norm_follows_the_mode() -> None:
    def build() -> nn.Module:
        torch.manual_seed(2)
        return nn.Sequential(nn.Conv1d(6, 5, 1), nn.BatchNorm1d(5), nn.Conv1d(5, 4, 1)).requires_grad_(False)

    model, x = build(), torch.randn(3, 6, 9)
    program = pg.trace(model, torch.randn(3, 6, 7))
    net = program.module().train()
    other = build().train()
    assert torch.equal(net(x), other(x))
    assert all(torch.equal(net.get_buffer(name), buffer) for name, buffer in other.named_buffers())
    assert torch.equal(net.eval()(x), other.eval()(x))
    assert net.get_buffer("1.num_batches_tracked") == 1  # evaluation does not count
    tuned = program.apply(LoRA(at="projection", rank=2))
    pg.fold(tuned)
    assert all(torch.equal(a, b) for a, b in zip(model.buffers(), build().buffers(), strict=True))


def test_batch_norm_without_statistics_of_its_own_uses_the_batch_in_both_modes() -> None:
    class Standardised(nn.Conv1d):
        def forward(self, input: Tensor) -> Tensor:
            weight = F.batch_norm(self.weight.reshape(1, 5, -1), None, None, training=True).reshape_as(self.weight)
            return F.conv1d(input, weight, self.bias)

    x = torch.randn(3, 6, 9)
    plain = nn.Sequential(nn.Conv1d(6, 5, 1), nn.BatchNorm1d(5, track_running_stats=False))
    for layer in (Standardised(6, 5, 1), plain):
        net = pg.trace(layer.requires_grad_(False), x).module()
        for training in (True, False):
            assert torch.equal(net.train(training)(x), layer.train(training)(x))


class Mixed(nn.Module):
    """A bfloat16 body with float32 norms."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 5).bfloat16(), nn.Linear(5, 4).bfloat16()
        self.norm = nn.LayerNorm(5)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.norm(self.a(x).float()).to(self.b.weight.dtype))


def test_mixed_dtypes_run_exactly_and_stay() -> None:
    net = check(Mixed().requires_grad_(False), X.bfloat16()).module()
    with pytest.raises(pg.PeftGraphError, match=r"mixes floating dtypes.*cannot be moved to torch.float16"):
        net.to(torch.float16)
    assert torch.equal(net.to("cpu")(X.bfloat16()), net(X.bfloat16()))
    assert net.to("meta")(X.bfloat16().to("meta")).device.type == "meta"


def test_tied_weights_stay_tied() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.head = nn.Embedding(11, 6), nn.Linear(6, 11, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, ids: Tensor) -> Tensor:
            return self.head(self.embed(ids).tanh())

    program = check(Tied(), torch.randint(0, 11, (3, 7)))
    assert program.table.ties() == (("embed.weight", "head.weight"),)
    assert "@head.weight" in program.text()
    assert "@embed.weight" in program.text()
    net = program.module()
    assert set(net.state_dict()) == {"embed.weight", "head.weight"}
    assert net.get_parameter("embed.weight") is net.get_parameter("head.weight")
    assert len(list(net.parameters())) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_a_limit_of_the_dtype_that_is_written_into_a_value_follows_it(dtype: torch.dtype) -> None:
    class Suppresses(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            y = super().forward(input)
            y[:, :, [0, 2]] = torch.finfo(y.dtype).min
            return y

    program = check(Suppresses(6, 5).to(dtype), X.to(dtype))
    assert program.module()(X.to(dtype)).isfinite().all()


def test_an_attribute_that_cannot_be_copied() -> None:
    class Locked(Two):
        def __init__(self) -> None:
            super().__init__()
            self.lock = threading.Lock()

        def forward(self, x: Tensor) -> Tensor:
            return self.a(x)

    with pytest.raises(pg.TraceError, match=r"Locked cannot be deep-copied.*lock.*Remove what it holds"):
        pg.trace(Locked(), X)


def test_numbers_of_the_code_in_the_dtype_of_the_model_follow_it() -> None:
    class Scaled(Two):
        def forward(self, x: Tensor) -> Tensor:
            scale = torch.tensor([0.1, 0.2, 0.3, 0.4, 0.7], dtype=x.dtype)
            return self.b(self.a(x) / scale)

    model = Scaled().requires_grad_(False)
    net = check(model, X).module().eval()
    for dtype in (torch.bfloat16, torch.float64):
        assert torch.equal(net.to(dtype)(X.to(dtype)), model.to(dtype)(X.to(dtype)))


class Resized(nn.Module):
    """A table of positions at the size that an input's values give."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(1, 3, 4, 4))

    def forward(self, grid: Tensor) -> Tensor:
        height, width = grid.tolist()
        return nn.functional.interpolate(self.table, size=(height, width), mode="bilinear").flatten(2)


def test_sizes_by_values_are_those_of_each_call() -> None:
    model = Resized().requires_grad_(False)
    net = pg.trace(model, {"grid": torch.tensor([3, 5])}).module()
    for sizes in ([3, 5], [6, 2]):
        assert torch.equal(net(torch.tensor(sizes)), model(torch.tensor(sizes)))
