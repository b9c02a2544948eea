"""Finds plug-ins by name: those of installed distributions (entry points) and those registered at run time."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import EntryPoint, entry_points
from typing import Generic, TypeVar, cast

from peftgraph.errors import PeftGraphError, shortened

T = TypeVar("T")


class Registry(Generic[T]):
    """The plug-ins of one kind, by name.

    A plug-in is an entry point of a group, with the plug-in's name, or it is registered at run time. It is loaded on
    first use: listing the names imports nothing.

    Args:
        group: of the entry points, such as "peftgraph.exporters".
        noun: the word for one in messages, such as "exporter".
        error: the class of errors to raise.
        kind: the name of its class in messages, such as "Exporter".
        accepts: whether an object is a plug-in of the kind.
        name_of: the name of a plug-in.
        how_to_add: how to add one at run time, for messages.
    """

    def __init__(
        self,
        group: str,
        noun: str,
        error: type[PeftGraphError],
        *,
        kind: str,
        accepts: Callable[[object], bool],
        name_of: Callable[[T], str],
        how_to_add: str = "peftgraph.plugins",
    ) -> None:
        self.group = group
        self._noun, self._error, self._kind = noun, error, kind
        self._accepts, self._name_of, self._how_to_add = accepts, name_of, how_to_add
        self._registered: dict[str, T] = {}

    def names(self) -> list[str]:
        """Return the names of all plug-ins, sorted."""
        return sorted({*self._registered, *(point.name for point in entry_points(group=self.group))})

    def register(self, plugin: T) -> T:
        """Register a plug-in for this process and return it.

        Raises:
            PeftGraphError: it is of another kind, or its name is taken.
        """
        if not self._accepts(plugin):
            raise self._error(f"The {self._noun} must be of the class {self._kind}, got {type(plugin).__name__}.")
        name = self._name_of(plugin)
        if name in self.names():
            raise self._error(f"There is an {self._noun} {name!r} already; choose another name.")
        self._registered[name] = plugin
        return plugin

    def replace(self, plugin: T) -> None:
        """Register a plug-in for this process, replacing any other of its name."""
        self._registered[self._name_of(plugin)] = plugin

    @contextmanager
    def restored(self) -> Iterator[None]:
        """Restore the registry at the end of a `with` block."""
        before = dict(self._registered)
        try:
            yield
        finally:
            self._registered.clear()
            self._registered.update(before)

    def unregister(self, name: str) -> None:
        """Remove a plug-in that was registered in this process; one of a distribution cannot be removed.

        Raises:
            PeftGraphError: none of that name was registered.
        """
        if self._registered.pop(name, None) is None:
            raise self._error(f"No {self._noun} {name!r} was registered in this process.")

    def get(self, name: str) -> T:
        """Return the plug-in of a name.

        Raises:
            PeftGraphError: there is none; the message names those that are known and says how to register one.
        """
        if name in self._registered:
            return self._registered[name]
        point = self._entry_point(name)
        if point is None:
            raise self._error(self._unknown(name))
        try:
            plugin: object = point.load()
        except (ImportError, AttributeError) as error:
            raise self._error(
                f"The {self._noun} {name!r}, which {point.value} is to be, cannot be loaded: {error}."
            ) from None
        if not self._accepts(plugin) or self._name_of(cast(T, plugin)) != name:
            raise self._error(f"{point.value} is no {self._kind} called {name!r}.")
        return cast(T, plugin)

    def entry_point(self, name: str) -> tuple[str, str] | None:
        """Return the module and the name in it of a plug-in that a distribution brings, without loading it; None for
        one that was registered in this process.

        Raises:
            PeftGraphError: there is none of that name.
        """
        if name in self._registered:
            return None
        point = self._entry_point(name)
        if point is None:
            raise self._error(self._unknown(name))
        return point.module, point.attr

    def where(self, name: str, path: Callable[[T], str]) -> str | None:
        """Return the `module:name` of the plug-in of a name, without loading it; None where there is none."""
        if name in self._registered:
            return path(self._registered[name])
        point = self._entry_point(name)
        return None if point is None else point.value

    def _entry_point(self, name: str) -> EntryPoint | None:
        return next((point for point in entry_points(group=self.group) if point.name == name), None)

    def __iter__(self) -> Iterator[T]:
        return (self.get(name) for name in self.names())

    def known(self) -> str:
        """List the plug-ins and how to register another, for messages."""
        return (
            f"Known: {', '.join(self.names()) or 'none'}. Another is registered as an entry point of the group "
            f"{self.group!r}, or at run time ({self._how_to_add})."
        )

    def _unknown(self, name: str) -> str:
        word = shortened(str(name))
        close = difflib.get_close_matches(word, self.names(), n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        return f"There is no {self._noun} {word!r}.{hint} {self.known()}"
