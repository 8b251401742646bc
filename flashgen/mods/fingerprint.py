"""What a function is: a key that two functions share when they compute the same from their arguments and captured tensors.

Code (bytes, constants, names), closures, defaults, bound objects and the globals that it names are walked; numbers enter by value,
tensors by type and shape alone, since a trace never reads them. What cannot be told apart by value makes the function unknown:
it is then traced at each call, and nothing is ever stale.
"""

from __future__ import annotations

import dis
import enum
import functools
import hashlib
import sys
import types
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

_MOST_OBJECTS = 10_000
_PRIMITIVE = (
    int,
    float,
    complex,
    bool,
    str,
    bytes,
    type(None),
    type(Ellipsis),
    torch.dtype,
    torch.device,
    range,
    slice,
)
# Looked up by a name that no one sees before it runs.
_DYNAMIC = frozenset({"globals", "locals", "vars", "eval", "exec", "__import__", "open", "input"})
_PRIVATE = frozenset(vars(torch.nn.Module())) - {"training", "_parameters", "_buffers", "_modules"}  # hooks and flags
# Their functions do what their version says.
_FIXED = {"torch", "math", "numpy", "operator", "functools", "itertools", "builtins", "typing", "types", "collections"}


@dataclass(slots=True)
class Fingerprint:
    """A function, taken apart.

    Attributes:
        key: digest; None where something has no value to compare by.
        tensors: what it captures, in the order of the walk, each once.
        names: what the user calls them.
    """

    key: str | None
    tensors: list[Tensor] = field(default_factory=list)
    names: list[str] = field(default_factory=list)


def fingerprint(functions: Iterable[Callable[..., Any] | None], *context: Any) -> Fingerprint:
    """Take functions apart, together: they share captured tensors.

    Args:
        functions: mods, or None.
        context: values that enter the key.
    """
    walk = _Walk()
    try:
        for function in (*functions, *context):
            walk.visit(function, "captured")
    except Exception:  # an object that cannot be asked for its attributes, or chains too long to follow
        walk.unknown = True
    key = None if walk.unknown else hashlib.sha256("\x1f".join(walk.parts).encode()).hexdigest()
    return Fingerprint(key, walk.tensors, walk.names)


class _Walk:
    def __init__(self) -> None:
        self.parts: list[str] = []
        self.tensors: list[Tensor] = []
        self.names: list[str] = []
        self.unknown = False
        self._numbers: dict[int, int] = {}  # id of what was seen -> its number: cycles and shared objects
        self._held: list[Any] = []  # so that no id is given twice

    def visit(self, value: Any, name: str) -> None:
        if isinstance(value, _PRIMITIVE):
            self.parts.append(f"{type(value).__name__}:{value!r}")
            if getattr(value, "__dict__", None):  # of a class of the user's
                self._mapping(value.__dict__)
            return
        known = self._numbers.get(id(value))
        if known is not None:
            self.parts.append(f"seen:{known}")
            return
        if len(self._held) >= _MOST_OBJECTS:  # a function that names half a program is traced at each call
            self.unknown = True
            return
        self._numbers[id(value)] = len(self._numbers)
        self._held.append(value)
        self._composed(value, name)

    def _composed(self, value: Any, name: str) -> None:
        if isinstance(value, Tensor):
            self._tensor(value, name)
        elif isinstance(value, types.BuiltinMethodType) and not isinstance(value.__self__, type | types.NoneType):
            self._builtin(value)
        elif isinstance(value, types.CodeType):
            self._code(value)
        elif isinstance(value, types.FunctionType):
            self._function(value)
        elif isinstance(value, types.MethodType):
            self.parts.append("method")
            self.visit(value.__func__, name)
            self.visit(value.__self__, name)
        elif isinstance(value, functools.partial):
            self.parts.append("partial")
            for part in (value.func, *value.args):
                self.visit(part, name)
            self._mapping(value.keywords)
        elif isinstance(value, (tuple, list)):
            self.parts.append(f"{type(value).__name__}{len(value)}")
            for place, part in enumerate(value):
                self.visit(part, f"{name}_{place}")
            self._beside(value)
        elif isinstance(value, (set, frozenset)):
            self.parts.append(f"set{len(value)}")
            self._all_primitive(value)
            self._beside(value)
        elif isinstance(value, dict):
            self._mapping(value)
            self._beside(value)
        elif isinstance(value, enum.Enum):
            self.parts.append(f"{type(value).__qualname__}.{value.name}")
            self.visit(value.value, name)
        elif isinstance(value, torch.nn.Module):
            self._object(value)  # torch's own ones, too, may carry attributes of the user's
        elif isinstance(value, type) or fixed(value):
            if not isinstance(value, (type, types.ModuleType)) and getattr(value, "__dict__", None):
                self.unknown = True  # an instance of a library's class is what the user made of it
            self.parts.append(f"{getattr(value, '__module__', '')}.{getattr(value, '__qualname__', value)}")
            # A class of the user's may hold anything: its name alone does not say what it is.
            self.unknown |= not fixed(value) and value not in (int, float, bool)
        elif isinstance(value, types.ModuleType):
            self.parts.append(f"module:{value.__name__}")
            self.unknown = True  # what is read through it is not known here (`_globals` knows its names)
        else:
            self._object(value)

    def _tensor(self, value: Tensor, name: str) -> None:
        self.tensors.append(value)
        self.names.append(name)
        place = value.device if value.dim() else "scalar"
        # Strides too: a function may ask for them, and a trace of other strides costs less than an error.
        steps = value.stride() if value.layout == torch.strided else value.layout
        self.parts.append(f"tensor:{value.dtype}:{tuple(value.shape)}:{steps}:{place}:{value.requires_grad}")
        for attribute, one in value.__dict__.items():
            if not isinstance(one, Tensor):  # one that is read makes a trace that is not kept
                self.parts.append(attribute)
                self.visit(one, attribute)

    def _builtin(self, value: Any) -> None:
        """A function in C: of a module, or bound to something whose content it reads when it is called, as `mapping.get` does."""
        self.parts.append(f"builtin:{value.__name__}")
        owner = value.__self__
        if isinstance(owner, types.ModuleType):
            self.parts.append(owner.__name__)
            steady = ("thread", "abc", "bisect", "heapq", "struct")  # what dataclasses and pure helpers call
            self.unknown |= owner.__name__.lstrip("_").partition(".")[0] not in (*_FIXED, *steady)
        else:
            self.unknown |= not isinstance(owner, (*_PRIMITIVE, Tensor, tuple, list, set, frozenset, dict))
            self.visit(owner, value.__name__)

    def _beside(self, value: Any) -> None:
        """What an instance of a container's subclass holds beside its elements."""
        kind = type(value)
        if not (kind.__module__ == "builtins" or fixed(kind)):
            self._class(value)
        if getattr(value, "__dict__", None) and value.__dict__ is not value:
            self._mapping(value.__dict__)

    def _all_primitive(self, values: Iterable[Any]) -> None:
        self.unknown |= not all(isinstance(one, _PRIMITIVE) for one in values)
        self.parts.extend(sorted(map(repr, values)))

    def _mapping(self, value: dict[Any, Any]) -> None:
        self.parts.append(f"dict{len(value)}")
        for key, one in value.items():
            self.visit(key, "key")
            self.visit(one, str(key))

    def _object(self, value: Any) -> None:
        """An instance: its class's code and its attributes."""
        kind = type(value)
        attributes = getattr(value, "__dict__", None)
        if attributes is None or kind.__module__.partition(".")[0] in ("numpy", "builtins"):
            self.unknown = True
            return
        self.parts.append(f"object:{kind.__module__}.{kind.__qualname__}")
        self._class(value)
        module = isinstance(value, torch.nn.Module)
        for attribute, one in attributes.items():
            if module and attribute in _PRIVATE and not one:
                continue
            self.parts.append(attribute)
            self.visit(one, attribute)

    def _class(self, value: Any) -> None:
        """The code and the attributes of an instance's classes, and its slots."""
        for base in type(value).__mro__:
            if base.__module__.partition(".")[0] in _FIXED:
                continue
            # A class in C may hold what has no name here, as a random generator does.
            self.unknown |= isinstance(vars(base).get("__new__"), types.BuiltinFunctionType)
            for attribute, one in vars(base).items():
                if isinstance(one, types.FunctionType):
                    self.visit(one, attribute)
                elif isinstance(one, (property, staticmethod, classmethod)):
                    inner = one.fget if isinstance(one, property) else one.__func__
                    self.visit(inner, attribute)
                elif isinstance(one, types.MemberDescriptorType):  # a slot
                    self.visit(getattr(value, attribute, None), attribute)
                elif not attribute.startswith(("__", "_abc_")):
                    self.visit(one, attribute)

    def _function(self, value: types.FunctionType) -> None:
        library = (value.__module__ or "").partition(".")[0] in _FIXED
        self.parts.append(f"{value.__module__}.{value.__qualname__}" if library else "function")
        if not library:
            self.visit(value.__code__, "code")
            self._mapping(value.__dict__)
        for name, cell in zip(value.__code__.co_freevars, value.__closure__ or (), strict=True):
            try:
                contents = cell.cell_contents
            except ValueError:  # not filled yet
                self.parts.append("empty")
                continue
            self.visit(contents, name)
        for default in value.__defaults__ or ():
            self.visit(default, "default")
        self._mapping(value.__kwdefaults__ or {})
        if not library:
            self._globals(value.__code__, value.__globals__)

    def _globals(self, code: types.CodeType, space: dict[str, Any]) -> None:
        """What the code and the functions inside it may look up, by the names they use."""
        names = all_names(code)
        for name in names:
            if name not in space:
                self.unknown |= name in _DYNAMIC
                continue
            found = space[name]
            self.parts.append(name)
            if isinstance(found, types.ModuleType) and not fixed(found):
                # Its attributes are as changeable as globals: those of a name that the code uses.
                self.parts.append(found.__name__)
                self.unknown |= "getattr" in names
                for attribute in names:
                    if hasattr(found, attribute):
                        self.parts.append(attribute)
                        self.visit(getattr(found, attribute), attribute)
            else:
                self.visit(found, name)

    def _code(self, value: types.CodeType) -> None:
        text, unknown = _code_text(value)
        self.parts.append(text)
        self.unknown |= unknown


_MOST_CODES = 4096
_codes: dict[int, tuple[types.CodeType, str, bool]] = {}  # by id, with the code itself, so that no id is given twice
_names: dict[int, tuple[types.CodeType, tuple[str, ...]]] = {}


def _code_text(code: types.CodeType) -> tuple[str, bool]:
    """What code computes, as text, and whether that is not all; code never changes, so each is read once."""
    known = _codes.get(id(code))
    if known is None:
        walk = _Walk()
        walk.parts.append(
            f"code:{code.co_code.hex()}:{code.co_names}:{code.co_varnames[: code.co_argcount]}:{code.co_flags}"
            f":{code.co_freevars}:{code.co_exceptiontable.hex() if sys.version_info >= (3, 11) else ''}"
        )
        # What is imported inside is no global, and so is not seen.
        imported = (step.argval for step in dis.get_instructions(code) if step.opname == "IMPORT_NAME")
        walk.unknown |= any(str(name).partition(".")[0] not in _FIXED for name in imported)
        for constant in code.co_consts:
            if isinstance(constant, frozenset):
                walk._all_primitive(constant)
            else:
                walk.visit(constant, "constant")
        if len(_codes) >= _MOST_CODES:
            _codes.clear()
        known = _codes[id(code)] = (code, hashlib.sha256("\x1f".join(walk.parts).encode()).hexdigest(), walk.unknown)
    return known[1], known[2]


def all_names(code: types.CodeType) -> tuple[str, ...]:
    """The names that code and the functions inside it look up."""
    known = _names.get(id(code))
    if known is None:
        inner = [name for one in code.co_consts if isinstance(one, types.CodeType) for name in all_names(one)]
        if len(_names) >= _MOST_CODES:
            _names.clear()
        known = _names[id(code)] = (code, tuple(dict.fromkeys((*code.co_names, *inner))))
    return known[1]


def fixed(value: Any) -> bool:
    """Whether something belongs to a library that does what its version says."""
    name = value.__name__ if isinstance(value, types.ModuleType) else getattr(value, "__module__", None)
    builtin = isinstance(value, (types.BuiltinFunctionType, types.MethodDescriptorType, types.WrapperDescriptorType))
    return builtin or (isinstance(name, str) and name.partition(".")[0] in _FIXED)
