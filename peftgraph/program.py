"""The public Program: the data of `peftgraph.ir` with the operations of all other packages."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from os import PathLike
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from peftgraph.capture import Options, capture, capture_part
from peftgraph.capture.progress import Progress, line_on_terminal
from peftgraph.costs.comparison import Comparison, named
from peftgraph.costs.comparison import compare as _compare
from peftgraph.draw import Diff, Picture, fragment, layer_texts, model_picture, outline, page, picture
from peftgraph.draw.rank_map import RankMap
from peftgraph.errors import AdapterError, Conflict, ExportError, PeftGraphError, TraceError
from peftgraph.folding import fold as _fold
from peftgraph.folding.proof import Proof
from peftgraph.interop import native
from peftgraph.interop.adapter_formats import OWN, load_adapter, save_adapter
from peftgraph.interop.module_owner import Source, make_owner
from peftgraph.interop.write_back import write_back
from peftgraph.ir.printer import assign_labels, print_diff, print_program, size_names
from peftgraph.ir.program import ProgramData
from peftgraph.ir.quantised_base import DEQUANTISES, without_codes
from peftgraph.ir.site_statistics import Statistic
from peftgraph.ir.verifier import verify as check_rules
from peftgraph.rewrite.apply import apply
from peftgraph.rewrite.count import Count, count
from peftgraph.rewrite.finalize import finalize
from peftgraph.rewrite.history import Names, flat_names, position_of, positions_of
from peftgraph.rewrite.method import Pass, Pipeline
from peftgraph.rewrite.mix import mix
from peftgraph.rewrite.recipe import Methods, as_pass, as_passes
from peftgraph.rewrite.release import release_quantised
from peftgraph.rewrite.remove import remove
from peftgraph.rewrite.skipped_sites import warn_of
from peftgraph.runtime.adapter_methods import with_adapter_methods
from peftgraph.runtime.block_regions import find_block_regions
from peftgraph.runtime.copying import NotPicklable
from peftgraph.runtime.export.adapter_file import write_adapter_file
from peftgraph.runtime.export.exported_program import adapter_tensors, adapter_values, export_program
from peftgraph.runtime.module import GraphModule
from peftgraph.runtime.sharding import check_read_back, read_back
from peftgraph.runtime.submodule_module import embed_in_model
from peftgraph.runtime.training_region import Optimise, TrainingOptions, training_options
from peftgraph.runtime.training_report import TrainingReport, report_training
from peftgraph.runtime.transformers_module import make_transformers_module
from peftgraph.serving.module import as_serving_module
from peftgraph.serving.row_part import RowPart
from peftgraph.serving.serve import adapter_part, serve
from peftgraph.sites import Absent, Pattern, Selector, Site, Sites, as_selector, find_sites
from peftgraph.sites.assign.naming import sections, titles
from peftgraph.sites.patterns.pattern import patterns_of
from peftgraph.training.calibrate import collect_statistics
from peftgraph.training.run import TrainingRun, start_training
from peftgraph.utils.cache_folder import cache_folder
from peftgraph.utils.terminal_line import noted_on_terminal


@dataclass(frozen=True, eq=False)
class Program(NotPicklable, ProgramData):
    """A traced model and the passes applied to it. Immutable: `apply`, `remove` and the like return a new Program.

    Attributes:
        sites: the parts of the base, found by structure; prints as a table.
        source: returns the model that was traced, while it exists.
    """

    _noun: ClassVar[str] = "graph"

    sites: Sites = field(default_factory=lambda: Sites(()))
    proof: Proof | None = None
    source: Source = field(default=lambda: None, repr=False)

    def apply(self, *methods: Methods, dtype: torch.dtype | None = None) -> Program:
        """Return the program with `methods` applied, in order.

        Args:
            methods: passes; or their text, such as `"lora{rank=8}; bitfit"`, the path of a recipe, or lists of these.
            dtype: of the parameters they add, such as `torch.bfloat16`. By default float32 on a base of half precision,
                so that small steps are not lost (deltas are cast back to the base's dtype where they enter); otherwise
                the base's own dtype.

        Raises:
            NoMatch: a selector finds nothing; the message shows the nearest miss.
            Conflict: two passes claim the same thing.
        """
        self._require_one_model("apply passes to")
        passes = as_passes(methods)
        program = self.with_patterns(*(rule.at for one in passes for rule in one.rules()))
        with noted_on_terminal("applying"):
            result = apply(program, program.sites, passes, dtype)
        warn_of(result.left_out[len(self.left_out) :], passes)
        return result

    @property
    def left_out(self) -> tuple[Absent, ...]:
        """The places of the passes' kind that they do not reach: attentions whose result enters no residual add, for a
        pass on sublayers, or whose queries no projection computes. `apply` warns of sublayers (`pg.LeftOut`)."""
        methods = [atom for applied in self.history for atom in applied.method.passes()]
        return tuple(one for method in methods for rule in method.rules() for one in self.sites.lacking(rule.at))

    def with_patterns(self, *patterns: Pattern | Selector | str) -> Program:
        """Return the program with the sites of some patterns added to its sites, for inspection; `apply` does this by
        itself.

        Args:
            patterns: patterns, or selectors that refer to patterns.

        Raises:
            Conflict: two different patterns have one name.
        """
        known = {one.pattern.name: one.pattern for one in self.sites.searched}
        count = len(known)
        for one in patterns:
            for pattern in (one,) if isinstance(one, Pattern) else patterns_of(as_selector(one)):
                if known.setdefault(pattern.name, pattern) != pattern:
                    raise Conflict(f"Two patterns are called {pattern.name!r}:\n  {known[pattern.name]}\n  {pattern}")
        if len(known) == count:
            return self
        return self.evolve(sites=_sites_of(self.base or self, tuple(known.values())))

    def remove(self, which: int | str = -1) -> Program:
        """Return the program without one pass of its history, by index, by name, or by its word; the other passes keep
        their parameters.

        Raises:
            PeftGraphError: there is no such pass, or a later pass cannot be applied without it.
            Ambiguous: several passes without a name have the word.
        """
        self._require_one_model("remove passes from")
        return remove(self, self.sites, position_of(self.history, which))

    def release_quantised(self) -> Program:
        """Return the program without the weights that `quantise` put codes in the place of.

        Their memory is free once the model and the programs that this one came from are deleted too. What needs these
        weights, such as `remove`, refuses from then on.

        Raises:
            PeftGraphError: no weight is quantised.
        """
        return release_quantised(self)

    def without(self, *names: Names) -> Program:
        """Return the program without the passes of the given names: `program.without("dog")`. The others keep their
        parameters. A pass without a name is called by its word: `program.without("lora")`.

        Raises:
            PeftGraphError: no pass has that name.
        """
        left = self
        for name in flat_names(names):
            for position in reversed(positions_of(left.history, name)):
                left = left.remove(position)
        return left

    def only(self, *names: Names) -> Program:
        """Return the program with only the given ones of its named passes: `program.only("dog")`; `program.only()` has
        none of them. Passes without a name stay. This program is unchanged, so another call switches to other adapters.

        Raises:
            PeftGraphError: no pass has that name.
        """
        wanted = flat_names(names)
        known = dict.fromkeys(applied.name for applied in self.history if applied.name)
        unknown = next((name for name in wanted if name not in known), None)
        if unknown is not None:
            raise PeftGraphError(f"No pass is called {unknown!r}. Named passes: {list(known)}.")
        return self.without(*(name for name in known if name not in wanted))

    def finalize(self) -> Program:
        """Return the program to keep after training: values that a pass computes from its parameters alone, such as a
        prefix that an MLP computes, become parameters. This program keeps its own parameters.

        Raises:
            PeftGraphError: no pass computes anything from its parameters alone.
        """
        self._require_one_model("finalise")
        check_read_back(self.table)
        return finalize(self, self.sites)

    def mix(self, weights: Mapping[str, float]) -> Program:
        """Return the program with its named passes weighted: `program.mix({"dog": 1.0, "toy": -0.5})`.

        A sum of LoRAs is exact: W + sum w s B A, without products of one adapter's factors with another's. A named pass
        that is not mentioned is removed and an unnamed one stays. This program is unchanged, so another call gives
        another mixture. Nothing is traced again, and the parameters are shared.

        Args:
            weights: by the name of a pass, of either sign; 1 for passes that cannot be weighted.

        Raises:
            PeftGraphError: no pass has that name.
            RecipeError: a weight is not 1 and the pass cannot be weighted.
        """
        self._require_one_model("mix")
        return mix(self, self.sites, weights)

    @property
    def recipe(self) -> Pass:
        """The passes that were applied, as one pass."""
        methods = [applied.method for applied in self.history]
        return methods[0] if len(methods) == 1 else Pipeline(methods)

    def text(self) -> str:
        """Return the graph as text; equal programs have equal texts."""
        return print_program(self)

    def diff(self, before: ProgramData) -> Diff:
        """Compare this program with an earlier one. The result prints as text; a notebook also draws a block."""
        return Diff(print_diff(before, self), lambda: picture(self, self.sites, before))

    def picture(self, before: ProgramData | None = None, layer: int | None = None, stack: str | None = None) -> Picture:
        """Draw what passes did to one block of each stack, from the recorded edits; a notebook displays the result.

        The base is grey. Inserted parts are coloured, drawn where they enter, and labelled with their names in the
        pass; W, g and b at a part of the base mark those of its own tensors that train. Parts that do not train are
        dashed. A pass made of several others has a colour for each. `save` writes .svg, .pdf or .png.

        Args:
            before: an earlier program, whose passes are not shown; the base by default.
            layer: the number of the block, -1 for the last; by default the first that was changed.
            stack: such as "decoder"; by default every stack that was changed.

        Raises:
            PeftGraphError: there is no such block.
        """
        return picture(self, self.sites, before, layer, stack)

    def drawing(self) -> Picture:
        """Draw the model as it is, whole: each distinct block once, with the layers that are like it.

        Raises:
            PeftGraphError: no blocks were found.
        """
        return model_picture(outline(self, self.sites))

    def html(self, footer: str = "") -> str:
        """Return an HTML page in one file: each distinct block drawn once, the table of layers, and the text of one
        layer of each kind. What belongs together is linked, and a field searches.

        Args:
            footer: a line of text at its end.
        """
        told = outline(self, self.sites)
        return page(told, footer, layer_texts(self, told))

    def _repr_html_(self) -> str:
        told = outline(self, self.sites)
        return self.picture()._repr_html_() if self.edits and told.stacks else fragment(told)

    def count(self) -> Count:
        """Trainable, added, changed and total parameters, and the rank of each change."""
        return count(self, self.sites)

    def ranks(self) -> RankMap:
        """Map the rank of each change of a matrix, by layer and role: what AdaLoRA learned; prints and draws."""
        by_id = {site.id: site for site in self.sites}
        found: list[tuple[str, str, int]] = []
        for change in self.count().changes:
            site = by_id[change.site]
            if change.rank is not None:
                layer = "other" if site.layer is None else str(site.layer)
                found.append((f"{site.stack} {layer}".strip() if site.stack else layer, site.role, change.rank))
        return RankMap.of(found)

    def module(
        self, optimise: Optimise = "auto", activation_budget: float = 1.0, keep_logits: bool = True
    ) -> nn.Module:
        """Return an ordinary module with the model's own call signature, output type and parameter names.

        Only new parameters require grad. They are shared with this program, so `pg.fold` sees what training did to
        them. Beside the model's own methods it has `print_trainable_parameters()`, `get_nb_trainable_parameters()` and
        `merge_and_unload()`, a plain model with everything folded into it, where the model's class or parts leave
        these names free.

        Args:
            optimise: "train" gives every block a forward and a backward pass of its own for training, which keep
                fewer bytes and join products; outputs and gradients are those of the plain graph up to rounding, and
                are compared with them at the first call. "auto" does so for blocks of some size, where it takes less
                time (on a CPU not for blocks with dropout); "off" never. "infer" is "auto" with code for latency in
                evaluation: products of one value, an adapter's among them, are one product with a matrix that is
                computed once and kept beside the weights, and again after a change of one of them (a write through
                `.data` is not seen before the next call in training mode). Where gradients are wanted in evaluation,
                the plain code runs.
            activation_budget: of the bytes that optimised blocks keep between the passes without repeating any
                product, the fraction to keep; 0 keeps what enters a block, and computes everything else again.
            keep_logits: False computes a cross-entropy in training in chunks of rows, with the head's product inside,
                so that logits are never in memory together; the output has None in their place. Evaluation has them.

        Raises:
            Conflict: several named adapters train copies of one tensor; `only` chooses one.
            PeftGraphError: an argument has no meaning.
        """
        self.require_one_adapter()
        check_read_back(self.table)
        net = self._module(training_options(optimise, activation_budget, keep_logits))
        net = with_adapter_methods(net, make_owner(self, fold, self.source))
        return net if self.served is None else as_serving_module(net, self.served)

    def _module(self, options: TrainingOptions | None) -> nn.Module:
        blocks = find_block_regions(self, self.sites)
        if self.enclosing_model is not None:
            return embed_in_model(self, blocks, self.enclosing_model, options)
        if self.model_class is None:
            return GraphModule(self, blocks, options)

        def save(trained: Mapping[str, Tensor], directory: Path) -> None:
            native.save_trained(self, trained, directory)

        return make_transformers_module(self, blocks, self.model_class, save, options)

    def _require_one_model(self, what: str) -> None:
        if self.served is not None:
            names = ", ".join(list(self.served.numbers)[:4])
            raise PeftGraphError(
                f"Cannot {what} a program that serves {len(self.served.numbers)} adapters ({names}): do it with the "
                "program of one of them, and serve() again."
            )

    def serve(
        self,
        adapters: Mapping[str, Program | str | PathLike[str]] | None = None,
        *,
        slots: int | None = None,
        trainable: bool = False,
    ) -> Program:
        """Return one program that holds many adapters; each row of a batch names the one that it is computed with.

        Calls take `adapter_ids`: a name for each row, or its number, from 1 in the order of `adapters`; 0, or an
        omitted argument, is the base alone. Rows are those of each adapter alone, up to rounding; this is checked on
        the example.

        Args:
            adapters: by name, programs of this base or directories that `load_adapter` reads. A program with passes
                serves its own named ones, without this argument.
            slots: for how many adapters of each graph there is room, for others that `net.swap` loads. If there are
                more adapters, the first ones are loaded, and others when rows name them; the least recently used leave.
            trainable: keep the adapters' parameters as they are, shared with their programs, so that each trains on its
                own rows: `net.optimiser_groups()` has a group of them for each adapter.

        Raises:
            AdapterError: an adapter belongs to another base, or its files are damaged.
            Conflict: it cannot be computed beside others, such as a prompt, which makes the inputs longer.
        """
        if adapters is None:
            adapters = self._named_adapters()
        elif any(edit.parameters for edit in self.edits):
            raise PeftGraphError(
                "serve({...}) is called on a program without trained passes; tuned.serve() serves its own."
            )
        self._require_one_model("serve from")
        own = self._frozen_part(adapters)
        return serve(
            own, own._sites_for(adapters), adapters, partial(own._row_part, trainable=trainable), slots, trainable
        )

    def _frozen_part(self, adapters: Mapping[str, Program | str | PathLike[str]]) -> Program:
        """Return what adapters of this program have in common: its own passes, or else their first ones, as far as
        these have nothing to train, such as `quantise`."""
        programs = [one for one in adapters.values() if isinstance(one, Program)]
        base = self.base
        assert isinstance(base, Program)
        if not programs:
            return self if not any(edit.parameters for edit in self.edits) else base
        own = programs[0]
        first = [str(applied.method) for applied in own.history]
        others = [[str(applied.method) for applied in one.history] for one in programs]
        trained = {edit.application for edit in own.edits if edit.parameters}
        count = next(
            (i for i in range(len(first)) if i in trained or any(o[: i + 1] != first[: i + 1] for o in others)), 0
        )
        if not count:
            return base
        while len(own.history) > count:
            own = own.remove(-1)
        return own

    def _sites_for(self, adapters: Mapping[str, Program | str | PathLike[str]]) -> Sites:
        programs = [one for one in adapters.values() if isinstance(one, Program)]
        used = [rule.at for one in programs for applied in one.history for rule in applied.method.rules()]
        return self.with_patterns(*used).sites

    def _row_part(self, name: str, one: Program | str | PathLike[str], trainable: bool = False) -> RowPart:
        """Return what an adapter of this program computes for rows."""
        adapter = one if isinstance(one, Program) else self.load_adapter(one)
        used = [rule.at for applied in adapter.history for rule in applied.method.rules()]
        return adapter_part(name, self, self.with_patterns(*used).sites, adapter, trainable)

    def _named_adapters(self) -> Mapping[str, Program]:
        names = dict.fromkeys(applied.name for applied in self.history if applied.name)
        if not names:
            raise PeftGraphError(
                "serve() without arguments serves the named passes of a program, and this one has none. Name them, as "
                'in lora{name="dog"}, or serve({"dog": program, ...}).'
            )
        return {name: self.only(name) for name in names}

    def explain_cost(self, net: nn.Module) -> TrainingReport:
        """Return what the optimised blocks of a module keep between the passes, and what they compute again.

        Args:
            net: what `module()` returned, after a step of training, whose sizes the report tells.
        """
        return report_training(net)

    def calibrate(
        self,
        batches: Iterable[Mapping[str, Any]],
        *methods: Methods,
        loss: Callable[[Any], Tensor] | None = None,
        samples: int = 256,
    ) -> Program:
        """Return the program with statistics of data at the sites of some passes, for starts that need data.

        Memory is bounded: of each site a matrix of its inputs' size (covariance), `samples` inputs (activations), and
        two matrices of its weight's size (gradient, fisher), of these what the passes ask for.

        Args:
            batches: keyword arguments of the module, each a mapping.
            methods: the passes that will be applied, as `apply` takes them:
                `program.calibrate(batches, method).apply(method)`.
            loss: of the module's output, for gradients; by default the output's own.
            samples: how many inputs of a site are kept as activations.

        Raises:
            PeftGraphError: no pass asks for statistics, or there are no batches or no loss.
        """
        self._require_one_model("calibrate")
        wanted: dict[Site, set[Statistic]] = {}
        for atom in (atom for method in as_passes(methods) for atom in method.passes() if atom.statistics()):
            for site in (site for at in atom.statistics_at() for site in self.sites.select(at)):
                wanted.setdefault(site, set()).update(atom.statistics())
        if not wanted:
            raise PeftGraphError("None of these passes computes anything from data, so there is nothing to calibrate.")
        found = collect_statistics(self, self.sites, wanted, batches, self.module(), loss, samples)
        known = self.statistics
        both = {key: known[key].updated(one) if key in known else one for key, one in found.items()}
        return self.evolve(statistics={**known, **both})

    def gather(self, net: nn.Module) -> Program:
        """Read what a sharded module trained back into this program, and return it.

        `fully_shard` gives a module tensors of its own, so that this program's keep their values while it trains. Every
        process has to call this, and has all values afterwards. Other modules share their parameters with the program,
        and need no call.

        Args:
            net: what `module()` returned, sharded.

        Raises:
            PeftGraphError: the module is another program's.
        """
        read_back(self.table, net)
        return self

    def training(self, net: nn.Module, steps: int) -> TrainingRun:
        """Start a training that the passes take part in, with terms of the loss, masks and schedules.

        A plain loop adds `run.penalty()` to its loss (0 where no pass has one) and calls `run.step()` after every
        `optimizer.step()`, before the gradients are zeroed. `peftgraph.training` has callbacks for trainers.

        Args:
            net: what `module()` returned, or a wrapper of it (DistributedDataParallel, FSDP, torch.compile).
            steps: how many steps the optimiser will do.

        Raises:
            PeftGraphError: nothing was applied, or the module is another program's.
            RecipeError: a pass's schedule does not fit that number of steps.
        """
        self._require_one_model("start a training of")
        return start_training(self, self.sites, net, steps)

    def export(self, path: str | PathLike[str], *, adapters: Literal["inside", "inputs"] = "inside") -> Path:
        """Write the graph in the format of the path's suffix: `.pt2` (torch.export), `.onnx`, or that of a plug-in.

        Args:
            path: of the file.
            adapters: "inputs" makes the tensors of the adapters inputs of the file, with symbolic sizes, for other
                adapters of the same passes and sites (`export_adapter` writes theirs). An `.onnx` file has this
                program's own as defaults; calls of a `.pt2` file give them as the dict `adapter_tensors`.

        Raises:
            ExportError: no exporter has the suffix, or the exporter refuses.
            Conflict: several named adapters train copies of one tensor; `only` chooses one.
        """
        self.require_one_adapter()
        check_read_back(self.table)
        if adapters not in ("inside", "inputs"):
            raise PeftGraphError(f'adapters is "inside" or "inputs", got {adapters!r}.')
        with noted_on_terminal("exporting"):
            if adapters == "inside":
                return export_program(self, Path(path))
            form = self._with_scales_as_tensors()
            return export_program(form, Path(path), adapter_tensors(form))

    def export_adapter(self, path: str | PathLike[str]) -> Path:
        """Write the tensors that a file of `export(..., adapters="inputs")` takes, by name.

        Args:
            path: a `.onnx_adapter` file, which ONNX Runtime activates for a run, or `.safetensors`.

        Raises:
            ExportError: the suffix is another, onnxruntime is missing, or the program has no adapter.
        """
        self.require_one_adapter()
        form = self._with_scales_as_tensors()
        return write_adapter_file(adapter_values(form, adapter_tensors(form)), Path(path))

    def _with_scales_as_tensors(self) -> ProgramData:
        """Return this program with the numbers of its passes, such as alpha / rank, as tensors."""
        if self.served is not None or not self.history:
            return self
        self._require_one_model("export the adapter of")
        base = self.base
        assert isinstance(base, Program)
        part = base._row_part("the adapter", self)
        if part.prompt is not None:
            raise ExportError(f"{part.prompt.method} makes the inputs longer; its rows cannot be inputs of a file.")
        return part.program

    def write_back(self, model: nn.Module) -> nn.Module:
        """Copy the weights into a plain instance of the original class, in place, and return it.

        Raises:
            PeftGraphError: unfolded passes are left, or the model does not fit.
        """
        self._require_one_model("write back")
        return write_back(self, model)

    def save_adapter(self, directory: str | PathLike[str], format: str = OWN) -> Path:
        """Write the trained parameters and the recipe they belong to; return the directory.

        Args:
            directory: where.
            format: our own (the recipe and the base's fingerprint), or that of a plug-in: "peft" is for
                `PeftModel.from_pretrained`. It knows LoRA, DoRA, (IA)3, prefixes, prompts, trained tokens and
                LLaMA-Adapter, one method at a time, with biases, tokens and whole modules that train along with it; a
                part of a fused weight is written with rows of zeros.

        Raises:
            AdapterError: there is nothing to save, or the format is unknown or cannot express the passes: the message
                names the pass and the site.
            PeftGraphError: the directory cannot be written; its earlier content stays.
        """
        self._require_one_model("save")
        check_read_back(self.table)
        return save_adapter(self, self.sites, _path(directory), format)

    def load_adapter(
        self, directory: str | PathLike[str], name: str | None = None, format: str | None = None
    ) -> Program:
        """Return this program with the saved passes applied, and their trained parameters.

        Args:
            directory: what `save_adapter` wrote, or peft's `save_pretrained`, or the `adapters` library (safetensors),
                or any other software whose format is a plug-in (`peftgraph.plugins`).
            name: another name for the adapter, if its own is already in use.
            format: of the directory; by default it is recognised by its files.

        Raises:
            AdapterError: the files are damaged, belong to another base, or describe what no pass does; this program is
                unchanged.
        """
        self._require_one_model("load an adapter into")
        if not isinstance(name, str | None):
            raise AdapterError(f"The name of an adapter is text, got {name!r}.")
        with noted_on_terminal("loading the adapter"):
            return load_adapter(self, self.sites, self.apply, _path(directory), name, format)

    def __str__(self) -> str:
        passes = "; ".join(str(applied.method) for applied in self.history) or "no passes"
        if self.served is not None:
            passes = f"serves {len(self.served.numbers)} adapters: {', '.join(self.served.numbers)}"
        kept = f"Program of {self.model}: {len(self.graph.nodes)} nodes, {len(self.sites)} sites, {passes}"
        return kept if self.comparison is None else f"{kept}; {self.comparison.summary()} when it was traced"

    def __repr__(self) -> str:
        return f"<{self}>"


def _path(directory: object) -> Path:
    if not isinstance(directory, str | PathLike) or "\0" in str(directory):
        raise AdapterError(f"An adapter is stored in a directory; {directory!r} names none.")
    return Path(directory)


def trace(
    model: nn.Module,
    example: Mapping[str, Any] | tuple[Any, ...] | Tensor,
    *,
    root: str = "",
    fixed: Mapping[str, Sequence[int]] | None = None,
    assume: Mapping[str, bool] | None = None,
    verify: Literal["off", "example", "sizes"] = "sizes",
    progress: Progress | None = None,
    cache: bool | str | PathLike[str] = False,
) -> Program:
    """Trace a model into a Program.

    Args:
        model: any nn.Module; its weights may be on the meta device. It is not modified; its weights are shared.
        example: a dict of keyword inputs or a tuple of positional ones. Batch and length become dynamic.
        root: the dotted name of a submodule to trace alone, as the model calls it first on `example`; for a model whose
            other code branches on data. `module()` then is the whole model, with this part rewritten and the rest
            unchanged; paths, parameter names, `write_back` and adapters are the whole model's. `export` writes the
            graph of the submodule.
        fixed: axes whose sizes stay the example's: `{"pixel_values": (2, 3)}`. The others stay dynamic; where the
            model's code computes much with them (windows, strides), fixing them makes tracing faster. With `root`, of
            the submodule's inputs.
        assume: outcomes of data-dependent branches: `{"modeling_esm.py:412": False}` assumes that the tensor which that
            line converts to bool is false. It may depend on inputs alone; the program lists it, and checks it at every
            call.
        verify: the program is compared with the model, in evaluation and in training under one seed: on the example and
            at other sizes of every dynamic axis ("sizes"), on the example alone ("example"), or not at all ("off").
            Without weights, on the meta device, only the sizes of outputs are compared. `checked` says what was
            compared.
        progress: called with a phase, how many of its steps (layers) have begun, and how many there are, 0 where
            that is unknown: `progress("exporting", 3, 96)`. By default a line on a terminal, after a second.
        cache: True keeps the program in the cache folder ($PEFTGRAPH_CACHE, or that of this system), a path in another
            one, and takes it from there the next time: if the code, the configuration, all shapes, the example, the
            options and the versions are the same. Weights are not kept, and may differ.

    Raises:
        TraceError: the model cannot be traced; the message names the line of its code and what to change.
    """
    if verify not in ("off", "example", "sizes"):
        raise TraceError(f'verify must be "off", "example" or "sizes", got {verify!r}.')
    folder = (cache_folder() if cache is True else Path(cache)) if cache else None
    with line_on_terminal() if progress is None else nullcontext(progress) as told:
        return _traced(model, example, root, Options(fixed or {}, assume or {}, verify, told, folder))


def _traced(
    model: nn.Module, example: Mapping[str, Any] | tuple[Any, ...] | Tensor, root: str, options: Options
) -> Program:
    progress = options.progress
    data = capture_part(model, example, root, options) if root else capture(model, example, options)
    progress("finding sites", 0, 0)
    sites = _sites_of(data)
    progress("verifying", 0, 0)
    assign_labels(data.graph, titles(sites) | _titles_of_codes(data, sites), sections(sites))
    fields = {name: getattr(data, name) for name in data.__dataclass_fields__}
    program = Program(**fields, sites=sites, source=weakref.ref(model))
    object.__setattr__(program, "base", program)
    check_rules(program)
    return program


def _titles_of_codes(data: ProgramData, sites: Sites) -> dict[str, str]:
    """Return the printed names of the base's own dequantised weights: those of the sites that read them."""
    if not data.table.quantised:
        return {}
    readers = {
        site.weight.parameter: site.id
        for site in reversed(tuple(sites))
        if site.weight is not None and site.role != "ffn.hidden"
    }
    found = ((node.name, readers.get(node.meta.get(DEQUANTISES, ""))) for node in data.graph.nodes)
    return {name: f"{site}.dequantise" for name, site in found if site is not None}


def _sites_of(base: ProgramData, patterns: Sequence[Pattern] = ()) -> Sites:
    parameters = {name for name, entry in base.table.items() if entry.kind == "parameter"}
    graph = without_codes(base.graph) if base.table.quantised else base.graph
    return find_sites(graph, base.table.tensors(), size_names(base), patterns=patterns, parameters=parameters)


def compare(
    program: Program, recipes: str | Pass | Sequence[Methods], *, batch: int = 8, length: int = 128, examples: int = 0
) -> Comparison:
    """Compute what recipes cost on a model, without its weights: the columns of the survey's table as numbers.

    Args:
        program: without passes; may be on the meta device.
        recipes: passes, or their text: `[LoRA(rank=8), "ia3", "prefix{length=10}", "lora; bitfit"]`; a list in the list
            is one recipe.
        batch: rows of every input.
        length: tokens of every sequence.
        examples: in a prompt, whose cost is told beside that of training; 0 for none.

    Returns:
        A table: prints, shows in a notebook, and gives `json()` and `html()`.

    Raises:
        PeftGraphError: a recipe does not fit the model, or the model takes no such sizes.
    """
    with noted_on_terminal("comparing"):
        return _compare(program, program.sites, program.apply, named(recipes, as_pass), batch, length, examples)


def fold(
    program: Program,
    *,
    partial: bool = False,
    untie: bool = False,
    quantised: Literal["refuse", "dequantise", "requantise"] = "refuse",
    prove: Literal["auto", "regions", "outputs", "both"] = "auto",
) -> Program:
    """Fold every pass back into the weights and prove that the result computes the same.

    Args:
        program: what to fold; it is not modified, nor is its base.
        partial: fold what can be folded and keep the rest, instead of refusing.
        untie: give a tied weight that must change a tensor of its own, instead of refusing.
        quantised: what becomes of weights that are stored as codes. "dequantise" folds into the dequantised weights,
            as exactly as into any others, and gives a program that is not quantised. "requantise" quantises these
            anew, which is not exact: `proof.requantised` has the error of each site.
        prove: what is proved beside the text and the values of the weights. "regions": what each changed weight
            computes with the passes around it, in float64 on random inputs, which needs one weight at a time.
            "outputs": the whole model's outputs on its example, which needs a copy of it in float64. "both"; and
            "auto", the regions, and for small models both.

    Returns:
        A program with the base's graph and new weights; `proof` records the evidence.

    Raises:
        NoFold: something cannot be folded exactly; every site is named with its reason.
        QuantisedWeights: a NoFold, because weights are stored as codes.
        Conflict: several named adapters train copies of one tensor; `only` chooses one.
        ProofError: the result would compute something else.
    """
    if not isinstance(program, Program):
        raise PeftGraphError(
            f"pg.fold takes a program, got {type(program).__name__}. A module has one, pg.program_of(net), and "
            "net.merge_and_unload() folds it into a plain model."
        )
    program._require_one_model("fold")
    program.require_one_adapter()
    check_read_back(program.table)
    with noted_on_terminal("folding, with proof"):
        return _fold(program, program.sites, partial=partial, untie=untie, quantised=quantised, facts=prove)
