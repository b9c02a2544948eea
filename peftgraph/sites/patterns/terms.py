"""What a pattern is made of: terms, each describing one value of a graph.

Terms are values. They combine by Python's operators (`a * b`, `a + b`, `a @ b`, `a | b` for alternatives, `~a` for "a,
possibly moved, cast or dropped out", `a[0:16]` for a window of columns), print as text, and parse back.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from numbers import Integral, Real
from typing import Final, TypeAlias

from peftgraph.errors import PeftGraphError
from peftgraph.sites.patterns.vocabulary import IDENTIFIER, RESERVED

LARGEST: Final = 10**17  # of a whole number
Scalar: TypeAlias = "int | float | str | bool | None"
Constant: TypeAlias = "Scalar | tuple[Scalar, ...]"
TermLike: TypeAlias = "Term | Scalar"


@dataclass(frozen=True)
class Term:
    """A description of one value. Subclasses are final."""

    def parts(self) -> tuple[Term, ...]:
        """Return the terms directly inside."""
        return ()

    def __mul__(self, other: TermLike) -> Term:
        return Call("mul", (self, as_term(other)))

    def __rmul__(self, other: TermLike) -> Term:
        return Call("mul", (as_term(other), self))

    def __add__(self, other: TermLike) -> Term:
        return Call("add", (self, as_term(other)))

    def __radd__(self, other: TermLike) -> Term:
        return Call("add", (as_term(other), self))

    def __sub__(self, other: TermLike) -> Term:
        return Call("sub", (self, as_term(other)))

    def __truediv__(self, other: TermLike) -> Term:
        return Call("div", (self, as_term(other)))

    def __matmul__(self, other: TermLike) -> Term:
        return Call("matmul", (self, as_term(other)))

    def __or__(self, other: TermLike) -> Term:
        return Either(((self, ""), (as_term(other), "")))

    def __invert__(self) -> Term:
        return Through(self)

    def __getitem__(self, columns: slice) -> Term:
        if not isinstance(columns, slice) or columns.step is not None:
            raise PeftGraphError("a window of columns is a slice: gate[0:16]")
        return Window(self, columns.start or 0, columns.stop)

    def __iter__(self) -> Iterator[Term]:
        raise TypeError("a term is no sequence")  # or Python would iterate by __getitem__

    def named(self, name: str) -> Term:
        """Return the same term as an equation of its pattern: `name` can be a site and can be referred to."""
        return Named(name, self)

    def tag(self, tag: str) -> Term:
        """Return the same term; a match that takes it carries the tag."""
        return Either(((self, tag),))


@dataclass(frozen=True)
class Var(Term):
    """A value by name: the same node wherever the name stands, of an equation or free."""

    name: str

    def __post_init__(self) -> None:
        if not IDENTIFIER.fullmatch(self.name) or self.name in RESERVED:
            raise PeftGraphError(f"{self.name!r} cannot name a value: a name is an identifier, and no reserved word")

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True)
class Word(Term):
    """`_` anything, `weight` a parameter (moved, cut or cast at most), `number` any literal number."""

    word: str

    def __str__(self) -> str:
        return self.word


@dataclass(frozen=True)
class Literal(Term):
    """A literal argument of a call, such as 2.0 or 'tanh'."""

    value: Constant

    def __post_init__(self) -> None:
        object.__setattr__(self, "value", plain(self.value))

    def __str__(self) -> str:
        return literal_text(self.value)


@dataclass(frozen=True)
class Call(Term):
    """An operator at work. `optional`: where the operator is missing, its first operand may stand instead.

    Arguments that are left out may be anything. Of a commutative operator the first two may stand in either order.
    """

    head: str
    args: tuple[Term, ...]
    options: tuple[tuple[str, Constant], ...] = ()
    optional: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "options", tuple((key, plain(value)) for key, value in self.options))

    def parts(self) -> tuple[Term, ...]:
        return self.args

    def __str__(self) -> str:
        inside = [*map(str, self.args), *(f"{key}={literal_text(value)}" for key, value in self.options)]
        return f"{self.head}{'?' if self.optional else ''}({', '.join(inside)})"


@dataclass(frozen=True)
class Through(Term):
    """The term, seen through operators that only move, cast or drop out one value."""

    inner: Term

    def parts(self) -> tuple[Term, ...]:
        return (self.inner,)

    def __str__(self) -> str:
        return f"~{_wrapped(self.inner)}"


@dataclass(frozen=True)
class Window(Term):
    """The term, of which the site owns only the columns from start up to but not including stop."""

    inner: Term
    start: int
    stop: int | None

    def __post_init__(self) -> None:
        ends = [end for end in (self.start, self.stop) if end is not None]
        if not all(isinstance(end, Integral) for end in ends):
            raise PeftGraphError(f"a window of columns is of whole numbers, got {self.start!r} and {self.stop!r}")
        if self.start < 0 or (self.stop is not None and self.stop <= self.start):
            raise PeftGraphError(f"a window of columns counts from 0 and is not empty, got [{self.start}:{self.stop}]")

    def parts(self) -> tuple[Term, ...]:
        return (self.inner,)

    def __str__(self) -> str:
        return f"{_wrapped(self.inner)}[{self.start}:{'' if self.stop is None else self.stop}]"


@dataclass(frozen=True)
class Either(Term):
    """Alternatives, tried in order, each with a tag (or none, "") that tells which one was met."""

    alternatives: tuple[tuple[Term, str], ...]

    def __post_init__(self) -> None:
        flat: list[tuple[Term, str]] = []
        for term, tag in self.alternatives:
            flat += term.alternatives if isinstance(term, Either) and not tag else [(term, tag)]
        object.__setattr__(self, "alternatives", tuple(flat))

    def parts(self) -> tuple[Term, ...]:
        return tuple(term for term, _ in self.alternatives)

    def __str__(self) -> str:
        return "|".join(f"{_wrapped(term)}:{tag}" if tag else str(term) for term, tag in self.alternatives)


@dataclass(frozen=True)
class Named(Term):
    """A term with the name of its equation; a pattern takes it apart."""

    name: str
    inner: Term

    def parts(self) -> tuple[Term, ...]:
        return (self.inner,)

    def __str__(self) -> str:
        return self.name


def rebuilt(term: Term, change: Callable[[Term], Term]) -> Term:
    """Return the same term with `change` applied to the terms directly inside."""
    if isinstance(term, Call):
        return replace(term, args=tuple(map(change, term.args)))
    if isinstance(term, Through | Window | Named):
        return replace(term, inner=change(term.inner))
    if isinstance(term, Either):
        return Either(tuple((change(inner), tag) for inner, tag in term.alternatives))
    return term


def inside(term: Term) -> Iterator[Term]:
    """Yield the term and everything in it, outermost first."""
    yield term
    for part in term.parts():
        yield from inside(part)


def _wrapped(term: Term) -> str:
    return f"({term})" if isinstance(term, Either | Through | Window) else str(term)


def plain(value: object) -> Constant:
    """Return a literal as a plain value that its text says.

    Raises:
        PeftGraphError: no text says it.
    """
    if isinstance(value, tuple | list):
        return tuple(_plain_scalar(one) for one in value)
    return _plain_scalar(value)


def _plain_scalar(value: object) -> Scalar:
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        if {"'", '"', "\\", "\n"} & set(value):
            raise PeftGraphError(f"the text {value!r} has a quote, a backslash or a line's end in it")
        return str(value)
    if isinstance(value, Integral) and abs(int(value)) < LARGEST:
        return int(value)
    if isinstance(value, Real) and not isinstance(value, Integral) and math.isfinite(value):
        return float(value)
    raise PeftGraphError(
        f"{value!r} is no literal: those are finite numbers, texts, true, false, none and lists of them"
    )


def literal_text(value: Constant) -> str:
    """Return a literal as patterns spell it."""
    if isinstance(value, tuple):
        return f"[{', '.join(map(literal_text, value))}]"
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "none"}[value]
    return f"'{value}'" if isinstance(value, str) else repr(value)


_reader: list[Callable[[str], Term]] = []  # the parser of terms' text, which stands above this module


def read_texts_with(reader: Callable[[str], Term]) -> None:
    """Say who parses the text that stands in the place of a term."""
    _reader[:] = [reader]


def as_term(value: TermLike) -> Term:
    """Return a term; text is read as one, a number stands for itself."""
    if isinstance(value, Term):
        return value
    if isinstance(value, str):
        return _reader[0](value)
    if isinstance(value, Real) or value is None:
        return Literal(plain(value))
    raise PeftGraphError(f"a term is an object like op.linear(x), its text, or a number, not {type(value).__name__}")


def var(name: str) -> Var:
    """Return a value by name: the same node wherever it stands."""
    return Var(name)


class Operators:
    """Calls of operators, as terms: `op.linear(x)`, `op.softmax(x, dim=-1)`. Text arguments are read as terms."""

    def __getattr__(self, word: str) -> Callable[..., Call]:
        if word.startswith("__"):
            raise AttributeError(word)

        def call(*args: TermLike, **options: Constant) -> Call:
            frozen = tuple((key, tuple(v) if isinstance(v, list) else v) for key, v in options.items())
            return Call(word, tuple(map(as_term, args)), frozen)

        return call


op: Final = Operators()
