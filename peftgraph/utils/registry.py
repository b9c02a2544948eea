"""Finds plug-ins by name: those of installed distributions (entry points) and those registered at run time."""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from importlib.metadata import entry_points
from typing import Any, Generic, Protocol, TypeVar, cast

from peftgraph.errors import PeftGraphError, shortened


class Named(Protocol):
    """A plug-in: anything with a name."""

    @property
    def name(self) -> str:
        """The word that users choose it by."""
        ...


T = TypeVar("T", bound=Named)


class Registry(Generic[T]):
    """The plug-ins of one kind, by name.

    A plug-in is an entry point of a group, whose name is the plug-in's own, or it is registered at run time. It is
    loaded on first use: listing the names imports nothing.

    Args:
        group: of the entry points, such as "peftgraph.exporters".
        kind: what an entry point must be an instance of.
        noun: what messages call one, such as "exporter".
        error: what is raised.
    """

    def __init__(self, group: str, kind: type[T], noun: str, error: type[PeftGraphError]) -> None:
        self.group = group
        self._kind, self._noun, self._error = kind, noun, error
        self._registered: dict[str, T] = {}

    def names(self) -> list[str]:
        """Returns the names of all plug-ins, sorted."""
        return sorted({*self._registered, *(point.name for point in entry_points(group=self.group))})

    def register(self, plugin: T) -> T:
        """Adds a plug-in for this process and returns it.

        Raises:
            PeftGraphError: it is of another kind, or its name is taken.
        """
        if not isinstance(plugin, self._kind):
            raise self._error(
                f"The {self._noun} must be of the class {self._kind.__name__}, got {type(plugin).__name__}."
            )
        if plugin.name in self.names():
            raise self._error(f"There is an {self._noun} {plugin.name!r} already; choose another name.")
        self._registered[plugin.name] = plugin
        return plugin

    def unregister(self, name: str) -> None:
        """Removes a plug-in that was registered in this process; one of a distribution cannot be removed.

        Raises:
            PeftGraphError: none of that name was registered.
        """
        if self._registered.pop(name, None) is None:
            raise self._error(f"No {self._noun} {name!r} was registered in this process.")

    def get(self, name: str) -> T:
        """Returns the plug-in of a name.

        Raises:
            PeftGraphError: there is none; the message names those that are known and says how to register one.
        """
        if name in self._registered:
            return self._registered[name]
        points = {point.name: point for point in entry_points(group=self.group)}
        if name not in points:
            raise self._error(self._unknown(name))
        try:
            plugin: Any = points[name].load()
        except (ImportError, AttributeError) as error:
            raise self._error(
                f"The {self._noun} {name!r}, which {points[name].value} is to be, cannot be loaded: {error}."
            ) from None
        if not isinstance(plugin, self._kind) or plugin.name != name:
            raise self._error(f"{points[name].value} is no {self._kind.__name__} called {name!r}.")
        return cast(T, plugin)

    def __iter__(self) -> Iterator[T]:
        return (self.get(name) for name in self.names())

    def known(self) -> str:
        """Names the plug-ins and says how to register another, for messages."""
        return (
            f"Known: {', '.join(self.names()) or 'none'}. Another is registered as an entry point of the group "
            f"{self.group!r}, or at run time (peftgraph.plugins)."
        )

    def _unknown(self, name: str) -> str:
        word = shortened(str(name))
        close = difflib.get_close_matches(word, self.names(), n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        return f"There is no {self._noun} {word!r}.{hint} {self.known()}"
