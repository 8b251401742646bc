"""Calls that `torch.compile` does not look into.

With Python functions the graph is broken around them, and they run as they do without it; inside of `torch.func` they are one of its nodes.

Loaded by such a call alone: `torch.compiler` imports the compiler, which takes seconds.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from flashgen import autograd, ops


def _run(function: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    return function(*arguments, **options)


run = torch.compiler.disable(
    _run,
    reason="attention of flashgen with score_mod, mask_mod or block_mask takes Python functions, which no operator of a compiled graph "
    "can. Compile with fullgraph=False: the graph is broken around the call, which runs the kernel that it runs without torch.compile",
)


def _transformed(q: Tensor, k: Tensor, v: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    return autograd.run(q, k, v, *ops.split(arguments))


# Dynamo (torch 2.13) says of what torch.func.grad wraps that it requires no gradient: it traced the operator alone, whose gradient was zero.
transformed = torch.compiler.allow_in_graph(_transformed)
