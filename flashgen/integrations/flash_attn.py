"""flash-attn's functions with their arguments, run by flashgen; the key/value cache's is not built yet.

What differs: fp32 is taken too, dropout draws other numbers (the same share of them), and the log-sum-exp of a row that sees no key is
-inf, where flash-attn writes +inf.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from flashgen.api import attention, varlen_attention
from flashgen.errors import InvalidProblemError
from flashgen.problem import not_built


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Any:
    """Attention over (batch, seqlen, heads, head_dim).

    Args:
        q: (batch, seqlen_q, num_heads_q, head_dim).
        k, v: (batch, seqlen_k, num_heads_kv, head_dim).
        dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes: as in `flashgen.attention`; causal is bottom-right.
        deterministic: whether the gradients repeat bit for bit.
        return_attn_probs: also return the log-sum-exp, and None in the place of the probabilities; refused beside dropout.

    Returns:
        (batch, seqlen_q, num_heads_q, head_dim); with return_attn_probs (out, lse, None).

    Raises:
        InvalidProblemError, UnsupportedProblemError: as `flashgen.attention`; probabilities are asked for.
    """
    _refuse_probabilities(return_attn_probs, dropout_p)
    result = attention(
        q, k, v, causal=causal, softmax_scale=softmax_scale, window_size=window_size, softcap=softcap, alibi_slopes=alibi_slopes,
        dropout_p=dropout_p, deterministic=deterministic, return_lse=return_attn_probs,
    )  # fmt: skip
    return (*result, None) if return_attn_probs else result


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: Tensor | None = None,
) -> Any:
    """Attention over packed sequences.

    Args:
        q: (total_q, num_heads_q, head_dim).
        k, v: (total_k, num_heads_kv, head_dim).
        cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k: as in `flashgen.varlen_attention`.
        dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes: as in `flashgen.attention`; causal is bottom-right.
        deterministic: whether the gradients repeat bit for bit.
        return_attn_probs: also return the log-sum-exp, and None in the place of the probabilities; refused beside dropout.
        block_table: of a paged cache: not built yet.

    Returns:
        (total_q, num_heads_q, head_dim); with return_attn_probs (out, lse, None).

    Raises:
        InvalidProblemError, UnsupportedProblemError: as `flashgen.varlen_attention`; probabilities are asked for.
    """
    if block_table is not None:
        raise not_built("block_table of flashgen.integrations.flash_attn.flash_attn_varlen_func")
    _refuse_probabilities(return_attn_probs, dropout_p)
    result = varlen_attention(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, causal=causal, softmax_scale=softmax_scale,
        window_size=window_size, softcap=softcap, alibi_slopes=alibi_slopes, dropout_p=dropout_p, deterministic=deterministic,
        return_lse=return_attn_probs,
    )  # fmt: skip
    return (*result, None) if return_attn_probs else result


def flash_attn_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    cache_seqlens: int | Tensor | None = None,
    cache_batch_idx: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    block_table: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    alibi_slopes: Tensor | None = None,
    num_splits: int = 0,
    return_softmax_lse: bool = False,
) -> Any:
    """Decoding with a key/value cache. Not built yet.

    Raises:
        UnsupportedProblemError: always.
    """
    raise not_built("flashgen.integrations.flash_attn.flash_attn_with_kvcache")


def flash_attn_qkvpacked_func(
    qkv: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Any:
    """Attention over qkv (batch, seqlen, 3, heads, head_dim), which is not copied.

    Args:
        qkv: the three in one tensor.
        dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes: as in `flashgen.attention`; causal is bottom-right.
        deterministic: whether the gradients repeat bit for bit.
        return_attn_probs: also return the log-sum-exp, and None in the place of the probabilities; refused beside dropout.

    Returns:
        (batch, seqlen, num_heads, head_dim); with return_attn_probs (out, lse, None).

    Raises:
        InvalidProblemError, UnsupportedProblemError: as `flashgen.attention`; probabilities are asked for.
    """
    q, k, v = _unpacked("qkv", qkv, 3)
    return flash_attn_func(
        q, k, v,
        dropout_p=dropout_p, softmax_scale=softmax_scale, causal=causal, window_size=window_size, softcap=softcap,
        alibi_slopes=alibi_slopes, deterministic=deterministic, return_attn_probs=return_attn_probs,
    )  # fmt: skip


def flash_attn_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Any:
    """Attention over q and kv (batch, seqlen, 2, heads, head_dim), which is not copied.

    Args:
        q: (batch, seqlen_q, num_heads_q, head_dim).
        kv: the two in one tensor.
        dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes: as in `flashgen.attention`; causal is bottom-right.
        deterministic: whether the gradients repeat bit for bit.
        return_attn_probs: also return the log-sum-exp, and None in the place of the probabilities; refused beside dropout.

    Returns:
        (batch, seqlen_q, num_heads_q, head_dim); with return_attn_probs (out, lse, None).

    Raises:
        InvalidProblemError, UnsupportedProblemError: as `flashgen.attention`; probabilities are asked for.
    """
    k, v = _unpacked("kv", kv, 2)
    return flash_attn_func(
        q, k, v,
        dropout_p=dropout_p, softmax_scale=softmax_scale, causal=causal, window_size=window_size, softcap=softcap,
        alibi_slopes=alibi_slopes, deterministic=deterministic, return_attn_probs=return_attn_probs,
    )  # fmt: skip


def _refuse_probabilities(asked: bool, dropout_p: float) -> None:
    """What flash-attn returns of them beside dropout is of size seqlen x seqlen."""
    if asked and dropout_p:
        raise not_built("return_attn_probs=True beside dropout of flashgen.integrations.flash_attn")


def _unpacked(name: str, packed: Tensor, parts: int) -> tuple[Tensor, ...]:
    if not isinstance(packed, Tensor) or packed.dim() != 5 or packed.shape[2] != parts:
        given = f"has shape {tuple(packed.shape)}" if isinstance(packed, Tensor) else f"is a {type(packed).__name__}"
        raise InvalidProblemError(f"{name} {given}: it must be a tensor (batch, seqlen, {parts}, heads, head_dim).")
    return packed.unbind(2)
