"""Names the parameters of passes that foreign adapter formats read and write: the last parts of their full names."""

from __future__ import annotations

LORA_A = "lora_A"  # (R, I)
LORA_B = "lora_B"  # (O, R)
LORA_A0 = "lora_A0"  # the frozen start of A, which is subtracted
LORA_B0 = "lora_B0"
ADALORA_Q = "adalora_Q"  # (R, I)
ADALORA_E = "adalora_e"  # (R, 1)
ADALORA_P = "adalora_P"  # (O, R)
DORA_MAGNITUDE = "dora_m"  # (O,)
IA3_SCALE = "ia3_l"
BIAS_SHIFT = "bitfit_d"  # what BitFit adds where there is no bias, or to a part of one
PREFIX_KEYS = "prefix_k"
PREFIX_VALUES = "prefix_v"
PROMPT_ROWS = "prompt"
ADAPTION_ROWS = "prefix"  # LLaMA-Adapter
ADAPTION_GATE = "gate"
TOKEN_ROWS = "tokens"
