"""Records what the `adapters` library computes: tiny models, adapters with random weights, outputs and gradients.

The files lie beside this script in `adapters/` and are read by `test_adapters.py`; nobody needs the library to run the
tests. It pins a transformers release of its own, so it is run in an environment of its own:

    python -m venv recorder
    recorder/bin/pip install torch==2.13.0 adapters==1.3.0 'transformers~=4.57' safetensors
    recorder/bin/python tests/references/record_adapters.py [METHOD ...]

Named methods are recorded on the models that are there; without any, so are the models.

A method is one function: it adds the library's adapter to a model and returns the new parameters under names that both
sides can spell: `{layer}.{site}.{parameter}`, with the layers of a decoder counted on from the encoder's, and the
parameter alone where several sites share it. Each file holds, in float64, `adapter/NAME`, `gradient/NAME` and
`output`; each model's own file holds `base/NAME`, `input/NAME` and the `target` whose squared distance from the output
is the loss. A method that makes outputs longer has a target in its own file.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import adapters
import torch
import transformers
from adapters import composition
from adapters.methods.bottleneck import BottleneckLayer
from adapters.methods.lora import LoRALayer, LoRAMergedLinear
from adapters.methods.prefix_tuning import FlatPrefixTuning, PrefixTuningLayer
from safetensors.torch import load_file, save
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))
from recorded import FOLDER, MODELS, OTHERS, VOCAB

SITES = {"mh_adapter": "attention", "output_adapter": "ffn", "cross_adapter": "cross"}
FAMILIES = {  # of prefixes: the kinds of attention in an encoder-decoder
    "encoder_prefix": "encoder_self",
    "self_prefix": "decoder_self",
    "cross_prefix": "decoder_cross",
}
LENGTH, BOTTLENECK = 3, 6  # of prefixes


def whole(tensor: Tensor) -> Tensor:
    """The tensor itself."""
    return tensor


@dataclass(frozen=True)
class Part:
    """A parameter, or a part of one that holds several of ours, or one whose rows are orthonormal."""

    parameter: nn.Parameter
    part: Callable[[Tensor], Tensor] = whole
    orthonormal: bool = False


Named = dict[str, nn.Parameter | Part]


def build(name: str) -> nn.Module:
    """A model with random weights; no bias is zero and no norm weight is one."""
    family, config, sizes = (MODELS | OTHERS)[name]
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
    if name in ("vit", "beit"):
        return {"pixel_values": torch.randn(2, 3, 8, 8, dtype=torch.float64)}
    mask = torch.ones(2, 5, dtype=torch.long)
    mask[1, -2:] = 0
    call = {"input_ids": torch.randint(3, VOCAB, (2, 5)), "attention_mask": mask}
    return call | ({"decoder_input_ids": torch.randint(3, VOCAB, (2, 4))} if name in ("t5", "bart") else {})


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
    named |= {"gate_weight": adapter.gate.weight, "gate_bias": adapter.gate.bias} if adapter.use_gating else {}
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


def reft(model: nn.Module, config: adapters.ReftConfig) -> Named:
    """An edit after every block, or one for each end. Of a parametrised R, R itself is recorded."""
    model.add_adapter("one", config=config)
    model.set_active_adapters("one")
    named: Named = {}
    for _, layer in model.iter_layers():
        module = layer.reft_layer.refts["one"]
        ends = ("prefix_", "suffix_") if config.suffix_positions and not config.tied_weights else ("",)
        for end, unit in zip(ends, module.units, strict=False):
            place = f"{layer.reft_layer.layer_idx}.block.{end}"
            if unit.orthogonal:
                nn.utils.parametrize.remove_parametrizations(unit.projection, "weight")
            source = unit.learned_source
            named |= {f"{place}weight": source.weight, f"{place}bias": source.bias}
            named |= {f"{place}projection": Part(unit.projection.weight, orthonormal=unit.orthogonal)}
    return named


def loreft(model: nn.Module) -> Named:
    """The last tokens of T5's decoder are looked for where the encoder's are, past the end of a shorter sequence: T5
    has edits of the first tokens alone. Untied, those would need a float32 model."""
    alone = model.config.is_encoder_decoder
    return reft(model, adapters.LoReftConfig(r=2, prefix_positions=2, suffix_positions=not alone, tied_weights=alone))


def noreft(model: nn.Module) -> Named:
    return reft(model, adapters.NoReftConfig(r=2, prefix_positions=1, suffix_positions=2, tied_weights=True))


def direft(model: nn.Module) -> Named:
    return reft(model, adapters.DiReftConfig(r=2, prefix_positions=2, suffix_positions=1, non_linearity="gelu"))


def output_rows(layers: int, index: int, side: int, length: int = 0) -> Callable[[Tensor], Tensor]:
    """The keys (side 0) or values (side 1) of one attention, out of the rows of the MLP's last layer or, where a
    `length` is given, out of all rows of keys and values in one."""

    def part(tensor: Tensor) -> Tensor:
        if length:
            return tensor.view(length, 2 * layers, -1)[:, 2 * index + side]
        return tensor.view(2 * layers, -1, *tensor.shape[1:])[2 * index + side]

    return part


def prefixes(model: nn.Module) -> Named:
    """The prefixes of a model, by attention, and the MLPs that they share."""
    pool, named = model.base_model.prefix_tuning.prefix_tunings["one"], {}
    for shim in (one for one in model.modules() if isinstance(one, PrefixTuningLayer) and "one" in one.prefixes):
        module, index = pool[shim.location_key], shim.prefixes["one"]
        cross = "cross." if shim.location_key == "cross_prefix" else ""
        place = f"{shim.layer_idx}.{cross}attention.core"
        family = FAMILIES[shim.location_key] if model.config.is_encoder_decoder else "self"
        if "one" in shim.prefix_gates:
            gate = shim.prefix_gates["one"]
            named |= {f"{place}.gate_weight": gate.weight, f"{place}.gate_bias": gate.bias}
        for side, letter in enumerate("kv"):
            if isinstance(module, FlatPrefixTuning):
                part = output_rows(module.n_layers, index, side, LENGTH)
                named[f"{place}.prefix_{letter}"] = Part(module.control_trans, part)
                continue
            part, (down, _, up) = output_rows(module.n_layers, index, side), module.control_trans
            named |= {f"{place}.{letter}_weight": Part(up.weight, part), f"{place}.{letter}_bias": Part(up.bias, part)}
            named |= {f"{family}_embedding": module.wte.weight}
            named |= {f"{family}_down_weight": down.weight, f"{family}_down_bias": down.bias}
    return named


def prefix(model: nn.Module) -> Named:
    model.add_adapter("one", config=adapters.PrefixTuningConfig(flat=True, prefix_length=LENGTH))
    model.set_active_adapters("one")
    return prefixes(model)


def prefix_mlp(model: nn.Module) -> Named:
    model.add_adapter("one", config=adapters.PrefixTuningConfig(prefix_length=LENGTH, bottleneck_size=BOTTLENECK))
    model.set_active_adapters("one")
    return prefixes(model)


def mam(model: nn.Module) -> Named:
    """A prefix and a parallel adapter at the feed-forward, with the scale 4."""
    config = adapters.PrefixTuningConfig(flat=True, prefix_length=LENGTH)
    named = single(model, adapters.MAMConfig(config, adapters.ParBnConfig(reduction_factor=4)))
    return named | prefixes(model)


def share_of(count: int, index: int, tensor: Tensor) -> Tensor:
    """One of `count` equal parts along the first axis."""
    return tensor.chunk(count)[index]


def loras(model: nn.Module) -> Named:
    """The LoRAs of a model with their gates, apart where the library keeps q's and v's in one."""
    named: Named = {}
    for layer in (one for one in model.modules() if isinstance(one, LoRALayer) and "one" in one.loras):
        lora = layer.loras["one"]
        parts = {"lora_A": lora.lora_A, "lora_B": lora.lora_B}
        parts |= {"gate_weight": lora.gate.weight, "gate_bias": lora.gate.bias} if lora.use_gating else {}
        letters = "qv" if isinstance(layer, LoRAMergedLinear) else layer.attn_key
        place = f"{layer.layer_idx}.{crossed(model, layer)}attention"
        for i, letter in enumerate(letters):
            share = partial(share_of, len(letters), i)
            named |= {f"{place}.{letter}.{key}": Part(parameter, share) for key, parameter in parts.items()}
    return named


def crossed(model: nn.Module, layer: nn.Module) -> str:
    """What stands in the name of a layer of cross-attention."""
    path = next(path for path, module in model.named_modules() if module is layer)
    return "cross." if "EncDecAttention" in path else ""


def unipelt(model: nn.Module) -> Named:
    """A prefix, an adapter after the feed-forward and LoRA at q and v, each times a gate of its own.

    A gate is sigmoid(w x + b), one number a token, then its mean over all positions of an example, padding included. x
    is what the module reads: the adapter the value after the feed-forward, that of Pfeiffer's place; a LoRA the input
    of its projection (of GPT-2, q and v have gates of their own in one layer); a prefix the input of the projection of
    the queries, and the gate multiplies its keys and its values. There the gate stands in the place of LoRA's alpha /
    rank, which is not applied.
    """
    named = single(
        model,
        adapters.UniPELTConfig(
            adapters.PrefixTuningConfig(flat=True, prefix_length=LENGTH),
            adapters.SeqBnConfig(reduction_factor=4),
            adapters.LoRAConfig(r=2, alpha=6),
        ),
    )
    return named | prefixes(model) | loras(model)


def prompt(model: nn.Module) -> Named:
    model.add_adapter("one", config=adapters.PromptTuningConfig(prompt_length=LENGTH))
    model.set_active_adapters("one")
    return {"embedding.prompt": model.base_model.prompt_tuning.prompt_tunings["one"].prompt_embedding.weight}


METHODS: dict[str, Callable[[nn.Module], Named]] = {
    "houlsby": houlsby,
    "pfeiffer": pfeiffer,
    "pfeiffer_attention": pfeiffer_attention,
    "parallel": parallel,
    "parallel_learned": parallel_learned,
    "compacter": compacter,
    "compacter_pp": compacter_pp,
    "fusion": fusion,
    "loreft": loreft,
    "noreft": noreft,
    "direft": direft,
    "prefix": prefix,
    "prefix_mlp": prefix_mlp,
    "mam": mam,
    "unipelt": unipelt,
    "prompt": prompt,
}
# what is recorded on some models only: one shows what all would, or the library cannot do the others
SOME = {"noreft": {"bert"}, "direft": {"bert"}, "prompt": {"bert"}}


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
    parts = {key: one if isinstance(one, Part) else Part(one) for key, one in named.items()}
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    with torch.no_grad():
        for parameter in {id(one.parameter): one.parameter for one in parts.values()}.values():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
            parameter.requires_grad_(True)
        for one in parts.values():
            if one.orthonormal:
                one.parameter.copy_(torch.linalg.qr(one.parameter.T).Q.T)
    output = model(**inputs(name)).last_hidden_state
    target = torch.randn(output.shape, generator=torch.Generator().manual_seed(2), dtype=output.dtype)
    (output - target).square().sum().backward()
    tensors: dict[str, Tensor] = {"output": output}
    for key, one in parts.items():
        assert one.parameter.grad is not None, key
        tensors |= {f"adapter/{key}": one.part(one.parameter), f"gradient/{key}": one.part(one.parameter.grad)}
    longer = output.shape != load_file(FOLDER / f"{name}.safetensors")["output"].shape
    write(f"{name}.{method}", tensors | ({"target": target} if longer else {}))


def write(stem: str, tensors: dict[str, Tensor]) -> None:
    plain = {key: value.detach().clone().contiguous() for key, value in tensors.items()}
    (FOLDER / f"{stem}.safetensors").write_bytes(save(plain))


if __name__ == "__main__":
    chosen = sys.argv[1:] or list(METHODS)
    for model_name in MODELS:
        if not sys.argv[1:]:
            record_model(model_name)
        for method_name in chosen:
            if model_name not in SOME.get(method_name, MODELS):
                continue
            record(model_name, method_name)
            print(model_name, method_name)
