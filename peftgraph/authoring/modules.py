"""Modules that passes insert beside a site, and how their parameters start."""

from peftgraph.rewrite.modules import init as init
from peftgraph.rewrite.modules.bottleneck import Bottleneck as Bottleneck
from peftgraph.rewrite.modules.low_rank import LowRank as LowRank
from peftgraph.rewrite.modules.orthonormal import orthonormalise as orthonormalise
from peftgraph.rewrite.modules.orthonormal import orthonormalise_tensor as orthonormalise_tensor
