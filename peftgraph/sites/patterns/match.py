"""Matching: where in a graph the equations of a pattern hold, and how far they held where they do not.

From each node that the last equation's operator allows, terms are compared with values from the result backwards. An
alternative, the two orders of a commutative operator, an optional operator and `~` are choices; they are tried in
order and taken back when what follows fails, so the first match of a node is the same on every run.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Final, TypeAlias

from torch import fx

from peftgraph.sites.dataflow import ops
from peftgraph.sites.dataflow.flow import Flow
from peftgraph.sites.patterns.arguments import Arguments, excerpt, same_constant
from peftgraph.sites.patterns.outcome import Match, Miss
from peftgraph.sites.patterns.pattern import Pattern
from peftgraph.sites.patterns.terms import Call, Either, Literal, Term, Through, Var, Window, Word, inside, literal_text
from peftgraph.sites.patterns.vocabulary import COMMUTATIVE, WHOLES, operators

# What `~` sees through: operators that give their first operand's values again, and nobody else's.
SEEN_THROUGH: Final = (ops.LAYOUT | ops.CAST | ops.DROPOUT) - ops.words(
    "cat concat stack hstack vstack slice_scatter select_scatter"
)

# The recognised values of a graph by word: the node that holds one, and what it reads.
Wholes: TypeAlias = Mapping[str, Mapping[fx.Node, tuple[fx.Node, ...]]]


class Matcher:
    """One pattern on one graph. `widths`: how many columns the projections have, for windows."""

    def __init__(self, pattern: Pattern, flow: Flow, wholes: Wholes, widths: Mapping[fx.Node, int]) -> None:
        self.pattern = pattern
        self.flow = flow
        self.wholes = wholes
        self.widths = widths
        self.terms: dict[str, Term] = dict(pattern.equations)
        self.choices = dict(pattern.operators)
        self.total = sum(
            isinstance(one, Call) and not one.optional for _, term in pattern.equations for one in inside(term)
        )
        self._miss: Miss | None = None
        self._patient = False  # whether attempts that must fail are followed to where they fail

    def matches(self) -> list[Match]:
        """Return the first match at every node where there is one, in graph order."""
        found = (next(self._from(node), None) for node in self._roots())
        return [one for one in found if one is not None]

    def nearest(self) -> Miss:
        """Return the attempt that came furthest, of a pattern without a match."""
        self._patient, self._miss = True, None
        for node in self._roots():
            next(self._from(node), None)
        self._patient = False
        root = self.pattern.root
        nothing = f"none in {len(self.flow.nodes)} nodes"
        return self._miss or Miss(0, self.total, root, self._expected(self.terms[root]), nothing, None)

    def _from(self, node: fx.Node) -> Iterator[Match]:
        return self._variable(Var(self.pattern.root), node, node, Match())

    def _roots(self) -> Iterator[fx.Node]:
        root = self.terms[self.pattern.root]
        heads = self._heads(root)
        if heads is None:
            return (node for node in self.flow.nodes if self._may_stand(root, node))
        return (node for node in self.flow.nodes if ops.name(node) in heads)

    def _heads(self, term: Term) -> frozenset[str] | None:
        """Return the operators that a term can start with; None where the operator alone does not tell."""
        if isinstance(term, Call) and not term.optional:
            each = [operators(word) for word, _ in self._words(term)]
        elif isinstance(term, Either | Window):
            each = [self._heads(one) for one in term.parts()]
        else:
            return None
        known = [one for one in each if one is not None]
        return frozenset().union(*known) if len(known) == len(each) else None

    def _may_stand(self, term: Term, value: object) -> bool:
        """Tell whether the term may start with the operator at `value`; nothing else is checked."""
        if not isinstance(value, fx.Node):
            return True
        if isinstance(term, Call):
            return term.optional or any(self._is(word, value) for word, _ in self._words(term))
        if isinstance(term, Var):
            return term.name not in self.terms or self._may_stand(self.terms[term.name], value)
        if isinstance(term, Either):
            return any(self._may_stand(one, value) for one, _ in term.alternatives)
        if isinstance(term, Window):
            return self._may_stand(term.inner, value)
        if isinstance(term, Through):
            here: fx.Node | None = value
            while here is not None and not self._may_stand(term.inner, here):
                here = self._behind(here)
            return here is not None
        return True

    def _is(self, word: str, node: fx.Node) -> bool:
        known = operators(word)
        return node in self.wholes.get(word, {}) if known is None else ops.name(node) in known

    def _words(self, call: Call) -> Sequence[tuple[str, str]]:
        return self.choices.get(call.head, ((call.head, ""),))

    # terms against values; `place` is where the value was read, before anything it was seen through

    def _term(self, term: Term, value: object, place: fx.Node | None, so_far: Match) -> Iterator[Match]:
        if isinstance(term, Var):
            yield from self._variable(term, value, place, so_far)
        elif isinstance(term, Call):
            yield from self._call(term, value, place, so_far)
        elif isinstance(term, Either):
            for one, tag in term.alternatives:
                tagged = replace(so_far, tags=(*so_far.tags, tag)) if tag else so_far
                yield from self._term(one, value, place, tagged)
        elif isinstance(term, Through):
            yield from self._through(term, value, so_far)
        elif isinstance(term, Window):
            yield from self._window(term, value, place, so_far)
        elif self._plain(term, value):
            yield so_far
        else:
            self._note(so_far, term, value)

    def _plain(self, term: Term, value: object) -> bool:
        if isinstance(term, Literal):
            return same_constant(value, term.value)
        assert isinstance(term, Word)
        if term.word == "number":
            return isinstance(value, int | float) and not isinstance(value, bool)
        return term.word == "_" or (isinstance(value, fx.Node) and self.flow.raw(value))

    def _variable(self, term: Var, value: object, place: fx.Node | None, so_far: Match) -> Iterator[Match]:
        name = term.name
        if not isinstance(value, fx.Node) or not self.flow.carries_tensor(value):
            equation = self.terms.get(name)
            self._note(so_far, equation or f"a value, {name}", value)
            return
        if place is not None:
            so_far = so_far.read(name, place)
        if name in so_far.nodes:
            if so_far.nodes[name] is value:
                yield so_far
            else:
                self._note(so_far, f"{name}, which is {excerpt(so_far.nodes[name])}" if self._patient else "", value)
        elif name not in self.terms:
            yield so_far.bound(name, value)
        else:
            for one in self._term(self.terms[name], value, place, replace(so_far, inside=name)):
                if self._fits(bound := one.bound(name, value)):
                    yield replace(bound, inside=so_far.inside)

    def _fits(self, so_far: Match) -> bool:
        """Tell whether the conditions hold, as far as they can be evaluated yet."""
        shapes = {name: self.flow.shape(node) for name, node in so_far.nodes.items()}
        for condition in self.pattern.conditions:
            if all(variable in shapes for variable in condition.variables):
                failure = condition.failure(shapes)
                if failure is not None:
                    self._note(so_far, str(condition), so_far.nodes[condition.variables[0]], failure)
                    return False
        return True

    def _through(self, term: Through, value: object, so_far: Match) -> Iterator[Match]:
        place = value if isinstance(value, fx.Node) else None
        here, before = value, self._miss
        while True:
            yield from self._term(term.inner, here, place, so_far)
            behind = self._behind(here) if isinstance(here, fx.Node) else None
            if behind is None:
                return
            if self._miss is not before and self._miss is not None and self._miss.matched == so_far.count:
                self._miss = before  # what was only seen through says less than what stands behind it
            here = behind

    def _behind(self, node: fx.Node) -> fx.Node | None:
        """Return what a value is a moved, cast or dropped out form of."""
        if ops.name(node) not in SEEN_THROUGH:
            return None
        return next((one for one in self.flow.operands(node) if self.flow.floating(one)), None)

    def _window(self, term: Window, value: object, place: fx.Node | None, so_far: Match) -> Iterator[Match]:
        width = self.widths.get(value) if isinstance(value, fx.Node) else None
        if width is None or max(term.start + 1, term.stop or 0) > width:
            found = self._shown(value) if width is None else f"{width} columns"
            self._note(so_far, f"a projection with the columns of {term}", value, found)
            return
        yield from self._term(term.inner, value, place, so_far)

    # calls

    def _call(self, term: Call, value: object, place: fx.Node | None, so_far: Match) -> Iterator[Match]:
        met = False
        for word, tag in self._words(term):
            if so_far.operators.get(term.head, word) == word and isinstance(value, fx.Node):
                arguments = self._arguments(word, value)
                if arguments is not None:
                    met = True
                    yield from self._met(term, word, tag, arguments, value, so_far)
        if term.optional:
            yield from self._term(term.args[0], value, place, so_far)
        elif not met:
            self._note(so_far, term, value)

    def _arguments(self, word: str, node: fx.Node) -> Arguments | None:
        """Return what `node` was called with, if it is what the word stands for."""
        if word in WHOLES:
            reads = self.wholes.get(word, {}).get(node)
            return None if reads is None else Arguments(reads, ())
        known = operators(word)
        assert known is not None
        return Arguments.of(node) if ops.name(node) in known and node.op == "call_function" else None

    def _met(
        self, term: Call, word: str, tag: str, arguments: Arguments, node: fx.Node, so_far: Match
    ) -> Iterator[Match]:
        """Yield the operator is the right one; now its arguments."""
        so_far = replace(so_far, count=so_far.count + (not term.optional))
        if term.head in self.choices:
            so_far = replace(so_far, operators={**so_far.operators, term.head: word})
        if tag and tag not in so_far.tags:
            so_far = replace(so_far, tags=(*so_far.tags, tag))
        if len(term.args) > len(arguments.values):
            self._note(so_far, f"{len(term.args)} arguments", node, str(len(arguments.values)))
            return
        for key, wanted in term.options:
            if not arguments.has(key, wanted):
                self._note(so_far, f"{key}={literal_text(wanted)}", node, f"{key}={arguments.shown(key)}")
                return
        values = arguments.values
        orders = [values]
        if ops.name(node) in COMMUTATIVE and len(values) > 1:
            orders.append((values[1], values[0], *values[2:]))
        for order in orders:
            yield from self._each(term.args, order, so_far)

    def _each(self, terms: Sequence[Term], values: Sequence[object], so_far: Match) -> Iterator[Match]:
        if not self._patient and not all(map(self._may_stand, terms, values)):
            return
        if not terms:
            yield so_far
            return
        value = values[0]
        place = value if isinstance(value, fx.Node) else None
        for one in self._term(terms[0], value, place, so_far):
            yield from self._each(terms[1:], values[1:], one)

    # near-misses

    def _note(self, so_far: Match, expected: Term | str, value: object, found: str = "") -> None:
        if self._patient and (self._miss is None or so_far.count > self._miss.matched):
            node = value if isinstance(value, fx.Node) else None
            wanted = expected if isinstance(expected, str) else self._expected(expected)
            self._miss = Miss(so_far.count, self.total, so_far.inside, wanted, found or self._shown(value), node)

    def _expected(self, term: Term) -> str:
        if isinstance(term, Call):
            return " or ".join(word for word, _ in self._words(term))
        if isinstance(term, Either):
            return " or ".join(self._expected(one) for one, _ in term.alternatives)
        return self._expected(term.inner) if isinstance(term, Window) else str(term)

    def _shown(self, value: object) -> str:
        if not isinstance(value, fx.Node):
            return repr(value)
        return {"placeholder": "an input", "get_attr": "a stored tensor"}.get(value.op, ops.name(value))
