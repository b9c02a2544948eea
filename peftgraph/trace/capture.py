"""pg.trace: a model and an example of its inputs become a program.

The model itself is never touched: what is exported is a ghost of it, a copy around fake tensors in training
mode and in a marker dtype, so that dropout is seen and literals that follow the parameters' dtype can be told
from literals that are meant.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export import Dim, ExportedProgram
from torch.utils import _pytree as pytree

from peftgraph.errors import PeftGraphError
from peftgraph.ir.builder import number
from peftgraph.ir.literals import mark, retarget
from peftgraph.ir.program import ProgramData, calls, stored
from peftgraph.ir.propagate import fake_like, fake_mode_of, propagate
from peftgraph.ir.signature import Input, Signature
from peftgraph.ir.table import Entry, Table
from peftgraph.trace.diagnose import explain, quiet
from peftgraph.trace.example import Example, bind_example
from peftgraph.trace.functions import Call, functions_kept
from peftgraph.trace.ghost import ghost_arguments, ghost_of
from peftgraph.trace.inplace import out_of_place
from peftgraph.trace.normalise import canonical
from peftgraph.trace.progress import Progress, layers_told, silent
from peftgraph.trace.training import only_dropout_follows_the_mode

# bfloat16 shows which literals follow and promotes as low precision does; a model with an operation that has
# no bfloat16 form is traced in float64.
MARKERS = (torch.bfloat16, torch.float64)


def capture(
    model: nn.Module, example: Mapping[str, Any] | tuple[Any, ...] | Tensor, progress: Progress = silent
) -> ProgramData:
    """Traces `model` into a program.

    Args:
        model: any module; its weights may be on the meta device. It is not modified, and its tensors are
            shared, not copied.
        example: a dict of keyword inputs or a tuple of positional ones. Sizes of the batch and of sequences
            become symbols.
        progress: told how far it is.

    Raises:
        TraceError: the model cannot be traced; the message names the line of its code and what to change.
    """
    bound = bind_example(model, example)
    table = _table_of(model)
    progress("comparing training with evaluation", 0, 0)
    only_dropout_follows_the_mode(model, bound)
    exported, functions, marker = _export(model, bound, table.dtype, progress)
    progress("normalising", 0, 0)
    table = table.with_(_constants(exported))
    graph = canonical(exported, _names_of_ties(model), functions)
    if marker is not None:
        mark(graph, marker)
    try:
        _restore_dtype(graph, table, bound)
    except Exception as error:
        raise explain(model, error) from error
    used = {str(node.target) for node in stored(graph)}
    table = Table((name, entry) for name, entry in table.items() if entry.kind != "constant" or name in used)
    signature = _signature(graph, exported, bound)
    out_of_place(graph)
    number(graph)
    return ProgramData(
        model=type(model).__name__,
        graph=graph,
        table=table,
        signature=signature,
        example=bound.tensors,
        marked=marker is not None,
    )


def _table_of(model: nn.Module) -> Table:
    frozen: dict[int, Tensor] = {}
    entries: dict[str, Entry] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        tensor = frozen.setdefault(id(parameter), parameter.detach())
        entries[name] = Entry(tensor, "parameter")
    for prefix, module in model.named_modules():
        for name, buffer in module._buffers.items():
            if buffer is not None:
                full = f"{prefix}.{name}" if prefix else name
                persistent = name not in module._non_persistent_buffers_set
                entries[full] = Entry(frozen.setdefault(id(buffer), buffer.detach()), "buffer", persistent)
    return Table(entries)


def _names_of_ties(model: nn.Module) -> dict[str, tuple[str, ...]]:
    """For every name of a tied tensor (the exporter keeps any of them), all its names, that one first."""
    groups: dict[int, list[str]] = {}
    stored = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    for name, tensor in stored:
        groups.setdefault(id(tensor), []).append(name)
    return {name: (name, *(n for n in names if n != name)) for names in groups.values() for name in names}


def _export(
    model: nn.Module, bound: Example, own: torch.dtype, progress: Progress
) -> tuple[ExportedProgram, list[Call], torch.dtype | None]:
    """The exported ghost of `model`, the autograd functions it calls, and the marker it was traced under.

    Without a marker no literal follows.
    """
    failure: Exception | None = None
    for marker in _markers(model, own):
        try:
            exported, functions = _export_once(model, bound, own, marker or own, progress)
            if marker in (own, None) or not _rounded(exported, marker):
                return exported, functions, marker
        except PeftGraphError:
            raise
        except Exception as error:  # whatever an exporter or a model's code raises is explained to the user
            failure = failure or error
    assert failure is not None
    raise explain(model, failure) from failure


def _rounded(exported: ExportedProgram, marker: torch.dtype) -> bool:
    """Was a number of the model's code stored as a tensor that has fewer digits than the model's own dtype?"""
    constants = [entry.tensor for entry in _constants(exported).values()]
    return marker == torch.bfloat16 and any(one.dtype == marker for one in constants)


def _markers(model: nn.Module, own: torch.dtype) -> list[torch.dtype | None]:
    """The markers to try, best first; the last resort is none: the program stays in the model's own dtype."""
    if len({p.dtype for p in model.parameters() if p.is_floating_point()}) != 1:
        return [None]
    if own in (torch.bfloat16, torch.float16):
        return [own]  # already low precision: its own dtype tells casts that follow from float32 that is meant
    return [*(marker for marker in MARKERS if marker != own), None]


def _export_once(
    model: nn.Module, bound: Example, own: torch.dtype, marker: torch.dtype, progress: Progress
) -> tuple[ExportedProgram, list[Call]]:
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    ghost = ghost_of(model, mode, own, marker)
    arguments = ghost_arguments(dict(bound.arguments), mode, own, marker)
    _take_keywords(ghost, bound)

    def dynamic(value: Any) -> Any:
        return dict.fromkeys(range(value.dim()), Dim.AUTO) if isinstance(value, Tensor) else None

    shapes = {name: pytree.tree_map(dynamic, value) for name, value in arguments.items()}
    with quiet(), functions_kept() as recording, layers_told(ghost, "exporting", progress):
        return torch.export.export(ghost, (), arguments, dynamic_shapes=shapes, strict=False), recording.calls


def _take_keywords(ghost: nn.Module, bound: Example) -> None:
    """Gives `ghost` a forward of exactly the example's arguments: the exporter knows no *args, **kwargs."""
    original = ghost.forward

    def forward(**arguments: Any) -> Any:
        args, kwargs = bound.call(arguments)
        return original(*args, **kwargs)

    names = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY) for name in bound.arguments]
    forward.__signature__ = inspect.Signature(names)
    ghost.forward = forward


def _constants(exported: ExportedProgram) -> dict[str, Entry]:
    """The tensor literals of the model's code."""
    return {
        name: Entry(value, "constant", persistent=False)
        for name, value in exported.constants.items()
        if isinstance(value, Tensor) and name in exported.graph_signature.lifted_tensor_constants
    }


def _restore_dtype(graph: fx.Graph, table: Table, bound: Example) -> None:
    """Brings a graph traced under a marker to the dtype of the model's own weights."""
    retarget(graph, table.dtype, None)
    mode = fake_mode_of(graph)
    tensors = iter(bound.tensors)
    for node in graph.nodes:
        if node.op == "placeholder":
            value = node.meta["val"]
            node.meta["val"] = value.to(next(tensors).dtype) if isinstance(value, Tensor) else value
        elif node.op == "get_attr":
            node.meta["val"] = fake_like(mode, table[str(node.target)].tensor)
    with quiet():
        propagate(calls(graph), mode)


def _signature(graph: fx.Graph, exported: ExportedProgram, bound: Example) -> Signature:
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    leaves = [leaf for leaf in bound.leaves if isinstance(leaf.value, Tensor)]
    parameters = bound.forward.parameters
    symbols = _symbol_names(placeholders)
    inputs = []
    for node, leaf in zip(placeholders, leaves, strict=True):
        dims = tuple(size if isinstance(size, int) else symbols[str(size)] for size in node.meta["val"].shape)
        parameter = parameters.get(leaf.argument)
        optional = parameter is None or parameter.default is not parameter.empty
        inputs.append(Input(node.name, leaf.key, leaf.argument, leaf.value.dtype, dims, optional))
        node.meta["label"] = leaf.key
    ranges = {}
    for symbol, span in exported.range_constraints.items():
        if str(symbol) in symbols:
            high = int(span.upper) if span.upper.is_Integer and int(span.upper) < 2**31 else None
            # A lower bound of 2 is how the exporter says "not specialised to 1"; the graph runs at 1 too.
            ranges[symbols[str(symbol)]] = (1 if int(span.lower) <= 2 else int(span.lower), high)
    constants = {leaf.key: leaf.value for leaf in bound.leaves if not isinstance(leaf.value, Tensor)}
    spec = exported.call_spec.out_spec
    assert spec is not None
    keys = _output_keys(spec)
    return Signature(bound.forward, tuple(inputs), constants, ranges, spec, keys, bound.assumed)


def _symbol_names(placeholders: Sequence[fx.Node]) -> dict[str, str]:
    """Readable names for the symbols of the input shapes: B, B2, ... for first dimensions, else S, T, U"""
    names: dict[str, str] = {}
    batches = iter(["B", *(f"B{i}" for i in range(2, 1000))])
    lengths = iter(["S", "T", "U", "V", "W", *(f"N{i}" for i in range(1000))])
    for node in placeholders:
        for axis, size in enumerate(node.meta["val"].shape):
            if not isinstance(size, int) and str(size) not in names:
                names[str(size)] = next(lengths if axis else batches)
    return names


def _output_keys(spec: pytree.TreeSpec) -> tuple[str, ...]:
    leaves = pytree.tree_unflatten(list(range(spec.num_leaves)), spec)
    paths = pytree.tree_flatten_with_path(leaves)[0]
    keys = [pytree.keystr(path) for path, _ in paths]
    return tuple(key.replace("['", ".").replace("']", "").removeprefix(".") or "output" for key in keys)
