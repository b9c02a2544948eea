"""Why a site is one: the steps that led to it, each with the nodes it speaks of.

Nothing is recorded while sites are found. When somebody asks, the search runs again (`Origin.finder`) and its results
are read here. In a claim a node is written %name, with its graph name; `Origin.say` puts the printed name there.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from torch import fx

from peftgraph.sites.assign.blocks import Stream
from peftgraph.sites.assign.feedforward import FeedForward
from peftgraph.sites.assign.periods import mixers_alike
from peftgraph.sites.assign.routers import routes
from peftgraph.sites.dataflow import ops
from peftgraph.sites.explanations.attention_evidence import attention_steps
from peftgraph.sites.explanations.steps import Step, joined, step, stored, through
from peftgraph.sites.matchers.projections import Projection
from peftgraph.sites.site import Site

if TYPE_CHECKING:
    from peftgraph.sites.assign.find import Finder

LETTERS: Final = {
    "M": "self attention",
    "X": "cross attention",
    "F": "feed-forward",
    "C": "convolution",
    "P": "pooling",
    "L": "other",
}


def steps(finder: Finder, site: Site) -> list[Step]:
    """Why `site` is one, from the operator outward to its layer."""
    node = next(one for one in finder.flow.nodes if one.name == site.op)
    found = HOW.get(site.role.partition(".")[0], _own_pattern)(finder, site, node)
    return found if site.layer is None else [*found, _layer(finder, site, node)]


def _sublayer(finder: Finder, site: Site, node: fx.Node) -> list[Step]:
    join = finder.anatomy.join_at[node]
    sublayer = next(one for one in finder.blocks.sublayers[join] if one.role == site.role and one.kind == site.kind)
    members = ", ".join(f"%{one.name}" for one in sublayer.members)
    word = "attention" if site.role == "attention" else "feed-forward"
    found = [
        step(f"the branch of %{join.node.name} descends from the {word} of {members}", sublayer.members),
        joined(finder.anatomy, join, sublayer.output),
    ]
    placed = {
        "pre": f"a norm stands between %{join.source.name} and what the sublayer reads: pre-norm",
        "post": f"a norm follows %{join.node.name} on the stream: post-norm",
        "sandwich": "a norm stands on the branch after the sublayer as well: sandwich norm",
    }
    return found if site.layout is None else [*found, step(placed[site.layout])]


def _feedforward(finder: Finder, site: Site, node: fx.Node) -> list[Step]:
    if site.role == "ffn":
        return _sublayer(finder, site, node)
    one = next(one for one in finder.feedforwards if _owns(one, site, node))
    down = _down(finder, one, node)
    frontier = finder.anatomy.frontier(down.input)
    flow = finder.flow
    between = sorted(frontier.between, key=flow.order.__getitem__)
    bent = [n for n in between if ops.name(n) in ops.NONLINEAR]
    sources = ", ".join(f"%{source.output.name}" for source in frontier.projections)
    shown = ", ".join(f"%{n.name} ({ops.name(n)})" for n in bent)
    found = [
        step(
            f"%{down.node.name} is a projection by {stored(down)} whose result {_way_out(finder, one, down)}", down.node
        ),
        joined(finder.anatomy, one.join, down.node),
        step(
            f"its input leads back {through(between)}to projections only, {sources}, with a nonlinearity: {shown}",
            [source.node for source in frontier.projections],
            between,
        ),
    ]
    if site.role in ("ffn.up", "ffn.gate"):
        found.append(_side(one, site, node))
    if site.role == "ffn.hidden":
        found.append(step(f"%{down.input.name} is what the down projection reads: the hidden value", down.input))
    return found


def _way_out(finder: Finder, one: FeedForward, down: Projection) -> str:
    last = finder.anatomy.frontier(one.join.branch).projections
    by = ", ".join(f"%{other.node.name}" for other in last if finder.flow.descends(other.node, down.output))
    return "enters a residual add" if down in last else f"is carried on to a residual add by {by}"


def _owns(one: FeedForward, site: Site, node: fx.Node) -> bool:
    if site.role == "ffn.hidden":
        return any(down.node is node for down in one.downs)
    return any(p.role == site.role and p.projection.node is node and p.columns == site.columns for p in one.parts)


def _down(finder: Finder, one: FeedForward, node: fx.Node) -> Projection:
    """The down projection to which a part belongs."""
    own = [down for down in one.downs if down.node is node]
    reading = [
        down
        for down in one.downs
        if any(source.node is node for source in finder.anatomy.frontier(down.input).projections)
    ]
    return (own or reading or list(one.downs))[0]


def _side(one: FeedForward, site: Site, node: fx.Node) -> Step:
    part = next(p for p in one.parts if p.role == site.role and p.projection.node is node and p.columns == site.columns)
    width = part.projection.width
    own = f"all {width} columns" if part.columns is None else f"columns {part.columns} of {width}"
    if any(p.role == "ffn.gate" for p in one.parts):
        bent = "is nonlinear: gate" if site.role == "ffn.gate" else "carries the value: up"
        note = f" ({part.note})" if part.note else ""
        return step(f"its two sides of a multiplication carry different columns; the one of {own} {bent}{note}")
    return step(f"{own} arrive, and no multiplication gates them: up")


def _norm(finder: Finder, site: Site, node: fx.Node) -> list[Step]:
    norm = next(one for one in finder.anatomy.norms if one.node is node)
    if ops.name(node) in ops.NORM:
        return [step(f"%{node.name} is {ops.name(node)} of %{norm.input.name}", norm.input, node)]
    way = finder.flow.between(norm.input, norm.output)
    verb = "divides" if ops.name(node) == "div" else "multiplies"
    gain = f", times @{norm.weight}" if norm.weight else ""
    return [
        step(
            f"%{node.name} {verb} %{norm.input.name} by a statistic of its own, one for each row "
            f"({through(one for one in way if one is not node).strip()}){gain}: a norm written by hand",
            way,
            norm.output,
        )
    ]


def _bias(finder: Finder, site: Site, node: fx.Node) -> list[Step]:
    where = "by the operator itself" if site.ports["output"] == node.name else f"in %{site.ports['output']}"
    output = next(one for one in finder.flow.nodes if one.name == site.ports["output"])
    return [step(f"the vector @{site.path} is added to the result of %{node.name}, {where}", node, output)]


def _embedding(finder: Finder, site: Site, node: fx.Node) -> list[Step]:
    index = finder.flow.operands(node)[1]
    return [step(f"%{node.name} looks up rows of a stored table by %{index.name}, which comes from an input", node)]


def _leftover(finder: Finder, site: Site, node: fx.Node) -> list[Step]:
    one = finder.anatomy.projection_at[node]
    first = step(f"%{node.name} contracts the signal %{one.input.name} with {stored(one)}: a projection", node)
    if site.role == "head":
        return [first, step("no residual add, attention or other projection reads what follows from it: a head")]
    if site.role == "router":
        choice = routes(finder.anatomy, one)
        assert choice is not None
        what = "chooses" if ops.name(choice) in ops.CHOICE else "weighs"
        way = finder.flow.between(one.output, choice)
        return [first, step(f"its result {what} others at %{choice.name} ({ops.name(choice)}): a router", way, choice)]
    return [first, step("it plays no other role; `sites.unmatched` says what it comes closest to")]


def _convolution(finder: Finder, site: Site, node: fx.Node) -> list[Step]:
    assert site.weight is not None
    return [step(f"%{node.name} convolves a signal with the stored kernel @{site.weight.parameter}", node)]


def _matrix(finder: Finder, site: Site, node: fx.Node) -> list[Step]:
    assert site.weight is not None
    what = f"%{node.name} ({ops.name(node)}) reads the stored matrix @{site.weight.parameter}"
    return [step(f"{what}, which is no projection's, embedding's or convolution's", node)]


def _side_path(finder: Finder, site: Site, node: fx.Node) -> list[Step]:
    path = next(path for path in finder.anatomy.side_paths if node in (path.down.node, path.up.node))
    claim = f"%{path.up.node.name} of %{path.down.node.name} is added to %{path.host.node.name}: a low-rank side path"
    return [step(claim, path.down.node, path.up.node, path.host.node)]


def _block(finder: Finder, site: Site, node: fx.Node) -> list[Step]:
    join = finder.anatomy.join_at[node]
    return [joined(finder.anatomy, join, join.branch)]


def _own_pattern(finder: Finder, site: Site, node: fx.Node) -> list[Step]:
    pattern, _, part = site.role.rpartition(".")
    others = [(name, value) for name, value in site.values if name != part]
    shown = f", where {', '.join(f'{name} is %{value}' for name, value in others)}" if others else ""
    nodes = [one for one in finder.flow.nodes if one.name in dict(others).values()]
    return [step(f"%{node.name} is `{part}` in a match of the pattern {pattern}{shown}", nodes, node)]


def _layer(finder: Finder, site: Site, node: fx.Node) -> Step:
    """How the stream was cut into layers, and which of its residual adds belong to this one."""
    for stream in finder.blocks.streams:
        for start, stop in stream.blocks:
            joins = stream.joins[start:stop]
            place = finder.blocks.places[joins[0]]
            if (place.layer, place.stack) == (site.layer, site.stack):
                stack = f" of the {site.stack}" if site.stack else ""
                adds = ", ".join(f"%{join.node.name}" for join in joins)
                claim = f"layer {site.layer} of {site.depth}{stack}: {_cut(stream, start, stop)}, here in {adds}"
                return step(claim, [join.node for join in joins])
    raise AssertionError(f"{site} is in no stream")


def _cut(stream: Stream, start: int, stop: int) -> str:
    kinds = stream.kinds[start:stop]
    names = ", ".join(" and ".join(LETTERS[letter] for letter in kind) for kind in kinds)
    root, count = stream.joins[0].root.name, len(stream.blocks)
    if count == 1:
        return f"the stream from %{root} has one block ({names})"
    if all(stream.kinds[one:end] == kinds for one, end in stream.blocks):
        return f"the stream from %{root} repeats ({names}) {count} times"
    plain = [mixers_alike([kind for kind in stream.kinds[one:end] if kind != "X"]) for one, end in stream.blocks]
    if all(one == plain[0] for one in plain):
        return f"the stream from %{root} repeats ({names}) {count} times, in kinds of mixing or cross attention apart"
    return f"the stream from %{root} does not repeat, so each of its mixers starts a block ({names})"


def cuts(finder: Finder) -> list[str]:
    """How every stream was cut into layers, one sentence for each."""
    layered = [stream for stream in finder.blocks.streams if stream.blocks]
    return [_cut(stream, *stream.blocks[0]) for stream in layered]


HOW: Final[dict[str, Callable[[Finder, Site, fx.Node], list[Step]]]] = {
    "attention": lambda finder, site, node: (
        _sublayer(finder, site, node) if site.role == "attention" else attention_steps(finder, site, node)
    ),
    "ffn": _feedforward,
    "norm": _norm,
    "bias": _bias,
    "embedding": _embedding,
    "block": _block,
    "head": _leftover,
    "router": _leftover,
    "side": _side_path,
    "projection": _leftover,
    "conv": _convolution,
    "matrix": _matrix,
}
