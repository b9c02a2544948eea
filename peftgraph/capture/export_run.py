"""One run of torch.export over a fake copy of a model, in one mode, under the best marker dtype that it accepts."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export import Dim, ExportedProgram
from torch.utils import _pytree as pytree

from peftgraph.capture.assumptions import AssumptionRecorder
from peftgraph.capture.autograd_functions import RecordedCall, record_autograd_calls
from peftgraph.capture.diagnosis import explain, exporter_silenced
from peftgraph.capture.example_inputs import Example
from peftgraph.capture.export_shortcuts import cheap_records
from peftgraph.capture.fake_model import fake_arguments, fake_copy_of
from peftgraph.capture.progress import Progress, report_layers
from peftgraph.capture.repeated_rules import rules_run_once
from peftgraph.capture.size_decisions import SizeDecisions, record_size_decisions
from peftgraph.capture.slow_warning import warn_when_slow
from peftgraph.capture.transformers_patches import broadcast_masks, library_patches
from peftgraph.errors import PeftGraphError
from peftgraph.ir.tensor_table import TensorEntry

# bfloat16 shows which literals follow and promotes as low precision does; a model with an operation that has
# no bfloat16 form is traced in float64.
MARKERS = (torch.bfloat16, torch.float64)


@dataclass(frozen=True)
class ExportResult:
    """An exported fake copy.

    Attributes:
        program: what torch.export gave.
        functions: the calls of custom autograd functions, by number.
        marker: the dtype in the place of the model's own; None: the model's own, and no literal follows.
        decisions: what the model's code decided by sizes.
        asked: the truths that were assumed, as the last outputs of the program have them.
        patched: whether pieces of the model were replaced by its library's exportable forms.
    """

    program: ExportedProgram
    functions: Sequence[RecordedCall]
    marker: torch.dtype | None
    decisions: SizeDecisions
    asked: Sequence[tuple[Any, str, bool, str]]
    patched: bool = False

    @property
    def outputs(self) -> pytree.TreeSpec:
        """The tree of what the model returns."""
        spec = self.program.call_spec.out_spec
        assert spec is not None
        return spec.child(0)

    @property
    def constants(self) -> dict[str, TensorEntry]:
        """The tensor literals of the model's code."""
        lifted = self.program.graph_signature.lifted_tensor_constants
        return {
            name: TensorEntry(value, "constant", persistent=False)
            for name, value in self.program.constants.items()
            if isinstance(value, Tensor) and name in lifted
        }


def marker_dtypes(model: nn.Module, own: torch.dtype) -> list[torch.dtype | None]:
    """Return the markers to try, best first; the last is None: the program stays in the model's own dtype."""
    if len({p.dtype for p in model.parameters() if p.is_floating_point()}) != 1:
        return [None]
    if own in (torch.bfloat16, torch.float16):
        return [own]  # already low precision: its own dtype tells casts that follow from float32 that is meant
    return [*(marker for marker in MARKERS if marker != own), None]


def export_fake_copy(
    model: nn.Module,
    bound: Example,
    own: torch.dtype,
    training: bool,
    markers: Sequence[torch.dtype | None],
    progress: Progress,
    faithful: Callable[[torch.dtype], bool] = lambda marker: True,
) -> ExportResult:
    """Export a fake copy of `model` under the first of `markers` that it accepts: unpatched if possible, else patched.

    Args:
        model: the model.
        bound: the call to trace.
        own: the dtype of its weights.
        training: the mode.
        markers: the markers to try, best first.
        progress: called as layers begin.
        faithful: whether the model's code runs the same under another marker than its own dtype.

    Raises:
        TraceError: it accepts none.
    """
    failure: Exception | None = None
    tries = [patches for patches in (nullcontext, library_patches(model)) if patches is not None]
    for patches in tries:
        for marker in markers:
            if marker not in (own, None) and len(markers) > 1 and not faithful(marker):
                continue
            try:
                with patches():
                    exported = _export(model, bound, own, training, marker, progress)
                if marker in (own, None) or len(markers) == 1 or not _rounded(exported):
                    return replace(exported, patched=exported.patched or patches is not nullcontext)
            except PeftGraphError:
                raise
            except Exception as error:  # whatever an exporter or a model's code raises is explained to the user
                failure = error  # in the model's own dtype, and of what came furthest
    assert failure is not None
    raise explain(model, failure) from failure


def _export(
    model: nn.Module, bound: Example, own: torch.dtype, training: bool, marker: torch.dtype | None, progress: Progress
) -> ExportResult:
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    fake_model = fake_copy_of(model, mode, own, marker or own).train(training)
    arguments = fake_arguments(dict(bound.arguments), mode, own, marker or own)
    assuming = AssumptionRecorder(bound.assume)
    trees = {name: pytree.tree_structure(value) for name, value in arguments.items() if not _is_plain(value)}
    arguments |= {name: pytree.tree_leaves(arguments[name]) for name in trees}
    _take_keywords(fake_model, bound, assuming, trees)

    keys = iter([leaf.key for leaf in bound.leaves])

    def free_axes(leaf: Any) -> Any:
        own = bound.fixed.get(next(keys), ())
        if not isinstance(leaf, Tensor):
            return None
        return {axis: Dim.STATIC if axis in own else Dim.AUTO for axis in range(leaf.dim())}

    shapes = {name: pytree.tree_map(free_axes, value) for name, value in arguments.items()}
    # torch's memory of calls under fake tensors is off: on symbolic sizes a hit costs more than the rule
    forgetful = torch._dynamo.config.patch(fake_tensor_cache_enabled=False)
    told = warn_when_slow(bound, progress)
    quick = ExitStack()
    for shortcut in (forgetful, rules_run_once(), cheap_records()):
        quick.enter_context(shortcut)
    with quick, told, exporter_silenced(), record_autograd_calls() as recording, broadcast_masks() as broadcast:
        with report_layers(fake_model, "exporting", progress), record_size_decisions() as decisions, assuming:
            program = torch.export.export(fake_model, (), arguments, dynamic_shapes=shapes, strict=False)
        return ExportResult(program, recording.calls, marker, decisions, assuming.asked, broadcast())


def _is_plain(value: Any) -> bool:
    """Tell whether a nested value consists of containers that the exporter can flatten by itself."""
    if pytree.tree_is_leaf(value) or type(value) not in (dict, list, tuple):
        return pytree.tree_is_leaf(value)
    return all(map(_is_plain, value.values() if isinstance(value, dict) else value))


def _rounded(exported: ExportResult) -> bool:
    """Tell whether a number in the model's code was stored as a tensor of lower precision than the model's own
    dtype."""
    constants = [entry.tensor for entry in exported.constants.values()]
    return exported.marker == torch.bfloat16 and any(one.dtype == torch.bfloat16 for one in constants)


def _take_keywords(
    fake_model: nn.Module, bound: Example, assuming: AssumptionRecorder, trees: Mapping[str, pytree.TreeSpec]
) -> None:
    """Give `fake_model` a forward with exactly the example's arguments, since the exporter does not support *args,
    **kwargs. It returns the model's outputs and the conditions that were assumed. Arguments of classes that are not
    Python's own are passed as lists of their leaves; `trees` says how to rebuild them."""
    original = fake_model.forward

    def forward(**arguments: Any) -> Any:
        arguments |= {name: pytree.tree_unflatten(arguments[name], tree) for name, tree in trees.items()}
        args, kwargs = bound.call(arguments)
        assuming.asked.clear()
        result = bound.result(original(*args, **kwargs))
        return result, assuming.answers()

    names = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY) for name in bound.arguments]
    forward.__signature__ = inspect.Signature(names)
    fake_model.forward = forward
