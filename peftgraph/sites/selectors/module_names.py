"""Hints for those who write the names of modules in the place of roles. Nothing is found by these names."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Final

Q, K, V, O = "attention.q", "attention.k", "attention.v", "attention.o"  # noqa: E741
FUSED: Final = f"{Q}|{K}|{V}"

# The names that tutorials of other libraries use most, and the selectors of what they usually are.
USUAL_ROLES: Final[Mapping[str, str]] = {
    **dict.fromkeys(("q_proj", "query", "q_lin", "to_q", "wq"), Q),
    **dict.fromkeys(("k_proj", "key", "k_lin", "to_k", "wk"), K),
    **dict.fromkeys(("v_proj", "value", "v_lin", "to_v", "wv"), V),
    **dict.fromkeys(("o_proj", "out_proj", "out_lin", "wo"), O),
    **dict.fromkeys(("c_attn", "qkv", "qkv_proj", "query_key_value", "in_proj_weight"), FUSED),
    **dict.fromkeys(("up_proj", "fc1", "c_fc", "lin1", "dense_h_to_4h"), "ffn.up"),
    **dict.fromkeys(("down_proj", "fc2", "lin2", "dense_4h_to_h"), "ffn.down"),
    "gate_proj": "ffn.gate",
    "gate_up_proj": "ffn.gate|ffn.up",
    **dict.fromkeys(("lm_head", "classifier", "score", "qa_outputs"), "head"),
    **dict.fromkeys(("embed_tokens", "wte", "word_embeddings"), "embedding"),
    **dict.fromkeys(("layernorm", "LayerNorm", "layer_norm", "ln_1", "ln_2", "rmsnorm"), "norm"),
}


def hint_for_module_name(word: str) -> str:
    """Return how to select by structure, and by name, what an unknown word names; "" where it names no module."""
    usual = USUAL_ROLES.get(word.rpartition(".")[2])
    by_name = f'weight.where(path=".*{re.escape(word)}")'
    if usual is not None:
        return f"; that is a name of modules. By structure it usually is {usual}; by name, write {by_name}"
    if "_" in word or any(char.isdigit() for char in word):
        return f"; if it is the name of a module, write {by_name}"
    return ""
