"""Reads peft's prefixes and prompts as passes. peft saves the rows themselves, whatever computed them in training.

A prefix is (L, 2 N G F): layer by layer its keys, then its values. In a decoder with an encoder, peft gives each layer
the rows of two, for self- and cross-attention, and clears the latter: self-attention of layer i gets the rows of layer
2 i modulo N, and the encoder gets none. A prompt is (L, D); an encoder with a decoder has 2 L rows, of which peft reads
the first L, for the encoder.
Shapes: L length, N layers, G heads of keys and values, F features of one, D features of the embedding.
Source: huggingface/peft 0.21, peft_model.py (get_prompt, forward), tuners/adaption_prompt/layer.py.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from peftgraph.errors import AdapterError, warn
from peftgraph.interop.parameter_names import ADAPTION_GATE, ADAPTION_ROWS, PREFIX_KEYS, PREFIX_VALUES, PROMPT_ROWS
from peftgraph.interop.peft.config import PeftConfig
from peftgraph.interop.peft.tensors import PeftTensors
from peftgraph.interop.site_selection import selector_for
from peftgraph.ir.program import ProgramData
from peftgraph.passes import Prefix, Prompt, PTuning, ZeroInitPrefix
from peftgraph.rewrite.method import ParameterKey, PassWithValues
from peftgraph.sites import Selector, Site, Sites


def prefix_passes(program: ProgramData, sites: Sites, config: PeftConfig, tensors: PeftTensors) -> list[PassWithValues]:
    """Return the pass of a PREFIX_TUNING directory.

    Raises:
        AdapterError: the model has other layers, or positions that cannot be shifted as peft shifts them.
    """
    rows = _rows(config, tensors)
    with_encoder = config.number("num_transformer_submodules", 1) == 2
    cores = decoder_cores(sites) if with_encoder else list(sites.select("attention.core"))
    layers = int(config.number("num_layers", len(cores)))
    if [site.layer for site in cores] != list(range(layers)) or not cores:
        raise AdapterError(
            f"{config.directory} is a prefix of {layers} layers of one stack{' beside an encoder' * with_encoder}; "
            f"this {program.model} has {len(cores)} such attentions: {', '.join(site.id for site in cores) or 'none'}."
        )
    if rows.shape[1] % (2 * layers):
        raise AdapterError(f"{config.directory}: rows of {rows.shape[1]} are no keys and values of {layers} layers.")
    by_layer = rows.unflatten(1, (2 * layers, -1))
    values: dict[ParameterKey, Tensor] = {}
    for number, site in enumerate(cores):
        own = source_layer(number, layers) if with_encoder else number
        values[site.id, PREFIX_KEYS], values[site.id, PREFIX_VALUES] = by_layer[:, 2 * own], by_layer[:, 2 * own + 1]
    length, placed = len(rows), have_biases(program, cores)
    positions = None if placed else position_advice(program, length, with_encoder, config.directory)
    if positions is not None:
        warn(
            f"{config.directory}: peft counts the positions of tokens from the prefix's length on. {positions} for the "
            "same outputs; without that tokens keep their own positions.",
        )
    return [PassWithValues(Prefix(at=selector_for(sites, cores), length=length, hidden=None, placed=placed), values)]


def decoder_cores(sites: Sites) -> list[Site]:
    """Return the self-attentions of a decoder that has an encoder."""
    return [site for site in sites.select("attention.core") if site.stack == "decoder" and site.kind == "self"]


def source_layer(layer: int, layers: int) -> int:
    """Return the layer whose rows peft uses for a layer of a decoder that has an encoder: it uses two for each
    layer."""
    return 2 * layer % layers


def have_biases(program: ProgramData, cores: Sequence[Site]) -> bool:
    """Check whether attentions add trained relative position biases, as in T5; these apply to peft's prefix too."""
    products = {name for site in cores for port, name in site.ports.items() if port in "qkv" or "product" in port}
    todo = [program.node(site.op) for site in cores]
    seen = {*todo, *map(program.node, products)}
    while todo:
        node = todo.pop()
        if node.op == "get_attr" and program.table[str(node.target)].kind == "parameter":
            return True
        new = [one for one in node.all_input_nodes if one not in seen]
        seen.update(new)
        todo += new
    return False


def position_advice(program: ProgramData, length: int, with_encoder: bool, what: object) -> str:
    """Say what the user must do so that the model gets the same positions as under peft.

    Raises:
        AdapterError: nothing can be done: the model computes its positions itself.
    """
    if not with_encoder:
        return f"Give the model position_ids that start at {length}"
    tables = [name for name in program.table if name.endswith("decoder.embed_positions.weight")]
    if len(tables) != 1:
        raise AdapterError(
            f"{what} is a prefix in a decoder beside an encoder, where peft counts the positions of tokens from the "
            f"prefix's length on. This {program.model} has no table of the decoder's positions: they are worked out on "
            "the way, and no pass moves those."
        )
    return f"Trace a model whose {tables[0]} starts {length} rows later"


def prompt_passes(program: ProgramData, sites: Sites, config: PeftConfig, tensors: PeftTensors) -> list[PassWithValues]:
    """Return the pass of a PROMPT_TUNING directory.

    Raises:
        AdapterError: the model embeds no tokens of that width, or more than one kind of them.
    """
    rows = _rows(config, tensors)
    site, at, length = _embedding(program, sites, config, rows)
    return [PassWithValues(Prompt(at=at, length=length), {(site.id, PROMPT_ROWS): rows[:length]})]


def ptuning_passes(
    program: ProgramData, sites: Sites, config: PeftConfig, tensors: PeftTensors
) -> list[PassWithValues]:
    """Return the pass of a P_TUNING directory: the rows that its encoder computed.

    Raises:
        AdapterError: as for a prompt.
    """
    rows = _rows(config, tensors)
    site, at, length = _embedding(program, sites, config, rows)
    return [PassWithValues(PTuning(at=at, length=length, encoder="none"), {(site.id, PROMPT_ROWS): rows[:length]})]


def adaption_passes(
    program: ProgramData, sites: Sites, config: PeftConfig, tensors: PeftTensors
) -> list[PassWithValues]:
    """Return the pass of an ADAPTION_PROMPT directory: LLaMA-Adapter with one gate for each layer.

    Raises:
        AdapterError: a target is no attention.
    """
    fused = any(site.columns is not None for site in sites.select("attention.k|attention.v"))
    known = {site.path: site for site in sites.select("attention" if fused else "attention.core")}
    values: dict[ParameterKey, Tensor] = {}
    adapted: list[Site] = []
    for module in tensors.modules:
        site = known.get(module[0])
        if site is None:
            raise AdapterError(f"{config.directory} has a prompt at {module[0]}, which is no attention.")
        values[site.id, ADAPTION_ROWS] = tensors.at(module, ADAPTION_ROWS, config).flatten(0, -2)
        values[site.id, ADAPTION_GATE] = tensors.at(module, ADAPTION_GATE, config)
        adapted.append(site)
    length = int(config.number("adapter_len", 10))
    if fused:
        warn(
            f"{config.directory} adds what the queries get from the rows after the output projection, as peft does in "
            "GPT-2: it is loaded as it was trained, but the paper's LLaMA-Adapter adds it to the heads.",
        )
    return [PassWithValues(ZeroInitPrefix(at=selector_for(sites, adapted), length=length, gate="layer"), values)]


def _rows(config: PeftConfig, tensors: PeftTensors) -> Tensor:
    if tensors.rows is None or tensors.rows.dim() != 2:
        raise AdapterError(f"{config.directory}: its tensors hold no rows of a prompt.")
    return tensors.rows


def _embedding(program: ProgramData, sites: Sites, config: PeftConfig, rows: Tensor) -> tuple[Site, Selector, int]:
    """Return the embedding whose tokens the rows are prepended to (an encoder's where there is one), its selector, and
    the number of rows.

    Raises:
        AdapterError: the model embeds no tokens of that width, or more than one kind of them.
    """
    length = int(config.number("num_virtual_tokens", len(rows)))
    found = [site for site in sites.select("embedding") if site.shape is not None and site.shape[0] == rows.shape[1]]
    chosen = [site for site in found if site.stack != "decoder" or len(found) == 1]
    if len(chosen) != 1:
        raise AdapterError(
            f"{config.directory} has a prompt of {rows.shape[1]} features; this {program.model} embeds tokens so at "
            f"{len(chosen)} places: {', '.join(map(str, chosen)) or 'none'}."
        )
    return chosen[0], selector_for(sites, chosen), length
