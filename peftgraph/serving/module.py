"""The module of a program of many adapters: names for rows, other adapters in the place of present ones."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from peftgraph.errors import AdapterError, CallError, PeftGraphError
from peftgraph.serving.prompts import LENGTHS, VALUES, write_prompt
from peftgraph.serving.row_part import RowPart
from peftgraph.serving.serve import INPUT, Group, ServedAdapters


class ServingState:
    """Which adapters a module holds, and where.

    Attributes:
        numbers: of each adapter, by name; calls may give either.
        loaded: the group and the entry in its stacks, by the number of each adapter that is in memory.
        used: the numbers of the adapters in memory, the least recently used first.
    """

    def __init__(self, served: ServedAdapters) -> None:
        self.groups = list(served.groups)
        self.sources = dict(served.sources)
        self.load = served.load
        self.numbers = dict(served.numbers)
        self.capacity = served.capacity
        self.parameters = served.parameters
        self.prompts = served.prompts
        self.loaded = {n: (group, i) for group in self.groups for i, n in enumerate(group.stacks.ids, 1)}
        self.used = dict.fromkeys(self.loaded)

    @property
    def complete(self) -> bool:
        """Whether every adapter that has a number is in memory."""
        return len(self.loaded) >= len(self.numbers)

    def numbers_of(self, rows: Sequence[Any]) -> list[int]:
        """Return the numbers of adapters given by name or number; None and "" are the base.

        Raises:
            CallError: a row names no adapter.
        """
        found: list[int] = []
        for row, one in enumerate(rows):
            number = 0 if one is None or one == "" else self.numbers.get(one, one) if isinstance(one, str) else one
            if isinstance(number, bool) or not isinstance(number, int):
                known = ", ".join(list(self.numbers)[:8]) + (", ..." if len(self.numbers) > 8 else "")
                raise CallError(f"{INPUT}: row {row} names {one!r}, which is no adapter of this module ({known}).")
            found.append(number)
        return found

    def check(self, rows: Sequence[int]) -> None:
        """Refuse numbers that no adapter has.

        Raises:
            CallError: names the first row.
        """
        known = {0, *self.numbers.values()}
        for row, number in enumerate(rows):
            if number not in known:
                raise CallError(
                    f"{INPUT}: row {row} has {number}; adapters have the numbers 1 to {len(self.numbers)}, and "
                    "0 is the base alone."
                )

    def free_entry(self, group: Group, keep: Iterable[int]) -> tuple[int, int | None]:
        """Return an entry of a group for another adapter, and the number of the adapter that leaves it, if one does.

        Raises:
            PeftGraphError: all are needed.
        """
        taken = {entry: number for number, (own, entry) in self.loaded.items() if own is group}
        free = next((i for i in range(1, group.stacks.slots + 1) if i not in taken), None)
        if free is not None:
            return free, None
        needed = set(keep)
        oldest = next((n for n in self.used if n not in needed and self.loaded[n][0] is group), None)
        if oldest is None:
            raise PeftGraphError(f"There is no room for another adapter: all {group.stacks.slots} are in use.")
        return self.loaded[oldest][1], oldest


class ServingModule(nn.Module):
    """What a module of many adapters has beside the model's own methods."""

    _peftgraph: Any  # of the graph's module, which this one is too
    _peftgraph_serving: ServingState

    @property
    def adapters(self) -> Mapping[str, int]:
        """The number of each adapter, by name; rows may give either."""
        return dict(self._peftgraph_serving.numbers)

    def optimiser_groups(self, **options: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Return a group of parameters for each adapter, for an optimiser.

        Args:
            options: of an adapter's group, by its name, such as `dog={"lr": 1e-3}`.

        Raises:
            PeftGraphError: the program was served without trainable=True, or no adapter has a name.

        Example:
            >>> optimiser = torch.optim.AdamW(net.optimiser_groups(dog={"lr": 1e-3}), lr=1e-4)
        """
        own, known = self._peftgraph_serving.parameters, dict(self.named_parameters(remove_duplicate=False))
        if not own:
            raise PeftGraphError("These adapters do not train; serve them with trainable=True.")
        unknown = next((name for name in options if name not in own), None)
        if unknown is not None:
            raise PeftGraphError(f"No adapter is called {unknown!r}; there are {', '.join(own)}.")
        return [
            {"params": [known[one] for one in names], "name": name, **options.get(name, {})}
            for name, names in own.items()
        ]

    def swap(self, name: str, adapter: Any) -> None:
        """Put an adapter in the place of the one called `name`, or beside the others if there is none and there is
        room. The graph stays as it is, also if it was compiled, and other adapters are not touched.

        Args:
            name: what rows call it from now on.
            adapter: a program of the same base with passes, or a directory that `load_adapter` reads. Its passes are
                those of an adapter that is here, with ranks and scales of its own; a rank larger than all here makes
                the stored tensors larger, so that a compiled module is compiled again.

        Raises:
            AdapterError: the files are damaged, or belong to another base.
            PeftGraphError: no adapter here has these passes, or there is no room. Nothing is changed after an error.
        """
        state = self._peftgraph_serving
        if state.parameters:
            raise PeftGraphError("Adapters that train are not swapped; serve them without trainable=True.")
        part = state.load(name, adapter)
        group = _group_of(state, name, part)
        number = state.numbers.get(name)
        if number is None:
            number = next((n for n in range(1, state.capacity + 1) if n not in state.numbers.values()), None)
        if number is None:
            raise PeftGraphError(
                f"There is no room for another adapter than {', '.join(state.numbers)}. Swap one of them by its "
                "name, or serve(..., slots=) more."
            )
        self._put(number, part, group, ())
        state.numbers[name] = number
        state.sources[name] = adapter

    def _put(self, number: int, part: RowPart, group: Group, keep: Iterable[int]) -> None:
        """Write an adapter's values into an entry of its group, and let its number name them."""
        state, tensors = self._peftgraph_serving, dict(self.named_buffers())
        before = state.loaded.get(number)
        entry, leaving = (
            (before[1], None) if before and before[0] is group else state.free_entry(group, {*keep, number})
        )
        for name, larger in group.stacks.write(entry, part, tensors).items():
            path, _, leaf = name.rpartition(".")
            setattr(self.get_submodule(path), leaf, larger)
        if leaving is not None:
            _write_index(group, tensors, leaving, 0)
            del state.loaded[leaving], state.used[leaving]
        if before is not None and before[0] is not group:
            _write_index(before[0], tensors, number, 0)
        _write_index(group, tensors, number, entry)
        if state.prompts is not None:
            write_prompt(tensors[VALUES], tensors[LENGTHS], number, part.prompt)
        state.loaded[number] = (group, entry)
        state.used.pop(number, None)
        state.used[number] = None

    def _peftgraph_before_call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        """Turn names into numbers, and load what a call needs."""
        if INPUT not in kwargs:
            return args, kwargs
        if torch.compiler.is_compiling():
            if kwargs[INPUT] is not None and not isinstance(kwargs[INPUT], Tensor):
                raise CallError(f"A compiled module takes {INPUT} as a tensor; net.adapters has the numbers by name.")
            return args, kwargs
        ids = self._peftgraph_ids(kwargs[INPUT], args, kwargs)
        return args, {**kwargs, INPUT: ids}

    def _peftgraph_ids(self, given: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        state = self._peftgraph_serving
        if given is None:
            return None
        like = [one for one in (*args, *(kwargs or {}).values()) if isinstance(one, Tensor) and one.dim()]
        if isinstance(given, str):
            given = [given] * (like[0].shape[0] if like else 1)
        if isinstance(given, Tensor):
            rows = given.tolist() if given.dim() == 1 and not given.is_floating_point() else None
            if rows is None:
                return given  # the calling convention says what is wrong
        elif isinstance(given, Sequence):
            rows = state.numbers_of(given)
        else:
            raise CallError(f"{INPUT} is a name or number for each row, got {type(given).__name__}.")
        state.check(rows)
        self._load_missing(rows)
        if isinstance(given, Tensor):
            return given
        return torch.tensor(rows, dtype=torch.int64, device=like[0].device if like else self._peftgraph.target[1])

    def _load_missing(self, rows: Sequence[int]) -> None:
        """Load the adapters of a call that are not in memory; the least recently used leave."""
        state = self._peftgraph_serving
        if state.complete:
            return
        needed = dict.fromkeys(number for number in rows if number)
        found = {number: self._loaded(number, rows) for number in needed if number not in state.loaded}
        self._check_room(
            {n: state.loaded[n][0] for n in needed if n in state.loaded} | {n: g for n, (_, g) in found.items()}
        )
        for number in needed:
            if number in found:
                self._put(number, *found[number], needed)
            else:
                state.used.pop(number)
                state.used[number] = None

    def _loaded(self, number: int, rows: Sequence[int]) -> tuple[RowPart, Group]:
        """Load the adapter of a number, which a row names.

        Raises:
            AdapterError: it cannot be loaded, or fits no graph here.
        """
        state = self._peftgraph_serving
        name = next(name for name, own in state.numbers.items() if own == number)
        try:
            part = state.load(name, state.sources[name])
            return part, _group_of(state, name, part)
        except PeftGraphError as error:
            raise AdapterError(f"{INPUT}: row {list(rows).index(number)} needs {name!r}: {error}") from error

    def _check_room(self, needed: Mapping[int, Group]) -> None:
        """Refuse a call that names more adapters of one graph than there is room for.

        Raises:
            CallError: it does.
        """
        for group in self._peftgraph_serving.groups:
            count = sum(own is group for own in needed.values())
            if count > group.stacks.slots:
                raise CallError(
                    f"{INPUT} names {count} adapters of one kind, and there is room for {group.stacks.slots}. Make "
                    "smaller batches, or serve(..., slots=) larger."
                )

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Generate as the model does; `adapter_ids` are repeated for beams and kept over steps."""
        if kwargs.get(INPUT) is not None:
            kwargs[INPUT] = self._peftgraph_ids(kwargs[INPUT], args, kwargs)
        parent: Any = super()
        return parent.generate(*args, **kwargs)


def _group_of(state: ServingState, name: str, part: RowPart) -> Group:
    """Return the group whose graph an adapter has.

    Raises:
        PeftGraphError: none has.
    """
    table = state.prompts
    room = part.prompt is None if table is None else table.takes(part.prompt)
    found = next((group for group in state.groups if group.takes(part)), None) if room else None
    if found is None:
        kinds = "; ".join(dict.fromkeys(group.stacks.parts[0].method for group in state.groups))
        raise PeftGraphError(
            f"{name!r} ({part.method}) fits no graph of this module, which has those of: {kinds}. Ranks and scales "
            "may differ; for other passes or sites, serve it together with the others."
        )
    return found


def _write_index(group: Group, tensors: Mapping[str, Tensor], number: int, entry: int) -> None:
    with torch.no_grad():
        tensors[group.stacks.index_name][number] = entry


def as_serving_module(net: nn.Module, served: ServedAdapters) -> nn.Module:
    """Return a module of a program, as one of many adapters.

    Args:
        net: of the program.
        served: its adapters.
    """
    cls = type(net)
    net.__class__ = type(cls.__name__, (ServingModule, cls), {"__module__": cls.__module__, "__doc__": cls.__doc__})
    vars(net)["_peftgraph_serving"] = ServingState(served)
    written = [] if served.prompts is None else [VALUES, LENGTHS]
    for group in served.groups:
        written += group.stacks.written
    for name in written:  # its own: other modules of the program keep their adapters
        path, _, leaf = name.rpartition(".")
        owner = net.get_submodule(path)
        setattr(owner, leaf, owner.get_buffer(leaf).clone())
    net.register_forward_pre_hook(_before_call, with_kwargs=True)
    return net


def _before_call(net: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
    assert isinstance(net, ServingModule)
    return net._peftgraph_before_call(args, kwargs)
