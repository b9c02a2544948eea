"""What is written in peft's format, and how its options name modules."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from peftgraph.interop.peft.config import ends_with
from peftgraph.ir.program import ProgramData
from peftgraph.sites import Site

Places = Sequence[tuple[Any, Site, dict[str, Tensor]]]  # a pass, a site, and its parameters there by their last names


@dataclass(frozen=True)
class Written:
    """The options and tensors of one adapter, by peft's names."""

    config: dict[str, Any]
    tensors: dict[str, Tensor] = field(default_factory=dict)


def modules_of(program: ProgramData) -> set[str]:
    """The paths of the base's modules that hold tensors, and of those around them."""
    found: set[str] = set()
    for name, entry in program.table.items():
        path = "" if entry.added else name.rpartition(".")[0]
        while path and path not in found:
            found.add(path)
            path = path.rpartition(".")[0]
    return found


def targets(paths: Iterable[str], known: set[str]) -> list[str] | str:
    """Names that mean these modules among the known ones: the last parts of their paths where these suffice, else whole
    paths, or a regular expression where a path ends another one."""
    wanted = set(paths)
    for names in ({path.rpartition(".")[2] for path in wanted}, wanted):
        if {path for path in known | wanted if ends_with(path, names)} == wanted:
            return sorted(names)
    return "|".join(re.escape(path) for path in sorted(wanted))
