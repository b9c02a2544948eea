"""One weight at several places: its uses take one adapter, which they share.

A block that is called twice, the towers of a bi-encoder and the layers of ALBERT are sites of one weight, and so are
an embedding and its tied head. Where a rule is put on several of them, the first makes the parameters and the others
read the same ones. Where they multiply in ways for which no path beside them is the same, the weight itself changes.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass

from peftgraph.errors import Conflict
from peftgraph.ir.graphs import stored_tensor_nodes
from peftgraph.ir.program import ProgramData
from peftgraph.ir.tensor_table import TensorTable
from peftgraph.rewrite.joins import AddProduct
from peftgraph.rewrite.rule import Rule
from peftgraph.rewrite.weight_readers import readers
from peftgraph.sites import Site

Chosen = tuple[int, Rule, Site]


@dataclass(frozen=True, eq=False)
class Use:
    """A site that a rule is put on.

    Attributes:
        number: of the rule in its pass.
        rule: the rule.
        site: the site.
        leader: the use whose parameters this one shares.
        at_weight: whether a change of the weight enters the weight itself.
        transposed: whether the site multiplies by the transpose of what the leader multiplies by, as a head does by
            the table of its tied embedding.
    """

    number: int
    rule: Rule
    site: Site
    leader: Use | None = None
    at_weight: bool = False
    transposed: bool = False


def uses(program: ProgramData, chosen: Sequence[Chosen]) -> Iterator[Use]:
    """Yield the uses to rewrite, in order; of sites whose weight changes as a whole, only the first.

    Raises:
        Conflict: a tensor that is read in several ways would change for some of its readers only.
    """
    mixed = _mixed(program.table, chosen)
    leaders: dict[Hashable, Use] = {}
    for number, rule, site in _each_value_once(program.table, chosen):
        window = (number, _window(program.table, site))
        if window in mixed and isinstance(rule.join, AddProduct):
            if window not in leaders:
                leaders[window] = Use(number, rule, site, at_weight=True)
                _check_readers(program, leaders[window], mixed[window])
                yield leaders[window]
            continue
        if isinstance(rule.join, AddProduct) and enters_weight(rule, site):
            _check_readers(program, Use(number, rule, site), [site])
        key = window if isinstance(rule.join, AddProduct) else (number, _identity(program.table, site))
        leader = leaders.get(key) if _is_shared(rule, site) else None
        use = Use(number, rule, site, leader, transposed=leader is not None and _turned(site) != _turned(leader.site))
        leaders.setdefault(key, use)
        yield use


def enters_weight(rule: Rule, site: Site) -> bool:
    """Tell whether a change of a site's weight enters the weight itself, whoever else reads it."""
    return site.form == "weight" or (isinstance(rule.join, AddProduct) and rule.join.into_weight)


def _each_value_once(table: TensorTable, chosen: Sequence[Chosen]) -> Iterator[Chosen]:
    """Yield the sites, but each value of a weight once: a projection may be the queries of one attention and the keys
    of another."""
    seen: set[Hashable] = set()
    for number, rule, site in chosen:
        value = (number, site.op, _window(table, site), site.port_items if site.role == "ffn.hidden" else None)
        if site.weight is None or rule.delta is None or value not in seen:
            yield number, rule, site
        seen.add(value)


def _is_shared(rule: Rule, site: Site) -> bool:
    """Tell whether the uses of one part share the parameters of a rule. All rules do, except those that prepend rows to
    embedded tokens: such rows belong to one sequence, for example the encoder's or the decoder's."""
    return rule.delta is not None and not (site.role == "embedding" and isinstance(rule.fold, str))


def _mixed(table: TensorTable, chosen: Sequence[Chosen]) -> dict[Hashable, list[Site]]:
    """Return the sites whose windows of weights can only change for all of them at once, by rule and window."""
    groups: dict[Hashable, list[Site]] = {}
    rules: dict[Hashable, AddProduct] = {}
    for number, rule, site in chosen:
        if isinstance(rule.join, AddProduct) and site.weight is not None:
            groups.setdefault((number, _window(table, site)), []).append(site)
            rules[number, _window(table, site)] = rule.join
    return {key: found for key, found in groups.items() if _is_mixed(rules[key], found)}


def _is_mixed(join: AddProduct, found: Sequence[Site]) -> bool:
    """Tell whether no computation on the sites' outputs could use the same parameters at all of them."""
    if len(found) < 2:
        return False
    axes = {site.weight and site.weight.axes for site in found}
    turned = not join.turns and len({_turned(site) for site in found}) > 1
    return turned or join.into_weight or len(axes) > 1 or any(site.form == "weight" for site in found)


def _turned(site: Site) -> bool:
    return site.weight is not None and site.weight.transposed


def _window(table: TensorTable, site: Site) -> Hashable:
    """Return the part of a stored tensor that a site multiplies by; the experts of a stack are separate parts."""
    weight = site.weight
    return None if weight is None else (table.tied(weight.parameter)[0], weight.computed, weight.window, site.expert)


def _identity(table: TensorTable, site: Site) -> Hashable:
    """Return a key that two sites share if they are one part of the model, used twice; a site's own id by default."""
    if site.weight is not None:
        return site.role, site.kind, _window(table, site)
    tensors = [*site.reads, *([site.scale] if site.scale else []), *([site.bias.parameter] if site.bias else [])]
    own = tuple(table.tied(name)[0] for name in tensors)
    return (site.role, site.kind, own) if own else site.id


def _check_readers(program: ProgramData, use: Use, together: Sequence[Site]) -> None:
    """Refuse a change of a weight that a site outside the chosen ones also reads. All readers of a stored matrix that
    belong to no other site, such as a slice of a position table that is added, count as one site."""
    weight, chosen = use.site.weight, {site.op for site in together}
    assert weight is not None
    whole = {site.weight.parameter for site in together if site.weight is not None and site.role == "matrix"}
    chosen |= {one.name for one in readers(node for node in stored_tensor_nodes(program.graph) if node.target in whole)}
    if weight.computed is not None:
        read = [program.node(weight.computed)]
    else:
        names = program.table.tied(weight.parameter)
        read = [
            node for node in stored_tensor_nodes(program.graph) if node.target in names and "origin" not in node.meta
        ]
    for reader in readers(read):
        if "origin" not in reader.meta and reader.name not in chosen:
            raise Conflict(
                f"A change of {weight.parameter} at {use.site.id} enters the stored tensor itself, and "
                f"%{reader.meta.get('label', reader.name)} reads that too. Choose all the places that read it, or one "
                "that can be changed by itself."
            )
