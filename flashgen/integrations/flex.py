"""FlexAttention's signature: `torch.nn.attention.flex_attention.flex_attention`'s calls, run by flashgen."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from flashgen.api import attention
from flashgen.errors import InvalidProblemError
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
    """FlexAttention, by flashgen's kernels; no `torch.compile` is needed.

    Args:
        query: (batch, num_heads_q, seqlen_q, head_dim).
        key: (batch, num_heads_kv, seqlen_k, head_dim); with a block_mask its batch may be 1, shared by all queries.
        value: (batch, num_heads_kv, seqlen_k, head_dim_v).
        score_mod: `score_mod(score, b, h, q_idx, kv_idx)`.
        block_mask: of `create_block_mask`, for these lengths.
        scale: factor of the scores; None for 1/sqrt(head_dim).
        enable_gqa: whether query heads may share key/value heads.
        return_lse: also return the log-sum-exp.
        kernel_options: those of PyTorch's own kernels: None or empty. `flashgen tune` finds flashgen's.
        return_aux: an `AuxRequest`; its `max_scores` are not built yet.

    Returns:
        out; (out, lse) with return_lse; (out, AuxOutput) with return_aux. lse is (batch, num_heads_q, seqlen_q), fp32, natural logarithm.

    Raises:
        InvalidProblemError: the arguments do not fit together (also a ValueError, as PyTorch's).
        UnsupportedProblemError: nothing covers the call, or kernel_options or max_scores are given.
    """
    if kernel_options:
        raise not_built(
            "kernel_options of flashgen.integrations.flex.flex_attention (they are those of PyTorch's own kernels)"
        )
    if getattr(return_aux, "max_scores", False):
        raise not_built("return_aux=AuxRequest(max_scores=True) of flashgen.integrations.flex.flex_attention")
    if return_lse and return_aux is not None:
        raise InvalidProblemError(
            "return_lse=True and return_aux are given: only one may be. Ask for AuxRequest(lse=True)."
        )
    tensors = {"query": query, "key": key, "value": value}
    for name, x in tensors.items():
        if not isinstance(x, Tensor) or x.dim() != 4:
            given = f"has shape {tuple(x.shape)}" if isinstance(x, Tensor) else f"is a {type(x).__name__}"
            raise InvalidProblemError(f"{name} {given}: it must be a tensor (batch, heads, seqlen, head_dim).")
    if not enable_gqa and query.shape[1] != key.shape[1]:
        raise InvalidProblemError(
            f"query has {query.shape[1]} heads, key {key.shape[1]}: they must be equal, or pass enable_gqa=True."
        )
    if block_mask is not None and key.shape[0] == value.shape[0] == 1:
        key, value = (x.expand(query.shape[0], -1, -1, -1) for x in (key, value))
    with_lse = return_lse or getattr(return_aux, "lse", False)
    result = attention(
        query, key, value, score_mod=score_mod, block_mask=block_mask, softmax_scale=scale, return_lse=with_lse, layout="bhsd"
    )  # fmt: skip
    out, lse = result if isinstance(result, tuple) else (result, None)
    if return_aux is not None:
        return out, torch.nn.attention.flex_attention.AuxOutput(lse=lse)
    return (out, lse) if return_lse else out
