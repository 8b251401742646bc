"""Mods, tried on a handful of zeros before a call does any work: what a `score_mod` or a `mask_mod` must give back.

A mod is elementwise, correct for 0-d or broadcast arguments (FlexAttention's rule), so five tiny tensors whose sizes all differ
show a result of the wrong shape. Indices are 0, which every captured tensor has; a call without queries, keys or batch
never runs its mods, and none is tried. Nothing synchronises, since only shapes and dtypes are looked at;
but of a mod that asks for sizes, or has no trace, values are compared.

A trial costs 29 us for a score_mod that reads a table and 13 us for a causal mask_mod, on one core of a shared machine:
OMP_NUM_THREADS=1 python -m timeit -s "import torch; from flashgen import probe; t = torch.rand(2, 8); d = t.device
f = lambda s, b, h, i, j: s + t[h, (i - j) % 8]" "probe.score_mod(f, d)", and likewise with mask_mod.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from flashgen.errors import InvalidProblemError

# Batch, heads, queries, keys: all different, so that a reduced dimension cannot pass for another.
_SIZES = (2, 3, 4, 5)


def score_mod(function: Callable[..., Any], device: torch.device) -> None:
    """Refuse a score_mod that raises, or gives no real tensor of one value per score.

    Raises:
        InvalidProblemError: names score_mod, what it gave and what it must give.
    """
    score = torch.zeros(_SIZES, device=device)
    result = _run("score_mod", function, (score, *_indices(device)))
    if result.dtype == torch.bool or result.is_complex():
        raise InvalidProblemError(
            f"score_mod returns {result.dtype}: it must return the new scores, numbers that fp32 can hold. A condition "
            "belongs into `mask_mod`."
        )
    # A result that does not depend on the score may leave dimensions to broadcasting. One that does and still lacks
    # some has reduced them.
    _check_result("score_mod", result, device)
    if result.shape != score.shape and _depends_on_score(function, device):
        raise InvalidProblemError(
            f"score_mod returns shape {tuple(result.shape)} for scores of shape {_SIZES}: it must be elementwise, one value per "
            "score. It reduces the scores it is given."
        )


def per_score(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function of single values, on blocks: mapped over batch, heads, queries and keys, as FlexAttention's eager mode does.

    Args:
        function: a score_mod or a mask_mod that indexes step by step (`table[b][q_idx]`) or reduces what it captured.

    Returns:
        The same on a score (b, h, m, n), if there is one, and indices (b,1,1,1), (1,h,1,1), (1,1,m,1), (1,1,1,n).
    """

    def mapped(*arguments: Tensor) -> Tensor:
        scores, indices = arguments[:-4], arguments[-4:]
        found = function
        for place in (3, 2, 1, 0):
            found = torch.vmap(found, in_dims=(*(0 for _ in scores), *(0 if at == place else None for at in range(4))))
        with _mapping():
            result: Tensor = found(*scores, *(index.flatten() for index in indices))
        return result

    return mapped


def _mapping() -> AbstractContextManager[Any]:
    """An operator of a compiled graph may run below a dispatch mode of the compiler's, where vmap's own keys are left out."""
    keys, excluded = torch._C.DispatchKey, torch._C._dispatch_tls_local_exclude_set()
    if not excluded.has(keys.FuncTorchBatched):
        return nullcontext()
    for key in (
        keys.FuncTorchBatched, keys.FuncTorchVmapMode, keys.FuncTorchDynamicLayerFrontMode, keys.FuncTorchDynamicLayerBackMode,
    ):  # fmt: skip
        excluded = excluded.remove(key)
    guard: AbstractContextManager[Any] = torch._C._ForceDispatchKeyGuard(
        torch._C._dispatch_tls_local_include_set(), excluded
    )
    return guard


def maps(name: str, function: Callable[..., Any], device: torch.device) -> bool:
    """Whether `per_score` runs a mod, by operations that know how to run for many values at once: one by one they would take hours."""
    arguments = _indices(device)
    if not name.endswith("mask_mod"):
        arguments = (torch.zeros(_SIZES, device=device), *arguments)
    functorch: Any = torch._C._functorch
    before = functorch._is_vmap_fallback_enabled()
    functorch._set_vmap_fallback_enabled(False)
    try:
        with torch.no_grad():
            per_score(function)(*arguments)
    except Exception:  # whatever it is: the mod then runs on blocks, and is tried for what that changes
        return False
    finally:
        functorch._set_vmap_fallback_enabled(before)
    return True


# Which scores are computed beside each other in the comparison: never all, and of each index neither always the same end nor the same mean.
# The last part is one score: what compares whole tensors is to find two equal that were none in the whole.
_PARTS = (
    (slice(0, 1), slice(1, 3), slice(2, 4), slice(2, 5)),
    (slice(1, 2), slice(0, 1), slice(1, 2), slice(1, 3)),
    (slice(0, 1), slice(0, 1), slice(0, 1), slice(0, 1)),
)


def require_elementwise(
    name: str, function: Callable[..., Any], device: torch.device, sizes: tuple[int, ...] = (1, 1, 1, 1)
) -> None:
    """Refuse a mod whose value for one score depends on which others are computed beside it: blocks would change the result.

    What has a trace is elementwise, and need not be tried. Values are compared, which synchronises.

    Args:
        name, function, device: as in `mask_mod`.
        sizes: batch, heads, queries and keys, below which indices stay: what the mod reads has nothing beyond.

    Raises:
        InvalidProblemError: names the mod.
    """
    arguments = _distinct(name, device, sizes)
    for part in _PARTS:
        some = tuple(
            x[tuple(at if n > 1 else slice(None) for at, n in zip(part, x.shape, strict=True))] for x in arguments
        )
        shape = torch.broadcast_shapes(*(x.shape for x in some))
        whole, alone = (_run(name, function, tuple(x.clone() for x in given)) for given in (arguments, some))
        if _same(whole.expand(_SIZES)[part], alone.expand(shape)):
            continue
        raise InvalidProblemError(
            f"{name} gives a score another value when fewer are computed beside it: it reduces over them (softmax, max, sum, ...) "
            "or draws random numbers. It must be elementwise and give the same each time, since scores are computed "
            "block by block, and in the backward again."
        )


def require_as_alone(
    name: str, function: Callable[..., Any], device: torch.device, sizes: tuple[int, ...] = (1, 1, 1, 1)
) -> None:
    """Refuse a mod whose values on blocks are others than for one score alone: it asks its arguments for their dimensions.

    Args:
        name, function, device, sizes: as in `require_elementwise`, of a mod that `per_score` runs.

    Raises:
        InvalidProblemError: names the mod.
    """
    arguments = _distinct(name, device, sizes)
    whole, alone = (_run(name, run, tuple(x.clone() for x in arguments)) for run in (function, per_score(function)))
    if not _same(whole.expand(_SIZES), alone.expand(_SIZES)):
        raise InvalidProblemError(
            f"{name} reads how many dimensions or elements a tensor of scores or indices has, and gives other values for many scores "
            "than for one (0-d arguments). It must be elementwise, since scores are computed block by block."
        )


def _distinct(name: str, device: torch.device, sizes: tuple[int, ...]) -> tuple[Tensor, ...]:
    """Arguments of a mod that tell scores apart, with indices from 0 to the last below sizes."""
    score = torch.linspace(-1.0, 2.0, 120, device=device).view(_SIZES)
    indices = tuple(
        (torch.arange(n, device=device) * (size - 1) // (n - 1) if size >= n else torch.arange(n, device=device) % size)
        .int()
        .view(x.shape)
        for n, size, x in zip(_SIZES, sizes, _indices(device), strict=True)
    )
    return indices if name.endswith("mask_mod") else (score, *indices)


def _same(some: Tensor, others: Tensor) -> bool:
    return torch.allclose(some.double(), others.double(), rtol=1e-3, atol=1e-5, equal_nan=True)


def mask_mod(name: str, function: Callable[..., Any], device: torch.device) -> None:
    """Refuse a mask_mod that raises, or gives no bool tensor that broadcasts.

    Args:
        name: how the user knows it, e.g. `block_mask.mask_mod`.
        function: the mod.
        device: of q.

    Raises:
        InvalidProblemError: names the mod, what it gave and what it must give.
    """
    result = _run(name, function, _indices(device))
    if result.dtype != torch.bool:
        raise InvalidProblemError(
            f"{name} returns {result.dtype}: it must return torch.bool, True = may attend. Numbers to add belong into "
            "`score_mod` or `bias`."
        )
    _check_result(name, result, device)


# What PyTorch says where Python asks a tensor of several elements for one value.
_READ_IN_PYTHON = ("Boolean value of Tensor", "converted to Python scalars", "cannot be converted to Scalar")
BRANCHES = "It cannot branch on data, since it is run for many scores at once: use torch.where for `if`, & | ~ for and/or/not, // for int(). "


class _OnTheCpu(TorchFunctionMode):
    """Whatever lies on another device counts as zeros of its shape on the CPU.

    A GPU loads each operation that it runs for the first time: some milliseconds each, for five elements.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        moved = {name: _here(value) for name, value in (kwargs or {}).items()}
        return func(*map(_here, args), **moved)


def _here(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value if value.device.type == "cpu" else torch.zeros((), dtype=value.dtype).expand(value.shape)
    if isinstance(value, (tuple, list)):
        return type(value)(map(_here, value))
    if isinstance(value, torch.device):
        return torch.device("cpu")
    return value


def on_the_cpu() -> TorchFunctionMode:
    """Mods of kernels are tried on the CPU, whatever they read: only shapes and dtypes are looked at, and a trace knows the devices."""
    return _OnTheCpu()  # type: ignore[no-untyped-call]


def _indices(device: torch.device) -> tuple[Tensor, ...]:
    shapes = ((2, 1, 1, 1), (1, 3, 1, 1), (1, 1, 4, 1), (1, 1, 1, 5))
    return tuple(torch.zeros(shape, dtype=torch.int32, device=device) for shape in shapes)


def _run(name: str, function: Callable[..., Any], arguments: tuple[Tensor, ...]) -> Tensor:
    signature = ("score, " if len(arguments) == 5 else "") + "b, h, q_idx, kv_idx"
    try:
        with torch.no_grad():
            result = function(*arguments)
    except Exception as error:
        branches = any(words in str(error) for words in _READ_IN_PYTHON)
        raise InvalidProblemError(
            f"{name} raises {type(error).__name__}: {error}. {BRANCHES if branches else ''}It is called as {name.rpartition('.')[2]}({signature}) with tensors "
            f"that broadcast to (batch, heads, queries, keys), here {_SIZES}, indices int32; captured tensors are to be "
            "indexed with b, h, q_idx, kv_idx."
        ) from error
    if not isinstance(result, Tensor):
        raise InvalidProblemError(
            f"{name} returns a {type(result).__name__}: it must return a torch.Tensor, one value per score."
        )
    return result


def _check_result(name: str, result: Tensor, device: torch.device) -> None:
    if result.dim() and result.device != device:
        raise InvalidProblemError(
            f"{name} returns a tensor on {result.device}, q is on {device}: move what it captures."
        )
    tail = _SIZES[4 - result.dim() :] if result.dim() <= 4 else ()
    if result.dim() > 4 or any(size not in (1, full) for size, full in zip(result.shape, tail, strict=True)):
        raise InvalidProblemError(
            f"{name} returns shape {tuple(result.shape)} for arguments that broadcast to {_SIZES}: it must be elementwise and "
            "return that shape or one that broadcasts to it."
        )


def _depends_on_score(function: Callable[..., Any], device: torch.device) -> bool:
    with torch.enable_grad():
        score = torch.zeros(_SIZES, device=device, requires_grad=True)
        result = function(score, *_indices(device))
        if not result.requires_grad:
            return False
        return torch.autograd.grad(result.sum(), score, allow_unused=True)[0] is not None
