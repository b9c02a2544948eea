"""Copies of a stretch of the model at a smaller width, with parameters of their own."""

from peftgraph.rewrite.narrow.copying import NarrowCopy as NarrowCopy
from peftgraph.rewrite.narrow.side_parameters import narrow_copy as narrow_copy
from peftgraph.rewrite.narrow.stacks import Stacks as Stacks
