"""May a stored tensor change? Only if nobody else reads the part that changes."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence

import torch
from torch import fx

from peftgraph.ir.program import ProgramData
from peftgraph.rewrite.views import View, weight_view
from peftgraph.sites import Sites

aten = torch.ops.aten
LAYOUT = {
    aten.t.default,
    aten.transpose.int,
    aten.permute.default,
    aten.slice.Tensor,
    aten.select.int,
    aten.chunk.default,
    aten.split.Tensor,
    aten.split_with_sizes.default,
    aten.unbind.int,
    aten.view.default,
    aten.reshape.default,
    aten.unsqueeze.default,
    aten.squeeze.dim,
    aten.contiguous.default,
    aten.to.dtype,
    aten.to.device,
}


def sharing_reason(
    program: ProgramData,
    graph: fx.Graph,
    sites: Sites,
    view: View | None,
    untie: bool,
    makers: Mapping[str, View | None],
) -> str | None:
    """Why a window of a weight may not change for one site alone; None when it may.

    Args:
        program: the program that is being folded, with its ties.
        graph: the graph as folding has left it so far.
        sites: the sites of the base.
        view: what would change; None where the site has no weight.
        untie: a tied tensor may be split: this name gets a tensor of its own.
        makers: for the nodes of edits, the window that the edit changes; None for the edit that is folded.
    """
    if view is None:
        return "it has no weight to fold into"
    foreign = _foreign(graph, sites, view, makers, (view.parameter,))
    if len(foreign) > 1:
        return _leaks(view, foreign)
    others = [name for name in program.table.tied(view.parameter) if name != view.parameter]
    used = [name for name in others if any(True for _ in weight_readers(graph, name))]
    if used and not untie:
        return (
            f"{view.parameter} is tied to {', '.join(used)}, and the change would leak into it; "
            "pg.fold(program, untie=True) gives it a tensor of its own"
        )
    return None


def joint_reason(
    program: ProgramData,
    graph: fx.Graph,
    sites: Sites,
    view: View,
    together: Collection[str],
    makers: Mapping[str, View | None],
) -> str | None:
    """Why a window of a weight may not change for some sites at once; None when nobody else reads it, by any name.

    Args:
        program: the program that is being folded, with its ties.
        graph: the graph as folding has left it so far.
        sites: the sites of the base.
        view: what would change.
        together: the operators of the sites it changes for.
        makers: for the nodes of edits, the window that the edit changes; None for the edits that are folded.
    """
    foreign = _foreign(graph, sites, view, makers, program.table.tied(view.parameter))
    others = [reader for reader in foreign if reader.name not in together]
    return _leaks(view, foreign) if others else None


def _foreign(
    graph: fx.Graph, sites: Sites, view: View, makers: Mapping[str, View | None], names: Collection[str]
) -> list[fx.Node]:
    """Who reads values of a window, by any of some names."""
    readers = [reader for name in names for reader in weight_readers(graph, name)]
    return [reader for reader in readers if not _is_disjoint(sites, reader, view, makers)]


def _leaks(view: View, readers: Sequence[fx.Node]) -> str:
    names = ", ".join(f"%{reader.meta.get('label', reader.name)}" for reader in readers[:3])
    return (
        f"{view.parameter} is read in {len(readers)} places ({names}, ...), "
        "and a change for one would leak into the others"
    )


def weight_readers(graph: fx.Graph, name: str) -> Iterator[fx.Node]:
    """The computing nodes that read a stored tensor, looking through layout."""
    pending = [node for node in graph.nodes if node.op == "get_attr" and node.target == name]
    seen: set[fx.Node] = set()
    while pending:
        node = pending.pop()
        for user in node.users:
            if user in seen:
                continue
            seen.add(user)
            if user.target in LAYOUT or getattr(user.target, "__name__", "") == "getitem":
                pending.append(user)
            elif user.op != "placeholder":
                yield user


def _is_disjoint(sites: Sites, reader: fx.Node, view: View, makers: Mapping[str, View | None]) -> bool:
    """Whether `reader` is the projection, or an edit, of other sites only, none of which owns values of `view`."""
    if reader.name in makers:
        own = makers[reader.name]
        return own is None or not own.overlaps(view)
    owners = [(other, weight_view(other)) for other in sites if other.op == reader.name]
    windows = [window for _, window in owners if window is not None and window.parameter == view.parameter]
    return bool(windows) and not any(window.overlaps(view) for window in windows)
