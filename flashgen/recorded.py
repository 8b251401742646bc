"""A warm call that autograd records: what `warm` bound launches the forward, and what is bound here its backward.

The same kernels with the same arguments as `autograd.AttentionFunction`, without what that works out anew at each call: an option's checks, a
problem, its plan, a rendered text. Calls with functions (score_mod, mask_mod, a BlockMask) and with operands that want gradients go the long way.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.nn import Parameter

from flashgen import execution, ops, replays
from flashgen.autograd import NotTwiceDifferentiable, wait_at_exit
from flashgen.dispatch import Plan
from flashgen.operands import Operands
from flashgen.variants import by_name

_MOST = 64  # layouts of one kind's gradients that are remembered
_ORDINARY = (Tensor, Parameter)  # exactly these: a subclass may mean anything
_FIRST_OPERAND = 5  # of the arguments of `RecordedCall`


class Bound(NamedTuple):
    """One kind of recorded call.

    Attributes:
        forward: launches the forward, as `warm` bound it.
        backward: (dout, dlse, q, k, v, out, lse, operands) -> dq, dk, dv.
        dropout_p: of the kind, for which a seed is drawn.
        with_lse: whether the caller wants lse.
        names: of its operands, each in its place.
    """

    forward: Callable[..., Any]
    backward: Callable[..., tuple[Tensor, Tensor, Tensor]]
    dropout_p: float
    with_lse: bool
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
    problem, with_lse = plan.problem, plan.problem.return_lse
    bound = Bound(forward, _backward(after, operands, launch_of(after)), problem.dropout_p, with_lse, names)
    # What `Function.apply` does before it is for transforms of functions, which no warm call is in.
    apply: Any = super(torch.autograd.Function, RecordedCall).apply

    def run(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        given: tuple[Tensor | None, ...] = (),
        tensors: tuple[Tensor, ...] = (),
        generator: torch.Generator | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        found = apply(bound, generator, q, k, v, *given)
        return found if with_lse else (found, None)

    return run


def _backward(
    plan: Plan, operands: Operands, launch: Callable[..., None]
) -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
    problem, variant = plan.problem, by_name(plan.variant)
    values = operands.launch_values(problem, plan.config) | {**variant.launch_options(problem), **plan.config}
    each_call = tuple(name for name, value in values.items() if isinstance(value, Tensor))
    fixed = {name: value for name, value in values.items() if name not in each_call}
    several = torch.cuda.device_count() > 1
    # A gradient may have any strides, and what was saved may come back in other memory.
    kinds: dict[Any, replays.Kind] = {}
    direct: dict[Any, replays.Kind] = {}  # where nothing is copied before the launch, and all of it is replayed
    summed = operands.sinks is not None or operands.bias is not None  # which take zeros beside the gradients
    wanted = {"bias": False, "sinks": False}

    def backward(
        dout: Tensor | None,
        dlse: Tensor | None,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        given: dict[str, Any],
    ) -> tuple[Tensor, Tensor, Tensor]:
        inputs = (dout, q, k, v, out, lse) if dlse is None else (dout, dlse, q, k, v, out, lse)
        if each_call:
            inputs = (*inputs, *[given[name] for name in each_call])
        key, places = (None, []) if summed else _looked_at(inputs)
        kind = direct.get(key)
        if kind is not None and kind.replay is not None:
            dq, dk, dv = _like(q), _like(k), _like(v)
            count = 6 if dlse is None else 7
            places[count:count] = (dq.data_ptr(), dk.data_ptr(), dv.data_ptr())
            if on_its_device(q, kind.replay, places):
                return dq, dk, dv

        def run(*tensors: Tensor | None, **sums: Any) -> None:
            own = {**{name: getattr(all_given, name) for name in each_call}, **sums}
            there = [x for x in (*tensors, *own.values()) if x is not None]
            what = tuple([None if x is None else _kind_of(x) for x in (*tensors, *own.values())])
            kind = _remembered(kinds, what) or _remembered(kinds, what, replays.Kind(launch, fixed))
            if execution._beside:
                execution.join_beside(plan)
            places = [x.data_ptr() for x in there]
            outputs = len(inputs) - len(each_call)
            if key is not None and places[:outputs] + places[outputs + 3 :] == [x.data_ptr() for x in inputs]:  # type: ignore[union-attr]
                _remembered(direct, key, kind)
            if kind.replay is None or not on_its_device(q, kind.replay, places):
                on_its_device(q, kind, tensors, own)

        all_given = Operands(**given)
        dq, dk, dv, _ = execution.gradients(plan, run, dout, dlse, q, k, v, out, lse, all_given, problem.layout, wanted)
        return dq, dk, dv

    def on_its_device(q: Tensor, start: Callable[..., Any], *arguments: Any) -> Any:
        try:
            if several and q.is_cuda and torch.cuda.current_device() != q.device.index:
                with torch.cuda.device(q.device):
                    return start(*arguments)
            return start(*arguments)
        except Exception as error:
            raise execution.explained(error, plan) from error

    return backward


def _kind_of(x: Tensor) -> tuple[Any, ...]:
    return x.get_device(), x.dtype, x.shape, x.stride(), x.data_ptr() & 15


def _looked_at(tensors: tuple[Tensor | None, ...]) -> tuple[Any, list[int]]:
    """All that the steps before a launch look at, and addresses; None where those have something to do or somebody listens."""
    words: list[Any] = []
    places: list[int] = []
    if torch._C._len_torch_dispatch_stack() or torch._C._functorch.peek_interpreter_stack() is not None:
        return None, places
    for x in tensors:
        if type(x) not in _ORDINARY or x.layout is not torch.strided or x.is_neg():  # type: ignore[union-attr]
            return None, places
        place = x.data_ptr()  # type: ignore[union-attr]
        if not place:  # without elements
            return None, places
        places.append(place)
        words += (x.get_device(), x.dtype, x.shape, x.stride(), place & 15)  # type: ignore[union-attr]
    return tuple(words), places


def _remembered(known: dict[Any, replays.Kind], key: Any, made: replays.Kind | None = None) -> Any:
    """What is known by a key, and where something is made for it that, from now on."""
    if made is None:
        return known.get(key)
    if len(known) >= _MOST:
        known.clear()
    known[key] = made
    return made


def _like(x: Tensor) -> Tensor:
    """An empty contiguous tensor of the same shape; `torch.empty` takes twice the time."""
    return torch.empty_like(x, memory_format=torch.contiguous_format)


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
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Run the forward with lse, which autograd hears of where the caller does."""
        philox = ops.draw_philox(q, bound.dropout_p, generator) if bound.dropout_p else None
        out, lse = bound.forward(q, k, v, given, philox=philox)
        ctx.save_for_backward(q, k, v, out, lse, philox, *given)
        ctx.bound = bound
        ctx.set_materialize_grads(False)
        return (out, lse) if bound.with_lse else out

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None = None) -> tuple[Tensor | None, ...]:
        """Run the backward."""
        nothing = (None,) * (len(ctx.needs_input_grad) - _FIRST_OPERAND)
        if dout is None and dlse is None:
            return (None,) * _FIRST_OPERAND + nothing
        bound: Bound = ctx.bound
        q, k, v, out, lse, philox, *given = ctx.saved_tensors
        wait_at_exit(q)
        operands: dict[str, Any] = dict(zip(bound.names, given, strict=False))
        if philox is not None:
            operands["philox"] = philox
        if not torch.is_grad_enabled():
            return (None, None, *bound.backward(dout, dlse, q, k, v, out, lse, operands), *nothing)
        with torch.no_grad():
            gradients = bound.backward(dout, dlse, q, k, v, out, lse, operands)
        refuse_twice = cast(Any, NotTwiceDifferentiable.apply)
        return (None, None, *refuse_twice(3, q, k, v, *gradients), *nothing)
