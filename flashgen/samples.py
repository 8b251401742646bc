"""A problem's options as tensors, drawn, for who has no call but its problem alone; and a kernel with options held to the error budget.

What `accuracy` and `gradients` do for q, k and v, this does for every option: the tuner, `flashgen check` and exported files judge kernels
with biases, masks, sinks, slopes, dropout, softcaps, windows and mods on it. The references know each option
(`reference.exact`, `reference.same_precision`); mods enter them as functions of PyTorch, written from their trace.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from flashgen import accuracy, gradients
from flashgen.accuracy import AccuracyReport, Buffers, Strides
from flashgen.config import KernelConfig
from flashgen.coverage import undrawn
from flashgen.errors import InvalidProblemError, UnsupportedProblemError
from flashgen.operands import Operands
from flashgen.problem import Problem
from flashgen.reference import Call, Result, exact, same_precision
from flashgen.spec import AttentionSpec
from flashgen.variants import by_name

_HONEST_RUNS = 4  # the error of one may be small by luck; see `same_precision`
_MOST_BYTES = 1 << 30  # of a bias or mask that differs from head to head; a larger one is shared by all heads
_PHILOX = (0x1234_5678_9ABC_DEF0, 7)


def operands(problem: Problem, *, device: str | torch.device = "cpu", seed: int = 0) -> Operands:
    """What a problem's options name, drawn: the same values on every device.

    Args:
        problem: with mods as `Problem.modified` leaves them; their samples are what is captured.
        device: where the tensors lie.
        seed: of the values.

    Returns:
        alibi_slopes (num_heads_q,) as published (2^(-8 (h + 1) / num_heads_q)); sinks (num_heads_q,) and bias (1, num_heads_q or 1, seqlen_q,
        seqlen_k), normal, in the problem's dtype; attn_mask (1, 1, seqlen_q, seqlen_k), nine of ten True; dropout's seed; and the mods as
        functions of PyTorch.

    Raises:
        UnsupportedProblemError: see `coverage.undrawn`.
    """
    why = undrawn(problem.spec)
    if why is not None:
        raise UnsupportedProblemError(f"{problem} cannot be tried alone: {why}.")
    p, generator = problem, torch.Generator().manual_seed(seed + 77)
    dtype = accuracy.TORCH_DTYPES[p.dtype]
    heads, pairs = p.num_heads_q, p.seqlen_q * p.seqlen_k
    given: dict[str, Any] = {}
    if p.has_alibi:
        given["alibi_slopes"] = torch.exp2(-8.0 * torch.arange(1, heads + 1) / heads)
    if p.has_sinks:
        given["sinks"] = torch.randn(heads, generator=generator).to(dtype)
    if p.has_bias:
        several = heads if heads * pairs * p.spec.itemsize <= _MOST_BYTES else 1
        given["bias"] = _normal((1, several, p.seqlen_q, p.seqlen_k), dtype, device, seed)
    if p.has_attn_mask:
        given["attn_mask"] = _normal((1, 1, p.seqlen_q, p.seqlen_k), torch.float32, device, seed + 1) < 1.28
    if p.dropout_p:
        given["philox"] = torch.tensor(_PHILOX)
    if p.mods is not None:
        given |= _mods(p, torch.device(device))
    placed: dict[str, Any] = {name: x.to(device) if isinstance(x, Tensor) else x for name, x in given.items()}
    return Operands(**placed)


def _normal(shape: tuple[int, ...], dtype: torch.dtype, device: str | torch.device, seed: int) -> Tensor:
    """Drawn where it lies when it is large: no CPU draws billions."""
    large = math.prod(shape) > 1 << 22
    generator = torch.Generator(device=device if large else "cpu").manual_seed(seed + 5)
    drawn = torch.empty(shape, dtype=dtype, device=device if large else "cpu").normal_(generator=generator)
    return drawn.to(device)


def _mods(problem: Problem, device: torch.device) -> dict[str, Any]:
    from flashgen.mods import in_torch

    assert problem.mods is not None
    program = problem.mods.program
    tensors = tuple(x.to(device) for x in problem.mods.samples)

    def bound(root: Any) -> Callable[..., Tensor] | None:
        if root is None:
            return None
        function = in_torch.function(root, program.captures)
        return lambda *arguments: function(*arguments, *tensors)

    return {"score_mod": bound(program.score), "mask_mod": bound(program.mask), "traced_as": (program, tensors)}


def call(problem: Problem, given: Operands, q: Tensor, k: Tensor, v: Tensor) -> Call:
    """The same call for the references; q, k and v bshd."""
    seed, offset = (0, 0) if given.philox is None else given.philox.tolist()
    return Call(
        q=q,
        k=k,
        v=v,
        sm_scale=problem.scale,
        causal=problem.causal,
        top_left=problem.causal_alignment == "top-left",
        window=problem.window_size,
        softcap=problem.softcap,
        alibi=given.alibi_slopes,
        sinks=given.sinks,
        bias=given.bias,
        attn_mask=given.attn_mask,
        score_mod=given.score_mod,
        mask_mod=given.mask_mod,
        dropout_p=problem.dropout_p,
        philox=(seed, offset),
    )


def launch_values(problem: Problem, given: Operands, config: KernelConfig) -> dict[str, Any]:
    """What `launch` takes beside its tensors and tunables."""
    return {**given.launch_values(problem, config), **by_name(config.variant).launch_options(problem)}


def strides(problem: Problem) -> dict[str, int]:
    """The strides of what `operands` draws as the rendered launch passes them, by the kernel's names.

    Of a portable backward with a bias also what it does with the bias's gradient: constants of the kernel, and 0 for a pointer that is None.
    """
    p, pairs = problem, problem.seqlen_q * problem.seqlen_k
    several = p.num_heads_q * pairs * p.spec.itemsize <= _MOST_BYTES
    found = {"stride_alibi_b": 0, "stride_alibi_h": 1, "stride_sinks": 1, "stride_ranges_b": 0, "stride_ranges_h": 0}
    for name, heads in (("bias", pairs if several and p.num_heads_q > 1 else 0), ("attn_mask", 0)):
        letters = dict(zip("bhmn", (0, heads, p.seqlen_k, 1), strict=True))
        found |= {f"stride_{name}_{letter}": step for letter, step in letters.items()}
        if name == "bias" and p.has_bias and p.op == "attention_bwd":
            found |= _of_bias_gradient(p, letters)
    if p.mods is not None:
        for row, sample in zip(p.mods.program.captures, p.mods.samples, strict=True):
            found |= {f"{row.name}_stride{dim}": step for dim, step in enumerate(sample.contiguous().stride())}
        if p.has_mask_mod:  # of tiles of 128 rows: what 16 divides there it divides of most
            depends, rows = p.mods.program.mask.depends, -(-p.seqlen_q // 128) * 4
            heads = p.num_heads_q if "h" in depends else 1
            found["stride_ranges_h"] = rows if heads > 1 else 0
            found["stride_ranges_b"] = heads * rows if "b" in depends and p.batch > 1 else 0
    return found


def _of_bias_gradient(p: Problem, bias: dict[str, int]) -> dict[str, int]:
    if not p.bias_grad:
        absent = dict.fromkeys(("dbias_ptr", "SUM_BIAS", "BIAS_ROWS", "BIAS_KEYS"), 0)
        return absent | {f"stride_dbias_{letter}": 0 for letter in bias}
    steps = {
        letter: step if size > 1 else 0
        for (letter, step), size in zip(bias.items(), (1, bias["h"], p.seqlen_q, p.seqlen_k), strict=True)
    }
    whole = p.batch == 1 and (
        bias["h"] > 0 or p.num_heads_q == 1
    )  # each element belongs to one score: stored, not summed
    return {
        **{f"stride_dbias_{letter}": step for letter, step in steps.items()},
        "SUM_BIAS": 4 if whole else 2 if p.deterministic else 1,
        "BIAS_ROWS": int(steps["m"] != 0),
        "BIAS_KEYS": int(steps["n"] != 0),
    }


def sums(problem: Problem, given: Operands) -> dict[str, Tensor | None]:
    """What a backward adds to beside dq, dk and dv, by the names of its launch: zeros in fp32; None where nobody wants it."""
    wanted = {"dsinks": given.sinks, **given.captured_gradients(problem)}
    if problem.bias_grad:
        wanted["dbias"] = given.bias
    found: dict[str, Tensor | None] = {"dbias": None} if problem.has_bias else {}
    return found | {
        name: torch.zeros(x.shape, dtype=torch.float32, device=x.device) for name, x in wanted.items() if x is not None
    }


# -- the error budget --


def small_problems(like: Problem) -> tuple[Problem, ...]:
    """`accuracy.small_problems` with the options of a problem, its numbers included."""
    names = (
        "window_size",
        "softcap",
        "dropout_p",
        "has_alibi",
        "has_sinks",
        "has_bias",
        "has_attn_mask",
        "has_score_mod",
    )
    options = {name: getattr(like, name) for name in (*names, "has_mask_mod", "bias_grad", "mods", "op")}
    return within((replace(one, **options) for one in accuracy.small_problems(like.spec)), like)


def within(problems: Iterable[Problem], like: Problem) -> tuple[Problem, ...]:
    """The problems that stay inside of what the mods of `like` captured, which is as large as its own sizes ask for.

    A call beyond it is refused before any launch, so that kernels do not look where no row or key leads them. What is too large gets the
    heads and batch of `like`; what then still is, is left out.
    """
    if like.mods is None:
        return tuple(problems)
    found: list[Problem | None] = []
    for one in problems:
        same: dict[str, Any] = {"batch": like.batch, "num_heads_q": like.num_heads_q, "num_heads_kv": like.num_heads_kv}
        shorter: dict[str, Any] = {
            name: min(getattr(one, name), getattr(like, name)) for name in ("seqlen_q", "seqlen_k")
        }
        fitting = (one, replace(one, **same), replace(one, **same, **shorter))
        found += [next(filter(_is_inside, fitting), None)]
    return tuple(dict.fromkeys(one for one in found if one is not None))


def _is_inside(problem: Problem) -> bool:
    """Whether no index of the mods surely leaves what they read."""
    assert problem.mods is not None
    sizes: dict[str, int] = {name: getattr(problem, name) for name in ("batch", "seqlen_q", "seqlen_k")}
    try:
        problem.mods.program.check_bounds(problem.mods.samples, num_heads=problem.num_heads_q, **sizes)
    except InvalidProblemError:
        return False
    return True


def of_spec(spec: AttentionSpec) -> Problem:
    """A problem of a spec that leaves its options' numbers open: a window of 37 keys and 9 more, a softcap of 4, dropout of 0.3."""
    numbers: dict[str, Any] = {"window_size": (37, 0 if spec.causal else 9)} if spec.window else {}
    numbers |= {"softcap": 4.0} if spec.softcap else {}
    numbers |= {"dropout_p": 0.3} if spec.dropout else {}
    flags = (
        "has_alibi",
        "has_sinks",
        "has_bias",
        "has_attn_mask",
        "has_score_mod",
        "has_mask_mod",
        "has_block_mask",
        "varlen",
    )
    return Problem(
        dtype=spec.dtype, batch=1, seqlen_q=128, seqlen_k=128, num_heads_q=1, num_heads_kv=1, head_dim=spec.head_dim,
        head_dim_v=spec.head_dim_v, causal=spec.causal, return_lse=spec.has_lse, op=spec.op, mods=spec.mods, **numbers,
        **{name: getattr(spec, name) for name in flags},
    )  # fmt: skip


def check_launch(
    launch: Callable[..., Any],
    like: Problem,
    config: KernelConfig,
    *,
    seed: int = 0,
    problems: Iterable[Problem] | None = None,
    device: str | torch.device = "cpu",
    strides: Iterable[Strides] = ("padded", "dense"),
) -> AccuracyReport:
    """`gradients.check_launch` for a kernel with options.

    Args:
        launch: of the kernel, the configuration's tunables bound.
        like: a problem of the kernel: its numbers (window, softcap, dropout) and mods are those of the small ones.
        config: of the launch; what is derived of a mask depends on its tile.
        seed, device, strides: as in `accuracy.check_launch`.
        problems: of that kernel; None for `small_problems(like)`.

    Returns:
        The first report that is not ok, its message naming the problem; else the one with the largest ratio.

    Raises:
        UnsupportedProblemError: see `coverage.undrawn`.
    """
    why = undrawn(like.spec)
    if why is not None:
        raise UnsupportedProblemError(f"{like.spec.key} cannot be checked alone: {why}.")
    kinds, worst = tuple(strides), None
    run = _backward if like.op == "attention_bwd" else _forward
    for index, problem in enumerate(small_problems(like) if problems is None else within(problems, like)):
        report = run(launch, replace(problem, device=str(device)), config, seed + index, kinds[index % len(kinds)])
        report = replace(report, message=f"{problem}: {report.message}")
        if not report.ok:
            return report
        if worst is None or report.ratio > worst.ratio:
            worst = report
    if worst is None:
        raise InvalidProblemError(
            "check_launch was given no problem to run: leave `problems` out, or name at least one."
        )
    return worst


@dataclass(frozen=True, slots=True)
class _Judged:
    """Inputs that several candidates get, with what they are held against, on the CPU."""

    oracle: Result
    honest: tuple[Result, ...]


def _forward(
    launch: Callable[..., Any], problem: Problem, config: KernelConfig, seed: int, strides: Strides
) -> AccuracyReport:
    given, buffers = _buffers(problem, seed, problem.device, strides)
    launch(buffers.q, buffers.k, buffers.v, buffers.o, buffers.lse, **launch_values(problem, given, config))
    judged = _references(replace(problem, device="cpu"), _contents(problem), seed, strides)
    unit, *others = (run.out for run in judged.honest)
    lse = None if buffers.lse is None else buffers.lse.cpu()
    report = accuracy.check(
        buffers.o.cpu(), lse, (judged.oracle.out, judged.oracle.lse), (unit, None), problem.dtype, others=others
    )  # fmt: skip
    found = buffers.trespasses()
    if found:
        report = replace(report, ok=False, max_ratio=math.inf, message="; ".join([*found, report.message]))
    return report


def _buffers(problem: Problem, seed: int, device: str, strides: Strides) -> tuple[Operands, Buffers]:
    """Inputs, with NaN in every key that no query of its batch may see."""
    given = operands(problem, device=device, seed=seed)
    buffers = accuracy.make_buffers(problem, seed=seed, device=device, strides=strides, with_options=True)
    seen = call(problem, given, buffers.q, buffers.k, buffers.v).visible()
    seen = seen.expand(problem.batch, problem.num_heads_q, problem.seqlen_q, problem.seqlen_k).any(1).any(1)
    for name in ("k", "v"):
        tensor = getattr(buffers, name)
        tensor.masked_fill_(~seen[:, :, None, None], math.nan)
        buffers.before[name] = buffers.allocations[name].clone()
    return given, buffers


def _contents(problem: Problem) -> tuple[int, ...]:
    """Which samples a problem's mods read: problems are equal whatever those hold. A cache that is keyed by both keeps them alive."""
    return () if problem.mods is None else tuple(map(id, problem.mods.samples))


@lru_cache(maxsize=32)
def _references(problem: Problem, contents: tuple[int, ...], seed: int, strides: Strides) -> _Judged:
    """Every candidate of a kernel gets the same inputs: the references are computed once."""
    del contents
    given, buffers = _buffers(problem, seed, "cpu", strides)
    one = call(problem, given, buffers.q, buffers.k, buffers.v)
    return _Judged(exact(one, gradients=False), same_precision(one, runs=_HONEST_RUNS, gradients=False))


def _backward(
    launch: Callable[..., Any], problem: Problem, config: KernelConfig, seed: int, strides: Strides
) -> AccuracyReport:
    given = operands(problem, device=problem.device, seed=seed)
    dlse = seed % 3 != 1
    buffers = gradients.make_gradient_buffers(
        problem, seed=seed, device=problem.device, strides=strides, dlse=dlse, drawn=_drawn
    )  # fmt: skip
    totals = sums(problem, given)
    launch(*buffers.arguments, **launch_values(problem, given, config), **totals)
    judged = _gradient_references(replace(problem, device="cpu"), _contents(problem), seed, strides, dlse)
    report = buffers.check((judged.oracle, judged.honest))
    for name in ("sinks", "bias"):
        total = totals.get(f"d{name}")
        if total is not None:
            unit, *others = (run.gradients[name] for run in judged.honest)
            oracle = (judged.oracle.gradients[name], None)
            other = accuracy.check(total.cpu(), None, oracle, (unit, None), problem.dtype, gradient=True, others=others)
            other = replace(other, message=f"d{name}: {other.message}")
            report = max(report, other, key=lambda one: (not one.ok, one.ratio))
    return report


def _drawn(problem: Problem, seed: int, strides: Strides) -> tuple[Call, Buffers]:
    """What `gradients` needs of a forward with options, on the CPU."""
    given, buffers = _buffers(replace(problem, device="cpu"), seed, "cpu", strides)
    return call(problem, given, buffers.q, buffers.k, buffers.v), buffers


@lru_cache(maxsize=16)
def _gradient_references(
    problem: Problem, contents: tuple[int, ...], seed: int, strides: Strides, dlse: bool
) -> _Judged:
    del contents
    buffers = gradients.make_gradient_buffers(problem, seed=seed, strides=strides, dlse=dlse, drawn=_drawn)
    return _Judged(exact(buffers.call), same_precision(buffers.call, runs=_HONEST_RUNS))
