"""Directories that the `adapters` library saved are read: this program answers as the library did.

`record_adapter_directories.py` wrote them.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
import transformers
from recorded import MODELS, OTHERS
from recorded_models import TOLERANCE, answer, build, distance, part, recorded, traced
from safetensors.torch import load_file, save_file

import peftgraph as pg
from peftgraph.passes import Invertible

DIRECTORIES = Path(__file__).parent / "adapter_directories"
COMPACT = 'width=4 n=2 rank=1 shared=true activation="gelu" dropout=0.0 init="xavier_normal"'
MLP = "prefix{at=attention.core length=3 hidden=6 dropout=0.0}"
SHIFTED = f'{MLP[:-1]} biases="shifted"}}'
GATED = f'{MLP}, pfeiffer{{at=ffn width=4 activation="relu" dropout=0.0 init="bert"}}, lora{{at=attention.q|attention.v'
COUPLED = 'invertible{at=embedding&~stack("decoder")'
CASES = {
    "bert.houlsby": 'houlsby{at=attention|ffn width=4 activation="silu" dropout=0.0',
    "bert.pfeiffer": 'pfeiffer{at=ffn.where(path="encoder\\.layer\\.1") width=4 activation="relu"',
    "bert.parallel": 'parallel_adapter{at=ffn width=4 scale=4.0 learned=false input="residual"',
    "bert.parallel_learned": "learned=true",
    "bert.parallel_channel": 'parallel_adapter{at=ffn width=4 scale=1.0 learned=false input="residual"',
    "bert.pfeiffer_learned": "pfeiffer{at=ffn width=4",
    "bert.houlsby_scaled": "houlsby{at=attention|ffn width=4",
    "bert.houlsby_gated": 'unipelt{methods=[houlsby{at=attention|ffn width=4 activation="silu"',
    "bert.parallel_gated": "unipelt{methods=[parallel_adapter{at=ffn width=4",
    "bert.plus": 'adapter_plus{at=ffn width=4 activation="gelu" drop_path=0.0',
    "bert.plus_learned": "adapter_plus{at=ffn width=4",
    "bert.lora": "lora{at=attention.q|attention.v|ffn.up rank=2 alpha=6.0",
    "bert.lora_qv": "lora{at=attention.q|attention.v rank=2 alpha=6.0",
    "bert.ia3": "ia3{at=attention.k|attention.v|ffn.up}",
    "bert.dora": "dora{at=attention.q|attention.v|ffn.up rank=2 alpha=6.0 dropout=0.0 norm_gradient=true form=",
    "bert.vera": "lora{at=attention.q|attention.v rank=2 alpha=6.0",
    "bert.dvora": 'norm_gradient=true form="adapters"',
    "bert.mtl_lora": "lora{at=attention.q|attention.v rank=2 alpha=6.0",
    "bert.compacter": f'compacter{{at=attention|ffn {COMPACT} place="after_dropout" norms=false}}',
    "bert.compacter_pp": f'compacter_pp{{at=ffn {COMPACT} place="residual_sum" norms=false}}',
    "bert.compacter_unshared": "n=2 rank=none shared=false",
    "bert.loreft": "loreft{at=block rank=2 prefix=2 suffix=1 tied=false orthogonal=true subtract=true dropout=0.05",
    "bert.loreft_decayed": "loreft{at=block rank=2 prefix=2 suffix=1 tied=false orthogonal=false subtract=true",
    "bert.loreft_first": 'loreft{at=block.where(path="encoder\\.layer\\.1") rank=2 prefix=2 suffix=0 tied=true',
    "bert.noreft": "loreft{at=block rank=2 prefix=1 suffix=2 tied=true orthogonal=false subtract=true",
    "bert.direft": 'tied=false orthogonal=false subtract=true activation="gelu"',
    "bert.prefix": "prefix{at=attention.core length=3 hidden=none",
    "bert.prefix_mlp": 'prefix{at=attention.core.where(path="encoder\\.layer\\.1\\.attention") length=3 hidden=6',
    "bert.mam": f"{MLP}\nparallel_adapter{{at=ffn width=4 scale=4.0",
    "bert.prompt": 'prompt{at=embedding length=3 init="uniform"',
    "bert.unipelt": f"unipelt{{methods=[{GATED}",
    "bert.pfeiffer_inv": f"{COUPLED}}}\npfeiffer{{at=ffn width=4",
    "bert.houlsby_inv": f'{COUPLED} activation="silu"}}\nhoulsby{{at=attention|ffn width=4',
    "bert.prompt_inv": f"{COUPLED}}}\nprompt{{at=embedding length=3",
    "gpt2.houlsby": "houlsby{at=attention|ffn",
    "gpt2.pfeiffer": "pfeiffer{",
    "gpt2.parallel": "parallel_adapter{",
    "gpt2.parallel_gated": "unipelt{methods=[parallel_adapter{at=ffn width=4",
    "gpt2.plus": "adapter_plus{at=ffn width=4",
    "gpt2.lora": "lora{at=attention.q|attention.v|ffn.up",
    "gpt2.ia3": "ia3{at=attention.k|attention.v|ffn.up}",
    "gpt2.compacter": "compacter{at=attention|ffn",
    "gpt2.compacter_pp": "compacter_pp{at=ffn",
    "gpt2.compacter_unshared": "n=2 rank=none shared=false",
    "gpt2.loreft": "loreft{at=block",
    "gpt2.prefix": "prefix{at=attention.core length=3 hidden=none",
    "gpt2.prefix_mlp": 'prefix{at=attention.core.where(path="h\\.1\\.attn") length=3 hidden=6',
    "gpt2.mam": f"{MLP}\nparallel_adapter{{at=ffn",
    "gpt2.unipelt": f"unipelt{{methods=[{GATED}",
    "gpt2.pfeiffer_inv": f"{COUPLED}}}\npfeiffer{{at=ffn width=4",
    "llama.houlsby": "houlsby{at=attention|ffn",
    "llama.pfeiffer": "pfeiffer{",
    "llama.parallel": "parallel_adapter{",
    "llama.plus": "adapter_plus{at=ffn width=4",
    "llama.lora": "lora{at=attention.q|attention.v|ffn.down",
    "llama.dora": "norm_gradient=true form",
    "llama.mtl_lora": "lora{at=attention.q|attention.v rank=2 alpha=6.0",
    "llama.ia3": "ia3{at=attention.k|attention.v|ffn.down}",
    "llama.compacter": "compacter{at=attention|ffn",
    "llama.compacter_pp": "compacter_pp{at=ffn",
    "llama.loreft": "loreft{at=block",
    "llama.prefix": "prefix{at=attention.core length=3 hidden=none",
    "llama.prefix_mlp": 'prefix{at=attention.core.where(path="layers\\.1\\.self_attn") length=3 hidden=6',
    "llama.mam": f"{MLP}\nparallel_adapter{{at=ffn",
    "llama.unipelt": f"unipelt{{methods=[{GATED}",
    "vit.plus": "adapter_plus{at=ffn width=4",
    "llama.pfeiffer_inv": f"{COUPLED}}}\npfeiffer{{at=ffn width=4",
    "t5.houlsby_cross": "houlsby{at=attention|ffn",
    "t5.pfeiffer": "pfeiffer{at=ffn.where(",
    "t5.parallel": "parallel_adapter{at=ffn",
    "t5.lora": "lora{at=attention.q|attention.v|ffn.up",
    "t5.ia3": "ia3{at=attention.k|attention.v|ffn.up}",
    "t5.compacter": "compacter{at=(attention|ffn).where(",
    "t5.loreft_first": "loreft{at=block.where(",
    "t5.prefix": 'prefix{at=attention.core length=3 hidden=none dropout=0.0 biases="shifted"}',
    "t5.prefix_mlp": 'SelfAttention") length=3 hidden=6 dropout=0.0 biases="dropped" name="dropped"}',
    "t5.prefix_upper": 'SelfAttention") length=3 hidden=none dropout=0.0 biases="dropped"}',
    "t5.mam": f"{SHIFTED}\nparallel_adapter{{at=ffn",
    "t5.unipelt": f"unipelt{{methods=[{SHIFTED}, pfeiffer{{at=ffn",
    "t5.unipelt_upper": 'length=3 hidden=6 dropout=0.0 biases="shifted" name="shifted"}, pfeiffer{at=ffn',
    "t5.pfeiffer_inv": f"{COUPLED}}}\npfeiffer{{at=ffn width=4",
    "vit.prompt": 'prompt{at=block.where(path="layers\\.0") length=3 init="uniform" onto="embeddings" returns="all"}',
    "vit.prompt_after_first": 'init="uniform" place="after_first" onto="embeddings" returns="all"}',
    "beit.prompt": 'prompt{at=block.where(path="layers\\.0") length=3 init="uniform" onto="embeddings" returns="all"}',
    "bart.houlsby_cross": "houlsby{at=attention|ffn",
    "bart.lora": "lora{at=attention.q|attention.v|ffn.up",
    "bart.compacter_pp": "compacter_pp{at=ffn",
    "bart.loreft_first": 'loreft{at=block.where(path="decoder\\.layers\\.0|encoder\\.layers\\.1")',
    "bart.prefix": "prefix{at=attention.core length=3 hidden=none",
    "bart.prefix_mlp": "prefix{at=attention.core.where(",
    "bart.mam": f"{MLP}\nparallel_adapter{{at=ffn",
    "bart.unipelt": f"unipelt{{methods=[{GATED}",
    "bart.pfeiffer_inv": f"{COUPLED}}}\npfeiffer{{at=ffn width=4",
}
WARNED = {  # of the methods that are read with a word
    "ia3": r"scales the output of ffn.(up|down), no ffn.hidden",
    "compacter": r"holds a prediction head beside the adapter \(head_config.json\), which is not read",
    "loreft_decayed": "is a LoReFT whose R has lost its orthonormal rows",
    "parallel_channel": "has scaling='channel', which is multiplied into the up projection",
    "pfeiffer_learned": "has scaling='learned', which is multiplied into the up projection",
    "houlsby_scaled": "has scaling=3.0, which is multiplied into the up projection",
    "plus_learned": "has scaling='learned', which trains on as one for each feature",
    "mtl_lora": "is an MTL-LoRA, whose factors are multiplied out: .* trains on as a LoRA",
    "vera": "holds a prediction head beside the adapter|is a VeRA, .* trains on as a LoRA",
    "dvora": "holds a prediction head beside the adapter|is a VeRA, .* trains on as a DoRA",
    "noreft": "is read as NoReFT, as the library itself reads it",
}
WARNED |= {"compacter_pp": WARNED["compacter"], "direft": WARNED["noreft"]}


def load(case: str, directory: Path | None = None, program: pg.Program | None = None) -> pg.Program:
    """The program of a case; some are read with a word of warning."""
    name, _, method = case.partition(".")
    program, directory = program or traced(name), directory or DIRECTORIES / case
    if method not in WARNED:
        return program.load_adapter(directory)
    with pytest.warns(UserWarning, match=WARNED[method]) as caught:
        loaded = program.load_adapter(directory)
    assert caught[0].filename == __file__
    return loaded


@pytest.mark.parametrize("case", CASES)
def test_outputs_are_the_librarys(case: str) -> None:
    name, loaded = case.partition(".")[0], load(case)
    theirs = load_file(DIRECTORIES / case / "expected.safetensors")["output"]
    # R was drawn in float32, so that its rows, which are made orthonormal here, are so to that precision
    tolerance = max(TOLERANCE[name], 1e-6) if "loreft" in case else TOLERANCE[name]
    assert distance(answer(loaded, name), theirs) < tolerance
    plain = recorded(name)["output"]
    assert theirs.shape != plain.shape or distance(theirs, plain) > 1e-2
    assert CASES[case] in str(loaded.recipe)


REFUSED = {
    "bert.vera_bare": "lacks A and B, which all modules of a VeRA share: out of a model without a head",
    "bert.compacter_bare": "lacks the rule that its Compacters share: out of a model without a head",
}


def test_every_directory_is_read_or_refused() -> None:
    assert {path.name for path in DIRECTORIES.iterdir()} == {*CASES, *REFUSED, *SPEAKING, "bert.lora_classes"}


@pytest.mark.parametrize("case", REFUSED)
def test_what_no_pass_does(case: str) -> None:
    with pytest.raises(pg.AdapterError, match=REFUSED[case]):
        load(case)


SPEAKING = {  # directories out of models of language: the same models here, and their modules by those of the heads
    "bert.pfeiffer_inv_lm": ("BertForMaskedLM", {"heads.one.0": "cls.predictions.transform.dense",
                                                 "heads.one.2": "cls.predictions.transform.LayerNorm",
                                                 "heads.one.3": "cls.predictions.decoder"}),
    "gpt2.pfeiffer_inv_lm": ("GPT2LMHeadModel", {"heads.one.0": "lm_head"}),
    "gpt2.pfeiffer_inv_own": ("GPT2LMHeadModel", {"lm_head": "lm_head"}),
    "llama.pfeiffer_inv_lm": ("LlamaForCausalLM", {"heads.one.0": "lm_head"}),
    "t5.pfeiffer_inv_lm": ("T5ForConditionalGeneration", {"heads.one.0": "lm_head"}),
}  # fmt: skip


@cache
def speaking(case: str) -> pg.Program:
    """The recorded model of a case with its head."""
    base, (family, modules) = build(case.partition(".")[0]), SPEAKING[case]
    model = getattr(transformers, family)(base.config).double().eval()
    model.base_model.load_state_dict(base.state_dict(), strict=False)
    own = model.state_dict()
    for key, value in load_file(DIRECTORIES / case / "model_head.safetensors").items():
        module, _, leaf = key.rpartition(".")
        ours = f"{modules[module]}.{leaf}"
        if ours in own:
            own[ours].copy_(value)
        else:
            assert not value.any(), f"{family} has no {ours}"
    return pg.trace(model, part(case.partition(".")[0], "input/"))


@pytest.mark.parametrize("case", SPEAKING)
def test_scores_behind_an_invertible_adapter_are_the_librarys(case: str) -> None:
    """The heads of the library's own classes read the inverse, and those of transformers' classes do not."""
    name, own = case.partition(".")[0], case.endswith("own")
    with pytest.warns(UserWarning, match=r"holds a prediction head|does not read the inverse") as caught:
        loaded = speaking(case).load_adapter(DIRECTORIES / case)
    words = "out of a GPT2LMHeadModel, whose head does not read the inverse" if own else "holds a prediction head"
    assert [words in str(one.message) for one in caught] == [True]
    assert ("head" in [edit.site for edit in loaded.edits]) != own
    theirs = load_file(DIRECTORIES / case / "expected.safetensors")["output"]
    assert distance(loaded.module().eval()(**part(name, "input/"))["logits"], theirs) < TOLERANCE[name]
    other = speaking(case).apply(*(replace(one, inverse=own) if isinstance(one, Invertible) else one
                                   for one in loaded.recipe.passes()))  # fmt: skip
    with torch.no_grad():
        for key, value in other.table.trainable.items():
            value.copy_(loaded.table[key].tensor)
    assert distance(other.module().eval()(**part(name, "input/"))["logits"], theirs) > 1e-2


def narrower(case: str, directory: Path) -> Path:
    """A copy of a directory whose tensors have half as many columns."""
    shutil.copytree(DIRECTORIES / case, directory)
    tensors = load_file(directory / "adapter.safetensors")
    halves = {name: value[..., : value.shape[-1] // 2].contiguous() for name, value in tensors.items()}
    save_file(halves, directory / "adapter.safetensors")
    return directory


def test_a_prompt_needs_what_it_was_made_for(tmp_path: Path) -> None:
    for case, name, what in (("beit.prompt", "bert", "embedding of tokens"), ("bert.prompt", "vit", "first block")):
        with pytest.raises(pg.AdapterError, match=f"a prompt of width 8, which no {what} here has"):
            load(case, narrower(case, tmp_path / name), traced(name))


def test_a_prompt_beside_position_biases() -> None:
    """The library itself adds biases for 5 places to the scores of 8 there, and fails."""
    config = transformers.BeitConfig(**(MODELS | OTHERS)["beit"][2], use_relative_position_bias=True)
    program = pg.trace(transformers.BeitModel(config).double().eval(), part("beit", "input/"))
    with pytest.raises(pg.PeftGraphError, match="relative_position_bias_table holds values, and none for rows"):
        load("beit.prompt", program=program)


@cache
def headed() -> pg.Program:
    """The recorded BERT inside a model with a head."""
    base = build("bert")
    model = transformers.BertForSequenceClassification(base.config).double().eval()
    model.bert.load_state_dict(base.state_dict(), strict=False)
    return pg.trace(model, part("bert", "input/") | {"output_hidden_states": True})


@pytest.mark.parametrize("case", ["bert.lora", "bert.houlsby", "bert.compacter", "bert.prefix_mlp", "bert.loreft"])
def test_a_model_with_a_head_has_its_base_under_another_name(case: str) -> None:
    """The Compacter was saved out of a model with a head, and the others out of a base; both fit both."""
    assert "bert.encoder.layer.0.output.dense.weight" in headed().table
    theirs = load_file(DIRECTORIES / case / "expected.safetensors")["output"]
    answers = load(case, program=headed()).module().eval()(**part("bert", "input/"), output_hidden_states=True)
    assert distance(answers["hidden_states"][-1], theirs) < 1e-6


def test_a_head_of_transformers_own_is_read(tmp_path: Path) -> None:
    """It trains on; where the model has another one, or none, a word says that it is not read."""
    case = "bert.lora_classes"
    loaded = headed().load_adapter(DIRECTORIES / case)
    assert [applied.method.word for applied in loaded.history] == ["lora", "train"]
    assert {name for name in loaded.table.trainable if "lora" not in name} == {"classifier.weight", "classifier.bias"}
    theirs = load_file(DIRECTORIES / case / "expected.safetensors")["output"]
    assert distance(loaded.module().eval()(**part("bert", "input/"))["logits"], theirs) < TOLERANCE["bert"]
    assert distance(headed().module().eval()(**part("bert", "input/"))["logits"], theirs) > 1e-2
    again = headed().load_adapter(loaded.save_adapter(tmp_path / "ours"))
    assert torch.equal(again.table["classifier.weight"].tensor, loaded.table["classifier.weight"].tensor)
    with pytest.warns(
        UserWarning, match=r"\(head_config.json\), which is not read: a program has the heads of the model"
    ):
        assert len(traced("bert").load_adapter(DIRECTORIES / case).history) == 1


def test_a_head_that_is_tied_is_not_read(tmp_path: Path) -> None:
    directory = Path(shutil.copytree(DIRECTORIES / "gpt2.pfeiffer_inv_own", tmp_path / "adapter"))
    tensors = load_file(directory / "model_head.safetensors")
    save_file({name: value + 1 for name, value in tensors.items()}, directory / "model_head.safetensors")
    with pytest.warns(
        UserWarning, match="it is tied to transformer.wte.weight here|does not read the inverse"
    ) as caught:
        assert not speaking("gpt2.pfeiffer_inv_own").load_adapter(directory).table["lm_head.weight"].trainable
    assert len(caught) == 2


def test_training_goes_on_from_the_mlp_of_a_prefix() -> None:
    """The MLP stays what trains, and finalize puts the rows that it gives in its place."""
    loaded = load("bert.prefix_mlp")
    assert any(name.endswith("self_down_weight") for name in loaded.table.trainable)
    final = loaded.finalize()
    assert {name.rpartition(".")[2] for name in final.table.trainable} == {"prefix_k", "prefix_v"}
    assert distance(answer(final, "bert"), answer(loaded, "bert")) < 1e-12


def test_a_union_with_a_gate_less_member(tmp_path: Path) -> None:
    """Members without a gate stand beside the gated ones."""
    directory = changed("bert.unipelt", tmp_path, {})
    document = json.loads((directory / "adapter_config.json").read_text())
    document["config"]["configs"][1]["use_gating"] = False
    (directory / "adapter_config.json").write_text(json.dumps(document))
    tensors = load_file(directory / "adapter.safetensors")
    save_file({k: v for k, v in tensors.items() if "adapters.one.gate" not in k}, directory / "adapter.safetensors")
    loaded = load("bert.unipelt", directory)
    assert [applied.method.word for applied in loaded.history] == ["unipelt", "pfeiffer"]
    document["config"]["configs"].append(document["config"]["configs"][1])
    (directory / "adapter_config.json").write_text(json.dumps(document))
    with pytest.raises(pg.AdapterError, match="a union of prefix_tuning, bottleneck, lora, bottleneck, two of them"):
        load("bert.unipelt", directory)


def changed(case: str, tmp_path: Path, options: dict[str, object]) -> Path:
    """A copy of a directory with other options; `version` and `model_type` stand beside them."""
    directory = Path(shutil.copytree(DIRECTORIES / case, tmp_path / "adapter"))
    path = directory / "adapter_config.json"
    document = json.loads(path.read_text())
    for key, value in options.items():
        (document if key in document else document["config"])[key] = value
    path.write_text(json.dumps(document))
    return directory


def test_old_releases_did_not_scale(tmp_path: Path) -> None:
    """Before 1.1 the library applied no alpha / r, and it reads such files so today."""
    assert "rank=2 alpha=2.0" in str(
        load("bert.lora", changed("bert.lora", tmp_path, {"version": "adapters.1.0.2"})).recipe
    )


OPTIONS: dict[str, tuple[str, dict[str, object], str]] = {
    "norm": ("bert.houlsby", {"ln_before": True}, "has ln_before=True, which is not read"),
    "activation": ("bert.houlsby", {"non_linearity": "leakyrelu"}, "has non_linearity='leakyrelu'"),
    "scale": ("bert.pfeiffer", {"scaling": "learned"}, "lacks the scale that adapter_config.json speaks of"),
    "behind": ("bert.plus", {"residual_before_ln": True}, "has residual_before_ln=True"),
    "depth": ("bert.pfeiffer", {"stochastic_depth": 0.1}, "has stochastic_depth=0.1"),
    "dora": ("bert.lora", {"use_dora": True}, "dora_m is not in the file"),
    "dora-gate": ("bert.dora", {"use_gating": True}, "has use_dora and use_gating"),
    "architecture": ("bert.lora", {"architecture": "vera"}, "has architecture='vera'"),
    "rank": ("bert.lora", {"r": 3}, r"lora_A has shape \(2, 16\), the recipe makes \(3, 16\)"),
    "gate": ("bert.houlsby", {"use_gating": True}, "houlsby_gate_bias is not in the file"),
    "channel": ("bert.parallel", {"scaling": "channel"}, "lacks the scale"),
    "shared-factors": ("bert.compacter_unshared", {"shared_W_phm": True}, "has shared_W_phm=True"),
    "mlp": ("bert.prefix_mlp", {"non_linearity": "relu"}, "has non_linearity='relu'"),
    "layers": ("bert.prefix", {"leave_out": [0, 1]}, "one in each of 0 layers; this model has 2 such attentions"),
    "layers-of-t5": ("t5.prefix", {"leave_out": [3]}, "leaves layer 1 of the decoder without a prefix, above one that"),
    "length": ("bert.prefix", {"prefix_length": 5}, "a prefix of 192 rows, which are no keys and values of 2 layers"),
    "last-of-two": ("bart.loreft_first", {"suffix_positions": 1}, "edits the last 1 tokens of a model with an encoder"),
    "glow": ("bert.pfeiffer_inv", {"inv_adapter": "glow"}, "which adapters itself cannot run: .* cuts the sequence"),
    "coupling": ("bert.pfeiffer_inv", {"inv_adapter": "real"}, "has inv_adapter='real', which is not read"),
    "unspoken": ("bert.pfeiffer_inv", {"inv_adapter": None}, "of which its configuration does not speak"),
    "missing": ("bert.pfeiffer", {"inv_adapter": "nice"}, "contains no invertible_adapters, which adapter_config.json"),
    "narrower": (
        "bert.pfeiffer_inv",
        {"inv_adapter_reduction_factor": 4},
        r"f_down_weight has shape \(4, 8\), .* \(2, 8\)",
    ),
    "factor": ("bert.pfeiffer_inv", {"inv_adapter_reduction_factor": None}, "reduction_factor cannot be None"),
    "none-of-three": ("gpt2.lora", {"attn_matrices": ["o"]}, "adapts parts of h.0.attn.c_attn"),
}


@pytest.mark.parametrize("option", OPTIONS)
def test_options_that_make_another_method(option: str, tmp_path: Path) -> None:
    case, changes, words = OPTIONS[option]
    with pytest.raises(pg.AdapterError, match=words):
        load(case, changed(case, tmp_path, changes))


def test_pickles_and_empty_files(tmp_path: Path) -> None:
    directory = Path(shutil.copytree(DIRECTORIES / "bert.lora", tmp_path / "adapter"))
    save_file({}, directory / "adapter.safetensors")
    with pytest.raises(pg.AdapterError, match="contains no tensors"):
        load("bert.lora", directory)
    (directory / "adapter.safetensors").rename(directory / "pytorch_adapter.bin")
    with pytest.raises(pg.AdapterError, match="is a pickle, which is not read. .* with use_safetensors=True; or"):
        load("bert.lora", directory)


@pytest.mark.parametrize("case", [
    "bert.loreft", "bert.prefix", "bart.prefix_mlp", "gpt2.unipelt", "bert.compacter", "bert.pfeiffer_inv",
])  # fmt: skip
@pytest.mark.parametrize("spoilt", ["absent", "flat", "scalar"])
@pytest.mark.filterwarnings("ignore:.*holds a prediction head")
def test_damaged_tensors(case: str, spoilt: str, tmp_path: Path) -> None:
    tensors = load_file(DIRECTORIES / case / "adapter.safetensors")
    directory = changed(case, tmp_path, {})
    for key in list(tensors)[:: max(1, len(tensors) // 5)]:
        worse = {"flat": {key: torch.zeros(5)}, "scalar": {key: torch.zeros(())}}.get(spoilt)
        others = {other: value for other, value in tensors.items() if other != key}
        save_file(others | (worse or {}), directory / "adapter.safetensors")
        with pytest.raises(pg.AdapterError, match="adapter"):
            traced(case.partition(".")[0]).load_adapter(directory)


@pytest.mark.parametrize(("option", "value"), [("dropout", "x"), ("configs", [1]), ("configs", None)])
def test_damaged_options(option: str, value: object, tmp_path: Path) -> None:
    case = "bert.unipelt" if option == "configs" else "bert.prefix"
    with pytest.raises(pg.AdapterError, match=rf"is damaged: {option} cannot be"):
        load(case, changed(case, tmp_path, {option: value}))


def test_a_layer_that_the_model_does_not_have(tmp_path: Path) -> None:
    directory = Path(shutil.copytree(DIRECTORIES / "bert.pfeiffer", tmp_path / "adapter"))
    tensors = load_file(directory / "adapter.safetensors")
    save_file({key.replace(".1.", ".7."): v for key, v in tensors.items()}, directory / "adapter.safetensors")
    with pytest.raises(pg.AdapterError, match=r"encoder.layer.7.output: this model has 0 sites ffn in layer 7"):
        load("bert.pfeiffer", directory)
