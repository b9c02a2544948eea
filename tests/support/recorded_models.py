"""The recorded models in this release of transformers, and what the `adapters` library answered on them."""

from __future__ import annotations

import re
import warnings
from functools import cache

import transformers
from recorded import FOLDER, MODELS, OTHERS
from safetensors.torch import load_file
from torch import Tensor, nn

import peftgraph as pg

TOLERANCE = {"bert": 1e-12, "gpt2": 1e-12, "bart": 1e-12, "vit": 2e-6, "beit": 2e-6, "llama": 2e-6, "t5": 2e-6}
RENAMED = {  # parts of the names of a ViT and a BEiT, in the library's release of transformers and in this one
    r"^encoder\.layer\.": "layers.",
    r"attention\.attention\.(query|key|value)\.": lambda match: f"attention.{match[1][0]}_proj.",
    r"attention\.output\.dense\.": "attention.o_proj.",
    r"intermediate\.dense\.": "mlp.fc1.",
    r"(?<=\d\.)output\.dense\.": "mlp.fc2.",
}


@cache
def recorded(stem: str) -> dict[str, Tensor]:
    return load_file(FOLDER / f"{stem}.safetensors")


def part(stem: str, kind: str) -> dict[str, Tensor]:
    return {key.removeprefix(kind): value for key, value in recorded(stem).items() if key.startswith(kind)}


def build(name: str) -> nn.Module:
    family, config, sizes = (MODELS | OTHERS)[name]
    settings = getattr(transformers, config)(**sizes, attn_implementation="eager")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = getattr(transformers, family)(settings).double().eval()
    base = part(name, "base/")
    if name in ("vit", "beit") and "layers.0.attention.q_proj.weight" in model.state_dict():
        for pattern, new in RENAMED.items():
            base = {re.sub(pattern, new, key): value for key, value in base.items()}
    model.load_state_dict(base)
    return model


@cache
def traced(name: str) -> pg.Program:
    return pg.trace(build(name), part(name, "input/"))


def answer(program: pg.Program, name: str) -> Tensor:
    return program.module().eval()(**part(name, "input/"))["last_hidden_state"]


def distance(ours: Tensor, theirs: Tensor) -> float:
    return float(((ours - theirs).abs().max() / theirs.abs().max()).detach())
