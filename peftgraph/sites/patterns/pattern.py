"""Pattern: equations that hold together, with a name; and the selector of one of its values."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from peftgraph.errors import PeftGraphError, pointed
from peftgraph.sites.patterns.conditions import Condition
from peftgraph.sites.patterns.parse import Statement, parse_statements
from peftgraph.sites.patterns.terms import Call, Either, Named, Term, Through, Var, Window, Word, inside, rebuilt
from peftgraph.sites.patterns.vocabulary import IDENTIFIER, WHOLES, check_operator
from peftgraph.sites.roles import WORDS
from peftgraph.sites.selectors.selector import FILTERS, Selector, quoted
from peftgraph.sites.site import Site


@dataclass(frozen=True, init=False)
class Pattern:
    """A pattern of operators: named values of a graph and the equations between them.

    `Pattern("swiglu", "down = linear(mul(silu(gate), up)); gate = linear(x); up = linear(x)")`: the first equation
    defines the value that no other reads; the order of the others is free. Each equation defines sites of a role, such
    as `swiglu.gate`, selected by `swiglu["gate"]`. Equal patterns are equal values; `Pattern.parse(str(p)) == p`.

    Attributes:
        name: dotted identifiers; no role or filter of the selectors may be its first one.
        equations: (name, term) of each value, the last one of the graph first.
        operators: (name, ((operator, tag), ...)) of each name for a choice of operators.
        conditions: relations between sizes.
    """

    name: str
    equations: tuple[tuple[str, Term], ...]
    operators: tuple[tuple[str, tuple[tuple[str, str], ...]], ...]
    conditions: tuple[Condition, ...]

    def __init__(self, name: str, *parts: Term | str) -> None:
        """Make a pattern of its statements.

        Args:
            name: what its roles begin with.
            parts: text with equations and conditions, or named terms.

        Raises:
            PeftGraphError: the equations cannot be read or make no pattern; the message says which.
        """
        _check_name(name)
        statements = [one for part in parts for one in _statements(part)]
        draft = _Draft(name, statements)
        object.__setattr__(self, "name", name)
        object.__setattr__(self, "equations", draft.ordered())
        object.__setattr__(self, "operators", draft.ordered_operators())
        object.__setattr__(self, "conditions", draft.conditions)

    @classmethod
    def parse(cls, text: str) -> Pattern:
        """Return the inverse of `str(pattern)`: `name: equations`."""
        if not isinstance(text, str):
            raise PeftGraphError(f"a pattern is text, not {type(text).__name__}")
        name, colon, statements = text.partition(":")
        if not colon:
            raise PeftGraphError(f"cannot read the pattern: expected name: equations, got\n{pointed(text, 0)}")
        return cls(name.strip(), statements)

    @property
    def parts(self) -> tuple[str, ...]:
        """The names of its values that can be sites."""
        return tuple(name for name, term in self.equations if not isinstance(term, Word))

    @property
    def root(self) -> str:
        """The name of the last value."""
        return self.equations[0][0]

    @property
    def reference(self) -> str:
        """The whole pattern, as written in the text of a selector."""
        return f"pattern({quoted(str(self))})"

    @property
    def selector(self) -> Selector:
        """The selector of its only value.

        Raises:
            PeftGraphError: it has several.
        """
        return self[self.parts[0] if len(self.parts) == 1 else ""]

    def __getitem__(self, part: str) -> Selector:
        """Return the sites of one value, or of all, by "*"."""
        return PatternRole(self, part)

    def __iter__(self) -> Iterator[str]:
        return iter(self.parts)

    def __repr__(self) -> str:
        return f"Pattern.parse({str(self)!r})"

    def __str__(self) -> str:
        lines = [f"{name} = {term}" for name, term in self.equations]
        for name, choices in self.operators:
            lines.append(f"{name} = {'|'.join(f'{word}:{tag}' if tag else word for word, tag in choices)}")
        return f"{self.name}: {'; '.join([*lines, *map(str, self.conditions)])}"


@dataclass(frozen=True)
class PatternRole(Selector):
    """The sites of one value of a pattern, "*" for all of them."""

    pattern: Pattern
    part: str

    def __post_init__(self) -> None:
        if self.part != "*" and self.part not in self.pattern.parts:
            known = ", ".join(f"{self.pattern.name}.{part}" for part in (*self.pattern.parts, "*"))
            wrong = f"{self.pattern.name}.{self.part}" if self.part else self.pattern.name
            raise PeftGraphError(f"{wrong} is no value of the pattern; there are {known}")

    @property
    def roles(self) -> tuple[str, ...]:
        """The roles of the sites it selects."""
        chosen = self.pattern.parts if self.part == "*" else (self.part,)
        return tuple(f"{self.pattern.name}.{part}" for part in chosen)

    @property
    def short(self) -> str:
        """Its text where the pattern is known by name."""
        return f"{self.pattern.name}.{self.part}"

    def matches(self, site: Site) -> bool:
        return site.role in self.roles

    def __str__(self) -> str:
        return f"{self.pattern.reference}.{self.part}"


def patterns_of(selector: Selector) -> tuple[Pattern, ...]:
    """Return the patterns whose sites a selector speaks of, each once."""
    own = (selector.pattern,) if isinstance(selector, PatternRole) else ()
    return tuple(dict.fromkeys([*own, *(one for part in selector.parts() for one in patterns_of(part))]))


def _statements(part: Term | str) -> list[Statement]:
    if isinstance(part, str):
        return parse_statements(part)
    if not isinstance(part, Named):
        raise PeftGraphError(f"{part} has no name; give the pattern term.named(...) or the text name = term")
    return [(part.name, part.inner)]


def _check_name(name: str) -> None:
    first = name.partition(".")[0]
    if not all(IDENTIFIER.fullmatch(word) for word in name.split(".")):
        raise PeftGraphError(f"a pattern's name is made of identifiers and dots, got {name!r}")
    if first in {*(word.partition(".")[0] for word in WORDS), *FILTERS, "where", "pattern"}:
        raise PeftGraphError(f"a pattern cannot be called {name!r}: {first} has a meaning in selectors already")


class _Draft:
    """The statements of a pattern while they are sorted out."""

    def __init__(self, name: str, statements: list[Statement]) -> None:
        self.name = name
        self.terms: dict[str, Term] = {}
        for one in statements:
            if not isinstance(one, Condition):
                self._define(one[0], self._flat(one[1]))
        self.conditions = tuple(one for one in statements if isinstance(one, Condition))
        heads = {one.head for term in self.terms.values() for one in inside(term) if isinstance(one, Call)}
        self.operators = {word: self._choices(word, self.terms.pop(word)) for word in heads & self.terms.keys()}
        self.order = self._order()
        self._check()

    def _fail(self, problem: str) -> PeftGraphError:
        return PeftGraphError(f"pattern {self.name}: {problem}")

    def _define(self, name: str, term: Term) -> None:
        Var(name)
        if self.terms.get(name, term) != term:
            raise self._fail(f"{name} is defined twice, as {self.terms[name]} and as {term}")
        self.terms[name] = term

    def _flat(self, term: Term) -> Term:
        """Return the term with every named one inside taken out, as an equation of its own."""
        if isinstance(term, Named):
            self._define(term.name, self._flat(term.inner))
            return Var(term.name)
        return rebuilt(term, self._flat)

    def _choices(self, name: str, term: Term) -> tuple[tuple[str, str], ...]:
        choices = term.alternatives if isinstance(term, Either) else ((term, ""),)
        words: list[tuple[str, str]] = []
        for choice, tag in choices:
            if not isinstance(choice, Var) or choice.name in WHOLES:
                raise self._fail(f"{name} is used as an operator, so {name} = ... lists operators, not {choice}")
            check_operator(choice.name)
            words.append((choice.name, tag))
        return tuple(words)

    def _order(self) -> tuple[str, ...]:
        """Return the equations, from the one that no other reads, in the order in which they are read."""
        read = {one.name for term in self.terms.values() for one in inside(term) if isinstance(one, Var)}
        roots = [name for name in self.terms if name not in read]
        if len(roots) != 1:
            found = ", ".join(roots) if roots else "none, the equations run in a circle"
            raise self._fail(f"exactly one value is read by no other equation; here: {found}")
        order: list[str] = []
        self._visit(roots[0], order, ())
        left = self.terms.keys() - order
        if left:
            raise self._fail(f"the equations of {', '.join(sorted(left))} run in a circle")
        return tuple(order)

    def _visit(self, name: str, order: list[str], path: tuple[str, ...]) -> None:
        if name in path:
            raise self._fail(f"the equations of {', '.join(path[path.index(name) :])} run in a circle")
        if name in order or name not in self.terms:
            return
        order.append(name)
        for one in inside(self.terms[name]):
            if isinstance(one, Var):
                self._visit(one.name, order, (*path, name))

    def _check(self) -> None:
        known = {one.name for term in self.terms.values() for one in inside(term) if isinstance(one, Var)}
        known |= self.terms.keys()
        for name, term in self.terms.items():
            if isinstance(term, Through):
                raise self._fail(f"{name} = ~... names no one value; write ~{name} where it is read")
            body = term.inner if isinstance(term, Window) else term
            for one in inside(body):
                if isinstance(one, Window):
                    raise self._fail(f"{one}: a window belongs to a whole equation, name = linear(x)[0:16]")
                if isinstance(one, Call):
                    self._check_call(one)
        if not any(isinstance(one, Call) for term in self.terms.values() for one in inside(term)):
            raise self._fail("it names no operator, so it would match anything")
        for condition in self.conditions:
            if not condition.variables:
                raise self._fail(f"{condition}: it speaks of no value")
            for variable in condition.variables:
                if variable not in known:
                    raise self._fail(f"{condition}: there is no value {variable}")

    def _check_call(self, call: Call) -> None:
        if call.head not in self.operators:
            check_operator(call.head)
        reads = WHOLES.get(call.head)
        if reads is not None and (len(call.args) > len(reads) or call.options):
            raise self._fail(f"{call}: {call.head} is written {call.head}({', '.join(reads)})")

    def ordered(self) -> tuple[tuple[str, Term], ...]:
        return tuple((name, self.terms[name]) for name in self.order)

    def ordered_operators(self) -> tuple[tuple[str, tuple[tuple[str, str], ...]], ...]:
        heads = [one.head for name in self.order for one in inside(self.terms[name]) if isinstance(one, Call)]
        return tuple((word, self.operators[word]) for word in dict.fromkeys(heads) if word in self.operators)
