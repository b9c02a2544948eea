"""The exact values of what a fold writes: float64 algebra by chunks, compared with what is stored as it is computed.

Nothing in float64 is larger than a chunk, unless a fold needs its tensors whole, or somebody asks for them whole.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from peftgraph.folding.chunks import feature_axis
from peftgraph.folding.components import Component, Piece, stored_tensor
from peftgraph.folding.proof_error import ProofError
from peftgraph.ir.program import ProgramData

LIMIT = 8.0  # epsilons between a stored value and the exact one: float32 sums over a rank's terms, then one rounding
FLAT = 1 << 20  # values that are compared at once, of a tensor that is whole


@dataclass
class Distance:
    """How far stored values are from the exact ones, gathered piece by piece.

    Attributes:
        error: the largest difference.
        magnitude: the largest magnitude of the exact values, and of those before the fold.
        change: the largest change that the fold made.
    """

    name: str
    dtype: torch.dtype
    error: float = 0.0
    magnitude: float = 0.0
    change: float = 0.0

    def add(self, stored: Tensor, precise: Tensor, before: Tensor) -> None:
        """Take in corresponding values.

        Raises:
            ProofError: values are not finite that are finite in the base.
        """
        before = before.double()
        found = [_largest(one) for one in (precise - stored, precise, before, precise - before)]
        if not all(map(_is_finite, found)):
            found = self._where_finite(stored, precise, before)
        error, exact, old, change = found
        self.error, self.change = max(self.error, error), max(self.change, change)
        self.magnitude = max(self.magnitude, exact, old, change)

    def _where_finite(self, stored: Tensor, precise: Tensor, before: Tensor) -> list[float]:
        """Return the largest magnitudes of the difference, the exact value, the one before and the change, where all
        are numbers."""
        finite = torch.isfinite(stored) & torch.isfinite(precise)
        if bool((~finite & torch.isfinite(before)).any()):
            raise ProofError(
                f"{self.name} is finite in the base and would not be after folding: its new values do not fit "
                f"{str(self.dtype).removeprefix('torch.')}. Convert the model to a wider dtype and fold there."
            )
        if not bool(finite.any()):
            return [0.0] * 4
        stored, precise, before = stored.double()[finite], precise[finite], before[finite]
        before = torch.where(torch.isfinite(before), before, precise)  # what was no number may have become one
        return [_largest(one) for one in (stored - precise, precise, before, precise - before)]

    def epsilons(self) -> float:
        """Return the error relative to the tensor's size, in units of the dtype's epsilon.

        Raises:
            ProofError: it is too large.
        """
        worst = self.error / max(self.magnitude, 1e-300) / torch.finfo(self.dtype).eps
        if not worst <= LIMIT:
            raise ProofError(
                f"{self.name} is {worst:.1f} epsilon away from the float64 algebra after folding; {LIMIT:.0f} are "
                "allowed."
            )
        return worst


def _largest(value: Tensor) -> float:
    """Return the largest magnitude; NaN if a value is no number."""
    if not value.numel():
        return 0.0
    low, high = torch.aminmax(value)
    return float(torch.maximum(high, -low))


def _is_finite(value: float) -> bool:
    return value - value == 0.0


@dataclass(eq=False)
class ExactValues:
    """The float64 values of the tensors that one component writes, as its steps give them on what was stored before.

    Attributes:
        component: the steps.
        program: before the fold.
        folded: the result, whose values are compared.
        changed: the tensors that differ.
    """

    component: Component
    program: ProgramData
    folded: ProgramData
    changed: Collection[str]
    _vectors: dict[str, Tensor] = field(default_factory=dict)
    _whole: Piece | None = None
    _distances: dict[str, Distance] = field(default_factory=dict)
    _compared: bool = False

    def __post_init__(self) -> None:
        views = self.component.views
        self._stored_as = {one: name for name in views for one in self.component.names(name)}

    def pieces(self, name: str) -> Iterator[tuple[int, int, Tensor]]:
        """Yield parts of a matrix that is stored as such: the axis that is cut, where the part starts on it, and the
        part."""
        name = self._stored_as.get(name, name)
        for piece in self._pass():
            if piece.chunk is None or piece.chunk.expert is not None:
                yield 0, 0, self.whole(name)
                return
            axis = feature_axis(self.program.table[name].tensor, self.component.views[name])
            yield axis, piece.chunk.first, piece.values[name].double()

    def whole(self, name: str) -> Tensor:
        """Return all values of a tensor; a vector is kept, and so are tensors that do not fold by chunk."""
        name = self._stored_as.get(name, name)
        if not self.component.chunks:
            list(self._pass())
            assert self._whole is not None
            return self._whole.values[name]
        if self.component.views[name].vector:
            if name not in self._vectors:
                list(self._pass())
            return self._vectors[name]
        value = self._empty(name)
        for piece in self._pass():
            assert piece.chunk is not None
            piece.chunk.slice(value, self.component.views[name]).copy_(piece.values[name])
        return value

    def release(self) -> None:
        """Forget tensors that are whole."""
        self._whole = None

    def epsilons(self) -> float:
        """Return the largest distance of a stored value from the exact one, in units of the dtype's epsilon.

        Raises:
            ProofError: it is too large, or new values are not finite.
        """
        if not self._compared:
            for _ in self._pass():
                pass
        return max((one.epsilons() for one in self._distances.values()), default=0.0)

    def _pass(self) -> Iterator[Piece]:
        """Compute the values; keep the vectors, and compare all with the stored ones the first time."""
        if self._whole is not None:
            yield self._whole
            return
        vectors = {name: self._empty(name) for name, view in self.component.views.items() if view.vector}
        for piece in self.component.pieces(torch.float64):
            if not self._compared:
                self._compare(piece)
            if piece.chunk is None:
                self._whole = piece
            else:
                for name, vector in vectors.items():
                    piece.chunk.slice(vector, self.component.views[name]).copy_(piece.values[name])
            yield piece
        self._compared, self._vectors = True, vectors

    def _empty(self, name: str) -> Tensor:
        return torch.empty_like(self.program.table[name].tensor, dtype=torch.float64)

    def _compare(self, piece: Piece) -> None:
        for name in piece.written:
            if name not in self.changed:
                continue
            after, before = self.folded.table[name].tensor.detach(), stored_tensor(self.program, name).detach()
            distance = self._distances.setdefault(name, Distance(name, after.dtype))
            precise = piece.values[name]
            if piece.chunk is not None:
                view = self.component.views[name]
                distance.add(piece.chunk.slice(after, view), precise, piece.chunk.slice(before, view))
                continue
            rows = (one.reshape(-1).split(FLAT) for one in (after, precise, before))
            for part in zip(*rows, strict=True):
                distance.add(*part)
