"""Reads peft's adapter_model.safetensors: tensors by the module that they belong to.

A key is `base_model.model.` (`base_model.` for rows before a model) and the path of a module, then the name of
the parameter. Where peft adapts several parameters of one module, each wraps the module once more: the path ends with
one `.base_layer` for every further wrap.
Source: huggingface/peft 0.21, utils/save_and_load.py, tuners/lora/layer.py (ParamWrapper).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from peftgraph.errors import AdapterError
from peftgraph.interop.checked_files import read_tensors
from peftgraph.interop.parameter_names import (
    ADALORA_E,
    ADALORA_P,
    ADALORA_Q,
    ADAPTION_GATE,
    ADAPTION_ROWS,
    DORA_MAGNITUDE,
    IA3_SCALE,
    LORA_A,
    LORA_B,
    TOKEN_ROWS,
)
from peftgraph.interop.peft.config import PROMPTS, TENSORS, PeftConfig

PREFIX = "base_model.model."
ROWS_PREFIX = "base_model."  # where a prompt or a prefix leaves the model itself alone
LORA_BIAS = "lora_bias"  # the bias of B, which no pass has a parameter for
LEAVES = {  # peft's name -> ours
    "lora_A.weight": LORA_A,
    "lora_B.weight": LORA_B,
    "lora_B.bias": LORA_BIAS,
    "lora_A": ADALORA_Q,
    "lora_E": ADALORA_E,
    "lora_B": ADALORA_P,
    "lora_embedding_A": LORA_A,
    "lora_embedding_B": LORA_B,
    "lora_magnitude_vector": DORA_MAGNITUDE,
    "lora_magnitude_vector.weight": DORA_MAGNITUDE,
    "ia3_l": IA3_SCALE,
    "adaption_prompt": ADAPTION_ROWS,
    "adaption_gate": ADAPTION_GATE,
    "token_adapter.trainable_tokens_delta": TOKEN_ROWS,
    "trainable_tokens_delta": TOKEN_ROWS,
}
KEY = re.compile(rf"(?P<path>.*?)(?P<wraps>(\.base_layer)*)\.(?P<leaf>{'|'.join(map(re.escape, LEAVES))})")
WRAPPED = re.compile(r"(\.token_adapter)?\.base_layer\.")  # around a module's own tensors
ROWS = "prompt_embeddings"


def parse_tensor_name(name: str) -> tuple[str, int, str] | str:
    """Parse the name of a tensor, without its prefix.

    Returns:
        The path of the module, the number of its further wraps and our name of the parameter; or, for a tensor of
        the base, its name in the base.
    """
    found = KEY.fullmatch(name)
    if found is None:
        return name.replace(".base_layer.", ".")
    return found["path"], found["wraps"].count("base_layer"), LEAVES[found["leaf"]]


def by_expert(a_RI: Tensor, b_OR: Tensor, experts: int) -> tuple[Tensor, Tensor]:
    """Return A (E, R, I) and B (E, O, R) of a stack of E experts, which peft stores as (E R, I) and (O, R E)."""
    return a_RI.unflatten(0, (experts, -1)), b_OR.unflatten(1, (-1, experts)).permute(2, 0, 1)


@dataclass(frozen=True)
class PeftTensors:
    """The tensors of one adapter.

    Attributes:
        modules: by the path of a module and the number of its further wraps; then by our name of the parameter.
        stored: tensors of the base that were trained or saved beside it, by name.
        rows: of a prompt or a prefix.
    """

    modules: Mapping[tuple[str, int], Mapping[str, Tensor]] = field(default_factory=dict)
    stored: Mapping[str, Tensor] = field(default_factory=dict)
    rows: Tensor | None = None

    @classmethod
    def read(cls, config: PeftConfig) -> PeftTensors:
        """Read the tensors of a directory.

        Raises:
            AdapterError: the file is missing, a pickle, or damaged.
        """
        path = config.directory / TENSORS
        if not path.exists() and path.with_suffix(".bin").exists():
            raise AdapterError(
                f"{path.with_suffix('.bin')} is a pickle, which is not read. Load it with peft and save_pretrained it "
                f"again, which writes {TENSORS}."
            )
        prefix = ROWS_PREFIX if config.method in PROMPTS else PREFIX
        modules: dict[tuple[str, int], dict[str, Tensor]] = {}
        stored: dict[str, Tensor] = {}
        rows = None
        for key, value in sorted(read_tensors(path).items()):
            name = key.removeprefix(prefix)
            parsed = parse_tensor_name(name)
            if not isinstance(parsed, str):
                modules.setdefault(parsed[:2], {})[parsed[2]] = value
            elif name == ROWS:
                rows = value
            else:
                stored[WRAPPED.sub(".", name)] = value
        return cls(modules, stored, rows)

    def at(self, module: tuple[str, int], leaf: str, config: PeftConfig) -> Tensor:
        """Return one tensor of a module.

        Raises:
            AdapterError: it is missing.
        """
        if leaf not in self.modules[module]:
            known = ", ".join(self.modules[module])
            raise AdapterError(f"{config.directory}: {module[0]} has no {leaf}, but {known}.")
        return self.modules[module][leaf]
