"""Small models in many shards, and merges of them."""

from __future__ import annotations

import warnings
from pathlib import Path

import safetensors.torch
import torch
import zoo
from torch import Tensor

from peftgraph.interop.checkpoints.checkpoint import Checkpoint
from peftgraph.interop.checkpoints.folded_updates import FoldedUpdates, folded_updates
from peftgraph.interop.checkpoints.storage_layout import StorageLayout
from peftgraph.model_folders.loading import skeleton, trace


def saved(name: str, folder: Path, dtype: torch.dtype = torch.float32) -> Path:
    """A small model in several shards."""
    model = zoo.build(name, dtype=dtype)
    model.config.dtype = dtype  # pyright: ignore
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(folder, max_shard_size="40KB")  # pyright: ignore
    return folder


def contents(folder: Path) -> dict[str, Tensor]:
    """All stored tensors of a folder."""
    return {k: v for path in folder.glob("*.safetensors") for k, v in safetensors.torch.load_file(path).items()}


def differing(a: dict[str, Tensor], b: dict[str, Tensor]) -> list[str]:
    """The names under which two folders hold other values or dtypes."""
    assert a.keys() == b.keys()
    return [name for name in a if a[name].dtype != b[name].dtype or not torch.equal(a[name], b[name])]


def own_updates(folder: Path, adapter: Path) -> tuple[Checkpoint, FoldedUpdates]:
    """What an adapter of ours changes in a folder."""
    checkpoint = Checkpoint.open(folder)
    model = skeleton(folder, checkpoint.dtype)
    program = trace(model)
    layout = StorageLayout.of(model, checkpoint)
    return checkpoint, folded_updates(program, program.sites, program.apply, adapter, layout)


def silent(count: int) -> None:
    """No progress."""
