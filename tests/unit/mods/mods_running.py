"""Runs an emitted program in Triton's interpreter, and the functions themselves in PyTorch, on the same blocks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from flashgen import interpret, mods, probe
from flashgen.mods.emit import Emission
from flashgen.render import KernelSource
from flashgen.simulator import simulate
from flashgen.spec import AttentionSpec

SPEC = AttentionSpec(dtype="fp32", head_dim=16, head_dim_v=16)
CPU = torch.device("cpu")

_KERNEL = """import triton
import triton.language as tl


{helpers}


@triton.jit
def kernel(score_ptr, out_ptr, b, h, first_q, first_k, {parameters}M: tl.constexpr, N: tl.constexpr):
    offs_m = tl.arange(0, M)
    offs_n = tl.arange(0, N)
    place = offs_m[:, None] * N + offs_n[None, :]
    score = tl.load(score_ptr + place)
    q_idx = first_q + offs_m[:, None]
    kv_idx = first_k + offs_n[None, :]
{statements}
    tl.store(out_ptr + place, {result})


def launch(q, k, v, o, lse, *, sm_scale, causal_offset, b, h, first_q, first_k, shapes):
    captures = [x.as_strided(*shape) for x, shape in zip((k, v), shapes)]
    values = [y for x in captures for y in (x, *x.stride(), *x.shape)]
    M, N = q.shape[-2:]
    kernel[(1,)](q, o, b, h, first_q, first_k, *values, M=M, N=N)
"""


def source(emission: Emission, parameters: Sequence[str]) -> KernelSource:
    """A kernel that computes one emission for a block of scores."""
    text = _KERNEL.format(
        helpers="\n\n\n".join(emission.helpers),
        parameters="".join(f"{name}, " for name in parameters),
        statements=emission.block(4),
        result=f"({emission.result}).to(tl.float32)",
    )
    return KernelSource(text=text, spec=SPEC, variant="handwritten")


def in_triton(
    kind: str, function: Callable[..., Any], score: Tensor, b: int, h: int, first_q: int = 0, first_k: int = 0
) -> Tensor:
    """A mod on a block of scores (M, N), through trace, emission and Triton's interpreter; fp32, a mask's 0 and 1."""
    scores = kind == "score_mod"
    program, tensors = mods.program(function if scores else None, {} if scores else {"mask_mod": function}, CPU)
    emission = (program.emit_score if scores else program.emit_mask)(like="score")
    assert len(tensors) <= 2, "the worker takes q, k and v"
    out = torch.full((1, 1, *score.shape), torch.nan)
    tensors = [tensor.detach() for tensor in tensors]
    spare = [torch.zeros(1)] * (2 - len(tensors))
    interpret.launch(
        source(emission, program.parameters),
        score[None, None],
        *(tensor if tensor.dim() else tensor.reshape(1) for tensor in (*tensors, *spare)),
        out,
        None,
        sm_scale=1.0,
        causal_offset=0,
        b=b,
        h=h,
        first_q=first_q,
        first_k=first_k,
        shapes=[[list(tensor.shape), list(tensor.stride())] for tensor in tensors],
    )
    return out[0, 0]


def in_torch(
    kind: str, function: Callable[..., Any], score: Tensor, b: int, h: int, first_q: int = 0, first_k: int = 0
) -> Tensor:
    """The same by PyTorch itself, called as the torch backend calls it."""
    rows, columns = score.shape
    scores = kind == "score_mod"
    program, _ = mods.program(function if scores else None, {} if scores else {"mask_mod": function}, CPU)
    if program.per_score:
        function = probe.per_score(function)
    indices = (
        torch.tensor([b], dtype=torch.int32).view(1, 1, 1, 1),
        torch.tensor([h], dtype=torch.int32).view(1, 1, 1, 1),
        torch.arange(first_q, first_q + rows, dtype=torch.int32).view(1, 1, -1, 1),
        torch.arange(first_k, first_k + columns, dtype=torch.int32).view(1, 1, 1, -1),
    )
    arguments = (score[None, None].clone(), *indices) if kind == "score_mod" else indices
    with torch.no_grad():
        return function(*arguments).float().expand(1, 1, rows, columns)[0, 0]


_DERIVATIVE = """import triton
import triton.language as tl


{helpers}


@triton.jit
def kernel(score_ptr, grad_ptr, out_ptr, table_grad_ptr, h, {parameters}M: tl.constexpr, N: tl.constexpr):
    offs_m = tl.arange(0, M)
    offs_n = tl.arange(0, N)
    place = offs_m[:, None] * N + offs_n[None, :]
    score = tl.load(score_ptr + place)
    grad = tl.load(grad_ptr + place)
    b = 0
    q_idx = offs_m[:, None]
    kv_idx = offs_n[None, :]
{statements}
    tl.store(out_ptr + place, {score})
{additions}


def launch(q, k, v, o, lse, *, sm_scale, causal_offset, h, shape):
    table = v.as_strided(*shape)
    M, N = q.shape[-2:]
    table_grad = o.view(-1)[M * N :]
    table_grad.zero_()
    kernel[(1,)](q, k, o, table_grad, h, {arguments}M=M, N=N)
"""


def derivative_in_triton(
    function: Callable[..., Any], score: Tensor, grad: Tensor, h: int
) -> tuple[Tensor, dict[int, Tensor]]:
    """Gradients of a score_mod of at most one captured tensor: of the scores, and by id of the tensor."""
    program, tensors = mods.program(function, {}, CPU)
    emission = program.emit_derivative(like="score")
    assert len(tensors) <= 1
    additions = [
        f"tl.atomic_add(table_grad_ptr + {' + '.join(f'({place}) * {tensors[0].stride(d)}' for d, place in enumerate(one.places)) or 0} + "
        f"tl.zeros_like(place), ({one.value}).to(tl.float32), mask=({one.inside or 'place >= 0'}) & (place >= 0))"
        for one in emission.gradients
    ]
    text = _DERIVATIVE.format(
        helpers="\n\n\n".join(emission.helpers),
        parameters="".join(f"{name}, " for name in program.parameters),
        statements=emission.block(4),
        score=emission.score,
        additions="".join(f"    {line}\n" for line in additions),
        arguments="table, *table.stride(), *table.shape, " if tensors else "",
    )
    table = tensors[0].detach() if tensors else torch.zeros(1)
    out = torch.full((1, 1, 1, score.numel() + table.numel()), torch.nan)
    interpret.launch(
        KernelSource(text=text, spec=SPEC, variant="handwritten"),
        score[None, None],
        grad[None, None],
        table,
        out,
        None,
        sm_scale=1.0,
        causal_offset=0,
        h=h,
        shape=[list(table.shape), list(table.stride())],
    )
    flat = out.view(-1)
    tables = {id(tensors[0]): flat[score.numel() :].view(table.shape)} if emission.gradients else {}
    return flat[: score.numel()].view(score.shape), tables


# -- Gluon --

_GLUON = """from triton.experimental import gluon
from triton.experimental.gluon import language as gl


{helpers}


@gluon.jit
def kernel(score_ptr, grad_ptr, out_ptr, b, h, first_q, first_k, {parameters}M: gl.constexpr, N: gl.constexpr):
    layout: gl.constexpr = gl.BlockedLayout([1, 4], [8, 4], [4, 1], [1, 0])
    offs_m = gl.arange(0, M, layout=gl.SliceLayout(1, layout))
    offs_n = gl.arange(0, N, layout=gl.SliceLayout(0, layout))
    place = offs_m[:, None] * N + offs_n[None, :]
    score = gl.load(score_ptr + place)
    grad = gl.load(grad_ptr + place)
    q_idx = first_q + offs_m[:, None]
    kv_idx = first_k + offs_n[None, :]
{statements}
{stores}


def launch(score, grad, out, b, h, first_q, first_k, captures):
    M, N = score.shape
    values = [y for x in captures for y in (x, *x.stride(), *x.shape)]
    kernel[(1,)](score, grad, out, b, h, first_q, first_k, *values, M=M, N=N, num_warps=4)
"""


def gluon_text(
    parameters: Sequence[str], helpers: Sequence[str], statements: Sequence[str], results: Sequence[str]
) -> str:
    """A Gluon kernel that stores values of the tile's shape one after another."""
    stores = [
        f"    gl.store(out_ptr + {number} * M * N + place, ({result}).to(gl.float32))"
        for number, result in enumerate(results)
    ]
    return _GLUON.format(
        helpers="\n\n\n".join(helpers),
        parameters="".join(f"{name}, " for name in parameters),
        statements="".join(f"    {line}\n" for line in statements),
        stores="\n".join(stores),
    )


def triton_text(
    parameters: Sequence[str], helpers: Sequence[str], statements: Sequence[str], results: Sequence[str]
) -> str:
    """The same kernel in Triton."""
    text = gluon_text(parameters, helpers, statements, results)
    text = text.replace("from triton.experimental import gluon\n", "import triton\n")
    text = text.replace("from triton.experimental.gluon import language as gl\n", "import triton.language as tl\n")
    text = text.replace("    layout: gl.constexpr = gl.BlockedLayout([1, 4], [8, 4], [4, 1], [1, 0])\n", "")
    for axis in (0, 1):
        text = text.replace(f", layout=gl.SliceLayout({axis}, layout)", "")
    return text.replace("gluon.jit", "triton.jit").replace("gl.", "tl.")


def in_gluon(
    kind: str, function: Callable[..., Any], score: Tensor, b: int, h: int, first_q: int = 0, first_k: int = 0
) -> Tensor:
    """A mod on a block of scores through the Gluon emission and the simulator."""
    scores = kind == "score_mod"
    program, tensors = mods.program(function if scores else None, {} if scores else {"mask_mod": function}, CPU)
    emission = (program.emit_score if scores else program.emit_mask)(dialect=mods.GLUON, like="score")
    text = gluon_text(program.parameters, emission.helpers, emission.statements, emission.results)
    out = torch.full(tuple(score.shape), torch.nan)
    captures = [tensor.detach() if tensor.dim() else tensor.detach().reshape(1)[0:1] for tensor in tensors]
    simulate(
        text,
        {
            "score": score,
            "grad": torch.zeros_like(score),
            "out": out,
            "b": b,
            "h": h,
            "first_q": first_q,
            "first_k": first_k,
            "captures": [
                capture.view(tensor.shape) if tensor.dim() else capture[0]
                for capture, tensor in zip(captures, tensors, strict=True)
            ],
        },
    )
    return out
