"""The operators that PyTorch sees, `flashgen::attention_fwd` and `flashgen::attention_bwd`.

Defined with define/impl, a fake (shapes only) and a rule for vmap; autograd stands *outside* (`flashgen.autograd`): the cheapest
boundary, and one that `torch.compile(fullgraph=True)` traces through. Which kernel runs is decided inside the
operator, at run time (`flashgen.execution`), so dynamic shapes do not recompile anything. A call with Python functions (score_mod,
mask_mod, a BlockMask) cannot be an operator's argument: it runs the same code without the operator around it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from flashgen.execution import allocate, backward, cast_like, forward
from flashgen.operands import Operands
from flashgen.scalars import Scalars

# -- the schema --

TENSORS = ["alibi_slopes", "sinks", "bias", "attn_mask", "philox", "cu_seqlens_q", "cu_seqlens_k", "seqused_k"]
SCALAR_SCHEMA = (
    "bool causal, str causal_alignment, float? softmax_scale, int window_left, int window_right, float softcap, "
    "float dropout_p, SymInt max_seqlen_q, SymInt max_seqlen_k, str layout, bool return_lse, bool training, bool deterministic, str backend, str config"
)
OPERAND_SCHEMA = ", ".join(f"Tensor? {name}" for name in TENSORS)
_library = torch.library.Library("flashgen", "DEF")
_library.define(
    f"attention_fwd(Tensor q, Tensor k, Tensor v, {OPERAND_SCHEMA}, {SCALAR_SCHEMA}) -> (Tensor out, Tensor lse)"
)
_library.define(
    f"attention_bwd(Tensor? dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, {OPERAND_SCHEMA}, "
    f"{SCALAR_SCHEMA}, bool bias_grad, bool sinks_grad) -> (Tensor dq, Tensor dk, Tensor dv, Tensor dbias, Tensor dsinks)"
)


# -- the operators --


def split(arguments: tuple[Any, ...]) -> tuple[Operands, Scalars]:
    """What `flatten` made of both."""
    operands = Operands(**dict(zip(TENSORS, arguments, strict=False)))
    names = [field.name for field in fields(Scalars)]
    return operands, Scalars(**dict(zip(names, arguments[len(TENSORS) :], strict=True)))


def _attention_fwd(q: Tensor, k: Tensor, v: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    return forward(q, k, v, *split(arguments))


def _attention_fwd_fake(q: Tensor, k: Tensor, v: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    return allocate(q, v, split(arguments)[1])


def _attention_bwd(
    dout: Tensor | None, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *arguments: Any
) -> tuple[Tensor, ...]:
    *rest, bias_grad, sinks_grad = arguments
    operands, scalars = split(tuple(rest))
    dq, dk, dv, sums = backward(dout, dlse, q, k, v, out, lse, operands, scalars, bias_grad, sinks_grad)
    extra = (cast_like(sums.bias, operands.bias), cast_like(sums.sinks, operands.sinks))
    return (dq, dk, dv, *(q.new_empty((0,)) if x is None else x for x in extra))


def _attention_bwd_fake(
    dout: Tensor | None, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *arguments: Any
) -> tuple[Tensor, ...]:
    *rest, bias_grad, sinks_grad = arguments
    operands, _ = split(tuple(rest))
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
        batch = next(x.shape[1] for x in front if x is not None)
        results = tuple(x.unflatten(0, (size, batch)) if x.dim() > 1 else x.expand(size, *x.shape) for x in folded)
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
