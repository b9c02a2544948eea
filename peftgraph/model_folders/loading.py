"""Builds models from local files: the configuration, the empty model on the meta device, the model with its weights.

Nothing is downloaded and no code of a checkpoint is run; only safetensors are read.
"""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from peftgraph.errors import PeftGraphError
from peftgraph.terminal.console import hush, working
from peftgraph.utils.atomic_files import read_regular_file
from peftgraph.utils.strict_json import parse_json

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig, PreTrainedModel

    import peftgraph as pg


def check_source(source: Path, *, weights: bool = False) -> None:
    """Refuse a folder that contains no model, before torch is imported.

    Args:
        source: the folder, or a configuration alone.
        weights: whether the weights are needed too.

    Raises:
        PeftGraphError: there is no configuration, it cannot be read, or there are no weights.
    """
    _model_type(_config_path(source))
    if weights:
        _check_weights(source)


def read_config(source: Path) -> PretrainedConfig:
    """Read the configuration in a folder, or in a file of its own.

    Raises:
        PeftGraphError: it is missing, damaged, or of an architecture that transformers does not have.
    """
    path = _config_path(source)
    kind = _model_type(path)
    hush()
    from transformers import AutoConfig
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    if kind not in CONFIG_MAPPING:
        close = difflib.get_close_matches(kind, list(CONFIG_MAPPING.keys()), n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        raise PeftGraphError(f"{path}: this transformers has no architecture {kind!r}.{hint}")
    try:
        return AutoConfig.from_pretrained(str(path), local_files_only=True, trust_remote_code=False)
    except Exception as error:  # a configuration class raises whatever its checks raise
        raise PeftGraphError(f"{path} is no configuration of {kind!r}: {first_line(error)}") from error


def skeleton(source: Path, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """Build the model of a configuration on the meta device: with every shape, and no memory.

    Args:
        source: the folder or the configuration.
        dtype: of its weights, instead of the configuration's.

    Raises:
        PeftGraphError: the configuration cannot be read, or no model can be built from it.
    """
    import torch

    config = read_config(source)
    cls = model_class(config, source)
    try:
        with working("building the model on the meta device"), torch.device("meta"):
            build = getattr(cls, "_from_config", None) or cls.from_config
            return cast("PreTrainedModel", build(config, **({} if dtype is None else {"dtype": dtype}))).eval()
    except Exception as error:  # impossible sizes and missing fields surface as any exception of the model's code
        raise PeftGraphError(f"{cls.__name__} cannot be built from {source}: {first_line(error)}") from error


def load(source: Path) -> PreTrainedModel:
    """Load the model of a folder with its weights.

    Raises:
        PeftGraphError: the folder contains no usable configuration, no safetensors, or not all of the model's weights.
    """
    config = read_config(source)
    cls = model_class(config, source)
    _check_weights(source)
    try:
        with working(f"loading {cls.__name__}"):
            model, notes = cls.from_pretrained(
                str(source),
                local_files_only=True,
                use_safetensors=True,
                trust_remote_code=False,
                output_loading_info=True,
            )
    except Exception as error:  # damaged files surface as errors of safetensors, json or torch
        raise PeftGraphError(f"The weights in {source} cannot be loaded: {first_line(error)}") from error
    if missing := sorted(notes["missing_keys"]):
        raise PeftGraphError(
            f"The weights in {source} lack {len(missing)} of {cls.__name__}'s tensors, {missing[0]} first."
        )
    return model.eval()


def trace(model: PreTrainedModel, *, cache: bool = False) -> pg.Program:
    """Trace a transformers model on inputs made from its configuration.

    Args:
        model: the model.
        cache: whether the program of an earlier trace may be taken, and this one is kept.
    """
    import peftgraph as pg
    from peftgraph.model_folders.example_inputs import example_inputs

    with working("tracing") as progress:
        return pg.trace(model, example_inputs(model), progress=progress, cache=cache)


def model_class(config: PretrainedConfig, source: Path) -> Any:
    """Return the class that the configuration names, else the bare model of its type.

    Raises:
        PeftGraphError: transformers has no such class.
    """
    import transformers

    names = getattr(config, "architectures", None)
    if not names:
        return transformers.AutoModel
    found = getattr(transformers, names[0], None)
    if found is None:
        raise PeftGraphError(f"{source}: this transformers has no class {names[0]!r}.")
    return found


def first_line(error: BaseException) -> str:
    """Return the first line of an error's text, for a message of one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


def _config_path(source: Path) -> Path:
    if not source.exists():
        raise PeftGraphError(f"{source} does not exist. Give a local folder or a config.json; nothing is downloaded.")
    path = source / "config.json" if source.is_dir() else source
    if not path.is_file():
        raise PeftGraphError(f"{source} contains no config.json, so it is no transformers model.")
    return path


def _check_weights(source: Path) -> None:
    if source.is_file() or not any(source.glob("*.safetensors")):
        raise PeftGraphError(
            f"{source} contains no weights (model.safetensors); this command needs them. Pickled weights are not read."
        )


def _model_type(path: Path) -> str:
    kind = _document(path).get("model_type")
    if not isinstance(kind, str):
        raise PeftGraphError(f"{path} does not say its model_type, so it is no transformers configuration.")
    return kind


def _document(path: Path) -> dict[str, Any]:
    try:
        document = parse_json(read_regular_file(path).decode())
    except (OSError, ValueError, RecursionError) as error:
        raise PeftGraphError(f"{path} cannot be read as JSON: {first_line(error)}") from None
    if not isinstance(document, dict):
        raise PeftGraphError(f"{path} contains no JSON object, so it is no transformers configuration.")
    return document
