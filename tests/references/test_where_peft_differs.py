"""Where huggingface/peft 0.21 leaves the papers: what it does, and what is right.

Every test asserts both sides, each against the equation written in plain PyTorch: peft's deviation is really
there, and ours is exact. A peft that fixes one of them makes its test fail.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import peft
import pytest
import torch
import zoo
from peft.utils.error import NoMatchingPeftModuleError
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import peftgraph as pg
from peftgraph.passes import IA3, BitFit, LoRA, TrainableTokens

ADAPTED_TIE = "ignore:Model has `tie_word_embeddings=True` and a tied layer is part of:UserWarning"
MERGED_TIE = "ignore:Model with `tie_word_embeddings=True` and the tied_target_modules:UserWarning"
pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False but the target module is:UserWarning"),
]
F32, F64 = torch.float32, torch.float64
D, HEADS, HEAD = zoo.WIDTH, zoo.HEADS, zoo.WIDTH // zoo.HEADS

Change = Callable[[Tensor, Tensor], Tensor]  # (input, output) of a module -> its new output
NewInput = Callable[[Tensor], Tensor]


@contextmanager
def changed(
    model: nn.Module, outputs: Mapping[str, Change], inputs: Mapping[str, NewInput] | None = None
) -> Iterator[nn.Module]:
    """The model with some modules' outputs and inputs changed, as a paper's equation says, by plain hooks."""
    handles = []
    for path, change in outputs.items():
        hook = lambda _, args, out, change=change: change(args[0], out)  # noqa: E731
        handles.append(model.get_submodule(path).register_forward_hook(hook))
    for path, new in (inputs or {}).items():
        before = lambda _, args, new=new: (new(args[0]), *args[1:])  # noqa: E731
        handles.append(model.get_submodule(path).register_forward_pre_hook(before))
    yield model
    for handle in handles:
        handle.remove()


# (IA)^3: l_k on keys, l_v on values, l_ff on the hidden value that enters the feed-forward's second matrix

Place = tuple[str, str, tuple[int, ...] | None]  # module, "output" or "input", the scaled features (None = all)
Places = tuple[list[Place], list[Place]]  # the paper's, and peft's default


def third(part: int) -> tuple[int, ...]:
    """Columns of q, k or v where the three lie one after the other."""
    return tuple(range(part * D, (part + 1) * D))


def interleaved(part: int) -> tuple[int, ...]:
    """Columns of q, k or v where each head's three lie side by side."""
    return tuple(3 * HEAD * head + HEAD * part + i for head in range(HEADS) for i in range(HEAD))


def one_head_each(part: int) -> tuple[int, ...]:
    """Columns of k or v where all heads share one of each, behind the queries."""
    return tuple(range(D + (part - 1) * HEAD, D + part * HEAD))


def _bert() -> Places:
    layers = [f"encoder.layer.{i}" for i in range(2)]
    paper: list[Place] = [(f"{at}.attention.self.{name}", "output", None) for at in layers for name in ("key", "value")]
    paper += [(f"{at}.output.dense", "input", None) for at in layers]
    return paper, [*paper, *((f"{at}.attention.output.dense", "input", None) for at in layers)]


def _projections(attentions: list[str], downs: list[str], scaled: tuple[str, str]) -> Places:
    hidden: list[Place] = [(down, "input", None) for down in downs]
    paper: list[Place] = [(f"{at}.{name}", "output", None) for at in attentions for name in ("k_proj", "v_proj")]
    theirs: list[Place] = [(f"{at}.{name}", "output", None) for at in attentions for name in scaled]
    return paper + hidden, theirs + hidden


def _fused(layers: str, count: int, mix: str, down: str, columns: Callable[[int], tuple[int, ...]]) -> Places:
    mixes = [f"{layers}.{i}.{mix}" for i in range(count)]
    hidden: list[Place] = [(f"{layers}.{i}.{down}", "input", None) for i in range(count)]
    paper: list[Place] = [(mix, "output", columns(part)) for mix in mixes for part in (1, 2)]
    theirs: list[Place] = [(mix, "output", None) for mix in mixes]
    return paper + hidden, theirs + hidden


BART = [
    "model.encoder.layers.0.self_attn",
    "model.decoder.layers.0.self_attn",
    "model.decoder.layers.0.encoder_attn",
]
PLACES: dict[str, Places] = {
    "bert": _bert(),
    "opt": _projections(["model.decoder.layers.0.self_attn"], ["model.decoder.layers.0.fc2"], ("q_proj", "k_proj")),
    "bart": _projections(BART, ["model.encoder.layers.0.fc2", "model.decoder.layers.0.fc2"], ("q_proj", "v_proj")),
    "gpt2": _fused("transformer.h", 2, "attn.c_attn", "mlp.c_proj", third),
    "gpt_neox": _fused("gpt_neox.layers", 2, "attention.query_key_value", "mlp.dense_4h_to_h", interleaved),
    "falcon": _fused("transformer.h", 1, "self_attention.query_key_value", "mlp.dense_4h_to_h", one_head_each),
}


def scale_by(vectors: Mapping[str, Tensor], places: list[Place]) -> tuple[dict[str, Change], dict[str, Any]]:
    """The changes that scale `places` by the vectors of their modules."""
    outputs: dict[str, Change] = {}
    inputs: dict[str, Any] = {}
    for module, side, features in places:
        factor = vectors[module]
        if features is not None:  # several parts of one module: multiply by one vector that is 1 elsewhere
            mine = {i for path, _, chosen in places if path == module for i in chosen or ()}
            factor = torch.where(torch.tensor([i in mine for i in range(len(factor))]), factor, 1.0)
        if side == "output":
            outputs[module] = lambda _, out, factor=factor: out * factor
        else:
            inputs[module] = lambda value, factor=factor: value * factor
    return outputs, inputs


def vectors_for(theirs: nn.Module, places: list[Place]) -> dict[str, Tensor]:
    """One random vector for each module, as long as the module's own side."""
    sizes = {name: p for name, p in theirs.named_parameters() if name.endswith("ia3_l.default")}
    vectors = {}
    for module, side, _ in places:
        slot = sizes.get(f"base_model.model.{module}.ia3_l.default")
        layer = theirs.get_submodule(f"base_model.model.{module}")
        wanted = layer.in_features if side == "input" else layer.out_features
        assert slot is None or slot.numel() == wanted
        vectors[module] = (1 + 0.3 * torch.randn(wanted, dtype=F64)).requires_grad_()
    return vectors


@pytest.mark.parametrize("family", PLACES)
def test_ia3_is_placed_elsewhere(both: Any, family: str) -> None:
    paper, default = PLACES[family]
    theirs = both.wrap(family, peft.IA3Config(), F64)
    model, inputs = both.build(family, F64), both.example(family, F64)
    vectors = vectors_for(theirs, [*paper, *default])

    slots = {name: p for name, p in theirs.named_parameters() if p.requires_grad}
    assert set(slots) == {f"base_model.model.{module}.ia3_l.default" for module, _, _ in default}
    with torch.no_grad():
        for name, slot in slots.items():
            slot.copy_(
                vectors[name.removeprefix("base_model.model.").removesuffix(".ia3_l.default")].reshape(slot.shape)
            )
    with changed(model, *scale_by(vectors, default)):
        as_peft_does = both.answer(model(**inputs))
    assert both.difference(both.answer(theirs(**inputs)), as_peft_does) < 1e-12

    with changed(model, *scale_by(vectors, paper)):
        as_in_the_paper = both.answer(model(**inputs))
    assert both.difference(as_peft_does, as_in_the_paper) > 1e-5

    tuned = both.traced(family, F64).apply(IA3())
    parts = our_parts(tuned, paper)
    assert parts.keys() == tuned.table.trainable.keys()
    with torch.no_grad():
        for name, (module, features) in parts.items():
            tuned.table.trainable[name].copy_(vectors[module][features])
    ours = both.answer(tuned.module().eval()(**inputs))
    assert both.difference(ours, as_in_the_paper) < 1e-12
    both.loss(ours).backward()
    both.loss(as_in_the_paper).backward()
    for name, (module, features) in parts.items():
        assert both.difference(tuned.table.trainable[name].grad, vectors[module].grad[features]) < 1e-11, name


def our_parts(tuned: pg.Program, paper: list[Place]) -> dict[str, tuple[str, Any]]:
    """Our parameter -> the module it scales, and which features of it."""
    parts: dict[str, tuple[str, Any]] = {}
    for module, _, features in paper:
        if features is None:
            parts[f"{module}.ia3_l"] = (module, slice(None))
        else:  # the key's columns come first in the paper's list
            role = "v" if f"{module}.k.ia3_l" in parts else "k"
            parts[f"{module}.{role}.ia3_l"] = (module, list(features))
    return parts


def test_ia3_on_bert_counts_a_vector_too_many(both: Any) -> None:
    trainable = sum(p.numel() for p in both.wrap("bert", peft.IA3Config(), F32).parameters() if p.requires_grad)
    assert trainable == 2 * (3 * D + zoo.FFN)
    assert both.traced("bert", F64).apply(IA3()).count().trainable == 2 * (2 * D + zoo.FFN)


def test_ia3_on_mixtral_leaves_the_experts_out(both: Any) -> None:
    theirs = both.wrap("mixtral", peft.IA3Config(), F32)
    assert {name.split(".")[-3] for name, p in theirs.named_parameters() if p.requires_grad} == {
        "k_proj",
        "v_proj",
    }

    tuned = zoo.randomise(both.traced("mixtral", F32).apply(IA3()), 0.3)
    values = tuned.table.trainable
    model, inputs = both.build("mixtral", F32), both.example("mixtral", F32)
    scales = {name.removesuffix(".ia3_l"): value for name, value in values.items() if "proj.ia3_l" in name}
    ending = ".down_proj_hidden.ia3_l"
    hidden = {name.removesuffix(ending): value for name, value in values.items() if name.endswith(ending)}
    assert len(hidden) == 2
    assert len(scales) == 4
    for path, l_EF in hidden.items():
        experts = model.get_submodule(path)
        experts.forward = partial(plain_experts, experts, l_EF)
    with changed(model, {path: lambda _, out, l_O=l_O: out * l_O for path, l_O in scales.items()}):
        expected = both.answer(model(**inputs))
    assert both.difference(both.answer(tuned.module().eval()(**inputs)), expected) < 1e-5


def plain_experts(experts: Any, l_EF: Tensor, x_ND: Tensor, top_NK: Tensor, share_NK: Tensor) -> Tensor:
    """Sums share * W_down (l_e * silu(W_gate x) * W_up x) over the chosen experts, one token at a time."""
    rows = []
    for x_D, top, share in zip(x_ND, top_NK, share_NK, strict=True):
        row = torch.zeros_like(x_D)
        for e, weight in zip(top.tolist(), share, strict=True):
            gate_F, up_F = (experts.gate_up_proj[e] @ x_D).chunk(2)
            row = row + weight * (experts.down_proj[e] @ (l_EF[e] * nn.functional.silu(gate_F) * up_F))
        rows.append(row)
    return torch.stack(rows)


@pytest.mark.filterwarnings("ignore:Unmerge result can be inaccurate for \\(IA\\)\\^3:UserWarning")
def test_ia3_unmerge_loses_what_a_zero_scaled(both: Any) -> None:
    theirs = both.wrap("llama", peft.IA3Config(), F64)
    key = theirs.get_submodule("base_model.model.model.layers.0.self_attn.k_proj")
    before = key.base_layer.weight.detach().clone()
    with torch.no_grad():
        key.ia3_l["default"][3] = 0.0
    theirs.merge_adapter()
    theirs.unmerge_adapter()
    assert float(key.base_layer.weight[3].abs().max()) == 0.0

    program = both.traced("llama", F64)
    tuned = program.apply(IA3())
    with torch.no_grad():
        tuned.table.trainable["model.layers.0.self_attn.k_proj.ia3_l"][3] = 0.0
    name = "model.layers.0.self_attn.k_proj.weight"
    assert float(pg.fold(tuned).table[name].tensor[3].abs().max()) == 0.0
    assert torch.equal(tuned.remove().table[name].tensor, before)


# LoRA on a fused projection: q and v each get an A and a B of their own, k is not adapted

FUSED = {
    "gpt2": ([f"transformer.h.{i}.attn.c_attn" for i in (0, 1)], third, True),
    "gpt_neox": ([f"gpt_neox.layers.{i}.attention.query_key_value" for i in (0, 1)], interleaved, False),
}


class Keys(TorchDispatchMode):
    """Records the keys of every attention."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[Tensor] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "scaled_dot_product" in str(func):
            self.found.append(args[1].clone())
        return func(*args, **kwargs or {})


def first_keys(model: nn.Module, inputs: Mapping[str, Any]) -> Tensor:
    """The keys of the first layer's attention."""
    with torch.no_grad(), Keys() as keys:
        model(**inputs)
    assert len(keys.found) == 2
    return keys.found[0]


@pytest.mark.parametrize("family", FUSED)
def test_lora_on_a_fused_projection(both: Any, family: str) -> None:
    mixes, columns, transposed = FUSED[family]
    rank, scale = 3, 2.0
    model, inputs = both.build(family, F64), both.example(family, F64)
    stored = {mix: model.get_submodule(mix).weight.detach().clone() for mix in mixes}
    base_keys = first_keys(model, inputs)

    theirs = both.wrap(family, peft.LoraConfig(r=rank, lora_alpha=rank * scale), F64)
    slots = {name: p for name, p in theirs.named_parameters() if p.requires_grad}
    shapes = [shape for _ in mixes for shape in ((rank, D), (3 * D, rank))]
    assert [tuple(p.shape) for p in slots.values()] == shapes  # one A for q, k and v together
    with torch.no_grad():
        for slot in slots.values():
            slot.copy_(0.2 * torch.randn_like(slot))
    assert both.difference(first_keys(theirs, inputs), base_keys) > 1e-2
    merged = theirs.merge_and_unload()
    for mix in mixes:
        delta = merged.get_submodule(mix).weight.detach() - stored[mix]
        delta = delta.T if transposed else delta
        parts = [delta[list(columns(part))] for part in range(3)]
        assert all(float(part.abs().max()) > 0.1 for part in parts)
        assert torch.linalg.matrix_rank(torch.cat(parts), rtol=1e-9) == rank

    program = both.traced(family, F64)
    tuned = zoo.randomise(program.apply(LoRA(rank=rank, alpha=rank * scale)), 0.2)
    p = tuned.table.trainable
    assert p.keys() == {f"{mix}.{role}.lora_{side}" for mix in mixes for role in "qv" for side in "AB"}
    copies = {name: value.detach().clone().requires_grad_() for name, value in p.items()}

    def add(mix: str) -> Change:
        def change(x: Tensor, out: Tensor) -> Tensor:
            for role, part in (("q", 0), ("v", 2)):
                a_RI, b_OR = copies[f"{mix}.{role}.lora_A"], copies[f"{mix}.{role}.lora_B"]
                out = out.index_add(-1, torch.tensor(columns(part)), scale * (x @ a_RI.T) @ b_OR.T)
            return out

        return change

    with changed(model, {mix: add(mix) for mix in mixes}):
        expected = both.answer(model(**inputs))
    output = tuned.module().eval()(**inputs)
    assert both.difference(both.answer(output), expected) < 1e-12
    assert torch.equal(first_keys(tuned.module().eval(), inputs), base_keys)
    both.loss(both.answer(output)).backward()
    both.loss(expected).backward()
    for name, value in p.items():
        assert both.difference(value.grad, copies[name].grad) < 1e-11, name

    folded = pg.fold(tuned)
    for mix in mixes:
        weight = folded.table[f"{mix}.weight"].tensor
        new, old = (weight.T, stored[mix].T) if transposed else (weight, stored[mix])
        assert torch.equal(new[list(columns(1))], old[list(columns(1))])
        for role, part in (("q", 0), ("v", 2)):
            update = scale * p[f"{mix}.{role}.lora_B"] @ p[f"{mix}.{role}.lora_A"]
            assert both.difference(new[list(columns(part))], old[list(columns(part))] + update) < 1e-14
        assert folded.table[f"{mix}.bias"].tensor is program.table[f"{mix}.bias"].tensor


# mixtures of experts


def test_lora_defaults_on_mixtral(both: Any) -> None:
    with pytest.raises(NoMatchingPeftModuleError, match="No `target_modules` passed"):
        both.wrap("mixtral", peft.LoraConfig(), F32)

    tuned = zoo.randomise(both.traced("mixtral", F32).apply(LoRA(rank=3, alpha=6.0)), 0.2)
    p = tuned.table.trainable
    places = [f"model.layers.{i}.self_attn.{name}_proj" for i in (0, 1) for name in "qv"]
    assert p.keys() == {f"{path}.lora_{side}" for path in places for side in "AB"}
    model, inputs = both.build("mixtral", F32), both.example("mixtral", F32)

    def add(path: str, x: Tensor, out: Tensor) -> Tensor:
        return out + 2 * (x @ p[f"{path}.lora_A"].T) @ p[f"{path}.lora_B"].T

    with changed(model, {path: partial(add, path) for path in places}):
        expected = both.answer(model(**inputs))
    assert both.difference(both.answer(tuned.module().eval()(**inputs)), expected) < 1e-5


@pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys did not match:RuntimeWarning")
def test_all_linear_layers_of_mixtral_without_the_router(both: Any) -> None:
    theirs = both.wrap("mixtral", peft.LoraConfig(target_modules="all-linear", r=3), F32)
    routers = [name for name, p in theirs.named_parameters() if ".mlp.gate.lora_" in name and p.requires_grad]
    assert len(routers) == 4

    program = both.traced("mixtral", F32)
    tuned = zoo.randomise(program.apply(LoRA(at="attention.*|ffn.*", rank=3)), 0.2)
    assert len(tuned.table.trainable) == 2 * 2 * 7
    assert not [name for name in tuned.table.trainable if ".mlp.gate." in name]
    folded = pg.fold(tuned)
    for layer in (0, 1):
        router, experts = (f"model.layers.{layer}.mlp.{name}" for name in ("gate.weight", "experts.down_proj"))
        assert folded.table[router].tensor is program.table[router].tensor
        assert not torch.equal(folded.table[experts].tensor, program.table[experts].tensor)


# tied embeddings: the head shares the embedding's tensor, so an update of the one must not reach the other


def fill(theirs: nn.Module, scale: float = 0.2) -> dict[str, Tensor]:
    """Random values for every trainable parameter of a peft model, the same for the same shapes."""
    generator = torch.Generator().manual_seed(5)
    slots = {name: p for name, p in theirs.named_parameters() if p.requires_grad}
    with torch.no_grad():
        for slot in {id(p): p for p in slots.values()}.values():
            slot.copy_(scale * torch.randn(slot.shape, generator=generator, dtype=F64))
    return slots


@pytest.mark.filterwarnings(ADAPTED_TIE, MERGED_TIE)
def test_merging_an_embedding_leaks_into_the_tied_head(both: Any) -> None:
    options = {"r": 3, "lora_alpha": 6}
    theirs = both.wrap("llama", peft.LoraConfig(target_modules=["embed_tokens"], **options), F64)
    fill(theirs)
    inputs = both.example("llama", F64)
    unmerged = both.answer(theirs(**inputs)).detach()
    merged = theirs.merge_and_unload()
    assert merged.lm_head.weight.data_ptr() == merged.model.embed_tokens.weight.data_ptr()
    assert both.difference(both.answer(merged(**inputs)), unmerged) > 1e-1

    tuned = zoo.randomise(both.traced("llama", F64).apply(LoRA(at="embedding", rank=3, alpha=6.0)), 0.2)
    a_RV, b_DR = (tuned.table.trainable[f"model.embed_tokens.lora_{side}"] for side in "AB")
    model = both.build("llama", F64)
    with changed(model, {"model.embed_tokens": lambda ids, out: out + 2 * a_RV.T[ids] @ b_DR.T}):
        expected = both.answer(model(**inputs))
    assert both.difference(both.answer(tuned.module().eval()(**inputs)), expected) < 1e-12
    with pytest.raises(pg.NoFold, match="tied to"):
        pg.fold(tuned)
    folded = pg.fold(tuned, untie=True)
    assert both.difference(both.answer(folded.module().eval()(**inputs)), expected) < 1e-12
    assert torch.equal(folded.table["lm_head.weight"].tensor, model.lm_head.weight)


@pytest.mark.filterwarnings(ADAPTED_TIE, MERGED_TIE)
def test_merging_tied_adapters_adds_the_update_twice(both: Any) -> None:
    config = peft.LoraConfig(target_modules=["embed_tokens"], ensure_weight_tying=True, r=3, lora_alpha=6)
    theirs = both.wrap("llama", config, F64)
    fill(theirs)
    embedding = theirs.get_submodule("base_model.model.model.embed_tokens")
    update = embedding.get_delta_weight("default").detach().clone()
    inputs = both.example("llama", F64)
    unmerged = both.answer(theirs(**inputs)).detach()
    base = both.build("llama", F64).model.embed_tokens.weight.detach()
    with changed(both.build("llama", F64), {}) as model:
        model.model.embed_tokens.weight.data = base + update  # the head shares it: one update, seen by both
        assert both.difference(both.answer(model(**inputs)), unmerged) < 1e-12
    merged = theirs.merge_and_unload()
    assert both.difference(merged.model.embed_tokens.weight.detach() - base, 2 * update) < 1e-12
    assert both.difference(both.answer(merged(**inputs)), unmerged) > 1e-1


@pytest.mark.filterwarnings(ADAPTED_TIE, MERGED_TIE)
def test_merging_embedding_and_tied_head_mixes_the_two(both: Any) -> None:
    config = peft.LoraConfig(target_modules=["embed_tokens", "lm_head"], r=3, lora_alpha=6)
    theirs = both.wrap("llama", config, F64)
    fill(theirs)
    inputs = both.example("llama", F64)
    unmerged = both.answer(theirs(**inputs)).detach()
    assert both.difference(both.answer(theirs.merge_and_unload()(**inputs)), unmerged) > 1e-1

    tuned = zoo.randomise(both.traced("llama", F64).apply(LoRA(at="embedding|head", rank=3, alpha=6.0)), 0.2)
    p = tuned.table.trainable  # one adapter, which both read
    update = 2 * (p["model.embed_tokens.lora_B"] @ p["model.embed_tokens.lora_A"]).detach().T
    model = both.build("llama", F64)
    table = nn.Parameter(model.lm_head.weight.detach() + update)
    model.lm_head.weight = model.model.embed_tokens.weight = table
    expected = both.answer(model(**inputs))
    assert both.difference(both.answer(tuned.module().eval()(**inputs)), expected) < 1e-12
    folded = pg.fold(tuned)
    assert both.difference(both.answer(folded.module().eval()(**inputs)), expected) < 1e-12


# arithmetic on adapters and on weights


def test_the_linear_combination_of_two_loras_has_cross_terms(both: Any) -> None:
    config = peft.LoraConfig(target_modules=["q_proj", "v_proj"], r=2, lora_alpha=4)
    theirs = peft.get_peft_model(both.build("llama", F64), config, adapter_name="one").eval()
    theirs.add_adapter("two", config)
    methods = [LoRA(rank=2, alpha=4.0, name=name) for name in ("one", "two")]
    tuned = zoo.randomise(both.traced("llama", F64).apply(*methods), 0.2)
    p = tuned.table.trainable
    with torch.no_grad():
        for name, slot in theirs.named_parameters():
            if "lora_" in name:
                path, side, adapter, _ = name.removeprefix("base_model.model.").rsplit(".", 3)
                slot.copy_(p[f"{path}.{adapter}.{side}"])
    theirs.add_weighted_adapter(["one", "two"], [1.0, 1.0], "sum", combination_type="linear")
    path = "model.layers.0.self_attn.q_proj"
    a, b = ([p[f"{path}.{name}.lora_{side}"] for name in ("one", "two")] for side in "AB")
    layer = theirs.get_submodule(f"base_model.model.{path}")
    exact = 2 * (b[0] @ a[0] + b[1] @ a[1])
    crossed = exact + 2 * (b[0] @ a[1] + b[1] @ a[0])
    assert both.difference(layer.get_delta_weight("sum"), crossed) < 1e-6  # peft weighs A and B in float32
    assert both.difference(layer.get_delta_weight("sum"), exact) > 0.5

    base = both.build("llama", F64).get_submodule(path).weight
    folded = pg.fold(tuned)
    assert both.difference(folded.table[f"{path}.weight"].tensor, base + exact) < 1e-14
    inputs = both.example("llama", F64)
    sides = [both.answer(program.module().eval()(**inputs)) for program in (tuned, folded)]
    assert both.difference(*sides) < 1e-12


def test_merging_and_unmerging_drifts_in_bfloat16(both: Any) -> None:
    model = both.build("llama", torch.bfloat16)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    theirs = peft.get_peft_model(model, peft.LoraConfig(r=3))
    fill(theirs, 0.05)
    for _ in range(5):
        theirs.merge_adapter()
        theirs.unmerge_adapter()
    after = dict(theirs.unload().named_parameters())
    drift = max(both.difference(after[name], weight) for name, weight in before.items())
    assert drift > 1e-3

    program = pg.trace(both.build("nano", torch.bfloat16), both.example("nano", F32))
    hashes = program.table.hashes()
    tuned = zoo.randomise(program.apply(LoRA(rank=3)), 0.05)
    for _ in range(5):
        folded = pg.fold(tuned)
    assert folded.table.hashes() != hashes
    assert program.table.hashes() == hashes
    assert tuned.remove().table.hashes() == hashes


@pytest.mark.filterwarnings("ignore:Careful, disabling adapter layers with bias configured to be:UserWarning")
def test_biases_that_trained_stay_when_the_adapter_is_disabled(both: Any) -> None:
    theirs = both.wrap("bert", peft.LoraConfig(bias="all", r=3), F64)
    inputs = both.example("bert", F64)
    base = both.answer(both.build("bert", F64)(**inputs))
    with theirs.disable_adapter():
        assert torch.equal(both.answer(theirs(**inputs)), base)
    with torch.no_grad():
        for name, p in theirs.named_parameters():
            if name.endswith("bias"):
                p.add_(0.1)
    with theirs.disable_adapter():
        assert both.difference(both.answer(theirs(**inputs)), base) > 1e-2

    program = both.traced("bert", F64)
    tuned = zoo.randomise(program.apply(LoRA(rank=3), BitFit()))
    assert both.difference(both.answer(tuned.module().eval()(**inputs)), base) > 1e-2
    for left in (program, tuned.remove(1).remove(0)):
        assert torch.equal(both.answer(left.module().eval()(**inputs)), base)


# trained tokens: rows of the table in the place of the base's, wherever it is read


def test_fresh_tokens_take_the_bias_of_a_tied_head_away() -> None:
    from transformers import BertConfig, BertForMaskedLM

    torch.manual_seed(0)
    sizes = {"vocab_size": zoo.VOCAB, "hidden_size": D, "intermediate_size": 80, "num_hidden_layers": 1}
    model = BertForMaskedLM(BertConfig(**sizes, num_attention_heads=HEADS)).eval()
    bias = model.cls.predictions.bias
    nn.init.normal_(bias)
    inputs = zoo.example("bert")
    with torch.no_grad():
        base = model(**inputs).logits
        fresh = pg.trace(model, inputs).apply(TrainableTokens(tokens=(3, 9))).module().eval()
        assert torch.equal(fresh(**inputs).logits, base)
        theirs = peft.get_peft_model(model, peft.TrainableTokensConfig(token_indices=[3, 9])).eval()
        torch.testing.assert_close(theirs(**inputs).logits, base - bias)


@pytest.mark.filterwarnings(ADAPTED_TIE)
def test_tokens_of_one_of_several_tied_modules(both: Any) -> None:
    config = peft.TrainableTokensConfig(token_indices=[3], target_modules=["encoder.embed_tokens"])
    theirs = peft.get_peft_model(both.build("t5", F32), config)
    assert [n for n, _ in theirs.named_modules() if n.endswith("base_layer")] == [
        "base_model.model.encoder.embed_tokens.base_layer"
    ]
    tuned = both.traced("t5", F32).apply(TrainableTokens(tokens=(3,), at='embedding&stack("encoder")'))
    assert [edit.site for edit in tuned.edits] == ["encoder.embedding", "decoder.embedding", "head"]


@pytest.mark.filterwarnings(ADAPTED_TIE)
def test_a_lora_of_an_embedding_whose_tokens_train(both: Any) -> None:
    config = peft.LoraConfig(target_modules=["embed_tokens"], trainable_token_indices=[3], r=3)
    with pytest.raises(TypeError, match="cannot be applied to modules of type .*Embedding"):
        peft.get_peft_model(both.build("llama", F32), config)
    passes = (LoRA(at="embedding|head", rank=3), TrainableTokens(tokens=(3,)))
    tuned = zoo.randomise(both.traced("llama", F32).apply(*passes))
    assert pg.fold(tuned, untie=True).proof is not None
