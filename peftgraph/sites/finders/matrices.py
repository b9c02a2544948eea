"""Stored matrices that are no projection's, embedding's or convolution's, such as tables of positions."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import fx

from peftgraph.sites.assign.collection import owner
from peftgraph.sites.assign.evidence import Step, step
from peftgraph.sites.assign.structure import Structure
from peftgraph.sites.dataflow import ops
from peftgraph.sites.site import MatrixAxes, NearMiss, Site, Weight


def find(structure: Structure) -> None:
    """Add a site for every stored matrix that is no part of another site."""
    flow = structure.flow
    taken = {name for names in structure.into.stored.values() for name in names}
    for leaf in flow.nodes:
        name = str(leaf.target)
        known = leaf.op == "get_attr" and name in structure.parameters and name not in taken and leaf.users
        if known and flow.floating(leaf) and sum(size > 1 for size in flow.shape(leaf)) > 1:
            reader = min(leaf.users, key=flow.order.__getitem__)
            weight = Weight(name, axes=_axes_of(flow.shape(leaf)))
            path = owner(name) if name.endswith(".weight") else name
            place, shape = structure.into.place(reader), weight.shape(flow.tensors)
            structure.into.add("matrix", reader, path, place, {}, weight=weight, shape=shape, form="weight")


def evidence(structure: Structure, site: Site, node: fx.Node) -> list[Step]:
    """Say which operation reads the matrix."""
    assert site.weight is not None
    what = f"%{node.name} ({ops.name(node)}) reads the stored matrix @{site.weight.parameter}"
    return [step(f"{what}, which is no projection's, embedding's or convolution's", node)]


def near_misses(structure: Structure, role: str) -> Iterator[NearMiss]:
    """Find nothing: a stored matrix is read or it is not."""
    return iter(())


def _axes_of(shape: Sequence[int]) -> MatrixAxes | None:
    """Return the axes of a matrix stored behind axes of size 1, as a table of positions (1, length, width) is."""
    sizes = tuple(int(size) for size in shape)
    ones = next(i for i, size in enumerate(sizes) if size > 1)
    outer = tuple(range(ones + 1))
    return MatrixAxes(sizes, (), outer, tuple(range(ones + 1, len(sizes)))) if ones else None
