"""Finds the sites that own parameters of the base which an adapter's directory stores."""

from __future__ import annotations

import torch
from torch import Tensor

from peftgraph.sites import Site, Sites
from peftgraph.sites.roles import WORDS


def equals_or_unknown(own: Tensor, value: Tensor) -> bool:
    """Check whether the base's tensor has a value already; True where it has no values, on the meta device."""
    return own.device.type == "meta" or torch.equal(own.detach().cpu(), value.to(own.dtype))


def parameters_of(site: Site) -> list[str]:
    """Return the names of a site's own stored tensors."""
    own = [site.weight and site.weight.parameter, site.scale, site.bias and site.bias.parameter]
    return [name for name in (own[2:] if site.role == "bias" else own) if name]


def sites_owning_only(sites: Sites, names: set[str]) -> list[Site]:
    """Return the sites whose own tensors are all among `names`: whole sites first, then the biases that are left."""
    whole = [site for site in sites if site.role in WORDS and site.role not in ("bias", "block", "ffn.hidden")]
    chosen = [site for site in whole if parameters_of(site) and names.issuperset(parameters_of(site))]
    left = names - {name for site in chosen for name in parameters_of(site)}
    return chosen + [site for site in sites if site.role == "bias" and left.issuperset(parameters_of(site))]
