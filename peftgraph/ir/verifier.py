"""Verifies a program by a list of checks, before and after every pass; a violation is a bug of a pass or of the
engine."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from torch import fx, nn

from peftgraph.errors import VerifyError
from peftgraph.ir.edits import competing_copies
from peftgraph.ir.graphs import call_nodes, stored_tensor_nodes
from peftgraph.ir.program import ProgramData
from peftgraph.ir.shape_inference import ShapeInference, fake_mode_of, same_metadata

Check = Callable[[ProgramData], Iterator[str]]


def verify(program: ProgramData, previous: ProgramData | None = None, inference: ShapeInference | None = None) -> None:
    """Run every check; given a verified `previous`, only the values of changed nodes are inferred again.

    `inference` is a cache of inferred results, keyed by target and operands; one that has seen some of the calls
    saves time.

    Raises:
        VerifyError: the program breaks a rule; the message lists every breach.
    """
    breaches = [breach for rule in CHECKS for breach in rule(program)]
    if not breaches:
        breaches += list(values_rederive(program, previous, inference or ShapeInference(fake_mode_of(program.graph))))
    if breaches:
        raise VerifyError("The program is not valid:\n  " + "\n  ".join(breaches))


def operands_come_first(program: ProgramData) -> Iterator[str]:
    """Check that every operand precedes its use, in the same graph."""
    seen: set[fx.Node] = set()
    for node in program.graph.nodes:
        for operand in node.all_input_nodes:
            if operand not in seen:
                yield f"%{node.name} uses %{operand.name}, which does not come before it"
        seen.add(node)


def names_are_unique(program: ProgramData) -> Iterator[str]:
    """Check that every value has a printed name, and no two have the same."""
    seen: set[str] = set()
    for node in call_nodes(program.graph):
        label = node.meta.get("label")
        if label is None:
            yield f"%{node.name} has no printed name"
        elif label in seen:
            yield f"two values are printed as %{label}"
        else:
            seen.add(label)


def stored_tensors_exist(program: ProgramData) -> Iterator[str]:
    """Check that every stored tensor that is read is in the table, with the recorded shape."""
    for node in stored_tensor_nodes(program.graph):
        entry = program.table.get(str(node.target))
        if entry is None:
            yield f"@{node.target} is not in the table"
        elif tuple(entry.tensor.shape) != tuple(node.meta["val"].shape):
            shape, wanted = tuple(entry.tensor.shape), tuple(node.meta["val"].shape)
            yield f"@{node.target} has shape {shape}, the graph expects {wanted}"


def trainables_are_claimed(program: ProgramData) -> Iterator[str]:
    """Check that tensors that require grad are the parameters that some edit claims, and that claimed ones exist."""
    claimed = {name for edit in program.edits for name in edit.parameters}
    if program.served is not None:
        claimed.update(name for names in program.served.parameters.values() for name in names)
    for name, entry in program.table.items():
        if entry.tensor.requires_grad != entry.trainable:
            yield f"@{name} requires grad: {entry.tensor.requires_grad}, trainable: {entry.trainable}"
        if entry.trainable and name not in claimed:
            yield f"@{name} trains but no edit claims it"
        if entry.trainable and not isinstance(entry.tensor, nn.Parameter):
            yield f"@{name} trains but is no nn.Parameter"
    for name in claimed - set(program.table):
        yield f"an edit claims @{name}, which is not in the table"


def trainables_reach_the_output(program: ProgramData) -> Iterator[str]:
    """Check that the graph reads every trainable parameter and that it reaches the output, unless another named adapter
    replaces it."""
    hidden = {
        name for several in competing_copies(program.edits).values() for edit in several for name in edit.parameters
    }
    alive: set[fx.Node] = set()
    for node in reversed(program.graph.nodes):
        if node.op == "output" or node in alive:
            alive.update(node.all_input_nodes)
    for node in stored_tensor_nodes(program.graph):
        entry = program.table.get(str(node.target))
        if entry is not None and entry.trainable and node not in alive and node.target not in hidden:
            yield f"@{node.target} trains but reaches no output"
    read = {str(node.target) for node in stored_tensor_nodes(program.graph)}
    for name, entry in program.table.items():
        if entry.trainable and not any(other in read for other in program.table.tied(name)):
            yield f"@{name} trains but the graph does not read it"


def edits_stand(program: ProgramData) -> Iterator[str]:
    """Check that every node that an edit lists exists, and that an edit lists every node that is not the base's."""
    names = {node.name for node in program.graph.nodes}
    for edit in program.edits:
        for name in (*edit.nodes, *(move.after for move in edit.moves)):
            if name not in names:
                yield f"the edit at {edit.site} lists %{name}, which does not exist"
    owned = {name for edit in program.edits for name in edit.nodes}
    for node in program.graph.nodes:
        if "origin" in node.meta and node.name not in owned:
            yield f"%{node.name} was made by {node.meta['origin']}, but no edit lists it"


CHECKS: tuple[Check, ...] = (
    operands_come_first,
    names_are_unique,
    stored_tensors_exist,
    trainables_are_claimed,
    trainables_reach_the_output,
    edits_stand,
)


def values_rederive(program: ProgramData, previous: ProgramData | None, inference: ShapeInference) -> Iterator[str]:
    """Check that shapes and dtypes, inferred again under fake tensors, equal the recorded ones."""
    known = {node.name: node for node in previous.graph.nodes} if previous is not None else {}
    for node in call_nodes(program.graph):
        twin = known.get(node.name)
        if twin is not None and _same_call(node, twin):
            continue
        try:
            value = inference.value_of(node)
        except Exception as error:  # whatever an operator says of its operands is the breach
            yield f"%{node.meta.get('label', node.name)} cannot be computed: {error}"
            return
        if not same_metadata(value, node.meta["val"], broadcast=True):
            yield f"%{node.meta.get('label', node.name)} gives {value}, recorded is {node.meta['val']}"


def _same_call(node: fx.Node, twin: fx.Node) -> bool:
    """Return True if `node` has the same operand values as its twin, so that its own value is known."""
    if node.target != twin.target or len(node.all_input_nodes) != len(twin.all_input_nodes):
        return False
    return all(
        a.meta["val"] is b.meta["val"] for a, b in zip(node.all_input_nodes, twin.all_input_nodes, strict=True)
    ) and same_metadata(node.meta["val"], twin.meta["val"])
