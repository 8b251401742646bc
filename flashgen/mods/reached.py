"""The tensors that a function reaches and that want gradients."""

from __future__ import annotations

import functools
import types
from collections import deque
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from flashgen.mods.fingerprint import all_names, fixed


def captured_tensors(function: Any) -> tuple[Tensor, ...]:
    """The tensors that a function reads from its closure, globals, partial arguments or object and that want gradients."""
    found: dict[int, Tensor] = {}
    seen: dict[int, Any] = {}  # held, so that no id is given twice
    waiting = [function]
    while waiting:
        value = waiting.pop()
        if id(value) in seen:
            continue
        seen[id(value)] = value
        try:
            if isinstance(value, Tensor):
                if value.requires_grad:
                    found[id(value)] = value
            elif not isinstance(value, (type, types.ModuleType)):
                waiting += reversed(_inside(value))
        except Exception:  # an object that cannot be asked for its attributes
            continue
    return tuple(found.values())


def _inside(value: Any) -> list[Any]:
    """What a function or an object holds or names."""
    inner: list[Any] = []
    if isinstance(value, functools.partial):
        inner = [value.func, *value.args, *value.keywords.values()]
    elif isinstance(value, (list, tuple, set, frozenset, deque)):
        inner = list(value)
    elif isinstance(value, Mapping):
        inner = list(value.values())
    elif isinstance(value, torch.nn.Module):
        inner = list(vars(value).values())  # parameters, buffers and modules are dicts in there
    elif isinstance(value, property):
        inner = [value.fget]
    elif hasattr(value, "__func__"):
        inner = [value.__func__, getattr(value, "__self__", None)]
    elif hasattr(value, "__code__"):
        cells = [cell.cell_contents for cell in value.__closure__ or () if _filled(cell)]
        inner = [*cells, *(value.__defaults__ or ()), *(value.__kwdefaults__ or {}).values()]
        if not fixed(value):
            names = [value.__globals__[name] for name in all_names(value.__code__) if name in value.__globals__]
            inner += [*vars(value).values(), *(x for x in names if not isinstance(x, (types.ModuleType, type)))]
    elif hasattr(value, "__dict__") and not isinstance(value, (type, types.ModuleType)) and not fixed(value):
        of_classes = [one for kind in type(value).__mro__ if not fixed(kind) for one in vars(kind).values()]
        inner = [*vars(value).values(), *(x for x in of_classes if not isinstance(x, type))]
    if not fixed(type(value)):
        slots = [name for kind in type(value).__mro__ for name in vars(kind) if name in vars(kind).get("__slots__", ())]
        inner += [getattr(value, name, None) for name in slots]
    return inner


def _filled(cell: Any) -> bool:
    try:
        _ = cell.cell_contents
    except ValueError:
        return False
    return True
