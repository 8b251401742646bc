"""Partial results of attention over disjoint keys, merged: plain operations of PyTorch, on any device and differentiable."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from flashgen.errors import InvalidProblemError


def merge_attention_states(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    """Merge two partial results over disjoint keys into one, as if all keys had been there at once.

    Each part is weighted by exp(its lse); a part whose lse is -inf saw no key, and whatever its output holds counts for nothing.

    Args:
        out_a: (batch, seqlen, num_heads, head_dim), or packed (total, num_heads, head_dim); fp16, bf16 or fp32.
        lse_a: (batch, num_heads, seqlen), or packed (num_heads, total); float32, natural logarithm. Where sinks are part of both,
            they count twice.
        out_b, lse_b: the other part's, of the same shapes and dtypes.

    Returns:
        out in the dtype of `out_a`, and lse in float32; 0 and -inf in rows of which neither part saw a key.

    Raises:
        InvalidProblemError: shapes, dtypes or devices do not fit together.
    """
    _check(out_a, lse_a, out_b, lse_b)
    # The largest is only a number to stay in range by: it cancels, in the gradients too.
    most = torch.maximum(lse_a, lse_b).detach()
    most = most.masked_fill(most == -torch.inf, 0.0)
    weight_a, weight_b = (lse_a - most).exp(), (lse_b - most).exp()
    total = weight_a + weight_b
    unseen = total == 0
    total = total.masked_fill(unseen, 1.0)
    merged = _part(out_a, weight_a / total) + _part(out_b, weight_b / total)
    return merged.to(out_a.dtype), (most + total.log()).masked_fill(unseen, -torch.inf)


def _part(out: Tensor, weight: Tensor) -> Tensor:
    share = weight.transpose(-1, -2).unsqueeze(-1)  # heads before rows in lse, after them in out
    # 0 * NaN is NaN: an output of no weight may be memory that nothing was written to.
    return torch.where(share == 0, 0.0, out.float()) * share


def _check(out_a: Any, lse_a: Any, out_b: Any, lse_b: Any) -> None:
    for name, value in (("out_a", out_a), ("lse_a", lse_a), ("out_b", out_b), ("lse_b", lse_b)):
        if not isinstance(value, Tensor):
            raise InvalidProblemError(f"{name} is a {type(value).__name__}: it must be a torch.Tensor.")
        if value.device != out_a.device:
            raise InvalidProblemError(f"{name} is on {value.device}, out_a on {out_a.device}: move it.")
    if out_a.dim() not in (3, 4) or out_a.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        raise InvalidProblemError(
            f"out_a has shape {tuple(out_a.shape)} and dtype {out_a.dtype}: it must be (batch, seqlen, heads, head_dim) or "
            "(total, heads, head_dim), and float16, bfloat16 or float32."
        )
    *batch, rows, heads, _ = out_a.shape
    for name, value, shape, dtype in (
        ("out_b", out_b, out_a.shape, out_a.dtype),
        ("lse_a", lse_a, (*batch, heads, rows), torch.float32),
        ("lse_b", lse_b, (*batch, heads, rows), torch.float32),
    ):
        if tuple(value.shape) != tuple(shape) or value.dtype != dtype:
            raise InvalidProblemError(
                f"{name} has shape {tuple(value.shape)} and dtype {value.dtype}: it must be {tuple(shape)} and {dtype}, "
                f"since out_a has shape {tuple(out_a.shape)}."
            )
