"""Calls with Python functions inside of `torch.compile`: the graph is broken around them, and they run as they do without it.

Loaded by such a call alone: `torch.compiler.disable` imports the compiler, which takes seconds.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


def _run(function: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    return function(*arguments, **options)


run = torch.compiler.disable(
    _run,
    reason="attention of flashgen with score_mod, mask_mod or block_mask takes Python functions, which no operator of a compiled graph "
    "can. Compile with fullgraph=False: the graph is broken around the call, which runs the kernel that it runs without torch.compile",
)
