"""Keys and values of a pass's own, prepended to those of an attention."""

from peftgraph.rewrite.attention.prepend_kv import PrependKV as PrependKV
from peftgraph.rewrite.attention.prepend_kv import attend_to as attend_to
from peftgraph.rewrite.attention.prepend_kv import attend_with_rows as attend_with_rows
from peftgraph.rewrite.attention.prepend_kv import key_head_shape as key_head_shape
from peftgraph.rewrite.attention.prepend_kv import per_head as per_head
from peftgraph.rewrite.attention.prepend_kv import value_head_shape as value_head_shape
