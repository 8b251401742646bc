"""Warm calls: what the first call of a kind worked out, kept in one dict, so that the next one only allocates and launches.

A kind is everything that checks, dispatch and launch depend on: shapes, strides, dtypes, devices and alignment of all tensors, options,
the fingerprint of score_mod and mask_mod (code, closures, globals, shapes of what they capture), and the raw FLASHGEN_* variables. A call
that something traces, that autograd records beside functions or operands that want gradients, or that brings a BlockMask goes the long way, through
the operators; what else autograd records runs `recorded`. Nothing is decided here
that the long way did not decide first: `bind` remembers, `find` looks up.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import Parameter

from flashgen import dispatch, execution, ops, recorded, replays, settings
from flashgen.build import build
from flashgen.config import KernelConfig
from flashgen.mods.fingerprint import fingerprint
from flashgen.operands import Operands
from flashgen.render import render
from flashgen.shared_masks import kernel_spec
from flashgen.variants import by_name

Key = tuple[Any, ...]

_MOST = (
    4096  # kinds that are remembered; when there are more, all are forgotten and the live ones come back by themselves
)
_ORDINARY = (Tensor, Parameter)  # exactly these: a subclass may mean anything
_PLAIN = (type(None), bool, int, float, str, tuple, KernelConfig)
_FIXED = (type(None), bool, int, float, str)  # what a launch takes that no later call of the kind changes
_environment = settings.raw
_grads = torch.is_grad_enabled


class Call(NamedTuple):
    """A call that may be warm.

    Attributes:
        key: its kind.
        tensors: what its mods capture, in the order of their walk.
        recorded: whether autograd records it.
    """

    key: Key
    tensors: tuple[Tensor, ...] = ()
    recorded: bool = False


Bound = Callable[..., tuple[Tensor, Tensor | None]]
Table = dict[Key, Bound | None]
_bound: Table = {}  # None: seen, and to go the long way every time


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


def key_of(
    q: Any, k: Any, v: Any, options: tuple[Any, ...], operands: tuple[Any, ...] = (), mods: tuple[Any, ...] = ()
) -> Call | None:
    """The kind of a call that may be warm, or None where it has to go the long way.

    Args:
        q, k, v: of the call, not checked yet.
        options: every other argument that a kernel can honour, as given.
        operands: tensors beside them, each in its place, None where there is none.
        mods: score_mod and mask_mod, where one is given.
    """
    if (
        type(q) not in _ORDINARY
        or type(k) not in _ORDINARY
        or type(v) not in _ORDINARY
        # A lazily negated view (the imaginary part of a conjugate) holds the values of the tensor before the minus.
        or q.is_neg()
        or k.is_neg()
        or v.is_neg()
        or not _nobody_listens()
    ):
        return None
    recorded = _grads() and (q.requires_grad or k.requires_grad or v.requires_grad)
    if recorded and mods:
        return None
    try:
        key: Key = (
            q.shape, q.stride(), q.dtype, q.device, k.shape, k.stride(), k.dtype, k.device, v.shape, v.stride(), v.dtype, v.device,
            (q.data_ptr() & 15) << 8 | (k.data_ptr() & 15) << 4 | v.data_ptr() & 15, options, _environment(),
        )  # fmt: skip
        if recorded:
            key += ("recorded", torch.are_deterministic_algorithms_enabled())
        if not operands and not mods:
            return Call(key, (), recorded)
        return _with_operands(key, operands, mods, recorded)
    except RuntimeError:  # sparse and nested tensors have no strides: the long way says what is wrong
        return None


def _with_operands(key: Key, operands: tuple[Any, ...], mods: tuple[Any, ...], recorded: bool) -> Call | None:
    words: list[Any] = [*key]
    for x in operands:
        if x is None:
            words.append(None)
        elif type(x) not in _ORDINARY or (_grads() and x.requires_grad) or x.is_neg():
            return None
        else:
            words += (x.shape, x.stride(), x.dtype, x.device, x.data_ptr() & 15)
    if not mods:
        return Call(tuple(words), (), recorded)
    found = fingerprint(mods)
    if found.key is None:
        return None
    words += (found.key, torch.get_default_dtype())
    for x in found.tensors:  # their types, shapes and strides are part of the fingerprint
        if type(x) not in _ORDINARY or (_grads() and x.requires_grad) or x.is_neg():
            return None
        words.append(x.data_ptr() & 15)
    return Call(tuple(words), tuple(found.tensors))


def frozen(config: Any) -> Any:
    """A `config=` as part of a key: a dict by its items and their types, since 1 and True are equal."""
    return tuple((name, type(value), value) for name, value in config.items()) if type(config) is dict else config


def draws_from(generator: Any, q: Tensor, dropout_p: Any) -> bool:
    """Whether a generator is one that a warm call may take: the long way says what is wrong with others."""
    return type(generator) is torch.Generator and (not dropout_p or generator.device.type == q.device.type)


def find(call: Call) -> Bound | None:
    """The bound launch of a kind that was seen before."""
    try:
        return _bound.get(call.key)
    except TypeError:  # an option that cannot be hashed: the long way says what is wrong with it, or takes it
        return None


_Q, _V_SHAPE, _OPTIONS = (
    slice(0, 2),
    8,
    13,
)  # where shape and strides of q, the shape of v and the options stand in a key


def unseen(call: Call) -> bool:
    """Whether a kind is to be bound, once its first call went the long way."""
    return all(isinstance(option, _PLAIN) for option in call.key[_OPTIONS]) and call.key not in _bound


def bind(call: Call, plan: dispatch.Plan, known: Table, operands: Operands | None = None) -> None:
    """Remember how a kind of call is launched, after the long way ran it.

    Only generated kernels on a GPU are launched from here: everything else takes far longer than the checks do.

    Args:
        call: of `key_of`.
        plan: what the call ran.
        known: `table()` as it was before the call: after a `forget()` meanwhile nobody reads it any more.
        operands: what the call brought along.
    """
    kept = plan.backend != "torch" and plan.target.backend != "cpu" and not plan.problem.copies
    kept = kept and not settings.read().check_values  # which looks at every call
    launcher = _launcher(plan, operands or Operands(), call.key) if kept else None
    if launcher is not None and call.recorded:
        launcher = recorded.bind(plan, operands or Operands(), launcher, OPERANDS, _launch_of)
    if len(known) >= _MOST:
        known.clear()
    known[call.key] = launcher


# Fields of `Operands` in the order in which `key_of` and `run` get them; those behind the first four are of packed sequences.
OPERANDS = ("alibi_slopes", "sinks", "bias", "attn_mask", "cu_seqlens_q", "cu_seqlens_k", "seqused_k")


def _launch_of(plan: dispatch.Plan) -> Callable[..., None]:
    """The rendered launch of a plan."""
    return build(render(kernel_spec(plan), by_name(plan.variant))).launch


def _launcher(plan: dispatch.Plan, operands: Operands, key: Key) -> Bound | None:
    problem, variant = plan.problem, by_name(plan.variant)
    spec, launch = kernel_spec(plan), _launch_of(plan)
    # What each call binds anew is not made here: a comparison on the device loads code for it, 46 ms on an H200.
    values = operands.launch_values(problem, plan.config, with_ranges=problem.has_block_mask, spec=spec)
    values |= {**variant.launch_options(problem), **plan.config}
    given = tuple(
        (name, place)
        for place, name in enumerate(OPERANDS)
        if values.get(name) is not None and values[name] is getattr(operands, name)
    )
    drawn = "philox" in values
    per_call = {name for name, _ in given} | ({"philox"} if drawn else set())
    bound: tuple[str, ...] = ()
    rebind = None
    if problem.mods is not None:
        names, rebind = operands.binder(problem, plan.config)
        bound = tuple(names & values.keys())
        per_call |= names
    fixed = {name: value for name, value in values.items() if name not in per_call}
    if not all(isinstance(value, _FIXED) for value in fixed.values()):
        return None  # made from what the call brought along, in a way that is not known here
    heads_first = problem.layout == "bhsd"
    dropout_p, with_lse = problem.dropout_p, problem.spec.has_lse
    (shape_q, strides_q), shape_v = key[_Q], key[_V_SHAPE]
    shape = (*shape_q[:-1], shape_v[-1])
    rows = (shape_q[1], shape_q[0]) if problem.varlen else (problem.batch, problem.num_heads_q, problem.seqlen_q)
    strides, row_strides = _contiguous(shape), _contiguous(rows)
    like = shape == shape_q and strides == strides_q  # takes half the time
    empty, empty_like, float32 = torch.empty_strided, torch.empty_like, torch.float32
    several = torch.cuda.device_count() > 1
    simple = not per_call
    # Of a kind all but addresses is the same, where no table of the call's own content is among it.
    kind = replays.Kind(launch, fixed)

    def run(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        operands: tuple[Tensor | None, ...] = (),
        tensors: tuple[Tensor, ...] = (),
        generator: torch.Generator | None = None,
        philox: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        out = empty_like(q) if like else empty(shape, strides, dtype=q.dtype, device=q.device)
        lse = empty(rows, row_strides, dtype=float32, device=q.device) if with_lse else None
        named: dict[str, Any] = {}
        if not simple:
            named = {name: operands[place] for name, place in given}
            if drawn:
                named["philox"] = ops.draw_philox(q, dropout_p, generator) if philox is None else philox
            if rebind is not None:
                made = rebind(tensors)
                for name in bound:
                    named[name] = made[name]
        try:
            if several and q.is_cuda and torch.cuda.current_device() != q.device.index:
                with torch.cuda.device(q.device):
                    start(q, k, v, out, lse, named)
            else:
                start(q, k, v, out, lse, named)
        except Exception as error:
            raise execution.explained(error, plan) from error
        return out, lse

    def start(q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor | None, named: dict[str, Any]) -> None:
        replay = kind.replay
        if replay is not None:
            places = [q.data_ptr(), k.data_ptr(), v.data_ptr(), out.data_ptr()]
            if lse is not None:
                places.append(lse.data_ptr())
            if named:
                places += [x.data_ptr() for x in named.values()]
            if replay(places):
                return
        if heads_first:
            q, k, v, out = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), out.transpose(1, 2)
        if rebind is not None:
            launch(q, k, v, out, lse, **fixed, **named)
        else:
            kind((q, k, v, out, lse), named)

    return run


def _contiguous(shape: tuple[int, ...]) -> tuple[int, ...]:
    strides, step = [], 1
    for size in reversed(shape):
        strides.append(step)
        step *= max(size, 1)
    return tuple(reversed(strides))


def table() -> Table:
    """What is remembered now."""
    return _bound


def forget() -> None:
    """Drop everything; the dict is replaced, so that a call that began before writes where nobody reads."""
    global _bound
    _bound = {}


dispatch.on_forget(forget)
