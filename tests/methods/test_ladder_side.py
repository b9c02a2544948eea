"""Ladder side-tuning against the library's own models at the narrow size, wired by the paper's equation."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import cache
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
    "llama": {"hidden_size": zoo.WIDTH // R, "intermediate_size": zoo.FFN // R, "head_dim": zoo.WIDTH // zoo.HEADS // R},
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
        handles = [
            *self.tap(taps),
            *self.mix(taps),
        ]
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
    side, base = ladder.side, ladder.base
    h = side.model(inputs_embeds=start["blocks"], attention_mask=inputs["attention_mask"]).last_hidden_state  # type: ignore[operator]
    return base.lm_head(ladder.up(h))  # type: ignore[operator]


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


@cache
def tuned(name: str) -> pg.Program:
    """The program with a ladder whose gates are not all one half."""
    torch.manual_seed(0)
    return zoo.randomise(zoo.traced(name, dtype=F64).apply(LadderSide(reduction=R)))


@pytest.mark.parametrize("name", STACKS)
def test_outputs_and_gradients_are_those_of_the_equation(name: str) -> None:
    program, ladder = tuned(name), Ladder(name, (0, 1))
    same = ladder.load(program)
    inputs = zoo.example(name, 2, 9, F64)
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
