"""Calls that `torch.compile` does not look into.

With Python functions inside of `torch.func` the graph is broken around them, and they run as they do without it; others are one of its nodes there.

Loaded by such a call alone: `torch.compiler` imports the compiler, which takes seconds.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from flashgen import autograd, ops

try:
    import flashgen.compiled  # noqa: F401

    READS_MODS = True
except ImportError:  # a PyTorch whose compiler does not hand a function's graph over
    READS_MODS = False


def _run(function: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    return function(*arguments, **options)


run = torch.compiler.disable(
    _run,
    reason="attention of flashgen with score_mod, mask_mod or block_mask inside of torch.func, or of a PyTorch whose compiler does not hand "
    "functions over, cannot be part of a compiled graph. Compile with fullgraph=False: the graph is broken around the call, which runs the "
    "kernel that it runs without torch.compile",
)


def _transformed(q: Tensor, k: Tensor, v: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    return autograd.run(q, k, v, *ops.split(arguments))


# Dynamo (torch 2.13) says of what torch.func.grad wraps that it requires no gradient: it traced the operator alone, whose gradient was zero.
transformed = torch.compiler.allow_in_graph(_transformed)
