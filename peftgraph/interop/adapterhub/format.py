"""Declares the format of AdapterHub's `adapters` library: the entry point of the plug-in."""

from __future__ import annotations

from pathlib import Path

from peftgraph.interop.adapter_formats import AdapterFormat
from peftgraph.interop.adapterhub.load import read_adapterhub
from peftgraph.interop.adapterhub.saved_adapter import CONFIG
from peftgraph.interop.checked_files import read_json


def is_adapterhub(directory: Path) -> bool:
    """Check whether a directory is the library's: its configuration has both the model's class and the options.

    Raises:
        AdapterError: the configuration is damaged.
    """
    if not (directory / CONFIG).exists():
        return False
    found = read_json(directory / CONFIG, missing=f"{directory} contains no {CONFIG}.")
    return isinstance(found, dict) and "model_class" in found and isinstance(found.get("config"), dict)


FORMAT = AdapterFormat(
    name="adapterhub",
    description="AdapterHub's adapters 1.3: save_adapter with use_safetensors=True",
    detect=is_adapterhub,
    read=read_adapterhub,
)
