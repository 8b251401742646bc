"""A warm call that autograd records: what `warm` bound launches the forward, and what is bound here its backward.

The same kernels with the same arguments as `autograd.AttentionFunction`, without what that works out anew at each call: an option's checks, a
problem, its plan, a rendered text. Calls with functions (score_mod, mask_mod, a BlockMask) and with operands that want gradients go the long way.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from flashgen import execution, launches
from flashgen.autograd import NotTwiceDifferentiable
from flashgen.dispatch import Plan
from flashgen.operands import Operands
from flashgen.ops import draw_philox
from flashgen.variants import by_name

_MOST = 64  # layouts of one kind's gradients that are remembered
_FIRST_OPERAND = 5  # of the arguments of `RecordedCall`


class Bound(NamedTuple):
    """One kind of recorded call.

    Attributes:
        forward: launches the forward, as `warm` bound it.
        backward: (dout, dlse, q, k, v, out, lse, operands) -> dq, dk, dv.
        dropout_p: of the kind, for which a seed is drawn.
        names: of its operands, each in its place.
    """

    forward: Callable[..., Any]
    backward: Callable[..., tuple[Tensor, Tensor, Tensor]]
    dropout_p: float
    names: tuple[str, ...]


def bind(
    plan: Plan,
    operands: Operands,
    forward: Callable[..., Any],
    names: tuple[str, ...],
    launch_of: Callable[[Plan], Callable[..., None]],
) -> Any:
    """What a recorded call of a kind runs, called as `warm`'s own; None where its backward is no generated kernel.

    Args:
        plan: the forward's, with its backward.
        operands: what the first call of the kind brought along.
        forward: launches the forward.
        names: fields of `Operands` in the order in which calls give them.
        launch_of: the rendered launch of a plan.
    """
    after = plan.backward
    if after is None or after.backend == "torch":
        return None
    bound = Bound(forward, _backward(after, operands, launch_of(after)), plan.problem.dropout_p, names)
    apply: Any = RecordedCall.apply

    def run(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        given: tuple[Tensor | None, ...] = (),
        tensors: tuple[Tensor, ...] = (),
        generator: torch.Generator | None = None,
    ) -> tuple[Tensor, Tensor]:
        return cast(tuple[Tensor, Tensor], apply(bound, generator, q, k, v, *given))

    return run


def _backward(
    plan: Plan, operands: Operands, launch: Callable[..., None]
) -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
    problem, variant = plan.problem, by_name(plan.variant)
    values = operands.launch_values(problem, plan.config) | {**variant.launch_options(problem), **plan.config}
    each_call = tuple(name for name, value in values.items() if isinstance(value, Tensor))
    fixed = {name: value for name, value in values.items() if name not in each_call}
    several = torch.cuda.device_count() > 1
    kinds: dict[
        Any, launches.Kernels
    ] = {}  # a gradient may have any strides, and what was saved may come back in other memory
    wanted = {"bias": False, "sinks": False}

    def backward(
        dout: Tensor | None,
        dlse: Tensor | None,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        given: Operands,
    ) -> tuple[Tensor, Tensor, Tensor]:
        def run(*tensors: Tensor | None, **sums: Any) -> None:
            scalars = {**fixed, **{name: getattr(given, name) for name in each_call}, **sums}
            kind = tuple(
                [
                    None if x is None else (x.dtype, x.stride(), x.data_ptr() & 15)
                    for x in (*tensors, *scalars.values())
                    if isinstance(x, Tensor) or x is None
                ]
            )
            kernels = kinds.get(kind)
            if kernels is None:
                if len(kinds) >= _MOST:
                    kinds.clear()
                kernels = kinds[kind] = launches.Kernels()
            if execution._beside:
                execution.join_beside(plan)
            try:
                if several and q.is_cuda and torch.cuda.current_device() != q.device.index:
                    with torch.cuda.device(q.device):
                        launches.launched(kernels, launch, *tensors, **scalars)
                else:
                    launches.launched(kernels, launch, *tensors, **scalars)
            except Exception as error:
                raise execution.explained(error, plan) from error

        dq, dk, dv, _ = execution.gradients(plan, run, dout, dlse, q, k, v, out, lse, given, problem.layout, wanted)
        return dq, dk, dv

    return backward


class RecordedCall(torch.autograd.Function):
    """Forward and backward of a bound kind; saves what `AttentionFunction` saves."""

    @staticmethod
    def forward(
        ctx: Any,
        bound: Bound,
        generator: torch.Generator | None,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *given: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """Run the forward with lse."""
        philox = draw_philox(q, bound.dropout_p, generator)
        out, lse = bound.forward(q, k, v, given, philox=philox)
        ctx.save_for_backward(q, k, v, out, lse, philox, *given)
        ctx.bound = bound
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
        """Run the backward."""
        nothing = (None,) * (len(ctx.needs_input_grad) - _FIRST_OPERAND)
        if dout is None and dlse is None:
            return (None,) * _FIRST_OPERAND + nothing
        bound: Bound = ctx.bound
        q, k, v, out, lse, philox, *given = ctx.saved_tensors
        operands = Operands(philox=philox, **dict(zip(bound.names, given, strict=False)))
        if not torch.is_grad_enabled():
            return (None, None, *bound.backward(dout, dlse, q, k, v, out, lse, operands), *nothing)
        with torch.no_grad():
            gradients = bound.backward(dout, dlse, q, k, v, out, lse, operands)
        refuse_twice = cast(Any, NotTwiceDifferentiable.apply)
        return (None, None, *refuse_twice(3, q, k, v, *gradients), *nothing)
