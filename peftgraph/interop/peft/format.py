"""Declares peft's adapter format: the entry point of the plug-in."""

from __future__ import annotations

from pathlib import Path

from peftgraph.interop.adapter_formats import AdapterFormat
from peftgraph.interop.checked_files import read_json
from peftgraph.interop.peft.config import CONFIG
from peftgraph.interop.peft.load import read_peft
from peftgraph.interop.peft.merge_updates import peft_updates
from peftgraph.interop.peft.save import write_peft


def is_peft(directory: Path) -> bool:
    """Check whether a directory is peft's: its configuration has a peft_type, or is no object at all.

    Raises:
        AdapterError: the configuration is damaged.
    """
    if not (directory / CONFIG).exists():
        return False
    found = read_json(directory / CONFIG, missing=f"{directory} contains no {CONFIG}.")
    return not isinstance(found, dict) or "peft_type" in found


FORMAT = AdapterFormat(
    name="peft",
    description="huggingface/peft: save_pretrained and PeftModel.from_pretrained",
    detect=is_peft,
    read=read_peft,
    write=write_peft,
    checkpoint_updates=peft_updates,
)
