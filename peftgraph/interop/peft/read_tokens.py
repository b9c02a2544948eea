"""Reads peft's trainable tokens as passes: one for each table whose rows the file has.

Rows on the model's input embedding, whose weight is the first of those that are tied, are shared by all modules of that
table; rows on another module are that module's alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from peftgraph.errors import AdapterError, warn
from peftgraph.interop.parameter_names import TOKEN_ROWS
from peftgraph.interop.peft.config import CONFIG, PeftConfig
from peftgraph.interop.peft.tensors import PeftTensors
from peftgraph.interop.site_selection import selector_for, sites_of_weight
from peftgraph.ir.program import ProgramData
from peftgraph.passes import TrainableTokens
from peftgraph.rewrite.method import PassWithValues
from peftgraph.sites import Site, Sites


def token_passes(program: ProgramData, sites: Sites, config: PeftConfig, tensors: PeftTensors) -> list[PassWithValues]:
    """Return the passes of the trained rows in a directory, with their values; none where it holds none.

    Raises:
        AdapterError: the rows are of no table, other rows than the options say, or of one of several tied modules
            alone.
    """
    rows = {path: values[TOKEN_ROWS] for (path, _), values in tensors.modules.items() if TOKEN_ROWS in values}
    _check_complete(program, config, rows)
    tables = {path: _sites(program, sites, config, path) for path in _tables(program, config, rows)}
    parts: list[PassWithValues] = []
    for path, chosen in sorted(tables.items(), key=lambda item: item[1][0].role != "embedding"):
        name = f"table{len(parts) + 1}" if parts else ""
        method = TrainableTokens(tokens=config.tokens(path), at=selector_for(sites, chosen), name=name)
        parts.append(PassWithValues(method, {(chosen[0].id, TOKEN_ROWS): rows[path]}))
    warn_of_biases(program, sites, tables)
    return parts


def warn_of_biases(program: ProgramData, sites: Sites, paths: Iterable[str]) -> None:
    """Warn where peft's outputs differ: it drops the bias of a head that has trained tokens."""
    names = [name for path in paths for name in program.table.tied(f"{path}.weight")]
    for site in (site for name in names for site in sites_of_weight(sites, name)):
        if site.bias is not None and bool(program.table[site.bias.parameter].tensor.any()):
            warn(
                f"peft leaves {site.bias.parameter} out where {site.path} has trained tokens. Here it is kept, so that "
                "answers differ by it.",
            )


def _check_complete(program: ProgramData, config: PeftConfig, rows: Mapping[str, Tensor]) -> None:
    """Check that the file has the rows that its options name; of tied modules it may contain them once.

    Raises:
        AdapterError: it lacks some, which peft would randomly initialise.
    """
    named = config.token_options
    ends: Sequence[str] = list(named) if isinstance(named, dict) else [""][: len(named)]
    names = {f"{path}.weight" for path in rows}
    tied = {name for one in names & program.table.keys() for name in program.table.tied(one)}
    paths = [name.removesuffix(".weight") for name in names | tied]
    lacking = next((end for end in ends if not any(path.endswith(end) for path in paths)), None)
    if lacking is not None:
        where = lacking or "the embedding"
        raise AdapterError(f"{config.directory}: tokens of {where} train, of which the file has no tensors.")


def _tables(program: ProgramData, config: PeftConfig, rows: Mapping[str, Tensor]) -> Iterable[str]:
    """Yield the modules of the file; of modules that are tied in this model, only the one that peft ties the others
    to."""
    tied: dict[tuple[str, ...], list[str]] = {}
    for path in rows:
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
            _check_equal(config, rows, first, path)
        yield first


def _check_equal(config: PeftConfig, rows: Mapping[str, Tensor], first: str, path: str) -> None:
    numbers = config.tokens(path)
    if len(numbers) != len(rows[path]):
        raise AdapterError(
            f"{config.directory}: {path} has {len(rows[path])} rows, {CONFIG} says {len(numbers)} tokens."
        )
    if numbers != config.tokens(first) or not torch.equal(rows[path], rows[first]):
        raise AdapterError(
            f"{config.directory} has other tokens of {path} than of {first}, which are tied here, and peft cuts that "
            "tie. Trace a model whose configuration has tie_word_embeddings=False."
        )


def _sites(program: ProgramData, sites: Sites, config: PeftConfig, path: str) -> list[Site]:
    """Return the embeddings that look up a table, or the projection that alone reads it."""
    if config.method == "TRAINABLE_TOKENS":
        config.check_selects(path)
    found = [site for name in program.table.tied(f"{path}.weight") for site in sites_of_weight(sites, name)]
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
