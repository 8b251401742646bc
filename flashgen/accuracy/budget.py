"""The budget, and one result held against it; the package's docstring says why the unit is what it is."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from flashgen.errors import AccuracyError, InvalidProblemError
from flashgen.spec import DType

if TYPE_CHECKING:
    from torch import Tensor

Pair = tuple["Tensor", "Tensor | None"]

# (f, g) of outputs and of gradients; see the package's docstring.
_FACTORS: dict[str, tuple[float, float]] = {"fp16": (1.5, 1.1), "bf16": (1.5, 1.1), "fp32": (3.0, 2.0)}
_GRADIENT_FACTORS: dict[str, tuple[float, float]] = {"fp16": (2.0, 1.5), "bf16": (2.0, 1.5), "fp32": (4.0, 3.0)}
_FEW_ELEMENTS = 4096
_EPS: dict[str, float] = {"fp16": 2.0**-10, "bf16": 2.0**-7, "fp32": 2.0**-23}
_MEAN_FLOOR: dict[str, float] = {"fp16": 0.0, "bf16": 0.0, "fp32": 1e-7}
_LSE_BAR: dict[str, float] = {"fp16": 1e-4, "bf16": 1e-4, "fp32": 1e-5}


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
    unit: tuple[float, float] | None = None,
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
        unit: `unit_of` these honest runs, where it is known already.

    Returns:
        The report; never raises on a bad result (see `AccuracyReport.require`).

    Raises:
        InvalidProblemError: shapes differ.

    """
    exact, first = oracle[0], low[0]
    if {out.shape, first.shape, *(x.shape for x in others)} != {exact.shape}:
        raise InvalidProblemError(
            f"results of different shapes cannot be compared: out {tuple(out.shape)}, oracle {tuple(exact.shape)}, "
            f"low-precision reference {tuple(first.shape)}."
        )
    f, g = (_GRADIENT_FACTORS if gradient else _FACTORS)[dtype]
    if out.numel() < _FEW_ELEMENTS:
        f, g = 2 * f, 2 * g
    max_error = mean_error = max_ratio = mean_ratio = lse_error = lse_ratio = 0.0
    if out.numel():
        error = _absolute_error(out, exact)
        largest, mean = unit or unit_of(exact, (first, *others))
        max_error, mean_error = error.max().item(), error.mean().item()
        allowed = f * largest + _EPS[dtype] / 2 * exact.abs()
        max_ratio = _ratio(error, allowed).max().item()
        mean_ratio = _ratio(error.mean(), error.new_tensor(g * mean + _MEAN_FLOOR[dtype])).item()
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


def unit_of(exact: Tensor, runs: Sequence[Tensor]) -> tuple[float, float]:
    """The largest maximum and the largest mean error of honest runs, each in the dtype of what is judged; not of empty ones."""
    errors = [_absolute_error(x, exact) for x in runs]
    return max(x.max().item() for x in errors), torch.stack([x.mean() for x in errors]).max().item()


def _absolute_error(actual: Tensor, exact: Tensor) -> Tensor:
    """|actual - exact| in fp64; equal infinities are no error, NaN is an infinite one."""
    actual, exact = actual.double(), exact.double()
    error = (actual - exact).abs_()
    if not error.numel() or not error.max().isnan():  # a maximum is NaN where anything is
        return error
    return error.masked_fill(actual == exact, 0.0).nan_to_num_(nan=math.inf, posinf=math.inf)


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
