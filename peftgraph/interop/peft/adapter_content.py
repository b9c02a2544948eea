"""Holds what is written to a peft directory, and chooses the names by which peft's options select modules."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from torch import Tensor

from peftgraph.interop.peft.config import ends_with
from peftgraph.ir.program import ProgramData
from peftgraph.rewrite.method import Pass
from peftgraph.sites import Site

M = TypeVar("M", bound=Pass, covariant=True)


@dataclass(frozen=True)
class AdaptedSite(Generic[M]):
    """A site, the pass on it, and the parameters that the pass has there, by the last part of their names."""

    method: M
    site: Site
    parameters: Mapping[str, Tensor]


@dataclass(frozen=True)
class PeftContent:
    """The options and tensors of one adapter, by peft's names."""

    config: dict[str, Any]
    tensors: dict[str, Tensor] = field(default_factory=dict)


def module_paths(program: ProgramData) -> set[str]:
    """Return the paths of the base's modules that hold tensors, and of the modules that contain them."""
    found: set[str] = set()
    for name, entry in program.table.items():
        path = "" if entry.added else name.rpartition(".")[0]
        while path and path not in found:
            found.add(path)
            path = path.rpartition(".")[0]
    return found


def target_names(paths: Iterable[str], known: set[str]) -> list[str] | str:
    """Return names that select these modules among the known ones, in the form of `target_modules`.

    The last parts of the paths if these suffice, otherwise the whole paths, or a regular expression if a path is the
    end of another one.
    """
    wanted = set(paths)
    for names in ({path.rpartition(".")[2] for path in wanted}, wanted):
        if {path for path in known | wanted if ends_with(path, names)} == wanted:
            return sorted(names)
    return "|".join(re.escape(path) for path in sorted(wanted))
