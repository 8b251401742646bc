"""FlexAttention's signature. Not built yet."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from flashgen.problem import not_built


def flex_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    score_mod: Callable[..., Tensor] | None = None,
    block_mask: Any = None,
    scale: float | None = None,
    enable_gqa: bool = False,
    return_lse: bool = False,
    kernel_options: dict[str, Any] | None = None,
    *,
    return_aux: Any = None,
) -> Any:
    """`torch.nn.attention.flex_attention.flex_attention`'s arguments (layout `bhsd`). Not built yet.

    Raises:
        UnsupportedProblemError: always.
    """
    raise not_built("flashgen.integrations.flex.flex_attention")
