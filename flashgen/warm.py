"""Warm calls: what the first call of a kind worked out, kept in one dict, so that the next one only allocates and launches.

A kind is everything that checks, dispatch and launch depend on: shapes, strides, dtypes, devices, alignment, options, and the raw FLASHGEN_*
variables. A call that autograd records, that something traces, or that brings operands of its own goes the long way, through the
operators. Nothing is decided here that the long way did not decide first: `bind` remembers, `find` looks up.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import Parameter

from flashgen import dispatch, ops, settings
from flashgen.build import build
from flashgen.operands import Operands
from flashgen.render import render
from flashgen.variants import by_name

Key = tuple[Any, ...]
Bound = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor | None]]

_MOST = (
    4096  # kinds that are remembered; when there are more, all are forgotten and the live ones come back by themselves
)
_bound: dict[Key, Bound | None] = {}  # None: seen, and to go the long way every time
_ORDINARY = (Tensor, Parameter)  # exactly these: a subclass may mean anything
_PLAIN = (type(None), bool, int, float, str, tuple)
_environment = settings.raw


def _nobody_listens() -> bool:
    """Whether no mode, transform or tracer wants to see the operators that a call would make."""
    c: Any = torch._C
    return (
        c._len_torch_dispatch_stack() == 0
        and c._len_torch_function_stack() == 0
        and c._functorch.peek_interpreter_stack() is None
        and not c._is_tracing()
        and forward_ad._current_level < 0
        and not c._is_any_autocast_enabled()
    )


def key_of(q: Any, k: Any, v: Any, options: tuple[Any, ...]) -> Key | None:
    """The kind of a call that may be warm, or None where it has to go the long way.

    Args:
        q, k, v: of the call, not checked yet.
        options: every other argument that a kernel can honour, as given.
    """
    if (
        type(q) not in _ORDINARY
        or type(k) not in _ORDINARY
        or type(v) not in _ORDINARY
        or (torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad))
        # A lazily negated view (the imaginary part of a conjugate) holds the values of the tensor before the minus.
        or q.is_neg()
        or k.is_neg()
        or v.is_neg()
        or not _nobody_listens()
    ):
        return None
    try:
        return (
            q.shape, q.stride(), q.dtype, q.device, k.shape, k.stride(), k.dtype, k.device, v.shape, v.stride(), v.dtype, v.device,
            (q.data_ptr() | k.data_ptr() | v.data_ptr()) & 15, options, _environment(),
        )  # fmt: skip
    except RuntimeError:  # sparse and nested tensors have no strides: the long way says what is wrong
        return None


def find(key: Key) -> Bound | None:
    """The bound launch of a kind that was seen before."""
    try:
        return _bound.get(key)
    except TypeError:  # an option that cannot be hashed: the long way says what is wrong with it, or takes it
        return None


def unseen(key: Key) -> bool:
    """Whether a kind is to be bound, once its first call went the long way."""
    return all(isinstance(option, _PLAIN) for option in key[-2]) and key not in _bound


def bind(key: Key, plan: dispatch.Plan, known: dict[Key, Bound | None]) -> None:
    """Remember how a kind of call is launched, after the long way ran it.

    Only generated kernels on a GPU are launched from here: everything else takes far longer than the checks do.

    Args:
        key: of `key_of`.
        plan: what the call ran.
        known: `table()` as it was before the call: after a `forget()` meanwhile nobody reads it any more.
    """
    kept = plan.backend != "torch" and plan.target.backend != "cpu" and not plan.problem.copies
    launcher = _launcher(plan) if kept else None
    if len(known) >= _MOST:
        known.clear()
    known[key] = launcher


def _launcher(plan: dispatch.Plan) -> Bound:
    problem = plan.problem
    launch = build(render(problem.spec, by_name(plan.variant))).launch
    scalars = {**Operands().launch_values(problem, plan.config), **plan.config}
    heads_first = problem.layout == "bhsd"
    rows = (problem.num_heads_q, problem.seqlen_q)
    shape = (problem.batch, *(rows if heads_first else rows[::-1]), problem.head_dim_v)
    lse_shape = (problem.batch, *rows) if problem.return_lse else None
    empty, float32 = torch.empty, torch.float32
    several = torch.cuda.device_count() > 1

    def run(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor | None]:
        device = q.device
        out = empty(shape, dtype=q.dtype, device=device)
        lse = None if lse_shape is None else empty(lse_shape, dtype=float32, device=device)
        if heads_first:
            q, k, v, o = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), out.transpose(1, 2)
        else:
            o = out
        try:
            if several and device.type == "cuda" and torch.cuda.current_device() != device.index:
                with torch.cuda.device(device):
                    launch(q, k, v, o, lse, **scalars)
            else:
                launch(q, k, v, o, lse, **scalars)
        except Exception as error:
            raise ops.explained(error, plan) from error
        return out, lse

    return run


def table() -> dict[Key, Bound | None]:
    """What is remembered now."""
    return _bound


def forget() -> None:
    """Drop everything; the dict is replaced, so that a call that began before writes where nobody reads."""
    global _bound
    _bound = {}


dispatch.on_forget(forget)
