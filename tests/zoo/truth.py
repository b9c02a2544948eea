"""What a transformers model holds, read from the paths and classes of its modules. For scoring only.

The eager model is run once with hooks, so that only what a forward really calls is expected, as often as it is called.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import nn
from torch.utils import _pytree as pytree

from .entry import Expected, Part, Truth
from .fused import fused, gated, latent, queries
from .layouts import layout

NAMES = {  # a projection's own name, by role
    "q": "q_proj projection_query experts.input_linear query q q_lin query_proj project_q Wq q_head linear_q to_q",
    "k": "k_proj projection_key key k k_lin key_proj project_k Wk k_head linear_k to_k",
    "v": "v_proj projection_value value v v_lin value_proj project_v Wv v_head linear_v to_v",
    "qkv": "c_attn att_proj qkv qkv_proj Wqkv query_key_value in_proj in_proj_weight",
    "kv": "to_kv kv_proj",
    "o": "o_proj o_b_proj out_proj o out_lin output_proj attention_out dense proj projection projection_layer "
    "Wo linear_out to_out c_proj post_proj post output experts.output_linear",
}
OUTER = ("output.dense", "output")  # an output projection that stands beside the attention's module
FEEDFORWARDS = (  # up, down, gate: of one module
    ("up_proj", "down_proj", "gate_proj"),
    ("gate_up_proj", "down_proj", None),
    ("fc1", "fc2", None),
    ("linear_fc1", "linear_fc2", None),
    ("lin1", "lin2", None),
    ("c_fc", "c_proj", None),
    ("dense_h_to_4h", "dense_4h_to_h", None),
    ("intermediate_dense", "output_dense", None),
    ("wi_1", "wo", "wi_0"),
    ("wi", "wo", None),
    ("w3", "w2", "w1"),
    ("Wi", "Wo", None),
    ("linear1", "linear2", None),
    ("fc_in", "fc_out", None),
    ("layer_1", "layer_2", None),
    ("linear_1", "linear_2", None),
    ("w_in.w_1", "w_out", "w_in.w_0"),
    ("input_linear", "output_linear", None),
    ("intermediate.dense", "output.dense", None),
    ("intermediate_query.dense", "output_query.dense", None),
)
# Attention by name that is none: no softmax over products of queries and keys.
NO_ATTENTION = re.compile(
    r"Lightning|(?<!Kimi)LinearAttention|Delta|Mamba|Rwkv|Efficient\w*Additive|Deformable|FNet|Mixer|Recurrent|ShortConv|xLSTM|Yoso|Mra|Indexer"
)
LEARNED_QUERIES = re.compile(r"head\.attention|MultiheadAttention$|AttentionPool|Perceiver|Resampler|Latent")
TWICE = re.compile(r"DiffLlama|ProphetNetNgram|Lilt")  # two attentions in one module
UNTOLD = re.compile(r"Zaya|DabDetr|Levit")  # projections that several modules hold, under names of their own
# Small networks that modulate a norm, and those that take one model's width to another's, outside of any block.
NO_FEEDFORWARD = re.compile(
    r"norm|projector|aligner|connector|merger|mask_head|vision_adapter|patch_mixer|(text|audio)_projection"
)
NO_LAYERS = re.compile(r"Funnel|MobileViT|Cvt")  # one stack in several lists
CROSS = re.compile(
    r"cross|encoder_attn|encdec|encoder_decoder|encoder_attention|enc_attn|x_attn|visual_attention|token_to_image|image_to_token",
    re.IGNORECASE,
)


def truth(model: nn.Module, example: Mapping[str, Any]) -> Truth:
    """What `model` holds."""
    return Reader(model, calls(model, example)).read()


def calls(model: nn.Module, example: Mapping[str, Any]) -> Counter[str]:
    """How often one forward of `model` calls each of its modules, by path; not those whose results it throws away."""
    counts: Counter[str] = Counter()
    modules = {module: name for name, module in model.named_modules()}

    def count(module: nn.Module, *_: Any) -> None:
        counts[modules[module]] += 1

    hooks = [module.register_forward_pre_hook(count) for module in modules]
    state = model.training
    model.eval()
    try:
        try:
            answer = _answer(model, example)
        finally:
            for hook in hooks:
                hook.remove()
        dead = _unread(model, example, answer)
    finally:
        model.train(state)
    paths = {path for path in counts if _all_in(dead, model, path)}
    return Counter({path: count for path, count in counts.items() if path not in paths})


def _answer(model: nn.Module, example: Mapping[str, Any]) -> list[torch.Tensor]:
    torch.manual_seed(0)
    return [one for one in pytree.tree_leaves(model(**example)) if isinstance(one, torch.Tensor)]


def _unread(model: nn.Module, example: Mapping[str, Any], answer: Sequence[torch.Tensor]) -> set[str]:
    """The parameters that no output depends on: those without a gradient, if the outputs stay when they change."""
    named = [(name, one) for name, one in model.named_parameters(remove_duplicate=False) if one.requires_grad]
    total = sum((one.abs().sum() for one in answer if one.requires_grad), torch.zeros(()))
    if not named or not total.requires_grad:
        return set()
    slopes = torch.autograd.grad(total, [one for _, one in named], allow_unused=True)
    dead = {name: one for (name, one), slope in zip(named, slopes, strict=True) if slope is None}
    before = {name: one.detach().clone() for name, one in dead.items()}
    with torch.no_grad():
        for one in dead.values():
            one.mul_(1.5).add_(0.25)
        changed = [not torch.equal(a, b) for a, b in zip(answer, _answer(model, example), strict=True)]
        for name, one in dead.items():
            one.copy_(before[name])
    return set() if any(changed) else set(dead)


def _all_in(names: set[str], model: nn.Module, path: str) -> bool:
    """Whether a module has parameters, and none but these."""
    own = [f"{path}.{name}" if path else name for name, _ in model.get_submodule(path).named_parameters()]
    return bool(own) and names.issuperset(own)


class Reader:
    """Finds the attentions and the feed-forwards of a model by the names of its modules."""

    def __init__(self, model: nn.Module, called: Counter[str]) -> None:
        self.model, self.called = model, called
        self.modules = dict(model.named_modules())
        self.parameters = dict(model.named_parameters(remove_duplicate=False))
        self.taken: set[str] = set()
        config = getattr(model, "config", None)
        composed = bool(getattr(config, "sub_configs", None))
        self.layout = None if composed else layout(getattr(config, "model_type", ""))

    def read(self) -> Truth:
        if UNTOLD.match(type(self.model).__name__):
            return Truth(None, None)
        return Truth(tuple(self.attentions()), tuple(self.feedforwards()))

    def suspicious(self) -> list[str]:
        """Modules that are called after something this reader did not recognise."""
        claimed = {name.rpartition(".")[0] for name in self.taken} | self.taken
        return [
            f"{path}:{type(module).__name__}"
            for path, module in self.modules.items()
            if self.called[path]
            and re.search("Att|MLP|Mlp|FeedForward|FFN", type(module).__name__)
            and not any(f"{one}.".startswith(f"{path}.") for one in claimed)
            and any(True for _ in module.parameters())
        ]

    def attentions(self) -> Iterator[Expected]:
        for path, module in self.modules.items():
            if not self.called[path] or NO_ATTENTION.search(type(module).__name__):
                continue
            parts = self._attention(path, module)
            if parts:
                self.taken |= {part.parameter for part in parts}
                kind = self.kind(path, type(module).__name__)
                uses = self.called[path] * (2 if TWICE.match(type(module).__name__) else 1)
                layer = self.layer(path)
                yield Expected(path, tuple(parts), layer, kind, None if layer is None else self.layout, uses)

    def kind(self, path: str, name: str) -> Literal["self", "cross"] | None:
        """None for pooling by learned queries, which may be called either."""
        if LEARNED_QUERIES.search(f"{path} {name}"):
            return None
        own = ".".join(path.split(".")[-3:])  # not a layer that is called so for holding one
        return "cross" if CROSS.search(f"{own} {name}") else "self"

    def feedforwards(self) -> Iterator[Expected]:
        for path in self.modules:
            parts = [] if any(map(NO_FEEDFORWARD.search, path.split(".")[-2:])) else self._feedforward(path)
            if parts and self._runs(path, parts[0].parameter) and not {part.parameter for part in parts} & self.taken:
                self.taken |= {part.parameter for part in parts}
                layer = self.layer(path)
                placed = None if layer is None else self.layout
                yield Expected(path, tuple(parts), layer, None, placed, max(1, self.called[path]))

    def _runs(self, path: str, parameter: str) -> bool:
        """A tower whose inputs are not in the example is never called."""
        return any(self.called[name] for name in (path, parameter.rpartition(".")[0]))

    def weight(self, path: str, name: str) -> str | None:
        """The full name of the weight called `name` beneath a module: its own, a child's, or a wrapped child's."""
        stem = f"{path}.{name}" if path else name
        for full in (stem, f"{stem}.weight", f"{stem}.linear.weight"):
            if full in self.parameters and self.parameters[full].dim() > 1:
                return full
        return None

    def named(self, path: str, role: str) -> str | None:
        found = (self.weight(path, name) for name in NAMES[role].split())
        return next((name for name in found if name is not None), None)

    def _attention(self, path: str, module: nn.Module) -> list[Part]:
        separate = {role: self.named(path, role) for role in "qkv"}
        whole, pair = self.named(path, "qkv"), self.named(path, "kv")
        parts: list[Part] = latent(self, path, module)
        if parts:
            pass
        elif all(separate.values()):
            parts = queries(self, path, module) or [
                Part(f"attention.{role}", name) for role, name in separate.items() if name
            ]
        elif whole and not separate["q"] and re.search("Att", type(module).__name__):
            parts = fused(self.model, module, whole)
        elif separate["k"] and separate["v"] and re.search("Pool", type(module).__name__):
            parts = [Part("attention.k", separate["k"]), Part("attention.v", separate["v"])]  # queries are parameters
        elif separate["q"] and getattr(module, "is_kv_shared_layer", False):  # keys and values are another layer's
            parts = [Part("attention.q", separate["q"])]
        elif whole or not (separate["q"] and pair):
            return []
        else:
            parts = fused(self.model, module, separate["q"], pair)
        out = self.output(path)
        return [*parts, Part("attention.o", out)] if out else parts

    def output(self, path: str) -> str | None:
        own = self.named(path, "o")
        if own is not None:
            return own
        parent = path.rpartition(".")[0]
        for name in OUTER:
            found = self.weight(parent, name)
            if found is not None and not self.weight(parent, "intermediate.dense"):
                return found
        return None

    def _feedforward(self, path: str) -> list[Part]:
        for up, down, gate in FEEDFORWARDS:
            first, last = self.weight(path, up), self.weight(path, down)
            between = gate and self.weight(path, gate)
            if first is None or last is None:
                continue
            parts = [Part("ffn.up", first)]
            if between:
                parts.append(Part("ffn.gate", between))
            elif gate is None:
                parts = gated(self.model, self.modules[path], first, last)
            return [*parts, Part("ffn.down", last)]
        return []

    def layer(self, path: str) -> int | None:
        """The number in the innermost list of alike modules; None inside several such lists."""
        parts = path.split(".")
        numbers: list[int] = []
        for i, part in enumerate(parts):
            holder = self.modules.get(".".join(parts[:i]))
            numbered = part.isdigit() and isinstance(holder, nn.ModuleList) and "expert" not in parts[i - 1]
            if numbered and len({type(one) for one in holder}) == 1:
                numbers.append(int(part))
        return numbers[0] if len(numbers) == 1 and not NO_LAYERS.match(type(self.model).__name__) else None
