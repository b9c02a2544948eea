"""Writes trained tokens for peft: the rows of a table at the module that has it; rows of several passes are joined.

A tied table is written at the module whose weight comes first, the model's input embedding: peft ties the others to it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from peftgraph.errors import AdapterError
from peftgraph.interop.parameter_names import TOKEN_ROWS
from peftgraph.interop.peft.adapter_content import AdaptedSite, PeftContent, module_paths, target_names
from peftgraph.interop.peft.read_tokens import warn_of_biases
from peftgraph.interop.peft.tensors import PREFIX
from peftgraph.interop.peft.write_base_parameters import saved_names
from peftgraph.ir.program import ProgramData
from peftgraph.passes import TrainableTokens
from peftgraph.sites import Site, Sites


@dataclass
class TableRows:
    """The trained rows of one table, by the pass that trains them."""

    method: TrainableTokens
    site: Site
    parts: dict[TrainableTokens, Tensor] = field(default_factory=dict)

    @property
    def tokens(self) -> list[int]:
        """The tokens of all passes, in order."""
        return [token for method in self.parts for token in method.tokens]

    @property
    def values(self) -> Tensor:
        """Their rows, (tokens, D)."""
        return torch.cat(list(self.parts.values()))


def write_tokens(program: ProgramData, sites: Sites, adapted: Sequence[AdaptedSite[TrainableTokens]]) -> PeftContent:
    """Return the options and tensors of peft's method for tokens alone.

    Raises:
        AdapterError: peft's format has no such adapter; the message names the pass, the site and the reason.
    """
    tables = token_tables(program, adapted)
    warn_of_biases(program, sites, tables)
    first, *others = tables.values()
    if any(one.tokens != first.tokens for one in others):
        raise AdapterError(
            f"{others[0].method} at {others[0].site}: peft trains the same tokens of all tables where there is no LoRA "
            "beside, and here they differ."
        )
    config = {
        "peft_type": "TRAINABLE_TOKENS",
        "token_indices": first.tokens,
        "target_modules": target_names(tables, module_paths(program)),
    }
    tied = {path: program.table.tied(f"{path}.weight") for path in tables}  # each has its copy in the file
    return PeftContent(config, {
        f"{PREFIX}{name.removesuffix('.weight')}.trainable_tokens_delta": one.values
        for path, one in tables.items()
        for name in tied[path]
    })  # fmt: skip


def write_tokens_beside(
    program: ProgramData, sites: Sites, adapted: Sequence[AdaptedSite[TrainableTokens]]
) -> PeftContent:
    """Return the option and tensors of tokens that train along with a LoRA; empty if none do."""
    tables, known = token_tables(program, adapted), module_paths(program)
    warn_of_biases(program, sites, tables)
    named = {saved_names({path}, known)[0]: one.tokens for path, one in tables.items()}
    tensors = {f"{PREFIX}{path}.token_adapter.trainable_tokens_delta": one.values for path, one in tables.items()}
    return PeftContent({"trainable_token_indices": named} if named else {}, tensors)


def token_tables(program: ProgramData, adapted: Sequence[AdaptedSite[TrainableTokens]]) -> Mapping[str, TableRows]:
    """Return the rows of each table, by the path of the module at which peft stores them.

    Raises:
        AdapterError: peft would not use the rows for all readers of the table.
    """
    found: dict[str, TableRows] = {}
    readers: dict[str, str] = {}
    for one in adapted:
        method, site = one.method, one.site
        assert site.weight is not None
        name = program.table.tied(site.weight.parameter)[0]
        path = name.removesuffix(".weight")
        rows = found.setdefault(path, TableRows(method, site))
        rows.parts.setdefault(method, one.parameters[TOKEN_ROWS])
        twice = readers.setdefault(site.weight.parameter, site.role) != site.role
        if path == name or twice or (site.weight.parameter != name and not _ties(program)):
            raise AdapterError(
                f"{method} at {site}: peft gives several modules one table's rows only in a model of transformers "
                "whose configuration has tie_word_embeddings=True."
            )
    return found


def _ties(program: ProgramData) -> bool:
    config = None if program.model_class is None else program.model_class.state.get("config")
    return bool(getattr(config, "tie_word_embeddings", False))
