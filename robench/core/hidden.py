"""What a model keeps where torch does not look."""

from __future__ import annotations

import functools
import types
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

#: Attributes that every module has; hooks among them belong to whoever registered them.
_TORCH = frozenset(vars(nn.Module()))
#: How far into lists, dicts, objects and closures of an attribute is looked.
DEPTH = 4


def unregistered(model: nn.Module) -> list[str]:
    """Where ``model`` keeps modules with weights, or tensors that are trained, as plain attributes: in lists, dicts,
    objects and closures. ``eval()``, ``to()``, ``state_dict()`` and so kinship, identity and gradients miss them.

    Returns:
        Dotted names, such as ``members[0]``; empty where all is registered. Constants are nobody's members.
    """
    owned = {id(each) for each in (*model.modules(), *model.parameters(), *model.buffers())}
    seen: set[int] = set()
    found = []
    for name, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            continue  # what TorchScript keeps, it registers
        for attribute, value in vars(module).items():
            if attribute not in _TORCH:
                path = f"{name}.{attribute}" if name else attribute
                found += list(_hidden(value, path, owned, seen, DEPTH))
    return found


def _hidden(value: Any, path: str, owned: set[int], seen: set[int], depth: int) -> Iterator[str]:
    if id(value) in owned or depth == 0 or isinstance(value, (str, bytes, int, float, type, types.ModuleType)):
        return
    if id(value) in seen:
        return
    seen.add(id(value))
    if isinstance(value, nn.Module):
        if any(True for _ in value.parameters()) or any(True for _ in value.buffers()):
            yield path
    elif isinstance(value, Tensor):
        if value.requires_grad:
            yield path
    else:
        for part, inner in _parts(value):
            yield from _hidden(inner, f"{path}{part}", owned, seen, depth - 1)


def _parts(value: Any) -> Iterator[tuple[str, Any]]:
    """What a plain value refers to, by how one gets there."""
    if isinstance(value, Mapping):
        yield from ((f"[{name!r}]", each) for name, each in list(value.items()))
    elif isinstance(value, (list, tuple, set, frozenset)):
        yield from ((f"[{number}]", each) for number, each in enumerate(value))
    elif isinstance(value, functools.partial):
        yield from (("()", each) for each in (value.func, *value.args, *value.keywords.values()))
    elif isinstance(value, types.MethodType):
        yield "()", value.__self__
    elif isinstance(value, types.FunctionType):
        for cell in value.__closure__ or ():
            try:
                yield "()", cell.cell_contents
            except ValueError:  # not filled yet
                continue
    elif not isinstance(value, torch.Generator) and not type(value).__module__.startswith(
        ("torch", "numpy", "builtins")
    ):
        yield from ((f".{name}", each) for name, each in list(getattr(value, "__dict__", {}).items()))
