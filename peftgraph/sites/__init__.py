"""Sites: the parts of a model, found by structure.

`find_sites(graph, tensors)` reads a canonical graph; selectors (`attention.q | attention.v`, or their text)
pick sites. The names are those of `peftgraph.sites.public`, loaded on first use, so that the command line reads
selectors without torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from peftgraph.sites.public import *  # noqa: F403
else:

    def __getattr__(name: str) -> object:
        if not name.startswith("_"):
            public = vars(import_module("peftgraph.sites.public"))
            if name in public:
                return public[name]
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
