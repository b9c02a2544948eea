"""The interface for writing passes. A method is a subclass of `Pass`; each of its `rules()` says where, what, how and
back:

    Rule(at=where, delta=what is computed, join=how it is combined, fold=how it goes back into the weights)

Parts that several methods share are in submodules by topic: `modules` (low-rank paths, bottlenecks, initialisers),
`attention` (prepended keys and values), `sequence` (prepended token rows), `gates`. Selectors and errors are in
`peftgraph` itself. The tutorial "Write a pass" shows how; `peftgraph.testing.check_pass` tests a pass.
"""

from peftgraph.ir.builder import ACTIVATIONS as ACTIVATIONS
from peftgraph.ir.builder import Builder as Builder
from peftgraph.rewrite.joins import Add as Add
from peftgraph.rewrite.joins import AddProduct as AddProduct
from peftgraph.rewrite.joins import Delta as Delta
from peftgraph.rewrite.joins import Join as Join
from peftgraph.rewrite.joins import Multiply as Multiply
from peftgraph.rewrite.joins import PortByPort as PortByPort
from peftgraph.rewrite.joins import Replace as Replace
from peftgraph.rewrite.match import Match as Match
from peftgraph.rewrite.method import Pass as Pass
from peftgraph.rewrite.method import omit_default as omit_default
from peftgraph.rewrite.nesting import Nesting as Nesting
from peftgraph.rewrite.rule import Params as Params
from peftgraph.rewrite.rule import Rule as Rule
from peftgraph.rewrite.rule import train_parameters as train_parameters
from peftgraph.rewrite.weight_views import ParameterValue as ParameterValue
