"""What a measuring worker does with a candidate: checks it, times it, and checks it again.

Before a time counts the candidate has passed the error budget on a poisoned problem that is the tuned one cut short, and so runs the same
binary; then it runs on the tuned problem. There every
buffer lies between guard bytes, the output holds NaN before each launch, and each timed launch must leave the very bits of the first one.
After the timing guards and inputs are looked at, and rows of the output are held against the fp64 oracle: faults
that only show at full size, or only in the twentieth launch, are wrong results like any other. Who wins has passed all small problems, too
(`final`): they are compiled for, each some seconds, and that is worth it for one.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from flashgen import accuracy
from flashgen.bench import PROTOCOL_GRAPH, PROTOCOL_SEARCH, measure
from flashgen.build import build
from flashgen.problem import Problem
from flashgen.reference import attention_low_precision, attention_oracle
from flashgen.render import KernelSource
from flashgen.spec import AttentionSpec
from flashgen.tuner.faults import WrongResultError
from flashgen.tuner.providers import GRAPH_LAUNCHES, Provider

if TYPE_CHECKING:
    from torch import Tensor

CENSOR_FACTOR = 3.0  # one launch slower than this many times the best so far is not timed further
_POISON = 0xFF  # bytes of all ones: NaN in every float dtype
_GUARD_BYTES = 4096
_CHECKED_ROWS = 64
_MOST_COPIES = 64
_LENGTHS = 768  # a multiple of every tile's rows and keys: what is cut by it keeps its remainders


@dataclass(frozen=True, slots=True)
class Guarded:
    """A dense tensor between guard bytes."""

    tensor: Tensor
    allocation: Tensor

    def intact(self) -> bool:
        """Whether nothing was written beside the tensor."""
        end = self.allocation.numel() - _GUARD_BYTES
        return bool((self.allocation[:_GUARD_BYTES] == _POISON).all() & (self.allocation[end:] == _POISON).all())


def guarded(shape: tuple[int, ...], dtype: Any, device: str) -> Guarded:
    """A tensor of NaN in an allocation with guards; it starts at a multiple of 16 bytes, as torch's own do."""
    import torch

    size = math.prod(shape) * dtype.itemsize
    padded = -(-size // 16) * 16
    allocation = torch.full((padded + 2 * _GUARD_BYTES,), _POISON, dtype=torch.uint8, device=device)
    return Guarded(allocation[_GUARD_BYTES : _GUARD_BYTES + size].view(dtype).view(shape), allocation)


def _bits(tensor: Tensor) -> Tensor:
    """A sum of the tensor's bits that no order of addition changes; stays on the device."""
    import torch

    words = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[tensor.element_size()]
    return tensor.view(words).sum(dtype=torch.int64)


@dataclass(slots=True, kw_only=True)
class Case:
    """The tuned problem on the device: made once, used for every candidate.

    Attributes:
        key: which kernel and problem.
        inputs: q, k, v; `copies` more of them where short kernels rotate.
    """

    key: str
    problem: Problem
    spec: AttentionSpec
    launch: Callable[..., None]
    provider: Provider
    inputs: tuple[Guarded, Guarded, Guarded]
    out: Guarded
    lse: Guarded | None
    sums: list[int] = field(default_factory=list)
    copies: list[tuple[Tensor, Tensor, Tensor]] = field(default_factory=list)

    @property
    def scalars(self) -> dict[str, Any]:
        """What the launch takes besides tensors."""
        return {"sm_scale": self.problem.scale, "causal_offset": self.problem.causal_offset}

    def run_on(self, q: Tensor, k: Tensor, v: Tensor, config: dict[str, Any]) -> None:
        """One launch."""
        lse = None if self.lse is None else self.lse.tensor
        self.launch(q, k, v, self.out.tensor, lse, **self.scalars, **config)

    def poison(self) -> None:
        """Fill the outputs with NaN."""
        self.out.tensor.fill_(math.nan)
        if self.lse is not None:
            self.lse.tensor.fill_(math.nan)

    def outputs(self) -> list[Tensor]:
        """Out, and lse where there is one."""
        return [self.out.tensor] + ([] if self.lse is None else [self.lse.tensor])

    def rotated(self) -> list[tuple[Tensor, Tensor, Tensor]]:
        """The inputs and as many copies that all together outgrow the cache."""
        own = tuple(one.tensor for one in self.inputs)
        size = sum(tensor.numel() * tensor.element_size() for tensor in own) or 1
        wanted = min(_MOST_COPIES, 1 + self.provider.cache_bytes // size)
        while len(self.copies) < wanted - 1:
            self.copies.append(tuple(tensor.clone() for tensor in own))  # type: ignore[arg-type]
        return [own, *self.copies]  # type: ignore[list-item]


def prepare(request: dict[str, Any], provider: Provider) -> Case:
    """Import the kernel and make the problem's tensors."""
    import torch

    fields = dict(request["problem"])
    fields |= {name: tuple(fields[name]) for name in ("window_size", "copies", "unaligned")}
    p = Problem(**fields)
    spec = AttentionSpec.from_key(request["spec"])
    source = KernelSource(text=request["text"], spec=spec, variant=request["variant"])
    dtype, device = accuracy.TORCH_DTYPES[p.dtype], provider.device
    generator = torch.Generator(device=device).manual_seed(0)
    shapes = (
        (p.batch, p.seqlen_q, p.num_heads_q, p.head_dim),
        (p.batch, p.seqlen_k, p.num_heads_kv, p.head_dim),
        (p.batch, p.seqlen_k, p.num_heads_kv, p.head_dim_v),
    )
    inputs = tuple(guarded(shape, dtype, device) for shape in shapes)
    for one in inputs:
        one.tensor.normal_(generator=generator)  # zeros draw less power and clock higher than what users run
    lse = guarded((p.batch, p.num_heads_q, p.seqlen_q), torch.float32, device) if spec.has_lse else None
    return Case(
        key=request["key"],
        problem=p,
        spec=spec,
        launch=build(source).launch,
        provider=provider,
        inputs=inputs,  # type: ignore[arg-type]
        out=guarded((p.batch, p.seqlen_q, p.num_heads_q, p.head_dim_v), dtype, device),
        lse=lse,
        sums=[int(_bits(one.tensor)) for one in inputs],
    )


class Contestant:
    """One configuration on the tuned problem, every launch of it watched."""

    def __init__(self, case: Case, config: dict[str, Any]) -> None:
        self._case, self._config = case, config
        q, k, v = case.inputs
        self._own = (q.tensor, k.tensor, v.tensor)
        self._first: list[Tensor] = []
        self._strayed: Tensor | None = None
        self._replay: Callable[[], object] | None = None
        self.launches = 1

    def first(self) -> None:
        """The first launch: faults show here, and its bits are what all others must repeat.

        Raises:
            WrongResultError: NaN is left, or something was written where it must not be.
        """
        self._case.poison()
        self._run()
        self._case.provider.synchronize()
        if any(bool(out.isnan().any()) for out in self._case.outputs()):
            raise WrongResultError("the output holds NaN: not every row was written, or what was written is wrong")
        self._first = [_bits(out) for out in self._case.outputs()]
        self._look()

    def once(self) -> float:
        """Milliseconds of a launch; what it left is compared with the first, on the device and outside the timed span."""
        self._case.poison()
        time = self._case.provider.once(self._replay or self._run) / self.launches
        differs = [_bits(out) != old for out, old in zip(self._case.outputs(), self._first, strict=True)]
        strayed = differs[0] | differs[-1]
        self._strayed = strayed.int() if self._strayed is None else self._strayed + strayed
        return time

    def shorten(self) -> None:
        """From now on time several launches at once, each on the next copy of the inputs."""
        copies = self._case.rotated()
        count = max(GRAPH_LAUNCHES, len(copies))
        runs = [partial(self._case.run_on, *copies[i % len(copies)], self._config) for i in range(count)]
        self._replay, self.launches = self._case.provider.together(runs), count

    def check(self) -> accuracy.AccuracyReport:
        """The verdict after the timing.

        Raises:
            WrongResultError: launches differed, guards or inputs were written to, or rows left the error budget.
        """
        self._case.provider.synchronize()
        if self._strayed is not None and int(self._strayed):
            raise WrongResultError(f"{int(self._strayed)} timed launches left another output than the first one")
        self._case.poison()
        self._run()
        self._case.provider.synchronize()
        self._look()
        report = spot_check(self._case)
        if not report.ok:
            raise WrongResultError(f"on the tuned problem: {report.message}")
        return report

    def _run(self) -> None:
        self._case.run_on(*self._own, self._config)

    def _look(self) -> None:
        case = self._case
        guards = {"q": case.inputs[0], "k": case.inputs[1], "v": case.inputs[2], "o": case.out, "lse": case.lse}
        touched = [name for name, one in guards.items() if one is not None and not one.intact()]
        written = [
            name for name, one, old in zip("qkv", case.inputs, case.sums, strict=True) if int(_bits(one.tensor)) != old
        ]
        if touched or written:
            found = [f"bytes beside {name} were written to" for name in touched]
            found += [f"{name} is an input and was written to" for name in written]
            raise WrongResultError("; ".join(found), spoilt=True)


def spot_check(case: Case) -> accuracy.AccuracyReport:
    """Blocks of rows of the first and the last (batch, head), at the start, in the middle and at the end, against the oracle."""
    import torch

    p = case.problem
    if not case.out.tensor.numel():
        return accuracy.check(case.out.tensor, None, (case.out.tensor, None), (case.out.tensor, None), p.dtype)
    q, k, v = (one.tensor for one in case.inputs)
    starts = sorted({0, max(0, p.seqlen_q // 2 - _CHECKED_ROWS), max(0, p.seqlen_q - _CHECKED_ROWS)})
    group = p.num_heads_q // p.num_heads_kv
    found: list[list[Tensor]] = [[], [], []]
    for batch, head in dict.fromkeys(((0, 0), (p.batch - 1, p.num_heads_q - 1))):
        keys = tuple(x[batch : batch + 1, :, head // group : head // group + 1] for x in (k, v))
        for start in starts:
            rows = slice(start, start + _CHECKED_ROWS)
            options: dict[str, Any] = {
                "causal": p.causal,
                "sm_scale": p.scale,
                "causal_offset": p.causal_offset + start,
            }
            block = q[batch : batch + 1, rows, head : head + 1]
            found[0].append(case.out.tensor[batch : batch + 1, rows, head : head + 1])
            found[1].append(attention_oracle(block, *keys, **options)[0])
            found[2].append(attention_low_precision(block, *keys, **options)[0])
    out, oracle, low = (torch.cat(blocks, dim=1) for blocks in found)
    return accuracy.check(out, None, (oracle, None), (low, None), p.dtype)  # type: ignore[arg-type]


def cut(problem: Problem) -> Problem:
    """A problem of at most some 1,500 rows and keys that is compiled like this one: as ragged, as aligned, its heads as grouped."""

    def shorter(length: int) -> int:
        return length if length < 2 * _LENGTHS else _LENGTHS + length % _LENGTHS

    heads = problem.num_heads_kv
    # Where the head dims are no multiples of 16, the number of heads decides whether the strides are.
    if problem.head_dim % 16 == 0 and problem.head_dim_v % 16 == 0:
        heads = min(heads, 2)
    group = problem.num_heads_q // max(1, problem.num_heads_kv)
    return replace(
        problem, batch=2, seqlen_q=shorter(problem.seqlen_q), seqlen_k=shorter(problem.seqlen_k), num_heads_q=heads * group,
        num_heads_kv=heads,
    )  # fmt: skip


def run_trial(case: Case, request: dict[str, Any]) -> dict[str, Any]:
    """Check, screen with one launch, time, check again.

    Raises:
        WrongResultError: see `Contestant`.
    """
    provider, config = case.provider, request["config"]
    # Dense strides are what is timed; every other kind of stride would compile the candidate once more.
    report = accuracy.check_launch(
        partial(case.launch, **config),
        case.spec,
        device=provider.device,
        strides=("dense",),
        problems=[cut(case.problem)],
    )
    verdict = {"max_abs_error": report.max_error, "error_ratio": report.ratio}
    if not report.ok:
        return {"status": "wrong_result", "message": report.message[:500], **verdict}
    contestant = Contestant(case, config)
    contestant.first()
    screen, best = contestant.once(), request["best_ms"]
    if best is not None and screen > CENSOR_FACTOR * max(best, provider.short_ms):
        screen = min(screen, contestant.once(), contestant.once())  # it may have been the machine
    if best is not None and screen > CENSOR_FACTOR * max(best, provider.short_ms):
        message = f"the best of three launches took {screen:.4g} ms, over {CENSOR_FACTOR:g} times the best so far"
        return {"status": "censored", "message": message, **verdict}
    protocol = PROTOCOL_SEARCH
    if screen < provider.short_ms:
        contestant.shorten()
        protocol = PROTOCOL_GRAPH
    times = measure(contestant.once, once=lambda run: run(), protocol=protocol)  # type: ignore[arg-type, return-value]
    after = contestant.check()
    verdict = {
        "max_abs_error": max(report.max_error, after.max_error),
        "error_ratio": max(report.ratio, after.ratio),
    }
    figures = {name: getattr(times, name) for name in ("latency_ms", "latency_p10_ms", "latency_p90_ms", "protocol")}
    return {"status": "ok", **verdict, **figures}
