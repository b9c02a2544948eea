"""Reads a directory of the `adapters` library, and finds the sites that its tensors belong to.

The library names tensors by the module that holds them. Where the model had a head, paths begin with the name of the
base model in it; a path is looked up with and without it.
Source: adapter-hub/adapters 1.3, loading.py (filter_func, _fix_backward_compat), adapter_config.py.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor

from peftgraph.errors import AdapterError
from peftgraph.interop.checked_files import read_json, read_tensors
from peftgraph.sites import Site, Sites

CONFIG = "adapter_config.json"
TENSORS = "adapter.safetensors"
PICKLE = "pytorch_adapter.bin"
KEY = re.compile(
    r"(?:(?P<path>.+)\.)?(?P<kind>adapters|invertible_adapters|loras|refts|prefix_tunings|prefix_gates|prompt_tunings|"
    r"shared_parameters)\.(?P<name>[^.]+)\.(?P<leaf>.+)"
)
RENAMED = {"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "swish": "silu"}
ACTIVATIONS = {**RENAMED, **{word: word for word in ("relu", "gelu", "silu", "tanh", "sigmoid")}}
T = TypeVar("T")
Tensors = Mapping[str, Mapping[str, Tensor]]


@dataclass(frozen=True)
class SavedAdapter:
    """The content of a directory, or one configuration of a union in it.

    Attributes:
        directory: of the adapter, for messages.
        options: of the library's configuration.
        family: the library's word for the model, such as "bert".
        model: the model's class.
        tensors: by kind ("adapters", "loras", ...), path of a module, and the library's name.
    """

    directory: Path
    options: Mapping[str, Any]
    family: str
    model: str
    tensors: Mapping[str, Tensors]

    @classmethod
    def read(cls, directory: Path) -> SavedAdapter:
        """Read a directory.

        Raises:
            AdapterError: a file is missing, damaged or a pickle, or a tensor belongs to no method of the library.
        """
        document = read_json(directory / CONFIG, missing=f"{directory} contains no {CONFIG}.")
        if not (directory / TENSORS).exists() and (directory / PICKLE).exists():
            raise AdapterError(
                f"{directory / PICKLE} is a pickle, which is not read. Load it with the library and save it with "
                "use_safetensors=True; or, since the library cannot write prefixes so, open it with torch.load and "
                'weights_only=True, leave out the keys with ".pool." in them, and write the others with '
                f"safetensors.torch.save_file as {TENSORS}."
            )
        tensors: dict[str, dict[str, dict[str, Tensor]]] = {}
        for key, value in sorted(read_tensors(directory / TENSORS).items()):
            found = KEY.fullmatch(key)
            if found is None:
                raise AdapterError(f"{directory / TENSORS} holds {key}, which belongs to no method that is read.")
            if ".pool." not in key:  # every attention holds all prefixes once more
                kind = tensors.setdefault(found["kind"], {})
                kind.setdefault(found["path"] or "", {})[found["leaf"]] = value
        if not tensors:
            raise AdapterError(f"{directory / TENSORS} contains no tensors.")
        options = _as_the_library_reads(document)
        return cls(directory, options, str(document.get("model_type")), str(document.get("model_class")), tensors)

    def members(self) -> list[SavedAdapter]:
        """Return one adapter for each configuration of a union, or this one where it is no union.

        Raises:
            AdapterError: a configuration is none.
        """
        if self.options.get("architecture") != "union":
            return [self]
        configs = self.option("configs", list)
        if not all(isinstance(one, dict) for one in configs):
            raise AdapterError(f"{self.directory / CONFIG} is damaged: configs cannot be {configs!r}.")
        kinds = [one.get("architecture") or "bottleneck" for one in configs]
        if len(set(kinds)) != len(kinds):
            raise self.refuse(f"a union of {', '.join(map(str, kinds))}, two of them of one kind")
        return [replace(self, options=one) for one in configs]

    def at(self, kind: str) -> Tensors:
        """Return the tensors of one kind, by path.

        Raises:
            AdapterError: there are none.
        """
        if kind not in self.tensors:
            raise AdapterError(f"{self.directory / TENSORS} contains no {kind}, which {CONFIG} speaks of.")
        return self.tensors[kind]

    def refuse(self, what: str) -> AdapterError:
        """Return the error for an option that no pass implements."""
        return AdapterError(f"{self.directory / CONFIG} has {what}, which is not read.")

    def option(self, key: str, *kinds: type[T]) -> T:
        """Return an option of one of the kinds.

        Raises:
            AdapterError: it is missing, or of another kind.
        """
        value = self.options.get(key)
        if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
            raise AdapterError(f"{self.directory / CONFIG} is damaged: {key} cannot be {value!r}.")
        return value

    def check(self, needed: Mapping[str, object]) -> None:
        """Check that no option turns the adapter into another method.

        Raises:
            AdapterError: one has another value than the needed one.
        """
        for key, value in needed.items():
            if self.options.get(key, value) != value:
                raise self.refuse(f"{key}={self.options[key]!r}")

    def activation(self) -> str:
        """Return this library's name of its nonlinearity.

        Raises:
            AdapterError: there is none.
        """
        word = self.option("non_linearity", str)
        if word not in ACTIVATIONS:
            raise self.refuse(f"non_linearity={word!r}")
        return ACTIVATIONS[word]

    def named(self, path: str, tensors: Mapping[str, Tensor], names: Mapping[str, str]) -> dict[str, Tensor]:
        """Return the tensors of one module by our names.

        Raises:
            AdapterError: one has no counterpart here.
        """
        unknown = next((leaf for leaf in tensors if leaf not in names), None)
        if unknown is not None:
            raise AdapterError(f"{self.directory / TENSORS}: {path} holds {unknown}, which no method that is read has.")
        return {names[leaf]: value for leaf, value in tensors.items()}

    def site(self, sites: Sites, path: str, *roles: str) -> Site:
        """Return the site of a module of the library: the one inside it, else the one that the words of its path name.

        Raises:
            AdapterError: there is none, or more than one.
        """
        found = self._inside(sites, path, roles) or self._by_words(sites, path, roles)
        same = [site.id for site in sites.select(found.role) if (site.path, site.kind) == (found.path, found.kind)]
        if len(same) > 1:
            raise AdapterError(
                f"{self.directory} has an adapter at {path}, which this model runs at {', '.join(same)}: one adapter "
                "in several layers is no pass."
            )
        return found

    def _inside(self, sites: Sites, path: str, roles: tuple[str, ...]) -> Site | None:
        for inner in (path, path.partition(".")[2]):
            found = [site for site in sites if site.role in roles and inner and f".{inner}." in f".{site.path}."]
            if len(found) == 1:
                return found[0]
        return None

    def _by_words(self, sites: Sites, path: str, roles: tuple[str, ...]) -> Site:
        number = re.search(r"(?<![^.])\d+(?![^.])", path)
        layer = None if number is None else int(number[0])
        role = roles[0] if len(roles) == 1 else "attention" if "attention" in path else "ffn"
        stack = "decoder" if "decoder" in path.split(".") else "encoder"
        kind = None if role != "attention" else "cross" if "cross" in path else "self"
        found = [
            site
            for site in sites.select(role)
            if site.layer == layer and site.stack in (None, stack) and kind in (None, site.kind)
        ]
        if len(found) != 1:
            raise AdapterError(
                f"{self.directory} has an adapter at {path}: this model has {len(found)} sites {role} in layer {layer}."
            )
        return found[0]


def _as_the_library_reads(document: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the options; before release 1.1 the library did not apply alpha / r."""
    options = document["config"]
    release = re.match(r"adapters\.(\d+)\.(\d+)", str(document.get("version", "")))
    early = release is not None and (int(release[1]), int(release[2])) < (1, 1)
    if early and options.get("architecture") == "lora":
        return {**options, "alpha": options.get("r")}
    return options
