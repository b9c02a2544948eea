"""Rows of a pass's own among the embedded tokens, and which positions of a sequence hold tokens."""

from peftgraph.rewrite.attention.padding_mask import first_and_last_masks as first_and_last_masks
from peftgraph.rewrite.attention.padding_mask import token_mask as token_mask
from peftgraph.rewrite.prompt_rows import PromptRows as PromptRows
from peftgraph.rewrite.sequence.prepend_tokens import PrependTokens as PrependTokens
from peftgraph.rewrite.sequence.prepend_tokens import prepend_token_rules as prepend_token_rules
from peftgraph.rewrite.sequence.prepend_tokens import replace_token_rule as replace_token_rule
from peftgraph.rewrite.sequence.token_embedding import embedding_output_port as embedding_output_port
from peftgraph.rewrite.sequence.token_embedding import is_token_embedding as is_token_embedding
