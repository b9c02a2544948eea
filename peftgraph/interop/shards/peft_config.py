"""What huggingface/peft's `adapter_config.json` says of a merge: the scale of each LoRA, and what cannot be merged."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peftgraph.errors import AdapterError
from peftgraph.interop.shards.checkpoint import read_json

CONFIG = "adapter_config.json"

# Options that leave the merge as it is: where adapters are put, how they start and train, and where they come from.
HARMLESS = {
    "auto_mapping", "base_model_name_or_path", "bias", "corda_config", "ensure_weight_tying", "eva_config",
    "exclude_modules", "feedforward_modules", "fan_in_fan_out", "inference_mode", "init_ia3_weights",
    "layers_pattern", "layers_to_transform", "loftq_config", "lora_dropout", "lora_ga_config", "megatron_core",
    "modules_to_save", "peft_version", "qalora_group_size", "revision", "runtime_config", "target_modules",
    "task_type",
}  # fmt: skip
READ = {"peft_type", "init_lora_weights", "alpha_pattern", "lora_alpha", "lora_bias", "r", "rank_pattern",
        "use_dora", "use_rslora"}  # fmt: skip
PLAIN_STARTS = (None, True, False, "gaussian", "orthogonal", "eva")  # the others change the base's weights


@dataclass(frozen=True)
class PeftConfig:
    """The configuration of a LoRA or (IA)3 adapter of peft.

    Attributes:
        directory: where it lies.
        options: its content.
    """

    directory: Path
    options: Mapping[str, Any]

    @classmethod
    def read(cls, directory: Path) -> PeftConfig:
        """Reads and checks the configuration.

        Raises:
            AdapterError: it is no LoRA or (IA)3, or has an option that a sum with the base's weights does not express.
        """
        config = cls(directory, read_json(directory / CONFIG))
        kind = config.options.get("peft_type")
        if kind not in ("LORA", "IA3"):
            raise AdapterError(f"{directory} is a {kind} adapter of peft; LORA and IA3 are merged into weights here.")
        for option, value in config.options.items():
            if value and option not in HARMLESS | READ:
                raise AdapterError(
                    f"{directory} has {option}={value!r}, and no merge by weights that is known to be exact. Merge it "
                    "with peft's own merge_and_unload."
                )
        start = config.options.get("init_lora_weights")
        if start not in PLAIN_STARTS:
            raise AdapterError(
                f"{directory} starts with init_lora_weights={start!r}, which changes the base's weights too. Save it "
                "from peft with path_initial_model_for_weight_conversion first."
            )
        return config

    def rank(self, module: str) -> int:
        """The rank at a module."""
        return int(self._at(module, "rank_pattern", "r"))

    def scale(self, module: str) -> float:
        """alpha / rank, or alpha / sqrt(rank), at a module."""
        rank = self.rank(module)
        alpha = self._at(module, "alpha_pattern", "lora_alpha")
        return alpha / (math.sqrt(rank) if self.options.get("use_rslora") else rank)

    def _at(self, module: str, patterns: str, default: str) -> float:
        """The value of the first pattern that matches the end of a module's name; else the default."""
        for pattern, value in (self.options.get(patterns) or {}).items():
            if re.match(rf"(.*\.)?({pattern})$", module):
                return value
        if default not in self.options:
            raise AdapterError(f"{self.directory / CONFIG} has no {default!r}.")
        return self.options[default]
