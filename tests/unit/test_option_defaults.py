"""What dispatch takes where nothing is tuned for a kernel with options: its own tile, not the plain kernel's."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from flashgen import Problem, Target, dispatch
from flashgen.variants import by_name


@pytest.mark.parametrize("options", [{"softcap": 30.0}, {"window_size": (1024, 0)}, {"has_alibi": True}], ids=str)
def test_an_option_with_a_known_tile_runs_it(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLASHGEN_ON_MISS", "default")
    target = Target.named("h200")
    problem = Problem(
        dtype="bf16", batch=2, seqlen_q=8192, seqlen_k=8192, num_heads_q=32, num_heads_kv=32,
        head_dim=64, head_dim_v=64, causal=True, **options,
    )  # fmt: skip
    plan = dispatch.resolve(problem, target, backend="gluon")
    variant = by_name("gluon_fwd_sm90")
    assert (plan.config, plan.config_source) == (variant.default(problem.spec, target), "default")
    assert dispatch.portfolio_first(variant, problem.spec, target) is None


@pytest.mark.parametrize(("reads", "block_n"), [(True, 64), (False, 128)])
def test_a_mask_that_reads_tables_takes_narrow_blocks(reads: bool, block_n: int) -> None:
    """Documents are short: of a block of 128 keys most is hidden from most rows."""
    documents = torch.arange(512, dtype=torch.int32) // 100

    def keep(b: Any, h: Any, i: Any, j: Any) -> Any:
        return documents[i] == documents[j] if reads else (j < 64) | (j <= i)

    problem = Problem(
        dtype="bf16", batch=1, seqlen_q=512, seqlen_k=512, num_heads_q=2, num_heads_kv=2, head_dim=64, head_dim_v=64
    ).modified(mask_mod=keep)
    config = by_name("gluon_fwd_sm90").default(problem.spec, Target.named("h200"))
    assert (192, block_n) == (config.BLOCK_M, config.BLOCK_N)
