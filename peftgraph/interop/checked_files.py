"""Reads JSON documents and safetensors files, and refuses what is damaged or ambiguous."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

from peftgraph.errors import AdapterError, PeftGraphError
from peftgraph.utils.atomic_files import read_regular_file
from peftgraph.utils.strict_json import parse_json

NAME = 1024  # characters of a tensor's name


def read_json(path: Path, missing: str, raises: type[PeftGraphError] = AdapterError) -> Any:
    """Read a JSON file; refuse numbers that JSON does not have or that are too long, and keys that occur twice.

    Args:
        path: the file.
        missing: the message when it does not exist.
        raises: the class of errors to raise.

    Raises:
        PeftGraphError: it is missing or unreadable.
    """
    try:
        return parse_json(read_regular_file(path).decode())
    except FileNotFoundError:
        raise raises(missing) from None
    except (OSError, ValueError, RecursionError) as error:
        raise raises(f"{path} is damaged: {error}") from None


def read_object(path: Path, missing: str, raises: type[PeftGraphError] = AdapterError) -> dict[str, Any]:
    """Read a JSON file that holds an object.

    Arguments and errors as for `read_json`; an error also where the file contains no object.
    """
    document = read_json(path, missing, raises)
    if not isinstance(document, dict):
        raise raises(f"{path} is damaged: it contains no JSON object.")
    return document


def read_tensors(path: Path, check: Callable[[bytes], None] = lambda content: None) -> dict[str, Tensor]:
    """Read the tensors of a safetensors file.

    Args:
        path: the file.
        check: called with the file's bytes before they are parsed; raises AdapterError to refuse them.

    Raises:
        AdapterError: it is missing or unreadable.
    """
    try:
        content = read_regular_file(path)
        check(content)
        tensors = safetensors.torch.load(content)
    except FileNotFoundError:
        raise AdapterError(f"{path} is missing.") from None
    except AdapterError:
        raise
    except (OSError, SafetensorError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise AdapterError(f"{path} is damaged: {error}") from None
    check_names(tensors, path)
    return tensors


def check_names(names: Iterable[str], path: Path) -> None:
    """Check that no tensor has an absurdly long name.

    Raises:
        AdapterError: one has.
    """
    long = next((name for name in names if len(name) > NAME), None)
    if long is not None:
        raise AdapterError(f"{path} is damaged: the name of a tensor has {len(long)} characters.")
