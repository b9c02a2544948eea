"""Runs batches through a program and collects statistics at sites, with memory for a few matrices of each site."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from peftgraph.errors import PeftGraphError
from peftgraph.ir.interpreter import run_in_mode
from peftgraph.ir.modes import DROPOUTS
from peftgraph.ir.program import ProgramData
from peftgraph.ir.site_statistics import SiteStatistics, Statistic
from peftgraph.rewrite.match import match_all
from peftgraph.rewrite.weight_views import weight_view
from peftgraph.sites import Site, Sites

Loss = Callable[[Any], Tensor]
BY_INPUTS: set[Statistic] = {"covariance", "activations"}
BY_GRADIENTS: set[Statistic] = {"gradient", "fisher"}


def collect_statistics(
    program: ProgramData,
    sites: Sites,
    wanted: Mapping[Site, set[Statistic]],
    batches: Iterable[Mapping[str, Any]],
    net: nn.Module,
    loss: Loss | None,
    samples: int,
) -> dict[str, SiteStatistics]:
    """Return statistics by site.

    Args:
        program: in evaluation mode.
        sites: of its base.
        wanted: the sites, with what is to be known of each.
        batches: keyword arguments of the module.
        net: the program's module.
        loss: of the module's output; by default its own.
        samples: how many inputs of a site are kept as activations.

    Raises:
        PeftGraphError: there are no batches, no loss, or a site has no inputs of features.
    """
    inputs = {site: _InputStatistics(site, needs, samples) for site, needs in wanted.items() if needs & BY_INPUTS}
    gradients = {site: _GradientStatistics(site) for site, needs in wanted.items() if needs & BY_GRADIENTS}
    by_node: dict[str, list[_InputStatistics]] = {}
    for match in match_all(program, sites, inputs):
        by_node.setdefault(_in_evaluation(match.raw_value("input")).name, []).append(inputs[match.site])
    count = 0
    for batch in batches:
        count += 1
        if inputs:
            _observe_inputs(program, batch, by_node)
        if gradients:
            _observe_gradients(net, batch, gradients, loss)
    if not count:
        raise PeftGraphError("There are no batches to calibrate with.")
    return {site.id: _statistics(inputs.get(site), gradients.get(site), needs, count) for site, needs in wanted.items()}


class _InputStatistics:
    """The inputs of one site as they come: their sum of x x^T, and a reservoir of rows."""

    def __init__(self, site: Site, needs: set[Statistic], samples: int) -> None:
        if site.shape is None or site.role == "embedding" or (site.weight is not None and site.weight.experts):
            raise PeftGraphError(f"{site} has no input of features that all its rows share; choose plain projections.")
        self.site, self.needs, self.samples = site, needs, samples
        self.rows = 0
        self.total_II: Tensor | None = None
        self.kept: list[Tensor] = []
        self.stream = torch.Generator().manual_seed(0)

    def add(self, value: Tensor) -> None:
        """Add the inputs of one call."""
        x_NI = value.movedim(self.site.feature_axis, -1).reshape(-1, value.shape[self.site.feature_axis])
        wide = x_NI.to(torch.promote_types(x_NI.dtype, torch.float32))
        if "covariance" in self.needs:
            product = wide.mT @ wide
            self.total_II = product if self.total_II is None else self.total_II + product
        if "activations" in self.needs:
            for row in wide:
                self._keep(row)
        else:
            self.rows += len(wide)

    def _keep(self, row: Tensor) -> None:
        """Keep each row that was ever seen with the same probability."""
        self.rows += 1
        if len(self.kept) < self.samples:
            self.kept.append(row.clone())
            return
        place = int(torch.randint(self.rows, (1,), generator=self.stream))
        if place < self.samples:
            self.kept[place] = row.clone()


class _GradientStatistics:
    """The sums of a weight's gradient and of its square."""

    def __init__(self, site: Site) -> None:
        view = weight_view(site)
        if view is None:
            raise PeftGraphError(f"{site} has no weight, so there is no gradient of it.")
        self.view = view
        self.total: Tensor | None = None
        self.squares: Tensor | None = None

    def add(self, stored: Tensor) -> None:
        """Add the gradient of a stored tensor."""
        own = self.view.get(stored)
        self.total = own.clone() if self.total is None else self.total + own
        self.squares = own.square() if self.squares is None else self.squares + own.square()


def _in_evaluation(node: fx.Node) -> fx.Node:
    """Return the value that stands for another one where dropout does nothing."""
    while node.target in DROPOUTS or node.meta.get("evaluates_to_first_operand"):
        node = node.all_input_nodes[0]
    return node


def _observe_inputs(
    program: ProgramData, batch: Mapping[str, Any], by_node: Mapping[str, Sequence[_InputStatistics]]
) -> None:
    def watch(node: fx.Node, value: Any) -> None:
        for one in by_node.get(node.name, ()):
            one.add(value)

    bound = program.signature.bind((), batch)
    missing = [spec.key for spec, value in zip(program.signature.inputs, bound, strict=True) if value is None]
    if missing:
        raise PeftGraphError(f"A batch to calibrate with lacks {missing[0]}; give what the model was traced with.")
    run_in_mode(program, [value for value in bound if value is not None], training=False, watcher=watch)


def _observe_gradients(
    net: nn.Module, batch: Mapping[str, Any], sites: Mapping[Site, _GradientStatistics], loss: Loss | None
) -> None:
    names = {one.view.parameter for one in sites.values()}
    known = dict(net.named_parameters(remove_duplicate=False))
    weights = {name: known[name].detach().requires_grad_() for name in sorted(names)}
    output = torch.func.functional_call(net.eval(), weights, (), dict(batch))
    value = _loss_of(output) if loss is None else loss(output)
    found = dict(zip(weights, torch.autograd.grad(value, list(weights.values()), materialize_grads=True), strict=True))
    for one in sites.values():
        one.add(found[one.view.parameter])


def _loss_of(output: Any) -> Tensor:
    found = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
    if not isinstance(found, Tensor):
        raise PeftGraphError("The model gives no loss; pass labels in the batches, or loss=, a function of its output.")
    return found


def _statistics(
    inputs: _InputStatistics | None, gradients: _GradientStatistics | None, needs: set[Statistic], batches: int
) -> SiteStatistics:
    rows = 0 if inputs is None else inputs.rows
    covariance = None if inputs is None or inputs.total_II is None else inputs.total_II / rows
    activations = torch.stack(inputs.kept) if inputs is not None and inputs.kept else None
    gradient = fisher = None
    if gradients is not None and gradients.total is not None and gradients.squares is not None:
        gradient = gradients.total / batches if "gradient" in needs else None
        fisher = gradients.squares / batches if "fisher" in needs else None
    return SiteStatistics(rows, covariance, activations, gradient, fisher)
