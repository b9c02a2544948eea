"""Adapters in peft's format: adapter_config.json and adapter_model.safetensors, in a directory that appears at once."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import Tensor

from peftgraph.errors import AdapterError
from peftgraph.interop.native import check_can_save
from peftgraph.interop.peft.config import CONFIG, TENSORS
from peftgraph.interop.peft.tensors import PREFIX, ROWS, ROWS_PREFIX
from peftgraph.interop.peft.write_low_rank import write_low_rank
from peftgraph.interop.peft.write_rows import write_adaption, write_prefix, write_prompt
from peftgraph.interop.peft.write_scales import write_scales
from peftgraph.interop.peft.write_stored import trained_values, write_stored
from peftgraph.interop.peft.write_tokens import token_tables, write_tokens, write_tokens_beside
from peftgraph.interop.written import Places, Written
from peftgraph.ir.program import ProgramData
from peftgraph.rewrite.finalize import finalize
from peftgraph.sites import Sites
from peftgraph.utils.atomic_files import atomic_directory

Writer = Callable[[ProgramData, Sites, Places], Written]

WRITERS: dict[str, Writer] = {
    "lora": write_low_rank,
    "dora": write_low_rank,
    "ia3": write_scales,
    "trainable_tokens": write_tokens,
    "prefix": write_prefix,
    "prompt": write_prompt,
    "ptuning": write_prompt,
    "zero_init_prefix": write_adaption,
}
LOW_RANK = {"lora", "dora"}  # what peft puts biases and tokens beside
README = "README.md"
TASKS = {  # the end of a class's name -> how peft calls it
    "ForCausalLM": "CAUSAL_LM",
    "LMHeadModel": "CAUSAL_LM",
    "ForConditionalGeneration": "SEQ_2_SEQ_LM",
    "Model": "FEATURE_EXTRACTION",
}


def save_peft(program: ProgramData, sites: Sites, directory: Path) -> Path:
    """Writes the adapter of `program` for peft; returns the directory.

    Raises:
        AdapterError: peft's format cannot say it; names the pass, the site and the reason.
        PeftGraphError: the disk refuses; what was there before stays.
    """
    check_can_save(program)
    methods = [applied.method for applied in program.history]
    if [method.finalized() for method in methods] != methods:
        program = finalize(program, sites)
    written = _written(program, sites)
    options = {"base_model_name_or_path": None, "inference_mode": True, **written.config}
    tensors = {name: value.detach().cpu().contiguous().clone() for name, value in written.tensors.items()}
    _write(directory, json.dumps(options, indent=2, sort_keys=True), safetensors.torch.save(tensors, {"format": "pt"}))
    return directory


def _written(program: ProgramData, sites: Sites) -> Written:
    """Options and tensors by peft's names."""
    by_word = _places(program, sites)
    shifted = by_word.pop("bitfit", [])
    beside = by_word.pop("trainable_tokens", []) if by_word.keys() & LOW_RANK else []
    if len(by_word) > 1:
        raise AdapterError(f"peft has one method in a directory, and these are {' and '.join(by_word)}.")
    values = trained_values(program, shifted)
    if not by_word:
        raise AdapterError(
            f"{program.history[0].method} trains the base alone, and peft's format has no method for that. Save the "
            "folded model by its own library."
        )
    ((word, places),) = by_word.items()
    main = WRITERS[word](program, sites, places)
    tokens = write_tokens_beside(program, sites, beside)
    rows = ROWS in main.tensors
    if values and word in ("zero_init_prefix", "trainable_tokens"):
        raise AdapterError(
            f"{places[0][0]}: peft saves no other parameters beside it, and {next(iter(values))} trains."
        )
    adapted = set() if rows else {str(s.weight.parameter).removesuffix(".weight") for _, s, _ in places if s.weight}
    adapted |= set(token_tables(program, beside))
    stored = write_stored(program, values, adapted, ROWS_PREFIX if rows else PREFIX, word in LOW_RANK)
    config = main.config | tokens.config | stored.config | _task(program, rows)
    return Written(config, main.tensors | tokens.tensors | stored.tensors)


def _places(program: ProgramData, sites: Sites) -> dict[str, Places]:
    """By the word of a pass: each site that it computes something at, with its parameters there."""
    by_id = {site.id: site for site in sites}
    found: dict[str, list[tuple[Any, Any, dict[str, Tensor]]]] = {}
    for edit in program.edits:
        method, site = program.history[edit.application].method, by_id[edit.site]
        if not edit.moves:
            continue
        if method.word not in (*WRITERS, "bitfit"):
            raise AdapterError(f"{method} at {site} cannot be written for peft, which has no {method.word}.")
        own = {name.rpartition(".")[2]: program.table[name].tensor.detach() for name in edit.parameters}
        if own:
            found.setdefault(method.word, []).append((method, site, own))
    return {**found}


def _task(program: ProgramData, rows: bool) -> dict[str, Any]:
    """What peft calls the model's task; without one it puts no rows in front."""
    task = next((word for end, word in TASKS.items() if program.model.endswith(end)), None)
    if rows and task is None:
        raise AdapterError(
            f"peft puts rows in front of a model whose task it knows; {program.model} is none of {', '.join(TASKS)}."
        )
    return {"task_type": task}


def _write(directory: Path, config: str, tensors: bytes) -> None:
    """A new directory in the place of an old one, with its README if it has one."""
    if directory.exists() and not directory.is_dir():
        raise AdapterError(f"{directory} cannot be written: it is a file.")
    others = {path.name for path in directory.glob("*")} - {CONFIG, TENSORS, README}
    if others:
        raise AdapterError(f"{directory} holds {min(others)}, which is not peft's. Choose another directory.")
    with atomic_directory(directory) as fresh:
        (fresh / CONFIG).write_text(config, encoding="utf-8")
        (fresh / TENSORS).write_bytes(tensors)
        if (directory / README).exists():
            shutil.copyfile(directory / README, fresh / README)
