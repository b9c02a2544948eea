"""The laws: each is a function of a subject that returns whether it has a meaning there, and raises `LawError` where it
is broken."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor, fx

from peftgraph.errors import NoFold, PeftGraphError, RecipeError
from peftgraph.ir.builder import Builder
from peftgraph.ir.tensor_table import TensorTable
from peftgraph.program import Program, fold
from peftgraph.rewrite.count import Change
from peftgraph.rewrite.match import Match
from peftgraph.rewrite.method import Pass
from peftgraph.rewrite.modules.gate import gated
from peftgraph.rewrite.rule import Rule
from peftgraph.rewrite.spec import parse_pass
from peftgraph.testing.subject import LawError, Subject, distance, loss_of, outputs, tensors

aten = torch.ops.aten
RANK_TOLERANCE = 1e-9  # of singular values, relative to the largest, in float64


def spec(subject: Subject) -> bool:
    """Check that the printed passes parse back to themselves."""
    try:
        parsed = parse_pass(subject.text)
    except RecipeError as error:
        raise LawError("spec", subject, str(error).rstrip(".")) from error
    single = subject.methods[0] if len(subject.methods) == 1 else None
    same = parsed == single if single is not None else parsed.passes() == tuple(_atoms(subject))
    subject.require("spec", same, "its spec parses to another pass", "", subject.text, str(parsed))
    return True


def determinism(subject: Subject) -> bool:
    """Check that two applications under one seed give one text and the same values."""
    again, program = subject.applied(subject.methods), subject.applied(subject.methods)
    _same_text(subject, "determinism", program.text(), again.text(), "applied twice it gives two texts")
    ours, theirs = program.table.hashes(), again.table.hashes()
    name = next((name for name in ours if ours[name] != theirs.get(name)), None)
    where = "" if name is None else subject.site_of(name)
    subject.require("determinism", name is None, f"one seed gives two initial values of {name}", where)
    return True


def identity(subject: Subject) -> bool:
    """Check that a fresh pass changes nothing, to the last bit; where random parameters keep it from that, that it
    changes little, and nothing once they are zero."""
    if subject.away:
        return False
    drawn = {key: entry.tensor for key, entry in subject.program.table.items() if key.endswith(subject.near)}
    far = subject.far
    if not drawn or far >= 0.1:
        where = "" if far == 0 else subject.first_changed_site()
        problem = "a fresh pass is not the identity"
        subject.require("identity", far == 0, problem, where, "no difference of the outputs", f"{far:.1e}")
        return True
    kept = {key: value.detach().clone() for key, value in drawn.items()}
    for value in drawn.values():
        value.data.zero_()
    zeroed = distance(subject.base.outputs, outputs(subject.program, subject.base.inputs))
    for key, value in drawn.items():
        value.data.copy_(kept[key])
    problem = f"a fresh pass is not the identity where {', '.join(subject.near)} are zero"
    subject.require("identity", zeroed == 0, problem, "", "no difference of the outputs", f"{zeroed:.1e}")
    return True


def effect(subject: Subject) -> bool:
    """Check that the outputs change with random parameters."""
    changed = distance(subject.base.outputs, subject.outputs)
    subject.require("effect", changed > 0, "with random parameters it changes nothing")
    return True


def gradients(subject: Subject) -> bool:
    """Check that gradients reach the parameters that train, and no others; they and the outputs are those of the
    reference."""
    net = subject.tuned.module().eval()
    parameters = {name: value for name, value in net.named_parameters() if value.requires_grad}
    trained = subject.tuned.table.trainable
    other = sorted(parameters.keys() ^ trained.keys())
    subject.require(
        "gradients", not other, "other parameters require grad than those that train", "", "none", f"{other}"
    )
    if not parameters:
        return False  # it changes how the base is stored, or what it computes, and trains nothing
    values = tensors(net(**subject.base.inputs))
    found = torch.autograd.grad(loss_of(values), list(parameters.values()), allow_unused=True)
    for (name, value), gradient in zip(parameters.items(), found, strict=True):
        reached = gradient is not None and bool(gradient.isfinite().all()) and bool(gradient.any() or not value.numel())
        problem = f"{name} trains, and its gradient is missing, zero or not finite"
        subject.require("gradients", reached, problem, subject.site_of(name))
    if subject.reference is not None:
        _equal_the_reference(subject, parameters, values, [one for one in found if one is not None])
    return True


def _equal_the_reference(
    subject: Subject, parameters: Mapping[str, Tensor], values: list[Tensor], found: list[Tensor]
) -> None:
    assert subject.reference is not None
    added = {key: entry.tensor for key, entry in subject.tuned.table.items() if entry.added}
    theirs = subject.reference({**parameters, **added})
    far = distance(theirs, values)
    most = f"at most {subject.tolerance:.0e}"
    problem = "the outputs are not those of the reference"
    subject.require("gradients", far < subject.tolerance, problem, "", most, f"{far:.1e}")
    wanted = torch.autograd.grad(loss_of(theirs), list(parameters.values()))
    largest = max(float(one.abs().max()) for one in wanted)
    for name, got, want in zip(parameters, found, wanted, strict=True):
        far = float((got - want).abs().max()) / largest
        problem = f"the gradient of {name} is not that of the reference"
        close = far < 10 * subject.tolerance
        subject.require("gradients", close, problem, subject.site_of(name), most, f"{far:.1e}")


def folding(subject: Subject) -> bool:
    """Check that folding agrees and leaves the base's own graph; or that it is refused site by site, and that what it
    keeps, folded in part, is what was refused."""
    program = subject.tuned
    try:
        folded, refused = fold(program), set[str]()
    except NoFold as error:
        folded, refused = fold(program, partial=True), {reason.split(":")[0] for reason in error.reasons}
    except (PeftGraphError, RuntimeError) as error:
        raise LawError("fold", subject, str(error).rstrip("."), subject.site_where(lambda: _fails(program))) from error
    far = distance(subject.outputs, outputs(folded, subject.base.inputs))
    most = f"a difference of the outputs of at most {subject.tolerance:.0e}"
    subject.require("fold", far < subject.tolerance, "the folded weights differ", "", most, f"{far:.1e}")
    rules = [applied.method.rules() for applied in program.history]
    stuck = {edit.site for edit in program.edits if isinstance(rules[edit.application][edit.rule].fold, str)}
    kept = {edit.site for edit in folded.edits}
    told = stuck <= refused == kept
    problem = "what a partial fold keeps is not what was refused"
    subject.require("fold", told, problem, "", f"{sorted(refused | stuck)}", f"{sorted(kept)}")
    if refused:
        return False
    _same_text(subject, "fold", subject.base.text, folded.text(), "the folded text is not the base's")
    subject.folded = folded
    return True


def _fails(program: Program) -> bool:
    try:
        fold(program)
    except (PeftGraphError, RuntimeError):
        return True
    return False


def counts(subject: Subject) -> bool:
    """Check that what is counted is what trains and what was added, and that no change has more values, or a larger
    rank, than was counted."""
    counted, table = subject.tuned.count(), subject.base.program.table
    net = subject.tuned.module()
    trained = sum(value.numel() for value in net.parameters() if value.requires_grad)
    added = sum(value.numel() for name, value in net.named_parameters() if name not in table)
    total = subject.base.program.count().total
    for word, expected, found in (
        ("trainable", trained, counted.trainable), ("added", added, counted.added), ("total", total, counted.total)
    ):  # fmt: skip
        subject.require("counts", expected == found, f"count().{word} is wrong", "", f"{expected:,}", f"{found:,}")
    if subject.folded is None:
        return True
    left = subject.folded.count()
    subject.require("counts", left.trainable == left.added == 0, "a folded program counts parameters of passes")
    new = subject.folded.table
    changed = sum(int((new.value(first) != table.value(first)).sum()) for first in _stored(table))
    problem = "more values of the base change than count().changed says"
    sparse = any(rule.changed_values for one in _atoms(subject) for rule in one.rules())  # as training leaves it
    within = sparse or changed <= counted.changed
    subject.require("counts", within, problem, "", f"at most {counted.changed:,}", f"{changed:,}")
    for change, most in _ranks(counted.changes):
        difference = change.view.get(new.value(change.view.parameter)) - change.view.get(
            table.value(change.view.parameter)
        )
        rank = _rank(difference)
        problem = f"the change of {change.view.parameter} has a larger rank than was counted"
        subject.require("counts", rank <= most, problem, change.site, f"at most {most}", f"{rank}")
    return True


def _stored(table: TensorTable) -> Iterator[str]:
    """Yield the name of every stored parameter of a base, once for all that are tied."""
    seen: set[int] = set()
    for name, entry in table.items():
        if entry.kind == "parameter" and id(entry.tensor) not in seen:
            seen.add(id(entry.tensor))
            yield name


def _ranks(changes: tuple[Change, ...]) -> Iterator[tuple[Change, int]]:
    """Yield one change of each matrix whose rank is bounded, with the bound of all its changes."""
    found: dict[tuple[str, str], list[Change]] = {}
    for change in changes:
        found.setdefault((change.view.parameter, str(change.view.window)), []).append(change)
    for several in found.values():
        if all(one.rank is not None and not one.full for one in several):
            yield several[0], sum(one.rank or 0 for one in several)


def _rank(difference: Tensor) -> int:
    """Return the rank of a matrix, or the largest of several."""
    values = torch.linalg.svdvals(difference.double())
    largest = values.amax(-1, keepdim=True)
    return int((values > RANK_TOLERANCE * largest.clamp(min=1e-300)).sum(-1).max())


def files(subject: Subject) -> bool:
    """Check that a saved adapter loads to the bit."""
    program = subject.tuned
    with TemporaryDirectory() as folder:
        loaded = subject.base.program.load_adapter(program.save_adapter(Path(folder) / "adapter"))
    _same_text(subject, "files", program.text(), loaded.text(), "a loaded adapter gives another text")
    ours, theirs = program.table.hashes(), loaded.table.hashes()
    name = next((name for name in ours if ours[name] != theirs.get(name)), None)
    where = "" if name is None else subject.site_of(name)
    subject.require("files", ours == theirs, f"a loaded adapter has other values of {name}", where)
    return True


def training(subject: Subject) -> bool:
    """Check that a step of training moves what trains, in the program too, and nothing of the base."""
    program, before = subject.tuned, subject.tuned.table.hashes()
    net = program.module()
    parameters = [value for value in net.parameters() if value.requires_grad]
    if not parameters:
        return False
    optimizer = torch.optim.SGD(parameters, lr=0.1)
    loss_of(tensors(net(**subject.base.inputs))).backward()
    optimizer.step()
    optimizer.zero_grad()
    moved = {name for name, value in program.table.hashes().items() if value != before[name]}
    subject.require("training", bool(moved), "a step moves nothing")
    allowed = {name for trained in program.table.trainable for name in program.table.tied(trained)}
    subject.require("training", moved <= allowed, f"a step moves {sorted(moved - allowed)}, which do not train")
    base = subject.base
    left = (base.program.text(), base.program.table.hashes()) == (base.text, base.hashes)
    subject.require("training", left, "the program that it was applied to has changed")
    return True


@dataclass(frozen=True, kw_only=True)
class Gated(Pass):
    """A pass behind a gate that is the same number everywhere."""

    word = "gated"
    method: Pass
    opening: float

    def rules(self) -> list[Rule]:
        """Return the rules of the pass, gated; what trains in place is not."""
        return [rule if rule.delta is None else gated(rule, self.gate) for rule in self.method.rules()]

    def gate(self, m: Match, op: Builder, x_BTD: fx.Node) -> fx.Node:
        """Return the number for every example, (B,)."""
        return op.call(aten.new_full.default, x_BTD, [op.call(aten.sym_size.int, x_BTD, 0)], self.opening)


def gates(subject: Subject) -> bool:
    """Check that a gate of 1 lets all of a pass in, and one of 0, where its joins can be shut, nothing of it."""
    atoms = list(_atoms(subject))
    try:
        programs = [
            subject.applied(Gated(name=f"part{i}", method=one, opening=by) for i, one in enumerate(atoms))
            for by in (0.0, 1.0)
        ]
    except PeftGraphError:
        return False  # a change of the weight itself, or of sizes, which no gate can weigh by row
    learned = _own_parameters(subject.tuned)
    for program in programs:
        for value, own in zip(_own_parameters(program), learned, strict=True):
            value.data.copy_(own)
    shut, opened = (outputs(program, subject.base.inputs) for program in programs)
    rules = [rule for one in atoms for rule in one.rules()]
    cases = [("gate of 1 does not let all of it in", subject.outputs, opened)]
    if all(rule.delta is not None and rule.join.shuts for rule in rules):
        cases.append(("gate of 0 does not shut it off", subject.base.outputs, shut))
    for problem, wanted, found in cases:
        far = distance(wanted, found)
        most = f"a difference of the outputs of at most {subject.tolerance:.0e}"
        subject.require("gates", far < subject.tolerance, f"a {problem}", "", most, f"{far:.1e}")
    return True


def _own_parameters(program: Program) -> list[Tensor]:
    """Return the parameters that passes added, in order, and those of the base that train, or their copies, by name."""
    copies = {copy: name for edit in program.edits for name, copy in edit.installed}
    added: list[Tensor] = []
    trained: dict[str, Tensor] = {}
    for name, entry in program.table.items():
        if name in copies or (entry.trainable and not entry.added):
            trained[copies.get(name, name)] = entry.tensor
        elif entry.kind == "parameter" and entry.added:
            added.append(entry.tensor)
    return added + [trained[name] for name in sorted(trained)]


def removal(subject: Subject) -> bool:
    """Check that without the passes the base's text and tensors are back."""
    program = subject.tuned
    while program.history:
        program = program.remove(0)
    _same_text(subject, "removal", subject.base.text, program.text(), "without it the text is not the base's")
    ours, theirs = subject.base.hashes, program.table.hashes()
    wrong = sorted(name for name in {*ours, *theirs} if ours.get(name) != theirs.get(name))
    subject.require("removal", not wrong, "without it tensors are not the base's", "", "none", f"{wrong}")
    return True


def _same_text(subject: Subject, law: str, expected: str, found: str, problem: str) -> None:
    """Require that two texts are equal; the error shows the first line that differs."""
    if expected == found:
        return
    old, new = ([*text.splitlines(), "the end"] for text in (expected, found))
    a, b = next((a, b) for a, b in zip(old, new, strict=False) if a != b)
    raise LawError(law, subject, problem, "", f"{a.strip()!r}", f"{b.strip()!r}")


def _atoms(subject: Subject) -> Iterator[Pass]:
    return (atom for method in subject.methods for atom in method.passes())


LAWS: Mapping[str, Callable[[Subject], bool]] = {
    "spec": spec,
    "determinism": determinism,
    "identity": identity,
    "effect": effect,
    "gradients": gradients,
    "fold": folding,
    "counts": counts,
    "gates": gates,
    "files": files,
    "training": training,
    "removal": removal,
}
