"""An attention whose result a gate weighs before the output projection."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

WIDTH, HEADS = 16, 4
SIZE = WIDTH // HEADS


class GatedAttention(nn.Module):
    """y = x + W_o (attention(norm(x)) * sigmoid(gate)), with the gate's projection fused with q or apart."""

    def __init__(self, gate: str, eager: bool) -> None:
        super().__init__()
        self.kind, self.eager = gate, eager
        self.norm = nn.LayerNorm(WIDTH)
        self.q = nn.Linear(WIDTH, 2 * WIDTH if gate == "fused" else WIDTH)
        self.k, self.v, self.o = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.gate = nn.Linear(WIDTH, {"heads": HEADS, "features": WIDTH}.get(gate, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        residual, x = x, self.norm(x)
        batch, length, _ = x.shape
        q = self.q(x).view(batch, length, HEADS, -1)
        if self.kind == "fused":
            q, gate = q.chunk(2, dim=-1)
            gate = gate.reshape(batch, length, WIDTH)
        else:
            gate = self.gate(x)
        k, v = (one(x).view(batch, length, HEADS, SIZE).transpose(1, 2) for one in (self.k, self.v))
        y = self._attend(q.transpose(1, 2), k, v).transpose(1, 2)
        if self.kind == "heads":
            y = y * torch.sigmoid(gate).unsqueeze(-1)
        y = y.reshape(batch, length, WIDTH)
        return residual + self.o(y if self.kind == "heads" else y * torch.sigmoid(gate))

    def _attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        if self.eager:
            return torch.softmax(q @ k.transpose(-1, -2) / SIZE**0.5, dim=-1) @ v
        return F.scaled_dot_product_attention(q, k, v)
