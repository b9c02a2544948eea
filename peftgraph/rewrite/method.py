"""The base class of all passes, and the pipeline of several."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any, ClassVar, Self, TypeVar

from torch import Tensor

from peftgraph.errors import PeftGraphError, RecipeError
from peftgraph.ir.site_statistics import Statistic
from peftgraph.rewrite.adapted_sites import AdaptedSite
from peftgraph.rewrite.match import Match
from peftgraph.rewrite.option_text import unknown_option
from peftgraph.rewrite.options import check_name, hints, one_of, plain, word_problem
from peftgraph.rewrite.prompt_rows import PromptRows
from peftgraph.rewrite.rule import Rule
from peftgraph.rewrite.spec_text import PIPELINE, print_value
from peftgraph.rewrite.training_hooks import TrainingHooks
from peftgraph.sites import Sites
from peftgraph.sites.selectors.selector import Selector

ParameterKey = tuple[str, str] | str
SHARED = ""  # in the place of a site's id: a parameter that all sites of a pass share
OMIT = "omit_default"
T = TypeVar("T")


def omit_default(default: T) -> T:
    """Declare an option of a pass that is omitted from the spec if it has the default value.

    Example:
        With `weight: float = omit_default(1.0)` a pass prints as `lora{rank=8}`, or as `lora{rank=8 weight=0.5}`.
    """
    return dataclasses.field(default=default, metadata={OMIT: True})


@dataclass(frozen=True, kw_only=True)
class Pass:
    """A fine-tuning method: a frozen dataclass whose fields are its options; it prints as its spec.

    A subclass sets `word`, declares its options as fields, and implements `rules()`.

    Attributes:
        word: the name in specs and recipes.
        name: distinguishes two applications of one method; it is part of the names of the new parameters.
    """

    word: ClassVar[str] = ""
    name: str = ""

    def __new__(cls, *args: Any, **options: Any) -> Self:
        _check_arguments(cls, args, options)
        return super().__new__(cls)

    def __post_init__(self) -> None:
        known = hints(type(self))
        for item in dataclasses.fields(self):
            value = getattr(self, item.name)
            try:
                object.__setattr__(self, item.name, plain(value, known[item.name]))
            except PeftGraphError:
                raise
            except ValueError as error:
                raise RecipeError(f"{self.word}: option {item.name!r} cannot be {value!r}: {error}.") from None
            problem = word_problem(item.name, getattr(self, item.name), known[item.name])
            self.require(problem is None, str(problem))
        if self.name:
            try:
                check_name(self.name)
            except ValueError as error:
                raise RecipeError(f"{self.word}: {error}.") from None
        self.check()

    def check(self) -> None:
        """Raise RecipeError if the options are invalid, alone or together."""

    def rules(self) -> list[Rule]:
        """Return the rules of the pass: what it does, and where."""
        raise NotImplementedError(f"{type(self).__name__} must define rules()")

    def passes(self) -> tuple[Pass, ...]:
        """Return the atomic passes that this one consists of."""
        return (self,)

    def finalized(self) -> Pass:
        """Return the form of the pass after training: every value that `Builder.mark_derived` marks is a parameter."""
        return self

    def finalized_from(self, sites: Sites, adapted: Sequence[AdaptedSite]) -> Sequence[PassWithValues] | None:
        """Return the passes, with their values, that do what this one does with the parameters it has now; None where
        `finalized` says it all.

        Args:
            sites: of the base.
            adapted: where the pass was applied, with its parameters.
        """
        return None

    def prompt_rows(self) -> PromptRows | None:
        """Return what rows the pass prepends to the tokens, if it does that and nothing else, so that examples of one
        batch can have rows of their own."""
        return None

    def pack(self, parameters: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Return the parameters of one site, by short name, in the form that an adapter's file stores."""
        return parameters

    def file_bytes(self, parameters: Mapping[str, Tensor]) -> int:
        """Return how many bytes the parameters of one site take in an adapter's file once training is over."""
        return sum(value.numel() * value.element_size() for value in parameters.values())

    def unpack(self, packed: Mapping[str, Tensor], like: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Return what `pack` was given; `like` are fresh parameters of the site."""
        return packed

    def statistics(self) -> frozenset[Statistic]:
        """Return what the pass must know about its sites from data before it starts; nothing by default."""
        return frozenset()

    def statistics_at(self) -> Sequence[Selector]:
        """Return where it must know it; where its rules apply, by default."""
        return [rule.at for rule in self.rules()]

    def training_hooks(self, sites: Sequence[AdaptedSite], steps: int) -> TrainingHooks | None:
        """Return what the pass does while it trains, besides its graph; None for nothing.

        Args:
            sites: where the pass was applied, with the parameters that train there.
            steps: how many steps of the optimiser the training has.

        Raises:
            RecipeError: the options do not fit that number of steps.
        """
        return None

    def __str__(self) -> str:
        shown = [f for f in _ordered_fields(self) if not f.metadata.get(OMIT) or getattr(self, f.name) != f.default]
        options = [f"{f.name}={print_value(getattr(self, f.name))}" for f in shown]
        return f"{self.word}{{{' '.join(options)}}}"

    def renamed(self, name: str) -> Self:
        """Return the same pass under another name."""
        return dataclasses.replace(self, name=name)

    def weighted(self, weight: float) -> Self:
        """Return the same pass with its change of the model multiplied by `weight`; 1 gives the pass itself.

        Raises:
            RecipeError: its change cannot be weighted.
        """
        self.require(weight == 1, f"its change of the model cannot be weighted, so the weight must be 1, got {weight}.")
        return self

    def require_one_of(self, option: str, words: Iterable[str]) -> None:
        """Raise RecipeError unless the value of `option` is one of `words`."""
        value, known = getattr(self, option), tuple(words)
        self.require(value in known, one_of(option, value, known))

    def require_sublayer(self, m: Match) -> None:
        """Raise RecipeError unless `m` is an attention or a feed-forward with its residual add."""
        self.require(m.has("join"), f"{m.site.id} is no sublayer with a residual add; choose attention, ffn or both.")

    def require_own_join(self, m: Match, at: Selector) -> None:
        """Raise RecipeError where another of the sublayers at `at` ends in the same residual sum as `m`."""
        twins = [one.site.id for one in m.related(at, same_layer=True) if one.anchor("join") == m.anchor("join")]
        self.require(
            len(twins) == 1, f"{' and '.join(twins)} end in one residual sum; choose one of them for the adapter."
        )

    def require(self, condition: bool, message: str) -> None:
        """Raise RecipeError with `message` unless `condition` holds."""
        if not condition:
            raise RecipeError(f"{self.word}: {message}")


def _check_arguments(cls: type[Pass], args: Sequence[Any], options: Mapping[str, Any]) -> None:
    """Refuse arguments that the class does not take, in the words of specs and recipes."""
    known = _parameters(cls)
    kinds = [one.kind for one in known.values()]
    ordered = [kind for kind in kinds if kind is not inspect.Parameter.KEYWORD_ONLY]
    if len(args) > len(ordered) and inspect.Parameter.VAR_POSITIONAL not in kinds:
        raise RecipeError(f"{cls.word} takes its options by name, not {args[0]!r} alone: {', '.join(sorted(known))}.")
    unknown = next((name for name in options if name not in known), None)
    if unknown is not None and inspect.Parameter.VAR_KEYWORD not in kinds:
        raise unknown_option(cls.word, unknown, list(known))


@cache
def _parameters(cls: type[Pass]) -> Mapping[str, inspect.Parameter]:
    found = dict(inspect.signature(cls.__init__).parameters)
    found.pop("self", None)
    return found


@dataclass(frozen=True)
class PassWithValues:
    """A pass and the values of its parameters.

    Attributes:
        method: the pass.
        values: by (id of a site, last part of the parameter's name) for what the pass makes at a site, by (SHARED, last
            part) for what its sites share, and by the full name for a parameter of the base that it trains.
        remark: what the user is warned of when the pass is applied; "" for nothing.

    Example:
        >>> PassWithValues(LoRA(at="head", rank=2), {("head", "lora_A"): a_RI, ("head", "lora_B"): b_OR})
    """

    method: Pass
    values: Mapping[ParameterKey, Tensor] = field(repr=False)
    remark: str = ""


def _ordered_fields(method: Pass) -> list[dataclasses.Field[Any]]:
    """Return the fields to print: the method's own in order, then the name when there is one."""
    own = [f for f in dataclasses.fields(method) if f.name != "name"]
    return own + [f for f in dataclasses.fields(method) if f.name == "name" and method.name]


class Pipeline(Pass):
    """Several passes, applied in order; itself a pass."""

    word = PIPELINE
    parts: tuple[Pass, ...]

    def __init__(self, passes: Iterable[Pass | str]) -> None:
        object.__setattr__(self, "parts", tuple(plain(part, Pass) for part in passes))
        object.__setattr__(self, "name", "")
        for part in self.parts:
            if not isinstance(part, Pass):
                raise RecipeError(f"A pipeline holds passes, got {type(part).__name__}.")

    def passes(self) -> tuple[Pass, ...]:
        """Return the atomic passes, in order."""
        return tuple(atom for part in self.parts for atom in part.passes())

    def rules(self) -> list[Rule]:
        """Return the rules of all parts; a pipeline is applied part by part."""
        return [rule for part in self.passes() for rule in part.rules()]

    def __iter__(self) -> Iterator[Pass]:
        return iter(self.parts)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Pipeline) and self.parts == other.parts

    def __hash__(self) -> int:
        return hash(self.parts)

    def __str__(self) -> str:
        return "\n".join(str(part) for part in self.passes())

    def __repr__(self) -> str:
        return f"Pipeline({list(self.parts)!r})"
