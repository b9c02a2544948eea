"""Checks passes against the laws that every pass must satisfy.

    print(check_pass(VeRA(rank=2)))

The laws, in order (`LAWS`): "spec" (it prints and parses back), "determinism" (two applications under one seed are
equal), "identity" (a fresh pass changes nothing), "effect" (with other parameters it does), "gradients" (they reach
exactly what trains), "counts" (the counted parameters are those that train and were added, and no change has a larger
rank or more values than was counted), "gates" (a gate of 0 shuts it off, one of 1 lets all of it in), "fold" (folded
weights give the same outputs), "files" (a saved adapter loads to the bit), "training" (a step moves what trains, and
nothing of the base) and "removal" (without it the base's text and weights are back).
"""

from peftgraph.testing.check import Report as Report
from peftgraph.testing.check import check_pass as check_pass
from peftgraph.testing.laws import LAWS as LAWS
from peftgraph.testing.models import MODELS as MODELS
from peftgraph.testing.models import SmallModel as SmallModel
from peftgraph.testing.subject import LawError as LawError
