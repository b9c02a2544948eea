"""Ladder side-tuning against the library's own models at the narrow size, wired by the paper's equation."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import zoo
from torch import Tensor, nn

import peftgraph as pg
from peftgraph.passes import LadderSide, LoRA

F64 = torch.float64
R = 2
# the attribute of the layers of each stack, by the stack's name in the parameters
STACKS = {
    "bert": {"blocks": "encoder.layer"},
    "llama": {"blocks": "model.layers"},
    "t5": {"encoder": "encoder.block", "decoder": "decoder.block"},
}
SIDES = {
    "bert": {"hidden_size": zoo.WIDTH // R, "intermediate_size": zoo.FFN // R},
    "llama": {
        "hidden_size": zoo.WIDTH // R,
        "intermediate_size": zoo.FFN // R,
        "head_dim": zoo.WIDTH // zoo.HEADS // R,
    },
    "t5": {"d_model": zoo.WIDTH // R, "d_ff": zoo.FFN // R, "d_kv": zoo.WIDTH // zoo.HEADS // R},
}


def narrow_model(name: str) -> nn.Module:
    """The library's model at half of every width, with random weights."""
    kind, config, sizes = zoo.LIBRARY[name]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = getattr(transformers, config)(**sizes | SIDES[name], attn_implementation="sdpa")
        return getattr(transformers, kind)(made).to(F64).eval()


class Ladder(nn.Module):
    """The base, its narrow twin, and the equation between them."""

    def __init__(self, name: str, keep: tuple[int, ...]) -> None:
        super().__init__()
        self.name, self.keep = name, keep
        self.base = zoo.build(name, dtype=F64).requires_grad_(False)
        self.side = narrow_model(name)
        self.down, self.gates = nn.ModuleDict(), nn.ParameterDict()
        for stack, path in STACKS[name].items():
            layers = self.base.get_submodule(path)
            assert isinstance(layers, nn.ModuleList)
            for which in ("embedded", *keep):
                self.down[f"{stack}-{which}"] = nn.Linear(zoo.WIDTH, zoo.WIDTH // R, dtype=F64)
            self.gates[stack] = nn.Parameter(torch.zeros(len(layers), dtype=F64))
        self.up = nn.Linear(zoo.WIDTH // R, zoo.WIDTH, dtype=F64)

    def load(self, tuned: pg.Program) -> dict[str, Tensor]:
        """Takes the program's values; returns each of its names with the parameter here."""
        same: dict[str, Tensor] = {}
        for full, value in tuned.table.trainable.items():
            kind, _, rest = full.removeprefix("ladder_side.").partition(".")
            if kind == "copy":
                mine = self.side.get_parameter(rest)
            elif kind == "gates":
                mine = self.gates[rest]
            else:
                stack, _, leaf = rest.rpartition(".")
                module = self.up if kind == "up" else self.down[stack.replace(".", "-")]
                mine = module.get_parameter(leaf)
            with torch.no_grad():
                mine.copy_(value)
            same[full] = mine
        return same

    def run(self, **inputs: Any) -> Tensor:
        """The outputs by the equation: h_i = B'_i(m_i h_(i-1) + (1 - m_i) Down_i b_i)."""
        taps: dict[str, Tensor] = {}
        handles = [*self.tap(taps), *self.mix(taps)]
        try:
            with torch.no_grad():
                self.base(**inputs)
            return self.climb(taps, inputs)
        finally:
            for handle in handles:
                handle.remove()

    def tap(self, taps: dict[str, Tensor]) -> list[Any]:
        """Records what the base's first blocks read and what all of them give."""
        handles: list[Any] = []
        for stack, path in STACKS[self.name].items():
            layers: Any = self.base.get_submodule(path)

            def embedded(_: nn.Module, args: Any, key: str = f"{stack}-embedded") -> None:
                taps[key] = args[0]

            handles.append(layers[0].register_forward_pre_hook(embedded))
            for i, layer in enumerate(layers):

                def given(_: nn.Module, __: Any, out: Any, key: str = f"{stack}-{i}") -> None:
                    taps[key] = out[0] if isinstance(out, tuple) else out

                handles.append(layer.register_forward_hook(given))
        return handles

    def mix(self, taps: dict[str, Tensor]) -> list[Any]:
        """Mixes what a narrow block reads with the tap of the base's."""
        handles: list[Any] = []
        for stack, path in STACKS[self.name].items():
            layers: Any = self.side.get_submodule(path)
            for i in self.keep:

                def mixed(_: nn.Module, args: Any, key: str = f"{stack}-{i}", stack: str = stack, i: int = i) -> Any:
                    gate = torch.sigmoid(self.gates[stack][i] / 0.1)
                    return (gate * args[0] + (1 - gate) * self.down[key](taps[key]), *args[1:])

                handles.append(layers[i].register_forward_pre_hook(mixed))
        return handles

    def climb(self, taps: dict[str, Tensor], inputs: dict[str, Any]) -> Tensor:
        start = {stack: self.down[f"{stack}-embedded"](taps[f"{stack}-embedded"]) for stack in STACKS[self.name]}
        return CLIMBS[self.name](self, start, inputs)


def climb_bert(ladder: Ladder, start: dict[str, Tensor], inputs: dict[str, Any]) -> Tensor:
    side: Any = ladder.side
    side.embeddings.forward = lambda **_: start["blocks"]
    return ladder.up(side(**inputs).last_hidden_state)


def climb_llama(ladder: Ladder, start: dict[str, Tensor], inputs: dict[str, Any]) -> Tensor:
    side: Any = ladder.side
    base: Any = ladder.base
    rest = {key: value for key, value in inputs.items() if key != "input_ids"}
    h = side.model(inputs_embeds=start["blocks"], **rest).last_hidden_state
    return base.lm_head(ladder.up(h))


def climb_t5(ladder: Ladder, start: dict[str, Tensor], inputs: dict[str, Any]) -> Tensor:
    side: Any = ladder.side
    base: Any = ladder.base
    mask = inputs["attention_mask"]
    memory = side.encoder(inputs_embeds=start["encoder"], attention_mask=mask).last_hidden_state
    h = side.decoder(
        inputs_embeds=start["decoder"], encoder_hidden_states=memory, encoder_attention_mask=mask, use_cache=False
    ).last_hidden_state
    return base.lm_head(ladder.up(h) * zoo.WIDTH**-0.5)


CLIMBS: dict[str, Callable[[Ladder, dict[str, Tensor], dict[str, Any]], Tensor]] = {
    "bert": climb_bert,
    "llama": climb_llama,
    "t5": climb_t5,
}


def base(name: str) -> pg.Program:
    """The program; of a decoder with positions among its inputs, as generation gives them."""
    return zoo.positioned(name) if name == "llama" else zoo.traced(name, dtype=F64)


def example(name: str) -> dict[str, Any]:
    """Inputs of that program, padded on the right."""
    inputs = zoo.example(name, 2, 9, F64)
    return inputs | ({"position_ids": torch.arange(9).repeat(2, 1)} if name == "llama" else {})


@cache
def tuned(name: str) -> pg.Program:
    """The program with a ladder whose gates are not all one half."""
    torch.manual_seed(0)
    return zoo.randomise(base(name).apply(LadderSide(reduction=R)))


@pytest.mark.parametrize("name", STACKS)
def test_outputs_and_gradients_are_those_of_the_equation(name: str) -> None:
    program, ladder = tuned(name), Ladder(name, (0, 1))
    same = ladder.load(program)
    inputs = example(name)
    ours = zoo.leaves(program.module().eval()(**inputs))[0]
    theirs = ladder.run(**inputs)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-11 * float(theirs.detach().abs().max()))
    weights = torch.randn_like(ours)
    parameters = program.table.trainable
    mine = torch.autograd.grad((ours * weights).sum(), list(parameters.values()))
    other = torch.autograd.grad((theirs * weights).sum(), [same[key] for key in parameters])
    largest = max(float(grad.abs().max()) for grad in other)
    for key, a, b in zip(parameters, mine, other, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-11 * largest, msg=key)


@pytest.mark.parametrize("name", STACKS)
def test_of_the_model_the_taps_alone_are_kept_for_the_gradients(name: str) -> None:
    net = tuned(name).module().train()
    stored = {tensor.untyped_storage().data_ptr() for tensor in (*net.parameters(), *net.buffers())}
    kept: dict[int, Tensor] = {}

    def pack(value: Tensor) -> Tensor:
        if value.untyped_storage().data_ptr() not in stored and zoo.WIDTH in value.shape:
            kept[value.untyped_storage().data_ptr()] = value
        return value

    outputs: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value):
        outputs = zoo.leaves(net(**example(name)))
    taps = [one for one in kept.values() if one.dtype == F64]
    behind = {"bert": 1, "llama": 0, "t5": 1}[name]  # what the head keeps of Up's result: a pooler, a dropout
    assert len(taps) == 3 * len(STACKS[name]) + behind
    assert all(one.requires_grad for one in outputs[:1])


def test_nothing_reaches_the_model_even_where_it_trains() -> None:
    program = zoo.traced("bert", dtype=F64).apply(LoRA(rank=2), LadderSide(reduction=R))
    zoo.leaves(program.module()(**zoo.example("bert", 2, 9, F64)))[0].square().sum().backward()
    reached = {key for key, value in program.table.trainable.items() if value.grad is not None}
    assert reached == {key for key in program.table.trainable if key.startswith("ladder_side.")}


@pytest.mark.parametrize("init", ["prune", "random"])
def test_weights_start_from_the_models_own(init: Any) -> None:
    program = zoo.traced("bert", dtype=F64).apply(LadderSide(reduction=R, init=init))
    path = "encoder.layer.0.intermediate.dense"
    base, mine = (program.table[f"{prefix}{path}.weight"].tensor for prefix in ("", "ladder_side.copy."))
    bias, my_bias = (program.table[f"{prefix}{path}.bias"].tensor for prefix in ("", "ladder_side.copy."))
    found = (base.flatten() == mine.reshape(-1, 1)).any()
    assert bool(found) == (init == "prune")
    if init == "random":
        assert not my_bias.any()
        return
    norms = base.abs().sum(1) + program.table["encoder.layer.0.output.dense.weight"].tensor.abs().sum(0)
    rows = norms.topk(zoo.FFN // R).indices.sort().values
    assert torch.equal(my_bias, bias[rows])
    columns = [int((base[rows] == column[:, None]).all(0).nonzero()) for column in mine.T]
    assert columns == sorted(set(columns))
    norm = program.table["ladder_side.copy.encoder.layer.1.output.LayerNorm.weight"].tensor
    assert torch.equal(norm, program.table["encoder.layer.1.output.LayerNorm.weight"].tensor[columns])


def squared_gradients(batches: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The mean over batches of the squared gradient of every parameter of the model."""
    model = zoo.build("bert", dtype=F64)
    found: dict[str, Tensor] = {}
    for batch in batches:
        loss = model(**batch).last_hidden_state.square().mean()
        grads = torch.autograd.grad(loss, list(model.parameters()), materialize_grads=True)
        for (name, _), grad in zip(model.named_parameters(), grads, strict=True):
            found[name] = found.get(name, torch.zeros_like(grad)) + grad.square() / len(batches)
    return found


def test_weights_start_by_fisher_information(tmp_path: Path) -> None:
    base, method = zoo.traced("bert", dtype=F64), LadderSide(reduction=R, init="fisher")
    batches = [zoo.example("bert", 1, 6, F64) for _ in range(3)]
    ready = base.calibrate(batches, method, loss=lambda output: output[0].square().mean())
    program, fisher, path = ready.apply(method), squared_gradients(batches), "encoder.layer.1"
    up, down = (f"{path}.{part}.dense.weight" for part in ("intermediate", "output"))
    rows = (fisher[up].sum(1) + fisher[down].sum(0)).topk(zoo.FFN // R).indices.sort().values
    by_size = (base.table[up].tensor.abs().sum(1) + base.table[down].tensor.abs().sum(0)).topk(zoo.FFN // R).indices
    assert not torch.equal(rows, by_size.sort().values)
    bias = up.replace("weight", "bias")
    assert torch.equal(program.table[f"ladder_side.copy.{bias}"].tensor, base.table[bias].tensor[rows])
    loaded = base.load_adapter(program.save_adapter(tmp_path / "side"))  # without the data
    assert torch.equal(loaded.table[f"ladder_side.copy.{up}"].tensor, program.table[f"ladder_side.copy.{up}"].tensor)
    with pytest.raises(pg.PeftGraphError, match=r"attention.* computed from data \(fisher\)\. Calibrate the program"):
        base.apply(method)
    other = base.calibrate(batches, LoRA(at="attention.*", init="eva"))  # knows something else of these sites
    with pytest.raises(pg.PeftGraphError, match=r"computed from data \(fisher\)"):
        other.apply(method)


def test_heads_keep_as_many_features_each_and_rotated_ones_their_pairs() -> None:
    program = base("llama").apply(LadderSide(reduction=R))

    def rows(part: str) -> list[int]:
        base, mine = (
            program.table[f"{prefix}model.layers.0.self_attn.{part}.weight"].tensor
            for prefix in ("", "ladder_side.copy.")
        )
        return [int(torch.isin(base, row).sum(1).argmax()) for row in mine]

    size = zoo.WIDTH // zoo.HEADS
    assert rows("q_proj") == list(range(0, zoo.WIDTH, R))
    assert [row // size for row in rows("v_proj")] == [0] * 4 + [1] * 4
    assert [row % size for row in rows("o_proj")] != []


def test_blocks_without_a_rung_are_passed_by() -> None:
    base = zoo.traced("t5", dtype=F64)
    program = base.apply(LadderSide(reduction=R, keep=(1,)))
    names = program.table.trainable
    assert not any(".block.0." in name and "relative_attention_bias" not in name for name in names)
    assert sum("relative_attention_bias" in name for name in names) == 2  # tables of the layers that are kept
    assert [names[f"ladder_side.gates.{stack}"].shape for stack in STACKS["t5"]] == [(2,), (2,)]
    with pytest.raises(pg.RecipeError, match=r"keep names layers \[2\], and the model has 2"):
        base.apply(LadderSide(reduction=R, keep=(0, 2)))


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("name", ["t5", "llama"])
def test_generation_is_that_of_the_equation(name: str, cached: bool) -> None:
    program = tuned(name)
    if cached:
        program = same_values(program, zoo.cached(name).apply(LadderSide(reduction=R)))
    net: Any = program.module().eval()
    ladder = Ladder(name, (0, 1))
    ladder.load(program)
    inputs = zoo.example(name, 2, 6, masked=False)
    given = {key: value for key, value in inputs.items() if key != "decoder_input_ids"}
    found = net.generate(**given, max_new_tokens=5, do_sample=False, eos_token_id=None)
    tokens = inputs["input_ids"] if name == "llama" else torch.zeros(2, 1, dtype=torch.long)
    for _ in range(5):
        ones = torch.ones_like(tokens)
        step = {"input_ids": tokens, "attention_mask": ones, "position_ids": ones.cumsum(1) - 1}
        call = step if name == "llama" else {**given, "decoder_input_ids": tokens}
        tokens = torch.cat([tokens, ladder.run(**call)[:, -1:].argmax(-1)], 1)
    assert torch.equal(found, tokens)


def same_values(program: pg.Program, other: pg.Program) -> pg.Program:
    """The other program with the values of the parameters that train in this one."""
    for key, value in program.table.trainable.items():
        other.table.trainable[key].data.copy_(value)
    return other


@pytest.mark.parametrize(
    ("method", "words"),
    [
        (LadderSide(reduction=5), r"reduction=5 does not divide the 8 features of 0\.attention\.q"),
        (LadderSide(reduction=7), r"reduction=7 does not divide the \d+ features of 0"),
    ],
)
def test_sizes_that_do_not_divide_are_refused(method: LadderSide, words: str) -> None:
    with pytest.raises(pg.RecipeError, match=words):
        zoo.traced("bert", dtype=F64).apply(method)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"reduction": 1}, "reduction must be at least 2"),
        ({"keep": ()}, "keep must name layers"),
        ({"keep": (1, 1)}, "keep names a layer twice"),
        ({"temperature": 0.0}, "temperature must be above 0"),
        ({"init": "zeros"}, "init"),
    ],
)
def test_options_are_checked(options: dict[str, Any], words: str) -> None:
    with pytest.raises(pg.RecipeError, match=words):
        LadderSide(**options)


def test_a_picture_is_drawn() -> None:
    assert "<svg" in tuned("llama").picture().svg


def test_a_ladder_beside_half_precision_is_single() -> None:
    program = pg.trace(zoo.Nano().bfloat16(), zoo.example("nano")).apply(LadderSide(reduction=R))
    assert {value.dtype for value in program.table.trainable.values()} == {torch.float32}
    zoo.leaves(program.module()(**zoo.example("nano", 2, 9)))[0].float().square().sum().backward()
    assert all(value.grad is not None and value.grad.abs().max() > 0 for value in program.table.trainable.values())
