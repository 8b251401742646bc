"""Calls with score_mod, mask_mod or block_mask inside of `torch.compile`, without a break of its graph.

The compiler reads the mods itself, as part of the user's function, called on single values: it guards the numbers that they read and makes the
tensors inputs of its graph. Nothing of that ever runs: PyTorch's `dynamo_bypassing_wrapper` hands us the graph that came of it before
autograd sees it, and `lower` puts an operator of `flashgen.mod_ops` in its place.

Loaded by such a call alone.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from types import FunctionType
from typing import Any, cast

import torch
from torch import Tensor, fx
from torch._dynamo.comptime import comptime
from torch._higher_order_ops.wrap import dynamo_bypassing_wrapper  # private, and the one door of its kind
from torch.overrides import TorchFunctionMode

from flashgen import autograd, checks
from flashgen.errors import InvalidProblemError
from flashgen.mod_graphs import kept
from flashgen.mod_ops import lists_of
from flashgen.operands import Operands
from flashgen.ops import TENSORS, flatten, split
from flashgen.scalars import Scalars

# Whether a function's code is a constant to the compiler; of earlier ones that is not known.
_KNOWS_CODE = tuple(int(part) for part in torch.__version__.split(".")[:2]) >= (2, 13)
_NUMBERS = (torch.int8, torch.int16, torch.int32, torch.int64)
_REFUSAL = "It must return a torch.Tensor, one value per score."


def run(q: Tensor, k: Tensor, v: Tensor, operands: Operands, scalars: Scalars) -> tuple[Tensor, Tensor]:
    """Attention, where a compiler reads this function."""
    score_mod, mask_mod, block_mask = operands.score_mod, operands.mask_mod, operands.block_mask
    mods: list[tuple[str, Any]] = [("score_mod", score_mod), ("mask_mod", mask_mod)]
    lists: list[Tensor] = []
    sizes: list[int] = []
    if block_mask is not None:
        checks.is_block_mask(block_mask)
        mods.append(("block_mask", block_mask.mask_mod))
        lists = lists_of(block_mask)
        sizes = [*block_mask.BLOCK_SIZE, *block_mask.seq_lengths]
    mods = [(name, mod) for name, mod in mods if mod is not None]
    leaves = [x for x in (q, k, v, operands.bias, operands.sinks) if x is not None]

    def body() -> tuple[Tensor, Tensor]:
        if not torch.compiler.is_compiling():
            return autograd.run(q, k, v, operands, scalars)
        # What the gradient of the output depends on, in words that the compiler knows.
        link = q.detach().new_zeros((), dtype=torch.float32)
        comptime(_begin)
        for name, mod in mods:
            of_score = name == "score_mod"
            # Of what wants no gradient the compiler would read the forward of a torch.autograd.Function alone.
            arguments = torch.ops.flashgen.mod_arguments(q, of_score and torch.is_grad_enabled())[
                0 if of_score else 1 :
            ]
            result = mod(*arguments)  # what torch.compile cannot read needs fullgraph=False
            if not isinstance(result, Tensor):
                raise InvalidProblemError(f"{name} returns no tensor under torch.compile. {_REFUSAL}")
            link = link + torch.ops.flashgen.mod_result(result, _described(name, mod)) * 0
            if of_score and torch.is_grad_enabled():  # whether what it reads wants one
                link = link + mod(*torch.ops.flashgen.mod_arguments(q, False)).sum() * 0
        comptime(_end)
        out, lse = torch.ops.flashgen.attention_mods_fwd(q, k, v, *flatten(operands, scalars), "", lists, sizes, [], [])
        for x in leaves:
            link = link + x.sum() * 0
        return out + link, lse + link

    result: tuple[Tensor, Tensor] = dynamo_bypassing_wrapper(lower, body)
    return result


class _SingleIndices(TorchFunctionMode):
    """An index without dimensions, as the compiler looks at shapes: it would ask for the number, which no one knows."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.__getitem__:
            x, index = args
            args = (x, tuple(map(_known, index)) if isinstance(index, tuple) else _known(index))
        return func(*args, **(kwargs or {}))


def _known(index: Any) -> Any:
    number = isinstance(index, Tensor) and not index.dim() and index.dtype in _NUMBERS
    return 0 if number else index


def _begin(context: Any) -> None:
    """The compiler is about to read mods; whatever ends its reading ends the mode."""
    torch._C._push_on_torch_function_stack(_SingleIndices())  # type: ignore[no-untyped-call]
    context._ComptimeContext__tx.output.add_cleanup_hook(partial(_end, None))


def _end(context: Any) -> None:
    count: int = torch._C._len_torch_function_stack()
    if count and isinstance(torch._C._get_function_stack_at(count - 1), _SingleIndices):
        torch._C._pop_torch_function_stack()


def _described(name: str, mod: Any) -> str:
    """What a mod is, and the names of what its closure holds, which the compiler numbers."""
    if _KNOWS_CODE and isinstance(mod, FunctionType):
        return name + ":" + ",".join(mod.__code__.co_freevars)
    return name


def lower(body: Any) -> Any:
    """The call that a compiler read, as operators; of a function that no compiler read, the function."""
    return partial(_lowered, body) if isinstance(body, fx.GraphModule) else body


def _lowered(body: fx.GraphModule, *given: Any) -> tuple[Tensor, Tensor]:
    inputs = dict(zip(body.graph.find_nodes(op="placeholder"), given, strict=True))
    values: dict[fx.Node, Any] = dict(inputs)

    def value(node: fx.Node) -> Any:
        if node not in values:
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), value)
            if node.op == "get_attr":
                values[node] = getattr(body, str(node.target))
            elif node.op == "call_method":
                values[node] = getattr(args[0], str(node.target))(*args[1:], **kwargs)
            else:
                values[node] = cast(Any, node.target)(*args, **kwargs)
        return values[node]

    call = next(node for node in body.graph.nodes if str(node.target).startswith("flashgen.attention_mods_fwd"))
    q, k, v, *rest = fx.node.map_arg(call.args, value)
    *rest, _, lists, sizes, _, _ = rest
    mods, found, learnable = kept(body, inputs, lists, sizes)
    wanted = [at for at in learnable if found.tensors[at].requires_grad]
    operands, scalars = split(tuple(rest))
    autograd.refuse_tangents(q, k, v, operands.bias, operands.sinks)
    leaves = (q, k, v, operands.bias, operands.sinks)
    if torch.is_grad_enabled() and (wanted or any(x is not None and x.requires_grad for x in leaves)):
        read_as = (mods, found.numbers, found.floats, wanted)
        tensors = (getattr(operands, name) for name in TENSORS)
        apply: Any = AttentionWithMods.apply
        return apply(q, k, v, read_as, replace(scalars, training=True), *tensors, *found.tensors)  # type: ignore[no-any-return]
    result: tuple[Tensor, Tensor] = torch.ops.flashgen.attention_mods_fwd(
        q, k, v, *flatten(operands, scalars), mods, found.tensors, found.numbers, found.floats, []
    )
    return result


class AttentionWithMods(torch.autograd.Function):
    """Forward and backward; saves q, k, v, out, lse, the operands and what the mods read."""

    @staticmethod
    def forward(q: Tensor, k: Tensor, v: Tensor, read_as: tuple[Any, ...], scalars: Scalars, *tensors: Any) -> Any:
        """Run the forward with lse; `tensors` are the operands and then what the mods read."""
        given, read = tensors[: len(TENSORS)], tensors[len(TENSORS) :]
        mods, *numbers = read_as
        return torch.ops.flashgen.attention_mods_fwd(q, k, v, *given, *scalars.flat(), mods, list(read), *numbers)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        """Save what the backward needs."""
        q, k, v, ctx.read_as, ctx.scalars, *tensors = inputs
        ctx.save_for_backward(q, k, v, *output, *tensors)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
        """Run the backward."""
        needed = ctx.needs_input_grad
        grads: list[Tensor | None] = [None] * len(needed)
        if dout is None and dlse is None:
            return tuple(grads)
        q, k, v, out, lse, *tensors = ctx.saved_tensors
        given, read = tensors[: len(TENSORS)], tensors[len(TENSORS) :]
        mods, numbers, floats, wanted = ctx.read_as
        dq, dk, dv, dbias, dsinks, of_read = torch.ops.flashgen.attention_mods_bwd(
            dout, dlse, q, k, v, out, lse, *given, *ctx.scalars.flat(), needed[autograd.BIAS], needed[autograd.SINKS],
            mods, read, numbers, floats, wanted,
        )  # fmt: skip
        if torch.is_grad_enabled():
            leaves = (
                q,
                k,
                v,
                given[TENSORS.index("bias")],
                given[TENSORS.index("sinks")],
                *(read[at] for at in wanted),
            )
            refuse_twice: Any = autograd.NotTwiceDifferentiable.apply
            dq, dk, dv, dbias, dsinks, *of_read = refuse_twice(
                len(leaves), *leaves, dq, dk, dv, dbias, dsinks, *of_read
            )
        grads[:3] = dq, dk, dv
        grads[autograd.BIAS], grads[autograd.SINKS] = (
            dbias if needed[autograd.BIAS] else None,
            dsinks if needed[autograd.SINKS] else None,
        )
        first = autograd.FIRST_OPERAND + len(TENSORS)
        for at, grad in zip(wanted, of_read, strict=True):
            grads[first + at] = grad
        return tuple(grads)
