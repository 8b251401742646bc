"""A call, executed: checked, resolved, and run by a generated kernel or the torch backend, forward and backward."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from flashgen import checks, compiling, garbage, settings, stand_ins, torch_blocked
from flashgen.build import build
from flashgen.dispatch import Plan, resolve
from flashgen.errors import BuildError, InvalidProblemError
from flashgen.operands import Operands
from flashgen.problem import Problem, not_built
from flashgen.render import render
from flashgen.scalars import Scalars, decode_config
from flashgen.shared_masks import kernel_spec
from flashgen.stream_capture import capturing
from flashgen.variants import by_name

logger = logging.getLogger("flashgen")

# -- the call as a checked problem --


def checked(q: Tensor, k: Tensor, v: Tensor, operands: Operands, scalars: Scalars) -> Problem:
    """The problem of a call all of whose arguments are right; nothing has been computed yet.

    Raises:
        InvalidProblemError: names the argument, what was given and what is allowed.
    """
    operands.require_tensors(q.device)
    problem = problem_of(q, k, v, operands, scalars)
    if not kernels_asked(q, scalars):
        operands.check(problem, q.device)
        return problem
    return operands.check_traced(problem, q.device)


def kernels_asked(q: Tensor, scalars: Scalars) -> bool:
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
        problem = Problem.from_packed(
            q, k, v, operands.cu_seqlens_q, operands.cu_seqlens_k, scalars.max_seqlen_q, scalars.max_seqlen_k,
            seqused_k=operands.seqused_k, **options,
        )  # fmt: skip
    else:
        problem = Problem.from_tensors(q, k, v, block_mask=operands.block_mask, layout=scalars.layout, **options)  # type: ignore[arg-type]
    # Autograd's own function runs without grad mode, which says of a bias that nobody wants its gradient.
    bias_grad = scalars.training and operands.bias is not None and operands.bias.requires_grad
    return replace(problem, bias_grad=True) if bias_grad else problem


# -- forward --


class _Ran(threading.local):
    """What ran last on this thread: its plan, for who wants to remember it; and whether its kernels are only compiled."""

    plan: Plan | None = None
    compiles_only: bool = False


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
    with garbage.put_off():
        problem = checked(q, k, v, operands, scalars)
        plan = resolve(problem, backend=scalars.backend, config=decode_config(scalars.config))
    _ran.plan = plan
    out, lse = allocate(q, v, scalars)
    wanted = lse if problem.spec.has_lse else None
    if plan.backend == "torch":
        with _exact_products(q), _reads_explained(operands):
            _run_torch(problem, q, k, v, operands, scalars.layout, out, wanted)
    else:
        q_, k_, v_, o = (x if problem.varlen else _bshd(x, scalars.layout) for x in (q, k, v, out))
        with _backward_beside(plan, q, k, v, out, lse, operands, scalars):
            _run_kernel(plan, q_, k_, v_, o, wanted, operands)
    return out, lse


def _exact_products(q: Tensor) -> AbstractContextManager[Any]:
    """Autocast has its say in the dtypes of q, k and v; the fp32 products inside are not its business."""
    device = q.device.type
    available = torch.amp.is_autocast_available(device)  # meta tensors have none
    return torch.autocast(device, enabled=False) if available and torch.is_autocast_enabled(device) else nullcontext()


@contextmanager
def _reads_explained(operands: Operands) -> Iterator[None]:
    """An index that no analysis decides, out of bounds when the torch backend runs a mod."""
    try:
        yield
    except IndexError as error:
        if not operands.has_functions:
            raise
        raise InvalidProblemError(
            f"score_mod or mask_mod reads a tensor that it captures outside its bounds: {error}. With FLASHGEN_CHECK_VALUES=1 the "
            "message says which tensor, where and at which b, h, q_idx, kv_idx."
        ) from error


def allocate(q: Tensor, v: Tensor, scalars: Scalars) -> tuple[Tensor, Tensor]:
    """The output in q's dtype, and lse in fp32: empty where nobody wants it."""
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


@garbage.put_off()
def _launch(plan: Plan, operands: Operands, *arguments: Tensor | None, **extra: Any) -> None:
    """Call the rendered launch function of a plan's operation, in the interpreter where the tensors are on the CPU."""
    problem = plan.problem
    variant = by_name(plan.variant)
    if any(checks.without_values(x) for x in arguments if x is not None):
        return  # functions have no operator around them, whose fake would have answered
    if any(x is not None and torch._C._functorch.is_functorch_wrapped_tensor(x) for x in arguments):
        raise not_built("a torch.func transform of flashgen.attention with mods or block_mask in a kernel")
    device = next(x.device for x in arguments if x is not None)
    more = {**variant.launch_options(problem), **extra, **plan.config}
    own = kernel_spec(plan)
    ways = (stand_ins.Way(own),) if _ran.compiles_only else stand_ins.ways(plan, own, operands, arguments[0])
    for way in ways:
        source = render(way.spec, variant)
        values = {**operands.launch_values(problem, plan.config, spec=way.spec, made=way.made), **more}
        if plan.target.backend == "cpu":
            from flashgen import interpret  # starts a worker process: only where somebody asked for it

            garbage.as_ever()(interpret.launch_of(source))(source, *arguments, **values)
            return
        kernel = build(source)
        if _ran.compiles_only:
            with compiling.compiling_only():
                kernel.launch(*arguments, **values)
            return
        if _beside:
            join_beside(plan)
        with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
            try:
                with compiling.refusing(way.refuses):
                    kernel.launch(*arguments, **values, **(variant.brief(own) if way.brief else {}))
            except compiling.NotCompiledError:
                continue
            except Exception as error:
                raise explained(error, plan) from error
            if way.stands_in:
                _ran.plan = None  # what runs once its own is compiled is another kernel
                values = {**operands.launch_values(problem, plan.config, spec=own, made=way.made), **more}
                build_own = lambda: build(render(own, variant)).launch  # noqa: E731
                stand_ins.compile_own(plan, way, own, build_own, arguments, values, partial(_gradients_sooner, plan))
        return


def _gradients_sooner(plan: Plan) -> threading.Thread | None:
    """What compiles a plan's backward; begins it, if the forward had nothing to compile."""
    compiling.begin_beside()
    return None if plan.backward is None else _beside.get(_kernel(plan.backward))


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


# -- the backward's kernels, compiled while the forward's are --

_beside: dict[tuple[Any, str], threading.Thread] = {}  # by the kernel that is compiled


def _kernel(plan: Plan) -> tuple[Any, str]:
    return plan.problem.spec, plan.variant


@garbage.as_ever()
def join_beside(plan: Plan) -> None:
    """Wait for the thread that compiles what would be compiled here, if there is one."""
    thread = _beside.pop(_kernel(plan), None)
    if thread is not None:
        thread.join()


def _backward_beside(
    plan: Plan, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, operands: Operands, scalars: Scalars
) -> AbstractContextManager[None]:
    """Where a forward has to be compiled and gradients will be asked for: compile theirs in another thread meanwhile.

    The backward's own launch runs there up to its kernels, on the call's tensors and with the output in the place of its gradient, so that what is
    compiled is what will be launched. It takes the memory that the backward takes for its sums. Where a gradient has other strides, or a bias wants
    one, that kernel is compiled in its turn. Where the caller's stream is captured nothing is started, so that its tensors stay the graph's.
    """
    after = plan.backward
    if after is None or after.backend == "torch" or plan.target.backend == "cpu":
        return nullcontext()
    if operands.bias is not None and operands.bias.requires_grad:  # whose sums may be as large as the scores
        return nullcontext()

    def work(q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor) -> None:
        _ran.compiles_only = True
        sinks_grad = operands.sinks is not None and operands.sinks.requires_grad
        backward(out, None, q, k, v, out, lse, operands, scalars, False, sinks_grad)

    def start() -> None:
        if capturing(q.device):
            return
        _beside[_kernel(after)] = thread = stand_ins.compile_beside(work, "flashgen-backward", q, k, v, out, lse)
        thread.start()

    return compiling.beside(start)


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
    if kernels_asked(q, scalars):  # as the forward did, or an explicit configuration would be refused here
        problem = operands.traced(problem, q.device)
    problem = replace(problem, requires_grad=True, bias_grad=bias_grad)
    plan = resolve(problem, backend=scalars.backend, config=decode_config(scalars.config)).backward
    if plan is not None and plan.backend != "torch":
        wanted = {"bias": bias_grad, "sinks": sinks_grad}
        launch = partial(_launch, plan, operands)
        return gradients(plan, launch, dout, dlse, q, k, v, out, lse, operands, scalars.layout, wanted)
    operands.require_as_traced(q.device)
    options, wanted = operands.options(problem), {"bias_grad": bias_grad, "sinks_grad": sinks_grad}
    if problem.varlen:
        packing = _packing(problem, operands, q, k)
        with _exact_products(q), _reads_explained(operands):
            return torch_blocked.packed_backward(dout, dlse, q, k, v, out, lse, packing, options, **wanted)
    q_, k_, v_, out_ = (_bshd(x, scalars.layout) for x in (q, k, v, out))
    dout_ = None if dout is None else _bshd(dout, scalars.layout)
    with _exact_products(q), _reads_explained(operands):
        dq, dk, dv, sums = torch_blocked.backward(dout_, dlse, q_, k_, v_, out_, lse, options, **wanted)
    dq, dk, dv = (_bshd(x, scalars.layout) for x in (dq, dk, dv))
    return dq.contiguous(), dk.contiguous(), dv.contiguous(), sums


def gradients(
    plan: Plan,
    launch: Callable[..., None],
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
    """Run a generated backward by its `launch`; a gradient that autograd left out counts as zero. Sums are in fp32."""
    problem = plan.problem
    make = torch.zeros if 0 in q.shape else torch.empty  # the Hopper kernel writes no dk and dv of no queries
    dq, dk, dv = (make(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    seen = (lambda x: x) if problem.varlen else (lambda x: _bshd(x, layout))
    inputs = (_unit_last_stride(seen(x)) for x in (q, k, v, out))
    dout = torch.zeros_like(out) if dout is None else dout.to(out.dtype)
    if plan.backend == "gluon" and not checks.tma_addressable(dout):
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
    launch(_unit_last_stride(seen(dout)), dlse, *inputs, lse.contiguous(), *outputs, **extra)
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
