"""Selectors choose the sites of a pass: objects that combine with |, & and ~, or equivalent text.

    attention.q|attention.v        (attention.q|attention.v)&layers(2,6)        ffn.up.where(path="decoder.*")
    linear.where(shape=(144,48))   weight.where(out_features=">=1024",in_features=48)

Words are those of the registry of roles. Filters by layer, stack, kind and expert are in filters.py.
"""

from __future__ import annotations

import difflib
import operator
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import reduce
from numbers import Integral
from types import MappingProxyType
from typing import Any, Final, Protocol, runtime_checkable

from peftgraph.errors import PeftGraphError
from peftgraph.sites.roles import WORDS, parts_of, role_of, selected_by
from peftgraph.sites.site import Site
from peftgraph.utils.bounded_regex import compile_bounded

FILTERS: Final = ("layers", "layer", "stack", "kind", "expert")


@runtime_checkable
class Selectable(Protocol):
    """A value that can be used as a selector, such as a pattern of one value."""

    @property
    def selector(self) -> Selector:
        """The selector that it stands for."""
        ...


OPERATORS: Final[dict[str, Callable[[int, int], bool]]] = {
    "<=": operator.le,
    ">=": operator.ge,
    "==": operator.eq,
    "!=": operator.ne,
    "<": operator.lt,
    ">": operator.gt,
}


@dataclass(frozen=True)
class Selector:
    """A set of sites. Subclasses are final; combine them with |, & and ~."""

    def matches(self, site: Site) -> bool:
        raise NotImplementedError

    def __or__(self, other: Selector | str) -> Selector:
        return Either(self, as_selector(other))

    def __ror__(self, other: str) -> Selector:
        return Either(as_selector(other), self)

    def __and__(self, other: Selector | str) -> Selector:
        return Both(self, as_selector(other))

    def __rand__(self, other: str) -> Selector:
        return Both(as_selector(other), self)

    def __invert__(self) -> Selector:
        return Not(self)

    def where(
        self,
        *,
        path: str | None = None,
        shape: tuple[int, ...] | None = None,
        out_features: int | str | None = None,
        in_features: int | str | None = None,
    ) -> Selector:
        """Keep the sites for which all of this holds.

        Args:
            path: a regular expression that matches the whole module path.
            shape: the weight's (out, in), as the table of sites shows it; (n,) for a bias.
            out_features: a number of output features, or a comparison such as ">=1024".
            in_features: likewise for the input features.
        """
        return Where(self, path, shape, comparison(out_features), comparison(in_features))

    def parts(self) -> tuple[Selector, ...]:
        """Return the selectors this one is made of."""
        return ()


@dataclass(frozen=True)
class RoleSelector(Selector):
    """Selects the sites of a role, or of the roles in a named group.

    Parts of a family are attributes: `attention.q`, `ffn.up`, `conv.depthwise`; `attention.all` is `attention.*`.
    """

    name: str

    def matches(self, site: Site) -> bool:
        if self.name == "weight":
            known = role_of(site.role)
            return site.weight is not None and (known is None or known.owns_weight)
        return site.role in self.roles

    @property
    def roles(self) -> tuple[str, ...]:
        """The names of the roles that it selects by themselves."""
        return selected_by(self.name)

    def __getattr__(self, part: str) -> RoleSelector:
        if part.startswith("_") or part == "name":  # what copies and pickles ask of an object without its fields
            raise AttributeError(part)
        if part == "all" and f"{self.name}.*" in WORDS:
            return RoleSelector(f"{self.name}.*")
        if part in parts_of(self.name):
            return RoleSelector(f"{self.name}.{part}")
        known = ", ".join(parts_of(self.name))
        has = f"it has {known}" if known else "it has no parts"
        raise AttributeError(f"{self.name} has no part {part!r}; {has}")

    def __dir__(self) -> list[str]:
        parts = parts_of(self.name)
        return [*super().__dir__(), *parts, *(["all"] if f"{self.name}.*" in WORDS else [])]

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True)
class Either(Selector):
    left: Selector
    right: Selector

    def matches(self, site: Site) -> bool:
        return self.left.matches(site) or self.right.matches(site)

    def parts(self) -> tuple[Selector, ...]:
        return (self.left, self.right)

    def __str__(self) -> str:
        return f"{wrapped(self.left, 0)}|{wrapped(self.right, 1)}"


@dataclass(frozen=True)
class Both(Selector):
    left: Selector
    right: Selector

    def matches(self, site: Site) -> bool:
        return self.left.matches(site) and self.right.matches(site)

    def parts(self) -> tuple[Selector, ...]:
        return (self.left, self.right)

    def __str__(self) -> str:
        return f"{wrapped(self.left, 1)}&{wrapped(self.right, 2)}"


@dataclass(frozen=True)
class Not(Selector):
    inner: Selector

    def matches(self, site: Site) -> bool:
        return not self.inner.matches(site)

    def parts(self) -> tuple[Selector, ...]:
        return (self.inner,)

    def __str__(self) -> str:
        return f"~{wrapped(self.inner, 2)}"


def _strength(selector: Selector) -> int:
    """Return how tightly a selector's text binds: | 0, & 1, ~ 2, all else 3."""
    order = {Either: 0, Both: 1, Not: 2}
    return order.get(type(selector), 3)


def wrapped(selector: Selector, least: int) -> str:
    """Return a selector's text, in brackets where it binds less tightly."""
    return str(selector) if _strength(selector) >= least else f"({selector})"


def quoted(text: str) -> str:
    """Text in double quotes; only the quote is escaped, so regular expressions stay readable."""
    return '"' + text.replace('"', '\\"') + '"'


@dataclass(frozen=True)
class Comparison:
    """A condition on a number of features."""

    sign: str
    number: int

    def holds(self, size: int) -> bool:
        return OPERATORS[self.sign](size, self.number)

    def __str__(self) -> str:
        return str(self.number) if self.sign == "==" else quoted(f"{self.sign}{self.number}")


@dataclass(frozen=True)
class Where(Selector):
    """The sites of `inner` with the given path and shape; names only narrow what was found by structure."""

    inner: Selector
    path: str | None = None
    shape: tuple[int, ...] | None = None
    out_features: Comparison | None = None
    in_features: Comparison | None = None

    def __post_init__(self) -> None:
        if self.path is self.shape is self.out_features is self.in_features is None:
            raise PeftGraphError("where() needs one of path=, shape=, out_features= and in_features=.")
        sizes = self.shape if isinstance(self.shape, tuple) else (self.shape,)
        require(
            self.shape is None or (isinstance(self.shape, tuple) and bool(sizes) and all(map(is_whole, sizes))),
            f"where(shape=...) takes a tuple of whole numbers, got {self.shape!r}.",
        )
        if self.path is None:
            return
        compile_bounded(self.path)
        # \" and " are one regular expression, and only the second can be written between quotes
        plain = re.sub(r"\\.", lambda pair: '"' if pair[0] == '\\"' else pair[0], self.path, flags=re.DOTALL)
        object.__setattr__(self, "path", plain)

    def matches(self, site: Site) -> bool:
        return self.inner.matches(site) and self.narrows_to(site)

    def narrows_to(self, site: Site) -> bool:
        """Tell whether the condition itself holds."""
        shape = site.shape or ()
        features = ((self.out_features, shape[:1]), (self.in_features, shape[1:2]))
        return (
            (self.path is None or compile_bounded(self.path).fullmatch(site.path))
            and (self.shape is None or site.shape == self.shape)
            and all(asked is None or (bool(size) and asked.holds(size[0])) for asked, size in features)
        )

    def parts(self) -> tuple[Selector, ...]:
        return (self.inner,)

    @property
    def condition(self) -> str:
        """The text after the selector that is narrowed, without its dot."""
        shape = None if self.shape is None else f"({','.join(map(str, self.shape))}{',' * (len(self.shape) == 1)})"
        given = {
            "path": None if self.path is None else quoted(self.path),
            "shape": shape,
            "out_features": self.out_features,
            "in_features": self.in_features,
        }
        return f"where({','.join(f'{key}={value}' for key, value in given.items() if value is not None)})"

    def __str__(self) -> str:
        return f"{wrapped(self.inner, 3)}.{self.condition}"


def comparison(value: int | str | None) -> Comparison | None:
    """Parse 48 or ">=1024" as a comparison.

    Raises:
        PeftGraphError: the text is no comparison with a whole number.
    """
    if value is None:
        return None
    found = re.fullmatch(r"\s*(<=|>=|==|!=|<|>)?\s*(\d{1,18})\s*", str(value)) if _is_compared(value) else None
    if found is None:
        raise PeftGraphError(f'{value!r} compares with nothing: write a number, or a text like ">=1024".')
    return Comparison(found[1] or "==", int(found[2]))


def _is_compared(value: object) -> bool:
    return isinstance(value, str) or is_whole(value)


def is_whole(value: object) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def require(holds: bool, words: str) -> None:
    if not holds:
        raise PeftGraphError(words)


def role(name: str) -> RoleSelector:
    """Return the selector of a role's word, or of a group's such as "attention.*".

    Raises:
        PeftGraphError: no role and no group has that word.
    """
    if name not in WORDS:
        raise PeftGraphError(f"no role is called {name!r}{suggestion(name)}. Roles: {', '.join(WORDS)}")
    return RoleSelector(name)


attention: Final = RoleSelector("attention")
ffn: Final = RoleSelector("ffn")
norm: Final = RoleSelector("norm")
bias: Final = RoleSelector("bias")
embedding: Final = RoleSelector("embedding")
head: Final = RoleSelector("head")
block: Final = RoleSelector("block")
projection: Final = RoleSelector("projection")
router: Final = RoleSelector("router")
linear: Final = RoleSelector("linear")
conv: Final = RoleSelector("conv")
matrix: Final = RoleSelector("matrix")
weight: Final = RoleSelector("weight")


def suggestion(word: str, known: Iterable[str] = (*WORDS, *FILTERS, "where")) -> str:
    """Return "; did you mean ...?" with the known word that is nearest to an unknown one; "" where none is near."""
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else ""


Reader = Callable[[str, Mapping[str, Any]], Selector]
_reader: list[Reader] = []  # the parser of selectors' text, which stands above this module


def read_texts_with(reader: Reader) -> None:
    """Say who parses the text that stands in the place of a selector."""
    _reader[:] = [reader]


def as_selector(value: object, patterns: Mapping[str, Any] = MappingProxyType({})) -> Selector:
    """Return a selector, the one that a text means, that of a pattern's only value, or all of a list together.

    Args:
        value: a selector, its text, a pattern, or a list of these, which selects what any of them does.
        patterns: the patterns that the text may call by name.

    Raises:
        PeftGraphError: it is none of these, or the text cannot be read.
    """
    if isinstance(value, Selector):
        return value
    if isinstance(value, str):
        return _reader[0](value, patterns)
    if isinstance(value, Selectable):
        return value.selector
    if isinstance(value, list | tuple | set | frozenset):
        ordered = value if isinstance(value, list | tuple) else sorted(value, key=str)
        require(bool(value), "a list of selectors has at least one")
        return reduce(Either, (as_selector(one, patterns) for one in ordered))
    raise PeftGraphError(f"a selector is an object like attention.q or its text, not {type(value).__name__}")
