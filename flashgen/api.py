"""The public functions. Thin: they check what only they can check, and hand over to the operators and to `resolve`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor

from flashgen import autograd, checks, dispatch, execution, ops, warm
from flashgen.dispatch import ConfigLike, Plan
from flashgen.operands import Operands
from flashgen.problem import CausalAlignment, Layout, not_built
from flashgen.scalars import Scalars

BackendName = Literal["auto", "gluon", "triton", "torch"]


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    causal_alignment: CausalAlignment = "bottom-right",
    softmax_scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    bias: Tensor | None = None,
    attn_mask: Tensor | None = None,
    score_mod: Callable[..., Any] | None = None,
    mask_mod: Callable[..., Any] | None = None,
    block_mask: Any = None,
    dropout_p: float = 0.0,
    generator: torch.Generator | None = None,
    return_lse: bool = False,
    deterministic: bool | None = None,
    layout: Layout = "bshd",
    backend: BackendName = "auto",
    config: ConfigLike | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Exact scaled dot-product attention (FlashAttention-2, arXiv 2307.08691).

    Args:
        q: (batch, seqlen_q, num_heads_q, head_dim), fp16, bf16 or fp32; head_dim 1 to 256. With `layout="bhsd"` the
            middle two dimensions are swapped, in k, v and the output too.
        k: (batch, seqlen_k, num_heads_kv, head_dim); num_heads_q must be a multiple of num_heads_kv, query head h
            reads key/value head h // (num_heads_q / num_heads_kv).
        v: (batch, seqlen_k, num_heads_kv, head_dim_v).
        causal: query i sees keys j <= i + d.
        causal_alignment: d = seqlen_k - seqlen_q for "bottom-right" (FlashAttention's convention), 0 for "top-left".
        softmax_scale: factor of the scores; None for 1/sqrt(head_dim).
        window_size: (left, right): keys i + d - left <= j <= i + d + right, with or without causal; -1 for no limit.
        softcap: s <- softcap * tanh(s / softcap); 0 for none.
        alibi_slopes: (num_heads_q,) or (batch, num_heads_q): adds -slope * |i + seqlen_k - seqlen_q - j|; no gradient.
        sinks: (num_heads_q,) raw logits that join the softmax denominator only; differentiable.
        bias: additive, floating, broadcastable (right-aligned) to (batch, num_heads_q, seqlen_q, seqlen_k);
            differentiable, its gradient has its own shape. Hide with -inf: where all scores of a row lie beyond some 10^5 in size, lse no
            longer holds their sum in fp32: if a gradient reaches the row, a kernel gives NaN (in dq of the row, and in dk, dv of the head;
            FLASHGEN_CHECK_VALUES=1 refuses it). "torch" sums anew.
        attn_mask: bool, True = may attend, broadcastable likewise. All masks are ANDed.
        score_mod: FlexAttention's `score_mod(score, b, h, q_idx, kv_idx)`, elementwise; tensors it reads get gradients. It is
            called once with a few zeros before anything runs, to see what shape and dtype it gives.
        mask_mod: FlexAttention's `mask_mod(b, h, q_idx, kv_idx)`, elementwise, gives bool; tried likewise. Kernels leave out whole
            blocks that it hides. Tensors that it reads are copied to the host for that, once for each content (the only call that
            waits for the device); where a content is first met while a CUDA graph is captured, every block is masked.
        block_mask: torch's BlockMask, taken as given. Its lists are read again when PyTorch counts a write into them; after one that
            it does not count on a GPU (through `.data`, another library's kernel, a graph's replay) call `flashgen.reread_block_mask`.
        dropout_p: multiplies normalised probabilities by 0 or 1/(1 - dropout_p); never sinks, never lse.
        generator: where dropout's seed is drawn from; None for the device's default generator.
        return_lse: also return the log-sum-exp of the scores; its gradient is propagated.
        deterministic: whether the gradients must repeat bit for bit, as the output always does; None follows
            `torch.are_deterministic_algorithms_enabled()`. The portable backward and the torch backend's always do.
        layout: "bshd" or "bhsd".
        backend: "auto" (the fastest that supports the call on the tensors' device), "triton" (CPU tensors: in the
            interpreter, slow, for checking), "torch", or "gluon" (NVIDIA Hopper; CPU tensors: in the simulator, slower still).
        config: a KernelConfig of the forward, or a dict of its tunables, instead of the tuned one; the backward takes its own.

    Returns:
        out (batch, seqlen_q, num_heads_q, head_dim_v) in q's dtype and layout; with `return_lse` also lse
        (batch, num_heads_q, seqlen_q), fp32, natural logarithm. A row that sees no key gives 0 and -inf.

    Raises:
        InvalidProblemError: the arguments do not fit together, or a name or config is not allowed.
        UnsupportedProblemError: no variant covers the call (lists every variant's reason), or a head_dim is above 256.
        BuildError: the kernel could not be compiled or run.
        DatabaseError: the user's tuning database is corrupt or unreadable.
    """
    call, known = None, warm.table()
    if torch.compiler.is_compiling():
        if not (score_mod is None and mask_mod is None and block_mask is None):
            from flashgen import uncompiled

            if not uncompiled.READS_MODS or hasattr(torch._C._functorch.peek_interpreter_stack(), "level"):
                return uncompiled.run(  # type: ignore[no-any-return]
                    attention, q, k, v, causal=causal, causal_alignment=causal_alignment, softmax_scale=softmax_scale, window_size=window_size,
                    softcap=softcap, alibi_slopes=alibi_slopes, sinks=sinks, bias=bias, attn_mask=attn_mask, score_mod=score_mod,
                    mask_mod=mask_mod, block_mask=block_mask, dropout_p=dropout_p, generator=generator, return_lse=return_lse,
                    deterministic=deterministic, layout=layout, backend=backend, config=config,
                )  # fmt: skip
    elif block_mask is None and (type(dropout_p) is float or not isinstance(dropout_p, Tensor)):
        options = (
            causal, causal_alignment, softmax_scale, window_size, softcap, return_lse, deterministic, layout, backend, dropout_p,
            None if config is None else warm.frozen(config),
        )  # fmt: skip
        given: tuple[Tensor | None, ...] = ()
        if not (alibi_slopes is None and sinks is None and bias is None and attn_mask is None):
            given = (alibi_slopes, sinks, bias, attn_mask)
        mods = () if score_mod is None and mask_mod is None else (score_mod, mask_mod)
        call = warm.key_of(q, k, v, options, given, mods)
        bound = None if call is None else warm.find(call)
        if call is not None and bound is not None and (generator is None or warm.draws_from(generator, q, dropout_p)):
            out, lse = bound(q, k, v, given, call.tensors, generator)
            return (out, lse) if return_lse else out  # type: ignore[return-value]  # lse is there where it was asked for
    q, k, v = autograd.autocast(q, k, v)  # first: it gives tensors of several dtypes one
    operands, scalars = _arguments(
        q, k, v, causal=causal, causal_alignment=causal_alignment, softmax_scale=softmax_scale, window_size=window_size,
        softcap=softcap, alibi_slopes=alibi_slopes, sinks=sinks, bias=bias, attn_mask=attn_mask, score_mod=score_mod,
        mask_mod=mask_mod, block_mask=block_mask, dropout_p=dropout_p, generator=generator, return_lse=return_lse,
        deterministic=deterministic, layout=layout, backend=backend, config=config,
    )  # fmt: skip
    return _run(call, known, q, k, v, operands, scalars)


def _run(
    call: warm.Call | None, known: warm.Table, q: Tensor, k: Tensor, v: Tensor, operands: Operands, scalars: Scalars
) -> Tensor | tuple[Tensor, Tensor]:
    """The long way, after which a call of this kind may take the short one."""
    if torch.compiler.is_compiling() and operands.has_functions:
        from flashgen import compiled

        out, lse = compiled.run(q, k, v, operands, scalars)
    elif torch.compiler.is_compiling() and torch._C._functorch.peek_interpreter_stack() is not None:
        from flashgen import uncompiled

        out, lse = uncompiled.transformed(q, k, v, *ops.flatten(operands, scalars))
    elif call is None or not warm.unseen(call):
        out, lse = autograd.run(q, k, v, operands, scalars)
    else:
        with execution.watched() as ran:
            out, lse = autograd.run(q, k, v, operands, scalars)
            plan = ran.plan
        if plan is not None:
            warm.bind(call, plan, known, operands)
    return (out, lse) if scalars.return_lse else out


def explain(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    **options: Any,
) -> Plan:
    """What `attention()`, or with offsets `varlen_attention()`, would do with the same arguments, and why. Launches nothing.

    Args:
        q, k, v, **options: as in `attention()`.
        cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k: as in `varlen_attention()`, all or none.

    Returns:
        The plan: backend, variant, config and its source, and why other variants were rejected; `str(plan)` is a
        readable account.

    Raises:
        InvalidProblemError, UnsupportedProblemError, DatabaseError: as `attention()`.
    """
    offsets = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    packing = None if all(x is None for x in offsets) else offsets
    q, k, v = autograd.autocast(q, k, v)
    operands, scalars = _arguments(q, k, v, packing, draw=False, **options)
    captured = operands.as_now(q.device).options_captured() if operands.score_mod is not None else ()
    scalars = replace(scalars, training=ops.wants_gradient(q, k, v, operands, captured))
    problem = execution.checked(q, k, v, operands, scalars)
    return dispatch.resolve(problem, backend=scalars.backend, config=options.get("config"))


def _arguments(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    packing: tuple[Tensor | None, Tensor | None, int | None, int | None] | None = None,
    *,
    seqused_k: Tensor | None = None,
    causal: bool = False,
    causal_alignment: CausalAlignment = "bottom-right",
    softmax_scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    bias: Tensor | None = None,
    attn_mask: Tensor | None = None,
    score_mod: Callable[..., Any] | None = None,
    mask_mod: Callable[..., Any] | None = None,
    block_mask: Any = None,
    dropout_p: float = 0.0,
    generator: torch.Generator | None = None,
    return_lse: bool = False,
    deterministic: bool | None = None,
    layout: Layout = "bshd",
    backend: BackendName = "auto",
    config: ConfigLike | None = None,
    draw: bool = True,
) -> tuple[Operands, Scalars]:
    """A call's arguments in the two values that the operators take; `draw`: with dropout's seed."""
    checks.qkv(q, k, v, layout, dims=4 if packing is None else 3)
    cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k = (None, None, -1, -1) if packing is None else packing
    if packing is not None:  # without them the call would pass for one that is not packed
        checks.require(isinstance(cu_seqlens_q, Tensor), "cu_seqlens_q", cu_seqlens_q, "an int32 tensor of offsets")
        checks.length("max_seqlen_q", max_seqlen_q)
        checks.length("max_seqlen_k", max_seqlen_k)
    scalars = Scalars.of(
        causal=causal, causal_alignment=causal_alignment, softmax_scale=softmax_scale, window_size=window_size, softcap=softcap,
        dropout_p=dropout_p, return_lse=return_lse, deterministic=deterministic, max_seqlen_q=max_seqlen_q,
        max_seqlen_k=max_seqlen_k, layout=layout, backend=backend, config=config,
    )  # fmt: skip
    operands = Operands(
        alibi_slopes=alibi_slopes, sinks=sinks, bias=bias, attn_mask=attn_mask, score_mod=score_mod, mask_mod=mask_mod,
        block_mask=block_mask, cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k, seqused_k=seqused_k,
    )  # fmt: skip
    operands.require_tensors(q.device)
    checks.generator(generator, q.device if scalars.dropout_p else None)
    if not draw:
        return operands, scalars
    if scalars.dropout_p and not torch.compiler.is_compiling():
        execution.checked(q, k, v, operands, scalars)  # before the draw: a refused call leaves the generator as it was
    philox = ops.draw_philox(q, scalars.dropout_p, generator)
    return (operands if philox is None else replace(operands, philox=philox)), scalars


def varlen_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    seqused_k: Tensor | None = None,
    causal: bool = False,
    causal_alignment: CausalAlignment = "bottom-right",
    softmax_scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    bias: Tensor | None = None,
    attn_mask: Tensor | None = None,
    score_mod: Callable[..., Any] | None = None,
    mask_mod: Callable[..., Any] | None = None,
    dropout_p: float = 0.0,
    generator: torch.Generator | None = None,
    return_lse: bool = False,
    deterministic: bool | None = None,
    backend: BackendName = "auto",
    config: ConfigLike | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention over packed sequences; each attends to its own keys only.

    Args:
        q: (total_q, num_heads_q, head_dim).
        k: (total_k, num_heads_kv, head_dim).
        v: (total_k, num_heads_kv, head_dim_v).
        cu_seqlens_q: (num_sequences + 1,) int32, where each sequence's queries start and end: from 0 to total_q, never falling.
            CPU tensors are checked for that (seqused_k and the longest lengths too); on a GPU that would synchronise, so the
            torch backend checks them, which reads them anyway, and a generated kernel trusts them.
        cu_seqlens_k: likewise for keys; sequences of length 0 are legal on either side.
        max_seqlen_q: the longest sequence of queries.
        max_seqlen_k: the longest sequence of keys.
        seqused_k: (num_sequences,) int32, how many of each sequence's keys count; None for all.
        bias, attn_mask: broadcastable to (num_sequences, num_heads_q, max_seqlen_q, max_seqlen_k).
        alibi_slopes: (num_heads_q,) or (num_sequences, num_heads_q).
        score_mod, mask_mod: see indices relative to the sequence; b is its number.
        causal, causal_alignment, softmax_scale, window_size, softcap, sinks, dropout_p, generator, return_lse, deterministic,
            backend, config: as in `attention()`; alignment follows each sequence's own lengths.

    Returns:
        out (total_q, num_heads_q, head_dim_v); with `return_lse` also lse (num_heads_q, total_q), fp32, natural logarithm.

    Raises:
        InvalidProblemError, UnsupportedProblemError, BuildError, DatabaseError: as `attention()`.
    """
    call, known = None, warm.table()
    if torch.compiler.is_compiling():
        if not (score_mod is None and mask_mod is None):
            from flashgen import uncompiled

            if not uncompiled.READS_MODS or hasattr(torch._C._functorch.peek_interpreter_stack(), "level"):
                return uncompiled.run(  # type: ignore[no-any-return]
                    varlen_attention, q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, seqused_k=seqused_k, causal=causal,
                    causal_alignment=causal_alignment, softmax_scale=softmax_scale, window_size=window_size, softcap=softcap,
                    alibi_slopes=alibi_slopes, sinks=sinks, bias=bias, attn_mask=attn_mask, score_mod=score_mod, mask_mod=mask_mod,
                    dropout_p=dropout_p, generator=generator, return_lse=return_lse, deterministic=deterministic, backend=backend,
                    config=config,
                )  # fmt: skip
    elif type(dropout_p) is float or not isinstance(dropout_p, Tensor):
        options = (
            causal, causal_alignment, softmax_scale, window_size, softcap, return_lse, deterministic, backend, dropout_p,
            max_seqlen_q, max_seqlen_k, None if config is None else warm.frozen(config),
        )  # fmt: skip
        given = (alibi_slopes, sinks, bias, attn_mask, cu_seqlens_q, cu_seqlens_k, seqused_k)
        mods = () if score_mod is None and mask_mod is None else (score_mod, mask_mod)
        call = warm.key_of(q, k, v, options, given, mods)
        bound = None if call is None else warm.find(call)
        if call is not None and bound is not None and (generator is None or warm.draws_from(generator, q, dropout_p)):
            out, lse = bound(q, k, v, given, call.tensors, generator)
            return (out, lse) if return_lse else out  # type: ignore[return-value]  # lse is there where it was asked for
    packing = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    q, k, v = autograd.autocast(q, k, v)
    operands, scalars = _arguments(
        q, k, v, packing, seqused_k=seqused_k, causal=causal, causal_alignment=causal_alignment, softmax_scale=softmax_scale,
        window_size=window_size, softcap=softcap, alibi_slopes=alibi_slopes, sinks=sinks, bias=bias, attn_mask=attn_mask,
        score_mod=score_mod, mask_mod=mask_mod, dropout_p=dropout_p, generator=generator, return_lse=return_lse,
        deterministic=deterministic, backend=backend, config=config,
    )  # fmt: skip
    return _run(call, known, q, k, v, operands, scalars)


def decode_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    *,
    seqused_k: Tensor,
    page_table: Tensor | None = None,
    k_new: Tensor | None = None,
    v_new: Tensor | None = None,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    rotary_interleaved: bool = False,
    num_splits: int = 0,
    return_lse: bool = False,
    **options: Any,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of a few new queries over a (paged) key/value cache. Not built yet.

    Raises:
        UnsupportedProblemError: always.
    """
    raise not_built("decode_attention")
