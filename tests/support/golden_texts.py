"""The golden texts: what each pass does to a small model, one file a pass. Running this file writes them.

A file holds the spec and the difference of the printed graphs: lines of the model where they are next to a change, "-"
what went, "+" what came. A change of a pass, of a join or of the printer shows up as a change of these files.
"""

from __future__ import annotations

import sys
from functools import cache
from pathlib import Path

import torch
import zoo
from torch import Tensor, nn

import peftgraph as pg
from peftgraph import passes
from peftgraph.authoring import Pass

FOLDER = Path(__file__).parents[1] / "golden"
METHODS: tuple[Pass, ...] = (
    passes.AdaLoRA(at="attention.q", rank=2, target_rank=1),
    passes.AdapterDrop(adapter=passes.Pfeiffer(width=2), random=True),
    passes.AdapterFusion(adapters=("a", "b"), width=2),
    passes.AdapterPlus(width=2),
    passes.BitFit(),
    passes.CIAT(width=2, embedding_width=2),
    passes.Compacter(width=4, n=2),
    passes.CompacterPP(width=4, n=2),
    passes.DiffPruning(at="ffn.down"),
    passes.DoRA(at="attention.q", rank=2),
    passes.Train(top=1),
    passes.FreezeStatistics(),
    passes.Houlsby(width=2),
    passes.IA3(),
    passes.IntrinsicSAID(at="ffn.down", dimension=5),
    passes.Invertible(),
    passes.LadderSide(reduction=2),
    passes.LoRA(rank=2),
    passes.LoReFT(rank=2),
    passes.MAM(length=2, hidden=3, width=2),
    passes.ParallelAdapter(width=2),
    passes.Pfeiffer(width=2),
    passes.Prefix(length=2, hidden=None),
    passes.Prompt(length=2),
    passes.PTuning(length=2, encoder="mlp", hidden=3),
    passes.QLoRA(at="ffn.down", rank=2),
    passes.Quantise(at="ffn.down"),
    passes.SerialAdapter(width=2),
    passes.TrainableTokens(tokens=(1, 2)),
    passes.UniPELT(methods=(passes.LoRA(rank=2, alpha=2.0), passes.Pfeiffer(width=2))),
    passes.ZeroInitPrefix(length=2),
)


class Convolutional(nn.Module):
    """A convolution with its batch norm, for what transformers have not."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.norm(self.conv(x)))


@cache
def transformer() -> pg.Program:
    """One block of a small transformer."""
    return pg.trace(zoo.Nano(layers=1), zoo.example("nano"))


@cache
def convolutional() -> pg.Program:
    """A small convolutional network."""
    return pg.trace(Convolutional().eval(), (torch.zeros(2, 3, 8, 8),))


def text(method: Pass) -> str:
    """What the file of a pass holds."""
    base = convolutional() if isinstance(method, passes.FreezeStatistics) else transformer()
    tuned = base.apply(method)
    return f"{tuned.diff(base)}\n"


def main() -> None:
    """Writes every file."""
    FOLDER.mkdir(exist_ok=True)
    for method in METHODS:
        (FOLDER / f"{method.word}.txt").write_text(text(method), encoding="utf-8")
        print(method.word, file=sys.stderr)


if __name__ == "__main__":
    main()
