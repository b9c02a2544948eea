"""A program of a language model generates what the model generates: the same tokens, step by step on one graph."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
import transformers
import zoo
from torch import Tensor, fx, nn
from transformers import DynamicCache, StaticCache

import peftgraph as pg
from peftgraph.authoring import Builder, Match, Pass, Rule
from peftgraph.authoring.modules import init
from peftgraph.passes import IA3, LadderSide, LoRA, ParallelAdapter, Prefix, Prompt, PTuning

aten = torch.ops.aten
F64 = torch.float64
MODES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampling": {"do_sample": True, "top_k": 20},
    "beams": {"num_beams": 3, "num_return_sequences": 2},
}
CACHE = "cache" if "cache" in transformers.LlamaForCausalLM.forward.__annotations__ else "past_key_values"


def prompt(padded: bool = True) -> dict[str, Tensor]:
    ids = torch.randint(3, zoo.VOCAB, (3, 7), generator=torch.Generator().manual_seed(5))
    mask = torch.ones_like(ids)
    if padded:
        mask[1, :3] = 0
    return {"input_ids": ids, "attention_mask": mask}


def tokens(net: Any, inputs: dict[str, Tensor], count: int = 9, **options: Any) -> Tensor:
    torch.manual_seed(1)
    return net.eval().generate(**inputs, min_new_tokens=count, max_new_tokens=count, pad_token_id=0, **options)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral", "t5", "falcon", "gemma2"])
def test_tokens_of_the_base(name: str, mode: str) -> None:
    dtype = torch.float32 if name in ("mixtral", "gemma2") else F64  # whose own code knows no float64
    model, net = zoo.build(name, dtype=dtype), zoo.cached(name, dtype).module()
    for inputs in (prompt(), prompt(padded=False)):
        assert torch.equal(tokens(net, inputs, **MODES[mode]), tokens(model, inputs, **MODES[mode]))


SLIDING = {
    "Mistral": {},
    "Gemma3Text": {"head_dim": 8, "layer_types": ["sliding_attention", "full_attention"]},
}


@pytest.mark.parametrize("family", SLIDING)
def test_windows_shorter_than_the_text(family: str) -> None:
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(
        vocab_size=zoo.VOCAB, hidden_size=48, intermediate_size=80, num_hidden_layers=2, num_attention_heads=6,
        num_key_value_heads=2, sliding_window=5, **SLIDING[family],
    )  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    net = pg.trace(model, {**prompt(), "use_cache": True}).module()
    for mode in ("greedy", "beams"):
        assert torch.equal(tokens(net, prompt(), **MODES[mode]), tokens(model, prompt(), **MODES[mode]))


def test_an_encoder_decoder_with_learned_positions() -> None:
    torch.manual_seed(0)
    config = transformers.BartConfig(
        vocab_size=zoo.VOCAB, d_model=48, encoder_layers=1, decoder_layers=2, encoder_attention_heads=6,
        decoder_attention_heads=6, encoder_ffn_dim=80, decoder_ffn_dim=80, max_position_embeddings=64, pad_token_id=0,
        bos_token_id=1, eos_token_id=2, decoder_start_token_id=2, forced_eos_token_id=None,
    )  # fmt: skip
    model = transformers.BartForConditionalGeneration(config).to(F64).eval()
    inputs = prompt() | {"decoder_input_ids": prompt()["input_ids"][:, :5], "use_cache": True}
    net = pg.trace(model, inputs).module()
    for mode in MODES.values():
        assert torch.equal(tokens(net, prompt(), **mode), tokens(model, prompt(), **mode))


def test_positions_that_a_model_counts_under_its_mask() -> None:
    torch.manual_seed(0)
    config = transformers.OPTConfig(
        vocab_size=zoo.VOCAB, hidden_size=48, ffn_dim=80, num_hidden_layers=1, num_attention_heads=6,
        max_position_embeddings=64, word_embed_proj_dim=48,
    )  # fmt: skip
    model = transformers.OPTForCausalLM(config).eval()
    net = pg.trace(model, {**prompt(), "use_cache": True}).module().eval()
    assert torch.equal(net(**prompt()).logits, model(**prompt()).logits)
    assert torch.equal(tokens(net, prompt()), tokens(model, prompt()))


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_one_graph_serves_first_and_later_calls(name: str) -> None:
    """In any number of pieces, a text has the logits that it has in one; a later piece is no approximation."""
    program = zoo.cached(name)
    net, whole = program.module().eval(), zoo.example(name, 2, 12, F64, masked=False)
    expected = zoo.build(name, dtype=F64)(**whole).logits
    assert torch.equal(net(**whole).logits, expected)
    cache, found = DynamicCache(), []
    for piece in whole["input_ids"].split([1, 4, 6, 1], dim=1):
        output = net(input_ids=piece, **{CACHE: cache})
        assert output[CACHE] is cache
        found.append(output.logits)
    torch.testing.assert_close(torch.cat(found, 1), expected, rtol=1e-12, atol=1e-13)
    assert cache.get_seq_length() == 12


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_sites_and_parameters_are_those_of_the_plain_trace(name: str) -> None:
    plain, cached = zoo.traced(name, dtype=F64), zoo.cached(name)
    assert str(cached.sites) == str(plain.sites)
    methods = (LoRA(at="attention.*|ffn.*", rank=2), IA3(), ParallelAdapter(width=4), Prefix(length=3, hidden=None))
    assert list(cached.apply(*methods).table) == list(plain.apply(*methods).table)


METHODS: dict[str, Pass] = {
    "lora": LoRA(at="attention.*|ffn.*", rank=2),
    "ia3": IA3(),
    "adapter": ParallelAdapter(width=4),
    "prefix": Prefix(length=3, hidden=None),
    "prefix_mlp": Prefix(length=3, hidden=5),
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_methods_decode_as_they_read(name: str, method: str) -> None:
    """Greedy tokens, step by step with a cache, are the best continuation when the whole text is read at once."""
    tuned = zoo.randomise(zoo.cached(name).apply(METHODS[method]), 0.5)
    net = tuned.module().eval()
    inputs = prompt()
    found = tokens(net, inputs)
    base = zoo.cached(name).module().eval()
    assert not torch.allclose(net(**inputs).logits, base(**inputs).logits, rtol=1e-3)
    assert torch.equal(found, tokens(net, inputs, use_cache=False))
    assert torch.equal(found[:, 7:], greedy(net, inputs, 9))


@pytest.mark.parametrize("name", ["t5", "gemma2"])
def test_rows_with_places_keep_them_in_later_calls(name: str) -> None:
    """Biases and windows of a step are those of the whole text."""
    place = 'attention.core & stack("decoder") & kind("self")' if name == "t5" else "attention.core"
    method = Prefix(at=place, length=3, hidden=None, placed=True)
    net = zoo.randomise(zoo.cached(name).apply(method), 0.5).module().eval()
    assert torch.equal(tokens(net, prompt()), tokens(net, prompt(), use_cache=False))


@pytest.mark.parametrize("options", [{"biases": "shifted"}, {"biases": "dropped"}, {"placed": True}])
def test_biases_beside_rows_are_those_of_the_whole_text_in_later_calls(options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    place = 'attention.core & stack("decoder") & kind("self")' if "placed" in options else "attention.core"
    method = Prefix(at=place, length=3, hidden=None, **options)
    net, text = zoo.randomise(zoo.cached("t5").apply(method), 0.5).module().eval(), prompt()
    found = tokens(net, text, do_sample=True, output_logits=True, return_dict_in_generate=True)
    read = net(**text, decoder_input_ids=found.sequences[:, :-1]).logits.detach()
    assert len(found.sequences.unique()) > 3
    assert float((torch.stack(found.logits, 1) - read).abs().max()) < 1e-6 * float(read.abs().max())


def greedy(net: nn.Module, inputs: dict[str, Tensor], count: int) -> Tensor:
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    for _ in range(count):
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        logits = net(input_ids=ids, attention_mask=mask, position_ids=positions).logits[:, -1]
        logits[:, net.config.eos_token_id] = -torch.inf  # the new tokens have a smallest number
        ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], 1)
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
    return ids[:, -count:]


LADDERS: dict[str, tuple[Pass, ...]] = {
    "llama": (Prompt(length=4, init="normal"), LoRA(rank=2), LadderSide(reduction=2)),
    "gpt2": (LadderSide(reduction=4, keep=(1,)),),
    "t5": (LadderSide(reduction=2),),
}


@pytest.mark.parametrize("name", LADDERS)
def test_a_ladder_keeps_its_own_keys_and_values(name: str) -> None:
    whole, cached = (program.apply(*LADDERS[name]) for program in (zoo.positioned(name), zoo.cached(name)))
    copy_values(zoo.randomise(whole, 0.5), cached)
    for mode in ("greedy", "beams"):
        options = {"output_logits": True, "return_dict_in_generate": True, **MODES[mode]}
        found, steps = (tokens(one.module(), prompt(), **options) for one in (cached, whole))
        assert torch.equal(found.sequences, steps.sequences)
        scores, expected = (torch.stack(one.logits, 1) for one in (found, steps))
        torch.testing.assert_close(scores, expected, rtol=0, atol=1e-10 * float(expected.abs().max()))
        assert float((scores[:, 0] - scores[:, 1:].mean(1)).abs().max()) > 1e-3 * float(scores.abs().max())


def copy_values(program: pg.Program, other: pg.Program) -> None:
    for key, parameter in program.table.trainable.items():
        other.table.trainable[key].data.copy_(parameter)


def test_layers_of_a_cache_go_with_the_ladder() -> None:
    base = zoo.cached("llama")
    both = zoo.randomise(base.apply(LoRA(rank=2), LadderSide(reduction=2), IA3()), 0.5)
    cache = both.module().eval()(**prompt()).get(CACHE)
    assert [layer.keys.shape[-1] for layer in cache.layers] == [8, 8, 4, 4]
    assert [spec.key for spec in both.signature.inputs][-4:] == [f"{CACHE}[{i}]" for i in range(4, 8)]
    assert both.signature.kv_cache is not None
    assert both.signature.kv_cache.layers == (0, 1, 2, 3)
    without = both.remove(1)
    assert without.signature == base.signature
    assert without.text() == base.apply(LoRA(rank=2), IA3()).text()
    assert torch.equal(tokens(without.module(), prompt()), tokens(both.remove(1).module(), prompt(), use_cache=False))
    folded = pg.fold(both, partial=True)
    assert torch.equal(tokens(folded.module(), prompt()), tokens(both.module(), prompt()))


@dataclass(frozen=True, kw_only=True)
class Recall(Pass):
    """Adds a learned part of the mean of a block's inputs over all tokens so far; W_V x is what a cache keeps."""

    word = "recall"
    at: pg.Selector = pg.block
    values: int = 2

    def rules(self) -> list[Rule]:
        return [Rule(self.at, self.delta, "it reads other tokens")]

    def delta(self, m: Match, op: Builder) -> fx.Node:
        x = m.input
        width = int(x.meta["val"].shape[-1])
        cached = [one for one in m.inputs if op.is_cached(one)]
        rows: list[fx.Node] = []
        for i in range(self.values):
            w = op.param(f"w{i}", (3, width), init.kaiming)
            value = op.call(aten.unsqueeze.default, op.linear(x, w), 1)
            rows.append(op.with_earlier_rows(value, cached[0]) if cached else value)
        total = rows[0] if len(rows) == 1 else op.add(*rows)
        summed = op.call(aten.cumsum.default, total, 2)
        length = op.call(aten.sym_size.int, x, 1)
        own = op.call(aten.slice.Tensor, op.call(aten.flip.default, summed, [2]), 2, 0, length)
        own = op.call(aten.squeeze.dim, op.call(aten.flip.default, own, [2]), 1)
        return op.linear(own, op.param("out", (width, 3), init.kaiming))


def test_a_pass_of_ones_own_adds_layers_to_a_cache() -> None:
    given = {"input_ids": prompt()["input_ids"]}
    plain, cached = (program.apply(Recall()) for program in (zoo.positioned("llama"), zoo.cached("llama")))
    copy_values(zoo.randomise(plain, 0.5), cached)
    assert not torch.equal(tokens(plain.module(), given), tokens(zoo.cached("llama").module(), given))
    assert torch.equal(tokens(cached.module(), given), tokens(plain.module(), given))
    two = cached.apply(LadderSide(reduction=2))
    assert two.signature.kv_cache is not None
    assert two.signature.kv_cache.layers == tuple(range(6))
    assert two.remove(0).signature == zoo.cached("llama").apply(LadderSide(reduction=2)).signature
    with pytest.raises(pg.PeftGraphError, match="recall.* keeps 1 values in the cache, which holds pairs"):
        zoo.cached("llama").apply(Recall(at="block & layers(0)", values=1))


def test_folded_programs_generate() -> None:
    tuned = zoo.randomise(zoo.cached("llama").apply(LoRA(rank=2)))
    merged = pg.fold(tuned).module()
    assert torch.equal(tokens(merged, prompt()), tokens(tuned.module(), prompt()))


def test_training_with_a_cache_among_the_inputs_is_training_without() -> None:
    plain, cached = (one.apply(LoRA(rank=2)) for one in (zoo.traced("llama", dtype=F64), zoo.cached("llama")))
    with torch.no_grad():
        for name, parameter in zoo.randomise(plain).table.trainable.items():
            cached.table.trainable[name].copy_(parameter)
    inputs = zoo.example("llama")
    for program in (plain, cached):
        net = program.module().train()
        torch.manual_seed(3)
        net(**inputs).logits.square().mean().backward()
    for name, parameter in plain.table.trainable.items():
        assert torch.equal(cached.table.trainable[name].grad, parameter.grad), name


def test_a_module_stands_where_the_model_stood() -> None:
    model, net = zoo.build("llama", dtype=F64), zoo.cached("llama").module().eval()
    assert isinstance(net, transformers.LlamaForCausalLM)
    assert net.config.to_dict() == model.config.to_dict()
    assert net.generation_config.to_dict() == model.generation_config.to_dict()
    assert (net.device, net.dtype) == (model.device, model.dtype)
    assert net.to(torch.bfloat16).dtype == torch.bfloat16
    assert torch.equal(tokens(net, prompt()), tokens(model.to(torch.bfloat16), prompt()))
    inputs = zoo.example("llama", masked=False)
    kept = net(**inputs, logits_to_keep=2, return_dict=False, use_cache=False)
    assert torch.equal(kept[0], model(**inputs, logits_to_keep=2).logits)
    assert len(kept) == 1


def test_caches_that_a_graph_cannot_take() -> None:
    net, inputs = zoo.cached("llama").module().eval(), prompt()
    static = StaticCache(config=net.config, max_cache_len=32)
    with pytest.raises(pg.CallError, match=r"is a StaticCache; this program takes a DynamicCache\(\)"):
        net(**inputs, **{CACHE: static})
    with pytest.raises(
        pg.CallError, match="of LlamaForCausalLM was traced without a cache. Trace it with use_cache=True"
    ):
        tokens(zoo.traced("llama", dtype=F64).module(), inputs, use_cache=True)
    with pytest.raises(pg.CallError, match="generates with position_ids, .* Trace it with use_cache=True"):
        tokens(zoo.traced("llama", dtype=F64).module(), inputs)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_rows_in_front_of_the_tokens_are_read_at_every_step(name: str) -> None:
    """A padded batch continues each example as it is continued alone; positions are counted as generation does."""
    inputs = prompt()
    example = inputs | {"position_ids": torch.arange(7).expand(3, -1).clone()}
    tuned = pg.trace(zoo.build(name, dtype=F64), example).apply(Prompt(length=4, init="normal"), LoRA(rank=2))
    net = zoo.randomise(tuned, 0.5).module()
    batch = tokens(net, inputs)
    for i, start in enumerate((0, 3, 0)):
        alone = {key: value[i : i + 1, start:] for key, value in inputs.items()}
        assert torch.equal(tokens(net, alone)[0, 7 - start :], batch[i, 7:])
    beams = tokens(net, inputs, **MODES["beams"])
    assert beams.shape == (6, 16)


def with_rows(name: str, dtype: torch.dtype, *passes: Pass) -> tuple[pg.Program, pg.Program]:
    """Programs without and with a cache, of the same weights."""
    given = prompt()
    counted = {"position_ids": torch.arange(7).expand(3, -1).clone()}
    example = given | ({"decoder_input_ids": given["input_ids"][:, :5]} if name == "t5" else counted)
    whole = zoo.randomise(pg.trace(zoo.build(name, dtype=dtype), example).apply(*passes), 0.5)
    cached = zoo.cached(name, dtype).apply(*passes)
    for key, parameter in whole.table.trainable.items():
        cached.table.trainable[key].data.copy_(parameter)
    return whole, cached


# Of rows fewer, and more, than the earlier tokens of the example that was traced.
ROWS: dict[str, tuple[Pass, ...]] = {
    "llama": (Prompt(length=4, init="normal"), LoRA(rank=2)),
    "gpt2": (Prompt(length=9, init="normal"),),
    "falcon": (PTuning(length=6, hidden=8),),
    "gemma2": (Prompt(length=3, init="normal"),),
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ROWS)
def test_rows_in_front_of_the_tokens_are_read_once_with_a_cache(name: str, mode: str) -> None:
    whole, cached = with_rows(name, torch.float32 if name == "gemma2" else F64, *ROWS[name])
    for given in (prompt(), prompt(padded=False)):
        steps = tokens(whole.module(), given, **MODES[mode])
        assert torch.equal(tokens(cached.module(), given, **MODES[mode]), steps)


def test_rows_in_front_of_both_halves_with_a_cache() -> None:
    whole, cached = with_rows("t5", F64, Prompt(at=pg.embedding, length=6, init="normal"))
    given, net = prompt(), whole.module().eval()
    steps = torch.zeros(3, 1, dtype=torch.long)
    for _ in range(9):
        scores = net(**given, decoder_input_ids=steps).logits[:, -1]
        scores[:, 1] = -torch.inf  # no end before nine tokens
        steps = torch.cat([steps, scores.argmax(-1, keepdim=True)], 1)
    assert torch.equal(tokens(cached.module(), given), steps)


def test_rows_behind_the_first_token_with_a_cache() -> None:
    whole, cached = with_rows("llama", F64, Prompt(length=8, init="normal", place="after_first"))
    assert torch.equal(tokens(cached.module(), prompt()), tokens(whole.module(), prompt()))


def test_a_cache_counts_tokens_not_rows() -> None:
    """A conversation goes on where it was; what was cached of it is not read again."""
    whole, cached = with_rows("llama", F64, Prompt(length=4, init="normal"))
    net, given = cached.module(), prompt(padded=False)
    first = net.eval().generate(
        **given, max_new_tokens=3, min_new_tokens=3, return_dict_in_generate=True, pad_token_id=0
    )
    cache = first.cache if hasattr(first, "cache") else first.past_key_values
    assert cache.get_seq_length() == 9
    assert cache.layers[0].keys.shape[-2] == 13
    said = torch.cat([first.sequences, given["input_ids"][:, :2]], 1)
    more = {"input_ids": said, "attention_mask": torch.ones_like(said)}
    assert torch.equal(tokens(net, more | {CACHE: cache}), tokens(whole.module(), more))
    cache.crop(-6)
    assert cache.get_seq_length() == said.shape[1] + 8 - 6
    one = net(given["input_ids"][:, :1], **{CACHE: cache}).logits  # neither a mask nor positions
    text = torch.cat([tokens(whole.module(), more)[:, : said.shape[1] + 2], given["input_ids"][:, :1]], 1)
    ones = torch.ones_like(text)
    expected = whole.module().eval()(text, attention_mask=ones, position_ids=ones.cumsum(1) - 1).logits
    torch.testing.assert_close(one[:, -1], expected[:, -1])


def test_training_with_rows_and_a_cache_is_training_without() -> None:
    nets = [one.module().train() for one in with_rows("llama", F64, Prompt(length=4, init="normal"))]
    given = prompt(padded=False) | {"position_ids": torch.arange(7).expand(3, -1).clone()}
    for net in nets:
        torch.manual_seed(3)
        net(**given, use_cache=False).logits.square().mean().backward()
    ours, theirs = (dict(net.named_parameters())["model.embed_tokens.prompt"].grad for net in nets)
    assert torch.equal(ours, theirs)
