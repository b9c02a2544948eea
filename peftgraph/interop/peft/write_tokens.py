"""Trained tokens as peft spells them: the rows of a table at the module that has it, several passes' as one.

A tied table is written at the module whose weight comes first, the model's input embedding: peft ties the others to it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from peftgraph.errors import AdapterError
from peftgraph.interop.peft.tensors import PREFIX
from peftgraph.interop.peft.tokens import TOKENS, warn_of_biases
from peftgraph.interop.peft.write_stored import saved_names
from peftgraph.interop.written import Places, Written, modules_of, targets
from peftgraph.ir.program import ProgramData
from peftgraph.sites import Site, Sites


@dataclass
class Rows:
    """The rows of one table, by the pass that trains them."""

    method: Any
    site: Site
    parts: dict[Any, Tensor] = field(default_factory=dict)

    @property
    def tokens(self) -> list[int]:
        return [token for method in self.parts for token in method.tokens]

    @property
    def values(self) -> Tensor:
        return torch.cat(list(self.parts.values()))


def write_tokens(program: ProgramData, sites: Sites, places: Places) -> Written:
    """The configuration and tensors of peft's method for tokens alone.

    Raises:
        AdapterError: peft's format has no such adapter; names the pass, the site and the reason.
    """
    tables = token_tables(program, places)
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
        "target_modules": targets(tables, modules_of(program)),
    }
    tied = {path: program.table.tied(f"{path}.weight") for path in tables}  # each has its copy in the file
    return Written(config, {
        f"{PREFIX}{name.removesuffix('.weight')}.trainable_tokens_delta": one.values
        for path, one in tables.items()
        for name in tied[path]
    })  # fmt: skip


def write_tokens_beside(program: ProgramData, sites: Sites, places: Places) -> Written:
    """The option and tensors of tokens beside a LoRA; nothing where none train."""
    tables, known = token_tables(program, places), modules_of(program)
    warn_of_biases(program, sites, tables)
    named = {saved_names({path}, known)[0]: one.tokens for path, one in tables.items()}
    tensors = {f"{PREFIX}{path}.token_adapter.trainable_tokens_delta": one.values for path, one in tables.items()}
    return Written({"trainable_token_indices": named} if named else {}, tensors)


def token_tables(program: ProgramData, places: Places) -> Mapping[str, Rows]:
    """The rows of each table, by the path of the module that peft keeps them at.

    Raises:
        AdapterError: peft would not give the rows to all who read the table.
    """
    found: dict[str, Rows] = {}
    readers: dict[str, str] = {}
    for method, site, tensors in places:
        assert site.weight is not None
        name = program.table.tied(site.weight.parameter)[0]
        path = name.removesuffix(".weight")
        rows = found.setdefault(path, Rows(method, site))
        rows.parts.setdefault(method, tensors[TOKENS])
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
