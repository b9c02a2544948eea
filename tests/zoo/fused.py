"""Which columns of a fused projection are whose, by model type. Known from the code of each type."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from torch import nn

from .entry import Part

if TYPE_CHECKING:
    from .truth import Reader

PER_HEAD = r"GPTNeoX|Bloom|Persimmon|Disentangled|GptNeoX|Fuyu"  # [heads, 3, head]


def fused(model: nn.Module, module: nn.Module, *names: str) -> list[Part]:
    """The parts q, k and v of one weight for all, or of one for q and one for k and v."""
    stored = dict(model.named_parameters(remove_duplicate=False))
    if len(names) == 2:
        half = _out(model, module, stored[names[1]], names[1]) // 2
        k, v = frozenset(range(half)), frozenset(range(half, 2 * half))
        return [Part("attention.q", names[0]), Part("attention.k", names[1], k), Part("attention.v", names[1], v)]
    out, inner = _sizes(stored[names[0]], module, names[0])
    groups = columns(module, out, inner)
    return [Part(f"attention.{role}", names[0], frozenset(group)) for role, group in zip("qkv", groups, strict=True)]


def latent(reader: Reader, path: str, module: nn.Module) -> list[Part]:
    """The parts of multi-head latent attention, where keys and values come from one small latent."""
    query = reader.weight(path, "q_b_proj") or reader.weight(path, "q_gate_proj") or reader.weight(path, "q_proj")
    both, low, shared = (reader.weight(path, name) for name in ("kv_b_proj", "kv_a_proj_with_mqa", "kv_proj"))
    if query and shared and reader.weight(path, "q_b_proj"):  # one projection is key and value
        return [Part("attention.q", query), Part("attention.k", shared), Part("attention.v", shared)]
    if not query or not both or not low:
        return []
    sizes: Any = module if hasattr(module, "qk_nope_head_dim") else module.config
    plain, value, rotary = sizes.qk_nope_head_dim, sizes.v_head_dim, sizes.qk_rope_head_dim
    heads = range(reader.parameters[both].shape[0] // (plain + value))
    rank = reader.parameters[low].shape[0] - rotary
    return [
        Part(
            "attention.q",
            query,
            per_head(heads, plain + rotary + value, 0, plain + rotary) if "gate" in query else None,
        ),
        Part("attention.k", both, per_head(heads, plain + value, 0, plain)),
        Part("attention.v", both, per_head(heads, plain + value, plain, plain + value)),
        Part("attention.k", low, frozenset(range(rank, rank + rotary)), optional=True),
    ]


def per_head(heads: Iterable[int], size: int, start: int, stop: int) -> frozenset[int]:
    """Columns `start` to `stop` of every head of `size` columns."""
    return frozenset(head * size + column for head in heads for column in range(start, stop))


def queries(reader: Reader, path: str, module: nn.Module) -> list[Part]:
    """The parts of an attention whose query projection also makes an output gate: per head, query then gate."""
    names = [reader.weight(path, f"{role}_proj") for role in "qkvo"]
    if not all(names):
        return []
    (query, key, value, out) = (str(name) for name in names)
    width = reader.parameters[out].shape[-1]
    if reader.parameters[query].shape[0] != 2 * width or not hasattr(module, "head_dim"):
        return []
    size: Any = module.head_dim
    own = per_head(range(width // size), 2 * size, 0, size)
    return [Part("attention.q", query, own), Part("attention.k", key), Part("attention.v", value)]


def columns(module: nn.Module, out: int, inner: int) -> Sequence[Iterable[int]]:
    """The columns of q, k and v in a fused projection of `out` features."""
    kind = type(module).__name__
    if re.search(PER_HEAD, kind):
        heads = _heads(module)
        size = out // (3 * heads)
        return [[h * 3 * size + i * size + c for h in range(heads) for c in range(size)] for i in range(3)]
    if kind.startswith("CodeGen"):
        third = out // 12
        return [[g * 3 * third + i * third + c for g in range(4) for c in range(third)] for i in (0, 2, 1)]
    queries = inner if out != 3 * inner else out // 3
    rest = (out - queries) // 2
    return [range(queries), range(queries, queries + rest), range(queries + rest, out)]


def gated(model: nn.Module, module: nn.Module, up: str, down: str) -> list[Part]:
    """The parts of one weight for gate and up, or of a plain up projection."""
    stored = dict(model.named_parameters(remove_duplicate=False))
    out, hidden = _sizes(stored[up], module, up)[0], _sizes(stored[down], module, down)[1]
    if stored[up].dim() == 3 and stored[up].shape[-1] != stored[down].shape[-2]:  # stored (in, out)
        out, hidden = stored[up].shape[-1], stored[down].shape[-2]
    if out != 2 * hidden:
        return [Part("ffn.up", up)]
    first, second = range(hidden), range(hidden, out)
    if re.search("GptOss|OpenAIPrivacy", type(module).__name__):
        first, second = range(0, out, 2), range(1, out, 2)
    if re.search("Moonshine", type(module).__name__):
        first, second = second, first
    return [Part("ffn.gate", up, frozenset(first)), Part("ffn.up", up, frozenset(second))]


def _out(model: nn.Module, module: nn.Module, tensor: Any, name: str) -> int:
    return _sizes(tensor, module, name)[0]


def _sizes(tensor: Any, module: nn.Module, name: str) -> tuple[int, int]:
    """(out, in) of a stored weight; Conv1D stores (in, out), as do a few stacks of experts."""
    child = name.removesuffix(".weight").rpartition(".")[2]
    owner = getattr(module, child, None)
    shape = tensor.shape[-2:] if tensor.dim() == 3 else tensor.shape
    if type(owner).__name__ == "Conv1D" or (getattr(module, "is_transposed", False) and tensor.dim() == 3):
        return int(shape[1]), int(shape[0])
    return int(shape[0]), int(shape[1])


def _heads(module: nn.Module) -> int:
    for name in ("num_attention_heads", "num_heads", "n_heads", "n_head"):
        if isinstance(getattr(module, name, None), int):
            return getattr(module, name)
    return module.config.num_attention_heads  # pyright: ignore
