"""peft's adapter_model.safetensors: tensors by the module that they belong to.

A key is `base_model.model.` (`base_model.` for rows in front of a model) and the path of a module, then the name of
what peft put there. Where peft adapts several parameters of one module, each wraps the module once more: `.base_layer`
stands behind the path for every wrap around.
Source: huggingface/peft 0.21, utils/save_and_load.py, tuners/lora/layer.py (ParamWrapper).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from peftgraph.errors import AdapterError
from peftgraph.interop.documents import read_tensors
from peftgraph.interop.peft.config import PROMPTS, TENSORS, PeftConfig

PREFIX = "base_model.model."
ROWS_PREFIX = "base_model."  # where a prompt or a prefix leaves the model itself alone
LEAVES = {  # peft's name -> ours
    "lora_A.weight": "lora_A",
    "lora_B.weight": "lora_B",
    "lora_B.bias": "lora_bias",
    "lora_embedding_A": "lora_A",
    "lora_embedding_B": "lora_B",
    "lora_magnitude_vector": "dora_m",
    "lora_magnitude_vector.weight": "dora_m",
    "ia3_l": "ia3_l",
    "adaption_prompt": "prefix",
    "adaption_gate": "gate",
    "token_adapter.trainable_tokens_delta": "tokens",
    "trainable_tokens_delta": "tokens",
}
KEY = re.compile(rf"(?P<path>.*?)(?P<wraps>(\.base_layer)*)\.(?P<leaf>{'|'.join(map(re.escape, LEAVES))})")
WRAPPED = re.compile(r"(\.token_adapter)?\.base_layer\.")  # around a module's own tensors
ROWS = "prompt_embeddings"


def place_of(name: str) -> tuple[str, int, str] | str:
    """Where a tensor belongs: a module's path, how often it is wrapped further and our name; or a tensor of the base.

    Args:
        name: of the tensor, without the prefix.
    """
    found = KEY.fullmatch(name)
    if found is None:
        return name.replace(".base_layer.", ".")
    return found["path"], found["wraps"].count("base_layer"), LEAVES[found["leaf"]]


def by_expert(a_RI: Tensor, b_OR: Tensor, experts: int) -> tuple[Tensor, Tensor]:
    """A (E, R, I) and B (E, O, R) of a stack of experts, which peft keeps as (E R, I) and (O, R E)."""
    return a_RI.unflatten(0, (experts, -1)), b_OR.unflatten(1, (-1, experts)).permute(2, 0, 1)


@dataclass(frozen=True)
class PeftTensors:
    """The tensors of one adapter.

    Attributes:
        modules: by the path of a module and how often it is wrapped further; then by our name of the parameter.
        stored: tensors of the base that were trained or saved beside, by their names.
        rows: those of a prompt or a prefix.
    """

    modules: Mapping[tuple[str, int], Mapping[str, Tensor]] = field(default_factory=dict)
    stored: Mapping[str, Tensor] = field(default_factory=dict)
    rows: Tensor | None = None

    @classmethod
    def read(cls, config: PeftConfig) -> PeftTensors:
        """The tensors of a directory.

        Raises:
            AdapterError: the file is missing, a pickle, or damaged.
        """
        path = config.directory / TENSORS
        if not path.exists() and path.with_suffix(".bin").exists():
            raise AdapterError(
                f"{path.with_suffix('.bin')} is a pickle, which is not read. Load it with peft and save_pretrained it "
                f"again, which writes {TENSORS}."
            )
        prefix = ROWS_PREFIX if config.of("peft_type", str, "") in PROMPTS else PREFIX
        modules: dict[tuple[str, int], dict[str, Tensor]] = {}
        stored: dict[str, Tensor] = {}
        rows = None
        for key, value in sorted(read_tensors(path).items()):
            name = key.removeprefix(prefix)
            place = place_of(name)
            if not isinstance(place, str):
                modules.setdefault(place[:2], {})[place[2]] = value
            elif name == ROWS:
                rows = value
            else:
                stored[WRAPPED.sub(".", name)] = value
        return cls(modules, stored, rows)

    def of(self, place: tuple[str, int], leaf: str, config: PeftConfig) -> Tensor:
        """One tensor at a module.

        Raises:
            AdapterError: it is missing.
        """
        if leaf not in self.modules[place]:
            raise AdapterError(f"{config.directory}: {place[0]} has no {leaf}, but {', '.join(self.modules[place])}.")
        return self.modules[place][leaf]
