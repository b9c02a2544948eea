"""peftgraph: a compiler for parameter-efficient fine-tuning on torch.fx.

program = pg.trace(model, example)
tuned = program.apply(LoRA(at="attention.q|attention.v", rank=8))
net = tuned.module()          # train it
merged = pg.fold(tuned)       # exact, with its proof
"""

from peftgraph import init as init
from peftgraph.errors import AdapterError as AdapterError
from peftgraph.errors import Ambiguous as Ambiguous
from peftgraph.errors import CallError as CallError
from peftgraph.errors import Conflict as Conflict
from peftgraph.errors import ExportError as ExportError
from peftgraph.errors import NoFold as NoFold
from peftgraph.errors import NoMatch as NoMatch
from peftgraph.errors import PeftGraphError as PeftGraphError
from peftgraph.errors import RecipeError as RecipeError
from peftgraph.errors import TraceError as TraceError
from peftgraph.ir.builder import ACTIVATIONS as ACTIVATIONS
from peftgraph.ir.builder import Builder as Builder
from peftgraph.program import Program as Program
from peftgraph.program import fold as fold
from peftgraph.program import trace as trace
from peftgraph.rewrite.match import Match as Match
from peftgraph.rewrite.method import Pass as Pass
from peftgraph.rewrite.method import Pipeline as Pipeline
from peftgraph.rewrite.method import parse_pass as parse_pass
from peftgraph.rewrite.recipe import load_recipe as load_recipe
from peftgraph.rewrite.rule import Add as Add
from peftgraph.rewrite.rule import Multiply as Multiply
from peftgraph.rewrite.rule import Params as Params
from peftgraph.rewrite.rule import Replace as Replace
from peftgraph.rewrite.rule import Rule as Rule
from peftgraph.rewrite.rule import Train as Train
from peftgraph.rewrite.views import Bound as Bound
from peftgraph.sites import Selector as Selector
from peftgraph.sites import Site as Site
from peftgraph.sites import Sites as Sites
from peftgraph.sites import attention as attention
from peftgraph.sites import bias as bias
from peftgraph.sites import block as block
from peftgraph.sites import embedding as embedding
from peftgraph.sites import expert as expert
from peftgraph.sites import ffn as ffn
from peftgraph.sites import head as head
from peftgraph.sites import kind as kind
from peftgraph.sites import layers as layers
from peftgraph.sites import norm as norm
from peftgraph.sites import parse_selector as parse_selector
from peftgraph.sites import projection as projection
from peftgraph.sites import stack as stack

__version__ = "0.1.0"
