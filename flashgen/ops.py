"""The operators that PyTorch sees, `flashgen::attention_fwd` and `flashgen::attention_bwd`, and their autograd.

Defined with define/impl and a fake (shapes only), autograd as a Function *outside* the operator: the cheapest
boundary, and one that `torch.compile(fullgraph=True)` traces through. Which kernel runs is decided inside the
operator, at run time, so dynamic shapes do not recompile anything.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from flashgen import torch_blocked
from flashgen.build import build
from flashgen.config import KernelConfig, Tunable
from flashgen.dispatch import Plan, resolve
from flashgen.errors import BuildError, InvalidProblemError
from flashgen.problem import Problem, not_built
from flashgen.render import render
from flashgen.variants import by_name

_OPTIONS = "bool causal, str causal_alignment, float? softmax_scale, str layout"

_library = torch.library.Library("flashgen", "DEF")
_library.define(
    f"attention_fwd(Tensor q, Tensor k, Tensor v, {_OPTIONS}, bool return_lse, bool training, str backend, str config)"
    " -> (Tensor, Tensor)"
)
_library.define(
    f"attention_bwd(Tensor? dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, {_OPTIONS})"
    " -> (Tensor, Tensor, Tensor)"
)


def encode_config(config: KernelConfig | dict[str, Tunable] | None) -> str:
    """A config as one string, since operators take no mappings."""
    if config is None:
        return ""
    variant = config.variant if isinstance(config, KernelConfig) else ""
    return ";".join([variant, *[f"{name}={value!r}" for name, value in config.items()]])


def _decode_config(text: str) -> KernelConfig | dict[str, Tunable] | None:
    if not text:
        return None
    variant, *items = text.split(";")
    tunables: dict[str, Tunable] = {}
    for item in items:
        name, _, value = item.partition("=")
        tunables[name] = (
            value == "True" if value in ("True", "False") else value.strip("'") if "'" in value else int(value)
        )
    return KernelConfig(variant=variant, **tunables) if variant else tunables


def _bshd(x: Tensor, layout: str) -> Tensor:
    return x if layout == "bshd" else x.transpose(1, 2)


def _unit_last_stride(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _empty_out(q: Tensor, head_dim_v: Any) -> Tensor:
    return q.new_empty((*q.shape[:3], head_dim_v))


def _attention_fwd(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    causal: bool,
    causal_alignment: str,
    softmax_scale: float | None,
    layout: str,
    return_lse: bool,
    training: bool,
    backend: str,
    config: str,
) -> tuple[Tensor, Tensor]:
    problem = Problem.from_tensors(
        q,
        k,
        v,
        causal=causal,
        causal_alignment=causal_alignment,  # type: ignore[arg-type]  # from_tensors checks it
        softmax_scale=softmax_scale,
        return_lse=return_lse,
        requires_grad=training,
        layout=layout,  # type: ignore[arg-type]
    )
    plan = resolve(problem, backend=backend, config=_decode_config(config))
    out = _empty_out(q, v.shape[3])
    has_lse = problem.spec.has_lse
    lse = q.new_empty((problem.batch, problem.num_heads_q, problem.seqlen_q) if has_lse else (0,), dtype=torch.float32)
    _run(plan, _bshd(q, layout), _bshd(k, layout), _bshd(v, layout), _bshd(out, layout), lse if has_lse else None)
    return out, lse


def _run(plan: Plan, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor | None) -> None:
    """Run a plan on `bshd` views."""
    problem = plan.problem
    if plan.backend == "torch":
        torch_blocked.forward(
            q,
            k,
            v,
            causal=problem.causal,
            causal_offset=problem.causal_offset,
            sm_scale=problem.scale,
            out=out,
            lse=lse,
        )
        return
    q, k, v = map(_unit_last_stride, (q, k, v))
    source = render(problem.spec, by_name(plan.variant))
    values: dict[str, Any] = {"sm_scale": problem.scale, "causal_offset": problem.causal_offset, **plan.config}
    if q.device.type == "cpu":
        from flashgen import interpret  # starts a worker process: only where somebody asked for it

        interpret.launch(source, q, k, v, out, lse, **values)
        return
    with torch.cuda.device(q.device):
        try:
            build(source).launch(q, k, v, out, lse, **values)
        except Exception as error:
            if type(error).__module__.startswith("triton"):
                raise BuildError(
                    f"{plan.variant} with {plan.config.label} does not run on {plan.target.name}: "
                    f"{type(error).__name__}: {error}. Pass another config=, or tune: flashgen tune {problem.tune_arguments}"
                ) from error
            raise


def _attention_fwd_fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    causal: bool,
    causal_alignment: str,
    softmax_scale: float | None,
    layout: str,
    return_lse: bool,
    training: bool,
    backend: str,
    config: str,
) -> tuple[Tensor, Tensor]:
    batch, seqlen, heads = (q.shape[0], *(q.shape[1:3] if layout == "bshd" else (q.shape[2], q.shape[1])))
    shape = (batch, heads, seqlen) if return_lse or training else (0,)
    return _empty_out(q, v.shape[3]), q.new_empty(shape, dtype=torch.float32)


def _attention_bwd(
    dout: Tensor | None,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    causal: bool,
    causal_alignment: str,
    softmax_scale: float | None,
    layout: str,
) -> tuple[Tensor, Tensor, Tensor]:
    q_, k_, v_ = (_bshd(x, layout) for x in (q, k, v))
    grads = torch_blocked.backward(
        None if dout is None else _bshd(dout, layout),
        dlse,
        q_,
        k_,
        v_,
        _bshd(out, layout),
        lse,
        causal=causal,
        causal_offset=k_.shape[1] - q_.shape[1] if causal_alignment == "bottom-right" else 0,
        sm_scale=q.shape[3] ** -0.5 if softmax_scale is None else softmax_scale,
    )
    dq, dk, dv = (_bshd(x, layout) for x in grads)
    return dq.contiguous(), dk.contiguous(), dv.contiguous()


def _attention_bwd_fake(
    dout: Tensor | None,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    causal: bool,
    causal_alignment: str,
    softmax_scale: float | None,
    layout: str,
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


_library.impl("attention_fwd", _attention_fwd, "CompositeExplicitAutograd")
_library.impl("attention_bwd", _attention_bwd, "CompositeExplicitAutograd")
torch.library.register_fake("flashgen::attention_fwd", _attention_fwd_fake, lib=_library)
torch.library.register_fake("flashgen::attention_bwd", _attention_bwd_fake, lib=_library)


class AttentionFunction(torch.autograd.Function):
    """Forward and backward of attention; saves q, k, v, out and lse, nothing of size seqlen_q x seqlen_k."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        causal: bool,
        causal_alignment: str,
        softmax_scale: float | None,
        layout: str,
        backend: str,
        config: str,
    ) -> tuple[Tensor, Tensor]:
        """Run `flashgen::attention_fwd` with lse."""
        out, lse = torch.ops.flashgen.attention_fwd(
            q, k, v, causal, causal_alignment, softmax_scale, layout, True, True, backend, config
        )
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.options = (causal, causal_alignment, softmax_scale, layout)
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
        """Run `flashgen::attention_bwd`."""
        nothing = (None,) * 6
        if dout is None and dlse is None:
            return (None, None, None, *nothing)
        # With create_graph the gradients must carry a node that refuses to be differentiated: without one they
        # would pass for constants, and a gradient penalty would be silently wrong.
        run = NotTwiceDifferentiable.apply if torch.is_grad_enabled() else torch.ops.flashgen.attention_bwd
        grads = run(dout, dlse, *ctx.saved_tensors, *ctx.options)
        return (*grads, *nothing)


class NotTwiceDifferentiable(torch.autograd.Function):
    """`flashgen::attention_bwd` as a node whose own backward is an error."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, ...]:
        """Run `flashgen::attention_bwd`."""
        grads: tuple[Tensor, ...] = torch.ops.flashgen.attention_bwd(*arguments)
        return grads

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        """Refuse."""
        raise not_built("the second derivative of flashgen.attention (double backward)")


def require_tensors(q: Any, k: Any, v: Any, layout: str) -> None:
    """Refuse here what the operator's schema would refuse without naming the argument, or send to the wrong device."""
    for name, value in (("q", q), ("k", k), ("v", v)):
        if not isinstance(value, Tensor):
            raise InvalidProblemError(f"{name} is a {type(value).__name__}: it must be a torch.Tensor.")
        if value.dim() != 4:
            order = "batch, heads, seqlen, head_dim" if layout == "bhsd" else "batch, seqlen, heads, head_dim"
            raise InvalidProblemError(f"{name} has shape {tuple(value.shape)}: it must have 4 dimensions, ({order}).")
        if value.device != q.device:
            raise InvalidProblemError(
                f"{name} is on {value.device}, q on {q.device}: q, k and v must be on one device. Move one."
            )
