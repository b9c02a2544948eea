"""Parameters of the base that an adapter's directory holds, and the sites whose own they are."""

from __future__ import annotations

import torch
from torch import Tensor

from peftgraph.sites import Site, Sites
from peftgraph.sites.roles import WORDS


def same(own: Tensor, value: Tensor) -> bool:
    """Whether the base holds a value already; without values of its own it may."""
    return own.device.type == "meta" or torch.equal(own.detach().cpu(), value.to(own.dtype))


def parameters_of(site: Site) -> list[str]:
    """The stored tensors of a site itself."""
    own = [site.weight and site.weight.parameter, site.scale, site.bias and site.bias.parameter]
    return [name for name in (own[2:] if site.role == "bias" else own) if name]


def holders(sites: Sites, names: set[str]) -> list[Site]:
    """Sites that own nothing but `names`: whole ones first, then the biases that are left."""
    whole = [site for site in sites if site.role in WORDS and site.role not in ("bias", "block", "ffn.hidden")]
    chosen = [site for site in whole if parameters_of(site) and names.issuperset(parameters_of(site))]
    left = names - {name for site in chosen for name in parameters_of(site)}
    return chosen + [site for site in sites if site.role == "bias" and left.issuperset(parameters_of(site))]
