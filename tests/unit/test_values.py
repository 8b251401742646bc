"""The frozen values: spec, config, target, problem."""

from __future__ import annotations

import itertools
import pickle
from dataclasses import fields, replace

import pytest
import torch

from flashgen import AttentionSpec, InvalidProblemError, KernelConfig, Problem, Target, UnsupportedProblemError
from flashgen.spec import Mods, flag_names
from flashgen.variants import by_name

BASE = AttentionSpec(dtype="bf16", head_dim=128, head_dim_v=128)
OTHER_VALUES = {"op": "attention_bwd", "dtype": "fp16", "head_dim": 64, "head_dim_v": 64}


def small_problem(**changes: object) -> Problem:
    problem = Problem(
        dtype="bf16", batch=2, seqlen_q=5, seqlen_k=7, num_heads_q=4, num_heads_kv=2, head_dim=16, head_dim_v=16
    )
    return replace(problem, **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", [field.name for field in fields(AttentionSpec) if field.name != "mods"])
def test_every_spec_field_changes_the_key_and_survives_it(name: str) -> None:
    changed = replace(BASE, **{name: OTHER_VALUES.get(name, True)})
    assert changed.key != BASE.key
    assert AttentionSpec.from_key(changed.key) == changed


def test_key_reads_like_the_documentation() -> None:
    spec = replace(BASE, causal=True, has_lse=True)
    assert spec.key == "attention_fwd-bf16-d128-causal-lse"
    assert replace(spec, head_dim_v=64).key == "attention_fwd-bf16-d128-dv64-causal-lse"
    assert len(flag_names()) == len([f for f in fields(AttentionSpec) if f.name not in (*OTHER_VALUES, "mods")])


def test_mods_are_in_the_key_by_their_digest_and_equal_by_it() -> None:
    one, same, other = (replace(BASE, mods=Mods(digest=d, program=object())) for d in ("0a", "0a", "1b"))
    assert one == same != other and one.key == same.key == f"{BASE.key}-mods_0a"
    with pytest.raises(InvalidProblemError, match="spec key"):
        AttentionSpec.from_key(one.key)  # digests are no functions


@pytest.mark.parametrize(
    "text", ["", "attention_fwd", "attention_fwd-bf16-d128-nonsense", "attention_fwd-bf16-dx", "x-bf16-d8"]
)
def test_bad_keys_are_refused(text: str) -> None:
    with pytest.raises(InvalidProblemError, match=r"spec key|op "):
        AttentionSpec.from_key(text)


def test_head_dims_out_of_range() -> None:
    with pytest.raises(InvalidProblemError, match="head_dim 0"):
        replace(BASE, head_dim=0)
    with pytest.raises(UnsupportedProblemError, match="head_dim_v 257"):
        replace(BASE, head_dim_v=257)


def test_config_is_an_immutable_value() -> None:
    config = KernelConfig(variant="triton_fwd", BLOCK_M=128, BLOCK_N=64, num_warps=8, num_stages=3)
    same = KernelConfig(variant="triton_fwd", num_stages=3, num_warps=8, BLOCK_N=64, BLOCK_M=128)
    assert config == same and hash(config) == hash(same)
    assert config != KernelConfig(variant="other", **config.to_dict())
    assert config.BLOCK_M == 128 and dict(config) == config.to_dict() == same.to_dict()
    assert pickle.loads(pickle.dumps(config)) == config
    with pytest.raises(AttributeError, match="immutable"):
        config.BLOCK_M = 64
    with pytest.raises(AttributeError, match="no tunable 'BLOCK_X'"):
        _ = config.BLOCK_X
    config.to_dict()["BLOCK_M"] = 1
    assert config.BLOCK_M == 128
    with pytest.raises(InvalidProblemError, match="BLOCK_M"):
        KernelConfig(variant="triton_fwd", BLOCK_M=1.5)  # type: ignore[arg-type]


def test_targets() -> None:
    assert Target.named("H100").capability == 90
    assert Target.named("h100").smem_bytes == 227 * 1024
    with pytest.raises(InvalidProblemError, match=r"'voodoo2'.*a100.*h100"):
        Target.named("voodoo2")
    if not torch.cuda.is_available():
        assert Target.detect().name == "cpu"
    assert Target.detect("cpu").name == "cpu"


@pytest.mark.parametrize("alignment", ["bottom-right", "top-left"])
def test_visible_pairs_against_counting(alignment: str) -> None:
    for seqlen_q, seqlen_k in itertools.product(range(6), repeat=2):
        problem = small_problem(seqlen_q=seqlen_q, seqlen_k=seqlen_k, causal=True, causal_alignment=alignment)
        offset = seqlen_k - seqlen_q if alignment == "bottom-right" else 0
        counted = sum(j <= i + offset for i in range(seqlen_q) for j in range(seqlen_k))
        assert problem.visible_pairs == counted, (seqlen_q, seqlen_k)
    assert small_problem().flops == 2 * 2 * 4 * 5 * 7 * 32


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"dtype": "fp64"}, "dtype='fp64'.*fp16, bf16, fp32"),
        ({"layout": "sbhd"}, "layout='sbhd'"),
        ({"causal_alignment": "left"}, "causal_alignment='left'.*bottom-right"),
        ({"batch": -1}, "batch=-1"),
        ({"num_heads_kv": 3}, "4 query heads cannot share 3"),
        ({"softmax_scale": float("inf")}, "softmax_scale=inf.*finite"),
        ({"softmax_scale": float("nan")}, "softmax_scale=nan"),
        ({"window_size": (-2, 0)}, r"window_size=\(-2, 0\)"),
        ({"softcap": -1.0}, "softcap=-1.0"),
        ({"dropout_p": 1.0}, "dropout_p=1.0"),
    ],
)
def test_wrong_values_are_named(change: dict[str, object], match: str) -> None:
    with pytest.raises(InvalidProblemError, match=match):
        small_problem(**change)


def test_the_space_holds_legal_configs_only_and_the_default_is_in_reach() -> None:
    variant = by_name("triton_fwd")
    for target, dtype, head_dim in itertools.product(
        ("a100", "h100", "h200"), ("fp16", "bf16", "fp32"), (1, 32, 64, 128, 256)
    ):
        spec, where = AttentionSpec(dtype=dtype, head_dim=head_dim, head_dim_v=head_dim), Target.named(target)  # type: ignore[arg-type]
        space = variant.space(spec, where)
        assert len(space) == len(set(space)) >= (40 if dtype != "fp32" and head_dim <= 128 else 6)
        assert all(variant.illegal(spec, where, config) is None for config in space)
        assert variant.illegal(spec, where, variant.default(spec, where)) is None
        known = variant.known_good(spec, where)
        assert known and all(len(row.source) > 10 for row in known)
        assert variant.default(spec, where) in [row.config for row in known]


def test_shared_memory_is_judged_exactly_where_facts_are_known() -> None:
    class Facts:
        smem_bytes = 200 * 1024
        undefined_registers = 0

    variant, config = (
        by_name("triton_fwd"),
        KernelConfig(variant="triton_fwd", BLOCK_M=128, BLOCK_N=128, num_warps=8, num_stages=3),
    )
    assert variant.illegal(BASE, Target.named("h100"), config, Facts()) is None
    reason = variant.illegal(BASE, Target.named("a100"), config, Facts())
    assert reason is not None and "204800 bytes of shared memory" in reason and "166912" in reason
