"""peft's trainable tokens as passes: one for each table whose rows the file has.

peft gives the rows to all modules that share a table if they are on the model's input embedding, whose weight is the
first of those that are tied; on another module they are that module's alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from peftgraph.errors import AdapterError, warn
from peftgraph.interop.filling import Filled
from peftgraph.interop.peft.config import CONFIG, PeftConfig
from peftgraph.interop.peft.tensors import PeftTensors
from peftgraph.interop.selecting import owners, selector_of
from peftgraph.ir.program import ProgramData
from peftgraph.rewrite.registry import find_pass
from peftgraph.sites import Site, Sites

TOKENS = "tokens"


def token_parts(program: ProgramData, sites: Sites, config: PeftConfig, tensors: PeftTensors) -> list[Filled]:
    """The passes of the rows in a directory, with their values; none where it holds none.

    Raises:
        AdapterError: rows of no table, other rows than the options say, or rows of one of several tied modules alone.
    """
    held = {path: values[TOKENS] for (path, _), values in tensors.modules.items() if TOKENS in values}
    _check_complete(program, config, held)
    tables = {path: _sites(program, sites, config, path) for path in _tables(program, config, held)}
    parts: list[Filled] = []
    for path, chosen in sorted(tables.items(), key=lambda item: item[1][0].role != "embedding"):
        name = f"table{len(parts) + 1}" if parts else ""
        options: dict[str, Any] = {"tokens": config.tokens(path), "at": selector_of(sites, chosen), "name": name}
        parts.append(Filled(find_pass("trainable_tokens")(**options), {(chosen[0].id, TOKENS): held[path]}))
    warn_of_biases(program, sites, tables)
    return parts


def warn_of_biases(program: ProgramData, sites: Sites, paths: Iterable[str]) -> None:
    """Says where peft's answers are others: where it puts rows on a head, it leaves the head's bias out."""
    names = [name for path in paths for name in program.table.tied(f"{path}.weight")]
    for site in (site for name in names for site in owners(sites, name)):
        if site.bias is not None and bool(program.table[site.bias.parameter].tensor.any()):
            warn(
                f"peft leaves {site.bias.parameter} out where {site.path} has trained tokens. Here it is kept, so that "
                "answers differ by it.",
            )


def _check_complete(program: ProgramData, config: PeftConfig, held: Mapping[str, Tensor]) -> None:
    """Refuses a file without the rows that its options speak of: peft would start them anew. It may have those of tied
    modules once."""
    given = config.given_tokens
    ends: Sequence[str] = list(given) if isinstance(given, dict) else [""][: len(given)]
    names = {f"{path}.weight" for path in held}
    tied = {name for one in names & program.table.keys() for name in program.table.tied(one)}
    paths = [name.removesuffix(".weight") for name in names | tied]
    lacking = next((end for end in ends if not any(path.endswith(end) for path in paths)), None)
    if lacking is not None:
        where = lacking or "the embedding"
        raise AdapterError(f"{config.directory}: tokens of {where} train, of which the file has no tensors.")


def _tables(program: ProgramData, config: PeftConfig, held: Mapping[str, Tensor]) -> Iterable[str]:
    """The modules of the file; of those that are tied here, the one that peft ties the others to."""
    tied: dict[tuple[str, ...], list[str]] = {}
    for path in held:
        if f"{path}.weight" not in program.table:
            raise AdapterError(f"{config.directory} has tokens of {path}, which this {program.model} does not have.")
        tied.setdefault(program.table.tied(f"{path}.weight"), []).append(path)
    for names, paths in tied.items():
        first = names[0].removesuffix(".weight")
        if first not in paths:
            raise AdapterError(
                f"{config.directory} has tokens of {paths[0]} alone, which is tied to {first} here, and peft cuts that "
                "tie. Trace a model whose configuration has tie_word_embeddings=False."
            )
        for path in paths:
            _check_alike(config, held, first, path)
        yield first


def _check_alike(config: PeftConfig, held: Mapping[str, Tensor], first: str, path: str) -> None:
    numbers = config.tokens(path)
    if len(numbers) != len(held[path]):
        raise AdapterError(
            f"{config.directory}: {path} has {len(held[path])} rows, {CONFIG} says {len(numbers)} tokens."
        )
    if numbers != config.tokens(first) or not torch.equal(held[path], held[first]):
        raise AdapterError(
            f"{config.directory} has other tokens of {path} than of {first}, which are tied here, and peft cuts that "
            "tie. Trace a model whose configuration has tie_word_embeddings=False."
        )


def _sites(program: ProgramData, sites: Sites, config: PeftConfig, path: str) -> list[Site]:
    """The embeddings that look up a table, or the projection that has it for itself."""
    if config.of("peft_type", str, "") == "TRAINABLE_TOKENS":
        config.check_selects(path)
    found = [site for name in program.table.tied(f"{path}.weight") for site in owners(sites, name)]
    chosen = [site for site in found if site.role == "embedding"] or found
    own = {site.weight.parameter for site in chosen if site.weight}
    others = [site for site in found if site not in chosen and site.weight and site.weight.parameter in own]
    if others:
        raise AdapterError(
            f"{config.directory} has tokens of {path}, whose weight {others[0]} reads too, and peft gives it no rows."
        )
    if not chosen:
        raise AdapterError(f"{config.directory} has tokens of {path}, which is no site. program.sites lists the sites.")
    return chosen
