"""The operators that PyTorch sees, `flashgen::attention_fwd` and `flashgen::attention_bwd`, and their autograd.

Defined with define/impl and a fake (shapes only), autograd as a Function *outside* the operator: the cheapest
boundary, and one that `torch.compile(fullgraph=True)` traces through. Which kernel runs is decided inside the
operator, at run time, so dynamic shapes do not recompile anything. A call with Python functions (score_mod, mask_mod, a
BlockMask) cannot be an operator's argument: it runs the same code without the operator around it.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import fields, replace
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd import forward_ad

from flashgen import torch_blocked
from flashgen.build import build
from flashgen.dispatch import Plan, resolve
from flashgen.errors import BuildError, InvalidProblemError
from flashgen.operands import Operands
from flashgen.problem import Problem, not_built
from flashgen.render import render
from flashgen.scalars import Scalars, decode_config
from flashgen.variants import by_name

# -- the schema --

_TENSORS = ["alibi_slopes", "sinks", "bias", "attn_mask", "philox", "cu_seqlens_q", "cu_seqlens_k", "seqused_k"]
_SCALAR_SCHEMA = (
    "bool causal, str causal_alignment, float? softmax_scale, int window_left, int window_right, float softcap, "
    "float dropout_p, SymInt max_seqlen_q, SymInt max_seqlen_k, str layout, bool return_lse, bool training, str backend, str config"
)
_OPERAND_SCHEMA = ", ".join(f"Tensor? {name}" for name in _TENSORS)
_library = torch.library.Library("flashgen", "DEF")
_library.define(
    f"attention_fwd(Tensor q, Tensor k, Tensor v, {_OPERAND_SCHEMA}, {_SCALAR_SCHEMA}) -> (Tensor out, Tensor lse)"
)
_library.define(
    f"attention_bwd(Tensor? dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, {_OPERAND_SCHEMA}, "
    f"{_SCALAR_SCHEMA}, bool bias_grad, bool sinks_grad) -> (Tensor dq, Tensor dk, Tensor dv, Tensor dbias, Tensor dsinks)"
)


# -- the call as a checked problem --


def checked(q: Tensor, k: Tensor, v: Tensor, operands: Operands, scalars: Scalars) -> Problem:
    """The problem of a call all of whose arguments are right; nothing has been computed yet.

    Raises:
        InvalidProblemError: names the argument, what was given and what is allowed.
    """
    operands.require_tensors(q.device)
    problem = problem_of(q, k, v, operands, scalars)
    operands.check(problem, q.device)
    return problem


def problem_of(q: Tensor, k: Tensor, v: Tensor, operands: Operands, scalars: Scalars) -> Problem:
    """The checked problem of a call.

    Raises:
        InvalidProblemError: the arguments do not fit together.
    """
    options: dict[str, Any] = {
        "causal": scalars.causal,
        "causal_alignment": scalars.causal_alignment,
        "softmax_scale": scalars.softmax_scale,
        "window_size": (scalars.window_left, scalars.window_right),
        "softcap": scalars.softcap,
        "dropout_p": scalars.dropout_p,
        "return_lse": scalars.return_lse,
        "requires_grad": scalars.training,
        **{
            name: getattr(operands, name)
            for name in ("alibi_slopes", "sinks", "bias", "attn_mask", "score_mod", "mask_mod")
        },
    }
    if operands.cu_seqlens_q is not None:
        return Problem.from_packed(
            q, k, v, operands.cu_seqlens_q, operands.cu_seqlens_k, scalars.max_seqlen_q, scalars.max_seqlen_k,
            seqused_k=operands.seqused_k, **options,
        )  # fmt: skip
    return Problem.from_tensors(q, k, v, block_mask=operands.block_mask, layout=scalars.layout, **options)  # type: ignore[arg-type]


# -- forward --


def forward(q: Tensor, k: Tensor, v: Tensor, operands: Operands, scalars: Scalars) -> tuple[Tensor, Tensor]:
    """Check, resolve and run; lse is empty where nobody wants it."""
    problem = checked(q, k, v, operands, scalars)
    plan = resolve(problem, backend=scalars.backend, config=decode_config(scalars.config))
    out, lse = _allocate(q, v, scalars)
    wanted = lse if problem.spec.has_lse else None
    if plan.backend == "torch":
        _run_torch(problem, q, k, v, operands, scalars.layout, out, wanted)
    else:
        q, k, v, o = (x if problem.varlen else _bshd(x, scalars.layout) for x in (q, k, v, out))
        _run_kernel(plan, q, k, v, o, wanted, operands)
    return out, lse


def _allocate(q: Tensor, v: Tensor, scalars: Scalars) -> tuple[Tensor, Tensor]:
    out = q.new_empty((*q.shape[:-1], v.shape[-1]))
    if not (scalars.return_lse or scalars.training):
        return out, q.new_empty((0,), dtype=torch.float32)
    if q.dim() == 3:
        return out, q.new_empty((q.shape[1], q.shape[0]), dtype=torch.float32)
    seqlen, heads = (q.shape[1], q.shape[2]) if scalars.layout == "bshd" else (q.shape[2], q.shape[1])
    return out, q.new_empty((q.shape[0], heads, seqlen), dtype=torch.float32)


def _run_torch(
    problem: Problem, q: Tensor, k: Tensor, v: Tensor, operands: Operands, layout: str, out: Tensor, lse: Tensor | None
) -> None:
    options = operands.options(problem)
    if problem.varlen:
        torch_blocked.packed_forward(q, k, v, _packing(problem, operands, q, k), options, out, lse)
        return
    q, k, v, o = (_bshd(x, layout) for x in (q, k, v, out))
    torch_blocked.forward(q, k, v, options, o, lse)


def _packing(problem: Problem, operands: Operands, q: Tensor, k: Tensor) -> torch_blocked.Packing:
    if operands.cu_seqlens_q is None or operands.cu_seqlens_k is None:
        raise InvalidProblemError("packed sequences need both cu_seqlens_q and cu_seqlens_k.")
    return torch_blocked.Packing.make(
        operands.cu_seqlens_q,
        operands.cu_seqlens_k,
        operands.seqused_k,
        problem.causal_alignment == "bottom-right",
        totals=(q.shape[0], k.shape[0]),
        longest=(problem.seqlen_q, problem.seqlen_k),
    )


def _run_kernel(
    plan: Plan, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor | None, operands: Operands
) -> None:
    """Run a generated kernel on `bshd` views."""
    problem = plan.problem
    q, k, v = map(_unit_last_stride, (q, k, v))
    source = render(problem.spec, by_name(plan.variant))
    values: dict[str, Any] = {**operands.launch_values(problem), **plan.config}
    if plan.target.backend == "cpu":
        from flashgen import interpret  # starts a worker process: only where somebody asked for it

        interpret.launch(source, q, k, v, out, lse, **values)
        return
    with torch.cuda.device(q.device) if q.device.type == "cuda" else nullcontext():
        try:
            build(source).launch(q, k, v, out, lse, **values)
        except Exception as error:
            raise explained(error, plan) from error


def explained(error: Exception, plan: Plan) -> Exception:
    """A launch's exception, as a BuildError where the compiler or the driver refused."""
    if not type(error).__module__.startswith("triton"):
        return error
    return BuildError(
        f"{plan.variant} with {plan.config.label} does not run on {plan.target.name}: {type(error).__name__}: {error}. "
        f"Pass another config=, or tune: flashgen tune {plan.problem.tune_arguments}"
    )


def _bshd(x: Tensor, layout: str) -> Tensor:
    return x if layout == "bshd" else x.transpose(1, 2)


def _unit_last_stride(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


# -- backward --


def backward(
    dout: Tensor | None,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    operands: Operands,
    scalars: Scalars,
    bias_grad: bool,
    sinks_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, torch_blocked.GradientSums]:
    """The blocked torch backward, whatever ran forward."""
    problem = problem_of(q, k, v, operands, scalars)
    options, wanted = operands.options(problem), {"bias_grad": bias_grad, "sinks_grad": sinks_grad}
    if problem.varlen:
        return torch_blocked.packed_backward(
            dout, dlse, q, k, v, out, lse, _packing(problem, operands, q, k), options, **wanted
        )
    q_, k_, v_, out_ = (_bshd(x, scalars.layout) for x in (q, k, v, out))
    dout_ = None if dout is None else _bshd(dout, scalars.layout)
    dq, dk, dv, sums = torch_blocked.backward(dout_, dlse, q_, k_, v_, out_, lse, options, **wanted)
    dq, dk, dv = (_bshd(x, scalars.layout) for x in (dq, dk, dv))
    return dq.contiguous(), dk.contiguous(), dv.contiguous(), sums


def _cast_like(total: Tensor | None, x: Tensor | None) -> Tensor | None:
    return None if total is None or x is None else total.to(x.dtype)


# -- the operators --


def _split(arguments: tuple[Any, ...]) -> tuple[Operands, Scalars]:
    operands = Operands(**dict(zip(_TENSORS, arguments, strict=False)))
    names = [field.name for field in fields(Scalars)]
    return operands, Scalars(**dict(zip(names, arguments[len(_TENSORS) :], strict=True)))


def _attention_fwd(q: Tensor, k: Tensor, v: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    return forward(q, k, v, *_split(arguments))


def _attention_fwd_fake(q: Tensor, k: Tensor, v: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    return _allocate(q, v, _split(arguments)[1])


def _attention_bwd(
    dout: Tensor | None, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *arguments: Any
) -> tuple[Tensor, ...]:
    *rest, bias_grad, sinks_grad = arguments
    operands, scalars = _split(tuple(rest))
    dq, dk, dv, sums = backward(dout, dlse, q, k, v, out, lse, operands, scalars, bias_grad, sinks_grad)
    extra = (_cast_like(sums.bias, operands.bias), _cast_like(sums.sinks, operands.sinks))
    return (dq, dk, dv, *(q.new_empty((0,)) if x is None else x for x in extra))


def _attention_bwd_fake(
    dout: Tensor | None, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *arguments: Any
) -> tuple[Tensor, ...]:
    *rest, bias_grad, sinks_grad = arguments
    operands, _ = _split(tuple(rest))
    extra = ((bias_grad, operands.bias), (sinks_grad, operands.sinks))
    grads = (x.new_empty(x.shape) for x in (q, k, v))
    return (*grads, *(x.new_empty(x.shape) if wanted and x is not None else q.new_empty((0,)) for wanted, x in extra))


_library.impl("attention_fwd", _attention_fwd, "CompositeExplicitAutograd")
_library.impl("attention_bwd", _attention_bwd, "CompositeExplicitAutograd")
torch.library.register_fake("flashgen::attention_fwd", _attention_fwd_fake, lib=_library)
torch.library.register_fake("flashgen::attention_bwd", _attention_bwd_fake, lib=_library)


def flatten(operands: Operands, scalars: Scalars) -> tuple[Any, ...]:
    """Everything behind q, k and v, in the schema's order."""
    return (*(getattr(operands, name) for name in _TENSORS), *scalars.flat())


def wants_gradient(q: Tensor, k: Tensor, v: Tensor, operands: Operands, captured: tuple[Tensor, ...]) -> bool:
    """Whether autograd will ask for a backward."""
    leaves = (q, k, v, operands.bias, operands.sinks, *captured)
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in leaves)


def run(q: Tensor, k: Tensor, v: Tensor, operands: Operands, scalars: Scalars) -> tuple[Tensor, Tensor]:
    """Attention, differentiable where an argument wants a gradient."""
    operands.require_tensors(q.device)
    _refuse_tangents(q, k, v, operands.bias, operands.sinks)
    captured = operands.options_captured() if operands.score_mod is not None else ()
    if wants_gradient(q, k, v, operands, captured):
        apply: Any = AttentionFunction.apply
        training = replace(scalars, training=True)
        differentiated: tuple[Tensor, Tensor] = apply(
            q, k, v, operands, training, operands.bias, operands.sinks, *captured
        )
        return differentiated
    if operands.has_functions:
        with torch.no_grad():
            return forward(q, k, v, operands, scalars)
    result: tuple[Tensor, Tensor] = torch.ops.flashgen.attention_fwd(q, k, v, *flatten(operands, scalars))
    return result


def _refuse_tangents(*tensors: Tensor | None) -> None:
    """Forward-mode derivatives are refused: through the operator they would be zero, silently."""
    if forward_ad._current_level < 0:
        return
    if any(x is not None and forward_ad.unpack_dual(x).tangent is not None for x in tensors):
        raise not_built("the forward-mode derivative of flashgen.attention (torch.func.jvp, dual tensors)")


# -- autograd --


class AttentionFunction(torch.autograd.Function):
    """Forward and backward; saves q, k, v, out, lse and the operands, nothing of size seqlen_q x seqlen_k."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        operands: Operands,
        scalars: Scalars,
        bias: Any,
        sinks: Any,
        *captured: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Run the forward with lse."""
        operands = replace(operands, bias=bias, sinks=sinks)
        if operands.has_functions:
            out, lse = forward(q, k, v, operands, scalars)
        else:
            out, lse = torch.ops.flashgen.attention_fwd(q, k, v, *flatten(operands, scalars))
        ctx.save_for_backward(q, k, v, out, lse, *(getattr(operands, name) for name in _TENSORS))
        ctx.functions = (operands.score_mod, operands.mask_mod, operands.block_mask)
        ctx.scalars = scalars
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
        """Run the blocked backward."""
        wanted = ctx.needs_input_grad
        if dout is None and dlse is None:
            return (None,) * len(wanted)
        q, k, v, out, lse, *tensors = ctx.saved_tensors
        score_mod, mask_mod, block_mask = ctx.functions
        operands = Operands(
            **dict(zip(_TENSORS, tensors, strict=True)), score_mod=score_mod, mask_mod=mask_mod, block_mask=block_mask
        )
        # With create_graph the gradients must carry a node that refuses to be differentiated: without one they
        # would pass for constants, and a gradient penalty would be silently wrong.
        again, refuse_twice = torch.is_grad_enabled(), cast(Any, NotTwiceDifferentiable.apply)
        if operands.has_functions:
            with torch.no_grad():
                *grads, sums = backward(dout, dlse, q, k, v, out, lse, operands, ctx.scalars, wanted[5], wanted[6])
            extra = [_cast_like(sums.bias, operands.bias), _cast_like(sums.sinks, operands.sinks)]
            inner = [total.to(x.dtype) for total, x in zip(sums.captured, operands.options_captured(), strict=True)]
            if again:
                *grads, extra[0], extra[1] = refuse_twice(q, k, v, *grads, *extra)
            return (*grads, None, None, *extra, *inner)
        arguments = (dout, dlse, q, k, v, out, lse, *flatten(operands, ctx.scalars), wanted[5], wanted[6])
        dq, dk, dv, dbias, dsinks = torch.ops.flashgen.attention_bwd(*arguments)
        if again:
            dq, dk, dv, dbias, dsinks = refuse_twice(q, k, v, dq, dk, dv, dbias, dsinks)
        return (dq, dk, dv, None, None, dbias if wanted[5] else None, dsinks if wanted[6] else None)


class NotTwiceDifferentiable(torch.autograd.Function):
    """Passes gradients through as a node whose own backward is an error."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        """Views of the gradients."""
        return tuple(None if grad is None else grad.view_as(grad) for grad in grads)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        """Refuse."""
        raise not_built("the second derivative of flashgen.attention (double backward)")


def draw_philox(q: Tensor, dropout_p: float, generator: torch.Generator | None) -> Tensor | None:
    """Dropout's seed and offset, drawn on the tensors' device, so that nothing synchronises and graphs replay."""
    if not dropout_p:
        return None
    return torch.randint(0, 2**63 - 1, (2,), dtype=torch.int64, device=q.device, generator=generator)
