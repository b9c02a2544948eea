"""Selectors: which sites a pass wants. Objects that combine with |, & and ~, and text that means the same.

    attention.q|attention.v        (attention.q|attention.v)&layers(2,6)        ffn.up.where(path="decoder.*")

Filters that narrow (layers, stacks, kinds, experts, paths, shapes) are in narrow.py.

`attention.*` is the four projections, `attention` the sublayer; likewise `ffn.*` and `ffn`. `linear` is every
projection but the head and routers, `weight` everything with a stored matrix.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Final

from peftgraph.errors import PeftGraphError
from peftgraph.sites.site import Site

if TYPE_CHECKING:
    from peftgraph.sites.patterns import Pattern

ATTENTION: Final = ("attention.q", "attention.k", "attention.v", "attention.o")
FFN: Final = ("ffn.up", "ffn.gate", "ffn.down")
WORDS: Final = (
    "attention",
    *ATTENTION,
    "attention.core",
    "attention.latent",
    "attention.*",
    "ffn",
    *FFN,
    "ffn.hidden",
    "ffn.*",
    "norm",
    "bias",
    "embedding",
    "head",
    "block",
    "projection",
    "linear",
    "conv",
    "matrix",
    "weight",
    "router",
    "side.down",
    "side.up",
)
LINEAR: Final = (*ATTENTION, "attention.latent", *FFN, "projection", "side.down", "side.up")
# Words that stand for several roles.
FAMILIES: Final = {"attention.*": ATTENTION, "ffn.*": FFN, "linear": LINEAR}
FILTERS: Final = ("layers", "layer", "stack", "kind", "expert")


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
        from peftgraph.sites.selectors.filters import Where, comparison

        return Where(self, path, shape, comparison(out_features), comparison(in_features))

    def parts(self) -> tuple[Selector, ...]:
        """The selectors this one is made of."""
        return ()

    def patterns(self) -> tuple[Pattern, ...]:
        """The patterns whose sites it speaks of, each once."""
        return tuple(dict.fromkeys(one for part in self.parts() for one in part.patterns()))


@dataclass(frozen=True)
class Role(Selector):
    """Sites of one role. `attention.*` and `ffn.*` stand for their projections, `linear` for every projection but
    the head and routers, `weight` for every part with a stored matrix, whatever its role."""

    name: str

    def matches(self, site: Site) -> bool:
        if self.name == "weight":
            return site.weight is not None and site.role != "ffn.hidden"
        return site.role in self.roles

    @property
    def roles(self) -> tuple[str, ...]:
        return FAMILIES.get(self.name, (self.name,))

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True)
class AttentionRole(Role):
    """The attention sublayer, and by attribute its parts."""

    name: str = "attention"

    @property
    def q(self) -> Role:
        return Role("attention.q")

    @property
    def k(self) -> Role:
        return Role("attention.k")

    @property
    def v(self) -> Role:
        return Role("attention.v")

    @property
    def o(self) -> Role:
        return Role("attention.o")

    @property
    def core(self) -> Role:
        return Role("attention.core")

    @property
    def all(self) -> Role:
        return Role("attention.*")


@dataclass(frozen=True)
class FeedForwardRole(Role):
    """The feed-forward sublayer, and by attribute its parts."""

    name: str = "ffn"

    @property
    def up(self) -> Role:
        return Role("ffn.up")

    @property
    def gate(self) -> Role:
        return Role("ffn.gate")

    @property
    def down(self) -> Role:
        return Role("ffn.down")

    @property
    def hidden(self) -> Role:
        return Role("ffn.hidden")

    @property
    def all(self) -> Role:
        return Role("ffn.*")


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
    """How tightly a selector's text binds: | 0, & 1, ~ 2, all else 3."""
    order = {Either: 0, Both: 1, Not: 2}
    return order.get(type(selector), 3)


def wrapped(selector: Selector, least: int) -> str:
    """A selector's text, in brackets where it binds less tightly."""
    return str(selector) if _strength(selector) >= least else f"({selector})"


def quoted(text: str) -> str:
    """Text in double quotes; only the quote is escaped, so regular expressions stay readable."""
    return '"' + text.replace('"', '\\"') + '"'


def role(name: str) -> Role:
    """The selector of a role's name; `attention` and `ffn` with their attributes."""
    if name not in WORDS:
        raise PeftGraphError(f"no role is called {name!r}{suggestion(name)}. Roles: {', '.join(WORDS)}")
    return attention if name == "attention" else ffn if name == "ffn" else Role(name)


attention: Final = AttentionRole()
ffn: Final = FeedForwardRole()
norm: Final = Role("norm")
bias: Final = Role("bias")
embedding: Final = Role("embedding")
head: Final = Role("head")
block: Final = Role("block")
projection: Final = Role("projection")
router: Final = Role("router")
linear: Final = Role("linear")
conv: Final = Role("conv")
matrix: Final = Role("matrix")
weight: Final = Role("weight")


def suggestion(word: str, known: Iterable[str] = (*WORDS, *FILTERS, "where")) -> str:
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else ""


def as_selector(value: object, patterns: Mapping[str, Pattern] = MappingProxyType({})) -> Selector:
    """A selector, or the selector a text means; `patterns` are the ones that the text may call by name."""
    from peftgraph.sites.patterns import Pattern

    if isinstance(value, Selector):
        return value
    if isinstance(value, str):
        return parse_selector(value, patterns)
    if isinstance(value, Pattern):
        return value[value.parts[0] if len(value.parts) == 1 else ""]
    raise PeftGraphError(f"a selector is an object like attention.q or its text, not {type(value).__name__}")


def parse_selector(text: str, patterns: Mapping[str, Pattern] = MappingProxyType({})) -> Selector:
    """The inverse of str(selector); `patterns` are the ones that the text may call by name.

    Raises:
        PeftGraphError: it cannot be read; the message shows the place.
    """
    from peftgraph.sites.selectors.parse import Parser

    if not isinstance(text, str):
        raise PeftGraphError(f"a selector is an object like attention.q or its text, not {type(text).__name__}")
    return Parser(text, patterns).parse()
