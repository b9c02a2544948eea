"""Sites: the parts of a model, found by structure.

`find_sites(graph, tensors)` reads a canonical graph; selectors (`attention.q | attention.v`, or their text)
pick sites.
"""

from peftgraph.sites.explanations.explain import explain as explain
from peftgraph.sites.explanations.explain import require as require
from peftgraph.sites.find import find_sites as find_sites
from peftgraph.sites.patterns import Pattern as Pattern
from peftgraph.sites.patterns import op as op
from peftgraph.sites.patterns import var as var
from peftgraph.sites.selector_parser import parse_selector as parse_selector
from peftgraph.sites.selectors.filters import expert as expert
from peftgraph.sites.selectors.filters import kind as kind
from peftgraph.sites.selectors.filters import layer as layer
from peftgraph.sites.selectors.filters import layers as layers
from peftgraph.sites.selectors.filters import stack as stack
from peftgraph.sites.selectors.selector import Selector as Selector
from peftgraph.sites.selectors.selector import as_selector as as_selector
from peftgraph.sites.selectors.selector import attention as attention
from peftgraph.sites.selectors.selector import bias as bias
from peftgraph.sites.selectors.selector import block as block
from peftgraph.sites.selectors.selector import conv as conv
from peftgraph.sites.selectors.selector import embedding as embedding
from peftgraph.sites.selectors.selector import ffn as ffn
from peftgraph.sites.selectors.selector import head as head
from peftgraph.sites.selectors.selector import linear as linear
from peftgraph.sites.selectors.selector import matrix as matrix
from peftgraph.sites.selectors.selector import norm as norm
from peftgraph.sites.selectors.selector import projection as projection
from peftgraph.sites.selectors.selector import role as role
from peftgraph.sites.selectors.selector import router as router
from peftgraph.sites.selectors.selector import weight as weight
from peftgraph.sites.site import Absent as Absent
from peftgraph.sites.site import Bias as Bias
from peftgraph.sites.site import Columns as Columns
from peftgraph.sites.site import Equation as Equation
from peftgraph.sites.site import Lettered as Lettered
from peftgraph.sites.site import MatrixAxes as MatrixAxes
from peftgraph.sites.site import NearMiss as NearMiss
from peftgraph.sites.site import Site as Site
from peftgraph.sites.site import Weight as Weight
from peftgraph.sites.sites import Sites as Sites
