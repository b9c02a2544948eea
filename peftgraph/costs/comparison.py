"""Compares what recipes cost on one model: the survey's columns, computed."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import nn

from peftgraph.costs.format import format_bytes, format_operations
from peftgraph.costs.in_context import InContext
from peftgraph.costs.measure import StepCost, inference, training_step
from peftgraph.costs.page import Bar, fragment, page
from peftgraph.errors import NoFold, PeftGraphError
from peftgraph.folding import fold
from peftgraph.ir.edits import Edit, EditLog
from peftgraph.ir.program import ProgramData
from peftgraph.ir.tensor_table import TensorEntry, TensorTable
from peftgraph.rewrite.adapted_sites import adapted_sites
from peftgraph.rewrite.count import count
from peftgraph.rewrite.method import Pass
from peftgraph.sites import Sites

MEMORY = ("weights", "gradients", "optimiser", "activations")
ADAM_STATES = 2  # values that the optimiser keeps for each trainable one


@dataclass(frozen=True)
class Cost:
    """What one recipe costs. Sizes are in bytes, operations are counted as in `peftgraph.costs.measure`.

    Attributes:
        recipe: its name in the comparison.
        trainable: values that train.
        percent: of the base's values.
        changed: values of the base that differ once all that folds is folded.
        rank: the largest rank of the change of a matrix; None where none changes or no bound is known.
        adapter_file: the size of the tensors in the adapter's file.
        weights: of the base, as codes where they are quantised, and what was added to it.
        gradients: of what trains.
        optimiser: the two states that Adam keeps for each trainable value, in its dtype.
        activations: what the forward pass saves for the backward pass.
        step_operations: of a training step.
        backward_blocks: the blocks through which gradients flow.
        blocks: all blocks.
        inference_operations: of a call before folding.
        folded_operations: of a call after folding all that folds.
        folds: whether nothing is left of it after folding.
        mixed_batches: whether rows of a batch may have adapters of their own: no stored tensor changes, nor is one read
            beside the path that is added.
    """

    recipe: str
    trainable: int
    percent: float
    changed: int
    rank: int | None
    adapter_file: int
    weights: int
    gradients: int
    optimiser: int
    activations: int
    step_operations: int
    backward_blocks: int
    blocks: int
    inference_operations: int
    folded_operations: int
    folds: bool
    mixed_batches: bool

    @property
    def training_memory(self) -> int:
        """Weights, gradients, optimiser and activations."""
        return sum(getattr(self, name) for name in MEMORY)


@dataclass(frozen=True)
class Comparison:
    """The costs of several recipes on one model; prints as a table, and shows as one in a notebook.

    Attributes:
        model: its class.
        batch: rows of every input.
        length: tokens of every sequence.
        base: operations of a call of the model without any pass.
        costs: one for each recipe, in order.
        in_context: learning from examples in the prompt, beside training; None where no examples were asked for.
    """

    model: str
    batch: int
    length: int
    base: StepCost
    costs: tuple[Cost, ...]
    in_context: InContext | None = None

    def __iter__(self) -> Iterator[Cost]:
        return iter(self.costs)

    def __getitem__(self, recipe: str) -> Cost:
        return next(one for one in self.costs if one.recipe == recipe)

    def json(self) -> str:
        """Return everything as JSON."""
        rows = [asdict(one) | {"training_memory": one.training_memory} for one in self.costs]
        document: dict[str, object] = {"model": self.model, "batch": self.batch, "length": self.length}
        if self.in_context is not None:
            document["in_context"] = asdict(self.in_context)
        return json.dumps(document | {"inference_operations": self.base.forward, "recipes": rows}, indent=1)

    def cells(self) -> list[list[str]]:
        """Return the table as texts, the headings first."""
        return [list(COLUMNS), *([write(one) for write in COLUMNS.values()] for one in self.costs)]

    @property
    def title(self) -> str:
        """The headline."""
        return f"{self.model}: what methods cost"

    @property
    def facts(self) -> str:
        """The sizes."""
        return f"{self.batch} rows of {self.length} tokens; computed without values"

    def bars(self) -> list[Bar]:
        """Return the parts of each recipe's training memory."""
        return [Bar(one.recipe, {name: getattr(one, name) for name in MEMORY}) for one in self.costs]

    def __str__(self) -> str:
        rows = self.cells()
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = [
            "  ".join(
                cell.rjust(width) if i else cell.ljust(width)
                for i, (cell, width) in enumerate(zip(row, widths, strict=True))
            )
            for row in rows
        ]
        return "\n".join([self.title, self.facts, "", *lines, *self.notes()])

    def notes(self) -> list[str]:
        """Return what learning in context costs beside each recipe, a line each."""
        if self.in_context is None:
            return []
        one = self.in_context.operations
        lines = ["", f"{self.in_context}: {format_operations(int(one))} operations a prediction"]
        return lines + [
            f"  {cost.recipe}: a step of training is {cost.step_operations / one:.2f} of them" for cost in self
        ]

    def html(self) -> str:
        """Return a page with the table and the picture of the memory."""
        return page(self.title, self.facts, self.cells(), self.bars())

    def _repr_html_(self) -> str:
        return fragment(self.title, self.facts, self.cells(), self.bars())


def compare(
    program: ProgramData,
    sites: Sites,
    apply: Callable[[Pass], ProgramData],
    recipes: Iterable[tuple[str, Pass]],
    batch: int,
    length: int,
    examples: int = 0,
) -> Comparison:
    """Compute what recipes cost on a program; see `peftgraph.compare`.

    Args:
        program: without passes; on any device, its values are not read.
        sites: its sites.
        apply: its method that applies a pass.
        recipes: by name.
        batch: rows of every input.
        length: tokens of every sequence.
        examples: in a prompt, of that length each, whose cost is told beside; 0 for none.

    Raises:
        PeftGraphError: a recipe does not fit the model, or the model takes no such sizes.
    """
    if program.history:
        raise PeftGraphError("A comparison starts from a program without passes; give the recipes beside it.")
    base = inference(program, batch, length)
    costs = tuple(_cost(name, apply(method), sites, base, batch, length) for name, method in recipes)
    parameters = sum(p.numel() for p in _unique(program, lambda entry: entry.kind == "parameter"))
    both = {"encoder", "decoder"} <= {site.stack for site in sites}
    prompt = InContext.of(parameters, examples, length, encoder_decoder=both) if examples else None
    return Comparison(program.model, batch, length, base, costs, prompt)


def _cost(name: str, tuned: ProgramData, sites: Sites, base: StepCost, batch: int, length: int) -> Cost:
    tuned = _without_values(tuned)
    counted = count(tuned, sites)
    step, call = training_step(tuned, batch, length), inference(tuned, batch, length)
    folds, folded = _folded(tuned, sites, base, call, batch, length)
    ranks = [change.rank for change in counted.changes if change.rank is not None]
    trainable = _unique(tuned, lambda entry: entry.trainable)
    return Cost(
        recipe=name,
        trainable=counted.trainable,
        percent=counted.percent,
        changed=counted.changed,
        rank=max(ranks, default=None),
        adapter_file=_file_bytes(tuned, sites),
        weights=counted.bytes.weights + counted.bytes.codes + counted.bytes.constants + counted.bytes.adapters,
        gradients=sum(map(_bytes, trainable)),
        optimiser=ADAM_STATES * sum(map(_bytes, trainable)),
        activations=step.saved,
        step_operations=step.forward + step.backward,
        backward_blocks=_backward_blocks(tuned, sites),
        blocks=len(sites.select("block")),
        inference_operations=call.forward,
        folded_operations=folded,
        folds=folds,
        mixed_batches=all(_serves_rows(tuned, sites, edit) for edit in tuned.edits),
    )


def _without_values(program: ProgramData) -> ProgramData:
    """Return a program on the meta device; ties are kept."""
    made: dict[int, torch.Tensor] = {}

    def empty(tensor: torch.Tensor) -> torch.Tensor:
        if id(tensor) not in made:
            new = torch.empty_like(tensor, device="meta")
            made[id(tensor)] = nn.Parameter(new, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else new
        return made[id(tensor)]

    def moved(entry: TensorEntry) -> TensorEntry:
        base = None if entry.base_tensor is None else empty(entry.base_tensor)
        return replace(entry, tensor=empty(entry.tensor), base_tensor=base)

    return program.evolve(table=TensorTable((name, moved(entry)) for name, entry in program.table.items()))


def _folded(
    tuned: ProgramData, sites: Sites, base: StepCost, call: StepCost, batch: int, length: int
) -> tuple[bool, int]:
    """Return whether all of a recipe folds, and the operations of a call once all that folds is folded."""
    try:
        fold(tuned, sites, partial=False, untie=False)
    except NoFold as refusal:
        left = {reason.partition(":")[0] for reason in refusal.reasons}
        if left >= {edit.site for edit in tuned.edits if edit.moves}:
            return False, call.forward
        return False, inference(fold(tuned, sites, partial=True, untie=False), batch, length).forward
    return True, base.forward


def _unique(program: ProgramData, keep: Callable[[TensorEntry], bool]) -> list[torch.Tensor]:
    return list({id(entry.tensor): entry.tensor for entry in program.table.values() if keep(entry)}.values())


def _bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _file_bytes(program: ProgramData, sites: Sites) -> int:
    """Return the bytes of the tensors in the file of an adapter, each once."""
    seen = {id(entry.tensor) for entry in program.table.values() if entry.draw is not None}  # a seed is stored
    total = 0
    for i, applied in enumerate(program.history):
        for one in adapted_sites(program, sites, i, program.table.tensors()):
            own = {name: value for name, value in one.parameters.items() if id(value) not in seen}
            seen |= {id(value) for value in own.values()}
            total += applied.method.file_bytes(own)
    return total


def _backward_blocks(program: ProgramData, sites: Sites) -> int:
    """Return the number of blocks whose results depend on something that trains."""
    reached: set[str] = set()
    trainable = program.table.trainable
    for node in program.graph.nodes:
        trains = node.op == "get_attr" and str(node.target) in trainable
        passes = node.target is not torch.ops.aten.detach.default
        if trains or (passes and any(one.name in reached for one in node.all_input_nodes)):
            reached.add(node.name)
    edits, found = EditLog(program.edits), 0
    for site in sites.select("block"):
        line = edits.moves_at(site.ports["output"])
        found += (line[-1].after if line else site.ports["output"]) in reached
    return found


def _serves_rows(program: ProgramData, sites: Sites, edit: Edit) -> bool:
    """Tell whether what an edit does to a row depends on that row and the edit's own parameters alone."""
    if not any(name in program.table.trainable for name in edit.parameters):
        return True
    if not edit.moves:
        return False
    site = next(one for one in sites if one.id == edit.site)
    nodes = {node.name: node for node in program.graph.nodes}
    own = None if site.weight is None else site.weight.parameter
    at_stored = any(nodes[move.anchor.value].op == "get_attr" for move in edit.moves)
    return not at_stored and all(nodes[name].target != own for name in edit.nodes if name in nodes)


COLUMNS: dict[str, Callable[[Cost], str]] = {
    "recipe": lambda one: one.recipe,
    "trainable": lambda one: f"{one.trainable:,}",
    "of the base": lambda one: f"{one.percent:.3f} %",
    "changed": lambda one: f"{one.changed:,}",
    "rank": lambda one: "-" if one.rank is None else str(one.rank),
    "file": lambda one: format_bytes(one.adapter_file),
    "weights": lambda one: format_bytes(one.weights),
    "gradients": lambda one: format_bytes(one.gradients),
    "Adam": lambda one: format_bytes(one.optimiser),
    "activations": lambda one: format_bytes(one.activations),
    "memory": lambda one: format_bytes(one.training_memory),
    "step": lambda one: format_operations(one.step_operations),
    "backward": lambda one: f"{one.backward_blocks} of {one.blocks}",
    "call": lambda one: format_operations(one.inference_operations),
    "folded": lambda one: format_operations(one.folded_operations),
    "folds": lambda one: "yes" if one.folds else "no",
    "mixed": lambda one: "yes" if one.mixed_batches else "no",
}


def named(recipes: object, read: Callable[[Any], Pass]) -> list[tuple[str, Pass]]:
    """Return recipes with the names that a table shows: their own words, or how they were given."""
    found: list[tuple[str, Pass]] = []
    for one in recipes if isinstance(recipes, list | tuple) else [recipes]:
        method = read(one)
        found.append((one if isinstance(one, str) else str(method).replace("\n", "; "), method))
    return found
