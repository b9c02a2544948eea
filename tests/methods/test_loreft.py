"""LoReFT and its kin against their equations inside the original models, token by token, with padding and overlaps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import truth
import zoo
from torch import Tensor, nn

import peftgraph as pg
from peftgraph.passes import IA3, LoRA, LoReFT

F64 = torch.float64
TIED, UNTIED = LoReFT(rank=3, prefix=2, suffix=1), LoReFT(rank=3, prefix=3, suffix=2, tied=False)
COUNTED = LoReFT(rank=3, prefix=2, suffix=2, skip_padding=False)
KINDS: dict[str, LoReFT] = {
    "tied": TIED,
    "untied": UNTIED,
    "prefix": LoReFT(rank=2, prefix=2, suffix=0),
    "noreft": LoReFT(rank=2, prefix=1, suffix=3, orthogonal=False),
    "direft": LoReFT(rank=2, prefix=1, suffix=1, orthogonal=False, subtract=False),
    "everywhere": LoReFT(rank=2, prefix=None, suffix=0),
    "gelu": LoReFT(rank=2, prefix=2, suffix=2, activation="gelu"),
}
# Masks in float64 are -inf to a softmax in float32: written attention over nothing but padding needs a float32 model.
VISIBLE = [
    (name, attn, F64 if attn == "sdpa" else torch.float32) for name in ("bert", "llama") for attn in zoo.ATTENTIONS
]


def gram_schmidt(x_RD: Tensor) -> Tensor:
    """The rows of x, made orthonormal one after the other."""
    rows: list[Tensor] = []
    for row in x_RD:
        for _ in range(2):  # once more takes off what rounding left
            row = row - sum(((row @ one) * one for one in rows), start=torch.zeros_like(row))
        rows.append(row / row.norm())
    return torch.stack(rows)


def edit(method: LoReFT, own: dict[str, Tensor], name: str, h: Tensor) -> Tensor:
    """The edited state of one token."""
    r = gram_schmidt(own[f"{name}directions"]) if method.orthogonal else own[f"{name}projection"]
    source = own[f"{name}weight"] @ h + own[f"{name}bias"]
    source = source if method.activation is None else nn.functional.gelu(source)
    return h + r.T @ (source - r @ h if method.subtract else source)


def edits(method: LoReFT, tokens: list[int], position: int) -> str | None:
    """The name of the edit that a position gets, by counting tokens from both ends."""
    if method.prefix is None:
        return ""
    if position not in tokens:
        return None
    front, back = tokens.index(position) + 1, len(tokens) - tokens.index(position)
    first, last = front <= method.prefix, back <= method.suffix
    if first and last:
        first = front < back
        last = not first
    if not (first or last):
        return None
    return "" if method.tied else "prefix_" if first else "suffix_"


def edited_model(name: str, program: pg.Program, method: LoReFT, tokens: Callable[[str | None, int], list[list[int]]]):
    """The original model with hooks after its blocks; `tokens(stack, length)`: the real positions of every row."""
    model = truth.eager_model(name, F64)
    for edited in program.edits:
        site = next(one for one in program.sites if one.id == edited.site)
        own = {key.rpartition(".")[2]: program.table[key].tensor for key in edited.parameters}

        def hook(module: nn.Module, args: Any, output: Any, stack=site.stack, own=own) -> Any:
            h = output if isinstance(output, Tensor) else output[0]
            rows = []
            for row, real in zip(h, tokens(stack, h.shape[1]), strict=True):
                names = [edits(method, real, i) for i in range(len(row))]
                new = [t if n is None else edit(method, own, n, t) for t, n in zip(row, names, strict=True)]
                rows.append(torch.stack(new))
            return torch.stack(rows) if isinstance(output, Tensor) else (torch.stack(rows), *output[1:])

        model.get_submodule(site.path.removesuffix(".layer")).register_forward_hook(hook)  # of a T5 block
    return model


def answer(module: nn.Module, inputs: dict[str, Any]) -> Tensor:
    return zoo.leaves(module(**inputs))[0]


@pytest.mark.parametrize("kind", ["tied", "untied"])
@pytest.mark.parametrize("name", zoo.NAMES)
def test_outputs_and_gradients_are_the_equation_s(name: str, kind: str) -> None:
    compare(name, KINDS[kind], zoo.example(name, 2, 9, F64))


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in ("tied", "untied")])
def test_its_kin_are_their_equations(kind: str) -> None:
    compare("bert", KINDS[kind], zoo.example("bert", 2, 9))


def compare(name: str, method: LoReFT, inputs: dict[str, Any], attn: str = "sdpa") -> None:
    program = zoo.randomise(zoo.traced(name, attn, F64).apply(method), 0.3)

    def tokens(stack: str | None, length: int) -> list[list[int]]:
        if stack == "decoder" or "attention_mask" not in inputs:
            return [list(range(length))] * 2
        return [row.nonzero().flatten().tolist() for row in inputs["attention_mask"]]

    ours = answer(program.module().eval(), inputs)
    theirs = answer(edited_model(name, program, method, tokens), inputs)
    assert float((ours - theirs).detach().abs().max()) < 1e-12 * float(theirs.detach().abs().max())
    base = answer(zoo.traced(name, attn, F64).module().eval(), inputs)
    assert float((ours - base).detach().abs().max()) > 1e-2
    parameters = program.table.trainable
    weights = torch.randn_like(theirs)
    grads = [torch.autograd.grad((out * weights).sum(), list(parameters.values())) for out in (ours, theirs)]
    scale = max(float(grad.abs().max()) for grad in grads[1])
    for key, got, want in zip(parameters, *grads, strict=True):
        assert float(want.abs().max()) > 0 or name == "vit", key  # which reads its first position alone
        assert float((got - want).abs().max()) < 1e-11 * scale, key


@pytest.mark.parametrize("method", [TIED, UNTIED, COUNTED], ids=["tied", "untied", "counted"])
@pytest.mark.parametrize(("name", "attn", "dtype"), VISIBLE)
def test_the_edited_positions_are_the_first_and_last_tokens(
    name: str, attn: str, dtype: torch.dtype, method: LoReFT
) -> None:
    """Rows of every length, padded left, right, on both sides, in the middle, and not at all."""
    base = zoo.traced(name, attn, dtype)
    program = zoo.randomise(base.apply(LoReFT(**{**vars(method), "at": "block & layers(1, 2)"})), 0.3)
    masks = ["1111111", "0000001", "1000000", "1111000", "0011111", "0011100", "1101111", "0011000", "0111111"]
    mask = torch.tensor([[int(bit) for bit in row] for row in masks])
    inputs = zoo.example(name, len(masks), 7, masked=False) | {"attention_mask": mask}
    moved = (answer(program.module().eval(), inputs) - answer(base.module().eval(), inputs)).detach().abs().amax(-1) > 0
    for row, found in zip(mask, moved, strict=True):
        tokens = row.nonzero().flatten().tolist() if method.skip_padding else list(range(7))
        assert found.tolist() == [edits(method, tokens, i) is not None for i in range(7)], row


def test_ends_that_meet_share_the_positions() -> None:
    """Sequences shorter than prefix and suffix: the paper's halves, with the middle position in the suffix."""
    program = zoo.traced("nano", "sdpa", F64)
    for length in range(1, 8):
        ids = torch.randint(3, zoo.VOCAB, (2, length))
        method = UNTIED
        tuned = zoo.randomise(program.apply(method), 0.3)
        theirs = answer(edited_model("nano", tuned, method, lambda _, n: [list(range(n))] * 2), {"idx": ids})
        assert float((answer(tuned.module().eval(), {"idx": ids}) - theirs).detach().abs().max()) < 1e-11
        names = [edits(LoReFT(prefix=4, suffix=4, tied=False), list(range(length)), i) for i in range(length)]
        assert names.count("prefix_") == min(4, length // 2)
        assert names.count("suffix_") == min(4, (length + 1) // 2)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", ["bert", "llama", "t5"])
def test_padding_changes_no_answer(name: str, side: str) -> None:
    net = zoo.randomise(zoo.positioned(name).apply(UNTIED), 0.3).module().eval()
    batch, single = zoo.unpadded(net, name, side)
    assert float((batch - single).abs().max()) < 1e-6


@pytest.mark.parametrize("name", zoo.NAMES)
def test_finalize_keeps_the_outputs_and_drops_the_factorisation(name: str, tmp_path) -> None:
    program = zoo.randomise(zoo.traced(name, "sdpa", F64).apply(UNTIED, LoRA(rank=2)))
    final = program.finalize()
    inputs = zoo.example(name, 2, 9, F64)
    assert torch.equal(answer(program.module().eval(), inputs), answer(final.module().eval(), inputs))
    assert "linalg_qr" in program.text()
    assert "linalg_qr" not in final.text()
    for key, value in final.table.trainable.items():
        if key.endswith("projection"):
            assert torch.allclose(value @ value.T, torch.eye(3, dtype=F64), rtol=0, atol=1e-14)
    loaded = zoo.traced(name, "sdpa", F64).load_adapter(final.save_adapter(tmp_path / "final"))
    assert loaded.table.hashes() == final.table.hashes()


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW])
def test_rows_stay_orthonormal_under_any_optimizer(optimizer: type[torch.optim.Optimizer]) -> None:
    program = zoo.traced("nano", "sdpa", F64).apply(TIED)
    start = {key: value.clone() for key, value in program.finalize().table.trainable.items()}
    net, inputs = program.module(), zoo.example("nano")
    steps = optimizer([p for p in net.parameters() if p.requires_grad], lr=0.1, weight_decay=0.3)
    losses: list[float] = []
    for _ in range(12):
        loss = answer(net, inputs).square().mean()
        steps.zero_grad()
        loss.backward()
        steps.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    for key, value in program.finalize().table.trainable.items():
        if key.endswith("projection"):
            assert float((value - start[key]).detach().abs().max()) > 1e-3
            assert torch.allclose(value @ value.T, torch.eye(3, dtype=F64), rtol=0, atol=1e-14)


def test_lengths_of_rows_do_not_matter() -> None:
    program = zoo.traced("nano", "sdpa", F64).apply(TIED)
    inputs = zoo.example("nano")
    before = answer(program.module().eval(), inputs)
    with torch.no_grad():
        for key, value in program.table.trainable.items():
            if key.endswith("directions"):
                value.mul_(torch.tensor([[3.0], [0.2], [7.0]], dtype=F64))
    assert float((answer(program.module().eval(), inputs) - before).detach().abs().max()) < 1e-12


@pytest.mark.parametrize("kind", ["tied", "untied", "prefix", "noreft", "direft", "everywhere"])
def test_the_identity_is_a_start(kind: str) -> None:
    base, inputs = zoo.traced("bert", "sdpa", F64), zoo.example("bert", 2, 9)
    program = base.apply(LoReFT(**{**vars(KINDS[kind]), "start": "identity"}))
    assert torch.equal(answer(program.module().eval(), inputs), answer(base.module().eval(), inputs))
    grads = torch.autograd.grad(
        answer(program.module().eval(), inputs).square().sum(), list(program.table.trainable.values())
    )
    names = [key.rpartition("_")[2].rpartition(".")[2] for key in program.table.trainable]
    moving = {name for name, grad in zip(names, grads, strict=True) if grad.any()}
    assert {"weight", "bias"} <= moving


def test_half_precision_factorises_in_single_precision() -> None:
    program = zoo.randomise(zoo.traced("llama").apply(TIED), 0.1)
    inputs = zoo.example("llama", 2, 9)
    single = answer(program.module().eval(), inputs).detach()
    net = program.module().eval().to(torch.bfloat16)
    half = answer(net, inputs)
    assert half.dtype == torch.bfloat16
    assert float((half.float() - single).detach().abs().max() / single.abs().max()) < 0.05
    half.float().square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters() if p.requires_grad)


def test_dropout_falls_on_the_edited_state(bench) -> None:
    """As in the authors' code: a dropped feature is zero whatever h was."""
    program = bench.program.apply(LoReFT(rank=2, prefix=2, suffix=0, dropout=0.5))
    net = program.module()
    seen: dict[bool, Tensor] = {}
    for training in (False, True):
        torch.manual_seed(0)
        seen[training] = answer(net.train(training), bench.inputs).detach()
    assert not torch.equal(seen[True], seen[False])
    text = program.text()
    assert "dropout(%0.block.loreft.add, 0.5, True)" in text


def test_counts_are_the_published_ones(real) -> None:
    """Table 1, 0.031 % of LLaMA-7B: 32 layers, rank 8, tied. Table 3, 0.0039 %: 4 layers, rank 4, an edit for each end,
    262K by the authors' page."""
    llama = real("llama-7b")
    tied = llama.apply(LoReFT()).count().trainable
    assert tied == 2 * 8 * 4096 + 8
    assert round(100 * 32 * tied / 6_738_415_616, 3) == 0.031
    ends = llama.apply(LoReFT(rank=4, prefix=5, suffix=5, tied=False)).count().trainable
    assert 4 * ends == 262_176
    assert round(100 * 4 * ends / 6_738_415_616, 4) == 0.0039


def test_it_works_after_sublayers_and_beside_other_methods() -> None:
    base, inputs = zoo.traced("llama", "sdpa", F64), zoo.example("llama", 2, 9)
    method = LoReFT(at="attention|ffn", rank=2, prefix=2, suffix=2)
    program = zoo.randomise(base.apply(method, IA3(), LoReFT(name="block", rank=2)), 0.1)
    assert torch.isfinite(answer(program.module().eval(), inputs)).all()
    with pytest.raises(pg.NoFold, match="no single weight computes the hidden state"):
        pg.fold(program)
    assert len(pg.fold(program, partial=True).history) == 2


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"rank": 0}, "rank must"),
        ({"prefix": -1}, "prefix must"),
        ({"suffix": -1}, "suffix must"),
        ({"prefix": 0, "suffix": 0}, "edits no position"),
        ({"prefix": None}, "give suffix=0 with it"),
        ({"prefix": 3, "suffix": 0, "tied": False}, "needs both a prefix and a suffix"),
        ({"dropout": 1.0}, "dropout"),
        ({"start": "zero"}, "start must be"),
        ({"activation": "swish"}, "activation must be"),
        ({"activation": "gelu", "start": "identity"}, "no identity to start at"),
    ],
)
def test_options_are_checked(options: dict[str, Any], words: str) -> None:
    with pytest.raises(pg.RecipeError, match=words):
        LoReFT(**options)


def test_what_is_no_sequence_of_states_is_refused() -> None:
    with pytest.raises(pg.RecipeError, match="more than the 48 features"):
        zoo.traced("bert").apply(LoReFT(rank=49))
    with pytest.raises(pg.RecipeError, match=r"no \(batch, positions, features\)"):
        zoo.traced("gpt2").apply(LoReFT(at="attention.q"))
