"""Why a site is one: the steps that led to it, each with the nodes it refers to.

Nothing is recorded while sites are found. On request, the search runs again (`Origin.structure`) and the module that
found the site derives the reasons from the result. In a claim a node is written %name, with its graph name;
`Origin.say` puts the printed name there.
"""

from __future__ import annotations

from typing import Final

from peftgraph.sites.assign.blocks import Stream
from peftgraph.sites.assign.evidence import Step, step
from peftgraph.sites.assign.periods import mixers_alike
from peftgraph.sites.assign.structure import Structure
from peftgraph.sites.search import finder_of
from peftgraph.sites.site import Site

LETTERS: Final = {
    "M": "self attention",
    "X": "cross attention",
    "F": "feed-forward",
    "C": "convolution",
    "P": "pooling",
    "L": "other",
}


def steps(structure: Structure, site: Site) -> list[Step]:
    """Return why `site` is one, from the operator outward to its layer."""
    node = structure.node(site.op)
    found = finder_of(site.role).evidence(structure, site, node)
    return found if site.layer is None else [*found, _layer(structure, site)]


def _layer(structure: Structure, site: Site) -> Step:
    """Say how the stream was cut into layers, and which of its residual adds belong to this one."""
    for stream in structure.blocks.streams:
        for start, stop in stream.blocks:
            joins = stream.joins[start:stop]
            place = structure.blocks.places[joins[0]]
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


def cuts(structure: Structure) -> list[str]:
    """Say how every stream was cut into layers, one sentence for each."""
    layered = [stream for stream in structure.blocks.streams if stream.blocks]
    return [_cut(stream, *stream.blocks[0]) for stream in layered]
