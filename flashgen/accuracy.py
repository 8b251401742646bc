"""The error budget of a kernel, and poisoned problems to hold it against.

The unit is never a hand-picked tolerance: it is the error of an honest low-precision run (`flashgen.reference`) against the
fp64 oracle on the same inputs. With (f, g) of the dtype,

    every element:  |out - oracle| <= f * max|low - oracle| + eps/2 * |oracle|
    on average:     mean|out - oracle| <= g * mean|low - oracle|      (fp32: + 1e-7)

and f and g double under 4,096 elements, too few for a ratio of statistics. A looser unit lets "one key too many at
seqlen 2048" pass in bf16; this one does not.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import torch

from flashgen.coverage import require_plain
from flashgen.errors import AccuracyError, InvalidProblemError
from flashgen.problem import Problem
from flashgen.reference import attention_low_precision, attention_oracle, visible_keys
from flashgen.spec import AttentionSpec, DType

if TYPE_CHECKING:
    from torch import Tensor

Pair = tuple["Tensor", "Tensor | None"]
Strides = Literal["dense", "padded", "misaligned", "sbhd", "expanded", "packed", "corrupt"]
Values = Literal["normal", "low", "large"]

TORCH_DTYPES: dict[str, torch.dtype] = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}

# (f, g) of outputs and of gradients; see the module's docstring.
_FACTORS: dict[str, tuple[float, float]] = {"fp16": (1.5, 1.1), "bf16": (1.5, 1.1), "fp32": (3.0, 2.0)}
_GRADIENT_FACTORS: dict[str, tuple[float, float]] = {"fp16": (2.0, 1.5), "bf16": (2.0, 1.5), "fp32": (4.0, 3.0)}
_FEW_ELEMENTS = 4096
_EPS: dict[str, float] = {"fp16": 2.0**-10, "bf16": 2.0**-7, "fp32": 2.0**-23}
_MEAN_FLOOR: dict[str, float] = {"fp16": 0.0, "bf16": 0.0, "fp32": 1e-7}
_LSE_BAR: dict[str, float] = {"fp16": 1e-4, "bf16": 1e-4, "fp32": 1e-5}

# Bytes of all ones: NaN in every float dtype, and a pattern that no arithmetic produces, so that a write shows.
POISON = 0xFF
_GUARD_BYTES = 4096
# A size-1 dimension's stride is never used; this one lands far outside every buffer.
_CORRUPT_STRIDE = (1 << 40) + 1


@dataclass(frozen=True, slots=True, kw_only=True)
class AccuracyReport:
    """How far a result is from the oracle, absolutely and in units of the budget (a ratio of at most 1 is inside).

    Attributes:
        ok: inside the budget, nothing written where it must not be.
        max_error: largest absolute error of an element.
        mean_error: mean absolute error.
        max_ratio: largest error of an element divided by what the element is allowed.
        mean_ratio: mean error divided by what it may be.
        lse_error: largest absolute error of lse; 0 where there is none.
        lse_ratio: the same divided by its bar.
        message: one line: what failed, or that nothing did.

    """

    ok: bool
    max_error: float
    mean_error: float
    max_ratio: float
    mean_ratio: float
    lse_error: float = 0.0
    lse_ratio: float = 0.0
    message: str = ""

    @property
    def ratio(self) -> float:
        """The worst of the three ratios; at most 1 is inside the budget."""
        return max(self.max_ratio, self.mean_ratio, self.lse_ratio)

    def require(self, what: str = "the kernel's result") -> None:
        """Do nothing when the result is good.

        Raises:
            AccuracyError: it is not; says by how much.

        """
        if not self.ok:
            raise AccuracyError(f"{what} is outside the error budget: {self.message}")


def check(
    out: Tensor,
    lse: Tensor | None,
    oracle: Pair,
    low: Pair,
    dtype: DType,
    *,
    gradient: bool = False,
    others: Sequence[Tensor] = (),
) -> AccuracyReport:
    """Hold one result against the budget.

    Args:
        out: what the kernel wrote, in any dtype.
        lse: its log-sum-exp, natural logarithm, or None.
        oracle: (out, lse) of `reference.attention_oracle`.
        low: (out, lse) of `reference.attention_low_precision`; its lse is not used.
        dtype: of q, k and v.
        gradient: `out` is a gradient: wider factors.
        others: what further honest runs gave, `reference.same_precision` with several runs. The unit is then the largest
            maximum and the largest mean of any run. Where few elements or few rows decide, one run's error may be near 0
            by luck, and no other honest run would be inside the budget. Where many do, all runs have nearly the same mean:
            within 30 % of the first, which a test holds. An error of a thousandth fails in fp32 all the same.

    Returns:
        The report; never raises on a bad result (see `AccuracyReport.require`).

    Raises:
        InvalidProblemError: shapes differ.

    """
    exact, unit = oracle[0], low[0]
    if {out.shape, unit.shape, *(x.shape for x in others)} != {exact.shape}:
        raise InvalidProblemError(
            f"results of different shapes cannot be compared: out {tuple(out.shape)}, oracle {tuple(exact.shape)}, "
            f"low-precision reference {tuple(unit.shape)}."
        )
    f, g = (_GRADIENT_FACTORS if gradient else _FACTORS)[dtype]
    if out.numel() < _FEW_ELEMENTS:
        f, g = 2 * f, 2 * g
    max_error = mean_error = max_ratio = mean_ratio = lse_error = lse_ratio = 0.0
    if out.numel():
        error = _absolute_error(out, exact)
        units = [_absolute_error(x, exact) for x in (unit, *others)]
        max_error, mean_error = error.max().item(), error.mean().item()
        allowed = f * max(x.max().item() for x in units) + _EPS[dtype] / 2 * exact.abs()
        max_ratio = _ratio(error, allowed).max().item()
        mean_ratio = _ratio(error.mean(), g * torch.stack([x.mean() for x in units]).max() + _MEAN_FLOOR[dtype]).item()
    if lse is not None and oracle[1] is not None and lse.numel():
        exact_lse = oracle[1]
        finite = exact_lse[torch.isfinite(exact_lse)].abs()
        bar = _LSE_BAR[dtype] * max(1.0, finite.max().item() if finite.numel() else 0.0)
        lse_error = _absolute_error(lse, exact_lse).max().item()
        lse_ratio = lse_error / bar
    report = AccuracyReport(
        ok=max(max_ratio, mean_ratio, lse_ratio) <= 1.0,
        max_error=max_error,
        mean_error=mean_error,
        max_ratio=max_ratio,
        mean_ratio=mean_ratio,
        lse_error=lse_error,
        lse_ratio=lse_ratio,
    )
    return replace(report, message=_describe(report, out, exact))


def _absolute_error(actual: Tensor, exact: Tensor) -> Tensor:
    """|actual - exact| in fp64; equal infinities are no error, NaN is an infinite one."""
    actual, exact = actual.double(), exact.double()
    error = (actual - exact).abs().masked_fill(actual == exact, 0.0)
    return error.masked_fill(error.isnan(), math.inf)


def _ratio(error: Tensor, allowed: Tensor) -> Tensor:
    """Error / allowed, where 0 of 0 is 0: an exact result needs no allowance. Never NaN."""
    ratio = (error / allowed).masked_fill(error == 0, 0.0)
    return ratio.masked_fill(ratio.isnan(), math.inf)


def _describe(report: AccuracyReport, out: Tensor, exact: Tensor) -> str:
    failed = [
        f"{name} {error:.3g} is {ratio:.3g} of what is allowed"
        for name, error, ratio in (
            ("largest error", report.max_error, report.max_ratio),
            ("mean error", report.mean_error, report.mean_ratio),
            ("lse error", report.lse_error, report.lse_ratio),
        )
        if not ratio <= 1.0
    ]
    if not failed:
        return f"inside the budget: largest error {report.max_error:.3g}, {report.ratio:.3g} of what is allowed"
    if report.max_ratio > 1.0:
        flat = int(_absolute_error(out, exact).argmax().item())
        index = tuple(int(i) for i in torch.unravel_index(torch.tensor(flat), out.shape))
        failed.append(f"worst at {index}: {out[index].item():.6g} for {exact[index].item():.6g}")
    return "; ".join(failed)


# -- poisoned problems --


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
