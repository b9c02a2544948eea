"""The sites of one pass with the parameters that it has there, for what happens outside the graph."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from peftgraph.errors import PeftGraphError
from peftgraph.ir.program import ProgramData
from peftgraph.sites import Site, Sites


@dataclass(frozen=True)
class AdaptedSite:
    """One site of a pass with its parameters there.

    Attributes:
        site: where the pass was applied.
        rule: the index of the rule that was applied, in `Pass.rules()`.
        parameters: by the short names that the rule's `delta` gave them; by full name where the base's own train, or
            where several have one short name.
    """

    site: Site
    rule: int
    parameters: Mapping[str, Tensor]


def adapted_sites(
    program: ProgramData, sites: Sites, application: int, parameters: Mapping[str, Tensor]
) -> list[AdaptedSite]:
    """Return the sites of one pass of a program's history.

    Args:
        program: the program.
        sites: its sites.
        application: the index of the pass.
        parameters: the parameters to look up, by full name: the program's, or those of a module that it made.

    Raises:
        PeftGraphError: one of the pass's parameters is not among them.
    """
    by_id = {site.id: site for site in sites}
    found: list[AdaptedSite] = []
    for edit in program.edits:
        if edit.application != application:
            continue
        for name in edit.parameters:
            if name not in parameters:
                raise PeftGraphError(f"The module has no parameter {name}; pass the module that this program made.")
        short = Counter(_last(name) for name in edit.parameters)
        keys = (
            name if not edit.moves or short[last] > 1 else last for name in edit.parameters for last in [_last(name)]
        )
        own = {key: parameters[name] for key, name in zip(keys, edit.parameters, strict=True)}
        found.append(AdaptedSite(by_id[edit.site], edit.rule, own))
    return found


def _last(name: str) -> str:
    return name.rpartition(".")[2]
