"""Folds edits back into the weights, innermost first, until none is left that can be folded.

An edit of a projection's output folds once no unfolded edit lies between it and the projection; a scale of the value
that enters a projection folds once that projection is its only reader. Each fold removes its edit from the graph, which
may make the next one foldable.
"""

from __future__ import annotations

from collections import ChainMap, Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TypeVar

import torch
from torch import fx

from peftgraph.folding.aliasing import AliasCheck
from peftgraph.folding.components import Component, components, stored_tensor
from peftgraph.folding.linear_form import LinearForm
from peftgraph.folding.steps import AcceptTrained, InstallTrained, Step, WriteWindows
from peftgraph.ir.builder import erase_nodes
from peftgraph.ir.edits import Anchor, Edit, EditLog
from peftgraph.ir.graphs import copy_graph
from peftgraph.ir.inputs_of_edits import with_inputs_of_edits
from peftgraph.ir.ordering import canonically_ordered
from peftgraph.ir.program import AppliedPass, ProgramData
from peftgraph.ir.tensor_table import TensorTable
from peftgraph.rewrite.count import short_params
from peftgraph.rewrite.joins import Add, AddProduct
from peftgraph.rewrite.match import Match
from peftgraph.rewrite.remove import undo
from peftgraph.rewrite.rule import Rule
from peftgraph.rewrite.weight_views import View, bias_view, rows_view, scale_view, weight_view
from peftgraph.sites import Site, Sites, Weight

aten = torch.ops.aten
P = TypeVar("P", bound=ProgramData)

# The operations between a scaled hidden value and the projection that reads it: a scale of features commutes with them.
TRANSPARENT = {
    aten.dropout.default,
    aten.to.dtype,
    aten.to.device,
    aten.view.default,
    aten.reshape.default,
    aten.contiguous.default,
}


@dataclass
class Folding:
    """Runs the engine over a program, which stays unchanged.

    Attributes:
        program: what is folded.
        sites: of its base.
        untie: a tied weight that must change gets a tensor of its own.
        changed: the changed windows, by parameter; known once `result` has computed the new values.
        reasons: for each edit that is left, `site: pass: reason`.
        steps: of the fold, in order.
    """

    program: ProgramData
    sites: Sites
    untie: bool = False
    changed: dict[str, list[View]] = field(default_factory=dict)
    reasons: list[str] = field(default_factory=list)
    steps: list[Step] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.graph: fx.Graph = copy_graph(self.program.graph)
        self.edits: EditLog = EditLog(self.program.edits)
        self._rules: list[list[Rule]] = [applied.method.rules() for applied in self.program.history]
        self._names: dict[str, fx.Node] = {node.name: node for node in self.graph.nodes}
        self._by_id: dict[str, Site] = {site.id: site for site in self.sites}
        self._sharing = AliasCheck(self.program, self.graph, self.sites, self.untie)
        self._form = LinearForm(self.program)
        self._multiplied: dict[Weight | None, set[str]] = {}
        for site in self.sites:
            if site.role != "ffn.hidden":
                self._multiplied.setdefault(site.weight, set()).add(site.op)
        self._groups: dict[tuple[object, ...], list[Edit]] = {}
        for edit in self.program.edits:
            self._groups.setdefault(self._key(edit), []).append(edit)
        self._uses = Counter(name for edit in self.edits for name in edit.parameters)
        self._gone: set[str] = set()
        edits = self.program.edits
        self._makers: dict[str, View | None] = {name: self._window(e) for e in edits for name in e.nodes}

    def run(self) -> Folding:
        """Fold until no edit is left that can be folded; return itself."""
        progress = True
        while progress:
            progress = False
            self.reasons = []
            for edit in list(self.edits):
                if edit not in self.edits:
                    continue  # folded together with another
                reason = self._reason(edit)
                if reason is None:
                    self._fold(edit)
                    progress = True
                else:
                    self.reasons.append(f"{edit.site}: {self._pass_word(edit)}: {reason}")
        return self

    def _rule(self, edit: Edit) -> Rule:
        """Return the rule that made an edit."""
        return self._rules[edit.application][edit.rule]

    def _key(self, edit: Edit) -> tuple[object, ...]:
        """Return a key shared by edits that fold together: edits of one rule at the uses of one weight, which share
        their parameters, and edits of a pass that trains the rows of a table."""
        rule = self._rule(edit)
        if rule.table_rows is not None:
            return (edit.application,)
        site = self._by_id[edit.site]
        weight = site.weight and (self.program.table.tied(site.weight.parameter)[0], site.weight.window)
        return (edit.application, edit.rule, edit.parameters, weight or edit.site)

    def _group(self, edit: Edit) -> list[Edit]:
        """Return the edits that fold together with one, itself included."""
        return self._groups[self._key(edit)]

    # Checks: may an edit fold?

    def _reason(self, edit: Edit) -> str | None:
        """Return why an edit does not fold now; None when it does."""
        rule = self._rule(edit)
        if isinstance(rule.fold, str):
            return rule.fold
        if not edit.moves:
            return None
        if self._is_coded(edit):
            return "its weight is stored as codes, which hold no change exactly"
        group = self._group(edit)
        for one in group:
            blocked = self._blocked(one)
            if blocked is not None:
                return blocked
        site = self._by_id[edit.site]
        if edit.installed or rule.training_only:
            return None
        if site.weight is not None and site.weight.computed is not None:
            return (
                f"the weight at {site.path} is computed from {site.weight.parameter} and what stands beside it. "
                "Remove the parametrisation from the model before it is traced "
                "(torch.nn.utils.parametrize.remove_parametrizations), or keep the pass"
            )
        makers = ChainMap[str, View | None](dict.fromkeys(name for one in group for name in one.nodes), self._makers)
        return self._form_reason(group, makers) or self._sharing_reason(group, makers)

    def _is_coded(self, edit: Edit) -> bool:
        """Check whether an edit would change a weight that is stored as codes."""
        weight = self._by_id[edit.site].weight
        writes = not edit.installed and not self._rule(edit).training_only
        return writes and weight is not None and self.program.table[weight.parameter].quantised is not None

    def _form_reason(self, group: Sequence[Edit], makers: Mapping[str, View | None]) -> str | None:
        """Return why a change of a weight, or of a bias, is no change of its site's output alone; None when it is.

        An edit of the weight itself needs no such check.
        """
        adders = {name for one in group for name in self._form.adders(self._by_id[one.site])}
        for one in group:
            site, rule = self._by_id[one.site], self._rule(one)
            if self._at_weight(one):
                continue
            reason = self._form.weight_reason(site)
            if reason is None and rule.table_rows is None and not self._reads(one, site):
                reason = self._addend_reason(one, site, makers, adders)
            if reason is not None:
                return reason
        return None

    def _sharing_reason(self, group: Sequence[Edit], makers: Mapping[str, View | None]) -> str | None:
        """Return what else reads a tensor that would change; None where nothing does."""
        edit = group[0]
        view, site = self._window(edit), self._by_id[edit.site]
        if len(group) == 1 and self._rule(edit).table_rows is None:
            readers = self._multiplied[site.weight] if self._reads(edit, site) else {site.op}
            return self._sharing.reason(view, makers, readers)
        assert view is not None
        return self._sharing.joint_reason(view, [self._by_id[one.site].op for one in group], makers)

    def _addend_reason(
        self, edit: Edit, site: Site, makers: Mapping[str, View | None], adders: Collection[str]
    ) -> str | None:
        """Return why the bias of a site prevents a fold that changes, or reads, more than the product; None if it does
        not."""
        view = bias_view(site)
        if view is None:
            added = self._form.unknown_addend(site)
            return None if self._only_adds(edit, site) else added
        reason = self._form.bias_reason(site)
        reason = reason or self._sharing.bias_reason(view, weight_view(site), makers, adders)
        return reason if reason is not None and view.parameter in self._touched(edit) else None

    def _only_adds(self, edit: Edit, site: Site) -> bool:
        """Check whether an edit adds to a site's output a value that does not depend on that output."""
        output = site.ports.get("output", site.op)
        values = {output, *(move.after for move in self.edits.moves_at(output))}
        return isinstance(self._rule(edit).join, Add | AddProduct) and self._read_by(edit).isdisjoint(values)

    def _touched(self, edit: Edit) -> set[str]:
        """Return the stored tensors that an edit's fold reads or writes."""
        step = self._step(edit)
        assert isinstance(step, WriteWindows)
        return step.touched_tensors(self._shapes)

    @cached_property
    def _shapes(self) -> TensorTable:
        """The program's table on the meta device."""
        table = self.program.table
        return TensorTable((n, replace(e, tensor=torch.empty_like(e.tensor, device="meta"))) for n, e in table.items())

    def _reads(self, edit: Edit, site: Site) -> bool:
        """Check whether an edit changes the input of its site's weight."""
        return site.role == "ffn.hidden" or _at_input(edit)

    def _at_weight(self, edit: Edit) -> bool:
        """Check whether an edit changes the weight itself, for all its readers."""
        site = self._by_id[edit.site]
        stored = all(self._names[move.anchor.value].op == "get_attr" for move in edit.moves)
        return stored or (isinstance(self._rule(edit).join, AddProduct) and not _at_output(edit, site))

    def _blocked(self, edit: Edit) -> str | None:
        """Return what is between an edit and its weight; None if nothing."""
        site = self._by_id[edit.site]
        return self._reader_reason(edit, site) if self._reads(edit, site) else self._order_reason(edit, site)

    def _window(self, edit: Edit) -> View | None:
        """Return the window of its site's weight that an edit's fold may change."""
        site, rows = self._by_id[edit.site], self._rule(edit).table_rows
        own = weight_view(site) or scale_view(site) or bias_view(site)
        return own if rows is None else rows_view(site, rows)

    def _order_reason(self, edit: Edit, site: Site) -> str | None:
        """Return what is between an edit and its projection on the same columns; None if nothing."""
        for move, other in self.edits.moves_into(site.op).items():
            if any(self._names[self.edits.predecessor(move)] in self._inputs(name) for name in edit.nodes):
                return f"its projection reads what {self._pass_word(other)} changed, which it does not read itself"
        for move in edit.moves:
            line = self.edits.chain(move.anchor)
            for earlier in line[: line.index(move)]:
                other = self.edits.owner(earlier)
                if _share_columns(self._by_id[other.site], site) and not self._commutes(edit, other, move.anchor):
                    return f"it stands on {self._pass_word(other)}, which is not folded"
        return None

    def _commutes(self, edit: Edit, earlier: Edit, anchor: Anchor) -> bool:
        """Check whether an edit may fold before an earlier one at the same value: both only add to that value, and
        neither depends on it or on the result of the other."""
        joins = [self._rule(one).join for one in (edit, earlier)]
        if not all(isinstance(join, Add | AddProduct) for join in joins):
            return False
        results = {move.after for move in self.edits.chain(anchor)}
        return self._read_by(edit).isdisjoint(results) and self._read_by(earlier).isdisjoint({anchor.value, *results})

    def _read_by(self, edit: Edit) -> set[str]:
        """Return the names of the values that the delta of an edit reads."""
        made = [name for name in edit.nodes if name not in edit.join_nodes]
        return {operand.name for name in made for operand in self._inputs(name)}

    def _reader_reason(self, edit: Edit, site: Site) -> str | None:
        """Return what else reads a scaled value; None where only its site's projection does."""
        own = self._multiplied[site.weight]
        for reader in _readers(self._names[edit.moves[0].after]):
            if reader.name not in own:
                return f"the scaled value is also read by %{reader.meta.get('label', reader.name)}, which is not folded"
        return None

    def _inputs(self, name: str) -> list[fx.Node]:
        return self._names[name].all_input_nodes

    # Folding one edit.

    def _fold(self, edit: Edit) -> None:
        """Fold an edit, with those of its group, and remove them from the graph."""
        group = self._group(edit) if edit.moves else [edit]
        self.steps.append(self._step(group[0]))
        for one in reversed(group):
            if one.moves:
                undo(self.graph, self._names, self.edits, one)
            self.edits.remove(one)
            self._uses.subtract(one.parameters)
        gone = [
            name for name in group[0].parameters if self.program.table[name].added and not self._uses[name]
        ]  # not shared
        self._gone.update(gone)

    def _step(self, edit: Edit) -> Step:
        """Return the step that folds an edit."""
        if not edit.moves or self._rule(edit).training_only:
            return AcceptTrained(edit.parameters)
        if edit.installed:
            return InstallTrained(dict(edit.installed))
        site, rule = self._by_id[edit.site], self._rule(edit)
        at_weight = self._at_weight(edit)
        match = Match(site, self.sites, self.graph, self.program.table, self.edits, self._names, at_weight=at_weight)
        joint = at_weight or rule.table_rows is not None or len(self._group(edit)) > 1
        return WriteWindows(match, rule, short_params(edit), joint)

    # The result.

    @cached_property
    def components(self) -> list[Component]:
        """The groups of steps that share tensors; the engine must have run."""
        return components(self.program, self.steps, lambda step: step.touched_tensors(self._shapes))

    def result(self, program: P) -> P:
        """Return the folded program; changed weights are rounded once, to the stored dtype."""
        table = self.program.table.without(self._gone)
        self.changed = {}
        for component in self.components:
            entries, written = component.new_entries(lambda name: stored_tensor(program, name).dtype)
            table = table.updated(entries)
            self.changed |= written
        if not len(self.edits):
            table = table.updated({name: replace(table[name], base_tensor=None) for name in table.state})
        erase_nodes(self.graph, _unread(self.graph, table.quantised))
        used = {str(node.target) for node in self.graph.nodes if node.op == "get_attr"}
        table = table.without(name for name, entry in table.items() if entry.added and name not in used)
        history, edits = _without_folded(program, self.edits)
        graph = canonically_ordered(self.graph)
        return with_inputs_of_edits(program.evolve(graph=graph, table=table, edits=edits, history=history))

    # For the proof.

    def exact(self, folded: P) -> P:
        """Return the result with the new values in float64, not rounded."""
        table = folded.table
        for component in self.components:
            values, written = component.whole(torch.float64)
            table = table.updated({n: replace(table[n], tensor=values[n].tensor) for n in written if n in table})
        return folded.evolve(table=table)

    @property
    def trained_rows(self) -> tuple[int, ...]:
        """The numbers of the rows of tables that the fold changes alone."""
        rules = [step.rule for step in self.steps if isinstance(step, WriteWindows)]
        return tuple(dict.fromkeys(row for rule in rules for row in rule.table_rows or ()))

    def reads(self, edit: Edit) -> bool:
        """Check whether an edit changes the input of its site's weight."""
        return self._reads(edit, self._by_id[edit.site])

    def readers(self, edit: Edit, anchor: Anchor) -> tuple[str, ...]:
        """Return the operators that multiply an input which an edit changes by a weight.

        Args:
            edit: changes the input of its site's weight.
            anchor: where it does.
        """
        if anchor.reader is not None:
            return (anchor.reader,)
        return tuple(sorted(self._multiplied[self._by_id[edit.site].weight]))

    def outputs(self, operator: str) -> set[str]:
        """Return the values that an operator gives the sites that are computed by it, with and without a bias."""
        return {operator, *self._outputs.get(operator, ())}

    @cached_property
    def _outputs(self) -> dict[str, set[str]]:
        found: dict[str, set[str]] = {}
        for site in self.sites:
            found.setdefault(site.op, set()).add(site.ports.get("output", site.op))
        return found

    def _pass_word(self, edit: Edit) -> str:
        return self.program.history[edit.application].method.word


def _readers(node: fx.Node) -> list[fx.Node]:
    """Return the nodes that read a value, directly or through operations that a scale of features commutes with."""
    found: list[fx.Node] = []
    for user in node.users:
        found += _readers(user) if user.target in TRANSPARENT else [user]
    return found


def _at_input(edit: Edit) -> bool:
    """Check whether an edit changes the input of one operator, and not a site's output."""
    return any(move.anchor.reader is not None for move in edit.moves)


def _at_output(edit: Edit, site: Site) -> bool:
    """Check whether an edit changes a site's output, and not its weight."""
    return any(move.anchor == Anchor(site.ports.get("output", "")) for move in edit.moves)


def _share_columns(a: Site, b: Site) -> bool:
    if a.columns is None or b.columns is None:
        return True
    return not set(a.columns).isdisjoint(b.columns)


def _unread(graph: fx.Graph, coded: Collection[str]) -> list[fx.Node]:
    """Return the nodes of stored tensors that only an edit read; not of those in whose place codes are read."""
    unread = [node for node in graph.nodes if node.op == "get_attr" and not node.users]
    return [node for node in unread if "origin" in node.meta or str(node.target) not in coded]


def _without_folded(program: ProgramData, edits: EditLog) -> tuple[tuple[AppliedPass, ...], tuple[Edit, ...]]:
    """Return the history and the edits without passes that are folded completely."""
    alive = sorted({edit.application for edit in edits})
    index = {old: new for new, old in enumerate(alive)}
    return tuple(program.history[i] for i in alive), tuple(replace(e, application=index[e.application]) for e in edits)
