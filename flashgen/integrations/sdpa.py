"""PyTorch's own registry: `scaled_dot_product_attention` through flashgen. Not built yet."""

from __future__ import annotations

from flashgen.problem import not_built


def enable() -> None:
    """Make `torch.nn.functional.scaled_dot_product_attention` reach flashgen. Not built yet.

    Raises:
        UnsupportedProblemError: always.
    """
    raise not_built("flashgen.integrations.sdpa.enable")
