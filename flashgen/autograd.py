"""What is differentiated, cast and mapped around the operators: autograd, autocast, `torch.func`."""

from __future__ import annotations

import atexit
import time
from dataclasses import replace
from typing import Any, NoReturn, cast

import torch
from torch import Tensor
from torch.autograd import forward_ad

from flashgen.execution import backward, cast_like, forward, kernels_asked
from flashgen.operands import Operands
from flashgen.ops import TENSORS, flatten, mapped, wants_gradient
from flashgen.problem import not_built
from flashgen.scalars import Scalars

# What an operator's schema cannot carry: functions, and what they meant in the forward.
_FUNCTIONS = ("score_mod", "mask_mod", "block_mask", "traced_as", "captured_as")
FIRST_OPERAND = 5  # of the arguments of `AttentionFunction`
BIAS, SINKS = (FIRST_OPERAND + TENSORS.index(name) for name in ("bias", "sinks"))
_RELEASED_S = 0.02  # what a backward's thread has at the process's end
_at_exit: list[Any] = []  # what is registered


def autocast(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v in autocast's dtype where `torch.amp.autocast` is on for their device.

    The rule of PyTorch's `scaled_dot_product_attention`: any floating dtype but fp64 is cast, fp16 to bf16 included. Operands keep
    their dtypes, and products stay what they are outside of autocast.
    """
    device = q.device.type if isinstance(q, Tensor) else "meta"
    if device == "meta" or not torch.is_autocast_enabled(device):  # no autocast is known of meta tensors
        return q, k, v
    dtype = torch.get_autocast_dtype(device)

    def cast_one(x: Tensor) -> Tensor:
        eligible = isinstance(x, Tensor) and x.is_floating_point() and x.dtype != torch.float64
        return x.to(dtype) if eligible else x

    return cast_one(q), cast_one(k), cast_one(v)


def _refuse_tangent() -> NoReturn:
    raise not_built("the forward-mode derivative of flashgen.attention (torch.func.jvp, dual tensors)")


def refuse_tangents(*tensors: Tensor | None) -> None:
    """Forward-mode derivatives are refused: through the operator they would be zero, silently."""
    if forward_ad._current_level < 0:
        return
    functorch: Any = torch._C._functorch
    for x in tensors:
        while x is not None and not torch.compiler.is_compiling() and functorch.is_batchedtensor(x):
            x = functorch.get_unwrapped(x)  # what vmap maps has no tangent of its own
        if x is not None and forward_ad.unpack_dual(x).tangent is not None:
            _refuse_tangent()


def _refuse_transformed(operands: Operands) -> None:
    """What functions read, wrapped by `torch.func`: an autograd function does not see it, and it would be a constant."""
    functorch: Any = torch._C._functorch
    if torch.compiler.is_compiling() or functorch.peek_interpreter_stack() is None:
        return
    if any(functorch.is_functorch_wrapped_tensor(x) for x in operands.read_by_functions()):
        raise not_built("a torch.func transform of what score_mod, mask_mod or block_mask of flashgen.attention read")


def _refuse_traced(q: Tensor, scalars: Scalars) -> None:
    """A tracer of operators sees no kernel that is launched without one: its graph would give back memory that nothing was written to."""
    if torch.compiler.is_compiling() or not kernels_asked(q, scalars):
        return
    c: Any = torch._C
    if c._is_tracing() or c._get_dispatch_mode(c._TorchDispatchModeKey.PROXY) is not None:
        raise not_built(
            "tracing (make_fx, torch.jit.trace) of flashgen.attention with score_mod, mask_mod or block_mask by another backend than 'torch'"
        )


def run(q: Tensor, k: Tensor, v: Tensor, operands: Operands, scalars: Scalars) -> tuple[Tensor, Tensor]:
    """Attention, differentiable where an argument wants a gradient."""
    operands.require_tensors(q.device)
    refuse_tangents(q, k, v, operands.bias, operands.sinks)
    if operands.has_functions:
        _refuse_transformed(operands)
        _refuse_traced(q, scalars)
    if torch.is_grad_enabled():
        operands = operands.as_now(q.device)
    captured = operands.options_captured() if operands.score_mod is not None else ()
    # Where there are tangents at all, what stands below another transform's wrapper is asked by autograd, not seen here.
    if wants_gradient(q, k, v, operands, captured) or forward_ad._current_level >= 0:
        apply: Any = (AttentionFunction if torch.compiler.is_compiling() else RefusesTangents).apply
        functions = tuple(getattr(operands, name) for name in _FUNCTIONS)
        tensors = (getattr(operands, name) for name in TENSORS)
        differentiated: tuple[Tensor, Tensor] = apply(
            q, k, v, functions, replace(scalars, training=True), *tensors, *captured
        )
        return differentiated
    if operands.has_functions:
        # A compiler traces past this question; what it compiles is no tensor of vmap's.
        if not torch.compiler.is_compiling() and any(torch._C._functorch.is_batchedtensor(x) for x in (q, k, v)):
            raise not_built("vmap over flashgen.attention with score_mod, mask_mod or block_mask")
        with torch.no_grad():
            return forward(q, k, v, operands, scalars)
    result: tuple[Tensor, Tensor] = torch.ops.flashgen.attention_fwd(q, k, v, *flatten(operands, scalars))
    return result


class AttentionFunction(torch.autograd.Function):
    """Forward and backward; saves q, k, v, out, lse and the operands, nothing of size seqlen_q x seqlen_k."""

    @staticmethod
    def forward(
        q: Tensor, k: Tensor, v: Tensor, functions: tuple[Any, ...], scalars: Scalars, *tensors: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Run the forward with lse; `tensors` are the operands and then what score_mod captures."""
        operands = _operands(functions, tensors)
        if operands.has_functions:
            return forward(q, k, v, operands, scalars)
        result: tuple[Tensor, Tensor] = torch.ops.flashgen.attention_fwd(q, k, v, *flatten(operands, scalars))
        return result

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        """Save what the backward needs."""
        q, k, v, functions, scalars, *tensors = inputs
        # What functions read is not taken from here, but autograd then notices when it was changed in place.
        ctx.save_for_backward(q, k, v, *output, *tensors, *_operands(functions, tuple(tensors)).read_by_functions())
        ctx.functions, ctx.scalars = functions, scalars
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
        """Run the backward."""
        wanted = ctx.needs_input_grad
        grads: list[Tensor | None] = [None] * len(wanted)
        if dout is None and dlse is None:
            return tuple(grads)
        q, k, v, out, lse, *tensors = ctx.saved_tensors
        wait_at_exit(q)
        operands = _operands(ctx.functions, tuple(tensors))
        arguments = (wanted[BIAS], wanted[SINKS])
        # With create_graph the gradients must carry a node that refuses to be differentiated: without one they
        # would pass for constants, and a gradient penalty would be silently wrong.
        again, refuse_twice = torch.is_grad_enabled(), cast(Any, NotTwiceDifferentiable.apply)
        if operands.has_functions:
            with torch.no_grad():
                dq, dk, dv, sums = backward(dout, dlse, q, k, v, out, lse, operands, ctx.scalars, *arguments)
            dbias, dsinks = cast_like(sums.bias, operands.bias), cast_like(sums.sinks, operands.sinks)
            of_captured: tuple[Tensor | None, ...] = tuple(
                total.to(x.dtype) for total, x in zip(sums.captured, operands.options_captured(), strict=True)
            )
        else:
            of_captured = ()
            dq, dk, dv, dbias, dsinks = torch.ops.flashgen.attention_bwd(
                dout, dlse, q, k, v, out, lse, *flatten(operands, ctx.scalars), *arguments
            )
        if again:
            leaves = (q, k, v, operands.bias, operands.sinks, *operands.options_captured())
            dq, dk, dv, dbias, dsinks, *of_captured = refuse_twice(
                len(leaves), *leaves, dq, dk, dv, dbias, dsinks, *of_captured
            )
        grads[:3] = dq, dk, dv
        if operands.has_functions:
            grads[FIRST_OPERAND + len(TENSORS) :] = of_captured
        grads[BIAS], grads[SINKS] = dbias if wanted[BIAS] else None, dsinks if wanted[SINKS] else None
        return tuple(grads)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *arguments: Any) -> Any:
        """Fold the mapped dimension into the batch; see `ops.mapped`."""
        q, k, v, functions, scalars, *tensors = arguments
        if any(function is not None for function in functions):
            raise not_built("vmap over flashgen.attention with score_mod, mask_mod or block_mask")
        apply: Any = RefusesTangents.apply

        def one(q: Tensor, k: Tensor, v: Tensor, *operands: Tensor | None) -> tuple[Tensor, ...]:
            result: tuple[Tensor, ...] = apply(q, k, v, functions, scalars, *operands)
            return result

        return mapped(one, info.batch_size, (q, k, v), in_dims[:3], tensors, in_dims[FIRST_OPERAND:])


class RefusesTangents(AttentionFunction):
    """The same for eager calls: tangents below another transform, as in torch.func.hessian, are refused by name. Dynamo takes no `jvp`."""

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> NoReturn:
        """Refuse."""
        _refuse_tangent()


def _operands(functions: tuple[Any, ...], tensors: tuple[Tensor | None, ...]) -> Operands:
    named: dict[str, Any] = dict(zip(TENSORS, tensors, strict=False))
    return Operands(**named, **dict(zip(_FUNCTIONS, functions, strict=True)))


def wait_at_exit(x: Tensor) -> None:
    """Have the process wait a moment before the interpreter ends, from the first backward on a GPU on.

    PyTorch's autograd thread hands a backward's results over and releases its tensors, for which it needs the interpreter, after that. Python
    ends a thread that asks for an interpreter that is gone, which aborts the process where C++ does not expect it: 3 of 48 processes that
    ended right behind a backward, on busy cores of an H200's host.
    """
    if not _at_exit and x.is_cuda:
        _at_exit.append(atexit.register(time.sleep, _RELEASED_S))


class NotTwiceDifferentiable(torch.autograd.Function):
    """Passes gradients through as a node whose own backward is an error."""

    generate_vmap_rule = True

    @staticmethod
    def forward(leaves: int, *tensors: Tensor | None) -> tuple[Tensor | None, ...]:
        """Views of the gradients, which stand behind as many leaves."""
        return tuple(None if grad is None else grad.view_as(grad) for grad in tensors[leaves:])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
        """Nothing is saved: it is never differentiated."""

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        """Refuse."""
        raise not_built("the second derivative of flashgen.attention (double backward)")
