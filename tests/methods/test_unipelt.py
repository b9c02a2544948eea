"""UniPELT against the equations written into a plain model: gates of every sort, over every way to enter."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import zoo
from torch import Tensor, nn

import peftgraph as pg
from peftgraph.passes import IA3, BitFit, LoRA, ParallelAdapter, Pfeiffer, Prefix, UniPELT

F64 = torch.float64
RANK, LENGTH, WIDTH = 2, 3, 4
METHODS = (
    LoRA(rank=RANK, alpha=float(RANK)),
    Prefix(length=LENGTH, hidden=None),
    Pfeiffer(width=WIDTH),
    IA3(at="ffn.hidden"),
)


class Gated(nn.Module):
    """A one-layer `zoo.Nano` with LoRA on q and v, a prefix, a Pfeiffer adapter and (IA)3, each times its gate."""

    def __init__(self, model: zoo.Nano, same: dict[str, nn.Parameter], mask: Tensor | None) -> None:
        super().__init__()
        self.model, self.p, self.mask = model, nn.ParameterDict(same), mask

    def gate(self, name: str, x: Tensor) -> Tensor:
        opening = torch.sigmoid(x @ self.p[f"{name}_weight"].T + self.p[f"{name}_bias"])
        if self.mask is None:
            return opening.mean(1, keepdim=True)
        real = self.mask.unsqueeze(-1).to(x.dtype)
        return (opening * real).sum(1, keepdim=True) / real.sum(1, keepdim=True)

    def forward(self, idx: Tensor) -> dict[str, Tensor]:
        model, p = self.model, self.p
        (block,) = model.stack
        x = model.tok(idx) + model.pos(torch.arange(idx.shape[1]))
        b, s, d = x.shape
        y = block.n1(x)
        q, k, v = block.mix(y).split(d, 2)
        gates = {role: self.gate(self.gate_of("lora", role), y) for role in "qv"}
        q = q + gates["q"] * (y @ p["q_A"].T @ p["q_B"].T)
        v = v + gates["v"] * (y @ p["v_A"].T @ p["v_B"].T)
        q, k, v = (t.view(b, s, block.heads, -1).transpose(1, 2) for t in (q, k, v))
        opening = self.gate(self.gate_of("prefix"), y).unsqueeze(-1)
        rows = [p[f"prefix_{one}"].view(1, LENGTH, block.heads, -1).transpose(1, 2) * opening for one in "kv"]
        seen = torch.cat([torch.ones(s, LENGTH, dtype=torch.bool), torch.ones(s, s, dtype=torch.bool).tril()], 1)
        heads = nn.functional.scaled_dot_product_attention(
            q, torch.cat([rows[0], k], 2), torch.cat([rows[1], v], 2), attn_mask=seen
        )
        x = x + block.out(heads.transpose(1, 2).reshape(b, s, d))
        z = block.n2(x)
        opening = self.gate(self.gate_of("ia3"), nn.functional.gelu(block.fc(z)))
        x = x + block.proj(nn.functional.gelu(block.fc(z)) * (1 + opening * (p["ia3_l"] - 1)))
        narrow = (x @ p["down_weight"].T + p["down_bias"]).relu()
        x = x + self.gate(self.gate_of("pfeiffer"), x) * (narrow @ p["up_weight"].T + p["up_bias"])
        return {"logits": model.vocab(model.last(x))}

    def gate_of(self, method: str, role: str = "") -> str:
        return next(name for name in (f"{role}_{method}_gate", f"{method}_gate") if f"{name}_weight" in self.p)


def reference(bench: Any, tuned: pg.Program, mask: Tensor | None = None) -> tuple[nn.Module, dict[str, nn.Parameter]]:
    """The model with everything written in, and its parameters by our names."""
    same: dict[str, nn.Parameter] = {}
    short: dict[str, nn.Parameter] = {}
    for name, value in tuned.table.trainable.items():
        path, _, leaf = name.rpartition(".")
        same[name] = nn.Parameter(torch.empty_like(value))
        key = leaf.removeprefix("layer0_self_").removeprefix("layer0_")
        if leaf.startswith("lora_") and len(leaf) == 6:
            key = f"{path[-1]}_{leaf[-1]}"
        elif leaf.startswith("lora_gate"):
            key = f"{path[-1]}_{leaf}"
        assert key not in short
        short[key] = same[name]
    return Gated(bench.plain(), short, mask), same


@pytest.mark.parametrize("gates", ["method", "site"])
def test_outputs_and_gradients_are_the_equations(bench: Any, gates: str) -> None:
    tuned = zoo.randomise(bench.program.apply(UniPELT(methods=METHODS, gates=gates)), 0.5)
    bench.agree(tuned, *reference(bench, tuned))
    count = {"method": 4, "site": 5}[gates]
    assert sum("gate_weight" in name for name in tuned.table.trainable) == count


def test_one_gate_may_serve_a_layer() -> None:
    methods = (LoRA(rank=2, alpha=2.0), Prefix(length=3, hidden=None))
    base = zoo.traced("bert", "sdpa", F64)
    one, two = (base.apply(UniPELT(methods=methods, gates=gates)) for gates in ("shared", "method"))
    names = [name.rpartition(".")[2] for name in one.table.trainable if "gate" in name]
    assert names == ["layer0_gate_weight", "layer0_gate_bias", "layer1_gate_weight", "layer1_gate_bias"]
    with torch.no_grad():
        for name, value in two.table.trainable.items():
            source = (
                name
                if "gate" not in name
                else f"unipelt.layer{name.split('layer')[1][0]}_gate_{name[-6:] if name.endswith('weight') else 'bias'}"
            )
            value.copy_(one.table[source].tensor)
    inputs = zoo.example("bert", 2, 9, F64)
    a, b = (program.module().eval()(**inputs).last_hidden_state for program in (one, two))
    assert torch.equal(a, b)


@pytest.mark.parametrize("tokens_only", [True, False])
def test_padding_changes_no_answer_where_gates_see_tokens_alone(tokens_only: bool) -> None:
    methods = (LoRA(rank=2, alpha=2.0), Prefix(length=3, hidden=None), ParallelAdapter(width=3))
    program = zoo.traced("bert", "sdpa", F64).apply(UniPELT(methods=methods, tokens_only=tokens_only))
    net = zoo.randomise(program, 0.5).module().eval()
    inputs = zoo.example("bert", 2, 9, F64)
    inputs["attention_mask"][0] = torch.arange(9) < 6
    batch = net(**inputs).last_hidden_state[:1, :6]
    alone = net(**{key: value[:1, :6] for key, value in inputs.items()}).last_hidden_state
    apart = float((batch - alone).abs().max().detach())
    assert (apart < 1e-13) if tokens_only else (apart > 1e-5)


def test_all_tokens_count_where_the_model_has_no_mask(bench: Any) -> None:
    every, tokens = (bench.program.apply(UniPELT(methods=METHODS, tokens_only=one)) for one in (False, True))
    assert every.text() == tokens.text()


def test_a_gate_reads_the_example_and_not_the_batch() -> None:
    program = zoo.randomise(zoo.traced("llama", "sdpa", F64).apply(UniPELT(methods=METHODS)), 0.5)
    net, inputs = program.module().eval(), zoo.example("llama", 3, 9, F64, masked=False)
    batch = net(**inputs).logits
    for i in range(3):
        alone = net(**{key: value[i : i + 1] for key, value in inputs.items()}).logits
        assert float((alone - batch[i : i + 1]).abs().max().detach()) < 1e-12


def test_finalize_keeps_the_outputs_and_the_gates() -> None:
    methods = (LoRA(rank=2), Prefix(length=3, hidden=4))
    base, inputs = zoo.traced("gpt2", "sdpa", F64), zoo.example("gpt2", 2, 9, F64)
    program = zoo.randomise(base.apply(UniPELT(methods=methods)))
    final = program.finalize()
    assert torch.equal(*(one.module().eval()(**inputs).logits for one in (program, final)))
    assert final.text() == base.apply(UniPELT(methods=(LoRA(rank=2), Prefix(length=3, hidden=None)))).text()


def test_what_a_gate_lets_in_does_not_fold() -> None:
    program = zoo.traced("bert").apply(UniPELT(methods=(LoRA(rank=2),)))
    with pytest.raises(pg.NoFold, match="its gate depends on the input"):
        pg.fold(program)


def test_parameters_that_train_in_place_stay_without_a_gate() -> None:
    program = zoo.traced("bert").apply(UniPELT(methods=(LoRA(rank=2), BitFit())))
    assert program.count().trainable > zoo.traced("bert").apply(BitFit()).count().trainable
    assert sum("gate_weight" in name for name in program.table.trainable) == 2


def test_routed_experts_have_no_gate() -> None:
    with pytest.raises(
        pg.PeftGraphError, match="which is no .batch, positions, features.: a gate is a number for each"
    ):
        zoo.traced("mixtral").apply(UniPELT(methods=(LoRA(at="ffn.down", rank=2),)))


def test_specs_round_trip() -> None:
    method = UniPELT(methods=METHODS, gates="site", tokens_only=True)
    assert pg.parse_pass(str(method)) == method


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"gates": "two"}, "gates must be"),
        ({"methods": ()}, "at least one method"),
        ({"methods": (pg.Pipeline([LoRA()]),)}, "is a pipeline"),
        ({"methods": (LoRA(), LoRA(rank=4))}, "two of its methods are of one sort"),
    ],
)
def test_options_are_checked(options: dict[str, Any], words: str) -> None:
    with pytest.raises(pg.RecipeError, match=words):
        UniPELT(**options)
