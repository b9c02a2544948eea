"""peft's prefixes and prompts as passes. peft saves the rows themselves, whatever made them in training.

A prefix is (L, 2 N G F): layer by layer its keys, then its values. In a decoder beside an encoder peft hands each
layer the rows of two, for self- and cross-attention, and empties the latter: layer i has the rows of layer 2 i modulo N
in its self-attention, and the encoder has none. A prompt is (L, D); an encoder with a decoder has 2 L rows, of which
peft reads the first L, for the encoder.
Shapes: L length, N layers, G heads of keys and values, F features of one, D features of the embedding.
Source: huggingface/peft 0.21, peft_model.py (get_prompt, forward), tuners/adaption_prompt/layer.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

from torch import Tensor

from peftgraph.errors import AdapterError, warn
from peftgraph.interop.filling import Filled, Key
from peftgraph.interop.peft.config import PeftConfig
from peftgraph.interop.peft.tensors import PeftTensors
from peftgraph.interop.selecting import selector_of
from peftgraph.ir.program import ProgramData
from peftgraph.rewrite.registry import find_pass
from peftgraph.sites import Site, Sites


def prefix_parts(program: ProgramData, sites: Sites, config: PeftConfig, tensors: PeftTensors) -> list[Filled]:
    """The pass of a PREFIX_TUNING directory.

    Raises:
        AdapterError: the model has other layers, or a decoder beside an encoder.
    """
    rows = _rows(config, tensors)
    beside = config.number("num_transformer_submodules", 1) == 2
    cores = decoder_cores(sites) if beside else list(sites.select("attention.core"))
    layers = int(config.number("num_layers", len(cores)))
    if [site.layer for site in cores] != list(range(layers)) or not cores:
        raise AdapterError(
            f"{config.directory} is a prefix of {layers} layers of one stack{' beside an encoder' * beside}; this "
            f"{program.model} has {len(cores)} such attentions: {', '.join(site.id for site in cores) or 'none'}."
        )
    if rows.shape[1] % (2 * layers):
        raise AdapterError(f"{config.directory}: rows of {rows.shape[1]} are no keys and values of {layers} layers.")
    by_layer = rows.unflatten(1, (2 * layers, -1))
    values: dict[Key, Tensor] = {}
    for number, site in enumerate(cores):
        own = served(number, layers) if beside else number
        values[site.id, "prefix_k"], values[site.id, "prefix_v"] = by_layer[:, 2 * own], by_layer[:, 2 * own + 1]
    length, placed = len(rows), have_biases(program, cores)
    positions = None if placed else same_positions(program, length, beside, config.directory)
    if positions is not None:
        warn(
            f"{config.directory}: peft counts the positions of tokens from the prefix's length on. {positions} for the "
            "same outputs; without that tokens keep their own positions.",
        )
    method = cast(Any, find_pass("prefix"))(at=selector_of(sites, cores), length=length, hidden=None, placed=placed)
    return [Filled(method, values)]


def decoder_cores(sites: Sites) -> list[Site]:
    """The self-attentions of a decoder beside an encoder."""
    return [site for site in sites.select("attention.core") if site.stack == "decoder" and site.kind == "self"]


def served(layer: int, layers: int) -> int:
    """Whose rows a decoder's layer has: peft cuts what it has for two attentions a layer out of those for one."""
    return 2 * layer % layers


def have_biases(program: ProgramData, cores: Sequence[Site]) -> bool:
    """Whether trained biases of the distance are added in attentions, as in T5; they reach peft's prefix."""
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


def same_positions(program: ProgramData, length: int, beside: bool, what: object) -> str:
    """How a model is told the positions that peft gives it.

    Raises:
        AdapterError: it has none that could be told.
    """
    if not beside:
        return f"Give the model position_ids that start at {length}"
    tables = [name for name in program.table if name.endswith("decoder.embed_positions.weight")]
    if len(tables) != 1:
        raise AdapterError(
            f"{what} is a prefix in a decoder beside an encoder, where peft counts the positions of tokens from the "
            f"prefix's length on. This {program.model} has no table of the decoder's positions: they are worked out on "
            "the way, and no pass moves those."
        )
    return f"Trace a model whose {tables[0]} starts {length} rows later"


def prompt_parts(program: ProgramData, sites: Sites, config: PeftConfig, tensors: PeftTensors) -> list[Filled]:
    """The pass of a PROMPT_TUNING directory.

    Raises:
        AdapterError: the model embeds no tokens of that width, or more than one kind of them.
    """
    return [_at_embeddings("prompt", program, sites, config, _rows(config, tensors))]


def ptuning_parts(program: ProgramData, sites: Sites, config: PeftConfig, tensors: PeftTensors) -> list[Filled]:
    """The pass of a P_TUNING directory: the rows that its encoder made.

    Raises:
        AdapterError: as for a prompt.
    """
    return [_at_embeddings("ptuning", program, sites, config, _rows(config, tensors), encoder="none")]


def adaption_parts(program: ProgramData, sites: Sites, config: PeftConfig, tensors: PeftTensors) -> list[Filled]:
    """The pass of an ADAPTION_PROMPT directory: LLaMA-Adapter with one gate a layer.

    Raises:
        AdapterError: a target is no attention.
    """
    fused = any(site.columns is not None for site in sites.select("attention.k|attention.v"))
    known = {site.path: site for site in sites.select("attention" if fused else "attention.core")}
    values: dict[Key, Tensor] = {}
    places: list[Site] = []
    for place in tensors.modules:
        site = known.get(place[0])
        if site is None:
            raise AdapterError(f"{config.directory} has a prompt at {place[0]}, which is no attention.")
        rows = tensors.of(place, "prefix", config)
        values[site.id, "prefix"] = rows.flatten(0, -2)
        values[site.id, "gate"] = tensors.of(place, "gate", config)
        places.append(site)
    length = int(config.number("adapter_len", 10))
    if fused:
        warn(
            f"{config.directory} adds what the queries get from the rows behind the output projection, as peft does in "
            "GPT-2: it is loaded as it was trained, but the paper's LLaMA-Adapter adds it to the heads.",
        )
    method = find_pass("zero_init_prefix")(at=selector_of(sites, places), length=length, gate="layer")  # pyright: ignore[reportCallIssue]
    return [Filled(method, values)]


def _rows(config: PeftConfig, tensors: PeftTensors) -> Tensor:
    if tensors.rows is None or tensors.rows.dim() != 2:
        raise AdapterError(f"{config.directory}: its tensors hold no rows of a prompt.")
    return tensors.rows


def _at_embeddings(
    word: str, program: ProgramData, sites: Sites, config: PeftConfig, rows: Tensor, **options: Any
) -> Filled:
    """A pass that puts the rows in front of the tokens: an encoder's, where there is one."""
    length = int(config.number("num_virtual_tokens", len(rows)))
    found = [site for site in sites.select("embedding") if site.shape is not None and site.shape[0] == rows.shape[1]]
    places = [site for site in found if site.stack != "decoder" or len(found) == 1]
    if len(places) != 1:
        raise AdapterError(
            f"{config.directory} has a prompt of {rows.shape[1]} features; this {program.model} embeds tokens so at "
            f"{len(places)} places: {', '.join(map(str, places)) or 'none'}."
        )
    method = cast(Any, find_pass(word))(at=selector_of(sites, places), length=length, **options)
    return Filled(method, {(places[0].id, "prompt"): rows[:length]})
