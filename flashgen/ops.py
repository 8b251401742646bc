"""The operators that PyTorch sees, `flashgen::attention_fwd` and `flashgen::attention_bwd`.

Defined with define/impl, a fake (shapes only) and a rule for vmap; autograd stands *outside* (`flashgen.autograd`): the cheapest
boundary, and one that `torch.compile(fullgraph=True)` traces through. Which kernel runs is decided inside the
operator, at run time, so dynamic shapes do not recompile anything. A call with Python functions (score_mod, mask_mod, a
BlockMask) cannot be an operator's argument: it runs the same code without the operator around it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor

from flashgen import settings, torch_blocked
from flashgen.build import build
from flashgen.dispatch import Plan, resolve
from flashgen.errors import BuildError, InvalidProblemError
from flashgen.operands import Operands
from flashgen.problem import Problem, not_built, tma_addressable
from flashgen.render import render
from flashgen.scalars import Scalars, decode_config
from flashgen.variants import by_name

# -- the schema --

TENSORS = ["alibi_slopes", "sinks", "bias", "attn_mask", "philox", "cu_seqlens_q", "cu_seqlens_k", "seqused_k"]
_SCALAR_SCHEMA = (
    "bool causal, str causal_alignment, float? softmax_scale, int window_left, int window_right, float softcap, "
    "float dropout_p, SymInt max_seqlen_q, SymInt max_seqlen_k, str layout, bool return_lse, bool training, bool deterministic, str backend, str config"
)
_OPERAND_SCHEMA = ", ".join(f"Tensor? {name}" for name in TENSORS)
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
    if not _kernels_asked(q, scalars):
        operands.check(problem, q.device)
        return problem
    return operands.check_traced(problem, q.device)


def _kernels_asked(q: Tensor, scalars: Scalars) -> bool:
    """Whether a generated kernel may run the call, so that mods are traced."""
    if torch.compiler.is_compiling():
        return False
    asked = settings.read().backend if scalars.backend == "auto" else scalars.backend
    named = scalars.config.startswith(("triton_", "gluon_"))  # an explicit configuration says which kernel
    return asked != "torch" and (q.device.type != "cpu" or asked != "auto" or named)


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
        "deterministic": scalars.deterministic,
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


class _Ran(threading.local):
    """What ran last on this thread: its plan, for who wants to remember it."""

    plan: Plan | None = None


_ran = _Ran()


@contextmanager
def watched() -> Iterator[_Ran]:
    """The plan of the last forward that ran inside, as `.plan` until the end of the block; None where none did."""
    _ran.plan = None
    try:
        yield _ran
    finally:
        _ran.plan = None


def forward(q: Tensor, k: Tensor, v: Tensor, operands: Operands, scalars: Scalars) -> tuple[Tensor, Tensor]:
    """Check, resolve and run; lse is empty where nobody wants it."""
    problem = checked(q, k, v, operands, scalars)
    plan = resolve(problem, backend=scalars.backend, config=decode_config(scalars.config))
    _ran.plan = plan
    out, lse = _allocate(q, v, scalars)
    wanted = lse if problem.spec.has_lse else None
    if plan.backend == "torch":
        with _exact_products(q):
            _run_torch(problem, q, k, v, operands, scalars.layout, out, wanted)
    else:
        q, k, v, o = (x if problem.varlen else _bshd(x, scalars.layout) for x in (q, k, v, out))
        _run_kernel(plan, q, k, v, o, wanted, operands)
    return out, lse


def _exact_products(q: Tensor) -> AbstractContextManager[Any]:
    """Autocast has its say in the dtypes of q, k and v; the fp32 products inside are not its business."""
    device = q.device.type
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()


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
    """Run a generated forward on `bshd` or packed views."""
    _launch(plan, operands, *map(_unit_last_stride, (q, k, v)), out, lse)


def _launch(plan: Plan, operands: Operands, *arguments: Tensor | None, **extra: Any) -> None:
    """Call the rendered launch function of a plan's operation, in the interpreter where the tensors are on the CPU."""
    problem = plan.problem
    variant = by_name(plan.variant)
    if any(x is not None and torch._C._functorch.is_functorch_wrapped_tensor(x) for x in arguments):
        # Operators never see one; functions of the user's have no operator around them.
        raise not_built(
            "a torch.func transform of flashgen.attention with score_mod, mask_mod or block_mask in a kernel"
        )
    source = render(problem.spec, variant)
    values = {**operands.launch_values(problem, plan.config), **variant.launch_options(problem), **extra, **plan.config}
    if plan.target.backend == "cpu":
        from flashgen import interpret  # starts a worker process: only where somebody asked for it

        interpret.launch_of(source)(source, *arguments, **values)
        return
    device = next(x.device for x in arguments if x is not None)
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        try:
            build(source).launch(*arguments, **values)
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
    x = x.resolve_neg()  # without an operator around it nobody has
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
    """Check, resolve and run; the gradients are contiguous in the shapes of q, k and v."""
    problem = problem_of(q, k, v, operands, scalars)
    if _kernels_asked(q, scalars):  # as the forward did, or an explicit configuration would be refused here
        problem = operands.traced(problem, q.device)
    problem = replace(problem, requires_grad=True, bias_grad=bias_grad)
    plan = resolve(problem, backend=scalars.backend, config=decode_config(scalars.config)).backward
    if plan is not None and plan.backend != "torch":
        wanted = {"bias": bias_grad, "sinks": sinks_grad}
        return _run_backward_kernel(plan, dout, dlse, q, k, v, out, lse, operands, scalars.layout, wanted)
    operands.require_as_traced(q.device)
    options, wanted = operands.options(problem), {"bias_grad": bias_grad, "sinks_grad": sinks_grad}
    if problem.varlen:
        packing = _packing(problem, operands, q, k)
        with _exact_products(q):
            return torch_blocked.packed_backward(dout, dlse, q, k, v, out, lse, packing, options, **wanted)
    q_, k_, v_, out_ = (_bshd(x, scalars.layout) for x in (q, k, v, out))
    dout_ = None if dout is None else _bshd(dout, scalars.layout)
    with _exact_products(q):
        dq, dk, dv, sums = torch_blocked.backward(dout_, dlse, q_, k_, v_, out_, lse, options, **wanted)
    dq, dk, dv = (_bshd(x, scalars.layout) for x in (dq, dk, dv))
    return dq.contiguous(), dk.contiguous(), dv.contiguous(), sums


def _run_backward_kernel(
    plan: Plan,
    dout: Tensor | None,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    operands: Operands,
    layout: str,
    wanted: dict[str, bool],
) -> tuple[Tensor, Tensor, Tensor, torch_blocked.GradientSums]:
    """Run a generated backward; a gradient that autograd left out counts as zero. Sums are in fp32."""
    problem = plan.problem
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    seen = (lambda x: x) if problem.varlen else (lambda x: _bshd(x, layout))
    inputs = (_unit_last_stride(seen(x)) for x in (q, k, v, out))
    dout = torch.zeros_like(out) if dout is None else dout.to(out.dtype)
    if plan.backend == "gluon" and not tma_addressable(dout):
        dout = dout.contiguous()
    dlse = None if dlse is None else dlse.float().contiguous().resolve_neg()

    def sum_of(x: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.zeros(x.shape, dtype=dtype, device=q.device)

    extra: dict[str, Tensor | None] = {}
    if operands.sinks is not None:
        extra["dsinks"] = sum_of(operands.sinks)  # cheap beside the rest: always written
    if operands.bias is not None:
        # Where each score has its own bias nothing is summed, and the portable kernel rounds as it stores.
        scores = (problem.batch, problem.num_heads_q, problem.seqlen_q, problem.seqlen_k)
        stored = plan.backend == "triton" and tuple(operands.bias.shape) == scores
        dtype = operands.bias.dtype if stored else torch.float32
        extra["dbias"] = sum_of(operands.bias, dtype) if wanted["bias"] else None
    captured = operands.captured_gradients(problem)
    extra |= {name: sum_of(x) for name, x in captured.items()}
    outputs = (seen(x) for x in (dq, dk, dv))
    _launch(plan, operands, _unit_last_stride(seen(dout)), dlse, *inputs, lse.contiguous(), *outputs, **extra)
    totals = {id(x): extra[name] for name, x in captured.items()}
    sums = torch_blocked.GradientSums(
        bias=extra.get("dbias"),
        sinks=extra.get("dsinks") if wanted["sinks"] else None,
        captured=[totals.get(id(x), sum_of(x)) for x in operands.options_captured()],  # type: ignore[misc]
    )
    return dq, dk, dv, sums


def cast_like(total: Tensor | None, x: Tensor | None) -> Tensor | None:
    """An fp32 sum of gradients in the dtype of what it belongs to."""
    return None if total is None or x is None else total.to(x.dtype)


# -- the operators --


def _split(arguments: tuple[Any, ...]) -> tuple[Operands, Scalars]:
    operands = Operands(**dict(zip(TENSORS, arguments, strict=False)))
    names = [field.name for field in fields(Scalars)]
    return operands, Scalars(**dict(zip(names, arguments[len(TENSORS) :], strict=True)))


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
    extra = (cast_like(sums.bias, operands.bias), cast_like(sums.sinks, operands.sinks))
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


def mapped(
    run: Callable[..., tuple[Tensor, ...]],
    size: int,
    tensors: Sequence[Tensor | None],
    dims: Sequence[int | None],
    rest: Sequence[Any],
    rest_dims: Sequence[int | None],
) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
    """An operation under vmap, whose tensors start with the batch: the mapped dimension is folded into it.

    With operands beside them (a bias, packed sequences, dropout's seed) the items run one after another.

    Args:
        run: called as `run(*tensors, *rest)`.
        size: of the mapped dimension.
        tensors: batch first.
        dims: where each is mapped, None for nowhere.
        rest: what follows them: operands first, scalars after.
        rest_dims: likewise.

    Returns:
        The results, mapped at dimension 0, and those zeros.
    """
    front = [
        None if x is None else x.expand(size, *x.shape) if dim is None else x.movedim(dim, 0)
        for x, dim in zip(tensors, dims, strict=True)
    ]
    if not any(isinstance(x, Tensor) for x in rest):
        folded = run(*(None if x is None else x.flatten(0, 1) for x in front), *rest)
        results = tuple(x.unflatten(0, (size, -1)) if x.dim() > 1 else x.expand(size, *x.shape) for x in folded)
    else:
        others = [
            [x if dim is None else x.select(dim, index) for x, dim in zip(rest, rest_dims, strict=True)]
            for index in range(size)
        ]
        items = [run(*(None if x is None else x[index] for x in front), *others[index]) for index in range(size)]
        results = tuple(torch.stack(parts) for parts in zip(*items, strict=True))
    return results, (0,) * len(results)


def _attention_fwd_vmap(info: Any, in_dims: tuple[Any, ...], *arguments: Any) -> Any:
    operator = torch.ops.flashgen.attention_fwd
    return mapped(operator, info.batch_size, arguments[:3], in_dims[:3], arguments[3:], in_dims[3:])


def _attention_bwd_vmap(info: Any, in_dims: tuple[Any, ...], *arguments: Any) -> Any:
    operator = torch.ops.flashgen.attention_bwd
    return mapped(operator, info.batch_size, arguments[:7], in_dims[:7], arguments[7:], in_dims[7:])


torch.library.register_vmap("flashgen::attention_fwd", _attention_fwd_vmap, lib=_library)
torch.library.register_vmap("flashgen::attention_bwd", _attention_bwd_vmap, lib=_library)


def flatten(operands: Operands, scalars: Scalars) -> tuple[Any, ...]:
    """Everything behind q, k and v, in the schema's order."""
    return (*(getattr(operands, name) for name in TENSORS), *scalars.flat())


def wants_gradient(q: Tensor, k: Tensor, v: Tensor, operands: Operands, captured: tuple[Tensor, ...]) -> bool:
    """Whether autograd will ask for a backward."""
    leaves = (q, k, v, operands.bias, operands.sinks, *captured)
    return torch.is_grad_enabled() and any(x is not None and _requires_grad(x) for x in leaves)


def _requires_grad(x: Tensor) -> bool:
    """Of a tensor or of what `torch.func` wrapped: inside vmap a batched tensor hides that its values are recorded outside."""
    functorch: Any = torch._C._functorch
    if (
        torch.compiler.is_compiling()
    ):  # it cannot look inside: such a graph is broken or refused, never without gradients
        return x.requires_grad or bool(functorch.is_batchedtensor(x))
    while not x.requires_grad and functorch.is_batchedtensor(x):
        x = functorch.get_unwrapped(x)
    return x.requires_grad


def draw_philox(q: Tensor, dropout_p: float, generator: torch.Generator | None) -> Tensor | None:
    """Dropout's seed and offset, drawn on the tensors' device, so that nothing synchronises and graphs replay."""
    if not dropout_p:
        return None
    return torch.randint(0, 2**63 - 1, (2,), dtype=torch.int64, device=q.device, generator=generator)
