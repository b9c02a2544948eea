"""Records directories that the `adapters` library saves: tiny models, adapters with random weights, and their outputs.

They lie in `adapter_directories/MODEL.METHOD/`, each with `expected.safetensors`: what the library answers. The models
and the environment are those of `record_adapters.py`; BART and BEiT, which are recorded here alone, have their weights
in `adapters/bart.safetensors` and `adapters/beit.safetensors`.

    recorder/bin/python tests/references/record_adapter_directories.py [MODEL.METHOD ...]

Prefixes have tensors that several modules hold, which the library writes only as a pickle: such a file is converted as
the message of `load_adapter` says. The rule that all Compacters share, and the two matrices that all modules of a VeRA
share, are saved only out of a model with a head (`HEADED`), from which its name begins with the base's.
"""

from __future__ import annotations

import re
import sys
from functools import partial
from pathlib import Path

import adapters
import torch
import transformers
from adapters import composition
from record_adapters import FOLDER, build, inputs, record_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

METHODS: dict[str, adapters.AdapterConfig] = {
    "houlsby_cross": adapters.DoubleSeqBnConfig(reduction_factor=4, cross_adapter=True),
    "houlsby": adapters.DoubleSeqBnConfig(reduction_factor=4),
    "pfeiffer": adapters.SeqBnConfig(reduction_factor=4, leave_out=[0]),
    "parallel": adapters.ParBnConfig(reduction_factor=4),
    "parallel_learned": adapters.ParBnConfig(reduction_factor=4, scaling="learned"),
    "parallel_channel": adapters.ParBnConfig(reduction_factor=4, scaling="channel"),
    "pfeiffer_learned": adapters.SeqBnConfig(reduction_factor=4, scaling="learned"),
    "houlsby_scaled": adapters.DoubleSeqBnConfig(reduction_factor=4, scaling=3.0),
    "houlsby_gated": adapters.DoubleSeqBnConfig(reduction_factor=4, use_gating=True),
    "parallel_gated": adapters.ParBnConfig(reduction_factor=4, use_gating=True),
    "plus": adapters.AdapterPlusConfig(reduction_factor=4, stochastic_depth=0.0),  # which needs torchvision
    "plus_learned": adapters.AdapterPlusConfig(reduction_factor=4, stochastic_depth=0.0, scaling="learned"),
    "lora": adapters.LoRAConfig(r=2, alpha=6, intermediate_lora=True),
    "lora_classes": adapters.LoRAConfig(r=2, alpha=6),
    "lora_qv": adapters.LoRAConfig(r=2, alpha=6),
    "ia3": adapters.IA3Config(),
    "dora": adapters.DoRAConfig(r=2, alpha=6, intermediate_lora=True),
    "vera": adapters.VeraConfig(r=2, alpha=6),
    "vera_bare": adapters.VeraConfig(r=2, alpha=6),
    "dvora": adapters.DvoRAConfig(r=2, alpha=6),
    "mtl_lora": adapters.MTLLoRAConfig(r=2, alpha=6, n_up_projection=3),
    "compacter": adapters.CompacterConfig(reduction_factor=4, phm_dim=2),
    "compacter_pp": adapters.CompacterPlusPlusConfig(reduction_factor=4, phm_dim=2),
    "compacter_bare": adapters.CompacterConfig(reduction_factor=4, phm_dim=2),
    "compacter_unshared": adapters.CompacterConfig(
        reduction_factor=4, phm_dim=2, shared_phm_rule=False, factorized_phm_rule=True, factorized_phm_W=False
    ),
    "loreft": adapters.LoReftConfig(r=2, prefix_positions=2, suffix_positions=1),
    "loreft_decayed": adapters.LoReftConfig(r=2, prefix_positions=2, suffix_positions=1),
    "loreft_first": adapters.LoReftConfig(r=2, prefix_positions=2, tied_weights=True, layers=[1, 2]),
    "noreft": adapters.NoReftConfig(r=2, prefix_positions=1, suffix_positions=2, tied_weights=True),
    "direft": adapters.DiReftConfig(r=2, prefix_positions=2, suffix_positions=1, non_linearity="gelu"),
    "prefix": adapters.PrefixTuningConfig(flat=True, prefix_length=3),
    "prefix_mlp": adapters.PrefixTuningConfig(prefix_length=3, bottleneck_size=6, leave_out=[0]),
    "prefix_upper": adapters.PrefixTuningConfig(flat=True, prefix_length=3, leave_out=[0, 2]),
    "mam": adapters.MAMConfig(
        adapters.PrefixTuningConfig(prefix_length=3, bottleneck_size=6), adapters.ParBnConfig(reduction_factor=4)
    ),
    "unipelt": adapters.UniPELTConfig(
        adapters.PrefixTuningConfig(prefix_length=3, bottleneck_size=6),
        adapters.SeqBnConfig(reduction_factor=4),
        adapters.LoRAConfig(r=2, alpha=6),
    ),
    "unipelt_upper": adapters.UniPELTConfig(
        adapters.PrefixTuningConfig(prefix_length=3, bottleneck_size=6, leave_out=[2]),
        adapters.SeqBnConfig(reduction_factor=4),
        adapters.LoRAConfig(r=2, alpha=6),
    ),
    "prompt": adapters.PromptTuningConfig(prompt_length=3),
    "prompt_after_first": adapters.PromptTuningConfig(prompt_length=3, combine="prefix_after_bos"),
    "pfeiffer_inv": adapters.SeqBnInvConfig(reduction_factor=4),
    "pfeiffer_inv_lm": adapters.SeqBnInvConfig(reduction_factor=4, inv_adapter_reduction_factor=4),
    "pfeiffer_inv_own": adapters.SeqBnInvConfig(reduction_factor=4),
    "houlsby_inv": adapters.DoubleSeqBnInvConfig(reduction_factor=4),
    "prompt_inv": adapters.ConfigUnion(
        adapters.PromptTuningConfig(prompt_length=3), adapters.SeqBnInvConfig(reduction_factor=4)
    ),
}
BERT = METHODS.keys() - {
    "houlsby_cross", "prefix_upper", "unipelt_upper", "pfeiffer_inv_own", "prompt_after_first"
}  # fmt: skip
DECODERS = {
    "houlsby", "pfeiffer", "parallel", "lora", "ia3", "compacter", "compacter_pp", "loreft", "prefix", "prefix_mlp",
    "mam", "unipelt", "pfeiffer_inv", "pfeiffer_inv_lm",
}  # fmt: skip
CHOSEN = {
    "bert": BERT,
    "gpt2": DECODERS | {"compacter_unshared", "parallel_gated", "plus", "pfeiffer_inv_own"},
    "llama": DECODERS | {"dora", "mtl_lora", "plus"},
    "vit": {"plus", "prompt", "prompt_after_first"},
    "beit": {"prompt"},
    "t5": {
        "houlsby_cross", "pfeiffer", "parallel", "lora", "ia3", "compacter", "loreft_first", "prefix", "prefix_mlp",
        "prefix_upper", "mam", "unipelt", "unipelt_upper", "pfeiffer_inv", "pfeiffer_inv_lm",
    },
    "bart": {
        "houlsby_cross", "lora", "compacter_pp", "loreft_first", "prefix", "prefix_mlp", "mam", "unipelt",
        "pfeiffer_inv",
    },
}  # fmt: skip
HEADED = {"compacter", "compacter_pp", "vera", "dvora", "pfeiffer_inv_lm"}
CLASSES = {"lora_classes"}  # likewise, and the head is trained
OWN = {"pfeiffer_inv_own"}  # out of transformers' own model with a head
# Lost is what is shared, and that R h stays; recorded is what the library reads.
LOST = {"compacter_bare", "vera_bare", "direft"}


def wrapped(name: str, method: str) -> tuple[nn.Module, nn.Module]:
    """The model that is saved, and the one that answers: one and the same, or a model with a head around its base."""
    base = build(name)
    if method in OWN:
        model = transformers.AutoModelForCausalLM.from_config(base.config).double()
        model.base_model.load_state_dict(base.state_dict())
        adapters.init(model)
        return model.eval(), model
    if method in CLASSES:
        model = transformers.AutoModelForSequenceClassification.from_config(base.config).double()
        model.base_model.load_state_dict(base.state_dict())
        adapters.init(model)
        return model.eval(), model
    if method not in HEADED:
        adapters.init(base)
        return base, base
    model = adapters.AutoAdapterModel.from_config(base.config).double()
    model.base_model.load_state_dict(base.state_dict(), strict=False)
    if method.endswith("_lm"):
        others = partial(model.add_causal_lm_head, layers=1) if name != "t5" else model.add_seq2seq_lm_head
        (model.add_masked_lm_head if name == "bert" else others)("one")
        return model.double().eval(), model
    model.add_classification_head("one", num_labels=2)
    return model.eval(), model.base_model


def answer(model: nn.Module, name: str) -> Tensor:
    """The scores of a model of language, or the last hidden state."""
    answers = model(**inputs(name))
    return answers["logits"] if "logits" in answers else answers["last_hidden_state"]


def readable(folder: Path) -> None:
    """The tensors of a pickle as safetensors, each once."""
    pickle = folder / "pytorch_adapter.bin"
    tensors = torch.load(pickle, weights_only=True)
    save_file({key: value for key, value in tensors.items() if ".pool." not in key}, folder / "adapter.safetensors")
    pickle.unlink()


def reloaded(name: str, method: str, folder: Path) -> Tensor:
    """What the library answers once it has read the directory into a model of its own."""
    model, base = wrapped(name, method)
    torch.set_default_dtype(torch.float64)  # what it makes for the adapter would round the values otherwise
    model.set_active_adapters(model.load_adapter(str(folder), use_safetensors=True))
    torch.set_default_dtype(torch.float32)
    model.eval()
    with torch.no_grad():
        return answer(base, name)


def record(name: str, method: str) -> None:
    """Writes one directory."""
    model, base = wrapped(name, method)
    model.add_adapter("one", config=METHODS[method])
    model.set_active_adapters("one")
    generator = torch.Generator().manual_seed(3)
    parameters = [(key, p) for key, p in base.named_parameters() if not key.startswith("heads.")]
    own = [(key, p) for key, p in parameters if ".one." in key or re.search(r"shared_parameters|^classifier\.", key)]
    model.double().eval()
    with torch.no_grad():
        for _, parameter in {id(p): (key, p) for key, p in own}.values():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
        for parameter in (one for key, one in own if key.endswith("original")):
            parameter.diagonal().sign_()  # no gradient reaches these signs of R's rows
            if method == "loreft_decayed":
                parameter[0, 0] = 0.999  # as weight decay leaves one, of which the library takes the whole part
        output = answer(base, name)
    plain = load_file(FOLDER / f"{name}.safetensors")["output"]
    assert output.shape != plain.shape or not torch.allclose(output, plain, atol=1e-2), "the adapter does nothing"
    folder = Path(__file__).parent / "adapter_directories" / f"{name}.{method}"
    folder.mkdir(parents=True, exist_ok=True)
    shares = any("prefix_tunings" in key for key, _ in own)
    model.save_adapter(str(folder), "one", use_safetensors=not shares)
    if shares:
        readable(folder)
    again = reloaded(name, method, folder)
    assert torch.allclose(again, output, rtol=0, atol=1e-6) != (method in LOST), "the files lost something"
    output = again if method in LOST else output
    save_file({"output": output.contiguous()}, folder / "expected.safetensors")


COMPOSED: dict[str, tuple[list[str], list[int]]] = {  # directories that are stacked, layers that are skipped
    "stack": (["houlsby", "compacter_unshared"], []),
    "skip": (["houlsby"], [0]),
    "two_loras": (["lora_qv", "lora_qv"], []),
    "two_parallels": (["parallel", "parallel_learned"], []),
    "two_prefixes": (["prefix", "prefix"], []),
}


def compositions() -> None:
    """Writes what BERT answers with several of the directories, with skipped layers, and with merged weights."""
    outputs: dict[str, Tensor] = {}
    for key, (methods, skipped) in COMPOSED.items():
        base = restored(methods)
        base.set_active_adapters(composition.Stack(*map(str, range(len(methods)))), skip_layers=skipped)
        outputs[key] = answered(base)
    for method in ("lora", "ia3"):
        base = restored([method])
        base.merge_adapter("0")
        outputs[f"merged_{method}"] = answered(base)
    save_file(outputs, FOLDER / "bert.compositions.safetensors")


def restored(methods: list[str]) -> nn.Module:
    """BERT with some directories, as adapters 0, 1, ..."""
    base = build("bert")
    adapters.init(base)
    torch.set_default_dtype(torch.float64)
    for number, method in enumerate(methods):
        folder = Path(__file__).parent / "adapter_directories" / f"bert.{method}"
        base.load_adapter(str(folder), load_as=str(number), use_safetensors=True, set_active=True)
    torch.set_default_dtype(torch.float32)
    return base.eval()


def answered(base: nn.Module) -> Tensor:
    with torch.no_grad():
        return base(**inputs("bert")).last_hidden_state.contiguous()


if __name__ == "__main__":
    for model_name in ("bart", "beit"):
        record_model(model_name)
    for model_name, methods in CHOSEN.items():
        for method_name in sorted(methods):
            if not sys.argv[1:] or f"{model_name}.{method_name}" in sys.argv[1:]:
                record(model_name, method_name)
                print(model_name, method_name)
    if not sys.argv[1:]:
        compositions()
