"""Reads invertible adapters of the `adapters` library as a pass: what `inv_adapter` adds to a bottleneck.

They change the output of the embedding layer, in an encoder-decoder that of the encoder. The heads of the library's own
model classes apply the inverse, and so does the output embedding of a model that it knows by an interface; the heads of
transformers' own classes, such as BertForMaskedLM, do not.
Source: adapter-hub/adapters 1.3, model_mixin.py (InvertibleAdaptersMixin), heads/language_modeling.py,
methods/invertible.py, methods/modeling.py (NICECouplingBlock, GLOWCouplingBlock).
"""

from __future__ import annotations

import re

from torch import Tensor

from peftgraph.errors import AdapterError
from peftgraph.interop.adapterhub.saved_adapter import TENSORS, SavedAdapter
from peftgraph.passes import Invertible
from peftgraph.rewrite.method import SHARED, ParameterKey, PassWithValues

KIND = "invertible_adapters"
NAMES = {f"{side}.{number}.{leaf}": f"{side.lower()}_{end}_{leaf}" for side in ("F", "G")
         for number, end in ((0, "down"), (2, "up")) for leaf in ("weight", "bias")}  # fmt: skip
INTERFACE = "adapter_interface.json"
OWN_HEAD = re.compile(r"For[A-Z]|Head")


def invertible_passes(saved: SavedAdapter) -> list[PassWithValues]:
    """Return the passes of the invertible adapters in a directory; often none.

    Raises:
        AdapterError: they are of a kind that no pass does, or the configuration does not mention them.
    """
    members = [one for one in saved.members() if one.options.get("inv_adapter") is not None]
    if KIND in saved.tensors and not members:
        raise AdapterError(f"{saved.directory / TENSORS} holds {KIND}, of which its configuration does not speak.")
    return [_invertible_pass(one) for one in members]


def _invertible_pass(saved: SavedAdapter) -> PassWithValues:
    if saved.options["inv_adapter"] == "glow":
        raise AdapterError(
            f"{saved.directory} has inv_adapter='glow', which adapters itself cannot run: where its GLOW block should "
            'cut the features it cuts the sequence. What it can is inv_adapter="nice".'
        )
    saved.check({"inv_adapter": "nice"})
    adapters = saved.at(KIND)
    if len(adapters) != 1:
        raise AdapterError(
            f"{saved.directory / TENSORS} holds {KIND} at {', '.join(adapters)}, which is more than one."
        )
    ((path, tensors),) = adapters.items()
    named = saved.named(path, tensors, NAMES)
    values: dict[ParameterKey, Tensor] = {(SHARED, leaf): value for leaf, value in named.items()}
    inverse = OWN_HEAD.search(saved.model) is None or (saved.directory / INTERFACE).exists()
    method = Invertible(
        reduction=float(saved.option("inv_adapter_reduction_factor", float, int)),
        activation=saved.activation(),
        inverse=inverse,
    )
    remark = (
        f"{saved.directory} was saved out of a {saved.model}, whose head does not read the inverse of an invertible "
        "adapter in the library; nor does it here. In the paper it does: invertible{inverse=true}."
    )
    return PassWithValues(method, values, "" if inverse else remark)
