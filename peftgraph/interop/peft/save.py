"""Writes adapters for peft: adapter_config.json and adapter_model.safetensors, in a directory that appears at once."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import safetensors.torch

from peftgraph.errors import AdapterError
from peftgraph.interop.native import check_can_save
from peftgraph.interop.peft.adapter_content import AdaptedSite, PeftContent
from peftgraph.interop.peft.config import CONFIG, TENSORS
from peftgraph.interop.peft.tensors import PREFIX, ROWS, ROWS_PREFIX
from peftgraph.interop.peft.write_adalora import write_adalora
from peftgraph.interop.peft.write_base_parameters import trained_values, write_base_parameters
from peftgraph.interop.peft.write_low_rank import write_low_rank
from peftgraph.interop.peft.write_prompts import write_adaption, write_prefix, write_prompt
from peftgraph.interop.peft.write_scales import write_scales
from peftgraph.interop.peft.write_tokens import token_tables, write_tokens, write_tokens_beside
from peftgraph.ir.program import ProgramData
from peftgraph.passes import IA3, AdaLoRA, BitFit, DoRA, LoRA, Prefix, Prompt, PTuning, TrainableTokens, ZeroInitPrefix
from peftgraph.rewrite.finalize import finalize
from peftgraph.rewrite.method import Pass
from peftgraph.sites import Sites
from peftgraph.utils.atomic_files import atomic_directory

AdaptedSites = Sequence[AdaptedSite[Any]]
Writer = Callable[[ProgramData, Sites, AdaptedSites], PeftContent]

WRITERS: dict[type[Pass], Writer] = {
    LoRA: write_low_rank,
    DoRA: write_low_rank,
    AdaLoRA: write_adalora,
    IA3: write_scales,
    TrainableTokens: write_tokens,
    Prefix: write_prefix,
    Prompt: write_prompt,
    PTuning: write_prompt,
    ZeroInitPrefix: write_adaption,
}
LOW_RANK: set[type[Pass]] = {LoRA, DoRA}  # the methods with biases and tokens beside them
ALONE: set[type[Pass]] = {ZeroInitPrefix, TrainableTokens}  # the methods without any other parameters beside them
README = "README.md"
TASKS = {  # the end of a class's name -> how peft calls it
    "ForCausalLM": "CAUSAL_LM",
    "LMHeadModel": "CAUSAL_LM",
    "ForConditionalGeneration": "SEQ_2_SEQ_LM",
    "Model": "FEATURE_EXTRACTION",
}


def write_peft(program: ProgramData, sites: Sites, directory: Path) -> None:
    """Write the adapter of `program` for peft.

    Raises:
        AdapterError: peft's format cannot express it; the message names the pass, the site and the reason.
        PeftGraphError: the directory cannot be written; its earlier content stays.
    """
    check_can_save(program)
    methods = [applied.method for applied in program.history]
    if [method.finalized() for method in methods] != methods:
        program = finalize(program, sites)
    content = _content(program, sites)
    options = {"base_model_name_or_path": None, "inference_mode": True, **content.config}
    tensors = {name: value.detach().cpu().contiguous().clone() for name, value in content.tensors.items()}
    _write(directory, json.dumps(options, indent=2, sort_keys=True), safetensors.torch.save(tensors, {"format": "pt"}))


def _content(program: ProgramData, sites: Sites) -> PeftContent:
    """Return the options and tensors of the adapter by peft's names."""
    by_method = _adapted_sites(program, sites)
    shifted = by_method.pop(BitFit, ())
    tokens_beside = by_method.pop(TrainableTokens, ()) if by_method.keys() & LOW_RANK else ()
    if len(by_method) > 1:
        words = " and ".join(method.word for method in by_method)
        raise AdapterError(f"peft has one method in a directory, and these are {words}.")
    values = trained_values(program, shifted)
    if not by_method:
        raise AdapterError(
            f"{program.history[0].method} trains the base alone, and peft's format has no method for that. Save the "
            "folded model by its own library."
        )
    ((method, adapted),) = by_method.items()
    if values and method in ALONE:
        raise AdapterError(
            f"{adapted[0].method}: peft saves no other parameters beside it, and {next(iter(values), '')} trains."
        )
    main = WRITERS[method](program, sites, adapted)
    tokens = write_tokens_beside(program, sites, tokens_beside)
    # What of the base trains, beside the modules that are adapted.
    rows = ROWS in main.tensors
    weights = [one.site.weight.parameter for one in adapted if one.site.weight and not rows]
    modules = {weight.removesuffix(".weight") for weight in weights} | set(token_tables(program, tokens_beside))
    prefix = ROWS_PREFIX if rows else PREFIX
    stored = write_base_parameters(program, values, modules, prefix, method in LOW_RANK)
    config = main.config | tokens.config | stored.config | _task(program, rows)
    return PeftContent(config, main.tensors | tokens.tensors | stored.tensors)


def _adapted_sites(program: ProgramData, sites: Sites) -> dict[type[Pass], AdaptedSites]:
    """Return, by the class of a pass, the sites where it computes something, with its parameters there.

    Raises:
        AdapterError: peft has no such method.
    """
    by_id = {site.id: site for site in sites}
    found: dict[type[Pass], list[AdaptedSite[Any]]] = {}
    for edit in program.edits:
        method, site = program.history[edit.application].method, by_id[edit.site]
        if not edit.moves or edit.quantised:  # how the base is stored is no part of peft's directory
            continue
        if edit.rewritten:
            raise AdapterError(
                f"{method} at {site} cannot be written for peft: it goes with codes of its own, which peft's directory "
                "does not hold."
            )
        if type(method) not in {*WRITERS, BitFit}:
            raise AdapterError(f"{method} at {site} cannot be written for peft, which has no {method.word}.")
        own = {name.rpartition(".")[2]: program.table[name].tensor.detach() for name in edit.parameters}
        if own:
            found.setdefault(type(method), []).append(AdaptedSite(method, site, own))
    return {**found}


def _task(program: ProgramData, rows: bool) -> dict[str, Any]:
    """Return peft's name of the model's task, which it needs to prepend rows."""
    task = next((word for end, word in TASKS.items() if program.model.endswith(end)), None)
    if rows and task is None:
        raise AdapterError(
            f"peft prepends rows only for tasks that it knows; {program.model} is none of {', '.join(TASKS)}."
        )
    return {"task_type": task}


def _write(directory: Path, config: str, tensors: bytes) -> None:
    """Write a directory that replaces an old one, keeping its README."""
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
