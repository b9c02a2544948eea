"""Gates that scale what a rule adds, by a number for each example."""

from peftgraph.rewrite.modules.gate import Gate as Gate
from peftgraph.rewrite.modules.gate import gated as gated
from peftgraph.rewrite.modules.gate import masked_mean as masked_mean
