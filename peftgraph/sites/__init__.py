"""Sites: the parts of a model, found by structure.

`find_sites(graph, tensors)` reads a canonical graph; selectors (`attention.q | attention.v`, or their text)
pick sites.
"""

from .explain import explain as explain
from .explain import require as require
from .find import find_sites as find_sites
from .narrow import expert as expert
from .narrow import kind as kind
from .narrow import layer as layer
from .narrow import layers as layers
from .narrow import stack as stack
from .patterns import Pattern as Pattern
from .patterns import op as op
from .patterns import var as var
from .select import Selector as Selector
from .select import as_selector as as_selector
from .select import attention as attention
from .select import bias as bias
from .select import block as block
from .select import conv as conv
from .select import embedding as embedding
from .select import ffn as ffn
from .select import head as head
from .select import linear as linear
from .select import matrix as matrix
from .select import norm as norm
from .select import parse_selector as parse_selector
from .select import projection as projection
from .select import role as role
from .select import router as router
from .select import weight as weight
from .site import Absent as Absent
from .site import Bias as Bias
from .site import Columns as Columns
from .site import Equation as Equation
from .site import Lettered as Lettered
from .site import MatrixAxes as MatrixAxes
from .site import NearMiss as NearMiss
from .site import Site as Site
from .site import Sites as Sites
from .site import Weight as Weight
