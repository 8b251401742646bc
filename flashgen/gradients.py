"""The error budget of a backward: poisoned problems with gradients, and what is demanded of every candidate.

As `accuracy` does for the forward: the unit is the error of honest backwards of the inputs' dtype (`reference.same_precision`)
against fp64 autograd (`reference.exact`) on the same inputs. out and lse, which a backward takes, are the reference's own, so that
a forward kernel has no part in the verdict; `take` puts those of a kernel there. With logits in the hundreds only a pair that
rounds alike is exact: fp32 holds an lse of -600 to 6e-5, and what the forward lost the backward must lose the same way.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch

from flashgen import accuracy
from flashgen.accuracy import AccuracyReport, Buffers, Strides, Values, make_buffers, place, poison_all
from flashgen.errors import InvalidProblemError
from flashgen.problem import Problem
from flashgen.reference import Call, Result, exact, same_precision
from flashgen.spec import AttentionSpec

if TYPE_CHECKING:
    from torch import Tensor

_HONEST_RUNS = 8  # the error of one may be small by luck; see `same_precision`


@dataclass(frozen=True, slots=True, kw_only=True)
class GradientBuffers:
    """The tensors of one backward launch, each inside an allocation of its own whose every other byte is NaN.

    Attributes:
        problem: what they are for.
        inputs: dout, dlse (or None), q, k, v, out, lse, in the order of `launch`.
        outputs: dq, dk, dv, pre-filled with NaN.
        call: the same call for the references.
        allocations: name -> the whole allocation, as bytes.
        before: name -> a copy of an input's allocation.

    """

    problem: Problem
    inputs: dict[str, Tensor | None]
    outputs: dict[str, Tensor]
    call: Call
    allocations: dict[str, Tensor]
    before: dict[str, Tensor]

    @property
    def arguments(self) -> tuple[Tensor | None, ...]:
        """The positional arguments of `launch`."""
        return (*self.inputs.values(), *self.outputs.values())

    @property
    def scalars(self) -> dict[str, Any]:
        """`sm_scale` and `causal_offset` of the launch."""
        return {"sm_scale": self.problem.scale, "causal_offset": self.problem.causal_offset}

    def take(self, out: Tensor, lse: Tensor) -> None:
        """Put a forward kernel's results in the place of the reference's."""
        for name, value in (("out", out), ("lse", lse)):
            tensor = self.inputs[name]
            if tensor is not None:
                tensor.copy_(value)
                self.before[name] = self.allocations[name].clone()

    def references(self) -> tuple[Result, tuple[Result, ...]]:
        """The oracle, and honest runs in the inputs' dtype."""
        return exact(self.call), same_precision(self.call, runs=_HONEST_RUNS)

    def check(self, references: tuple[Result, tuple[Result, ...]] | None = None) -> AccuracyReport:
        """The worst of dq, dk and dv, writes outside them included; `references` spare computing them again."""
        oracle, honest = references or self.references()
        reports = []
        for name, gradient in self.outputs.items():
            exact_one = oracle.gradients[name[1:]]
            report = accuracy.check(
                gradient.cpu(),
                None,
                (exact_one, None),
                (honest[0].gradients[name[1:]], None),
                self.problem.dtype,
                gradient=True,
                unit=_unit(ByIdentity(oracle), ByIdentity(honest), name[1:], gradient.dtype)
                if gradient.numel()
                else None,
            )
            reports.append(replace(report, message=f"{name}: {report.message}"))
        worst = max(reports, key=lambda report: (not report.ok, report.ratio))
        found = self.trespasses()
        if found:
            worst = replace(worst, ok=False, max_ratio=math.inf, message="; ".join([*found, worst.message]))
        return worst

    def trespasses(self) -> list[str]:
        """What was written outside the gradients since they were made; call it once, after the launch."""
        found = [
            f"{name} was written to, but is an input"
            for name, old in self.before.items()
            if not torch.equal(old, self.allocations[name])
        ]
        for name, tensor in self.outputs.items():
            saved = tensor.clone()
            poison_all(tensor)
            touched = int((self.allocations[name] != accuracy.POISON).sum().item())
            tensor.copy_(saved)
            if touched:
                found.append(f"{touched} bytes outside {name} were written to")
        return found


class ByIdentity:
    """A key of a cache that is equal to itself alone; it keeps what it stands for alive."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __hash__(self) -> int:
        return id(self.value)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ByIdentity) and self.value is other.value


@lru_cache(maxsize=32)
def _unit(oracle: ByIdentity, honest: ByIdentity, name: str, dtype: torch.dtype) -> tuple[float, float]:
    """What honest runs err by, once for all launches on the same inputs: it took longer than to judge a launch."""
    runs = [run.gradients[name].to(dtype) for run in honest.value]
    return accuracy.unit_of(oracle.value.gradients[name], runs)


def make_gradient_buffers(
    problem: Problem,
    *,
    seed: int = 0,
    device: str | torch.device = "cpu",
    strides: Strides = "padded",
    values: Values = "normal",
    dlse: bool = True,
    drawn: Callable[[Problem, int, Strides], tuple[Call, Buffers]] | None = None,
) -> GradientBuffers:
    """Inputs and outputs of a problem's backward, poisoned wherever a kernel has no business.

    Args:
        problem, seed, device, strides, values: as in `accuracy.make_buffers`.
        dlse: whether lse has a gradient; else the launch gets None.
        drawn: makes the forward's call and buffers of a problem with options (`flashgen.samples`); None for plain attention.

    Returns:
        The buffers.

    """
    p = replace(problem, return_lse=True)
    if drawn is None:
        forward = make_buffers(p, seed=seed, device="cpu", strides=strides, values=values)
        call = _call(p, forward)
    else:
        call, forward = drawn(p, seed, strides)
    generator = torch.Generator().manual_seed(seed + 1_000_003)
    dtype = accuracy.TORCH_DTYPES[p.dtype]
    (result,) = same_precision(call, gradients=False)
    shape_o, shape_lse = tuple(result.out.shape), tuple(result.lse.shape)
    inputs_of = {
        "dout": torch.randn(shape_o, generator=generator).to(dtype),
        "dlse": torch.randn(shape_lse, generator=generator) if dlse else None,
        **{name: getattr(forward, name) for name in "qkv"},
        "out": result.out.to(dtype),
        "lse": result.lse,
    }
    call = replace(call, dout=inputs_of["dout"], dlse=inputs_of["dlse"])
    allocations: dict[str, Tensor] = {}
    inputs: dict[str, Tensor | None] = {}
    heads_first = p.layout == "bhsd"
    for name, value in inputs_of.items():
        if value is None:
            inputs[name] = None
        elif name in ("q", "k", "v") and str(device) == "cpu":
            inputs[name], allocations[name] = value, forward.allocations[name]
        else:
            plain = name in ("lse", "dlse")  # contiguous in either layout
            tensor, allocations[name] = place(
                tuple(value.shape), value.dtype, device, heads_first and not plain, "dense" if plain else strides, "o"
            )
            inputs[name] = tensor.copy_(value)
    outputs: dict[str, Tensor] = {}
    for name, like in (("dq", forward.q), ("dk", forward.k), ("dv", forward.v)):
        outputs[name], allocations[name] = place(tuple(like.shape), dtype, device, heads_first, strides, "o")
    before = {name: allocations[name].clone() for name, tensor in inputs.items() if tensor is not None}
    return GradientBuffers(problem=p, inputs=inputs, outputs=outputs, call=call, allocations=allocations, before=before)


def _call(problem: Problem, forward: Buffers) -> Call:
    return Call(
        q=forward.q,
        k=forward.k,
        v=forward.v,
        sm_scale=problem.scale,
        causal=problem.causal,
        top_left=problem.causal_alignment == "top-left",
    )


def check_launch(
    launch: Callable[..., Any],
    spec: AttentionSpec,
    *,
    seed: int = 0,
    problems: Iterable[Problem] | None = None,
    device: str | torch.device = "cpu",
    strides: Iterable[Strides] = ("padded", "dense"),
) -> AccuracyReport:
    """`accuracy.check_launch` for any operation: a backward is launched with gradients and judged by them.

    Args:
        launch: of the spec's operation, tunables bound; its exceptions pass through.
        spec, seed, problems, device, strides: as in `accuracy.check_launch`.

    Returns:
        The first report that is not ok, its message naming the problem; else the one with the largest ratio.

    """
    if spec.op != "attention_bwd":
        return accuracy.check_launch(launch, spec, seed=seed, problems=problems, device=device, strides=strides)
    kinds = tuple(strides)
    worst: AccuracyReport | None = None
    for index, problem in enumerate(small_problems(spec) if problems is None else problems):
        kind, dlse = kinds[index % len(kinds)], index % 3 != 1
        buffers = make_gradient_buffers(problem, seed=seed + index, device=device, strides=kind, dlse=dlse)
        launch(*buffers.arguments, **buffers.scalars)
        report = buffers.check(_references(problem, seed + index, kind, dlse))
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


@lru_cache(maxsize=16)
def _references(problem: Problem, seed: int, strides: Strides, dlse: bool) -> tuple[Result, tuple[Result, ...]]:
    """Every candidate of a kernel gets the same inputs: the references are computed once."""
    return make_gradient_buffers(problem, seed=seed, strides=strides, dlse=dlse).references()


def small_problems(spec: AttentionSpec) -> tuple[Problem, ...]:
    """What every candidate and every winner must differentiate correctly: as of the forward, and groups that are summed."""
    return accuracy.small_problems(spec)
