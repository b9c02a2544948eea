"""Reads peft's adapter_config.json: its options, and the modules that they select.

Source: huggingface/peft 0.21, config.py, tuners/tuners_utils.py (check_target_module_exists), utils/other.py
(get_pattern_key).
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from peftgraph.errors import AdapterError, PeftGraphError
from peftgraph.interop.checked_files import read_object
from peftgraph.utils.bounded_regex import compile_bounded

CONFIG = "adapter_config.json"
TENSORS = "adapter_model.safetensors"
T = TypeVar("T")

COMMON = (
    "peft_type", "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode",
    "modules_to_save",
)  # fmt: skip
TARGETS = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern")
ROWS = ("num_virtual_tokens", "token_dim", "num_transformer_submodules", "num_attention_heads", "num_layers")
# By method: the options that are read, and those that say nothing about a trained adapter.
KNOWN: dict[str, tuple[str, ...]] = {
    "LORA": (
        *TARGETS, "r", "lora_alpha", "lora_dropout", "fan_in_fan_out", "bias", "use_rslora", "init_lora_weights",
        "rank_pattern", "alpha_pattern", "use_dora", "lora_bias", "target_parameters", "trainable_token_indices",
        "megatron_core", "qalora_group_size", "runtime_config", "loftq_config", "eva_config",
    ),
    "ADALORA": (
        *TARGETS, "init_r", "target_r", "tinit", "tfinal", "deltaT", "beta1", "beta2", "orth_reg_weight", "total_step",
        "rank_pattern", "r", "lora_alpha", "lora_dropout", "fan_in_fan_out", "bias", "init_lora_weights",
        "alpha_pattern", "megatron_core", "loftq_config", "runtime_config", "qalora_group_size", "eva_config",
    ),
    "TRAINABLE_TOKENS": ("target_modules", "exclude_modules", "token_indices", "init_weights"),
    "IA3": (*TARGETS, "feedforward_modules", "fan_in_fan_out", "init_ia3_weights"),
    "PREFIX_TUNING": (*ROWS, "init_weights", "encoder_hidden_size", "prefix_projection"),
    "PROMPT_TUNING": (
        *ROWS, "prompt_tuning_init", "prompt_tuning_init_text", "tokenizer_name_or_path", "tokenizer_kwargs",
    ),
    "P_TUNING": (
        *ROWS, "encoder_reparameterization_type", "encoder_hidden_size", "encoder_num_layers", "encoder_dropout",
    ),
    "ADAPTION_PROMPT": ("target_modules", "adapter_len", "adapter_layers"),
}  # fmt: skip


PROMPTS = ("PREFIX_TUNING", "PROMPT_TUNING", "P_TUNING")  # peft's own word is prompt learning


@dataclass(frozen=True)
class PeftConfig:
    """The options of one adapter; missing ones and null are peft's defaults.

    Attributes:
        directory: of the adapter, for messages.
        options: the file's content.
    """

    directory: Path
    options: Mapping[str, Any]

    @classmethod
    def read(
        cls, directory: Path, known: Mapping[str, Collection[str]] = KNOWN, refused: str = "which no pass does."
    ) -> PeftConfig:
        """Read and check the options of a directory.

        Args:
            directory: of the adapter.
            known: the options that are read or have no effect, by method, besides those of every method.
            refused: the end of the sentence that refuses another option.

        Raises:
            AdapterError: the file is damaged, or has a method or an option that is not known.
        """
        path = directory / CONFIG
        options = read_object(path, missing=f"{directory} contains no {CONFIG}.")
        config = cls(directory, options)
        method = config.method
        if method not in known:
            raise AdapterError(f"{path} has peft_type={method!r}; those that are read are {', '.join(known)}.")
        unknown = [key for key, value in options.items() if value and key not in (*COMMON, *known[method])]
        if unknown:
            raise AdapterError(f"{path} has {unknown[0]}={options[unknown[0]]!r}, {refused}")
        return config

    @property
    def method(self) -> str:
        """peft's word for the method: "LORA"."""
        return self.option("peft_type", str, "")

    def option(self, key: str, kind: type[T] | tuple[type[T], ...], default: T) -> T:
        """Return an option of a kind, or its default.

        Raises:
            AdapterError: it is of another kind.
        """
        value = self.options.get(key)
        if value is None:
            return default
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise AdapterError(f"{self.directory / CONFIG} is damaged: {key} cannot be {value!r}.")
        return value

    def number(self, key: str, default: float) -> float:
        """Return an option that is a number, or its default."""
        return self.option(key, (int, float), default)

    def number_at(self, key: str, pattern: str, path: str, default: float) -> float:
        """Return the number of a module: that of the first entry of `pattern` that matches its path, else `key`'s."""
        entries: dict[str, Any] = self.option(pattern, dict, {})
        found = next((one for one in entries if self.matches(rf"(.*\.)?({one})$", path)), None)
        if found is None:
            return self.number(key, default)
        return PeftConfig(self.directory, entries).number(found, default)

    def scale(self, key: str) -> float:
        """Return alpha / rank, or alpha / sqrt(rank), of a module or of a parameter that is a target by itself; of
        AdaLoRA alpha / (rank + 1e-5), for the rank of its start."""
        if self.method == "ADALORA":
            return float(self.number("lora_alpha", 8)) / (int(self.number("init_r", 12)) + 1e-5)
        rank = self.rank(key)
        return self.alpha(key) / (math.sqrt(rank) if self.option("use_rslora", bool, False) else rank)

    def triplets(self, path: str) -> list[bool]:
        """Return which of the triplets of AdaLoRA's start the file has of a module.

        Raises:
            AdapterError: the rank pattern is damaged.
        """
        rank = int(self.number("init_r", 12))
        pattern: Any = self.option("rank_pattern", dict, {}).get(f"{path}.lora_E", [True] * rank)
        if not (isinstance(pattern, list) and len(pattern) == rank and all(isinstance(one, bool) for one in pattern)):
            raise AdapterError(f"{self.directory}: the rank pattern of {path} is no list of {rank} booleans.")
        return pattern

    @property
    def token_options(self) -> Any:
        """The tokens whose rows train: of the model's embedding, or of modules by the ends of their paths."""
        return self.option("trainable_token_indices", (list, dict), []) or self.option("token_indices", list, [])

    def tokens(self, path: str) -> tuple[int, ...]:
        """Return the tokens of a module whose rows train.

        Raises:
            AdapterError: they are no numbers.
        """
        found = self.token_options
        if isinstance(found, dict):
            found = next((value for end, value in found.items() if path.endswith(end)), [])
        if not isinstance(found, list) or not all(isinstance(one, int) and not isinstance(one, bool) for one in found):
            raise AdapterError(f"{self.directory / CONFIG} is damaged: the tokens of {path} cannot be {found!r}.")
        return tuple(found)

    def selects(self, path: str) -> bool:
        """Check whether a module is a target."""
        return self.matches_target("target_modules", path) and not (
            self.matches_target("exclude_modules", path)
            or any(self.matches(rf"(^|.*\.){one}($|\..*)", path) for one in self.option("modules_to_save", list, []))
            or not self._in_layers(path)
        )

    def check_selects(self, path: str) -> None:
        """Check that a module with tensors is a target; peft would not load them otherwise.

        Raises:
            AdapterError: it is none.
        """
        if self.options.get("target_modules") not in (None, "all-linear") and not self.selects(path):
            raise AdapterError(f"{self.directory}: {path} has tensors, but target_modules does not select it.")

    def trains_whole(self, path: str) -> bool:
        """Check whether a module trains as a whole (modules_to_save)."""
        return any(path.endswith(str(end)) for end in self.option("modules_to_save", list, []))

    def selects_parameter(self, name: str) -> bool:
        """Check whether a parameter is a target by itself (target_parameters)."""
        return ends_with(name, self.option("target_parameters", list, []))

    def target_parameters(self, names: Iterable[str], path: str) -> list[str]:
        """Return the parameters of a module that are targets by themselves, the innermost wrap first.

        Args:
            names: of a model's parameters, in its order.
            path: of the module.
        """
        return [name for name in names if name.rpartition(".")[0] == path and self.selects_parameter(name)]

    def rank(self, key: str) -> int:
        """Return the rank of a module, or of a parameter that is a target by itself."""
        return int(self.number_at("r", "rank_pattern", key, 8))

    def alpha(self, key: str) -> float:
        """Return alpha of a module, or of a parameter that is a target by itself."""
        return float(self.number_at("lora_alpha", "alpha_pattern", key, 8))

    def matches_target(self, option: str, path: str) -> bool:
        """Check whether an option selects a path: it is a regular expression, or a list of ends of paths."""
        value = self.options.get(option)
        if isinstance(value, str):
            return self.matches(rf"(?:{value})\Z", path)
        return ends_with(path, self.option(option, list, []))

    def matches(self, pattern: str, path: str) -> bool:
        """Check whether a regular expression of the file matches from the start of a path.

        Raises:
            AdapterError: it is no regular expression.
        """
        return self._match(pattern, path) is not None

    def _match(self, pattern: str, path: str) -> Any:
        try:
            return compile_bounded(pattern).match(path)
        except PeftGraphError as error:
            raise AdapterError(f"{self.directory / CONFIG} is damaged: {error}") from None

    def _in_layers(self, path: str) -> bool:
        """Check whether a path is in one of the layers of layers_to_transform."""
        layers = self.options.get("layers_to_transform")
        if layers in (None, []) or isinstance(self.options.get("target_modules"), str):
            return True
        if path in self.option("target_modules", list, []):
            return True
        patterns = self.options.get("layers_pattern") or r"[^.]*"
        for one in [patterns] if isinstance(patterns, str) else patterns:
            found = self._match(rf"(?:^|.*?\.){one}\.(\d+)\.", path)
            if found is not None and found[1] is not None and found[1].isdigit():
                return int(found[1]) in (layers if isinstance(layers, list) else [layers])
        return False


def ends_with(path: str, ends: Iterable[object]) -> bool:
    """Check whether a dotted path is one of `ends`, or ends with one after a dot."""
    return any(path == end or path.endswith(f".{end}") for end in ends)
