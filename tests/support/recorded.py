"""The models on which `tests/references/record_adapters.py` records, and on which `test_adapters.py` compares.

Both releases of transformers build them, so nothing of one of them stands here.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parents[1] / "references" / "adapters"
VOCAB, WIDTH, HEADS, LAYERS, INNER = 29, 16, 4, 2, 24

SIZES = {
    "hidden_size": WIDTH,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "intermediate_size": INNER,
    "max_position_embeddings": 16,
    "vocab_size": VOCAB,
}
# name -> class, class of the configuration, configuration
MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "bert": ("BertModel", "BertConfig", SIZES),
    "gpt2": ("GPT2Model", "GPT2Config", {"vocab_size": VOCAB, "n_positions": 16, "n_embd": WIDTH, "n_layer": LAYERS,
                                         "n_head": HEADS, "n_inner": INNER, "bos_token_id": 1, "eos_token_id": 2}),
    "llama": ("LlamaModel", "LlamaConfig", {**SIZES, "num_key_value_heads": 2, "pad_token_id": 0}),
    "t5": ("T5Model", "T5Config", {"vocab_size": VOCAB, "d_model": WIDTH, "d_kv": 4, "d_ff": INNER, "num_heads": HEADS,
                                   "num_layers": LAYERS, "decoder_start_token_id": 0}),
    "vit": ("ViTModel", "ViTConfig", {"hidden_size": WIDTH, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS,
                                      "intermediate_size": INNER, "image_size": 8, "patch_size": 4}),
}  # fmt: skip
# what directories alone are recorded on
OTHERS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "bart": ("BartModel", "BartConfig", {"vocab_size": VOCAB, "d_model": WIDTH, "encoder_layers": LAYERS,
                                         "decoder_layers": LAYERS, "encoder_attention_heads": HEADS,
                                         "decoder_attention_heads": HEADS, "encoder_ffn_dim": INNER,
                                         "decoder_ffn_dim": INNER, "max_position_embeddings": 16, "pad_token_id": 0}),
    "beit": ("BeitModel", "BeitConfig", {"hidden_size": WIDTH, "num_hidden_layers": LAYERS,
                                         "num_attention_heads": HEADS, "intermediate_size": INNER, "image_size": 8,
                                         "patch_size": 4, "vocab_size": VOCAB,
                                         "use_absolute_position_embeddings": True}),
}  # fmt: skip
