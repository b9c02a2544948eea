"""The names of a program's tensors, and which pass made them."""

from __future__ import annotations

from collections.abc import Mapping


class TensorNames:
    """Holds the dotted names in use, each with what made it, and the module paths that they imply.

    Args:
        makers: who made each tensor, by its name.
    """

    def __init__(self, makers: Mapping[str, str]) -> None:
        self._makers: dict[str, str] = {}
        self._first: dict[str, str] = {}  # the first tensor of every module
        for name, maker in makers.items():
            self.add(name, maker)

    def __contains__(self, name: str) -> bool:
        return name in self._makers

    def add(self, name: str, maker: str) -> None:
        """Reserve a name for a new tensor."""
        self._makers[name] = maker
        for module in _modules(name):
            self._first.setdefault(module, name)

    def made_by(self, name: str) -> str:
        """Return what made a tensor."""
        return self._makers[name]

    def conflicting(self, name: str) -> str | None:
        """Return a tensor whose name is a module path of `name`, or the other way round; None if there is none."""
        inner = next((module for module in _modules(name) if module in self._makers), None)
        return inner or self._first.get(name)


def _modules(name: str) -> list[str]:
    """Return the module paths above a tensor name, outermost first."""
    return [name[:i] for i, letter in enumerate(name) if letter == "."]
