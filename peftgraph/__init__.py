"""peftgraph: a compiler for parameter-efficient fine-tuning on torch.fx.

program = pg.trace(model, example)
tuned = program.apply(LoRA(at="attention.q|attention.v", rank=8))
net = tuned.module()          # train it
merged = pg.fold(tuned)       # exact, with its proof

The public names are those of `peftgraph.facade`, loaded on first use, so that the command line answers without torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING

__version__ = "0.1.0"

if TYPE_CHECKING:
    from peftgraph.facade import *  # noqa: F403
else:

    def __getattr__(name: str) -> object:
        if not name.startswith("_"):
            public = _public()
            globals().update(public)
            if name in public:
                return public[name]
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}{_hint(name)}")

    def __dir__() -> list[str]:
        return sorted({"__version__", *_public()})


def _hint(name: str) -> str:
    """Say where a name is that is looked for here."""
    if name == "get_peft_model":
        return '; what corresponds is pg.tune(model, example, "lora{rank=8}")'
    if name == "PeftModel":
        return "; what corresponds is pg.trace(model, example).load_adapter(directory).module()"
    configs = {one.name: one.word for one in import_module("peftgraph.rewrite.peft_options").CONFIGS}
    if name in configs:
        return f"; what it configures is the pass {configs[name]!r}: docs/tutorials/peft-arguments.md"
    known = name in vars(import_module("peftgraph.passes")) if name.isidentifier() and name[0].isupper() else False
    return f"; from peftgraph.passes import {name}" if known else ""


def _public() -> dict[str, object]:
    facade = vars(import_module("peftgraph.facade"))
    return {name: item for name, item in facade.items() if not name.startswith("_")}
