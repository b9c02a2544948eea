"""The registry of roles: every kind of part that a site can be, one record each, and the ports that roles have.

Selectors, printed names, explanations, drawings, tables of the command line and the manual iterate over `ROLES`. A new
role is one record here and one finder: a module of `peftgraph.sites.finders` with the functions `find`, `evidence` and
`near_misses`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final


@dataclass(frozen=True, kw_only=True)
class Role:
    """What is known of a role.

    Attributes:
        name: its word in selectors: "attention.q".
        meaning: what plays it, for the manual.
        finder: the module of `peftgraph.sites.finders` that finds its sites and explains them.
        ports: the ports that its sites can have.
        words: further words that select it: "attention.*", "linear", ...
        absent: why nothing plays it where nothing like it is in the graph; "" for the general reason.
        rank: its position among the sites of one operation, the outermost first.
        title: its position among the sites that give one value, whose names the printer joins ("0.attention.q+k+v");
            None where its id names no value.
        level: the nesting level of its values: 0 a part's own, 1 a sublayer's, 2 a block's.
        owns_weight: whether the weight that a site of the role speaks of is its own, and not that of a neighbour.
        colour: its colour in terminals, a style of `rich`.
        fill: the colour variable of its boxes in drawings, without its dashes; "" for what has no box of its own.
        slot: where drawings of a sublayer put it: "latent", "input", "core", "result gate", "router", "gate", "wide",
            "inside", "output" or "norm"; "" where it is in no sublayer.
    """

    name: str
    meaning: str
    finder: str
    ports: tuple[str, ...] = ("input", "output")
    words: tuple[str, ...] = ()
    absent: str = ""
    rank: int
    title: int | None = None
    level: int = 0
    owns_weight: bool = True
    colour: str = ""
    fill: str = ""
    slot: str = ""

    @property
    def family(self) -> str:
        """The first part of the name: "attention" of "attention.q", "norm" of "norm"."""
        return self.name.partition(".")[0]

    @property
    def part(self) -> str:
        """The last part of the name: "q" of "attention.q"; "" where the name has one part alone."""
        return self.name.partition(".")[2]


@dataclass(frozen=True)
class Group:
    """A word that selects several roles.

    Attributes:
        name: the word.
        meaning: what it selects, for the manual.
        absent: why it selects nothing where nothing like it is in the graph.
    """

    name: str
    meaning: str
    absent: str = ""


_SUBLAYER: Final = ("input", "output", "undropped", "memory", "residual", "join", "normed")
_PROJECTION: Final = ("input", "output", "weight", "offsets", "chosen")
_CORE: Final = (
    *("q", "k", "v", "mask", "output", "keys", "values"),
    *("scored", "scores", "product", "product1", "product2"),
)
_NO_ATTENTION: Final = "no softmax, no scaled_dot_product_attention and no two products of signals one after the other"
_NO_FEEDFORWARD: Final = "no projection reads another one through a nonlinearity"
_ATTENTION: Final = ("attention.*", "linear")
_FFN: Final = ("ffn.*", "linear")

# In the order in which they are searched for: later finders know what earlier ones found.
ROLES: Final[tuple[Role, ...]] = (
    Role(
        name="attention",
        meaning="the attention sublayer: the contribution of one attention to the residual stream",
        finder="attention",
        ports=_SUBLAYER,
        absent=_NO_ATTENTION,
        rank=10,
        level=1,
        colour="cyan",
    ),
    Role(
        name="attention.q",
        meaning="the projection of the queries",
        finder="attention",
        ports=_PROJECTION,
        words=_ATTENTION,
        absent=_NO_ATTENTION,
        rank=30,
        title=20,
        colour="cyan",
        fill="q",
        slot="input",
    ),
    Role(
        name="attention.k",
        meaning="the projection of the keys",
        finder="attention",
        ports=_PROJECTION,
        words=_ATTENTION,
        absent=_NO_ATTENTION,
        rank=40,
        title=30,
        colour="cyan",
        fill="k",
        slot="input",
    ),
    Role(
        name="attention.v",
        meaning="the projection of the values",
        finder="attention",
        ports=_PROJECTION,
        words=_ATTENTION,
        absent=_NO_ATTENTION,
        rank=50,
        title=40,
        colour="cyan",
        fill="v",
        slot="input",
    ),
    Role(
        name="attention.o",
        meaning="the first projection that reads the result of an attention",
        finder="attention",
        ports=_PROJECTION,
        words=_ATTENTION,
        absent=_NO_ATTENTION,
        rank=70,
        title=50,
        colour="cyan",
        fill="o",
        slot="output",
    ),
    Role(
        name="attention.core",
        meaning="softmax(q k^T) v, with its operands and its mask; prefixes enter here",
        finder="attention",
        ports=_CORE,
        absent=_NO_ATTENTION,
        rank=60,
        title=60,
        owns_weight=False,
        colour="cyan",
        slot="core",
    ),
    Role(
        name="attention.latent",
        meaning="a projection whose features reach an attention through further projections only",
        finder="attention",
        ports=_PROJECTION,
        words=("linear",),
        absent=_NO_ATTENTION,
        rank=80,
        colour="cyan",
        fill="latent",
        slot="latent",
    ),
    Role(
        name="attention.gate",
        meaning="the projection of a gate that scales an attention's result before its output projection",
        finder="attention_gates",
        ports=_PROJECTION,
        words=_ATTENTION,
        absent=_NO_ATTENTION,
        rank=55,
        title=45,
        colour="cyan",
        fill="gate",
        slot="result gate",
    ),
    Role(
        name="ffn",
        meaning="the feed-forward sublayer: the contribution of one feed-forward to the residual stream",
        finder="feedforward",
        ports=_SUBLAYER,
        absent=_NO_FEEDFORWARD,
        rank=11,
        level=1,
        colour="green",
    ),
    Role(
        name="ffn.up",
        meaning="the projection to the hidden value, or to its linear branch in a gated unit",
        finder="feedforward",
        ports=_PROJECTION,
        words=_FFN,
        absent=_NO_FEEDFORWARD,
        rank=100,
        title=70,
        colour="green",
        fill="up",
        slot="wide",
    ),
    Role(
        name="ffn.gate",
        meaning="the projection to the branch of the hidden value that passes the nonlinearity",
        finder="feedforward",
        ports=_PROJECTION,
        words=_FFN,
        absent=_NO_FEEDFORWARD,
        rank=90,
        title=80,
        colour="green",
        fill="gate",
        slot="gate",
    ),
    Role(
        name="ffn.down",
        meaning="the projection of the hidden value",
        finder="feedforward",
        ports=_PROJECTION,
        words=_FFN,
        absent=_NO_FEEDFORWARD,
        rank=120,
        title=90,
        colour="green",
        fill="down",
        slot="output",
    ),
    Role(
        name="ffn.hidden",
        meaning="the hidden value that the down projection reads",
        finder="feedforward",
        ports=("input", "output", "offsets", "chosen"),
        absent=_NO_FEEDFORWARD,
        rank=110,
        title=100,
        owns_weight=False,
        colour="green",
        slot="inside",
    ),
    Role(
        name="router",
        meaning="a projection whose result selects or weights experts",
        finder="leftovers",
        ports=_PROJECTION,
        absent="no projection whose result passes a top-k, softmax or sigmoid",
        rank=130,
        title=130,
        colour="yellow",
        fill="router",
        slot="router",
    ),
    Role(
        name="head",
        meaning="a projection followed only by the model's output",
        finder="leftovers",
        ports=_PROJECTION,
        absent="no projection",
        rank=180,
        title=110,
        colour="red",
        fill="ends",
    ),
    Role(
        name="projection",
        meaning="a projection without another role",
        finder="leftovers",
        ports=_PROJECTION,
        words=("linear",),
        absent="every projection plays another role, or there is none",
        rank=160,
        title=120,
        fill="none",
    ),
    Role(
        name="side.down",
        meaning="the first factor of a low-rank path in parallel to a projection",
        finder="leftovers",
        ports=_PROJECTION,
        words=("linear",),
        rank=140,
    ),
    Role(
        name="side.up",
        meaning="the second factor of a low-rank path in parallel to a projection",
        finder="leftovers",
        ports=_PROJECTION,
        words=("linear",),
        rank=150,
    ),
    Role(
        name="block",
        meaning="a layer: the sublayers that repeat along a residual stream",
        finder="blocks",
        ports=("input", "output", "undropped", "embedded"),
        absent="no add of two signals",
        rank=0,
        level=2,
    ),
    Role(
        name="norm",
        meaning="a normalisation by a statistic of its own input, with its parameters",
        finder="norms",
        absent="no normalisation operator, and no multiplication or division of two signals",
        rank=20,
        title=10,
        colour="magenta",
        fill="norm",
        slot="norm",
    ),
    Role(
        name="embedding",
        meaning="a table that is looked up by an input of the model",
        finder="embeddings",
        ports=("input", "output", "weight"),
        absent="no table lookup",
        rank=190,
        title=0,
        colour="blue",
        fill="ends",
    ),
    Role(
        name="conv",
        meaning="a convolution of a signal with a stored kernel",
        finder="convolutions",
        ports=("input", "output", "weight"),
        absent="no convolution",
        rank=170,
        fill="none",
    ),
    Role(
        name="conv.depthwise",
        meaning="a convolution in which each input channel has its own kernels; `conv` selects it too",
        finder="convolutions",
        ports=("input", "output", "weight"),
        words=("conv",),
        absent="no convolution",
        rank=171,
        fill="none",
    ),
    Role(
        name="matrix",
        meaning="a stored matrix that belongs to no projection, embedding or convolution",
        finder="matrices",
        ports=("weight",),
        absent="every stored matrix is a projection's, an embedding's or a convolution's",
        rank=200,
        fill="none",
    ),
    Role(
        name="bias",
        meaning="a stored vector that is added to an operator's result",
        finder="biases",
        ports=("output",),
        absent="no stored vector is added to a projection, convolution or norm",
        rank=210,
        colour="yellow",
        fill="none",
    ),
)

GROUPS: Final[tuple[Group, ...]] = (
    Group("attention.*", "the projections of an attention", _NO_ATTENTION),
    Group("ffn.*", "the projections of a feed-forward", _NO_FEEDFORWARD),
    Group("linear", "every projection but heads and routers", "no projection, or heads and routers alone"),
    Group("weight", "every site with a stored matrix of its own, whatever its role", "no stored matrix"),
)

BY_NAME: Final[Mapping[str, Role]] = MappingProxyType({one.name: one for one in ROLES})
WORDS: Final[tuple[str, ...]] = (*BY_NAME, *(one.name for one in GROUPS))


def role_of(name: str) -> Role | None:
    """Return the record of a role by its name; None for the roles of patterns, which are in no registry."""
    return BY_NAME.get(name)


def selected_by(word: str) -> tuple[str, ...]:
    """Return the names of the roles that a word selects by themselves; `weight`, which asks for a matrix, selects none
    so."""
    return tuple(one.name for one in ROLES if word == one.name or word in one.words)


def parts_of(family: str) -> tuple[str, ...]:
    """Return the attributes of a family: "q", "k", ... of "attention"."""
    return tuple(one.part for one in ROLES if one.family == family and one.part)


def absent(word: str) -> str:
    """Why nothing is selected by a word where nothing like it is in the graph."""
    reasons = {one.name: one.absent for one in (*ROLES, *GROUPS)}
    return reasons.get(word, "") or "nothing of that structure is in the graph"


def is_structure(name: str) -> bool:
    """Tell roles of what other parts make up (a sublayer, a block, a core, a hidden value) from those of parts."""
    known = BY_NAME.get(name)
    return known is not None and (known.level > 0 or not known.owns_weight)


def level_of(name: str) -> int:
    """Return the nesting level of a role's values; 0 for the roles of patterns."""
    known = BY_NAME.get(name)
    return 0 if known is None else known.level


def with_slot(slots: Iterable[str]) -> tuple[str, ...]:
    """Return the names of the roles that drawings put into some slots, in the order of the slots."""
    return tuple(one.name for slot in slots for one in ROLES if one.slot == slot)
