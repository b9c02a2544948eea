"""Programs and their modules are copied as any other object, and are not pickled: what to keep of them are tensors."""

from __future__ import annotations

import copy
from typing import Any, ClassVar, NoReturn, Self

from peftgraph.errors import NoPickle


class NotPicklable:
    """What holds code or graphs that no pickle could be loaded of.

    Attributes:
        _noun: how a message calls it.
    """

    _noun: ClassVar[str] = "module"

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise NoPickle(
            f"The {self._noun} of a program cannot be pickled, and so not be given to torch.save: its code is made "
            "anew by every trace. Save what was trained with program.save_adapter(directory), or a module's "
            "state_dict(), which torch.save takes; later, trace the model again, and load_adapter, or apply the same "
            "passes and load_state_dict. A merged model is written by pg.fold(program).write_back(model) and the "
            "model's own save, a graph by program.export(path)."
        )

    def __copy__(self) -> Self:
        return _filled(type(self).__new__(type(self)), dict(vars(self)))

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        twin = memo[id(self)] = type(self).__new__(type(self))
        return _filled(twin, copy.deepcopy(vars(self), memo))


def _filled(twin: Any, state: dict[str, Any]) -> Any:
    if hasattr(twin, "__setstate__"):
        twin.__setstate__(state)
    else:
        vars(twin).update(state)
    return twin
