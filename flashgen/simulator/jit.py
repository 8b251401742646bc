"""`@gluon.jit`, simulated: functions are plain Python, and `kernel[grid](...)` runs a launch."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from flashgen.simulator import context
from flashgen.simulator.dtypes import int32, int64
from flashgen.simulator.errors import SimulationError, UnsupportedOperationError
from flashgen.simulator.global_memory import Buffer, Pointer
from flashgen.simulator.machine import Launch, Settings
from flashgen.simulator.scalars import scalar
from flashgen.simulator.tma import TensorDescriptor


class constexpr:
    """A compile-time value: simply the value."""

    def __new__(cls, value: Any) -> Any:
        return value


@dataclass(slots=True)
class Run:
    """What a simulation collects: its settings and its launches."""

    settings: Settings
    launches: list[Launch] = field(default_factory=list)


RUN: ContextVar[Run | None] = ContextVar("flashgen_simulation", default=None)


class JitFunction:
    """A jit function. Called in a kernel it runs; indexed with a grid it launches."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.fn = function
        self.__name__, self.__doc__ = function.__name__, function.__doc__

    @cached_property
    def signature(self) -> inspect.Signature:
        """Of a kernel that is launched; most functions of a file are only called."""
        return inspect.signature(self.fn)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if context.active() is None:
            raise UnsupportedOperationError(f"{self.__name__} is called on the host: launch it with a grid")
        return self.fn(*args, **kwargs)

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        return lambda *args, **kwargs: self._launch(grid, args, kwargs)

    def _launch(self, grid: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        run = RUN.get()
        if run is None or context.active() is not None:
            where = "inside of a kernel" if run is not None else "outside of flashgen.simulator.simulate"
            raise UnsupportedOperationError(f"{self.__name__} is launched {where}")
        if int(kwargs.pop("num_ctas", 1)) != 1:
            raise UnsupportedOperationError(
                f"{self.__name__} is launched with num_ctas > 1: clusters are not simulated"
            )
        warps = int(kwargs.pop("num_warps", 4))
        for option in ("num_stages", "maxnreg", "enable_fp_fusion", "launch_cooperative_grid", "launch_pdl"):
            if option not in self.signature.parameters:
                kwargs.pop(option, None)
        bound = self.signature.bind(*args, **kwargs)
        bound.apply_defaults()
        values = [self._argument(name, value) for name, value in bound.arguments.items()]
        size = grid(dict(bound.arguments)) if callable(grid) else grid
        axes = tuple(int(n) for n in (size if isinstance(size, (tuple, list)) else (size,)))
        launch = Launch(run.settings, self.__name__, (*axes, 1, 1)[:3], warps)  # type: ignore[arg-type]
        run.launches.append(launch)
        context.enter(launch)
        try:
            launch.run(self.fn, values)
        except SimulationError as error:
            error.add_note(
                f"kernel {self.__name__}, grid {axes}, schedule {run.settings.schedule!r}, seed {run.settings.seed}"
            )
            raise
        finally:
            context.enter(None)

    def _argument(self, name: str, value: Any) -> Any:
        annotation = self.signature.parameters[name].annotation
        fixed = annotation is constexpr or (isinstance(annotation, str) and "constexpr" in annotation)
        if fixed or value is None or isinstance(value, (bool, TensorDescriptor)):
            return value
        if isinstance(value, (int, np.integer)):
            return scalar(value, int32 if -(2**31) <= value < 2**31 else int64)
        if isinstance(value, float):
            return float(np.float32(value))
        if hasattr(value, "untyped_storage"):
            return Pointer(Buffer(value), int(value.storage_offset()))
        return value


def jit(fn: Any = None, **_: Any) -> Any:
    """Make a jit function; options of the compiler are ignored."""
    return JitFunction if fn is None else JitFunction(fn)


def constexpr_function(fn: Any) -> Any:
    """A function of compile-time values: simply the function."""
    return fn


def aggregate(cls: type) -> type:
    """A class of values with typed fields; one without `__init__` gets one over its annotations."""
    if "__init__" not in vars(cls):
        names = list(vars(cls).get("__annotations__", {}))

        def fill(self: Any, *args: Any, **kwargs: Any) -> None:
            given = {**dict(zip(names, args, strict=False)), **kwargs}
            if set(given) != set(names) or len(args) > len(names):
                raise TypeError(f"{cls.__name__} takes {', '.join(names)}")
            for name, value in given.items():
                setattr(self, name, value)

        cls.__init__ = fill  # type: ignore[misc]
    return cls
