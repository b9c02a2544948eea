"""Evaluation with code for latency: outputs of the plain graph, few calls, and every change of a tensor is seen."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import zoo
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

import peftgraph as pg
from peftgraph.optimise import inference_graphs
from peftgraph.optimise.functional import make_functional
from peftgraph.passes import DoRA, LoRA, Prefix
from peftgraph.runtime.inference import SIZES_KEPT, InferenceCode

aten = torch.ops.aten
LORA = LoRA(at="attention.*|ffn.*", rank=3)
SHAPES = ((3, 7), (1, 1), (2, 5))


def leaves(output: Any) -> list[Tensor]:
    values = output.to_tuple() if hasattr(output, "to_tuple") else output
    return [one for one in pytree.tree_leaves(values) if isinstance(one, Tensor)]


def code_of(net: Any) -> InferenceCode:
    (code,) = net._peftgraph.inference.values()
    return code


def targets(net: Any) -> list[Any]:
    prepared = code_of(net).prepared
    assert prepared is not None
    return [node.target for node in prepared.staged.rest.graph.nodes]


def modules(program: pg.Program) -> tuple[Any, Any]:
    return program.module("infer").eval(), program.module("off").eval()


@torch.no_grad()
def assert_equal(fast: Any, plain: Any, inputs: dict[str, Any], bound: float = 1e-5) -> None:
    found, wanted = leaves(fast(**inputs)), leaves(plain(**inputs))
    assert len(found) == len(wanted)
    for a, b in zip(found, wanted, strict=True):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b, rtol=0, atol=bound * float(b.abs().max()))


@pytest.fixture
def llama() -> tuple[Any, Any]:
    torch.manual_seed(0)
    return modules(zoo.randomise(zoo.traced("llama").apply(LORA)))


@pytest.mark.parametrize("name", zoo.NAMES)
def test_outputs_are_those_of_the_plain_graph(name: str) -> None:
    torch.manual_seed(0)
    fast, plain = modules(zoo.randomise(zoo.traced(name).apply(LORA)))
    for batch, length in SHAPES:
        assert_equal(fast, plain, zoo.example(name, batch, length))
    assert code_of(fast).refusals == []
    calls = len(code_of(fast).graph.find_nodes(op="call_function", target=aten.linear.default))
    assert targets(fast).count(aten.linear.default) < calls


PROGRAMS: dict[str, Callable[[pg.Program], pg.Program]] = {
    "base": lambda base: base,
    "dora": lambda base: zoo.randomise(base.apply(DoRA(at="attention.*", rank=3))),
    "prefix": lambda base: zoo.randomise(base.apply(Prefix(length=3))),
    "merged": lambda base: pg.fold(zoo.randomise(base.apply(LORA))),
}


@pytest.mark.parametrize("what", PROGRAMS)
def test_programs_of_all_kinds(what: str) -> None:
    torch.manual_seed(0)
    fast, plain = modules(PROGRAMS[what](zoo.traced("llama")))
    for batch, length in SHAPES:
        assert_equal(fast, plain, zoo.example("llama", batch, length))
    assert code_of(fast).refusals == []


def test_each_layer_has_four_products_and_no_matrix_of_an_adapter(llama: tuple[Any, Any]) -> None:
    assert_equal(*llama, zoo.example("llama"))
    found = targets(llama[0])
    assert found.count(aten.linear.default) == 4 * zoo.LAYERS + 1  # q k v, o, gate up, down; the head
    assert found.count(aten.roll.default) == zoo.LAYERS  # q and k turn together
    assert aten.cos.default not in found
    assert aten.expand.default not in found
    attention = code_of(llama[0]).prepared.staged.rest.graph.find_nodes(  # pyright: ignore[reportOptionalMemberAccess]
        op="call_function", target=aten.scaled_dot_product_attention.default
    )
    assert all(node.kwargs["enable_gqa"] for node in attention)


def test_in_half_precision_adapters_keep_products_of_their_own() -> None:
    torch.manual_seed(0)
    fast, plain = modules(
        zoo.randomise(zoo.traced("llama").apply(LoRA(at="attention.q", rank=3), dtype=torch.bfloat16))
    )
    fast, plain = fast.to(torch.bfloat16), plain.to(torch.bfloat16)
    assert_equal(fast, plain, zoo.example("llama"), bound=0.05)
    assert code_of(fast).refusals == []
    assert targets(fast).count(aten.linear.default) == (4 + 1) * zoo.LAYERS + 1  # the second factor of each


def step(net: nn.Module) -> None:
    net.train()
    net(**zoo.example("llama")).logits.square().mean().backward()
    torch.optim.SGD([one for one in net.parameters() if one.requires_grad], lr=1.0).step()
    net.eval()


@torch.no_grad()
def scale(net: nn.Module) -> None:
    net.get_parameter("model.layers.1.self_attn.q_proj.weight").mul_(1.5)


def load(net: nn.Module) -> None:
    net.load_state_dict({name: value * 1.1 for name, value in net.state_dict().items()}, assign=True)


def replace(net: nn.Module) -> None:
    place: Any = net.get_submodule("model.layers.0.mlp.up_proj")
    place.weight = nn.Parameter(place.weight.detach() * 2, requires_grad=False)


def replace_module(net: nn.Module) -> None:
    place: Any = net.get_submodule("model.layers.0.mlp")
    place.up_proj = copy.deepcopy(place.up_proj)
    place.up_proj.weight.requires_grad_(False).mul_(2)


def point_elsewhere(net: nn.Module) -> None:
    weight = net.get_parameter("model.layers.0.input_layernorm.weight")
    weight.data = weight.data * 1.5


@pytest.mark.parametrize("change", [step, scale, load, replace, replace_module, point_elsewhere])
def test_changed_tensors_are_seen(llama: tuple[Any, Any], change: Callable[[nn.Module], None]) -> None:
    fast, plain = llama
    inputs = zoo.example("llama")
    assert_equal(fast, plain, inputs)
    with torch.no_grad():
        before = fast(**inputs).logits
    torch.manual_seed(3)
    change(fast)
    plain.load_state_dict(fast.state_dict())
    assert_equal(fast, plain, inputs)
    with torch.no_grad():
        assert not torch.allclose(before, fast(**inputs).logits, atol=1e-5)
    assert code_of(fast).refusals == []


def test_a_moved_module_and_a_copy(llama: tuple[Any, Any]) -> None:
    fast, plain = llama
    inputs = zoo.example("llama")
    assert_equal(fast, plain, inputs)
    twin = copy.deepcopy(fast)
    scale(twin)
    assert_equal(fast, plain, inputs)
    with torch.no_grad():
        assert not torch.allclose(twin(**inputs).logits, plain(**inputs).logits, atol=1e-5)
    assert_equal(fast.to(torch.float64), plain.to(torch.float64), inputs, bound=1e-12)
    assert code_of(fast).refusals == []


def test_generation_with_a_cache() -> None:
    torch.manual_seed(0)
    fast, plain = modules(zoo.randomise(zoo.cached("llama").apply(LORA), 0.5))
    inputs = zoo.example("llama", masked=False)
    options = {
        "max_new_tokens": 2 * SIZES_KEPT,
        "min_new_tokens": 2 * SIZES_KEPT,
        "pad_token_id": 0,
        "do_sample": False,
    }
    assert torch.equal(fast.generate(**inputs, **options), plain.generate(**inputs, **options))
    for code in fast._peftgraph.inference.values():
        assert code.refusals == []
        assert 0 < len(code.prepared.known) <= SIZES_KEPT


def test_where_gradients_are_wanted_the_plain_code_runs(llama: tuple[Any, Any]) -> None:
    inputs = zoo.example("llama")
    for net in llama:
        net(**inputs).logits.square().mean().backward()
    grads = [{n: p.grad for n, p in net.named_parameters() if p.grad is not None} for net in llama]
    assert grads[0].keys() == grads[1].keys() != set()
    assert all(torch.equal(grads[0][name], grads[1][name]) for name in grads[1])


def test_calls_under_the_modes_of_torch(llama: tuple[Any, Any]) -> None:
    fast, plain = llama
    inputs = zoo.example("llama")
    with torch.inference_mode():
        assert_equal(fast, plain, inputs)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(fast(**inputs).logits, plain(**inputs).logits)
    other = {name: value.detach() * 1.1 for name, value in fast.named_parameters()}
    with torch.no_grad():
        called = [torch.func.functional_call(net, other, (), inputs).logits for net in llama]
    torch.testing.assert_close(called[0], called[1], rtol=0, atol=1e-4)
    assert_equal(fast, plain, inputs)
    assert code_of(fast).refusals == []


def test_who_writes_into_an_output_changes_no_later_call(llama: tuple[Any, Any]) -> None:
    fast, plain = llama
    inputs = zoo.example("llama")
    with torch.no_grad():
        for value in leaves(fast(**inputs)):
            value.zero_()
    assert_equal(fast, plain, inputs)


def test_hooks_of_blocks_are_called(llama: tuple[Any, Any]) -> None:
    fast, plain = llama
    assert_equal(fast, plain, zoo.example("llama"))
    seen: list[Any] = []
    handle = fast.get_submodule("model.layers.1").register_forward_hook(lambda *_: seen.append(1))
    assert_equal(fast, plain, zoo.example("llama"))
    assert seen == [1]
    handle.remove()
    assert_equal(fast, plain, zoo.example("llama"))
    assert seen == [1]


def test_a_difference_from_the_plain_code_is_reported_and_the_plain_code_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    def spoil(graph: fx.Graph) -> None:
        (node, *_) = graph.find_nodes(op="call_function", target=aten.embedding.default)
        with graph.inserting_after(node):
            new = graph.call_function(aten.mul.Tensor, (node, 1.01))
        new.meta = dict(node.meta)
        node.replace_all_uses_with(new, delete_user_cb=lambda user: user is not new)

    monkeypatch.setattr(inference_graphs, "REWRITES", (*inference_graphs.REWRITES, spoil))
    fast, plain = modules(zoo.traced("nano"))
    assert_equal(fast, plain, zoo.example("nano"), bound=0)
    assert code_of(fast).refusals == ["output 0 is not that of the plain code"]


class Writing(nn.Module):
    """Writes into a value of its own, or into a buffer."""

    total: Tensor

    def __init__(self, own: bool) -> None:
        super().__init__()
        self.own, self.first, self.second = own, nn.Linear(4, 4), nn.Linear(4, 4)
        self.register_buffer("total", torch.zeros(4))

    def forward(self, x: Tensor) -> Tensor:
        value = self.first(x) if self.own else self.total
        value.add_(1.0)
        return self.second(value) + self.first(x)


@pytest.mark.parametrize("own", [True, False])
def test_writes_into_values_have_another_form_and_writes_into_buffers_are_left_to_the_plain_code(own: bool) -> None:
    torch.manual_seed(0)
    fast, plain = modules(pg.trace(Writing(own), {"x": torch.randn(3, 4)}))
    x = torch.randn(5, 4)
    for _ in range(2):
        assert_equal(fast, plain, {"x": x})
    reasons = code_of(fast).refusals
    assert len(reasons) == (0 if own else 1)
    assert all("is an input or read elsewhere" in one for one in reasons)


def test_a_value_that_a_view_reads_is_not_replaced_by_a_new_one() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    value = graph.call_function(aten.relu.default, (x,))
    view = graph.call_function(aten.view.default, (value, [-1]))
    graph.call_function(aten.add_.Tensor, (value, 1))
    graph.output([view])
    with pytest.raises(NotImplementedError, match="writes into relu"):
        make_functional(graph)
