"""Applying passes: Program in, Program out.

All matches are collected and checked before anything is rewritten, so a pass never sees its own output.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TypeVar

import torch
from torch import fx, nn

from peftgraph.errors import Conflict, NoMatch, PeftGraphError, RecipeError
from peftgraph.ir.builder import ApplicationContext, Builder
from peftgraph.ir.edits import Edit, EditLog, Move
from peftgraph.ir.graphs import copy_graph
from peftgraph.ir.inputs_of_edits import with_inputs_of_edits
from peftgraph.ir.modes import written_buffers
from peftgraph.ir.ordering import in_canonical_order, infer_changed_values
from peftgraph.ir.program import AppliedPass, ProgramData
from peftgraph.ir.shape_inference import ShapeInference, fake_mode_of, guards_suppressed, same_metadata
from peftgraph.ir.tensor_names import TensorNames
from peftgraph.ir.tensor_table import TensorEntry, TensorTable
from peftgraph.ir.verifier import verify
from peftgraph.rewrite.checks import check_delta, check_join, check_values
from peftgraph.rewrite.joins import AddProduct
from peftgraph.rewrite.match import Match, match_all
from peftgraph.rewrite.method import Pass
from peftgraph.rewrite.rule import Rule
from peftgraph.rewrite.sequence.size_constraints import update_size_constraints
from peftgraph.rewrite.shared_weights import Use, enters_weight, uses
from peftgraph.sites import Columns, Site, Sites
from peftgraph.sites.ports import is_read_by_all

P = TypeVar("P", bound=ProgramData)
Windows = Mapping[tuple[str, str], Sequence[Columns]]


def apply(program: P, sites: Sites, methods: tuple[Pass, ...], dtype: torch.dtype | None = None) -> P:
    """Return the program with `methods` applied, in order. The input program is unchanged.

    Args:
        program: what to rewrite.
        sites: the sites of its base.
        methods: the passes.
        dtype: of new parameters; float32 on a base of half precision by default, else the base's own.

    Raises:
        NoMatch: a selector finds nothing.
        Conflict: two rewrites claim the same thing.
        RecipeError: an argument is no pass.
    """
    for method in methods:
        if not isinstance(method, Pass):
            raise RecipeError(f"apply() takes passes such as LoRA(rank=8), got {type(method).__name__}.")
        for atom in method.passes():
            program = _apply_one(program, sites, atom, dtype)
    return program


def _apply_one(program: P, sites: Sites, method: Pass, dtype: torch.dtype | None) -> P:
    verify(program, program)
    chosen = _chosen(program, sites, method)
    _check_conflicts(program, method, chosen)
    work = _Work.on(program, sites, method, dtype)
    for use in uses(program, chosen):
        work.rewrite(use)
    result = work.result(program)
    verify(result, program, work.common.inference)
    return result


def _chosen(program: ProgramData, sites: Sites, method: Pass) -> list[tuple[int, Rule, Site]]:
    """Return every rule of a pass with its sites, but those where the base already is what the rule would make of it.

    Raises:
        NoMatch: a rule that is not optional has none, or no rule has any.
    """
    chosen: list[tuple[int, Rule, Site]] = []
    satisfied = False
    rules = method.rules()
    for number, rule in enumerate(rules):
        check_join(str(method), rule.join)
        found = sites.select(rule.at) if rule.optional else sites.require(rule.at)
        matches = [m for m in match_all(program, sites, found) if rule.where is None or rule.where(m)]
        if not matches and not rule.optional:
            raise _none_left(method, rule, len(found))
        kept = [m.site for m in matches if rule.satisfied is None or not rule.satisfied(m)]
        satisfied |= len(kept) < len(matches)
        if rule.check is not None and kept:
            rule.check(kept)
        chosen += [(number, rule, site) for site in kept]
    if not chosen and not satisfied:
        raise _none_left(method, rules[0], len(sites.require(rules[0].at)))
    return chosen


def _none_left(method: Pass, rule: Rule, sites: int) -> NoMatch:
    return NoMatch(f"{method}: none of the {sites} sites at {rule.at} {rule.where_message}.")


def _check_conflicts(program: ProgramData, method: Pass, chosen: list[tuple[int, Rule, Site]]) -> None:
    """Refuse contradictions: one name for two adapters, one tensor trained or one value replaced twice."""
    for applied in program.history:
        if method.name and applied.name == method.name and applied.method.word == method.word:
            where = f" (at {chosen[0][2].id})" if chosen else ""
            raise Conflict(
                f"{method}{where} and {applied.method} are both a {method.word} called "
                f"{method.name!r}. Choose another name."
            )
    replaced = _replaced(program)
    for _, rule, site in chosen:
        if rule.delta is None:
            _check_trained(program, method, rule, site)
        elif rule.join.exclusive:
            key = (site.id, rule.join.port)
            if key in replaced:
                raise Conflict(
                    f"{method} and {replaced[key]} both replace the {rule.join.port} of {site.id}. Apply one of them."
                )
            replaced[key] = method


def _check_trained(program: ProgramData, method: Pass, rule: Rule, site: Site) -> None:
    """Refuse to train a tensor that trains already, unless both do so for adapters of different names."""
    for name in _own_names(site, rule):
        _check_stored(program, method, name, site)
        for edit in program.edits:
            other = program.history[edit.application]
            apart = method.name and other.name and method.name != other.name
            tied = program.table.tied(name)
            claimed = {*edit.parameters, *(stored for stored, _ in edit.installed)}
            if not apart and not claimed.isdisjoint(tied):
                raise Conflict(f"{method} and {other.method} both train {name} (at {site.id}). Apply one of them.")


def _check_stored(program: ProgramData, method: Pass, name: str, site: Site) -> None:
    """Refuse to train a tensor that is stored as codes."""
    how = program.table[name].quantised
    if how is not None:
        raise Conflict(
            f"{method} would train {name} (at {site.id}), which {how.made_by} stores as codes. Leave that site out, or "
            "train an adapter there, such as lora."
        )


def _replaced(program: ProgramData) -> dict[tuple[str, str], Pass]:
    """Return the passes that replaced a value, by site and port."""
    found: dict[tuple[str, str], Pass] = {}
    rules = [applied.method.rules() for applied in program.history]
    for edit in program.edits:
        join = rules[edit.application][edit.rule].join
        if edit.moves and join.exclusive:
            found[edit.site, join.port] = program.history[edit.application].method
    return found


def _own_names(site: Site, rule: Rule) -> list[str]:
    own = [site.weight and site.weight.parameter, site.scale, site.bias and site.bias.parameter]
    return [name for name in (own[2:] if rule.bias_only or site.role == "bias" else own) if name]


@dataclass
class _Work:
    """One application of one pass, on a copy of the graph."""

    method: Pass
    sites: Sites
    application: int
    graph: fx.Graph
    names: dict[str, fx.Node]
    edits: EditLog
    entries: dict[str, TensorEntry]
    taken: TensorNames
    program: ProgramData
    common: ApplicationContext
    dtype: torch.dtype | None = None
    _made: dict[Use, Builder] = field(default_factory=dict)
    _installed: set[str] = field(default_factory=set)

    @classmethod
    def on(cls, program: ProgramData, sites: Sites, method: Pass, dtype: torch.dtype | None) -> _Work:
        graph = copy_graph(program.graph)
        makers = {name: str(program.history[e.application].method) for e in program.edits for name in e.parameters}
        taken = TensorNames({name: makers.get(name, "the model itself") for name in program.table})
        names = {node.name: node for node in graph.nodes}
        common = ApplicationContext(
            f"{method.word}.{method.name}" if method.name else method.word,
            ShapeInference(fake_mode_of(graph)),
            cache_inputs=(program.base or program).signature.cache_inputs,
            signature=program.signature if program.enclosing_model is None else None,
            inputs={
                one.name: (one, str(program.history[e.application].method)) for e in program.edits for one in e.inputs
            },
        )
        edits = EditLog(program.edits)
        return cls(method, sites, len(program.history), graph, names, edits, {}, taken, program, common, dtype)

    def rewrite(self, use: Use) -> None:
        number, rule, site = use.number, use.rule, use.site
        history = (*self.program.history, AppliedPass(self.method, dtype=self.dtype))
        match = Match(site, self.sites, self.graph, self.program.table, self.edits, self.names, history=history)
        match = replace(match, example=self.program.examples, nesting_of_rule=rule.nesting)
        match = replace(match, calibration=self.program.statistics)
        at_weight = isinstance(rule.join, AddProduct) and (use.at_weight or enters_weight(rule, site))
        match = replace(match, at_weight=at_weight, transposed=use.transposed)
        if rule.delta is not None:
            edit = self._insert(use, match)
        elif self.method.name:
            edit = self._install(number, rule, match)
        else:
            edit = self._train(number, rule, match)
        if edit is not None:
            self.edits.append(edit)

    def _train(self, number: int, rule: Rule, match: Match) -> Edit | None:
        """Make the site's own parameters trainable: copies, so that the base keeps its values."""
        claimed: list[str] = []
        for view in match.own_parameters(rule.bias_only):
            group = self.program.table.tied(view.parameter)
            if view.parameter in self.entries:
                continue  # one tensor at several sites is claimed once
            entry = self.program.table[view.parameter]
            copy = nn.Parameter(entry.tensor.detach().clone())
            for name in group:
                known = self.program.table[name]
                self.entries[name] = replace(known, tensor=copy, trainable=True, base_tensor=known.tensor)
                claimed.append(name)
        return Edit(self.application, number, match.site.id, (), (), tuple(claimed)) if claimed else None

    def _install(self, number: int, rule: Rule, match: Match) -> Edit | None:
        """Replace the site's own parameters by trainable copies, which belong to one named adapter among others."""
        builder = self._builder(match, rule)
        moves: list[Move] = []
        installed: list[tuple[str, str]] = []
        for view in match.own_parameters(rule.bias_only):
            name = self.program.table.tied(view.parameter)[0]
            if name in self._installed:
                continue  # one tensor at several sites is installed once
            self._installed.add(name)
            entry = self.program.table[name]
            stored = entry.tensor if entry.base_tensor is None else entry.base_tensor
            builder.adapter_dtype = stored.dtype
            new = builder.param(name.rpartition(".")[2], stored.shape, lambda value, old=stored: value.copy_(old))
            installed.append((name, str(new.target)))
            for i, port in enumerate(match.ports_of_stored(name)):
                value = builder.call(torch.ops.aten.alias.default, new) if i else new  # one for each name of a tie
                moves.append(self._redirect(match, port, match.raw_value(port), value, builder))
        if not installed:
            return None
        self._keep(builder)
        nodes = tuple(node.name for node in builder.nodes)
        parameters = tuple(parameter for _, parameter in installed)
        return Edit(
            self.application, number, match.site.id, tuple(moves), nodes, parameters, installed=tuple(installed)
        )

    def _insert(self, use: Use, match: Match) -> Edit:
        rule = use.rule
        assert rule.delta is not None
        builder = self._builder(match, rule)
        leader = None if use.leader is None else self._made[use.leader]
        if leader is not None:
            builder.owner, builder.shared_parameters = leader.owner, leader.entries
        match = replace(match, builder=builder)
        # A rule that takes a symbol for a number fixes it for no other.
        with guards_suppressed(self.common.inference.mode):
            delta = check_delta(builder.pass_spec, match, rule.delta(match, builder))
            count = len(builder.nodes)
            combined = rule.join.combine(match, builder, delta)
            values = check_values(builder.pass_spec, match, rule.join, combined)
        self._made[use] = builder
        moves: list[Move] = []
        resized: list[fx.Node] = []
        for port, new in values.items():
            old = match.raw_value(port)
            new = match.features_back(builder, new)
            if isinstance(old.meta["val"], torch.Tensor):  # parameters may be wider than the base
                new = builder.in_dtype_of(new, old)
            moves.append(self._redirect(match, port, old, new, builder))
            if not same_metadata(old.meta["val"], new.meta["val"]) or _are_other_sizes(
                old.meta["val"], new.meta["val"]
            ):
                resized.append(new)
        stretched = tuple(builder.size_increases)
        self._refresh(match, resized, {self.names[one.node] for one in stretched})
        self._keep(builder)
        nodes = tuple(node.name for node in builder.nodes)
        made = {name: entry for name, entry in builder.entries.items() if entry.quantised is None}
        parameters = tuple(name for name, entry in made.items() if entry.kind == "parameter")
        return Edit(
            self.application,
            use.number,
            match.site.id,
            tuple(moves),
            nodes,
            parameters,
            stretched,
            join_nodes=frozenset(nodes[count:]),
            disabled_writes=tuple(builder.disabled_writes),
            quantised=tuple(builder.quantised),
            narrowed=tuple(builder.narrowed),
            rewritten=tuple(builder.rewritten),
            cached=tuple(builder.cached),
            inputs=tuple(builder.inputs),
        )

    def _keep(self, builder: Builder) -> None:
        """Record the nodes and parameters that a builder made."""
        self.names.update({node.name: node for node in builder.nodes})
        self.entries.update(builder.entries)

    def _refresh(self, match: Match, resized: list[fx.Node], stretched: set[fx.Node]) -> None:
        """Infer the values again that depend on values whose shapes changed."""
        try:
            infer_changed_values(self.graph, resized, self.common.inference, stretched)
        except RuntimeError as error:  # what torch says of sizes that do not fit
            raise PeftGraphError(
                f"{self.method} at {match.site.id} makes sizes that the model does not take, with the example that it "
                f"was traced with: {error} If the model has too few positions, add fewer or trace a shorter example."
            ) from None

    def _redirect(self, match: Match, port: str, old: fx.Node, new: fx.Node, builder: Builder) -> Move:
        anchor = match.anchor(port)
        if not is_read_by_all(port):
            self.names[match.reader(port)].replace_input_with(old, new)
            return Move(anchor, match.nesting, new.name, 1)
        uses = builder.redirect(old, new, keep=builder.pinned_users.union(builder.nodes))
        return Move(anchor, match.nesting, new.name, uses)

    @cached_property
    def _kind(self) -> tuple[torch.dtype, torch.dtype, torch.device]:
        """The dtype of the base, and the dtype and device of new parameters; finding them takes a look at the whole
        table."""
        base = self.program.table.dtype
        return base, self.dtype or torch.promote_types(base, torch.float32), self.program.table.device

    @cached_property
    def _windows(self) -> Windows:
        """The parts of each stored weight that play one role, such as the queries of two attentions in one matrix."""
        found: dict[tuple[str, str], list[Columns]] = {}
        for site in self.sites:
            if site.weight is not None and site.columns is not None:
                windows = found.setdefault((site.weight.parameter, site.role), [])
                if site.columns not in windows:
                    windows.append(site.columns)
        return found

    def _builder(self, match: Match, rule: Rule) -> Builder:
        word = f"{self.method.word}.{self.method.name}" if self.method.name else self.method.word
        ports = ("weight" if match.at_weight else rule.join.port, "output", "weight")
        place = match.raw_value(next(port for port in ports if match.has(port)))
        dtype, adapter_dtype, device = self._kind
        return Builder(
            graph=self.graph,
            site=match.site.id,
            word=word,
            owner=owner_path(match.site, self.method, self._windows),
            dtype=dtype,
            adapter_dtype=adapter_dtype,
            device=device,
            tensor_names=self.taken,
            pass_spec=str(self.method),
            order=(place.meta["order"][0], self.application, len(self.edits)),
            cursor=place,
            context=self.common,
        )

    def result(self, program: P) -> P:
        changed = program.evolve(
            graph=in_canonical_order(self.graph),
            table=_with_state(program.table, self.graph).updated(self.entries),
            edits=tuple(self.edits),
            history=(*program.history, AppliedPass(self.method, self.method.name, self.dtype)),
        )
        return update_size_constraints(with_inputs_of_edits(changed))


def _with_state(table: TensorTable, graph: fx.Graph) -> TensorTable:
    """Return the table with copies of the buffers that training writes, since these belong to the adapted program."""
    copies: dict[int, torch.Tensor] = {}
    state: dict[str, TensorEntry] = {}
    for name in written_buffers(graph):
        entry = table[name]
        if entry.kind == "buffer" and entry.base_tensor is None and not entry.added:
            copy = copies.setdefault(id(entry.tensor), entry.tensor.detach().clone())
            state |= {one: replace(table[one], tensor=copy, base_tensor=entry.tensor) for one in table.tied(name)}
    return table.updated(state)


def _are_other_sizes(a: object, b: object) -> bool:
    return isinstance(a, torch.SymInt) and isinstance(b, torch.SymInt) and str(a) != str(b)


def owner_path(site: Site, method: Pass, windows: Windows) -> str:
    """Return the dotted prefix of the parameters made at a site.

    It is the path of the site's weight, with the role inside a fused weight, and the name of the pass if it has one. A
    sublayer shares its path with others, so its parameters are in a module of their own: `blocks.0.ffn_adapter`.
    """
    path, role = site.path, site.role.rpartition(".")[2]
    if site.weight is None and site.bias is not None and site.bias.parameter == path:
        path = f"{path}_{method.word}"  # a module beside the bias
    elif site.weight is None:
        kind = "cross_" if site.kind == "cross" else ""
        path = f"{path}.{kind}{site.role.replace('.', '_')}_{method.word}".lstrip(".")
    elif not site.weight.parameter.endswith(".weight") or path == site.weight.parameter:
        path = f"{site.weight.parameter}_{role}"  # a bare parameter (stacked experts): a module beside it
    elif site.columns is not None:
        own = windows[site.weight.parameter, site.role]
        path = f"{path}.{role}{own.index(site.columns) if len(own) > 1 else ''}"
    return f"{path}.{method.name}" if method.name else path
