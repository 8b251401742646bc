"""The names a Gluon file may import, of Triton 3.6 to 3.9, and what answers them."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any, NoReturn

import numpy as np

from flashgen.simulator import (
    assembly,
    atomics,
    barriers,
    dtypes,
    functions,
    global_memory,
    jit,
    layouts,
    shared,
    tma,
    wgmma,
)
from flashgen.simulator.context import active, fail
from flashgen.simulator.errors import UnsupportedOperationError
from flashgen.simulator.machine import warp_specialize
from flashgen.simulator.tensors import Tensor

VERSIONS = ("3.6", "3.9")  # the oldest and the newest Triton whose names are known


class Unknown:
    """A name that Triton may have and the simulator does not: it may be imported, not used."""

    def __init__(self, name: str) -> None:
        self.name = name

    def _refuse(self) -> NoReturn:
        message = f"{self.name} is not simulated"
        if active() is not None:
            fail(UnsupportedOperationError, message)
        from flashgen.simulator.sites import here

        site = here().site()
        raise UnsupportedOperationError(f"{message}\n    at {site}", sites=(site,))

    def __call__(self, *_: Any, **__: Any) -> NoReturn:
        self._refuse()

    def __getattr__(self, name: str) -> Unknown:
        if name.startswith("__"):
            raise AttributeError(name)
        return Unknown(f"{self.name}.{name}")


class SimulatedModule(ModuleType):
    """A module of the kernel language; a name it lacks is `Unknown` until it is used."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return Unknown(f"{self.__name__}.{name}")


def barrier(*, cluster: bool = False) -> None:
    """All threads of the partition meet (Triton 3.9's name)."""
    if cluster:
        fail(UnsupportedOperationError, "a barrier across a cluster is not simulated")
    shared.thread_barrier()


def async_copy_global_to_shared(
    tensor_desc: Any, coord: Any, barrier: Any, result: Any, pred: Any = True, multicast: Any = False
) -> None:
    """Start a TMA load (the name of Triton 3.6 and 3.7)."""
    async_load(tensor_desc, coord, barrier, result, pred, multicast)


def async_copy_shared_to_global(tensor_desc: Any, coord: Any, src: Any) -> None:
    """Start a TMA store (Triton 3.6's name)."""
    tma.tma_store(tensor_desc, coord, src)


def async_load(
    tensor_desc: Any,
    coord: Any,
    barrier: Any,
    result: Any,
    pred: Any = True,
    multicast: Any = False,
    cache_policy: Any = None,
) -> None:
    """Start a TMA load (Triton 3.9's name)."""
    if multicast:
        fail(UnsupportedOperationError, "multicast is not simulated")
    tma.tma_load(tensor_desc, coord, barrier, result, pred)


def async_store(tensor_desc: Any, coord: Any, src: Any, cache_policy: Any = None) -> None:
    """Start a TMA store (Triton 3.9's name)."""
    tma.tma_store(tensor_desc, coord, src)


def _reducer(name: str, operation: Callable[..., Any]) -> Callable[..., None]:
    def async_atomic(tensor_desc: Any, coord: Any, src: Any) -> None:
        tma.tma_store(tensor_desc, coord, src, reduce=operation)

    async_atomic.__name__ = name
    return async_atomic


def expect(
    mbarrier: Any, bytes_per_cta: Any = None, pred: Any = True, *, from_cta: Any = None, bytes: Any = None
) -> None:
    """Arrive and expect bytes; 3.6 calls the second argument `bytes`, 3.9 `bytes_per_cta`."""
    barriers.expect(mbarrier, bytes if bytes_per_cta is None else bytes_per_cta, pred)


def arrive(mbarrier: Any, *, count: Any = 1, pred: Any = True, from_cta: Any = None) -> None:
    """Arrive at an mbarrier."""
    barriers.arrive(mbarrier, count=count, pred=pred)


_REDUCTIONS: dict[str, Callable[..., Any]] = {
    "add": np.add, "min": np.minimum, "max": np.maximum, "and": np.bitwise_and, "or": np.bitwise_or,
    "xor": np.bitwise_xor,
}  # fmt: skip


class _Builder:
    """The methods of `_semantic.builder` that kernels' own builtins call."""

    @staticmethod
    def create_async_tma_reduce(kind: str, desc: Any, coord: Any, src: Any) -> None:
        tma.tma_store(desc, coord, src, reduce=_REDUCTIONS[kind.lower()])

    @staticmethod
    def create_async_tma_store_wait(pendings: Any, read_only: Any = True) -> None:
        tma.store_wait(pendings, read_only)

    def __getattr__(self, name: str) -> NoReturn:
        fail(UnsupportedOperationError, f"_semantic.builder.{name} is not simulated")


class _Semantic:
    """What a kernel's own builtin gets as `_semantic`."""

    builder = _Builder()

    @staticmethod
    def _convert_to_ir_values(values: Any, require_i64: bool = False) -> list[Any]:
        return list(values)

    @staticmethod
    def to_tensor(x: Any) -> Any:
        return x

    def __getattr__(self, name: str) -> NoReturn:
        fail(UnsupportedOperationError, f"_semantic.{name} is not simulated")


def builtin(fn: Callable[..., Any]) -> Callable[..., Any]:
    """A kernel's own builtin: it gets the simulated `_semantic`."""

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        return fn(*args, **{"_semantic": _Semantic(), **kwargs})

    wrapped.__name__ = fn.__name__
    return wrapped


LAYOUTS = (
    layouts.AutoLayout, layouts.BlockedLayout, layouts.CoalescedLayout, layouts.DistributedLinearLayout,
    layouts.DotOperandLayout, layouts.NVMMADistributedLayout, layouts.NVMMASharedLayout, layouts.PaddedSharedLayout,
    layouts.SharedLinearLayout, layouts.SliceLayout, layouts.SwizzledSharedLayout,
)  # fmt: skip
_ATOMICS = ("add", "and", "cas", "load", "max", "min", "or", "poll", "store", "xchg", "xor")
_FUNCTIONS = [
    "program_id",
    "num_programs",
    "num_warps",
    "num_ctas",
    "arange",
    "full",
    "zeros",
    "full_like",
    "zeros_like",
    "convert_layout",
    "set_auto_layout",
    "where",
    "reduce",
    "maximum",
    "minimum",
    "clamp",
    "fma",
    "fdiv",
    "umulhi",
    "add",
    "sub",
    "mul",
    "cdiv",
    "expand_dims",
    "broadcast",
    "reshape",
    "permute",
    "split",
    "join",
    "cast",
    "to_tensor",
    "multiple_of",
    "max_contiguous",
    "max_constancy",
    "assume",
    "device_assert",
    "static_assert",
    "device_print",
    "static_print",
    "static_range",
]
LANGUAGE: dict[str, Any] = {
    **dtypes.ALL,
    **{layout.__name__: layout for layout in LAYOUTS},
    **functions.ELEMENTWISE,
    **{name: getattr(functions, name) for name in _FUNCTIONS},
    **{f"atomic_{name}": getattr(atomics, f"atomic_{name}") for name in _ATOMICS},
    "abs": functions.absolute,
    "sum": functions.reduce_sum,
    "max": functions.reduce_max,
    "min": functions.reduce_min,
    "div_rn": functions.fdiv,
    "inline_asm_elementwise": assembly.inline_asm_elementwise,
    "range": functions.device_range,
    "load": global_memory.load,
    "store": global_memory.store,
    "allocate_shared_memory": shared.allocate_shared_memory,
    "shared_memory_descriptor": shared.SharedView,
    "warp_specialize": warp_specialize,
    "thread_barrier": shared.thread_barrier,
    "barrier": barrier,
    "constexpr": jit.constexpr,
    "tensor": Tensor,
    "dtype": dtypes.DType,
    "tuple": tuple,
}
TMA: dict[str, Any] = {
    "async_copy_global_to_shared": async_copy_global_to_shared,
    "async_copy_shared_to_global": async_copy_shared_to_global,
    "async_load": async_load,
    "async_store": async_store,
    "store_wait": tma.store_wait,
    "make_tensor_descriptor": tma.make_tensor_descriptor,
    "tensor_descriptor": tma.TensorDescriptor,
    **{f"async_atomic_{name}": _reducer(f"async_atomic_{name}", op) for name, op in _REDUCTIONS.items()},
}
MBARRIER: dict[str, Any] = {
    "MBarrierLayout": layouts.MBarrierLayout,
    "allocate_mbarrier": barriers.allocate_mbarrier,
    "init": barriers.init,
    "invalidate": barriers.invalidate,
    "expect": expect,
    "arrive": arrive,
    "wait": barriers.wait,
}
HOPPER: dict[str, Any] = {
    "fence_async_shared": shared.fence_async_shared,
    "warpgroup_mma": wgmma.warpgroup_mma,
    "warpgroup_mma_init": wgmma.warpgroup_mma_init,
    "warpgroup_mma_wait": wgmma.warpgroup_mma_wait,
}
_KINDS = SimpleNamespace(**{name.upper(): name.upper() for name in _REDUCTIONS})
_GLUON = {"jit": jit.jit, "constexpr_function": jit.constexpr_function, "aggregate": jit.aggregate}


def next_power_of_2(n: int) -> int:
    """The smallest power of two that is not below n."""
    return 1 << (int(n) - 1).bit_length() if n > 1 else 1


def modules() -> dict[str, SimulatedModule]:
    """Fresh modules, by their full name, linked to each other."""
    gluon = "triton.experimental.gluon"
    hopper = f"{gluon}.language.nvidia.hopper"
    contents: dict[str, dict[str, Any]] = {
        "triton": {
            **_GLUON, "cdiv": functions.cdiv, "next_power_of_2": next_power_of_2, "__version__": f"{VERSIONS[1]}.0",
        },
        "triton.language": LANGUAGE,
        "triton.language.core": {**LANGUAGE, "_aggregate": jit.aggregate},
        "triton._C": {},
        "triton._C.libtriton": {"ir": SimpleNamespace(DESCRIPTOR_REDUCE_KIND=_KINDS)},
        "triton.experimental": {},
        gluon: _GLUON,
        f"{gluon}.language": LANGUAGE,
        f"{gluon}.language._core": {**LANGUAGE, "builtin": builtin, "_unwrap_if_constexpr": lambda value: value},
        f"{gluon}.language.nvidia": {},
        hopper: HOPPER,
        f"{hopper}.tma": TMA,
        f"{hopper}.mbarrier": MBARRIER,
        f"{gluon}.nvidia": {},
        f"{gluon}.nvidia.hopper": {"TensorDescriptor": tma.TensorDescriptor},
    }  # fmt: skip
    made: dict[str, SimulatedModule] = {}
    for name, names in contents.items():
        module = made[name] = SimulatedModule(name)
        module.__path__ = []
        module.__dict__.update(names)
        parent, _, leaf = name.rpartition(".")
        if parent:
            setattr(made[parent], leaf, module)
    return made
