"""What the laws speak of: a program, passes on it, and where on it a law is broken."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import InitVar, dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils._pytree import tree_leaves

from peftgraph.ir.edits import EditLog
from peftgraph.ir.interpreter import run_in_mode
from peftgraph.program import Program
from peftgraph.rewrite.method import Pass, Pipeline

Reference = Callable[[Mapping[str, Tensor]], list[Tensor]]


class LawError(AssertionError):
    """A pass breaks a law.

    Attributes:
        law: one of `LAWS`.
        model: on which it was checked.
        site: where, if that is known.
        expected, found: what the law asks for, and what is the case.
    """

    def __init__(self, law: str, subject: Subject, problem: str, site: str = "", expected: str = "", found: str = ""):
        self.law, self.model, self.site, self.expected, self.found = law, subject.base.name, site, expected, found
        where = f" at {site}" if site else ""
        compared = f" Expected {expected}, found {found}." if expected else ""
        super().__init__(f"{subject.text} breaks the law {law!r} on {self.model}{where}: {problem}.{compared}")


@dataclass(frozen=True, repr=False)  # a program's text is long
class Base:
    """A program before any pass, and what must never change about it."""

    name: str
    program: Program
    inputs: Mapping[str, Any]
    text: str
    hashes: Mapping[str, str]
    outputs: list[Tensor]

    @classmethod
    def of(cls, name: str, program: Program, inputs: Mapping[str, Any]) -> Base:
        """Return the base of a program without passes, and inputs for it."""
        return cls(name, program, inputs, program.text(), program.table.hashes(), outputs(program, inputs))

    def __repr__(self) -> str:
        return f"Base({self.name!r})"


@dataclass
class Subject:
    """Passes on a base, which the laws are checked for.

    Attributes:
        base: what they are applied to.
        methods: the passes, applied one after the other.
        near: the ends of the names of the parameters that keep a fresh pass from being the identity; zeroed, it is.
        away: whether a fresh pass is not the identity.
        reference: the outputs of another implementation for the given parameters, if there is one.
        tolerance: the largest relative difference of outputs that rounding explains, in float64.
        given: the base with the passes, where it is at hand.
        program: the base with the passes.
        folded: that one folded as a whole, once the law of folding has been checked; None where it cannot be.
    """

    base: Base
    methods: tuple[Pass, ...]
    near: tuple[str, ...] = ()
    away: bool = False
    reference: Reference | None = None
    tolerance: float = 1e-10
    given: InitVar[Program | None] = None
    program: Program = field(init=False)
    folded: Program | None = field(default=None, init=False)

    def __post_init__(self, given: Program | None) -> None:
        self.program = self.applied(self.methods) if given is None else given
        self.start = {name: value.detach().clone() for name, value in self.program.table.trainable.items()}

    @property
    def text(self) -> str:
        """How the passes print."""
        return str(self.methods[0]) if len(self.methods) == 1 else str(Pipeline(self.methods))

    def applied(self, methods: Iterable[Pass]) -> Program:
        """Apply passes to the base under a fixed seed."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            return self.base.program.apply(*methods)

    @cached_property
    def far(self) -> float:
        """How far a fresh pass is from the identity."""
        return distance(self.base.outputs, outputs(self.program, self.base.inputs))

    @cached_property
    def tuned(self) -> Program:
        """The program with random parameters; from now on, for they are the program's own."""
        generator = torch.Generator().manual_seed(2)
        for value in self.program.table.trainable.values():
            noise = torch.randn(value.shape, generator=generator, dtype=value.dtype)
            value.data.add_(0.1 * noise.to(value.device))
        return self.program

    @cached_property
    def outputs(self) -> list[Tensor]:
        """What the program with random parameters gives."""
        return outputs(self.tuned, self.base.inputs)

    def require(self, law: str, holds: bool, problem: str, *more: str) -> None:
        """Raise `LawError` unless `holds`."""
        if not holds:
            raise LawError(law, self, problem, *more)

    # where a law is broken

    def site_of(self, parameter: str) -> str:
        """Return the site of the edit that made a parameter."""
        return next((edit.site for edit in self.program.edits if parameter in edit.parameters), "")

    def site_where(self, wrong: Callable[[], bool]) -> str:
        """Return the first site where something is wrong if its parameters alone are not those of a fresh pass."""
        trained = self.tuned.table.trainable
        now = {name: value.detach().clone() for name, value in trained.items()}
        try:
            for edit in self.tuned.edits:
                for name, value in trained.items():
                    value.data.copy_(now[name] if name in edit.parameters else self.start[name])
                if wrong():
                    return edit.site
        finally:
            for name, value in trained.items():
                value.data.copy_(now[name])
        return ""

    def first_changed_site(self) -> str:
        """Return the first site where the program's value is not the one that the edit replaced."""
        given = self.program.signature.bind((), dict(self.base.inputs))
        log, moves = EditLog(self.program.edits), [(e, move) for e in self.program.edits for move in e.moves]
        pairs = {move.after: (edit.site, log.predecessor(move)) for edit, move in moves}
        wanted, known = {*pairs, *(before for _, before in pairs.values())}, dict[str, Tensor]()

        def watch(node: fx.Node, value: Any) -> None:
            if node.name in wanted and isinstance(value, Tensor):
                known[node.name] = value.clone()

        if any(value is None for value in given):
            return ""
        run_in_mode(self.program, [value for value in given if value is not None], training=False, watcher=watch)
        order = [node.name for node in self.program.graph.nodes if node.name in pairs and node.name in known]
        changed = (pairs[name][0] for name in order if not _equal(known.get(pairs[name][1]), known[name]))
        return next(changed, "")


def _equal(a: Tensor | None, b: Tensor) -> bool:
    return a is None or (a.shape == b.shape and torch.equal(a, b))


def outputs(program: Program, inputs: Mapping[str, Any]) -> list[Tensor]:
    """Return the tensors that a program gives in evaluation."""
    with torch.no_grad():
        return tensors(program.module().eval()(**inputs))


def tensors(output: object) -> list[Tensor]:
    """Return the floating tensors of a module's output."""
    return [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor) and leaf.is_floating_point()]


def distance(a: list[Tensor], b: list[Tensor]) -> float:
    """Return the largest difference, relative to the largest magnitude of each tensor of `a`; infinite where shapes
    differ."""
    if [one.shape for one in a] != [one.shape for one in b]:
        return float("inf")
    pairs = ((x.detach(), y.detach()) for x, y in zip(a, b, strict=True))
    return max(float((x - y).abs().max() / x.abs().max().clamp(min=1e-30)) for x, y in pairs)


def loss_of(values: list[Tensor]) -> Tensor:
    """Return the sum of the squares of outputs."""
    return torch.stack([out.square().sum() for out in values]).sum()
