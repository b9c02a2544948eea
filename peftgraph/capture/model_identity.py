"""A digest of everything that a trace depends on: code, configuration, shapes, the example, options and versions.

Equal digests mean equal programs, so what cannot be described exactly gives none, and the model is traced.
"""

from __future__ import annotations

import enum
import hashlib
import platform
import sys
import sysconfig
from collections.abc import Iterator, Mapping
from functools import cache
from importlib.metadata import packages_distributions, version
from pathlib import Path
from types import BuiltinFunctionType, CodeType, FunctionType, MethodDescriptorType, MethodType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from peftgraph.capture.example_inputs import Example

OWN = Path(__file__).parents[1]  # this package, whose rooms below decide what a program is
ROOMS = ("capture", "ir", "utils")
CONSTANTS = (
    bool,
    int,
    float,
    complex,
    str,
    bytes,
    type(None),
    torch.dtype,
    torch.device,
    torch.layout,
    torch.memory_format,
)
DEPTH = 40  # objects within objects
HOOKS = (
    "_backward_hooks",
    "_backward_pre_hooks",
    "_forward_hooks",
    "_forward_pre_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks_with_kwargs",
    "_state_dict_hooks",
    "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)
OF_THIS_PROCESS = ("_original_object_hash",)  # of transformers: what hash() gave, which every process salts
TENSORS = ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set")
STANDARD_LIBRARY = Path(sysconfig.get_path("stdlib")).resolve()


class NotIdentifiable(Exception):
    """Something cannot be described exactly; the message says what."""


def identity(model: nn.Module, example: Example, options: Mapping[str, Any]) -> str:
    """Return the digest of a trace.

    Args:
        model: what is traced.
        example: the call.
        options: that the result depends on.

    Raises:
        NotIdentifiable: a part of the model cannot be described exactly.
    """
    found = _Digest()
    found.add("versions", [platform.python_version(), torch.__version__, sys.platform, own_source()])
    found.add("settings", [torch.get_default_dtype(), torch.are_deterministic_algorithms_enabled()])
    found.add("files", loaded_sources())
    found.add("options", dict(options))
    found.model(model)
    found.add("example", [[leaf.key, leaf.argument, leaf.value] for leaf in example.leaves])
    found.add("call", [sorted(example.assumed), dict(example.defaults), str(example.forward)])
    found.add("fixed", {key: sorted(axes) for key, axes in example.fixed.items()})
    return found.hexdigest()


def loaded_sources() -> dict[str, str]:
    """Return the digest of every loaded source file that belongs neither to an installed distribution nor to this
    library, by its path."""
    files: set[str] = set()
    for name, module in list(sys.modules.items()):
        file = getattr(module, "__file__", None)
        if isinstance(file, str) and name.partition(".")[0] != "peftgraph" and not _is_installed(file):
            files.add(file)
    return {file: content for file in sorted(files) if (content := file_digest(file)) is not None}


@cache
def _is_installed(file: str) -> bool:
    path = Path(file).resolve()
    return not {"site-packages", "dist-packages"}.isdisjoint(path.parts) or path.is_relative_to(STANDARD_LIBRARY)


def file_digest(file: str) -> str | None:
    """Return the digest of a file's content; None where there is none."""
    try:
        return hashlib.sha256(Path(file).read_bytes()).hexdigest()
    except OSError:
        return None


@cache
def own_source() -> str:
    digest = hashlib.sha256()
    for file in sorted(file for room in ROOMS for file in (OWN / room).rglob("*.py")):
        digest.update(str(file.relative_to(OWN)).encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()


class _Digest:
    """Adds up values, each with its kind, so that different values give different sums."""

    def __init__(self) -> None:
        self._sum = hashlib.sha256()
        self._seen: dict[int, int] = {}  # objects by identity: cycles, and which of them are one
        self._alive: list[object] = []
        self._modules: dict[int, str] = {}
        self._followed: set[str] = set()  # the modules of Python whose functions' global names are added

    def hexdigest(self) -> str:
        return self._sum.hexdigest()

    def add(self, name: str, value: object) -> None:
        self._write("part", name)
        self._value(value, 0)

    def model(self, model: nn.Module) -> None:
        """Add the modules of a model: classes with their code, attributes, tensors and which of these are tied."""
        self._modules = {id(module): path for path, module in model.named_modules()}
        self._followed = {type(module).__module__ for module in model.modules()}
        for path, module in model.named_modules(remove_duplicate=False):
            self._write("module", path, self._modules[id(module)])
            if self._modules[id(module)] == path:
                self._module(module)
        _require_no_hooks(model)

    def _module(self, module: nn.Module) -> None:
        self._class(type(module))
        self._write("children", *module._modules)
        for name, tensor in module._parameters.items():
            self._write("parameter", name)
            self._tensor(tensor, with_values=False)
        for name, buffer in module._buffers.items():
            self._write("buffer", name, str(name in module._non_persistent_buffers_set))
            self._tensor(buffer, with_values=True)
        for name, value in vars(module).items():
            if name not in HOOKS and name not in TENSORS:
                self._write("attribute", name)
                self._value(value, 0)

    def _write(self, kind: str, *texts: str) -> None:
        for text in (kind, *texts):
            raw = text.encode(errors="surrogatepass")
            self._sum.update(len(raw).to_bytes(8, "little") + raw)

    def _tensor(self, tensor: Tensor | None, with_values: bool) -> None:
        if tensor is None or self._is_known(tensor):
            self._write("no tensor" if tensor is None else "tied")
            return
        if type(tensor) not in (Tensor, nn.Parameter) or tensor.layout is not torch.strided:
            raise NotIdentifiable(f"a tensor of the class {type(tensor).__name__}")
        facts = (tensor.shape, tensor.stride(), tensor.dtype, tensor.device, tensor.requires_grad)
        self._write("tensor", type(tensor).__name__, *map(str, facts))
        if with_values and not tensor.is_meta:
            flat = tensor.detach().contiguous().reshape(-1).cpu()
            self._sum.update(flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b"")

    def _is_known(self, value: object) -> bool:
        """Tell whether an object was added before, and say which; add it to those that were."""
        number = self._seen.get(id(value))
        if number is not None:
            self._write("again", str(number))
            return True
        self._seen[id(value)] = len(self._seen)
        self._alive.append(value)
        return False

    def _value(self, value: Any, depth: int) -> None:
        if depth > DEPTH:
            raise NotIdentifiable("objects within objects, too deep")
        if isinstance(value, CONSTANTS):
            self._write(type(value).__name__, repr(value))
        elif isinstance(value, Tensor):
            self._tensor(value, with_values=True)
        elif isinstance(value, nn.Module):
            if id(value) not in self._modules:
                raise NotIdentifiable(f"a module {type(value).__name__} that is no submodule")
            self._write("submodule", self._modules[id(value)])
        elif isinstance(value, enum.Enum):
            self._write("enum", _name(type(value)), value.name)
        elif isinstance(value, type):
            self._class(value)
        elif isinstance(value, FunctionType | MethodType):
            self._function(value, depth)
        elif isinstance(value, ModuleType):
            self._write("python module", value.__name__)
        elif not self._is_known(value):
            self._object(value, depth)

    def _object(self, value: Any, depth: int) -> None:
        """Add a container, or an object whose whole state is its attributes.

        Raises:
            NotIdentifiable: it is another one.
        """
        kind = type(value)
        self._write("object", _name(kind))
        if isinstance(value, dict):
            value_items: list[Any] = [part for item in value.items() for part in item]
        elif isinstance(value, list | tuple):
            value_items = list(value)
        elif kind in (set, frozenset):
            value_items = sorted(map(_plain_text, value))
        elif kind in (BuiltinFunctionType, MethodDescriptorType) and _belongs_to_module(value):
            value_items = [str(getattr(value, "__module__", "")), value.__qualname__]
        elif kind.__basicsize__ <= _Plain.__basicsize__ and hasattr(value, "__dict__"):
            value_items = []
        else:
            raise NotIdentifiable(f"an object of the class {_name(kind)}")
        self._write("items", str(len(value_items)))
        for one in value_items:
            self._value(one, depth + 1)
        if hasattr(value, "__dict__"):
            self._class(kind)
            for name, one in vars(value).items():
                if name not in OF_THIS_PROCESS:
                    self._write("attribute", name)
                    self._value(one, depth + 1)

    def _class(self, cls: type) -> None:
        """Add a class: its name, the version of its distribution, and its own functions, which may have been
        replaced."""
        self._write("class", _name(cls))
        if self._is_known(cls) or cls in (object, nn.Module):
            return
        if cls.__module__ == "__main__" and not hasattr(sys.modules["__main__"], "__file__"):
            raise NotIdentifiable(f"the class {cls.__name__}, which no file holds")
        self._write("version", _version(cls.__module__.partition(".")[0]))
        for name, value in vars(cls).items():
            value = getattr(value, "__func__", getattr(value, "fget", value))
            if isinstance(value, FunctionType):
                self._write("method", name)
                self._function(value, 0)
            elif isinstance(value, CONSTANTS) and not name.startswith("__"):
                self._write("constant", name, repr(value))
        for base in cls.__bases__:
            self._class(base)

    def _function(self, function: FunctionType | MethodType, depth: int) -> None:
        """Add the code of a function and what it closes over; also the functions and constants that it names, if it is
        of a file that defines modules of the model, or of one that no distribution installed."""
        if isinstance(function, MethodType):
            self._value(function.__self__, depth + 1)
            function = function.__func__
            assert isinstance(function, FunctionType)
        self._write("function", function.__module__ or "", function.__qualname__)
        if self._is_known(function) or (function.__module__ or "").partition(".")[0] in sys.stdlib_module_names:
            return
        self._code(function.__code__)
        for value in (*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()):
            self._lenient(value, depth)
        for cell in function.__closure__ or ():
            self._lenient(_content(cell), depth)
        if function.__module__ in self._followed or not _is_installed(function.__code__.co_filename):
            for name in _names(function.__code__):
                self._write("name", name)
                self._lenient(function.__globals__.get(name), depth)

    def _lenient(self, value: Any, depth: int) -> None:
        """Add functions and constants; of other objects, which code alone can reach, the class's name."""
        if isinstance(value, FunctionType) and depth < DEPTH:
            self._function(value, depth + 1)
        elif isinstance(value, CONSTANTS):
            self._write("constant", repr(value))
        else:
            self._write("other", _name(type(value)))

    def _code(self, code: CodeType) -> None:
        self._write("code", code.co_name, *code.co_names, *code.co_varnames, *code.co_freevars)
        self._sum.update(code.co_code)
        for constant in code.co_consts:
            if isinstance(constant, CodeType):
                self._code(constant)
            else:
                self._write("constant", _plain_text(constant))


class _Plain:
    """Has the layout in memory of objects whose state is their attributes alone."""


def _belongs_to_module(function: Any) -> bool:
    owner = getattr(function, "__self__", None)
    return owner is None or isinstance(owner, ModuleType | type)


def _require_no_hooks(model: nn.Module) -> None:
    """Refuse a model whose calls run more than its modules' code.

    Raises:
        NotIdentifiable: it has hooks, or a method of its own was put on a module.
    """
    for path, module in model.named_modules():
        if any(vars(module).get(name) for name in HOOKS):
            raise NotIdentifiable(f"hooks of {path or 'the model'}")
        if "forward" in vars(module):
            raise NotIdentifiable(f"{path or 'the model'}, whose forward was replaced")
    shared = torch.nn.modules.module
    if any(getattr(shared, name, None) for name in ("_global_forward_hooks", "_global_forward_pre_hooks")):
        raise NotIdentifiable("hooks of all modules")


def _name(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def _plain_text(value: object) -> str:
    """Return a text of a constant that is the same in every process; sets are sorted."""
    if isinstance(value, frozenset | set):
        return f"{{{', '.join(sorted(map(_plain_text, value)))}}}"
    if isinstance(value, tuple):
        return f"({', '.join(map(_plain_text, value))})"
    if value is None or value is Ellipsis or isinstance(value, bool | int | float | complex | str | bytes):
        return f"{type(value).__name__} {value!r}"
    raise NotIdentifiable(f"a constant of the class {_name(type(value))}")


def _names(code: CodeType) -> Iterator[str]:
    """Yield the global names that a code and those within it may read."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names(constant)


def _content(cell: Any) -> object:
    try:
        return cell.cell_contents
    except ValueError:  # empty as yet
        return None


@cache
def _version(package: str) -> str:
    """Return the versions of the distributions that a package is part of."""
    names = packages_distributions().get(package, [])
    return ", ".join(f"{name} {version(name)}" for name in sorted(set(names)))
