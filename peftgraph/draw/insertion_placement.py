"""Places insertions on the lines of a block: finds the stations at which they enter, and at which they read."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from peftgraph.draw.colours import Colours
from peftgraph.draw.formulas import SizeSymbols
from peftgraph.draw.insertion_diagram import Diagram
from peftgraph.draw.insertions import Insertion, OuterValue
from peftgraph.draw.scene import Arrival, LabelledBox, Line, SideBySide
from peftgraph.draw.stations import Station, Stations
from peftgraph.ir.program import ProgramData


class InsertionPlacement:
    """Puts insertions onto the lines of one block.

    Args:
        program: the rewritten program.
        stations: of the block.
        symbols: for shapes.
        colours: of the passes.
    """

    def __init__(self, program: ProgramData, stations: Stations, symbols: SizeSymbols, colours: Colours) -> None:
        self.stations, self.symbols, self.colours = stations, symbols, colours
        self.stands_for = {move.after: move.anchor.value for edit in program.edits for move in edit.moves}

    def insert(self, found: Iterable[Insertion]) -> None:
        """Put insertions at the stations where they enter, inner ones first; omit those that enter elsewhere."""
        for one in sorted(found, key=lambda one: self.stations.order.get(one.value, 0)):
            inside = self._inside(one)
            if inside is not None:
                inside.inside.append(self._arrival(one, {read: self._words(read) for read in one.reads}))
                continue
            station = self._entry(one)
            if station is not None:
                line, place = station
                places = {read: self._read(read, line, place) for read in one.reads}
                line.arrivals.setdefault(place, []).append(self._arrival(one, places))

    def _arrival(self, one: Insertion, places: Mapping[OuterValue, int | str]) -> Arrival:
        css = self.colours.of(one.application, one.rule)
        elsewhere = {read: place for read, place in places.items() if isinstance(place, str)}
        here = {read: place for read, place in places.items() if isinstance(place, int)}
        return Arrival(one, css, Diagram(one, self.symbols, css, elsewhere), here)

    def _entry(self, one: Insertion) -> Station | None:
        """Return the station after its site if that carries its value, otherwise the one on the outermost line."""
        carrying = self.stations.of(one.value)
        after_site = self.stations.results.get(one.site)
        if after_site is not None:
            same = [station for station in carrying if station[0] is after_site[0]]
            if same:
                return same[-1]
        if carrying:
            return carrying[0]
        return after_site if one.owns else None

    def _inside(self, one: Insertion) -> SideBySide | None:
        """Return the parallel lines into whose core an insertion enters, if it enters between the core's operands and
        its result."""
        if one.site not in self.stations.cores or not one.reader or self.stations.upstream(one.value):
            return None
        line, place = self.stations.cores[one.site]
        element = line.elements[place - 1]
        return element if isinstance(element, SideBySide) else None

    def _base_value(self, value: str) -> str:
        """Return the base value that a value replaces."""
        return self.stands_for.get(value, value)

    def _read(self, read: OuterValue, line: Line, place: int) -> int | str:
        """Return the station of the line at which a value is read, or a label for a value that is elsewhere."""
        carrying = self.stations.of(self._base_value(read.value))
        here = [station for owner, station in carrying if owner is line and station <= place]
        return here[-1] if here else self._words(read)

    def _words(self, read: OuterValue) -> str:
        """Return the label of the box that computes a value, otherwise the value's name."""
        value = self._base_value(read.value)
        for line, place in self.stations.upstream(value):
            element = line.elements[place - 1] if place else None
            if isinstance(element, LabelledBox):
                return element.label
        label = self.stations.nodes[value].meta.get("label", read.value)
        return label.removeprefix(f"{self.stations.sites.layer}.")
