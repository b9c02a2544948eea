"""LoRA and (IA)3 equal huggingface/peft's wherever peft puts them in the right place.

The same base, the same values of A, B and l: outputs, every gradient, training step by step, merged weights,
and what the merged models give.
"""

from __future__ import annotations

from typing import Any

import peft
import pytest
import torch
import zoo
from torch import Tensor, nn

import peftgraph as pg
from peftgraph.authoring import Pass
from peftgraph.passes import IA3, DoRA, LoRA

TIED = "ignore:Model has `tie_word_embeddings=True` and a tied layer is part of the adapter:UserWarning"
pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False but the target module is:UserWarning"),
    pytest.mark.filterwarnings(TIED),
]
F32, F64 = torch.float32, torch.float64
LINEARS = "attention.*|ffn.*"
ALL_BERT = ["query", "key", "value", "intermediate.dense", "output.dense"]
HIDDEN_BERT = r".*encoder\.layer\.\d+\.output\.dense"
PAPER_BERT = r".*(key|value|encoder\.layer\.\d+\.output\.dense)"
PAPER_PROJ = (["k_proj", "v_proj", "fc2"], ["fc2"])


def lora(name: str, at: str, targets: Any, ours: Any = None, **more: Any) -> tuple[str, Pass, type, dict[str, Any]]:
    options = {"target_modules": targets, "r": 3, "lora_alpha": 5, **more}
    return name, LoRA(at=at, rank=3, alpha=5.0, **(ours or {})), peft.LoraConfig, options


def dora(name: str, at: str, targets: Any) -> tuple[str, Pass, type, dict[str, Any]]:
    options = {"target_modules": targets, "r": 3, "lora_alpha": 5, "use_dora": True}
    return name, DoRA(at=at, rank=3, alpha=5.0), peft.LoraConfig, options


def ia3(name: str, targets: Any = None, inside: Any = None) -> tuple[str, Pass, type, dict[str, Any]]:
    return name, IA3(), peft.IA3Config, {"target_modules": targets, "feedforward_modules": inside}


# None as targets: peft's own default for the family.
CASES: dict[str, tuple[str, Pass, type, dict[str, Any]]] = {
    "lora-bert": lora("bert", "attention.q|attention.v", None),
    "lora-bert-all": lora("bert", LINEARS, ALL_BERT),
    "lora-llama-grouped-heads": lora("llama", "attention.q|attention.v", None),
    "lora-llama-all": lora("llama", LINEARS, "all-linear"),
    "lora-llama-embedding": lora("llama", "embedding", ["embed_tokens"]),
    "lora-gpt2-unfused": lora("gpt2", "attention.o|ffn.*", ["c_proj", "c_fc"]),
    "lora-neox-unfused": lora("gpt_neox", "attention.o|ffn.*", ["attention.dense", "dense_h_to_4h", "dense_4h_to_h"]),
    "lora-t5-self-and-cross": lora("t5", "attention.q|attention.v", None),
    "lora-vit": lora("vit", "attention.q|attention.v", ["q_proj", "v_proj"]),
    "lora-mixtral": lora("mixtral", "attention.q|attention.v", ["q_proj", "v_proj"]),
    "lora-nano": lora("nano", "attention.o|ffn.*", ["out", "fc", "proj"]),
    "lora-rank-stabilised": lora("llama", LINEARS, "all-linear", {"rank_stabilised": True}, use_rslora=True),
    "lora-its-biases": lora("bert", "attention.q|attention.v", None, {"bias": "lora_only"}, bias="lora_only"),
    "lora-all-biases": lora("vit", "ffn.up", ["fc1"], {"bias": "all"}, bias="all"),
    "dora-bert-biases": dora("bert", LINEARS, ALL_BERT),
    "dora-llama-grouped-heads": dora("llama", "attention.q|attention.v", None),
    "dora-gpt2-transposed": dora("gpt2", "attention.o|ffn.*", ["c_proj", "c_fc"]),
    "ia3-llama": ia3("llama"),
    "ia3-t5": ia3("t5"),
    "ia3-bert-named": ia3("bert", PAPER_BERT, HIDDEN_BERT),
    "ia3-vit-named": ia3("vit", *PAPER_PROJ),
    "ia3-opt-named": ia3("opt", *PAPER_PROJ),
    "ia3-bart-named": ia3("bart", *PAPER_PROJ),
}
SINGLE = ("lora-bert", "lora-llama-grouped-heads", "lora-llama-all", "lora-mixtral", "ia3-llama")
EXACT = [(case, F64) for case in CASES if case != "lora-mixtral"]  # torch has no float64 grouped product
TOLERANCE = {F64: 1e-12, F32: 1e-6}


def start(both: Any, case: str, dtype: torch.dtype = F64, **more: Any) -> Any:
    name, method, config, options = CASES[case]
    return both.tune(name, method, config(**options, **more), dtype)


@pytest.mark.parametrize(("case", "dtype"), EXACT + [(case, F32) for case in SINGLE])
def test_outputs_and_gradients(both: Any, case: str, dtype: torch.dtype) -> None:
    pair = start(both, case, dtype)
    ours, theirs = pair.outputs()
    assert both.difference(ours, theirs) < TOLERANCE[dtype]
    base = both.answer(both.build(CASES[case][0], dtype)(**pair.inputs))
    assert both.difference(ours, base) > 1e-3
    found = list(pair.gradients())
    assert len(found) == len(pair.tuned.table.trainable)
    for name, our, their in found:
        assert their.abs().max() > 0, name
        assert both.difference(our, their) < TOLERANCE[dtype], name


@pytest.mark.parametrize("case", ["lora-bert", "lora-llama-all", "lora-t5-self-and-cross", "ia3-llama", "ia3-t5"])
def test_adamw_step_by_step(both: Any, case: str) -> None:
    pair = start(both, case)
    sides = list(zip(*pair.shared.values(), strict=True))
    optimisers = [torch.optim.AdamW(side, lr=1e-2, weight_decay=0.01) for side in sides]
    losses: list[float] = []
    for _ in range(5):
        for optimiser in optimisers:
            optimiser.zero_grad()
        ours, theirs = map(both.loss, pair.outputs())
        assert both.difference(ours, theirs) < 1e-12
        (ours + theirs).backward()
        for optimiser in optimisers:
            optimiser.step()
        for name, (our, their) in pair.shared.items():
            assert both.difference(our, their.reshape(our.shape)) < 1e-10, name
        losses.append(float(ours.detach()))
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("case", ["lora-llama-grouped-heads", "lora-vit", "lora-nano"])
def test_dropout_draws_the_same_masks(both: Any, case: str) -> None:
    name, _, config, options = CASES[case]
    method = LoRA(at=CASES[case][1].at, rank=3, alpha=5.0, dropout=0.25)  # type: ignore[attr-defined]
    pair = both.tune(name, method, config(**options, lora_dropout=0.25))
    outputs: list[Tensor] = []
    for module in (pair.net.train(), pair.theirs.train()):
        torch.manual_seed(3)
        outputs.append(both.answer(module(**pair.inputs)))
    assert both.difference(*outputs) < 1e-12
    assert both.difference(outputs[0], both.answer(pair.net.eval()(**pair.inputs))) > 1e-3


@pytest.mark.parametrize("case", [case for case, _ in EXACT if case != "lora-llama-embedding"])
def test_merged_weights_and_outputs(both: Any, case: str) -> None:
    pair = start(both, case)
    folded = pg.fold(pair.tuned)
    merged = pair.theirs.merge_and_unload()
    state = merged.state_dict()
    weights = {name: entry.tensor for name, entry in folded.table.items() if entry.kind == "parameter"}
    assert weights.keys() <= state.keys()
    for name, weight in weights.items():
        assert both.difference(weight, state[name]) < 1e-15, name
    changed = {name for name, weight in weights.items() if weight is not pair.tuned.table[name].tensor}
    adapted = pair.tuned.sites.select(CASES[case][1].at)  # type: ignore[attr-defined]
    expected = {site.weight.parameter for site in adapted}
    expected |= pair.tuned.table.trainable.keys() & pair.tuned.base.table.keys()
    if case.startswith("ia3"):
        expected |= {site.bias.parameter for site in adapted if site.bias and site.role != "ffn.hidden"}
    assert changed == expected
    result = both.answer(folded.module().eval()(**pair.inputs))
    assert both.difference(result, both.answer(merged(**pair.inputs))) < 1e-12
    assert both.difference(result, pair.outputs()[0]) < 1e-12


def test_lora_on_each_expert_of_a_stack(both: Any) -> None:
    config = peft.LoraConfig(target_parameters=["mlp.experts.down_proj"], target_modules=[], r=3, lora_alpha=5)
    theirs = both.wrap("mixtral", config, F32)
    tuned = zoo.randomise(both.traced("mixtral", F32).apply(LoRA(at="ffn.down", rank=3, alpha=5.0)), 0.2)
    slots, shared = dict(theirs.named_parameters()), []
    with torch.no_grad():
        for name, ours in tuned.table.trainable.items():
            path, _, leaf = name.rpartition(".")
            slot = slots[f"base_model.model.{path.removesuffix('.down_proj_down')}.{leaf}.default.weight"]
            # peft keeps A as (E R, I) and B as (O, R E); ours are (E, R, I) and (E, O, R)
            value = ours.flatten(0, 1) if leaf == "lora_A" else ours.permute(1, 2, 0).flatten(1)
            slot.copy_(value)
            shared.append((ours, slot))
    inputs = both.example("mixtral", F32)
    ours, theirs = both.answer(tuned.module().eval()(**inputs)), both.answer(theirs(**inputs))
    assert len(shared) == sum(p.requires_grad for p in slots.values()) == 4
    assert both.difference(ours, theirs) < 1e-5  # peft adds B A to the weight first
    both.loss(ours).backward()
    both.loss(theirs).backward()
    for our, slot in shared:
        their = slot.grad.reshape(our.shape) if our.shape[1] == 3 else slot.grad.unflatten(1, (3, -1)).permute(2, 0, 1)
        assert both.difference(our.grad, their) < 1e-5


def test_a_gated_unit_may_be_scaled_on_its_linear_branch(both: Any) -> None:
    """peft scales the output of mT5's wi_1, ours the product that enters wo: act(g) (l u) = l (act(g) u)."""
    from transformers import MT5Config, MT5EncoderModel

    def build() -> nn.Module:
        torch.manual_seed(0)
        sizes = {"d_model": 48, "d_ff": 80, "d_kv": 8, "num_layers": 1, "num_heads": 6}
        return MT5EncoderModel(MT5Config(vocab_size=zoo.VOCAB, **sizes)).eval().to(F64)

    theirs = peft.get_peft_model(build(), peft.IA3Config(task_type="FEATURE_EXTRACTION")).eval()
    inputs = zoo.example("bert")
    tuned = zoo.randomise(pg.trace(build(), inputs).apply(IA3()), 0.2)
    slots = {name: p for name, p in theirs.named_parameters() if p.requires_grad}
    shared = []
    with torch.no_grad():
        for name, ours in tuned.table.trainable.items():
            place = name.replace(".wo.", ".wi_1.")
            slot = slots.pop(f"base_model.model.{place}.default")
            slot.copy_(ours.reshape(slot.shape))
            shared.append((ours, slot))
    assert not slots
    results = [both.answer(module(**inputs)) for module in (tuned.module().eval(), theirs)]
    assert both.difference(*results) < 1e-12
    for result in results:
        both.loss(result).backward()
    for ours, slot in shared:
        assert both.difference(ours.grad, slot.grad.flatten()) < 1e-11


def test_pissa_starts_where_peft_does(both: Any) -> None:
    """peft overwrites W by W - s B A; ours keeps W and takes the frozen s B0 A0 off.

    In float32, since peft refuses to decompose float64.
    """
    config = peft.LoraConfig(target_modules=["c_attn", "c_fc"], r=3, lora_alpha=5, init_lora_weights="pissa")
    theirs = both.wrap("gpt2", config, F32)
    tuned = both.traced("gpt2", F32).apply(LoRA(at="ffn.up", rank=3, alpha=5.0, init="pissa"))
    slots, inputs = dict(theirs.named_parameters()), both.example("gpt2", F32)
    base = both.answer(tuned.base.module().eval()(**inputs))
    assert torch.equal(both.answer(tuned.module().eval()(**inputs)), base)
    assert both.difference(both.answer(theirs(**inputs)), base) < 1e-5
    for name in tuned.table.trainable:
        path, _, leaf = name.rpartition(".")
        a, b = (slots[f"base_model.model.{path}.lora_{side}.default.weight"] for side in "AB")
        if leaf == "lora_A":  # singular vectors are unique up to their signs, the product is unique
            product = tuned.table[f"{path}.lora_B"].tensor @ tuned.table[name].tensor
            assert both.difference(product, b @ a) < 1e-5


def test_pissa_trains_as_peft_does(both: Any) -> None:
    config = peft.LoraConfig(target_modules=["q_proj", "v_proj"], r=3, lora_alpha=5, init_lora_weights="pissa")
    theirs, inputs = both.wrap("llama", config, F32), both.example("llama", F32)
    tuned = both.traced("llama", F32).apply(LoRA(rank=3, alpha=5.0, init="pissa"))
    slots, shared = dict(theirs.named_parameters()), []
    with torch.no_grad():
        for name, ours in tuned.table.trainable.items():
            path, _, leaf = name.rpartition(".")
            slot = slots[f"base_model.model.{path}.{leaf}.default.weight"]
            for mine in (ours, tuned.table[f"{name}0"].tensor):  # the same signs, and the same start to take off
                mine.copy_(slot)
            shared.append((ours, slot))
    optimisers = [torch.optim.SGD(side, lr=1e-2) for side in zip(*shared, strict=True)]
    net = tuned.module().eval()
    for _ in range(3):
        for module, optimiser in zip((net, theirs), optimisers, strict=True):
            optimiser.zero_grad()
            both.loss(both.answer(module(**inputs))).mul(1e-3).backward()
        for ours, slot in shared:
            assert both.difference(ours.grad, slot.grad) < 1e-4
        for optimiser in optimisers:
            optimiser.step()
    merged = theirs.merge_and_unload()
    result = both.answer(pg.fold(tuned).module().eval()(**inputs))
    assert both.difference(result, both.answer(merged(**inputs))) < 1e-5
    assert both.difference(result, both.answer(tuned.base.module().eval()(**inputs))) > 1e-3


def test_a_weighted_sum_is_pefts_concatenation(both: Any) -> None:
    config = peft.LoraConfig(target_modules=["q_proj", "v_proj"], r=2, lora_alpha=4)
    theirs = peft.get_peft_model(both.build("llama", F32), config, adapter_name="one").eval()
    theirs.add_adapter("two", config)
    methods = [LoRA(rank=2, alpha=4.0, name=name) for name in ("one", "two")]
    tuned = zoo.randomise(both.traced("llama", F32).apply(*methods), 0.2)
    with torch.no_grad():
        for name, slot in theirs.named_parameters():
            if "lora_" in name:
                path, side, adapter, _ = name.removeprefix("base_model.model.").rsplit(".", 3)
                slot.copy_(tuned.table[f"{path}.{adapter}.{side}"].tensor)
    theirs.add_weighted_adapter(["one", "two"], [1.0, -0.5], "sum", combination_type="cat")
    theirs.set_adapter("sum")
    inputs = both.example("llama", F32)
    ours = both.answer(tuned.mix({"one": 1.0, "two": -0.5}).module().eval()(**inputs))
    assert both.difference(ours, both.answer(theirs(**inputs))) < 1e-6
    assert both.difference(ours, both.answer(tuned.module().eval()(**inputs))) > 1e-3
