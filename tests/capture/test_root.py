"""pg.trace(model, example, root=...): one submodule is a program, the model around it runs as it was written."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import peftgraph as pg
from peftgraph.passes.lora import LoRA

X = torch.randn(3, 7, 6, generator=torch.Generator().manual_seed(1))


class Tower(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(6, 9), nn.Linear(9, 6)
        self.shift = nn.Parameter(torch.ones(6))
        self.width = 6

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        return x + self.down(self.up(x).relu()) * scale + self.shift


class Outer(nn.Module):
    """Branches on data around its tower, and ties its head to it."""

    def __init__(self, calls: int = 1) -> None:
        super().__init__()
        self.stem, self.tower, self.calls = nn.Linear(6, 6), Tower(), calls
        self.head = nn.Linear(6, 6)
        self.head.weight = self.stem.weight
        self.unused = nn.Linear(2, 2)

    def forward(self, x: Tensor, flip: bool = False) -> dict[str, Tensor]:
        x = self.stem(x)
        if x.sum() > 0:
            x = -x
        for i in range(self.calls):
            x = self.tower(x, scale=1.0 + i) if self.calls > 1 else self.tower(x)
        return {"y": self.head(x) * self.tower.width}


def build(calls: int = 1) -> Outer:
    torch.manual_seed(3)
    return Outer(calls).eval()


def test_the_whole_model_with_one_part_rewritten() -> None:
    model = build()
    state = {name: (id(t), t._version, t.requires_grad) for name, t in model.state_dict(keep_vars=True).items()}
    with pytest.raises(pg.TraceError, match="data-dependent"):
        pg.trace(model, X)
    program = pg.trace(model, X, root="tower")
    assert {site.path.partition(".")[0] for site in program.sites} == {"tower"}
    net = program.module()
    assert type(net).__name__ == "Outer"
    assert list(net.state_dict()) == list(model.state_dict())
    assert not any(parameter.requires_grad for parameter in net.parameters())
    for x in (X, -X, X[:1, :2]):
        assert torch.equal(net(x, flip=False)["y"], model.requires_grad_(False)(x)["y"])
    model.requires_grad_(True)
    assert state == {name: (id(t), t._version, t.requires_grad) for name, t in model.state_dict(keep_vars=True).items()}
    assert not model.tower._forward_pre_hooks


def test_train_move_and_copy() -> None:
    program = pg.trace(build(), X, root="tower").apply(LoRA(at=pg.ffn.down, rank=2))
    net = program.module()
    trained = {name for name, parameter in net.named_parameters() if parameter.requires_grad}
    assert trained == {"tower.down.lora_A", "tower.down.lora_B"} == set(program.table.trainable)
    net(X)["y"].sum().backward()
    assert all(parameter.grad is not None for parameter in program.table.trainable.values())
    twin = copy.deepcopy(net)
    assert torch.equal(twin(X)["y"], net(X)["y"])
    with torch.no_grad():
        program.table.trainable["tower.down.lora_B"].normal_()
    assert not torch.equal(twin(X)["y"], net(X)["y"])
    assert net.train().get_submodule("tower").training
    wide = build().double().requires_grad_(False)
    assert torch.equal(twin.double()(X.double())["y"], wide(X.double())["y"])


def test_fold_write_back_and_adapters(tmp_path: Path) -> None:
    model = build()
    program = pg.trace(model, X, root="tower")
    tuned = program.apply(LoRA(at=pg.ffn.up, rank=2))
    with torch.no_grad():
        for parameter in tuned.table.trainable.values():
            parameter.normal_()
    again = program.load_adapter(tuned.save_adapter(tmp_path / "adapter"))
    assert torch.equal(again.module()(X)["y"], tuned.module()(X)["y"])
    assert program.count().total == sum(parameter.numel() for parameter in model.parameters())
    exported = torch.export.load(program.export(tmp_path / "tower.pt2")).module()
    assert torch.equal(exported(x=X)["output"], model.requires_grad_(False).tower(X))


def test_a_folded_part() -> None:
    model = build()
    tuned = pg.trace(model, X, root="tower").apply(LoRA(at=pg.ffn.up, rank=2))
    with torch.no_grad():
        for parameter in tuned.table.trainable.values():
            parameter.normal_()
    folded = pg.fold(tuned)
    torch.testing.assert_close(folded.module()(X), tuned.module()(X), rtol=1e-5, atol=1e-5)
    merged = folded.write_back(copy.deepcopy(model)).requires_grad_(False)
    assert torch.equal(merged(X)["y"], folded.module()(X)["y"])


@pytest.mark.parametrize(
    ("calls", "root", "why"),
    [
        (1, "towr", "no submodule 'towr'. Nearest: tower"),
        (1, "unused", "never calls unused on the example"),
        (2, "tower", r"called 2 times .* does not take call 2: .*scale=2.0"),
    ],
)
def test_roots_that_do_not_work(calls: int, root: str, why: str) -> None:
    with pytest.raises(pg.TraceError, match=why):
        pg.trace(build(calls), X, root=root)


def test_a_root_without_gradients() -> None:
    class Frozen(Outer):
        def forward(self, x: Tensor, flip: bool = False) -> dict[str, Tensor]:
            with torch.no_grad():
                return {"y": self.tower(x)}

    with pytest.raises(pg.TraceError, match=r"calls tower under torch.no_grad\(\) only"):
        pg.trace(Frozen(), X, root="tower")
    with pytest.raises(pg.TraceError, match=r"Outer cannot be run on the example.*RuntimeError"):
        pg.trace(build(), X[..., :3], root="tower")


def test_towers_of_a_multimodal_model() -> None:
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    shared: dict[str, Any] = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 6}
    vision = CLIPVisionConfig(**shared, intermediate_size=80, image_size=24, patch_size=8)
    text = LlamaConfig(**shared, vocab_size=61, intermediate_size=80, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(
        LlavaConfig(vision_config=vision, text_config=text, image_token_index=60, image_seq_length=9)
    ).eval()
    inputs = {
        "input_ids": torch.tensor([[5, *[60] * 9, 7, 8]] * 2),
        "attention_mask": torch.ones(2, 12, dtype=torch.long),
        "pixel_values": torch.randn(2, 3, 24, 24),
    }
    expected = copy.deepcopy(model).requires_grad_(False)(**inputs, use_cache=False).logits
    for root in ("model.vision_tower", "model.language_model"):
        program = pg.trace(model, inputs, root=root)
        assert [site.path.startswith(f"{root}.") for site in program.sites if site.role == "attention.q"] == [True] * 2
        tuned = program.apply(LoRA(at=pg.attention.q, rank=2))
        net = tuned.module().eval()
        assert torch.equal(net(**inputs).logits, expected)
        net(**inputs, labels=inputs["input_ids"]).loss.backward()
        grads = [parameter.grad for parameter in tuned.table.trainable.values()]
        assert all(grad is not None for grad in grads[:2])  # the last layer of the tower is not read
