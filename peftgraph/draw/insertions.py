"""What an edit inserted, read from its nodes: operations on a signal, between what it reads and where it enters."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from torch import fx

from peftgraph.draw.formulas import ATOM, ParameterFormula, formula, number, parameter, short_name
from peftgraph.draw.graph_operators import (
    FRESH,
    LOOKS_UP,
    MOVES,
    PRODUCTS,
    SCATTERS,
    alike,
    differences,
    operand,
    operator,
)
from peftgraph.ir.edits import Edit, EditLog, Move
from peftgraph.ir.program import ProgramData
from peftgraph.sites import Sites

Sign = Literal["plus", "times", "concat", "replace"]
Look = Literal["box", "pill", "plus", "times", "again", "made"]

SIGNS: dict[str, tuple[str, Look]] = {"add": ("+", "plus"), "sub": ("−", "pill"), "mul": ("×", "times"),
                                      "div": ("÷", "pill")}  # fmt: skip
WORDS = {"cat": "concat", "scaled_dot_product_attention": "attention", "sum": "sum", "layer_norm": "norm"}


@dataclass(frozen=True)
class OuterValue:
    """A value of the program around: a base value, or what another edit put in its place."""

    value: str


Operand = int | OuterValue | ParameterFormula


@dataclass(frozen=True)
class Operation:
    """An operation on the signal.

    Attributes:
        look: how it is drawn: a box for a product with weights, a pill for what else has a name, a circle for a sign;
            "again" for a part of the base that is computed once more, "made" for parameters that enter as they are.
        label: its name.
        inputs: what it works on: another step by its number, a value that is read, parameters; the main one first.
        shape: of its weight.
        tip: what a tooltip says.
        frozen: whether none of its parameters trains.
        defines: a name in the label and the formula that it stands for.
    """

    look: Look
    label: str
    inputs: tuple[Operand, ...] = ()
    shape: tuple[int, ...] = ()
    tip: str = ""
    frozen: bool = False
    defines: tuple[str, str] = ("", "")


@dataclass(frozen=True)
class Insertion:
    """What enters at one place.

    Attributes:
        application: which pass of the history made it, by `rule`; `site` where.
        value: the base value in whose place the result stands, and of it, if not all of them, `reader`: the base node
            that reads the result.
        sign: how it enters.
        operations: the operations, operands first.
        out: what enters.
        after: the node that carries the result.
    """

    application: int
    rule: int
    site: str
    value: str
    reader: str
    sign: Sign
    operations: tuple[Operation, ...]
    out: Operand
    after: str

    @property
    def owns(self) -> bool:
        """Whether a parameter of the pass is in it."""
        refs = [self.out, *(ref for step in self.operations for ref in step.inputs)]
        made = any(isinstance(ref, ParameterFormula) and ref.own for ref in refs)
        return made or any(step.look in ("box", "pill") and step.tip and step.shape for step in self.operations)

    @property
    def reads(self) -> tuple[OuterValue, ...]:
        """The values it reads, each once."""
        refs = [ref for step in self.operations for ref in step.inputs] + [self.out]
        return tuple(dict.fromkeys(ref for ref in refs if isinstance(ref, OuterValue)))


def insertions(program: ProgramData, sites: Sites, edits: Iterable[Edit]) -> list[Insertion]:
    """Return what `edits` of a program inserted, inner ones before outer ones at the same place."""
    context = _Context(program, sites)
    found = [one for edit in edits for move in edit.moves for one in _Analysis(context, edit).entering(move)]
    anchors = {move.anchor for edit in program.edits for move in edit.moves}
    place = {move.after: i for anchor in anchors for i, move in enumerate(context.edits.chain(anchor))}
    return sorted(found, key=lambda one: place.get(one.after, 0))


class _Context:
    """What all edits of a program have in common."""

    def __init__(self, program: ProgramData, sites: Sites) -> None:
        base = program.base or program
        self.program = program
        self.edits = EditLog(program.edits)
        self.nodes = {node.name: node for node in program.graph.nodes}
        self.base = {node.name: node for node in base.graph.nodes}
        self.carriers = {move.after for edit in program.edits for move in edit.moves}
        self.norms = [
            (self.base[site.ports["output"]], self.base[site.ports["input"]]) for site in sites if site.role == "norm"
        ]
        self.called = _called(sites)
        made = program.table
        self.trainable = {name for name, entry in made.items() if entry.trainable}
        self.added = {name for name, entry in made.items() if entry.added}

    def below(self, move: Move) -> str:
        """Return the value that an edit's result is combined with."""
        chain = self.edits.chain(move.anchor)
        place = chain.index(move)
        return chain[place - 1].after if place else move.anchor.value


def _called(sites: Sites) -> dict[str, str]:
    """Return the names of the base's stored tensors in formulas: W_k, b_k; W alone if several sites share one."""
    found: dict[str, str] = {}
    for site in sites:
        if site.scale:
            found[site.scale] = "g"
        if site.role not in ("ffn.hidden", "bias"):
            owned = ((site.weight and site.weight.parameter, "W"), (site.bias and site.bias.parameter, "b"))
            for name, letter in owned:
                if name:
                    found[name] = letter if name in found else f"{letter}_{site.role.rpartition('.')[2]}"
    return found


@dataclass
class _Analysis:
    """One edit while its nodes are read."""

    context: _Context
    edit: Edit
    operations: list[Operation] = field(default_factory=list)
    known: dict[str, Operand | None] = field(default_factory=dict)

    def entering(self, move: Move) -> Iterator[Insertion]:
        """Yield the insertions that enter by one move; none where only sizes or constants do, such as a wider mask."""
        below = self.context.below(move)
        value, reader = move.anchor.value, move.anchor.reader or ""
        after = self._carrier(self.context.nodes[move.after])
        joined = self._joined(after, below)
        if joined is not None:
            yield from self._insertion(move.after, value, reader, *joined)
            return
        pairs = list(differences(after, self.context.base.get(below, after)))
        edges = [pair for pair in pairs if pair[1] is not after]
        if not edges:
            yield from self._insertion(move.after, value, reader, "replace", self.ref(after))
        for old, new, consumer in edges:
            start = _Analysis(self.context, self.edit)
            there = start._joined(start._carrier(new), old.name)
            sign, out = there if there is not None else ("replace", start.ref(new))
            yield from start._insertion(move.after, old.name, consumer.name, sign, out)

    def _insertion(self, after: str, value: str, reader: str, sign: Sign, out: Operand | None) -> Iterator[Insertion]:
        if out is not None:
            operations, out = _needed(self.operations, out)
            edit = self.edit
            yield Insertion(edit.application, edit.rule, edit.site, value, reader, sign, operations, out, after)

    def _carrier(self, node: fx.Node) -> fx.Node:
        """Skip the nodes that only put a result in its place, and return the node before them."""
        while self._own(node) and (operator(node) in MOVES or operator(node) in SCATTERS):
            node = node.all_input_nodes[0] if operator(node) in MOVES else operand(node, SCATTERS[operator(node)])
        return node

    def _own(self, node: fx.Node) -> bool:
        return node.name not in self.context.base and node.op == "call_function"

    def _joined(self, after: fx.Node, below: str) -> tuple[Sign, Operand | None] | None:
        """Return how the result is combined with the former value, if it is, and the value that enters."""
        if not self._own(after):
            return None
        signs: dict[str, Sign] = {"add": "plus", "mul": "times", "cat": "concat"}
        sign = signs.get(operator(after))
        operands = after.all_input_nodes
        if sign is None or len(operands) != 2:
            return None
        for one, other in (operands, operands[::-1]):
            if self.ref(one) == OuterValue(below):
                return sign, self.ref(other)
        return None

    # values

    def ref(self, node: fx.Node) -> Operand | None:
        """Return a value as an operand of the drawing; None for sizes and constants."""
        if node.name not in self.known:
            self.known[node.name] = self._ref(node)
        return self.known[node.name]

    def _ref(self, node: fx.Node) -> Operand | None:
        context = self.context
        if node.op == "get_attr":
            full = str(node.target)
            shape = tuple(int(n) for n in node.meta["val"].shape)
            entry = context.program.table[full]
            constant = full in context.added and entry.tensor.is_floating_point() and not self.edit.quantised
            if entry.kind != "parameter" and not constant:
                return None  # a table of the model, places, or codes: what they say is told by the pass's spec
            base = None if full in context.added else context.called.get(full, full.rpartition(".")[2])
            return parameter(full, shape, base, full not in context.trainable)
        moved = {move.after for move in self.edit.moves}
        if node.name in context.base or (node.name in context.carriers and node.name not in moved):
            return OuterValue(node.name)
        if not getattr(node.meta["val"], "is_floating_point", lambda: True)():
            return None  # a mask or an index: what it says is told by the pass's spec
        return self._named(node, self._again(node) or self._call(node))

    @staticmethod
    def _named(node: fx.Node, ref: Operand | None) -> Operand | None:
        """Return a value that depends on parameters alone, under its pass's name for it, with its formula."""
        if isinstance(ref, ParameterFormula) and "derived" in node.meta:
            return replace(ref, text=node.meta["derived"].rpartition(".")[2], formula=ref.text, level=ATOM)
        if isinstance(ref, ParameterFormula) and "symbol" in node.meta:
            of = ", ".join(dict.fromkeys(short_name(name.rpartition(".")[2]) for name in ref.names))
            return replace(ref, text=node.meta["symbol"], formula=f"a function of {of}", level=ATOM)
        return ref

    def _again(self, node: fx.Node) -> Operand | None:
        """Return a norm of the base that is recomputed from another value."""
        for output, start in self.context.norms:
            bound: list[fx.Node] = []
            if output.target == node.target and alike(node, output, start, bound) and bound:
                inner = self.ref(bound[0])
                return (
                    None
                    if inner is None
                    else self._add(Operation("again", "norm", (inner,), tip="the base's own norm"))
                )
        return None

    def _call(self, node: fx.Node) -> Operand | None:
        op = operator(node)
        if op in FRESH:
            return None
        if op in MOVES:
            return self.ref(node.all_input_nodes[0])
        if op in SCATTERS:
            return self.ref(operand(node, SCATTERS[op]))
        refs = [ref for ref in map(self.ref, node.all_input_nodes) if ref is not None]
        made = [ref for ref in refs if isinstance(ref, ParameterFormula)]
        signals = [ref for ref in refs if not isinstance(ref, ParameterFormula)]
        numbers = [one for one in node.args if isinstance(one, int | float)] if op in SIGNS else []
        if not refs:
            return None
        if not signals and op in LOOKS_UP:
            return made[0]
        if not signals:
            sizes = getattr(node.meta["val"], "shape", ())
            return formula(op, made, numbers, [n for n in sizes if isinstance(n, int)])
        if op in SIGNS:
            return self._arithmetic(node, op, signals, made, numbers)
        if made and (op in PRODUCTS or op == "layer_norm"):
            return self._product(node, signals, made)
        return self._add(Operation("pill", WORDS.get(op, op), tuple(refs), tip=node.meta.get("label", "")))

    def _arithmetic(
        self,
        node: fx.Node,
        op: str,
        signals: Sequence[Operand],
        made: Sequence[ParameterFormula],
        numbers: Sequence[float],
    ) -> Operand:
        sign, look = SIGNS[op]
        main = signals[0]
        if len(signals) > 1:
            return self._add(Operation(look, sign, tuple(signals)))
        if (
            made
            and op == "add"
            and isinstance(main, int)
            and self.operations[main].look == "box"
            and len(made[0].shape) == 1
        ):
            self.operations[main] = replace(
                self.operations[main], tip=f"{self.operations[main].tip}, {made[0].names[0]}"
            )
            return main  # a bias
        if made:
            text = f"({made[0].text})" if made[0].level == 0 and op != "add" else made[0].text
            tip = ", ".join(made[0].names)
            step = Operation("pill", f"{sign} {text}", (main,), tip=tip, frozen=made[0].frozen)
            return self._add(replace(step, defines=(made[0].text, made[0].formula)))
        if not numbers:
            drawn = [one for one in node.all_input_nodes if self.ref(one) is None]
            words = f"{sign} {drawn[0].meta.get('label', '').rpartition('.')[2]}" if drawn else f"{sign} itself"
            words = f"{sign} 0 or 1, in training" if "evaluates_to_first_operand" in node.meta else words
            return self._add(Operation("pill", words, (main,)))
        return self._add(Operation("pill", f"{sign} {number(numbers[0])}", (main,)))

    def _product(self, node: fx.Node, signals: Sequence[Operand], made: Sequence[ParameterFormula]) -> Operand:
        """Return a product with weights; numbers of rows or of experts that it reads are not drawn beside a signal."""
        floats = [self.ref(one) for one in node.all_input_nodes if one.meta["val"].dtype.is_floating_point]
        signals = [one for one in signals if one in floats] or signals
        weights = [one for one in made if len(one.shape) > 1] or list(made)
        label = "norm" if operator(node) == "layer_norm" else ", ".join(one.text for one in weights)
        names = [name for one in made for name in one.names]
        look: Look = "box" if any(one.own for one in made) else "again"
        shape = weights[0].shape if len(weights) == 1 else ()
        frozen = all(one.frozen for one in made)
        return self._add(Operation(look, label, tuple(signals), shape, ", ".join(names), frozen))

    def _add(self, step: Operation) -> int:
        self.operations.append(step)
        return len(self.operations) - 1


def _needed(operations: Sequence[Operation], out: Operand) -> tuple[tuple[Operation, ...], Operand]:
    """Return the operations that a result is computed by, renumbered."""
    needed, todo = set[int](), [out]
    while todo:
        ref = todo.pop()
        if isinstance(ref, int) and ref not in needed:
            needed.add(ref)
            todo += operations[ref].inputs
    numbers = {old: new for new, old in enumerate(sorted(needed))}

    def renumbered(ref: Operand) -> Operand:
        return numbers[ref] if isinstance(ref, int) else ref

    kept = [replace(operations[old], inputs=tuple(map(renumbered, operations[old].inputs))) for old in numbers]
    return tuple(kept), renumbered(out)
