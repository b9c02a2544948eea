"""Reads peft's `adapter_config.json` for a merge by weights, and refuses what cannot be merged so."""

from __future__ import annotations

from pathlib import Path

from peftgraph.errors import AdapterError
from peftgraph.interop.peft.config import PeftConfig

# Options that do not change the merge: where adapters are, how they start and train, and where they come from.
SELECTION = ("bias", "exclude_modules", "fan_in_fan_out", "feedforward_modules", "layers_pattern",
             "layers_to_transform", "target_modules")  # fmt: skip
STARTS = ("corda_config", "ensure_weight_tying", "eva_config", "init_ia3_weights", "loftq_config", "lora_dropout",
          "lora_ga_config", "megatron_core", "qalora_group_size", "runtime_config")  # fmt: skip
READ = ("init_lora_weights", "alpha_pattern", "lora_alpha", "lora_bias", "r", "rank_pattern", "target_parameters",
        "trainable_token_indices", "use_dora", "use_rslora")  # fmt: skip
MERGED = {
    "LORA": (*SELECTION, *STARTS, *READ),
    "ADALORA": (
        *SELECTION,
        *STARTS,
        "init_lora_weights",
        "lora_alpha",
        "r",
        "init_r",
        "rank_pattern",
        "target_r",
        "tinit",
        "tfinal",
        "deltaT",
        "beta1",
        "beta2",
        "orth_reg_weight",
        "total_step",
    ),
    "IA3": (*SELECTION, *STARTS),
    "TRAINABLE_TOKENS": (*SELECTION, "init_weights", "token_indices"),
}
PLAIN_STARTS = (None, True, False, "gaussian", "orthogonal", "eva")  # the others change the base's weights


def read_merge(directory: Path) -> PeftConfig:
    """Read and check the options of an adapter that is to be merged weight by weight.

    Raises:
        AdapterError: it is no LoRA, AdaLoRA, (IA)3 or rows of tokens, or has an option that no change of the base's
            weights expresses.
    """
    refused = "and no merge by weights that is known to be exact. Merge it with peft's own merge_and_unload."
    config = PeftConfig.read(directory, MERGED, refused)
    start = config.options.get("init_lora_weights")
    if start not in PLAIN_STARTS:
        raise AdapterError(
            f"{directory} starts with init_lora_weights={start!r}, which changes the base's weights too. Save it from "
            "peft with path_initial_model_for_weight_conversion first."
        )
    return config
