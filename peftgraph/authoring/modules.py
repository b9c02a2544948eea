"""Modules that passes insert beside a site, and how their parameters start."""

from peftgraph.rewrite.modules import init as init
from peftgraph.rewrite.modules.bottleneck import Bottleneck as Bottleneck
from peftgraph.rewrite.modules.fastfood import FastfoodDraw as FastfoodDraw
from peftgraph.rewrite.modules.fastfood import draw_fastfood as draw_fastfood
from peftgraph.rewrite.modules.fastfood import fastfood as fastfood
from peftgraph.rewrite.modules.fastfood import run as run
from peftgraph.rewrite.modules.low_rank import LowRank as LowRank
from peftgraph.rewrite.modules.orthonormal import orthonormalise as orthonormalise
from peftgraph.rewrite.modules.orthonormal import orthonormalise_tensor as orthonormalise_tensor
from peftgraph.rewrite.modules.weight_difference import difference_rules as difference_rules
from peftgraph.rewrite.modules.weight_difference import is_matrix as is_matrix
from peftgraph.rewrite.modules.weight_difference import is_vector as is_vector
from peftgraph.rewrite.modules.weight_difference import stored_vector as stored_vector
