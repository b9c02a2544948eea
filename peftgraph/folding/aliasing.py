"""Checks whether a stored tensor may change: only if nothing else reads the part of it that changes."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence

from torch import fx

from peftgraph.ir.graphs import stored_tensor_nodes
from peftgraph.ir.program import ProgramData
from peftgraph.rewrite.weight_readers import readers
from peftgraph.rewrite.weight_views import View, bias_view, weight_view
from peftgraph.sites import Site, Sites


class AliasCheck:
    """Knows the readers of the stored tensors of a graph that is being folded, and checks edits against them.

    Args:
        program: the program that is being folded, with its ties.
        graph: its graph, which folding edits.
        sites: the sites of the base.
        untie: a tied tensor may be untied: the name that changes gets a tensor of its own.
    """

    def __init__(self, program: ProgramData, graph: fx.Graph, sites: Sites, untie: bool) -> None:
        self._program, self._untie = program, untie
        self._stored: dict[str, list[fx.Node]] = {}
        self._sites: dict[str, list[Site]] = {}
        self._biased: dict[str, list[Site]] = {}  # by the operators that may add their biases
        for node in stored_tensor_nodes(graph):
            self._stored.setdefault(str(node.target), []).append(node)
        for site in sites:
            self._sites.setdefault(site.op, []).append(site)
            for name in {site.op, site.ports.get("output", site.op)}:
                self._biased.setdefault(name, []).append(site)

    def reason(self, view: View | None, makers: Mapping[str, View | None], readers: Collection[str]) -> str | None:
        """Return why a window of a weight may not change for one site alone; None when it may.

        Args:
            view: the window; None where the site has no weight.
            makers: for the nodes of edits, the window that the edit changes; None for the edit that is folded.
            readers: the operators of the site, for which the weight is to change.
        """
        if view is None:
            return "it has no weight to fold into"
        foreign = self._foreign(view, makers, (view.parameter,))
        if len(foreign) > 1 or any(reader.name not in readers for reader in foreign):
            return _leaks(view, foreign)
        others = [name for name in self._program.table.tied(view.parameter) if name != view.parameter]
        used = [name for name in others if any(True for _ in self._readers(name))]
        if used and not self._untie:
            return (
                f"{view.parameter} is tied to {', '.join(used)}, and the change would leak into it; "
                "pg.fold(program, untie=True) gives it a tensor of its own"
            )
        return None

    def joint_reason(self, view: View, together: Collection[str], makers: Mapping[str, View | None]) -> str | None:
        """Return why a window of a weight may not change for some sites at once, under all its names; None if it may.

        Args:
            view: the window.
            together: the operators of the sites.
            makers: for the nodes of edits, the window that the edit changes; None for the edits that are folded.
        """
        foreign = self._foreign(view, makers, self._program.table.tied(view.parameter))
        others = [reader for reader in foreign if reader.name not in together]
        return _leaks(view, foreign) if others else None

    def bias_reason(
        self, view: View, weight: View | None, makers: Mapping[str, View | None], adders: Collection[str]
    ) -> str | None:
        """Return why a window of a bias may not change for one site alone; None when it may.

        Args:
            view: the window.
            weight: of the site.
            makers: for the nodes of edits, the window of a weight that the edit changes; None for the edit that is
                folded.
            adders: the operators that add the bias at the site.
        """
        names = self._program.table.tied(view.parameter)
        readers = [reader for name in names for reader in self._readers(name)]
        apart = (self._adds_apart(reader, view, weight, makers) for reader in readers if reader.name not in adders)
        return None if all(apart) else _leaks(view, readers)

    def _adds_apart(self, reader: fx.Node, view: View, weight: View | None, makers: Mapping[str, View | None]) -> bool:
        """Check whether `reader` is another site's operator, or an edit of one, that reads no value of the window."""
        if reader.name in makers:
            own = makers[reader.name]
            return own is None or (weight is not None and not own.overlaps(weight))
        found = (bias_view(other) for other in self._biased.get(reader.name, ()))
        windows = [window for window in found if window is not None and window.parameter == view.parameter]
        return bool(windows) and not any(window.overlaps(view) for window in windows)

    def _foreign(self, view: View, makers: Mapping[str, View | None], names: Collection[str]) -> list[fx.Node]:
        """Return the nodes that read values of a window, under any of some names."""
        readers = [reader for name in names for reader in self._readers(name)]
        return [reader for reader in readers if not self._is_disjoint(reader, view, makers)]

    def _readers(self, name: str) -> Iterator[fx.Node]:
        """Yield the computing nodes that read a stored tensor, directly or through changes of its layout."""
        return readers(self._stored.get(name, ()))  # one that was erased since has no users

    def _is_disjoint(self, reader: fx.Node, view: View, makers: Mapping[str, View | None]) -> bool:
        """Check whether `reader` is an operator, or an edit, of other sites only, which own no value of `view`."""
        if reader.name in makers:
            own = makers[reader.name]
            return own is None or not own.overlaps(view)
        found = (weight_view(other) for other in self._sites.get(reader.name, ()))
        windows = [window for window in found if window is not None and window.parameter == view.parameter]
        return bool(windows) and not any(window.overlaps(view) for window in windows)


def _leaks(view: View, readers: Sequence[fx.Node]) -> str:
    """Format the reason that a change would leak into other readers."""
    names = ", ".join(f"%{reader.meta.get('label', reader.name)}" for reader in readers[:3])
    return (
        f"{view.parameter} is read in {len(readers)} places ({names}, ...), "
        "and a change for one would leak into the others"
    )
