"""Binds arguments of a call to a signature by name, and flattens nested ones into leaves with readable keys."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from torch.utils import _pytree as pytree


def bind_arguments(forward: inspect.Signature, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of a call by parameter name; those collected by `**kwargs` appear under their own names.

    Raises:
        TypeError: the call does not fit the signature.
    """
    bound = forward.bind(*args, **kwargs)
    arguments: dict[str, Any] = {}
    for name, value in bound.arguments.items():
        if forward.parameters[name].kind is inspect.Parameter.VAR_KEYWORD:
            arguments.update(value)
        else:
            arguments[name] = value
    return arguments


def leaves_with_keys(name: str, value: Any) -> list[tuple[str, Any]]:
    """Return the leaves of a nested value with readable keys, in pytree's order: `past[0]`, `out.sample`, `batch['x']`.

    Classes are registered with pytree with or without keys of their children. Without keys, the context that the
    class stores is used where it is one string for each child, as for a dict; otherwise the children are numbered.
    """
    if pytree.tree_is_leaf(value):
        return [(name, value)]
    node = pytree.SUPPORTED_NODES[pytree._get_node_type(value)]
    if node.flatten_with_keys_fn is not None:
        children = [(name + str(key), child) for key, child in node.flatten_with_keys_fn(value)[0]]
    else:
        plain, context = node.flatten_fn(value)
        named = isinstance(context, list | tuple) and len(context) == len(plain)
        keys = [f"[{key!r}]" for key in context] if named else [f"[{i}]" for i in range(len(plain))]
        children = [(name + key, child) for key, child in zip(keys, plain, strict=True)]
    return [leaf for key, child in children for leaf in leaves_with_keys(key, child)]
