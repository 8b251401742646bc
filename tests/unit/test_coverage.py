"""`flashgen show variants` tells the truth: what it prints is what `supports` and `refuses` say, and there is no other refusal."""

from __future__ import annotations

import itertools
import json
import re
from dataclasses import replace

import pytest
from click.testing import CliRunner

from flashgen import Target, dispatch
from flashgen.cli.show import show
from flashgen.coverage import _gradients, _with, covered, limits, options_of_a_call, spelled
from flashgen.errors import UnsupportedProblemError
from flashgen.problem import Problem
from flashgen.spec import AttentionSpec
from flashgen.variants import REGISTRY, Variant, candidates
from flashgen.variants.triton_fwd import TritonForward

H100 = Target.named("h100")
OPTIONS = options_of_a_call()


def shown(*words: str) -> str:
    result = CliRunner().invoke(show, ["variants", *words])
    assert result.exit_code == 0, result.output
    return result.output


def plain(variant: Variant, head_dim: int = 64, head_dim_v: int = 64, dtype: str = "bf16") -> AttentionSpec:
    return AttentionSpec(op=variant.op, dtype=dtype, head_dim=head_dim, head_dim_v=head_dim_v)  # type: ignore[arg-type]


def test_the_printed_table_is_what_supports_says() -> None:
    lines = [line.split("\t") for line in shown().splitlines()]
    header = next(line for line in lines if line[0] == "option")
    rows = {line[0]: line[1:] for line in lines[lines.index(header) + 1 :] if len(line) == len(header)}
    assert header[1:] == [v.name for v in REGISTRY] and list(rows) == [spelled(flag) for flag in OPTIONS]
    for flag in OPTIONS:
        said = [v.supports(_with(plain(v), **{flag: True}), H100) is None for v in REGISTRY]
        assert [cell == "yes" for cell in rows[spelled(flag)]] == said, flag


def test_an_option_that_a_variant_refuses_has_no_yes(monkeypatch: pytest.MonkeyPatch) -> None:
    supports = TritonForward.supports
    monkeypatch.setattr(
        TritonForward,
        "supports",
        lambda self, spec, target: "no caps" if spec.softcap else supports(self, spec, target),
    )
    test_the_printed_table_is_what_supports_says()
    (row,) = (line.split("\t") for line in shown().splitlines() if line.startswith("softcap"))
    assert row[1:].count("-") == 1


def test_json_says_the_same_and_every_limit_is_printed() -> None:
    rows = json.loads(shown("--json"))["variants"]
    text = shown()
    for variant, row in zip(REGISTRY, rows, strict=True):
        assert row["options"] == covered(variant, H100) and row["limits"] == limits(variant, H100)
        for what, reason in row["limits"].items():
            assert f"  {what}: {reason}" in text


def kind(reason: str) -> str:
    """A reason without its numbers."""
    return re.sub(r"\d+", "#", reason)


@pytest.mark.parametrize("variant", REGISTRY, ids=lambda variant: variant.name)
def test_whatever_else_a_variant_refuses_is_in_its_limits(variant: Variant) -> None:
    """Pairs of options, full and causal, over dtypes and head dims: no reason that is not printed, and none for head dims of 8 k."""
    known = {kind(reason) for reason in limits(variant, H100).values()}
    takes = set(covered(variant, H100))
    for dims, dtype in itertools.product(
        ((64, 64), (80, 80), (256, 256), (192, 128), (64, 256), (33, 33)), ("bf16", "fp16", "fp32")
    ):
        for pair, causal in itertools.product(itertools.combinations_with_replacement(OPTIONS, 2), (False, True)):
            spec = _with(plain(variant, *dims, dtype), **dict.fromkeys(pair, True), causal=causal)
            reason = variant.supports(spec, H100)
            if reason is None:
                assert {spelled(flag) for flag in pair} <= takes
            elif {spelled(flag) for flag in pair} <= takes:
                assert kind(reason) in known, (spec, reason)
                assert dims[0] % 8 or dtype == "fp32", "the table says yes"


def test_every_pair_of_options_runs_somewhere_and_the_plan_says_why_not_elsewhere() -> None:
    """What `resolve` takes is the first variant without a reason; those before it are rejected with theirs."""
    for op, dims in itertools.product(("attention_fwd", "attention_bwd"), ((64, 64), (192, 128))):
        for pair in itertools.combinations(OPTIONS, 2):
            if {"varlen", "has_block_mask"} <= set(pair):
                continue  # no call has both
            spec = _with(
                AttentionSpec(op=op, dtype="bf16", head_dim=dims[0], head_dim_v=dims[1]), **dict.fromkeys(pair, True)
            )
            reasons = {v.name: v.supports(spec, H100) for v in candidates(spec)}
            runs = next(name for name, reason in reasons.items() if reason is None)
            assert not runs.startswith("torch"), "a generated kernel takes each pair"
            assert all(reasons[name] for name in list(reasons)[: list(reasons).index(runs)])


def test_the_dispatcher_keeps_to_what_is_printed_of_gradients() -> None:
    printed = {variant.name: limits(variant, H100) for variant in REGISTRY}
    for what, problem in _gradients().items():
        try:
            plan = dispatch.resolve(problem, H100)
        except UnsupportedProblemError as error:  # pragma: no cover
            raise AssertionError(what) from error
        for name, reason in plan.rejected.items():
            assert printed[name].get(what) == reason, (what, name)
        assert what not in printed[plan.variant]


def test_plain_calls_have_no_limits_but_those_of_the_hopper_kernels() -> None:
    assert [v.name for v in REGISTRY if limits(v, H100)] == ["gluon_fwd_sm90", "gluon_bwd_sm90"]
    base = Problem(
        dtype="bf16", batch=1, seqlen_q=64, seqlen_k=64, num_heads_q=1, num_heads_kv=1, head_dim=64, head_dim_v=64
    )
    assert dispatch.resolve(base, H100).variant == "gluon_fwd_sm90"
    assert dispatch.resolve(replace(base, dtype="fp32"), H100).variant == "triton_fwd"
