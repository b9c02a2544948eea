"""Every public name for users, once: what `peftgraph` hands out on first use. Importing this file imports torch.

What writers of passes need besides is in `peftgraph.authoring`.
"""

from peftgraph import losses as losses
from peftgraph import plugins as plugins
from peftgraph import prompts as prompts
from peftgraph.errors import AdapterError as AdapterError
from peftgraph.errors import Ambiguous as Ambiguous
from peftgraph.errors import CallError as CallError
from peftgraph.errors import Conflict as Conflict
from peftgraph.errors import ExportError as ExportError
from peftgraph.errors import LeftOut as LeftOut
from peftgraph.errors import NoFold as NoFold
from peftgraph.errors import NoMatch as NoMatch
from peftgraph.errors import NoPickle as NoPickle
from peftgraph.errors import PeftGraphError as PeftGraphError
from peftgraph.errors import PeftGraphWarning as PeftGraphWarning
from peftgraph.errors import QuantisedWeights as QuantisedWeights
from peftgraph.errors import RecipeError as RecipeError
from peftgraph.errors import TraceError as TraceError
from peftgraph.program import Program as Program
from peftgraph.program import compare as compare
from peftgraph.program import fold as fold
from peftgraph.program import trace as trace
from peftgraph.rewrite.method import Pipeline as Pipeline
from peftgraph.rewrite.recipe import load_recipe as load_recipe
from peftgraph.rewrite.registry import register as register
from peftgraph.rewrite.spec import parse_pass as parse_pass
from peftgraph.sites import Pattern as Pattern
from peftgraph.sites import Selector as Selector
from peftgraph.sites import Site as Site
from peftgraph.sites import Sites as Sites
from peftgraph.sites import attention as attention
from peftgraph.sites import bias as bias
from peftgraph.sites import block as block
from peftgraph.sites import conv as conv
from peftgraph.sites import embedding as embedding
from peftgraph.sites import expert as expert
from peftgraph.sites import ffn as ffn
from peftgraph.sites import head as head
from peftgraph.sites import kind as kind
from peftgraph.sites import layer as layer
from peftgraph.sites import layers as layers
from peftgraph.sites import linear as linear
from peftgraph.sites import matrix as matrix
from peftgraph.sites import norm as norm
from peftgraph.sites import op as op
from peftgraph.sites import parse_selector as parse_selector
from peftgraph.sites import projection as projection
from peftgraph.sites import stack as stack
from peftgraph.sites import var as var
from peftgraph.sites import weight as weight
from peftgraph.tuning import program_of as program_of
from peftgraph.tuning import tune as tune
