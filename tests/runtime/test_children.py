"""What code outside reads of a submodule is there, and it is of its own class where it can be."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from transformers import WhisperConfig, WhisperForConditionalGeneration

import peftgraph as pg
from peftgraph.passes import LoRA


class Inner(nn.Module):
    """A module of a class of its own, with an attribute that others read."""

    def __init__(self) -> None:
        super().__init__()
        self.stages = 3
        self.body = nn.Sequential(nn.Linear(4, 6, bias=False), nn.ReLU(), nn.Linear(6, 4))

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


class Outer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.norm = Inner(), nn.LayerNorm(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.inner(x))


def test_submodules_are_what_they_were() -> None:
    model, x = Outer().eval(), torch.randn(2, 4)
    net = pg.trace(model, (x,)).apply(LoRA(at="weight", rank=2)).module().eval()
    inner = net.get_submodule("inner")
    assert inner.stages == 3
    body = inner.get_submodule("body")
    assert isinstance(body, nn.Sequential)
    assert [type(one).__name__ for one in body] == ["Linear", "ReLU", "Linear"]
    assert (body[0].out_features, body[0].bias, body[2].bias is not None) == (6, None, True)
    assert isinstance(net.get_submodule("norm"), nn.LayerNorm)
    assert net.get_submodule("norm").normalized_shape == (4,)
    assert "in_features=4, out_features=6, bias=False" in repr(net)
    assert torch.equal(net(x), model(x))
    assert net.state_dict().keys() > model.state_dict().keys()
    with pytest.raises(pg.CallError, match="A Linear inside of a program's module holds its weights"):
        body[0](x)


class Layer(nn.Module):
    """A block whose part and attribute have names that a module of ours might have used itself."""

    def __init__(self) -> None:
        super().__init__()
        self.run, self.codes, self._options = nn.Linear(4, 6), nn.Linear(6, 4), "its own"

    def forward(self, x: Tensor) -> Tensor:
        return x + self.codes(torch.relu(self.run(x)))


class Named(nn.Module):
    """As some models are written: parts called as a graph, its blocks, its state and its signature might be."""

    def __init__(self) -> None:
        super().__init__()
        self._blocks = nn.ModuleList(Layer() for _ in range(3))
        self._graph, self._state, self.graph_for, self.run = (nn.Linear(4, 4) for _ in range(4))
        self._signature = nn.Parameter(torch.randn(4))

    def forward(self, x: Tensor) -> Tensor:
        for block in self._blocks:
            x = block(x)
        return self.run(self.graph_for(self._state(self._graph(x)))) * self._signature


@pytest.mark.parametrize("training", [True, False])
def test_parts_may_have_any_name(training: bool) -> None:
    torch.manual_seed(0)
    model, x = Named().train(training), torch.randn(2, 5, 4)
    tuned = pg.trace(model, (x,)).apply(LoRA(at="weight", rank=2))
    net = tuned.module().train(training)
    assert torch.equal(net(x), model(x))
    assert net.state_dict().keys() > model.state_dict().keys()
    assert net.get_submodule("_blocks.0")._options == "its own"
    assert torch.equal(pg.fold(tuned).module().train(training)(x), model(x))


def test_a_model_whose_loops_look_at_its_submodules_generates() -> None:
    torch.manual_seed(0)
    sizes = {"encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 12, "decoder_ffn_dim": 12}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 3}
    config = WhisperConfig(
        vocab_size=20,
        d_model=8,
        num_mel_bins=4,
        max_source_positions=6,
        max_target_positions=12,
        begin_suppress_tokens=None,
        suppress_tokens=None,
        **sizes,
        **heads,
        **tokens,
    )
    model = WhisperForConditionalGeneration(config).eval()
    sound, ids = torch.randn(2, 4, 12), torch.randint(1, 20, (2, 5))
    example = {"input_features": sound, "decoder_input_ids": ids, "use_cache": True}
    net = pg.trace(model, example).apply(LoRA(rank=2)).module().eval()
    assert net.model.encoder.conv1.stride == (1,)
    ours, theirs = (one.generate(input_features=sound, max_new_tokens=3) for one in (net, model))
    assert torch.equal(ours, theirs)
