"""Problems whose every byte that a kernel has no business with is NaN: made, launched, judged."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import torch

from flashgen.accuracy.budget import AccuracyReport, Pair, check
from flashgen.coverage import require_plain
from flashgen.errors import InvalidProblemError
from flashgen.problem import Problem
from flashgen.reference import attention_low_precision, attention_oracle, visible_keys
from flashgen.spec import AttentionSpec

if TYPE_CHECKING:
    from torch import Tensor

Strides = Literal["dense", "padded", "misaligned", "sbhd", "expanded", "packed", "corrupt"]
Values = Literal["normal", "low", "large"]

TORCH_DTYPES: dict[str, torch.dtype] = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}

# Bytes of all ones: NaN in every float dtype, and a pattern that no arithmetic produces, so that a write shows.
POISON = 0xFF
_GUARD_BYTES = 4096
# A size-1 dimension's stride is never used; this one lands far outside every buffer.
_CORRUPT_STRIDE = (1 << 40) + 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Buffers:
    """The tensors of one launch, each inside an allocation of its own whose every other byte is NaN.

    Attributes:
        problem: what they are for.
        q, k, v: inputs, (batch, seqlen, heads, dim); keys and values that nobody may see hold NaN.
        o: output, pre-filled with NaN.
        lse: contiguous fp32 (batch, num_heads_q, seqlen_q) pre-filled with NaN, or None.
        allocations: name -> the whole allocation, as bytes.
        before: name -> a copy of an input's allocation.

    """

    problem: Problem
    q: Tensor
    k: Tensor
    v: Tensor
    o: Tensor
    lse: Tensor | None
    allocations: dict[str, Tensor]
    before: dict[str, Tensor]

    @property
    def scalars(self) -> dict[str, Any]:
        """`sm_scale` and `causal_offset` of the launch."""
        return {"sm_scale": self.problem.scale, "causal_offset": self.problem.causal_offset}

    def references(self) -> tuple[Pair, Pair]:
        """(oracle, low-precision reference) of these inputs."""
        options: dict[str, Any] = {"causal": self.problem.causal, **self.scalars}
        return attention_oracle(self.q, self.k, self.v, **options), attention_low_precision(
            self.q, self.k, self.v, **options
        )

    def trespasses(self) -> list[str]:
        """What was written outside the outputs since they were made; call it once, after the launch."""
        found = [
            f"{name} was written to, but is an input"
            for name, old in self.before.items()
            if not torch.equal(old, self.allocations[name])
        ]
        for name, tensor in (("o", self.o), ("lse", self.lse)):
            if tensor is None:
                continue
            # Put the poison back where writing was allowed: whatever is left differs where it was not.
            saved = tensor.clone()
            poison_all(tensor)
            touched = int((self.allocations[name] != POISON).sum().item())
            tensor.copy_(saved)
            if touched:
                found.append(f"{touched} bytes outside {name} were written to")
        return found

    def check(self) -> AccuracyReport:
        """The report of what a launch left in `o` and `lse`, writes outside them included."""
        report = check(self.o, self.lse, *self.references(), self.problem.dtype)
        found = self.trespasses()
        if found:
            report = replace(report, ok=False, max_ratio=math.inf, message="; ".join([*found, report.message]))
        return report


def make_buffers(
    problem: Problem,
    *,
    seed: int = 0,
    device: str | torch.device = "cpu",
    strides: Strides = "padded",
    values: Values = "normal",
    with_options: bool = False,
) -> Buffers:
    """Inputs and outputs of a problem, poisoned wherever a kernel has no business.

    Args:
        problem: sizes, dtype, layout, causal alignment, scale.
        seed: of the inputs; drawn on the CPU, so the same on every device.
        device: where the tensors live.
        strides: `dense`; `padded` (NaN behind each head, row and sequence); `misaligned` (padded by odd amounts, at an
            odd address); `sbhd` (sequence first); `expanded` (k and v broadcast over the batch, q over its heads);
            `packed` (q, k and v interleaved in one row, as a fused projection leaves them); `corrupt` (strides of
            size-1 dimensions point far outside).
        values: `normal`; `low` (every logit far below -88.7, where a plain exp underflows); `large` (logits in the
            tens of thousands, near fp16's maximum).
        with_options: the problem's options are looked after elsewhere (`flashgen.samples`); else they are refused.

    Returns:
        The buffers.

    """
    if not with_options:
        require_plain(problem.spec, "a check of the kernel alone")
    p = problem
    dtype = TORCH_DTYPES[p.dtype]
    generator = torch.Generator().manual_seed(seed)
    shapes = {
        "q": (p.batch, p.seqlen_q, p.num_heads_q, p.head_dim),
        "k": (p.batch, p.seqlen_k, p.num_heads_kv, p.head_dim),
        "v": (p.batch, p.seqlen_k, p.num_heads_kv, p.head_dim_v),
        "o": (p.batch, p.seqlen_q, p.num_heads_q, p.head_dim_v),
    }
    tensors, allocations = {}, {}
    for name, shape in shapes.items():
        tensors[name], allocations[name] = place(shape, dtype, device, p.layout == "bhsd", strides, name)
    seen = visible_keys(p.seqlen_q, p.seqlen_k, p.causal, p.causal_offset)
    for name in ("q", "k", "v"):
        drawn = _draw(shapes[name], generator, name, values, p).to(dtype)
        if name != "q":
            drawn[:, seen:] = math.nan
        _writable(tensors[name]).copy_(_writable_like(drawn, tensors[name]))
    lse = None
    if p.spec.has_lse:
        lse, allocations["lse"] = place(
            (p.batch, p.num_heads_q, p.seqlen_q), torch.float32, device, False, "dense", "lse"
        )
    before = {name: allocations[name].clone() for name in ("q", "k", "v")}
    return Buffers(problem=p, **{n: tensors[n] for n in "qkvo"}, lse=lse, allocations=allocations, before=before)


def _draw(shape: tuple[int, ...], generator: torch.Generator, name: str, values: Values, problem: Problem) -> Tensor:
    drawn = torch.randn(shape, generator=generator)
    if name == "v" or values == "normal":
        return drawn
    if values == "low":
        # q around +c, k around -c: q·k·scale near -600 whatever the head dim, spread by a few units.
        centre = math.sqrt(600.0 / (abs(problem.scale) * problem.head_dim))
        return drawn / centre + (centre if name == "q" else -centre)
    # q·k·scale of a standard deviation near 15,000.
    return drawn * math.sqrt(15000.0 / (abs(problem.scale) * math.sqrt(problem.head_dim)))


def place(
    shape: tuple[int, ...],
    dtype: torch.dtype,
    device: str | torch.device,
    heads_first: bool,
    strides: Strides,
    name: str,
) -> tuple[Tensor, Tensor]:
    """A tensor of that shape inside a poisoned allocation, and the allocation as bytes."""
    itemsize = dtype.itemsize
    order = (0, 2, 1, 3) if heads_first else (1, 0, 2, 3) if strides == "sbhd" else tuple(range(len(shape)))
    extra = {"padded": (0, 3, 1, 8), "misaligned": (0, 1, 1, 3)}.get(strides, (0,) * len(shape))
    sizes = [size + pad for size, pad in zip(shape, extra, strict=True)]
    if strides == "packed":
        sizes[3] *= 3  # two neighbours' worth of poison between one head and the next
    if strides == "expanded" and name != "o":
        sizes[2 if name == "q" else 0] = min(1, sizes[2 if name == "q" else 0])
    steps = [0] * len(shape)
    span = 1
    for dim in reversed(order):
        steps[dim] = span
        span *= max(1, sizes[dim])
    for dim, size in enumerate(sizes):
        if size < shape[dim]:
            steps[dim] = 0  # broadcast
        if strides == "corrupt" and shape[dim] == 1 and dim != len(shape) - 1:
            steps[dim] = _CORRUPT_STRIDE
    guard = _GUARD_BYTES // itemsize
    allocation = torch.full(((2 * guard + span + 1) * itemsize,), POISON, dtype=torch.uint8, device=device)
    tensor = allocation.view(dtype).as_strided(shape, steps, guard + (strides == "misaligned"))
    return tensor, allocation


def _writable(tensor: Tensor) -> Tensor:
    """The tensor without its broadcast repetitions."""
    for dim, step in enumerate(tensor.stride()):
        if step == 0:
            tensor = tensor.narrow(dim, 0, min(1, tensor.shape[dim]))
    return tensor


def _writable_like(drawn: Tensor, tensor: Tensor) -> Tensor:
    for dim, step in enumerate(tensor.stride()):
        if step == 0:
            drawn = drawn.narrow(dim, 0, min(1, drawn.shape[dim]))
    return drawn


def poison_all(tensor: Tensor) -> None:
    """Fill a tensor with the poison that no arithmetic produces."""
    tensor.copy_(
        torch.full((tensor.element_size(),), POISON, dtype=torch.uint8, device=tensor.device).view(tensor.dtype)
    )


def small_problems(spec: AttentionSpec) -> tuple[Problem, ...]:
    """What every candidate and every winner must compute correctly before its time counts.

    Small enough for the interpreter, and between them: several unmasked blocks of every legal BLOCK_N, ragged tails of
    rows and keys, lengths of 1 and 0, a whole number of blocks, grouped heads, rows that see no key, keys that no row
    sees, a negative scale.
    """
    base = Problem(
        dtype=spec.dtype,
        batch=1,
        seqlen_q=1,
        seqlen_k=1,
        num_heads_q=1,
        num_heads_kv=1,
        head_dim=spec.head_dim,
        head_dim_v=spec.head_dim_v,
        causal=spec.causal,
        return_lse=spec.has_lse,
    )
    problems = [
        replace(base, seqlen_q=67, seqlen_k=301, num_heads_q=2),
        replace(base, batch=2, seqlen_q=33, seqlen_k=35, num_heads_q=4, num_heads_kv=2, layout="bhsd"),
        replace(base, seqlen_q=256, seqlen_k=256),
        base,
        replace(base, seqlen_q=5, seqlen_k=0),
        replace(base, seqlen_q=17, seqlen_k=64, softmax_scale=-0.3),
    ]
    if spec.causal:
        problems += [
            replace(base, seqlen_q=70, seqlen_k=19),
            replace(base, seqlen_q=20, seqlen_k=150, causal_alignment="top-left"),
        ]
    return tuple(problems)


def check_launch(
    launch: Callable[..., Any],
    spec: AttentionSpec,
    *,
    seed: int = 0,
    problems: Iterable[Problem] | None = None,
    device: str | torch.device = "cpu",
    strides: Iterable[Strides] = ("padded", "dense"),
) -> AccuracyReport:
    """Run a kernel on small poisoned problems and report the worst result.

    Args:
        launch: called as `launch(q, k, v, o, lse, sm_scale=..., causal_offset=...)`, e.g. a rendered module's launch
            with its tunables bound by `functools.partial`. Its exceptions pass through.
        spec: what the kernel was rendered for.
        seed: of the inputs.
        problems: of that spec; None for `small_problems(spec)`.
        device: where the tensors live, e.g. "cuda".
        strides: kinds of memory layout, taken in turn, one per problem.

    Returns:
        The first report that is not ok, its message naming the problem; else the one with the largest ratio.

    """
    kinds = tuple(strides)
    worst: AccuracyReport | None = None
    for index, problem in enumerate(small_problems(spec) if problems is None else problems):
        buffers = make_buffers(problem, seed=seed + index, device=device, strides=kinds[index % len(kinds)])
        launch(buffers.q, buffers.k, buffers.v, buffers.o, buffers.lse, **buffers.scalars)
        report = buffers.check()
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
