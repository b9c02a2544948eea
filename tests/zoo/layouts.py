"""Where the norms of transformers' types stand, as their papers and modelling code have it. For scoring only."""

from __future__ import annotations

import re
from typing import Literal

Layout = Literal["pre", "post", "sandwich"]
# Types whose residual sum is normed (the original transformer, BERT and what came of it).
POST = re.compile(
    r"(xlm-)?(roberta|camembert)(-xl)?(?<!xl)|bert|albert|electra|distilbert|mpnet|deberta(-v2)?|layoutlm(v[23])?|lilt|esm1|ernie|"
    r"nezha|rembert|roformer|convbert|big_bird|bert-generation|xlm|flaubert|openai-gpt|bart|marian|fsmt|prophetnet|"
    r"blenderbot-small|wav2vec2|hubert|sew|unispeech|unispeech-sat|wavlm|data2vec-(text|audio)|ibert|squeezebert|luke|"
    r"blip_2_qformer|informer|autoformer|time_series_transformer|"
    r"minimax|speecht5|dpr|gte|jina_embeddings_v3|roc_bert|nomic_bert|mra|nystromformer|yoso|canine|tapas|splinter|xmod|markuplm|mobilebert|funnel|bros|detr|conditional_detr|"
    r"sew-d|(blip_2|instructblip|instructblipvideo)_qformer|table-transformer|plbart|mvp|led|longformer|fnet|visual_bert|lxmert|xlnet|layoutxlm|(align|altclip|blip|chinese_clip|clap)_text_model|trocr|xglm1|megatron0"
)
# Types that norm a branch before it is added.
SANDWICH = re.compile(
    r"afmoe|timesfm2_5|beam|embedding_gemma2_text|glm4v_text|kolibri1|lfm3|muse_spark_text|glm_image_text|glm_ocr_text|muse_glimmer_text|hyperclovax|gemma2|gemma3(_text)?|gemma3n(_text)?|gemma4(_text|_unified_text|_vision|_audio)?|glm4|olmo2|olmo3|exaone4|swinv2|hrm_text|flex_olmo"
)
UNKNOWN = re.compile(r".*(_note|zamba|rwkv|mamba|xlstm|timesformer|deepseek_v4|hy_v4|zaya|axk1).*")


def layout(model_type: str) -> Layout | None:
    """None where it cannot be said of the whole type."""
    if UNKNOWN.fullmatch(model_type):
        return None
    if SANDWICH.fullmatch(model_type):
        return "sandwich"
    return "post" if POST.fullmatch(model_type) else "pre"
