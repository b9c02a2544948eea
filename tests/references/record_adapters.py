"""Records what the `adapters` library computes: tiny models, adapters with random weights, outputs and gradients.

The files lie beside this script in `adapters/` and are read by `test_adapters.py`; nobody needs the library to run the
tests. It pins a transformers release of its own, so it is run in an environment of its own:

    python -m venv recorder
    recorder/bin/pip install torch==2.13.0 adapters==1.3.0 'transformers~=4.57' safetensors
    recorder/bin/python tests/references/record_adapters.py [METHOD ...]

A method is one function: it adds the library's adapter to a model and returns the new parameters under names that both
sides can spell: `{layer}.{site}.{parameter}`, with the layers of a decoder counted on from the encoder's. Each file
holds, in float64, `adapter/NAME`, `gradient/NAME` and `output`; each model's own file holds `base/NAME`, `input/NAME`
and the `target` whose squared distance from the output is the loss.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import adapters
import torch
import transformers
from adapters import composition
from adapters.methods.bottleneck import BottleneckLayer
from safetensors.torch import save
from torch import Tensor, nn

FOLDER = Path(__file__).parent / "adapters"
VOCAB, WIDTH, HEADS, LAYERS, INNER = 29, 16, 4, 2, 24
SITES = {"mh_adapter": "attention", "output_adapter": "ffn", "cross_adapter": "cross"}
Named = dict[str, nn.Parameter]

SIZES = {
    "hidden_size": WIDTH,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "intermediate_size": INNER,
    "max_position_embeddings": 16,
    "vocab_size": VOCAB,
}
# name -> class, class of the configuration, configuration; `test_adapters.py` builds the same
MODELS = {
    "bert": ("BertModel", "BertConfig", SIZES),
    "gpt2": ("GPT2Model", "GPT2Config", {"vocab_size": VOCAB, "n_positions": 16, "n_embd": WIDTH, "n_layer": LAYERS,
                                         "n_head": HEADS, "n_inner": INNER, "bos_token_id": 1, "eos_token_id": 2}),
    "llama": ("LlamaModel", "LlamaConfig", {**SIZES, "num_key_value_heads": 2, "pad_token_id": 0}),
    "t5": ("T5Model", "T5Config", {"vocab_size": VOCAB, "d_model": WIDTH, "d_kv": 4, "d_ff": INNER, "num_heads": HEADS,
                                   "num_layers": LAYERS, "decoder_start_token_id": 0}),
    "vit": ("ViTModel", "ViTConfig", {"hidden_size": WIDTH, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS,
                                      "intermediate_size": INNER, "image_size": 8, "patch_size": 4}),
}  # fmt: skip


def build(name: str) -> nn.Module:
    """A model with random weights; no bias is zero and no norm weight is one."""
    family, config, sizes = MODELS[name]
    torch.manual_seed(0)
    settings = getattr(transformers, config)(**sizes)
    settings._attn_implementation = "eager"
    model = getattr(transformers, family)(settings).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def inputs(name: str) -> dict[str, Tensor]:
    """One call of a model; where it takes a mask, the second row ends in padding."""
    torch.manual_seed(1)
    if name == "vit":
        return {"pixel_values": torch.randn(2, 3, 8, 8, dtype=torch.float64)}
    mask = torch.ones(2, 5, dtype=torch.long)
    mask[1, -2:] = 0
    call = {"input_ids": torch.randint(3, VOCAB, (2, 5)), "attention_mask": mask}
    return call | ({"decoder_input_ids": torch.randint(3, VOCAB, (2, 4))} if name == "t5" else {})


# methods: each adds its adapter to the model, activates it, and names its parameters


def places(model: nn.Module) -> Iterator[tuple[str, BottleneckLayer]]:
    """The library's adapter layers with the names of their places."""
    for module in model.modules():
        if isinstance(module, BottleneckLayer):
            yield f"{module.layer_idx}.{SITES[module.location_key]}", module


def bottleneck(adapter: nn.Module) -> Named:
    """The parameters of one bottleneck, by our names."""
    named: Named = {}
    for side, layer in (("down", adapter.adapter_down[0]), ("up", adapter.adapter_up)):
        if hasattr(layer, "W_left"):
            named |= {f"{side}_left": layer.W_left, f"{side}_right": layer.W_right, f"{side}_bias": layer.b}
        else:
            named |= {f"{side}_weight": layer.weight, f"{side}_bias": layer.bias}
    return named | ({"scale": adapter.scaling} if isinstance(adapter.scaling, nn.Parameter) else {})


def single(model: nn.Module, config: adapters.BnConfig) -> Named:
    """One bottleneck adapter."""
    model.add_adapter("one", config=config)
    model.set_active_adapters("one")
    found = [(place, layer.adapters["one"]) for place, layer in places(model) if "one" in layer.adapters]
    return {f"{place}.{key}": p for place, adapter in found for key, p in bottleneck(adapter).items()}


def houlsby(model: nn.Module) -> Named:
    return single(model, adapters.DoubleSeqBnConfig(reduction_factor=4))


def pfeiffer(model: nn.Module) -> Named:
    return single(model, adapters.SeqBnConfig(reduction_factor=4))


def pfeiffer_attention(model: nn.Module) -> Named:
    return single(model, adapters.SeqBnConfig(reduction_factor=4, mh_adapter=True, output_adapter=False))


def parallel(model: nn.Module) -> Named:
    return single(model, adapters.ParBnConfig(reduction_factor=4))


def parallel_learned(model: nn.Module) -> Named:
    return single(model, adapters.ParBnConfig(reduction_factor=4, scaling="learned"))


def compacter(model: nn.Module) -> Named:
    named = single(model, adapters.CompacterConfig(reduction_factor=4, phm_dim=2))
    return named | {"phm_rule": model.base_model.shared_parameters["one"]["phm_rule"]}


def compacter_pp(model: nn.Module) -> Named:
    named = single(model, adapters.CompacterPlusPlusConfig(reduction_factor=4, phm_dim=2))
    return named | {"phm_rule": model.base_model.shared_parameters["one"]["phm_rule"]}


def fusion(model: nn.Module) -> Named:
    """Two single adapters in every layer, and the attention that mixes them."""
    for name in ("one", "two"):
        model.add_adapter(name, config=adapters.SeqBnConfig(reduction_factor=4))
    both = composition.Fuse("one", "two")
    model.add_adapter_fusion(both)
    model.set_active_adapters(both)
    named: Named = {}
    for place, layer in places(model):
        for name, adapter in layer.adapters.items():
            named |= {f"{place}.{name}_{key}": p for key, p in bottleneck(adapter).items()}
        for mixer in layer.adapter_fusion_layer.values():
            named |= {f"{place}.{key.replace('.', '_')}": p for key, p in mixer.named_parameters()}
    return named


METHODS: dict[str, Callable[[nn.Module], Named]] = {
    "houlsby": houlsby,
    "pfeiffer": pfeiffer,
    "pfeiffer_attention": pfeiffer_attention,
    "parallel": parallel,
    "parallel_learned": parallel_learned,
    "compacter": compacter,
    "compacter_pp": compacter_pp,
    "fusion": fusion,
}


def record_model(name: str) -> None:
    """Writes a model's own file."""
    model = build(name)
    base = {f"base/{key}": value for key, value in model.state_dict().items()}
    called = {f"input/{key}": value for key, value in inputs(name).items()}
    output = model(**inputs(name)).last_hidden_state
    target = torch.randn(output.shape, generator=torch.Generator().manual_seed(2), dtype=output.dtype)
    write(name, base | called | {"target": target, "output": output})


def record(name: str, method: str) -> None:
    """Writes what one method computes on one model."""
    model = build(name)
    adapters.init(model)
    named = METHODS[method](model)
    model.double().eval()
    generator = torch.Generator().manual_seed(3)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    with torch.no_grad():
        for parameter in named.values():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
            parameter.requires_grad_(True)
    output = model(**inputs(name)).last_hidden_state
    target = torch.randn(output.shape, generator=torch.Generator().manual_seed(2), dtype=output.dtype)
    (output - target).square().sum().backward()
    tensors = {f"adapter/{key}": p for key, p in named.items()} | {
        f"gradient/{key}": p.grad for key, p in named.items()
    }
    write(f"{name}.{method}", tensors | {"output": output})


def write(stem: str, tensors: dict[str, Tensor]) -> None:
    plain = {key: value.detach().clone().contiguous() for key, value in tensors.items()}
    (FOLDER / f"{stem}.safetensors").write_bytes(save(plain))


if __name__ == "__main__":
    chosen = sys.argv[1:] or list(METHODS)
    for model_name in MODELS:
        record_model(model_name)
        for method_name in chosen:
            record(model_name, method_name)
            print(model_name, method_name)
