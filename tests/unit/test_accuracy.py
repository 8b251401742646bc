"""The budget: what it must catch, what it must let pass, and that the poison of its problems is live."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from flashgen import accuracy
from flashgen.accuracy import TORCH_DTYPES, check, check_launch, make_buffers, small_problems
from flashgen.errors import AccuracyError, InvalidProblemError
from flashgen.problem import Problem
from flashgen.reference import attention_low_precision, attention_oracle
from flashgen.spec import AttentionSpec

DTYPES = ("fp16", "bf16", "fp32")


def blocked(
    q: Tensor, k: Tensor, v: Tensor, *, causal: bool, causal_offset: int, sm_scale: float, block: int = 64
) -> tuple[Tensor, Tensor]:
    """An honest flash forward of one head, in base 2 with a running maximum, as kernels do it."""
    q_rows, keys, values = q[0, :, 0].float(), k[0, :, 0].float(), v[0, :, 0].float()
    rows = torch.arange(len(q_rows))[:, None]
    scale = sm_scale * math.log2(math.e)
    m = torch.full((len(q_rows), 1), -torch.inf)
    total, acc = torch.zeros_like(m), torch.zeros(len(q_rows), values.shape[1])
    for start in range(0, len(keys), block):
        s = q_rows @ keys[start : start + block].T * scale
        if causal:
            s = s.masked_fill(torch.arange(start, start + s.shape[1])[None, :] > rows + causal_offset, -torch.inf)
        new = torch.maximum(m, s.amax(1, keepdim=True))
        safe = new.masked_fill(new == -torch.inf, 0.0)
        p, alpha = torch.exp2(s - safe), torch.exp2(m - safe)
        total = total * alpha + p.sum(1, keepdim=True)
        acc = acc * alpha + p.to(q.dtype).float() @ values[start : start + block]
        m = new
    out = (acc / total.masked_fill(total == 0, 1.0)).to(q.dtype)
    lse = (m + torch.log2(total)) * math.log(2)
    return out[None, :, None], lse.T[None]


def case(dtype: str, seqlen: int, head_dim: int = 64, seed: int = 0) -> tuple[Tensor, ...]:
    g = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(1, seqlen, 1, head_dim, generator=g).to(TORCH_DTYPES[dtype]) for _ in range(3))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_one_key_too_many_at_2048_is_caught(dtype: Any, causal: bool) -> None:
    """The mistake a loose tolerance lets pass: by the maximum and, independently, by the mean and by lse."""
    q, k, v = case(dtype, 2048)
    options: dict[str, Any] = {"causal": causal, "sm_scale": 0.125}
    seen = slice(None) if causal else slice(0, 2047)
    oracle = attention_oracle(q, k[:, seen], v[:, seen], causal_offset=0, **options)
    low = attention_low_precision(q, k[:, seen], v[:, seen], causal_offset=0, **options)
    out, lse = blocked(q, k, v, causal_offset=1, **options)
    report = check(out, lse, oracle, low, dtype)
    assert not report.ok
    assert report.max_ratio > 2
    assert report.mean_ratio > 2
    assert report.lse_ratio > 2
    with pytest.raises(AccuracyError, match="the kernel is outside the error budget: largest error"):
        report.require("the kernel")


@pytest.mark.parametrize("seqlen", [1, 7, 64, 333, 2048])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_honest_blocked_computation_passes(dtype: Any, causal: bool, seqlen: int) -> None:
    for seed in range(1 if seqlen > 1000 else 6):
        q, k, v = case(dtype, seqlen, (16, 64, 33)[seed % 3], seed)
        options: dict[str, Any] = {"causal": causal, "causal_offset": 0, "sm_scale": 0.2}
        oracle, low = attention_oracle(q, k, v, **options), attention_low_precision(q, k, v, **options)
        check(*blocked(q, k, v, **options, block=32), oracle, low, dtype).require(f"seed {seed}")


def parts(dtype: Any, numel: int, unit: float) -> tuple[Tensor, Tensor, Tensor]:
    """Oracle 0 and a low-precision run whose every error is `unit`."""
    exact = torch.zeros(numel, dtype=torch.float64)
    low = torch.full((numel,), unit, dtype=torch.float64)
    return exact, low, exact.clone()


@pytest.mark.parametrize(("dtype", "f", "g"), [("fp16", 1.5, 1.1), ("bf16", 1.5, 1.1), ("fp32", 3.0, 2.0)])
@pytest.mark.parametrize("gradient", [False, True])
@pytest.mark.parametrize("numel", [4095, 4096])
def test_the_factors_are_those_of_the_bar(dtype: Any, f: float, g: float, gradient: bool, numel: int) -> None:
    if gradient:
        f, g = (4.0, 3.0) if dtype == "fp32" else (2.0, 1.5)
    few = 2 if numel < 4096 else 1
    unit = 2.0**-4
    exact, low, out = parts(dtype, numel, unit)
    for factor, good in ((0.999, True), (1.001, False)):
        out.zero_()
        out[5] = f * few * unit * factor
        report = check(out, None, (exact, None), (low, None), dtype, gradient=gradient)
        assert report.ok == good, report
        assert report.max_ratio == pytest.approx(factor)
        out.fill_(g * few * unit * factor)
        report = check(out, None, (exact, None), (low, None), dtype, gradient=gradient)
        assert report.ok == good, report
        assert report.mean_ratio == pytest.approx(factor, rel=1e-5)


@pytest.mark.parametrize(("dtype", "eps"), [("fp16", 2.0**-10), ("bf16", 2.0**-7), ("fp32", 2.0**-23)])
def test_half_an_ulp_of_the_oracle_is_allowed_beside_the_unit(dtype: Any, eps: float) -> None:
    exact = torch.zeros(8192, dtype=torch.float64)
    exact[0], low = 3.0, exact.clone()
    low[0], low[1:4096] = 3.0, 1e-3  # a mean that does not decide
    f = 3.0 if dtype == "fp32" else 1.5
    for factor, good in ((0.999, True), (1.001, False)):
        out = exact.clone()
        out[0] += factor * (f * 1e-3 + eps / 2 * 3.0)
        assert check(out, None, (exact, None), (low, None), dtype).ok == good


def test_fp32_means_get_a_floor_and_others_do_not() -> None:
    exact = torch.zeros(8192, dtype=torch.float64)
    exact[0] = 1e6
    low = exact.clone()
    low[0] += 1e-6
    for dtype, good in (("fp32", True), ("bf16", False)):
        out = exact.clone()
        out[0] += 5e-4  # a mean of 6e-8, far above twice the reference's
        assert check(out, None, (exact, None), (low, None), dtype).ok == good  # type: ignore[arg-type]


@pytest.mark.parametrize(("dtype", "bar"), [("fp16", 1e-4), ("bf16", 1e-4), ("fp32", 1e-5)])
@pytest.mark.parametrize("largest", [0.5, 600.0])
def test_the_lse_bar(dtype: Any, bar: float, largest: float) -> None:
    out = torch.zeros(1, 3, 1, 1)
    exact_lse = torch.tensor([[[-largest, 0.1, -math.inf]]], dtype=torch.float64)
    for factor, good in ((0.99, True), (1.01, False)):
        lse = exact_lse.clone()
        lse[0, 0, 1] += factor * bar * max(1.0, largest)
        report = check(out, lse, (out.double(), exact_lse), (out, None), dtype)
        assert report.ok == good
        assert report.lse_ratio == pytest.approx(factor)


@pytest.mark.parametrize("wrong", [math.nan, math.inf, -math.inf])
def test_nan_and_inf_are_outside_whatever_the_reference_says(wrong: float) -> None:
    exact, low, out = parts("bf16", 100, 1.0)
    out[3] = wrong
    report = check(out, None, (exact, None), (low, None), "bf16")
    assert not report.ok
    assert report.ratio == math.inf
    assert "worst at (3,)" in report.message
    low[7] = math.inf
    assert not check(out, None, (exact, None), (low, None), "bf16").ok
    lse, exact_lse = torch.tensor([wrong]), torch.tensor([0.0], dtype=torch.float64)
    assert not check(exact, lse, (exact, exact_lse), (exact, None), "bf16").ok
    if wrong != -math.inf:
        assert not check(exact, lse, (exact, torch.tensor([-math.inf])), (exact, None), "bf16").ok


def test_an_exact_result_needs_no_allowance() -> None:
    exact = torch.zeros(2, 3)
    report = check(exact, None, (exact, None), (exact, None), "fp16")
    assert report.ok
    assert report.ratio == 0.0
    assert check(exact[:0], None, (exact[:0], None), (exact[:0], None), "fp16").ok


def test_shapes_must_agree() -> None:
    exact = torch.zeros(2, 3)
    with pytest.raises(InvalidProblemError, match="different shapes"):
        check(exact.T, None, (exact, None), (exact, None), "fp16")


# -- poisoned problems --

BASE = Problem(
    dtype="bf16",
    batch=2,
    seqlen_q=5,
    seqlen_k=11,
    num_heads_q=4,
    num_heads_kv=2,
    head_dim=7,
    head_dim_v=9,
    return_lse=True,
)
STRIDES = ("dense", "padded", "misaligned", "sbhd", "expanded", "packed")


def honest(q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor | None, *, causal: bool, **options: Any) -> None:
    out, natural = attention_low_precision(q, k, v, causal=causal, **options)
    o.copy_(out)
    if lse is not None:
        lse.copy_(natural)


@pytest.mark.parametrize("strides", STRIDES)
def test_every_byte_that_is_no_input_is_poison(strides: Any) -> None:
    buffers = make_buffers(BASE, strides=strides)
    for name in "qkv":
        tensor = getattr(buffers, name)
        assert tensor.stride(-1) == 1
        assert not tensor.isnan().any()
        distinct = {
            tensor.storage_offset() + sum(i * s for i, s in zip(index, tensor.stride(), strict=True))
            for index in torch.cartesian_prod(*map(torch.arange, tensor.shape)).tolist()
        }
        values = buffers.allocations[name].view(tensor.dtype)
        assert int((~values.isnan()).sum()) == len(distinct)
    assert buffers.o.isnan().all()
    assert buffers.lse is not None
    assert buffers.lse.isnan().all()
    assert not buffers.trespasses()


def test_the_kinds_of_strides_are_what_they_claim() -> None:
    made = {kind: make_buffers(BASE, strides=kind) for kind in STRIDES}  # type: ignore[arg-type]
    assert made["dense"].q.is_contiguous()
    assert made["padded"].k.stride(2) > 7
    assert made["misaligned"].q.data_ptr() % 4
    assert made["sbhd"].q.stride(1) > made["sbhd"].q.stride(0)
    assert made["expanded"].k.stride(0) == 0 == made["expanded"].q.stride(2)
    one = Problem(
        dtype="fp16", batch=1, seqlen_q=3, seqlen_k=3, num_heads_q=1, num_heads_kv=1, head_dim=4, head_dim_v=4
    )
    corrupt = make_buffers(one, strides="corrupt").k
    assert min(corrupt.stride(0), corrupt.stride(2)) > 1 << 40
    assert (
        make_buffers(Problem(**{**{f: getattr(BASE, f) for f in BASE.__slots__}, "layout": "bhsd"}), strides="dense")
        .q.transpose(1, 2)
        .is_contiguous()
    )  # type: ignore[arg-type]


def test_unseen_keys_and_values_are_nan() -> None:
    top_left = Problem(
        dtype="fp32",
        batch=1,
        seqlen_q=3,
        seqlen_k=8,
        num_heads_q=1,
        num_heads_kv=1,
        head_dim=4,
        head_dim_v=4,
        causal=True,
        causal_alignment="top-left",
    )
    buffers = make_buffers(top_left)
    for tensor in (buffers.k, buffers.v):
        assert tensor[:, 3:].isnan().all()
        assert not tensor[:, :3].isnan().any()


SPEC = AttentionSpec(dtype="bf16", head_dim=24, head_dim_v=8, causal=True, has_lse=True)


def test_small_problems_are_of_the_spec_and_cover_the_edges() -> None:
    for spec in (SPEC, AttentionSpec(dtype="fp32", head_dim=3, head_dim_v=3)):
        problems = small_problems(spec)
        assert all(problem.spec == spec for problem in problems)
        assert any(problem.seqlen_k == 0 for problem in problems)
        assert any(problem.num_heads_q > problem.num_heads_kv for problem in problems)
        assert any(problem.scale < 0 for problem in problems)
    assert any(p.causal_offset < 0 for p in small_problems(SPEC)), "rows that see no key"
    assert any(p.seqlen_k > p.seqlen_q + p.causal_offset for p in small_problems(SPEC)), "keys that no row sees"


def test_check_launch_passes_an_honest_kernel_and_reports_the_worst() -> None:
    report = check_launch(lambda *args, **options: honest(*args, causal=True, **options), SPEC)
    assert report.ok
    assert 0 < report.ratio <= 1
    assert "attention_fwd-bf16-d24-dv8-causal-lse" in report.message


def test_check_launch_refuses_nothing_to_check() -> None:
    with pytest.raises(InvalidProblemError, match="no problem"):
        check_launch(honest, SPEC, problems=())


def nothing(*args: Any, **options: Any) -> None:
    """Writes nothing at all."""


def beyond(q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor | None, **options: Any) -> None:
    """One more row than there is."""
    honest(q, k, v, o, lse, causal=True, **options)
    o.as_strided(
        (1,), (1,), o.storage_offset() + sum((s - 1) * t for s, t in zip(o.shape, o.stride(), strict=True)) + 1
    ).zero_()


def over_lse(q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor | None, **options: Any) -> None:
    """One lse too many."""
    honest(q, k, v, o, lse, causal=True, **options)
    assert lse is not None
    lse.as_strided((lse.numel() + 1,), (1,))[-1] = 0.0


def into_k(q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor | None, **options: Any) -> None:
    """Scales k in place."""
    honest(q, k, v, o, lse, causal=True, **options)
    k.mul_(2.0)


def reads_unseen(q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor | None, **options: Any) -> None:
    """Multiplies hidden values by a probability of 0."""
    honest(q, k, v, o, lse, causal=True, **options)
    o.add_((0.0 * v).sum(1, keepdim=True).repeat_interleave(q.shape[2] // k.shape[2], 2))


@pytest.mark.parametrize(
    ("launch", "message"),
    [
        (nothing, "largest error inf"),
        (beyond, "2 bytes outside o were written"),
        (over_lse, "4 bytes outside lse were written"),
        (into_k, "k was written to, but is an input"),
        (reads_unseen, "largest error inf"),
    ],
)
def test_check_launch_catches(launch: Any, message: str) -> None:
    report = check_launch(launch, SPEC)
    assert not report.ok
    assert report.ratio == math.inf
    assert message in report.message


def test_poison_is_nan_in_every_dtype() -> None:
    for dtype in TORCH_DTYPES.values():
        assert torch.full((4,), accuracy.POISON, dtype=torch.uint8).view(dtype)[0].isnan()


# -- several honest runs --


def test_a_lucky_unit_is_no_trap_where_there_are_other_honest_runs() -> None:
    """One element whose honest error is a few units in the last place, but 0 in the first run."""
    exact, lucky, honest = (torch.tensor([x], dtype=torch.float64) for x in (2.0, 2.0, 2.0 + 6e-7))
    alone = check(honest, None, (exact, None), (lucky, None), "fp32", gradient=True)
    assert not alone.ok
    others = (torch.tensor([2.0 - 5e-7], dtype=torch.float64), lucky)
    assert check(honest, None, (exact, None), (lucky, None), "fp32", gradient=True, others=others).ok


@pytest.mark.parametrize("numel", [1, 3, 4096])
def test_other_honest_runs_hide_no_error_of_a_thousandth(numel: int) -> None:
    g = torch.Generator().manual_seed(numel)
    exact = torch.randn(numel, generator=g).double() + 3.0
    runs = [exact + 3e-7 * torch.randn(numel, generator=g).double() for _ in range(9)]
    report = check(exact * 1.001, None, (exact, None), (runs[0], None), "fp32", gradient=True, others=runs[1:])
    assert not report.ok and report.max_ratio > 100 and report.mean_ratio > 100
    assert check(runs[0], None, (exact, None), (runs[1], None), "fp32", gradient=True, others=runs[2:]).ok


def test_many_elements_are_judged_the_same_by_one_honest_run_and_by_eight() -> None:
    g = torch.Generator().manual_seed(0)
    exact = torch.randn(64, 1024, generator=g).double()
    runs = [exact + 1e-2 * (torch.rand(64, 1024, generator=g).double() - 0.5) for _ in range(8)]
    bad = exact + 2e-2 * (torch.rand(64, 1024, generator=g).double() - 0.5)
    one = check(bad, None, (exact, None), (runs[0], None), "bf16")
    eight = check(bad, None, (exact, None), (runs[0], None), "bf16", others=runs[1:])
    assert not one.ok and not eight.ok
    assert eight.mean_ratio == pytest.approx(one.mean_ratio, rel=0.02)
    assert eight.max_ratio == pytest.approx(one.max_ratio, rel=0.02)


def test_an_honest_run_of_another_shape_is_refused() -> None:
    x = torch.zeros(3)
    with pytest.raises(InvalidProblemError, match="different shapes"):
        check(x, None, (x, None), (x, None), "fp32", others=(torch.zeros(1),))
