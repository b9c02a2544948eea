"""Computes what peft's adapters do to one stored tensor.

    LoRA    W <- W + s B A              b <- b + s d        d the bias of B, with lora_bias
    AdaLoRA W <- W + s B diag(E) A      with all triplets of the start; those that the file lacks are zero
    DoRA    W <- g V                    V = W + s B A, g = m / ||V|| over the inputs of each output feature
            A and B of a stack of E experts are (E R, I) and (O, R E), and each expert's W has its own of them
    (IA)3   W <- diag(l) W, b <- l b    for an output;  W <- W diag(l) for an input
    tokens  W[t] <- the trained row of every token t, in the stored table (V, D)

Shapes: I in, O out, R rank; A (R, I), B (O, R), m and d (O,); l (O, 1) or (1, I). An embedding is the matrix that maps
its V numbers to D features: I = V, O = D, stored (in, out) as a Conv1D is. Values are computed in the dtype in which
folding accumulates and rounded to the stored dtype once.
Source: huggingface/peft 0.21, tuners/lora/layer.py, tuners/lora/variants.py and tuners/ia3/layer.py, `merge`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from peftgraph.folding.chunks import chunks_of
from peftgraph.interop.peft.tensors import by_expert
from peftgraph.rewrite.weight_views import View, accumulation_dtype

Load = Callable[[str], Tensor]


@dataclass(frozen=True)
class TensorChange:
    """The change of one stored tensor.

    Attributes:
        view: the tensor as a matrix (O, I), or a bias (O,).
        replaced: the adapter's tensor that replaces it first; None where the stored one is used.
        parts: the adapter's tensors of the change, by role: "A" and "B", "E", "m", "d", "l", "rows".
        scale: s.
        tokens: whose rows are replaced.
        kept: which triplets of AdaLoRA's start the adapter has.
    """

    view: View
    replaced: str | None
    parts: Mapping[str, str]
    scale: float = 1.0
    tokens: tuple[int, ...] = ()
    kept: tuple[bool, ...] = ()

    def apply(self, stored: Tensor, load: Load, expert: int | None = None) -> Tensor:
        """Compute the new value of the tensor, in its dtype and memory; one chunk at a time is in the wide dtype.

        Args:
            stored: its value, or the one that replaces it.
            load: returns a tensor of the adapter.
            expert: the only expert of a stack that changes; None for all.
        """
        if not self.parts:
            return stored
        if self.tokens:
            return stored.index_copy_(0, torch.tensor(self.tokens), load(self.parts["rows"]).to(stored.dtype))
        dtype = accumulation_dtype(stored.dtype)
        own = self._low_rank({role: load(key).to(dtype) for role, key in self.parts.items()})
        if self.view.vector:
            return self._changed(stored.to(dtype), own).to(stored.dtype)
        if self.view.experts is not None:
            own["A"], own["B"] = by_expert(own["A"], own["B"], self.view.experts)
        for chunk in chunks_of(stored, self.view):
            if expert not in (None, chunk.expert):
                continue
            window = chunk.slice(stored, self.view)
            rows = {role: chunk.slice_parameter(value, self._axis(role, value), None) for role, value in own.items()}
            window.copy_(self.view.put(window, self._changed(self.view.get(window).to(dtype), rows), dtype))
        return stored

    def _low_rank(self, own: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the parts with the triplets of AdaLoRA as A and B, at their places among those of the start."""
        if "E" not in own:
            return own
        kept = torch.tensor(self.kept)
        a_RI, e_R1, b_OR = (own[role] for role in ("A", "E", "B"))
        all_a, all_e = a_RI.new_zeros(len(kept), a_RI.shape[1]), e_R1.new_zeros(len(kept), 1)
        all_b = b_OR.new_zeros(b_OR.shape[0], len(kept))
        all_a[kept], all_e[kept], all_b[:, kept] = a_RI, e_R1, b_OR
        return {"A": all_e * all_a, "B": all_b}

    def _axis(self, role: str, value: Tensor) -> int | None:
        """Return the axis of output features of a role's tensor; None where it has none."""
        return {"B": -2, "m": -1, "d": -1, "l": -2 if value.shape[0] > 1 else None}.get(role)

    def _changed(self, window: Tensor, own: Mapping[str, Tensor]) -> Tensor:
        """Compute the new value of a window of the tensor."""
        if "A" in own:
            v_OI = window + self.scale * (own["B"] @ own["A"])
            return (own["m"] / torch.linalg.vector_norm(v_OI, 2, -1)).unsqueeze(-1) * v_OI if "m" in own else v_OI
        if "d" in own:
            return window + self.scale * own["d"]
        return window * (own["l"].reshape(-1) if self.view.vector else own["l"])
