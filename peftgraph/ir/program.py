"""The data of a program: a graph, the table of its tensors, its calling convention, and the edits that made it.

`ProgramData` is immutable. Code that rewrites copies the graph first (`copy_graph`). The public `peftgraph.Program`
adds methods.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Self

import torch
from torch import fx

from peftgraph.errors import Conflict
from peftgraph.ir.comparison_report import ComparisonReport
from peftgraph.ir.edits import Edit, EditLog, competing_copies
from peftgraph.ir.graphs import find_node
from peftgraph.ir.shape_inference import constant_term
from peftgraph.ir.signature import Signature
from peftgraph.ir.site_statistics import SiteStatistics
from peftgraph.ir.source_model import EnclosingModel, ModelClass, SubmoduleState
from peftgraph.ir.tensor_table import TensorTable


@dataclass(frozen=True)
class AppliedPass:
    """Records one pass of a program's history.

    Attributes:
        method: the pass.
        name: in the names of its parameters; "" for none.
        dtype: the requested dtype of its parameters; None for the default.
    """

    method: Any
    name: str = ""
    dtype: torch.dtype | None = None


@dataclass(frozen=True, eq=False)
class ProgramData:
    """A traced model and the edits that passes made to it.

    Attributes:
        model: the class name of the traced model.
        graph: placeholders, one `get_attr` for each stored tensor that is used, aten calls, one flat output.
        table: the stored tensors.
        signature: the calling convention.
        example: the tensors of the traced call in placeholder order, kept for probes and export.
        history: the passes applied, in order.
        edits: what they did, in order.
        can_change_dtype: whether literals that follow the parameters' dtype are known.
        base: the traced program that all edits started from; None for that program itself.
        proof: the evidence of folding, on a folded program.
        model_class: the library's class of the model, if it is one of its classes.
        submodules: the submodules' state other than tensors, by path, in the model's order.
        enclosing_model: the whole model, if a submodule was traced; the table contains the tensors of the whole model.
        model_class: the library's class that the model is an instance of.
        statistics: what data says about sites, by their ids, if the program was calibrated.
        served: the adapters that it holds, one of which each row of a batch names; None for a program of one model.
        comparison: what was compared with the model; None if nothing was.
    """

    model: str
    graph: fx.Graph
    table: TensorTable
    signature: Signature
    example: tuple[torch.Tensor, ...]
    history: tuple[AppliedPass, ...] = ()
    edits: tuple[Edit, ...] = ()
    can_change_dtype: bool = True
    base: ProgramData | None = None
    proof: Any = None
    enclosing_model: EnclosingModel | None = None
    model_class: ModelClass | None = None
    submodules: Mapping[str, SubmoduleState] = field(default_factory=dict)
    comparison: ComparisonReport | None = None
    statistics: Mapping[str, SiteStatistics] = field(default_factory=dict, repr=False)
    served: Any = field(default=None, repr=False)

    def evolve(self, **changes: Any) -> Self:
        """Return a program with some fields replaced."""
        return replace(self, **changes)

    @property
    def examples(self) -> dict[str, torch.Tensor]:
        """The tensors of the traced call, by the names of the inputs in the graph."""
        return dict(zip((spec.name for spec in self.signature.inputs), self.example, strict=True))

    def prepended_lengths(self) -> dict[str, int]:
        """Return how much passes enlarge the sizes of inputs, by the name of the size; for a graph with a cache, in a
        first call."""
        edits, more = EditLog(self.edits), dict[str, int]()
        for spec in self.signature.inputs:
            line = edits.moves_at(spec.name)
            if line:
                given, now = (self.node(name).meta["val"].shape for name in (spec.name, line[-1].after))
                differences = {dim: constant_term(b - a) for dim, a, b in zip(spec.dims, given, now, strict=True)}
                more |= {dim: n for dim, n in differences.items() if n and isinstance(dim, str)}
        return more

    def require_one_adapter(self) -> None:
        """Refuse a program in which several named adapters train copies of one tensor.

        Raises:
            Conflict: names the tensor and the adapters.
        """
        for name, several in competing_copies(self.edits).items():
            names = [self.history[edit.application].name for edit in several]
            raise Conflict(
                f"{' and '.join(names)} each train a copy of {name}. Choose one of them: program.only({names[0]!r})."
            )

    def node(self, name: str) -> fx.Node:
        """Return the node called `name`, which must exist."""
        return find_node(self.graph, name)
