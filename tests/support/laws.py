"""The passes that the laws of `peftgraph.testing` are held for: one line each. For tests only.

`hold` applies the passes of one line to one architecture once, and holds every law on what comes out; gradients are
those of an eager reference.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, partial

import pytest
import torch
import truth
import zoo
from torch import Tensor

import peftgraph as pg
from peftgraph.authoring import Pass
from peftgraph.passes import (
    CIAT,
    IA3,
    MAM,
    AdaLoRA,
    AdapterDrop,
    AdapterFusion,
    AdapterPlus,
    BitFit,
    Compacter,
    CompacterPP,
    DiffPruning,
    DoRA,
    FreezeStatistics,
    Houlsby,
    IntrinsicSAID,
    Invertible,
    LadderSide,
    LoRA,
    LoReFT,
    ParallelAdapter,
    Pfeiffer,
    Prefix,
    Prompt,
    PTuning,
    QLoRA,
    Quantise,
    SerialAdapter,
    Train,
    TrainableTokens,
    UniPELT,
    ZeroInitPrefix,
)
from peftgraph.testing.laws import LAWS
from peftgraph.testing.subject import Base, Subject

F64 = torch.float64
Refusal = tuple[type[pg.PeftGraphError], str]


@dataclass(frozen=True)
class Line:
    """Passes, and where they differ from most.

    Attributes:
        passes: applied one after the other.
        folds: whether all of it folds.
        near: the ends of the names of the parameters that keep a fresh one from being the identity.
        away: whether it is not the identity whatever its parameters are.
        reference: whether `truth` has its eager reference; else it is in tests/methods.
        variant: whether it is another form of a pass that has a line, held on `zoo.NAMES` alone.
        only: the architectures it is held on, where the others say nothing new; all by default.
        meaningless: the architectures where it has no meaning, each with the error and its words.
    """

    passes: tuple[Pass, ...]
    folds: bool = True
    near: tuple[str, ...] = ()
    away: bool = False
    reference: bool = True
    variant: bool = False
    only: tuple[str, ...] = ()
    meaningless: Callable[[str], Refusal | None] = lambda name: None

    def refusal(self, name: str) -> Refusal | None:
        """The error that applying it to an architecture raises, and its words."""
        return self.meaningless(name)


WITHOUT_BIASES = ("llama", "t5", "mixtral", "gemma2")


def no_biases(name: str) -> Refusal | None:
    """BitFit without zero=true, where there is nothing to train."""
    words = r"bias: 0 sites in \d+ nodes\n.*\n.*no stored vector is added to a projection, convolution or norm"
    return (pg.NoMatch, words) if name in WITHOUT_BIASES else None


def no_tokens(name: str) -> Refusal | None:
    """Rows in front of tokens, where no token is embedded, or those of a decoder alone."""
    words = {
        "vit": "no table lookup",
        "clip_vision": "expected an index that comes from an input, found @embeddings.position_ids",
        "whisper": "removed them all: .*decoder",
    }
    return (pg.NoMatch, words[name]) if name in words else None


def no_pictures(name: str) -> Refusal | None:
    """Rows in front of what a first block reads, where an embedding of tokens feeds every stack."""
    words = r"none of the \d+ sites at block .* is the first block of a stack that no embedding feeds"
    return None if name in ("vit", "clip_vision", "whisper") else (pg.NoMatch, words)


def no_table(name: str) -> Refusal | None:
    """Rows of tokens, where no token is embedded."""
    refusal = no_tokens(name)
    return None if name == "whisper" else refusal


def no_statistics(name: str) -> Refusal | None:
    """Running statistics, which only norms over a batch keep."""
    return pg.NoMatch, r"none of the \d+ sites at norm keeps running statistics"


def no_ladder(name: str) -> Refusal | None:
    """Blocks of which there is no copy with half of all features."""
    words = {
        "mixtral": r"0\.router belongs to experts, which have no narrow copy",
        "gpt_neox": "takes features up to 1, which 2 does not divide",  # one pair of features is rotated
    }
    return (pg.PeftGraphError, words[name]) if name in words else None


EVERYWHERE = "attention.*|ffn.*"
GATED = (LoRA(rank=2, alpha=2.0), Prefix(length=2, hidden=5), Pfeiffer(width=3))
LINES: dict[str, Line] = {
    "lora": Line((LoRA(rank=3),), variant=True),
    "lora_all": Line((LoRA(at=EVERYWHERE, rank=2, alpha=5.0),)),
    "lora_stable": Line(
        (LoRA(at="attention.k|ffn.down", rank=4, alpha=5.0, rank_stabilised=True, weight=-0.5),), variant=True
    ),
    "pissa": Line((LoRA(at=EVERYWHERE, rank=2, alpha=5.0, init="pissa"),)),
    "adalora": Line((AdaLoRA(rank=2, target_rank=1),), reference=False),
    "diff_pruning": Line((DiffPruning(),), reference=False),
    "said": Line((IntrinsicSAID(dimension=200, seed=1),), reference=False),
    "dora_of_adapters": Line((DoRA(rank=3, alpha=5.0, form="adapters"),), reference=False, variant=True),
    "dora_all+ia3": Line((DoRA(at=EVERYWHERE, rank=2), IA3())),
    "ia3": Line((IA3(),)),
    "bitfit": Line((BitFit(),), meaningless=no_biases),
    "bitfit_zero": Line((BitFit(at="attention.*|ffn.*|norm", zero=True, norms=True),)),
    "freeze_statistics": Line((FreezeStatistics(),), variant=True, meaningless=no_statistics),
    "train": Line((Train(at="attention.*|ffn.*|norm"),)),
    "tokens": Line((TrainableTokens(tokens=truth.TOKENS),), meaningless=no_table),
    "lora+tokens": Line(
        (LoRA(at=EVERYWHERE, rank=2), TrainableTokens(tokens=truth.TOKENS)), variant=True, meaningless=no_table
    ),
    "quantise+lora": Line(
        (Quantise(at=EVERYWHERE, compute="stored"), LoRA(at=EVERYWHERE, rank=2)),
        folds=False,
        away=True,
        reference=False,
        only=("gpt2", "mixtral", "nano"),  # a weight each way: transposed, in a stack, in a fused one
    ),
    "qlora": Line(
        (QLoRA(at=EVERYWHERE, rank=2, compute="stored"),), folds=False, away=True, reference=False, only=("llama",)
    ),
    "serial": Line((SerialAdapter(width=3),), folds=False, variant=True),
    "lora+ia3": Line((LoRA(at=EVERYWHERE, rank=2), IA3()), variant=True),
    "ia3+lora": Line((IA3(), LoRA(at=EVERYWHERE, rank=2))),
    "serial+lora": Line((SerialAdapter(width=3), LoRA(at="attention.*", rank=2)), folds=False),
    "houlsby": Line((Houlsby(width=3),), folds=False, near=("up_weight",)),
    "pfeiffer": Line((Pfeiffer(width=3),), folds=False, near=("up_weight",)),
    "parallel": Line((ParallelAdapter(width=3, learned=True),), folds=False),
    "compacter": Line((Compacter(width=4),), folds=False, near=("up_right",)),
    "compacter_pp": Line((CompacterPP(width=4),), folds=False, near=("up_right",), reference=False, variant=True),
    "fusion": Line(
        (AdapterFusion(adapters=("a", "b"), width=3),), folds=False, near=("up_weight",), reference=False, variant=True
    ),
    "drop+ciat+plus": Line(
        (
            AdapterDrop(adapter=Pfeiffer(width=3), random=True),
            CIAT(width=3, init="identity"),
            AdapterPlus(width=3, drop_path=0.3),
        ),
        folds=False,
        near=("up_weight",),
        reference=False,
    ),
    "invertible": Line((Invertible(init="identity"),), folds=False, reference=False, meaningless=no_tokens),
    "loreft": Line((LoReFT(rank=2, prefix=2, suffix=1, start="identity"),), folds=False, reference=False),
    "ladder_side": Line(
        (LadderSide(reduction=2),), folds=False, away=True, reference=False, variant=True, meaningless=no_ladder
    ),
    "prompt": Line((Prompt(length=2),), folds=False, away=True, reference=False, meaningless=no_tokens),
    "prompt_behind": Line(
        (Prompt(length=2, onto="embeddings"),),
        folds=False,
        away=True,
        reference=False,
        variant=True,
        meaningless=no_tokens,
    ),
    "prompt_pictures": Line(
        (Prompt(at="block", length=2, onto="embeddings", place="after_first"),),
        folds=False,
        away=True,
        reference=False,
        variant=True,
        meaningless=no_pictures,
    ),
    "ptuning": Line(
        (PTuning(length=2, hidden=4),), folds=False, away=True, reference=False, variant=True, meaningless=no_tokens
    ),
    "zero_init_prefix": Line((ZeroInitPrefix(length=2),), folds=False, reference=False),
    "zero_init_behind": Line(
        (ZeroInitPrefix(at='attention & kind("self")', length=2, tanh=True),),
        folds=False,
        reference=False,
        variant=True,
    ),
    "unipelt": Line((UniPELT(methods=GATED),), folds=False, away=True, reference=False),
    "mam": Line((MAM(length=2, hidden=5, width=3),), folds=False, away=True, reference=False, variant=True),
    "prefix_placed": Line(
        (Prefix(length=2, hidden=None, placed=True),), folds=False, away=True, reference=False, variant=True
    ),
    "prefix_shifted": Line(
        (Prefix(length=2, hidden=None, biases="shifted"),), folds=False, away=True, reference=False, variant=True
    ),
    "prefix+lora": Line((Prefix(length=3, hidden=5), LoRA(rank=2)), folds=False, away=True, reference=False),
}


def holds_on(line: Line, name: str) -> bool:
    """Whether a line is held on an architecture."""
    return name in line.only if line.only else name in zoo.NAMES or not line.variant


def cases(*names: str) -> list[tuple[str, str]]:
    """(architecture, line) for every line that is held on it."""
    return [(name, key) for name in names for key, line in LINES.items() if holds_on(line, name)]


@cache
def base_of(name: str, attn: str = "sdpa") -> Base:
    """The base of an architecture, with inputs that are always the same."""
    program = zoo.traced(name, attn, F64)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        inputs = zoo.example(name, 2, 9, F64)
    return Base.of(name, program, inputs)


@cache
def eager(name: str) -> torch.nn.Module:
    """The original model, without gradients of its own."""
    return truth.eager_model(name, F64).requires_grad_(False)


# What `hold` leaves to tests of its own, for they apply the passes again.
APART = ("determinism", "gates")


def subject_of(base: Base, line: Line) -> Subject:
    """The passes of a line on a base, with their eager reference."""
    reference = None if not line.reference or adds_biases(base, line) else partial(reference_of, base, line)
    program = base.program.apply(*line.passes)
    return Subject(base, line.passes, line.near, line.away, reference, 1e-12, program)


def hold(name: str, key: str) -> None:
    """Every law but those apart, for one line on one architecture."""
    base, line = base_of(name), LINES[key]
    refusal = line.refusal(name)
    if refusal is not None:
        with pytest.raises(refusal[0], match=refusal[1]):
            base.program.apply(*line.passes)
        assert (base.program.text(), base.program.table.hashes()) == (base.text, base.hashes)
        return
    subject = subject_of(base, line)
    assert (subject.far > (1e-4 if line.away else 0)) == bool(line.near or line.away)
    held = {law: check(subject) for law, check in LAWS.items() if law not in APART}
    assert held == dict.fromkeys(held, True) | {
        "identity": not line.away,
        "fold": line.folds and not adds_biases(base, line),
    }
    if held["fold"]:
        assert subject.folded is not None
        assert subject.folded.proof is not None
        assert subject.folded.proof.regions is not None, subject.folded.proof.no_regions


def reference_of(base: Base, line: Line, values: Mapping[str, Tensor]) -> list[Tensor]:
    """What the eager model gives with the parameters of a line."""
    low = next((part for part in line.passes if isinstance(part, LoRA | DoRA)), None)
    alpha = 1.0 if low is None else low.scale * low.rank * (low.weight if isinstance(low, LoRA) else 1.0)
    scale_first = isinstance(line.passes[0], IA3)
    return truth.eager_outputs(base.name, eager(base.name), dict(values), dict(base.inputs), alpha, scale_first)


def adds_biases(base: Base, line: Line) -> bool:
    """Whether biases are added that the model's weights have none for: they neither fold nor stand in a reference made
    of weights."""
    zero = next((one for one in line.passes if isinstance(one, BitFit) and one.zero), None)
    return zero is not None and any(site.bias is None for site in base.program.sites.select(zero.at))
