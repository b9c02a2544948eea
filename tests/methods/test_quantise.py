"""Quantised weights: bitsandbytes' codes and values to the bit, what is kept for gradients, and what other verbs do."""

from __future__ import annotations

import importlib.util
from functools import cache
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import bitsandbytes.functional as reference
import pytest
import torch
import zoo
from torch import Tensor, nn

import peftgraph as pg
from peftgraph.authoring.quantised import Quantiser
from peftgraph.passes import DoRA, LoRA, Quantise, Train
from peftgraph.testing import check_pass

EVERY = "attention.*|ffn.*"
D, F = zoo.WIDTH, zoo.FFN


class Pair(nn.Module):
    """Two projections of 48 and 80 features, with a frozen scale in front."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.rand(48) + 0.5)
        self.up, self.down = nn.Linear(48, 80), nn.Linear(80, 48, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.tanh(self.up(x * self.scale)))


@cache
def pair() -> pg.Program:
    torch.manual_seed(0)
    return pg.trace(Pair(), (torch.randn(3, 48),))


def as_bitsandbytes(linear: nn.Linear, quant_type: str, nested: bool) -> nn.Module:
    """The same projection as bitsandbytes' module, with products in bfloat16."""
    made = bnb.nn.Linear4bit(
        linear.in_features, linear.out_features, linear.bias is not None, torch.bfloat16, nested, quant_type
    )
    options = {"quant_type": quant_type, "compress_statistics": nested}
    made.weight = bnb.nn.Params4bit(linear.weight.detach().clone(), False, module=made, **options)
    made.bias = linear.bias
    return made.to("cpu")


@pytest.mark.fast
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_codes_and_values_of_four_bits(quant_type: Any, double: bool, dtype: torch.dtype) -> None:
    """Also where values do not fill the last block, or the last byte, and where a block is zero."""
    torch.manual_seed(1)
    for shape, block in (((48, 80), 64), ((33, 5), 32), ((3, 24, 40), 256), ((130, 257), 64)):
        matrix = (0.02 * torch.randn(shape)).to(dtype)
        matrix[0] = 0
        made = Quantiser(quant_type, block, double).quantise(matrix, dtype)
        codes, state = reference.quantize_4bit(
            matrix, blocksize=block, compress_statistics=double, quant_type=quant_type
        )
        assert torch.equal(made.own["codes"], codes)
        assert torch.equal(made.own["absmax"], state.absmax)
        if double:
            assert torch.equal(made.own["nested_absmax"], state.state2.absmax)
            assert torch.equal(made.own["offset"], state.offset)
        assert torch.equal(made.value(), reference.dequantize_4bit(codes, state))


def test_codes_and_values_of_eight_bits() -> None:
    torch.manual_seed(1)
    matrix = torch.randn(48, 81)
    made = Quantiser("int8").quantise(matrix, torch.float32)
    codes, absmax, _ = reference.int8_vectorwise_quant(matrix.half())
    assert torch.equal(made.own["codes"], codes)
    assert torch.equal(made.own["absmax"], absmax)
    assert torch.equal(made.value(), reference.int8_vectorwise_dequant(codes, absmax))
    stack = Quantiser("int8").quantise(matrix.reshape(3, 16, 81), torch.float32)
    assert torch.equal(stack.value(), made.value().reshape(3, 16, 81))
    with pytest.raises(pg.PeftGraphError, match="beyond float16"):
        Quantiser("int8").quantise(matrix * 1e6, torch.float32)
    with pytest.raises(pg.PeftGraphError, match="1 values that are infinite"):
        Quantiser("nf4").quantise(torch.tensor([[1.0, float("nan")]]), torch.float32)


@pytest.mark.fast
@pytest.mark.parametrize(("quant_type", "nested"), [("nf4", True), ("fp4", False)])
def test_outputs_and_gradients_are_those_of_bitsandbytes(quant_type: Any, nested: bool) -> None:
    program = pair()
    tuned = program.apply(Quantise(at="linear|head", format=quant_type, double=nested))
    torch.manual_seed(0)
    model = Pair()
    model.up = as_bitsandbytes(model.up, quant_type, nested)
    model.down = as_bitsandbytes(model.down, quant_type, nested)
    results: list[tuple[Tensor, Tensor]] = []
    for module in (tuned.module(), model):
        x = torch.linspace(-1, 1, 5 * 48).reshape(5, 48).requires_grad_()
        y = module(x)
        results.append((y.detach(), torch.autograd.grad(y.square().sum(), x)[0]))
    assert torch.equal(results[0][0], results[1][0])
    torch.testing.assert_close(results[0][1], results[1][1], rtol=0, atol=1e-6)


def kept_for_gradients(net: nn.Module, *given: Any, **inputs: Any) -> list[tuple[int, ...]]:
    """The shapes of what is kept for gradients, beside what the module stores."""
    stored = {tensor.data_ptr() for tensor in [*net.parameters(), *net.buffers()]}
    shapes: list[tuple[int, ...]] = []

    def pack(tensor: Tensor) -> Tensor:
        if tensor.data_ptr() not in stored:
            shapes.append(tuple(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = zoo.leaves(net(*given, **inputs))[0]
    result.square().sum().backward()
    return shapes


@pytest.mark.parametrize("spec", [Quantise(), Quantise(format="int8", compute="stored")], ids=["nf4", "int8"])
def test_no_dequantised_weight_is_kept(nano: pg.Program, spec: Quantise) -> None:
    net = nano.apply(spec, LoRA(at=EVERY, rank=2)).module().train()
    kept = kept_for_gradients(net, **zoo.example("nano"))
    weights = {(3 * D, D), (D, D), (F, D), (D, F)}
    assert weights.isdisjoint(kept)
    assert {shape[::-1] for shape in weights}.isdisjoint(kept)
    plain = nano.apply(LoRA(at=EVERY, rank=2)).module().train()
    bytes_kept = [sum(torch.Size(shape).numel() for shape in one) for one in (kept, kept_for_gradients(
        plain, **zoo.example("nano"))
    )]  # fmt: skip
    assert bytes_kept[0] <= bytes_kept[1]
    assert all(p.grad is not None and bool(p.grad.any()) for name, p in net.named_parameters() if "lora_B" in name)


def test_gradients_are_those_of_the_dequantised_weights(bench: Any) -> None:
    """In float64, beside a model whose weights are what the codes stand for."""
    passes = (LoRA(at=EVERY, rank=2),)
    tuned = zoo.randomise(bench.program.apply(Quantise(compute="stored"), *passes))
    reference_model = bench.plain()
    with torch.no_grad():
        for name in tuned.table.quantised:
            reference_model.get_parameter(name).copy_(tuned.table.value(name))
    same = pg.trace(reference_model, bench.inputs, verify="off").apply(*passes)
    with torch.no_grad():
        for name, value in same.table.trainable.items():
            value.copy_(tuned.table[name].tensor)
    grads: list[dict[str, Tensor]] = []
    for program in (tuned, same):
        net = program.module().eval()
        loss = net(**bench.inputs)["logits"].square().sum()
        found = {name: p for name, p in net.named_parameters() if p.requires_grad}
        grads.append(dict(zip(found, torch.autograd.grad(loss, list(found.values())), strict=True)))
    for name, grad in grads[1].items():
        torch.testing.assert_close(grads[0][name], grad, rtol=1e-10, atol=1e-10)


@pytest.mark.fast
def test_text_recipe_and_removal(nano: pg.Program) -> None:
    spec = 'quantise{at=ffn.up format="nf4" block=64 double=true compute="bfloat16"}'
    quantised = nano.apply(pg.parse_pass("quantise{at=ffn.up format=nf4}"))
    assert str(quantised.recipe) == spec
    assert pg.parse_pass(spec) == quantised.recipe == Quantise(at="ffn.up")
    text = str(quantised.diff(nano))
    assert "dequantise_4bit(@stack.0.fc.weight_codes, @quantise.nf4_table, @stack.0.fc.weight_absmax, 64" in text
    assert "linear(%0.norm.1, %0.ffn.up.quantise.dequantise, @stack.0.fc.bias) in bf16" in text
    both = nano.apply(pg.parse_pass("quantise{at=ffn.*}; lora{at=ffn.* rank=2}"))
    assert both.remove(0).text() == nano.apply(LoRA(at="ffn.*", rank=2)).text()
    bare = both.remove(0).remove(0)
    assert bare.text() == nano.text()
    assert all(bare.table[name].tensor is entry.tensor for name, entry in nano.table.items())
    assert bare.table.keys() == nano.table.keys()


def test_codes_are_buffers_of_their_own_dtypes(nano: pg.Program) -> None:
    net = nano.apply(Quantise(at="ffn.up"), LoRA(at="ffn.up", rank=2)).module()
    state = net.state_dict()
    assert "stack.0.fc.weight" not in state
    codes = {"codes": torch.uint8, "absmax": torch.uint8, "nested_absmax": torch.float32, "offset": torch.float32}
    before = {short: state[f"stack.0.fc.weight_{short}"].clone() for short in codes}
    assert {short: value.dtype for short, value in before.items()} == codes
    assert not {name for name, _ in net.named_parameters()} & {f"stack.0.fc.weight_{short}" for short in codes}
    net.to(torch.bfloat16)
    moved = net.state_dict()
    assert all(torch.equal(moved[f"stack.0.fc.weight_{short}"], value) for short, value in before.items())
    assert net(**zoo.example("nano"))["logits"].dtype == torch.bfloat16


def test_starts_read_the_dequantised_weight(nano: pg.Program) -> None:
    """PiSSA and DoRA are the identity on the quantised base."""
    inputs = zoo.example("nano")
    quantised = nano.apply(Quantise(at="ffn.up", compute="stored"))
    base = quantised.module().eval()(**inputs)["logits"]
    for method in (LoRA(at="ffn.up", rank=2, init="pissa"), DoRA(at="ffn.up", rank=2)):
        torch.testing.assert_close(quantised.apply(method).module().eval()(**inputs)["logits"], base, rtol=0, atol=0)


@pytest.mark.fast
def test_folding_refuses_or_says_what_it_does(nano: pg.Program) -> None:
    tuned = zoo.randomise(nano.apply(Quantise(at="ffn.*", compute="stored"), LoRA(at="ffn.up", rank=2)))
    with pytest.raises(pg.QuantisedWeights, match='stored as codes(.|\n)*quantised="dequantise"(.|\n)*requantise'):
        pg.fold(tuned)
    with pytest.raises(pg.PeftGraphError, match="quantised must be one of"):
        pg.fold(tuned, quantised="both")  # pyright: ignore[reportArgumentType]
    folded = pg.fold(tuned, quantised="dequantise")
    table, path = tuned.table, "stack.0.fc"
    change = 8.0 * table[f"{path}.lora_B"].tensor @ table[f"{path}.lora_A"].tensor
    torch.testing.assert_close(folded.table[f"{path}.weight"].tensor, table.value(f"{path}.weight") + change)
    assert torch.equal(folded.table["stack.0.proj.weight"].tensor, table.value("stack.0.proj.weight"))
    assert folded.text() == nano.text()
    assert "2 weights were dequantised" in str(folded.proof)
    again = pg.fold(tuned, quantised="requantise")
    assert again.proof is not None
    wanted = folded.table[f"{path}.weight"].tensor
    error = (again.table.value(f"{path}.weight") - wanted).norm() / wanted.norm()
    assert again.proof.requantised["0.ffn.up"] == pytest.approx(float(error))
    assert again.proof.requantised["0.ffn.down"] < 0.02 < again.proof.requantised["0.ffn.up"]
    assert "NOT EXACT" in str(again.proof)
    assert str(again.recipe) == str(Quantise(at="ffn.*", compute="stored"))
    assert again.remove().text() == nano.text()


def test_what_touches_no_codes_folds_in_part(nano: pg.Program) -> None:
    tuned = zoo.randomise(nano.apply(Quantise(at="ffn.*"), LoRA(at="attention.o|ffn.up", rank=2)))
    part = pg.fold(tuned, partial=True)
    assert {edit.site for edit in part.edits} == {"0.ffn.up", "0.ffn.down"}
    inputs = zoo.example("nano")
    ours, theirs = (one.module().eval()(**inputs)["logits"] for one in (tuned, part))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
    assert part.remove(1).remove(0).text() == nano.text()


@pytest.mark.parametrize(
    ("before", "spec", "words"),
    [
        ((), Quantise(at="attention.q"), "stores all of stack.0.mix.weight as codes, which 0.attention.k reads too"),
        ((Quantise(at="ffn.up"),), Quantise(at="ffn.*", format="int8"), "both store stack.0.fc.weight .* as codes"),
        ((DoRA(at="ffn.up", rank=2),), Quantise(), "reads stack.0.fc.weight .* Apply that first"),
        ((Train(at="ffn.up"),), Quantise(), "would store stack.0.fc.weight as codes, which trains"),
        ((Quantise(),), Train(at="ffn.up"), "would train stack.0.fc.weight .* stores as codes"),
        ((Quantise(),), Train(at="ffn.up", name="one"), "would train stack.0.fc.weight .* stores as codes"),
    ],
    ids=["part", "twice", "behind-dora", "trains", "train", "installed"],
)
def test_what_cannot_stand_together(nano: pg.Program, before: Any, spec: pg.Selector, words: str) -> None:
    program = nano.apply(*before)
    with pytest.raises(pg.Conflict, match=words):
        program.apply(spec)


def test_options_and_sites_that_are_refused(nano: pg.Program, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(pg.RecipeError, match="block must be one of 32, 64"):
        Quantise(block=48)
    with pytest.raises(pg.RecipeError, match="format must be"):
        Quantise(format="int4")  # pyright: ignore[reportArgumentType]
    with pytest.raises(pg.NoMatch, match="none of the 3 sites at norm has a weight"):
        nano.apply(Quantise(at="norm"))
    kernel = pg.trace(nn.Sequential(nn.Conv1d(4, 6, 3), nn.ReLU(), nn.Conv1d(6, 2, 3)), (torch.randn(2, 4, 9),))
    with pytest.raises(pg.RecipeError, match="is no matrix that is stored as such"):
        kernel.apply(Quantise(at="conv"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(pg.PeftGraphError, match=r'needs bitsandbytes: pip install "peftgraph\[quantise\]"'):
        nano.apply(Quantise())


def test_two_formats_share_a_program(nano: pg.Program) -> None:
    """Each pass goes by itself, also where they share a table of codes."""
    first, second = Quantise(at="ffn.up"), Quantise(at="ffn.down", block=32)
    both = nano.apply(first, second, Quantise(at="attention.*", format="int8"))
    assert both.remove(0).text() == nano.apply(second, Quantise(at="attention.*", format="int8")).text()
    while both.history:
        both = both.remove(0)
    assert both.text() == nano.text()
    assert both.table.keys() == nano.table.keys()


def test_released_weights_do_not_come_back(nano: pg.Program) -> None:
    tuned = nano.apply(Quantise(at="ffn.*"), LoRA(at="ffn.up", rank=2))
    bare = tuned.release_quantised()
    assert bare.base is not None
    assert bare.base.table["stack.0.fc.weight"].tensor.device.type == "meta"
    assert nano.table["stack.0.fc.weight"].tensor.device.type == "cpu"
    inputs = zoo.example("nano")
    assert torch.equal(bare.module().eval()(**inputs)["logits"], tuned.module().eval()(**inputs)["logits"])
    with pytest.raises(pg.PeftGraphError, match="stack.0.fc.weight is known by its codes alone"):
        bare.remove(0)
    assert torch.equal(
        pg.fold(bare, quantised="dequantise").table["stack.0.proj.weight"].tensor,
        tuned.table.value("stack.0.proj.weight"),
    )
    with pytest.raises(pg.PeftGraphError, match="nothing to release"):
        nano.release_quantised()


def test_adapters_and_files(nano: pg.Program, tmp_path: Path) -> None:
    """An adapter says how its base was quantised and contains no codes; a file of the program holds them alone."""
    inputs = zoo.example("nano")
    tuned = zoo.randomise(nano.apply(Quantise(), LoRA(at="ffn.up", rank=2)))
    loaded = nano.load_adapter(tuned.save_adapter(tmp_path / "adapter"))
    assert loaded.table.hashes() == tuned.table.hashes()
    assert sum(file.stat().st_size for file in (tmp_path / "adapter").iterdir()) < 8000
    assert tuned.release_quantised().save_adapter(tmp_path / "released").exists()
    exported = torch.export.load(tuned.export(tmp_path / "net.pt2"))
    assert {tensor.dtype for name, tensor in exported.state_dict.items() if name.endswith("_codes")} == {torch.uint8}
    assert not any(tuple(tensor.shape) == (3 * D, D) for tensor in exported.state_dict.values())
    result = (
        exported.module()(idx=inputs["idx"], targets=inputs["targets"])
        if "targets" in inputs
        else exported.module()(**inputs)
    )
    assert torch.equal(result["logits"], tuned.module().eval()(**inputs)["logits"])


def test_shapes_on_the_meta_device(nano: pg.Program) -> None:
    """What is known without weights is what they have."""
    specs = (Quantise(), Quantise(double=False, block=32), Quantise(format="int8"))
    with torch.device("meta"):
        model = zoo.Nano(layers=1)
    bare = pg.trace(model, {name: value.to("meta") for name, value in zoo.example("nano").items()})
    for spec in specs:
        ours, theirs = (
            {name: (tuple(e.tensor.shape), e.tensor.dtype) for name, e in program.apply(spec).table.items()}
            for program in (bare, nano)
        )
        assert ours == theirs


def test_loftq_is_the_paper_s_algorithm(nano: pg.Program, tmp_path: Path) -> None:
    """Beside bitsandbytes and an SVD directly; saved with its codes, and taken back with the pass."""
    name, rank, scale = "stack.0.fc.weight", 4, 2.0
    spec = Quantise(at="ffn.*", compute="stored")
    quantised = nano.apply(spec)
    tuned = quantised.apply(LoRA(at="ffn.up", rank=rank, alpha=scale * rank, init="loftq", iterations=3))
    weight = nano.table[name].tensor
    change, codes, value = torch.zeros_like(weight), weight, weight
    for _ in range(3):
        codes, state = reference.quantize_4bit(
            weight - change, blocksize=64, compress_statistics=True, quant_type="nf4"
        )
        value = reference.dequantize_4bit(codes, state)
        u, s, v = torch.linalg.svd(weight - value, full_matrices=False)
        change = (u[:, :rank] * s[:rank]) @ v[:rank]
    assert torch.equal(tuned.table[f"{name}_codes"].tensor, codes)
    assert torch.equal(tuned.table.value(name), value)
    path = name.removesuffix("weight")
    ours = scale * tuned.table[f"{path}lora_B"].tensor @ tuned.table[f"{path}lora_A"].tensor
    torch.testing.assert_close(ours, change, rtol=1e-4, atol=1e-6)
    assert (weight - value - ours).norm() < 0.9 * (weight - quantised.table.value(name)).norm()
    assert tuned.count().state == 0
    loaded = nano.load_adapter(zoo.randomise(tuned).save_adapter(tmp_path / "adapter"))
    assert loaded.table.hashes() == tuned.table.hashes()
    assert tuned.remove().table.hashes() == quantised.table.hashes()
    assert tuned.remove(0).remove(0).table.hashes() == nano.table.hashes()
    folded = pg.fold(tuned, quantised="dequantise").table[name].tensor
    change = scale * tuned.table[f"{path}lora_B"].tensor @ tuned.table[f"{path}lora_A"].tensor
    torch.testing.assert_close(folded, value + change)
    with pytest.raises(pg.AdapterError, match="goes with codes of its own"):
        tuned.save_adapter(tmp_path / "peft", format="peft")


def test_where_loftq_has_no_meaning(nano: pg.Program) -> None:
    start = LoRA(at="ffn.up", rank=2, init="loftq")
    with pytest.raises(pg.PeftGraphError, match="no pass has put codes in its place"):
        nano.apply(start)
    with pytest.raises(pg.PeftGraphError, match="is a part of a weight"):
        nano.apply(Quantise(), LoRA(at="attention.q", rank=2, init="loftq"))
    with pytest.raises(pg.PeftGraphError, match="known by its codes alone"):
        nano.apply(Quantise()).release_quantised().apply(start)
    with pytest.raises(pg.Conflict, match="were chosen for another adapter"):
        nano.apply(Quantise(), start.renamed("a"), start.renamed("b"))


def test_a_directory_of_peft_says_nothing_of_codes(nano: pg.Program, tmp_path: Path) -> None:
    """The same files as on the base that is not quantised."""
    passes = (LoRA(at="ffn.up", rank=2),)
    tuned = zoo.randomise(nano.apply(Quantise(), *passes))
    plain = nano.apply(*passes)
    with torch.no_grad():
        for name, value in plain.table.trainable.items():
            value.copy_(tuned.table[name].tensor)
    folders = [one.save_adapter(tmp_path / str(i), format="peft") for i, one in enumerate((tuned, plain))]
    files = [{file.name: file.read_bytes() for file in folder.iterdir()} for folder in folders]
    assert files[0] == files[1]
    loaded = nano.apply(Quantise()).load_adapter(folders[0])
    inputs = zoo.example("nano")
    outputs = [one.module().eval()(**inputs)["logits"] for one in (loaded, tuned)]
    torch.testing.assert_close(*outputs, rtol=0, atol=1e-5)


def test_bytes_follow_from_shapes(real: Any) -> None:
    """One layer of a Llama of 7 billion parameters, without weights: 4 bits a value, a byte for 64, 4 for 16384."""
    program = real("llama-7b")
    projections = 4 * 4096 * 4096 + 3 * 4096 * 11008
    tuned = program.apply(Quantise(), LoRA(at=EVERY, rank=64))
    counted, base = tuned.count().bytes, program.count().bytes
    assert counted.codes == projections // 2
    assert counted.constants == projections // 64 + 4 * projections // (64 * 256) + 7 * 4 + 4 * (16 + 256)
    assert counted.weights == base.base - 4 * projections
    assert counted.adapters == 4 * 64 * (8 * 4096 + 3 * (4096 + 11008))
    assert counted.optimiser == 2 * counted.adapters
    assert counted.full_optimiser == 2 * 4 * program.count().total
    assert base.base == counted.base
    assert counted.stored == counted.weights + counted.codes + counted.constants + counted.adapters
    assert base.stored == base.base
    assert "7 weights as codes: stored" in str(tuned.count())
    assert "codes" not in str(program.count())
    plain = program.apply(Quantise(double=False, block=128)).count().bytes
    assert plain.constants == 4 * projections // 128 + 4 * 16


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # Dynamo does so itself
def test_it_compiles_as_one_graph() -> None:
    tuned = zoo.randomise(pair().apply(Quantise(at="linear|head"), LoRA(at="linear", rank=2)))
    net = tuned.module()
    x = torch.linspace(-1, 1, 5 * 48).reshape(5, 48)
    grads: list[list[Tensor]] = []
    for run in (net, torch.compile(net, backend="aot_eager", fullgraph=True)):
        grads.append(list(torch.autograd.grad(run(x).square().sum(), list(tuned.table.trainable.values()))))
    for ours, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_the_laws_of_anybody_s_pass() -> None:
    """It trains nothing by itself, and is not the identity."""
    assert "removal" in check_pass(Quantise(), identity=False)
