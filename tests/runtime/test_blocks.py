"""Blocks as submodules: names, shared code, checkpointing beside peft's, compiling, several processes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import zoo
from alive import kept_bytes
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from transformers import AlbertConfig, AlbertModel

import peftgraph as pg
from peftgraph.passes import BitFit, LoRA, Prefix
from peftgraph.runtime.block_module import BlockModule
from peftgraph.runtime.module import GraphModule

BLOCKS = {"bert": "encoder.layer.{}", "llama": "model.layers.{}", "gpt2": "transformer.h.{}", "nano": "stack.{}"}


def blocks(net: nn.Module) -> dict[str, BlockModule]:
    return {name: module for name, module in net.named_modules() if isinstance(module, BlockModule)}


def tuned(name: str) -> pg.Program:
    torch.manual_seed(0)
    return zoo.randomise(zoo.traced(name).apply(LoRA(rank=2, dropout=0.1), Prefix(length=2, hidden=None)))


def loss(net: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    torch.manual_seed(1)
    output: Any = net(**inputs)
    first: Tensor = output["logits"] if "logits" in output else output["last_hidden_state"]
    return first.square().sum()


def gradients(net: nn.Module, inputs: dict[str, Tensor]) -> dict[str, Tensor | None]:
    net.zero_grad()
    loss(net, inputs).backward()
    return {name: p.grad for name, p in net.named_parameters() if p.requires_grad}


def assert_equal(ours: dict[str, Tensor | None], theirs: dict[str, Tensor | None]) -> None:
    """The same parameters have gradients, and the same ones."""
    assert ours.keys() == theirs.keys()
    for name, grad in ours.items():
        other = theirs[name]
        assert (grad is None) == (other is None), name
        assert grad is None or other is None or torch.equal(grad, other), name
    assert any(grad is not None for grad in ours.values())


@pytest.mark.parametrize("name", zoo.NAMES)
def test_outputs_names_and_gradients_are_those_of_one_flat_graph(name: str) -> None:
    program, inputs = tuned(name), zoo.example(name)
    net, flat = program.module(), GraphModule(program)
    assert len(blocks(net)) == len(program.sites.select("block")) > 0
    assert list(dict(net.named_parameters())) == list(dict(flat.named_parameters()))
    assert list(net.state_dict()) == list(flat.state_dict())
    for mode in (True, False):
        ours, theirs = (gradients(module.train(mode), inputs) for module in (net, flat))
        assert_equal(ours, theirs)


@pytest.mark.parametrize(("name", "path"), BLOCKS.items())
def test_blocks_stand_where_the_model_has_them_and_share_their_code(name: str, path: str) -> None:
    net = zoo.traced(name).apply(LoRA(rank=2)).module()
    loss(net, zoo.example(name))
    assert list(blocks(net)) == [path.format(0), path.format(1)]
    first, second = (block._peftgraph_codes for block in blocks(net).values())
    assert list(first) == list(second) == ["training"]
    assert first["training"] is second["training"]


def test_blocks_with_other_code_have_their_own() -> None:
    net = zoo.traced("nano").apply(LoRA(at=pg.attention.q & pg.layers(0), rank=2)).module()
    loss(net, zoo.example("nano"))
    first, second = (block._peftgraph_codes["training"] for block in blocks(net).values())
    assert first is not second


def test_a_block_that_layers_share_is_called_for_each() -> None:
    torch.manual_seed(0)
    config = AlbertConfig(
        vocab_size=61, embedding_size=12, hidden_size=24, num_hidden_layers=3, num_attention_heads=4,
        intermediate_size=32, max_position_embeddings=32,
    )  # fmt: skip
    model = AlbertModel(config).eval()
    inputs = {"input_ids": torch.randint(3, 61, (2, 7))}
    net: Any = pg.trace(model, inputs).apply(BitFit()).module().eval()
    calls: list[str] = []
    (block,) = blocks(net).values()
    block.register_forward_hook(lambda module, args, output: calls.append(args[0]))
    assert torch.equal(net(**inputs)[0], model(**inputs)[0])
    assert len(calls) == 3
    net.gradient_checkpointing_enable()
    again = gradients(net.train(), inputs)
    net.gradient_checkpointing_disable()
    plain = gradients(net, inputs)
    assert_equal(plain, again)


@pytest.mark.parametrize("name", zoo.NAMES)
def test_checkpoints_change_no_gradient(name: str) -> None:
    """Prefixes and dropout included."""
    net: Any = tuned(name).module().train()
    inputs = zoo.example(name)
    wanted = gradients(net, inputs)
    plain = kept_bytes(lambda: loss(net, inputs))
    net.gradient_checkpointing_enable()
    assert_equal(gradients(net, inputs), wanted)
    assert kept_bytes(lambda: loss(net, inputs)) < plain
    net.eval()
    assert loss(net, inputs).requires_grad


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")  # peft's own calls
@pytest.mark.parametrize("name", ["bert", "llama", "gpt2"])
def test_checkpoints_keep_no_more_than_those_of_peft(name: str) -> None:
    targets = {"bert": ["query", "value"], "llama": ["q_proj", "v_proj"], "gpt2": ["c_attn"]}[name]
    config = peft.LoraConfig(r=2, target_modules=targets, fan_in_fan_out=name == "gpt2")
    theirs: Any = peft.get_peft_model(zoo.build(name), config).train()
    ours: Any = zoo.traced(name).apply(LoRA(rank=2)).module().train()
    inputs = zoo.example(name)
    plain = kept_bytes(lambda: loss(theirs, inputs))
    theirs.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    ours.gradient_checkpointing_enable()
    limit = kept_bytes(lambda: loss(theirs, inputs))
    assert kept_bytes(lambda: loss(ours, inputs)) <= limit < plain


def test_transformers_sees_that_blocks_are_checkpointed() -> None:
    net: Any = zoo.traced("llama").apply(LoRA(rank=2)).module()
    net.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    assert all(block.gradient_checkpointing for block in blocks(net).values())
    with pytest.raises(pg.PeftGraphError, match="Reentrant checkpoints give no gradients"):
        net.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})


def test_every_other_block() -> None:
    net: Any = zoo.traced("gpt2").apply(LoRA(rank=2)).module()
    net.activation_checkpointing_enable(every_n_layers=2)
    assert [block.gradient_checkpointing for block in blocks(net).values()] == [True, False]
    with pytest.raises(pg.PeftGraphError, match="offload is not offered"):
        net.activation_checkpointing_enable(offload=True)


def test_without_blocks_there_is_nothing_to_compute_again() -> None:
    net: Any = pg.trace(nn.Sequential(nn.Linear(4, 4), nn.ReLU()), (torch.randn(2, 4),)).module()
    with pytest.raises(pg.PeftGraphError, match="Sequential has no repeated blocks"):
        net.gradient_checkpointing_enable()


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_one_compiled_graph_serves_every_batch_length_and_step(name: str) -> None:
    net, eager = (tuned(name).module().eval() for _ in range(2))
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(net, fullgraph=True, dynamic=True, backend=counter)
    for batch, length in ((3, 7), (2, 7), (3, 11), (5, 4)):
        ids = torch.randint(3, zoo.VOCAB, (batch, length))
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        for module in (compiled, eager):
            module.zero_grad()
            loss(module, inputs).backward()
        for ours, theirs in zip(net.parameters(), eager.parameters(), strict=True):
            assert (ours.grad is None) == (theirs.grad is None)
            if ours.grad is not None and theirs.grad is not None:
                torch.testing.assert_close(ours.grad, theirs.grad)
                with torch.no_grad():
                    theirs -= 1e-3 * theirs.grad
                    ours.copy_(theirs)
    assert counter.frame_count == 1


def test_two_processes_have_the_gradients_of_one(tmp_path: Path) -> None:
    worker = Path(__file__).with_name("distributed_worker.py")
    options = ["--standalone", "--nproc-per-node=2", str(worker), str(tmp_path)]
    command = [sys.executable, "-m", "torch.distributed.run", *options]
    paths = {"PYTHONPATH": str(Path(zoo.__file__).parent)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=os.environ | paths)
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "agreed").exists()
