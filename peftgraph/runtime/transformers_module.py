"""A program in the place of a transformers model: an instance of the model's own class, whose forward runs the graph.

Generation, the Trainer and whoever asks for a configuration find what they look for. What would bypass the graph is
replaced or refused.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from peftgraph.errors import CallError
from peftgraph.ir.arguments import bind_arguments
from peftgraph.ir.kv_cache import default_input
from peftgraph.ir.program import ProgramData
from peftgraph.ir.source_model import ModelClass
from peftgraph.rewrite.distributed import full
from peftgraph.runtime.block_regions import BlockRegion
from peftgraph.runtime.encoder_decoder import HIDDEN, EncoderDecoderRunner, EncoderModule
from peftgraph.runtime.module import GraphModule
from peftgraph.runtime.training_region import TrainingOptions

Save = Callable[[Mapping[str, Tensor], Path], None]
COUNT = "num_items_in_batch"
MASK = "attention_mask"
POSITIONS = "position_ids"
NONE: Mapping[str, str] = {}


class TransformersModule(GraphModule):
    """A graph module that takes the calls of transformers' generation and training loops."""

    config: Any  # of the model's class, as is the next
    main_input_name: Any

    def __init__(
        self,
        program: ProgramData,
        blocks: Sequence[BlockRegion],
        state: Mapping[str, Any],
        save: Save,
        options: TrainingOptions | None = None,
        embeddings: Mapping[str, str] = NONE,
    ) -> None:
        super().__init__(program, blocks, options)
        self.__dict__.update(state)
        self._save = save
        self._embeddings = dict(embeddings)
        self._steps: dict[bool, EncoderDecoderRunner] = {}
        if "encoder" in self._modules:  # generation asks it for this name
            vars(self.get_submodule("encoder"))["main_input_name"] = self.main_input_name
        kept = program.table.trainable.keys() | program.table.state.keys()
        self._keys_to_ignore_on_save = [name for name in self.state_dict() if name not in kept]

    @property
    def accepts_loss_kwargs(self) -> bool:
        """Whether the loss is divided by a count that the call gives (`num_items_in_batch`): as it was traced."""
        return any(spec.key == COUNT for spec in self._peftgraph.signature.inputs)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Generate with the model's own `generate`, on the graph.

        Without a cache the whole sequence is computed at every step; with use_cache=True in the traced example, only
        the new tokens are.

        Raises:
            CallError: a cache is requested, and the program was traced without one.
        """
        if self._peftgraph.signature.kv_cache is None and kwargs.setdefault("use_cache", False):
            raise CallError(
                f"This program of {self._peftgraph.title} was traced without a cache. Trace it with use_cache=True in "
                'the example, pg.trace(model, {**inputs, "use_cache": True}), or generate with use_cache=False.'
            )
        return cast(Any, super()).generate(*args, **kwargs)

    def prepare_inputs_for_generation(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Return the model's own inputs of the next step, with the mask of ones that generation omits."""
        inputs = cast(Any, super()).prepare_inputs_for_generation(*args, **kwargs)
        tokens = inputs.get("input_ids")
        if self._peftgraph.signature.kv_cache is None and tokens is not None and inputs.get(MASK) is None:
            inputs |= {
                spec.key: torch.ones_like(tokens) for spec in self._peftgraph.signature.inputs if spec.key == MASK
            }
        known = {spec.key for spec in self._peftgraph.signature.inputs}
        if inputs.get(POSITIONS) is not None and POSITIONS not in known:
            raise CallError(
                f"{self._peftgraph.title} generates with {POSITIONS}, which this program was traced without. Trace it "
                'with use_cache=True in the example, which adds them: pg.trace(model, {**inputs, "use_cache": True}); '
                f"or, without a cache, with {POSITIONS} in it."
            )
        return inputs

    def _expand_inputs_for_generation(self, *args: Any, **kwargs: Any) -> Any:
        """Repeat for beams what has a row for each example; other inputs that were added to the model stay."""
        inputs = self._peftgraph.signature.inputs
        rows = {spec.dims[0] for spec in inputs if spec.dims and not spec.added}
        shared = {spec.argument for spec in inputs if spec.added and rows.isdisjoint(spec.dims[:1])}
        kept = {name: kwargs.pop(name) for name in shared if name in kwargs}
        tokens, repeated = cast(Any, super())._expand_inputs_for_generation(*args, **kwargs)
        return tokens, {**repeated, **kept}

    def save_pretrained(
        self, save_directory: str | PathLike[str], is_main_process: bool = True, **options: Any
    ) -> None:
        """Write the adapter, with an index by which the Trainer finds its tensors when it resumes.

        Args:
            save_directory: where to; `program.load_adapter` reads it.
            is_main_process: nothing is written by other processes; where parameters are sharded, all must call.
            options: `state_dict`, of whole tensors, is written instead of the module's; the Trainer gathers them. Its
                other arguments are about files that are not written.
        """
        given = options.get("state_dict") or {}
        trained = {n: p for n, p in self.named_parameters(remove_duplicate=False) if p.requires_grad}
        whole = {name: given[name] if name in given else full(value.detach()) for name, value in trained.items()}
        if is_main_process:
            self._save(whole, Path(save_directory))

    def get_input_embeddings(self) -> nn.Module:
        """Return what the traced model's method of this name returned."""
        return self._embedding("get_input_embeddings")

    def get_output_embeddings(self) -> nn.Module | None:
        """Return what the traced model's method of this name returned."""
        return self._embedding("get_output_embeddings")

    def _embedding(self, method: str) -> Any:
        path = self._embeddings.get(method)
        return getattr(cast(Any, super()), method)() if path is None else self.get_submodule(path)

    def tie_weights(self, *args: Any, **kwargs: Any) -> None:
        """Do nothing: tied names are one parameter already."""

    def call(self, *args: Any, **kwargs: Any) -> Any:
        """Run the graph as `forward` of the traced model; a given cache is updated in place.

        Raises:
            CallError: the graph was not traced for these arguments.
        """
        arguments, signature = self._arguments(args, kwargs), self._peftgraph.signature
        as_tuple = _take(arguments, "return_dict", signature.constants) is False
        kept = _take(arguments, "logits_to_keep", signature.constants)
        output = self._cached(arguments) if signature.kv_cache else self._uncached(arguments)
        if kept is not None and not (isinstance(kept, int) and kept == 0):
            output["logits"] = output["logits"][:, slice(-kept, None) if isinstance(kept, int) else kept]
        return output.to_tuple() if as_tuple else output

    def _arguments(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        signature = self._peftgraph.signature
        try:
            arguments = bind_arguments(signature.forward, args, kwargs)
        except TypeError as error:
            raise CallError(f"{error}. The model's signature is forward{signature.forward}.") from None
        count = next((spec for spec in signature.inputs if spec.key == COUNT), None)
        if count is not None and arguments.get(COUNT) is not None:
            arguments[COUNT] = _as(count.dtype, arguments[COUNT], self._peftgraph.target[1])
        return {name: value for name, value in arguments.items() if value is not None and not _is_off(name, value)}

    def _uncached(self, arguments: dict[str, Any]) -> Any:
        encoded = arguments.pop("encoder_outputs", None)
        return self._run_tensors(self._peftgraph.signature.tensors_of(arguments), encoded)

    def _run_tensors(self, tensors: list[Tensor | None], encoded: Any) -> Any:
        """Run the graph, or the part of it behind the encoder, if its outputs are given."""
        return self._peftgraph_run(tensors) if encoded is None else self._two_steps().decode(self, encoded, tensors)

    def _cached(self, arguments: dict[str, Any]) -> Any:
        signature = self._peftgraph.signature
        past = signature.kv_cache
        assert past is not None
        cache = arguments.pop(past.argument, None)
        wanted = arguments.pop("use_cache", self.config.use_cache)
        earlier = [] if cache is None else past.read(cache)
        ahead = past.prepended_rows(cache) if earlier else 0
        encoded = arguments.pop("encoder_outputs", None)
        tensors = signature.tensors_of(arguments)
        rows, names = iter(earlier), signature.cache_inputs
        specs = signature.inputs
        tensors = [next(rows, None) if s.name in names else t for s, t in zip(specs, tensors, strict=True)]
        self._fill(tensors, int(earlier[0].shape[-2]) - ahead if earlier else 0)
        output = self._run_tensors(tensors, encoded)
        present = output[past.argument]
        if not earlier:
            ahead = int(present[0].shape[-2]) - arguments[past.tokens].shape[1]
        if cache is None and wanted:
            cache = past.cache()
        if cache is None:
            return type(output)(**{name: value for name, value in output.items() if name != past.argument})
        past.write(cache, present, ahead)
        output[past.argument] = cache
        return output

    def get_encoder(self, modality: str | None = None) -> nn.Module:
        """Return the part of the graph that reads the encoder's inputs; its output is passed to calls as
        `encoder_outputs`.

        Raises:
            CallError: the program is of another kind of model.
        """
        if HIDDEN not in self._peftgraph.signature.output_keys:
            raise CallError(f"This program of {self._peftgraph.title} has no encoder apart from the rest.")
        return EncoderModule(self._encoded, self._peftgraph.signature, self._two_steps().halves.inputs)

    def _encoded(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        arguments = self._arguments(args, {name: value for name, value in kwargs.items() if name != "return_dict"})
        return self._two_steps().encode(self, self._peftgraph.signature.tensors_of(arguments))

    def _two_steps(self) -> EncoderDecoderRunner:
        if self.training not in self._steps:
            self._steps[self.training] = EncoderDecoderRunner(
                self._peftgraph.graph_for(self.training)[0], self._peftgraph.signature, self._peftgraph.title
            )
        return self._steps[self.training]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> TransformersModule:
        super()._apply(fn, recurse)
        self._steps.clear()  # literals may have moved
        return self

    def _fill(self, tensors: list[Tensor | None], before: int) -> None:
        """Fill in omitted inputs, in place, with the model's own defaults."""
        like = mask = next((value for value in tensors if value is not None), None)
        if like is None or mask is None:
            raise CallError(f"A call needs at least one tensor: {self._peftgraph.signature.describe()}.")
        specs = sorted(
            enumerate(self._peftgraph.signature.inputs), key=lambda one: one[1].default != "ones"
        )  # the mask comes first
        for i, spec in specs:
            value = tensors[i]
            if value is None and spec.default is not None:
                value = tensors[i] = default_input(spec.default, mask, before, like.shape[1], spec.dtype)
            mask = value if spec.default == "ones" and value is not None else mask


def _is_off(name: str, value: Any) -> bool:
    return value is False and name in ("output_attentions", "output_hidden_states")


def _as(dtype: torch.dtype, value: Tensor | float, device: torch.device) -> Tensor:
    """Return a number as a tensor of `dtype`; a fraction keeps its own dtype where `dtype` is an integer one."""
    found = torch.as_tensor(value, device=device)
    return found.to(dtype) if dtype.is_floating_point or not found.is_floating_point() else found


def _take(arguments: dict[str, Any], name: str, traced: Any) -> Any:
    return None if name in traced else arguments.pop(name, None)


def make_transformers_module(
    program: ProgramData,
    blocks: Sequence[BlockRegion],
    host: ModelClass,
    save: Save,
    options: TrainingOptions | None = None,
) -> TransformersModule:
    """Return the program as an instance of the class of the traced model.

    Args:
        program: what runs.
        blocks: its blocks.
        host: the class, and the state of an instance.
        save: writes parameters, by name, as an adapter into a directory.
        options: how blocks train; None for the plain code.
    """

    def forward(self: TransformersModule, *args: Any, **kwargs: Any) -> Any:
        return self.call(*args, **kwargs)

    own = inspect.Parameter("self", inspect.Parameter.POSITIONAL_OR_KEYWORD)
    forward.__signature__ = program.signature.forward.replace(
        parameters=[own, *program.signature.forward.parameters.values()]
    )
    names = {"__module__": host.cls.__module__, "__qualname__": host.cls.__qualname__, "__doc__": host.cls.__doc__}
    return type(host.cls.__name__, (TransformersModule, host.cls), {**names, "forward": forward})(
        program, blocks, copy.deepcopy(host.state), save, options, host.embeddings
    )
