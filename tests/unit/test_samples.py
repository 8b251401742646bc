"""Options drawn for a problem alone, and kernels with options held to the budget: each option's fault is found."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from flashgen import coverage, samples, torch_blocked
from flashgen.errors import UnsupportedProblemError
from flashgen.problem import Problem
from flashgen.spec import AttentionSpec
from flashgen.variants import by_name

BASE = Problem(
    dtype="fp32", batch=1, seqlen_q=128, seqlen_k=128, num_heads_q=2, num_heads_kv=1, head_dim=16, head_dim_v=16, return_lse=True
)  # fmt: skip
CONFIG = by_name("triton_fwd").config(BLOCK_M=32, BLOCK_N=32, num_warps=4, num_stages=1)
IDS = torch.arange(320) // 50
TABLE = torch.randn(4, 700, generator=torch.Generator().manual_seed(3))


def document(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
    return (IDS[i] == IDS[j]) & (i >= j)


def table(s: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
    return s + TABLE[h, i - j + 330]


PROBLEMS: dict[str, Problem] = {
    "window": replace(BASE, window_size=(37, 9)),
    "softcap": replace(BASE, softcap=4.0),
    "alibi": replace(BASE, has_alibi=True),
    "sinks": replace(BASE, has_sinks=True),
    "bias": replace(BASE, has_bias=True, bias_grad=True),
    "attn_mask": replace(BASE, has_attn_mask=True),
    "dropout": replace(BASE, dropout_p=0.3),
    "mask_mod": BASE.modified(mask_mod=document),
    "score_mod": BASE.modified(score_mod=table),
}


def spoiled(options: Any, name: str) -> Any:
    """The options with one of them a little wrong."""
    changes: dict[str, Any] = {
        "window": lambda: {"window": (options.window[0] + 1, options.window[1])},
        "softcap": lambda: {"softcap": options.softcap * 1.05},
        "alibi": lambda: {"alibi_shift": options.alibi_shift + 1},
        "sinks": lambda: {"sinks": None},
        "bias": lambda: {"bias": options.bias.roll(1, -1) if options.bias.shape[-1] > 1 else options.bias + 1},
        "attn_mask": lambda: {"attn_mask": None},
        "dropout": lambda: {"philox": options.philox + 1},
        "mask_mod": lambda: {"mask_mod": lambda b, h, i, j: options.mask_mod(b, h, i, j) | (i == j + 1)},
        "score_mod": lambda: {"score_mod": lambda s, b, h, i, j: options.score_mod(s, b, h, i, j + 1)},
    }
    return replace(options, **changes[name]()) if name else options


def kernel(problem: Problem, fault: str = "") -> Callable[..., None]:
    """A launch that computes with the torch backend what it is given, or something near it."""

    def options(values: dict[str, Any], shift: int) -> Any:
        given = torch_blocked.Options(
            sm_scale=values["sm_scale"], causal=problem.causal, offset=values["causal_offset"], softcap=values.get("softcap", 0.0),
            window=(values.get("window_left", -1), values.get("window_right", -1)), alibi=values.get("alibi_slopes"),
            alibi_shift=shift, sinks=values.get("sinks"), bias=values.get("bias"), attn_mask=values.get("attn_mask"),
            dropout_p=values.get("dropout_p", 0.0), philox=values.get("philox"),
        )  # fmt: skip
        if "captured_ids" in values:
            ids = values["captured_ids"]
            given = replace(given, mask_mod=lambda b, h, i, j: (ids[i] == ids[j]) & (i >= j))
        if "captured_table" in values:
            weights = values["captured_table"]
            given = replace(given, score_mod=lambda s, b, h, i, j: s + weights[h, i - j + 330])
        return spoiled(given, fault)

    def forward(q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor | None, **values: Any) -> None:
        torch_blocked.forward(q, k, v, options(values, k.shape[1] - q.shape[1]), o, lse)

    def backward(*tensors: Any, **values: Any) -> None:
        *inputs, dq, dk, dv = tensors
        given = options(values, inputs[3].shape[1] - inputs[2].shape[1])
        wanted = {"sinks_grad": "dsinks" in values, "bias_grad": values.get("dbias") is not None}
        *found, sums = torch_blocked.backward(*inputs, given, **wanted)
        for into, gradient in zip((dq, dk, dv), found, strict=True):
            into.copy_(gradient)
        if "dsinks" in values and sums.sinks is not None:
            values["dsinks"].copy_(sums.sinks)
        if wanted["bias_grad"] and sums.bias is not None:
            values["dbias"].copy_(sums.bias)

    return backward if problem.op == "attention_bwd" else forward


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("name", PROBLEMS)
def test_a_right_kernel_passes_and_a_nearly_right_one_does_not(name: str, backward: bool) -> None:
    problem = PROBLEMS[name].backward if backward else PROBLEMS[name]
    good = samples.check_launch(kernel(problem), problem, CONFIG)
    assert good.ok, good.message
    bad = samples.check_launch(kernel(problem, fault=name), problem, CONFIG)
    assert not bad.ok and name in bad.message, bad.message


def test_equal_problems_of_other_contents_are_not_confused() -> None:
    """Mods are compared by meaning, not by what they read: remembered references are of these samples."""
    one = BASE.modified(mask_mod=document)
    ids = IDS.clone() // 2
    other = BASE.modified(mask_mod=lambda b, h, i, j: (ids[i] == ids[j]) & (i >= j))
    assert one == other
    for problem in (one, other, one):
        report = samples.check_launch(kernel(problem), problem, CONFIG)
        assert report.ok, report.message


def test_no_problem_leaves_what_the_mods_read() -> None:
    """A kernel does not look whether a head has a row in a table: calls for which none is there never come to it."""
    narrow, short = torch.randn(2, 700), torch.arange(128) // 9
    problem = BASE.modified(
        score_mod=lambda s, b, h, i, j: s + narrow[h, i - j + 330], mask_mod=lambda b, h, i, j: short[i] >= short[j]
    )
    assert problem.mods is not None
    found = samples.small_problems(problem)
    assert len(found) >= 4 and all(one.num_heads_q <= 2 and max(one.seqlen_q, one.seqlen_k) <= 128 for one in found)
    assert {one.num_heads_q for one in found} == {1, 2}
    per_batch = torch.zeros(1)
    one = replace(BASE, batch=1).modified(score_mod=lambda s, b, h, i, j: s + per_batch[b])
    assert [p.batch for p in samples.within([replace(one, batch=2)], one)] == [1]


def test_what_is_drawn_is_the_same_everywhere_and_finite() -> None:
    problem = replace(BASE, has_bias=True, has_sinks=True, has_alibi=True, has_attn_mask=True, dropout_p=0.1)
    one, other = (samples.operands(problem, seed=4) for _ in range(2))
    for name in ("bias", "sinks", "alibi_slopes", "attn_mask", "philox"):
        assert torch.equal(getattr(one, name), getattr(other, name)) and torch.isfinite(getattr(one, name)).all()
    one.check(problem, torch.device("cpu"))
    assert 0.8 < one.attn_mask.float().mean() < 0.99  # type: ignore[union-attr]
    names = samples.strides(problem)
    assert one.bias is not None and names["stride_bias_h"] == one.bias.stride(1) and names["stride_bias_m"] == 128


@pytest.mark.parametrize(
    ("spec", "why"),
    [
        ({"varlen": True}, "packed sequences"),
        ({"has_block_mask": True}, "BlockMask"),
        ({"has_mask_mod": True}, r"Problem\.modified"),
        ({"has_score_mod": True, "mods": PROBLEMS["score_mod"].mods}, ""),
    ],
)
def test_what_no_problem_names_is_refused_with_the_reason(spec: dict[str, Any], why: str) -> None:
    one = AttentionSpec(dtype="fp32", head_dim=16, head_dim_v=16, **spec)
    if not why:
        assert coverage.undrawn(one) is None
        return
    assert coverage.undrawn(one) is not None
    with pytest.raises(UnsupportedProblemError, match=why):
        samples.operands(samples.of_spec(one))
    with pytest.raises(UnsupportedProblemError, match=why):
        samples.check_launch(lambda *_, **__: None, samples.of_spec(one), CONFIG)


def test_a_key_with_mods_names_a_spec_that_nothing_renders() -> None:
    from flashgen.errors import RenderError
    from flashgen.render import render

    spec = PROBLEMS["mask_mod"].spec
    named = AttentionSpec.from_key(spec.key)
    assert named == spec and named.key == spec.key
    with pytest.raises(RenderError, match="digest"):
        render(named, by_name("triton_fwd"))
    assert coverage.undrawn(named) is not None
