"""JSON documents and safetensors files, read with suspicion."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

from peftgraph.errors import AdapterError, PeftGraphError


def read_json(path: Path, missing: str, raises: type[PeftGraphError] = AdapterError) -> Any:
    """The content of a JSON file; numbers that JSON does not have are refused.

    Args:
        path: the file.
        missing: the message when it is not there.
        raises: what is raised.

    Raises:
        PeftGraphError: it is missing or unreadable.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"), parse_constant=_refuse_constant)
    except FileNotFoundError:
        raise raises(missing) from None
    except (OSError, ValueError, RecursionError) as error:
        raise raises(f"{path} is damaged: {error}") from None


def read_object(path: Path, missing: str, raises: type[PeftGraphError] = AdapterError) -> dict[str, Any]:
    """The object in a JSON file.

    Args, and what is raised, as for `read_json`; also where there is no object.
    """
    document = read_json(path, missing, raises)
    if not isinstance(document, dict):
        raise raises(f"{path} is damaged: it holds no JSON object.")
    return document


def read_tensors(path: Path, check: Callable[[bytes], None] = lambda content: None) -> dict[str, Tensor]:
    """The tensors of a safetensors file.

    Args:
        path: the file.
        check: looks at its bytes first.

    Raises:
        AdapterError: it is missing or unreadable.
    """
    try:
        content = path.read_bytes()
        check(content)
        return safetensors.torch.load(content)
    except FileNotFoundError:
        raise AdapterError(f"{path} is missing.") from None
    except AdapterError:
        raise
    except (OSError, SafetensorError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise AdapterError(f"{path} is damaged: {error}") from None


def _refuse_constant(word: str) -> None:
    raise ValueError(f"{word} is no JSON number")
