"""What dispatch takes where nothing is tuned for a kernel with options: its own tile, not the plain kernel's."""

from __future__ import annotations

import functools
import random
from typing import Any

import pytest
import torch

from flashgen import Problem, Target, dispatch, mods
from flashgen.facts import inspect
from flashgen.render import render
from flashgen.spec import AttentionSpec, Mods, Op, flag_names
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


@pytest.mark.parametrize(
    ("index", "mask", "block_n"),
    [
        ("distance", "block", 64), ("distance", "mask_mod", 64), ("distance", None, 64), ("pair", "mask_mod", 64), ("pair", None, 128),
        ("key", "block", 128), ("key", "mask_mod", 128),
    ],
)  # fmt: skip
def test_a_score_gathered_pair_by_pair_leaves_room_for_half_the_keys(
    index: str, mask: str | None, block_n: int
) -> None:
    """A block of 128 keys took up to twice the time, but where pairs are read as they lie and nothing is hidden."""
    table, pairs = torch.zeros(4, 512), torch.zeros(512, 512)

    def score(s: Any, b: Any, h: Any, i: Any, j: Any) -> Any:
        return s + (pairs[i, j] if index == "pair" else table[h, (i - j) % 512 if index == "distance" else j])

    def keep(b: Any, h: Any, i: Any, j: Any) -> Any:
        return i // 100 == j // 100

    masks = {"mask_mod": keep} if mask == "mask_mod" else {}
    program, _ = mods.program(score, masks, torch.device("cpu"), keep if mask == "block" else None)
    spec = AttentionSpec(
        dtype="bf16", head_dim=128, head_dim_v=128, has_score_mod=True, has_mask_mod=mask == "mask_mod", has_block_mask=mask == "block",
        mods=Mods(digest=program.digest, program=program),
    )  # fmt: skip
    target, variant = Target.named("h200"), by_name("gluon_fwd_sm90")
    found = dispatch.portfolio_first(variant, spec, target) or variant.default(spec, target)
    assert block_n == found.BLOCK_N


_MODS = ("has_score_mod", "has_mask_mod", "has_block_mask")


@functools.cache
def mods_of(score: bool, mask: bool, listed: bool) -> Mods | None:
    """What the free-form part of a spec was traced to: functions that read tensors of rows and of keys."""
    if not (score or mask or listed):
        return None
    table, ids = torch.zeros(4, 90), torch.zeros(90, dtype=torch.int32)

    def added(s: Any, b: Any, h: Any, i: Any, j: Any) -> Any:
        return s + table[h, j]

    def document(b: Any, h: Any, i: Any, j: Any) -> Any:
        return ids[i] == ids[j]

    masks = {"mask_mod": document} if mask else {}
    found = mods.program(added if score else None, masks, torch.device("cpu"), document if listed else None)
    return Mods(digest=found[0].digest, program=found[0])


def drawn(seed: int, op: Op) -> AttentionSpec:
    """A spec of any head dims that TMA can move, with any options together; one option alone or a few, every second time."""
    r = random.Random(seed)
    names = [name for name in flag_names() if op == "attention_fwd" or name != "has_lse"]
    chosen = r.sample(names, r.choice((0, 1, 1, 2, 3, r.randint(4, len(names)))))
    dims = [r.choice((8, 40, 64, 72, 128, 136, 192, 200, 256)) for _ in range(2)]
    return AttentionSpec(
        op=op, dtype=r.choice(("fp16", "bf16")), head_dim=dims[0], head_dim_v=r.choice(dims),
        mods=mods_of(*(name in chosen for name in _MODS)), **dict.fromkeys(chosen, True),
    )  # fmt: skip


@pytest.mark.parametrize("target", ["h100", "h200"])
@pytest.mark.parametrize("name", ["gluon_fwd_sm90", "gluon_bwd_sm90"])
def test_defaults_and_portfolios_are_legal_whatever_the_options(name: str, target: str) -> None:
    variant, where, judged = by_name(name), Target.named(target), 0
    for seed in range(500):
        spec = drawn(seed, variant.op)
        if variant.supports(spec, where) is None:
            configs = [variant.default(spec, where), *(known.config for known in variant.known_good(spec, where))]
            assert [(config.label, why) for config in configs if (why := variant.illegal(spec, where, config))] == [], (
                spec.key
            )
            judged += 1
    assert judged > 150


def with_table(by_row: bool, head_dim: int) -> AttentionSpec:
    """The backward of a score_mod whose table, by distance or by key, gets a gradient."""
    table = torch.zeros(4, 200, requires_grad=True)

    def by_distance(s: Any, b: Any, h: Any, i: Any, j: Any) -> Any:
        return s + table[h, i - j + 100]

    def by_key(s: Any, b: Any, h: Any, i: Any, j: Any) -> Any:
        return s + table[h, j]

    program, _ = mods.program(by_distance if by_row else by_key, {}, torch.device("cpu"))
    return AttentionSpec(
        op="attention_bwd", dtype="bf16", head_dim=head_dim, head_dim_v=head_dim, causal=True, has_score_mod=True,
        mods=Mods(digest=program.digest, program=program),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("by_row", "head_dim", "keys"), [(True, 128, 64), (True, 80, 64), (False, 128, 128), (True, 64, 128)]
)
def test_gradients_by_row_leave_room_for_half_the_keys(by_row: bool, head_dim: int, keys: int) -> None:
    variant = by_name("gluon_bwd_sm90")
    assert keys == variant.default(with_table(by_row, head_dim), Target.named("h100")).BLOCK_N


@pytest.mark.sampled(every=2)
@pytest.mark.slow
@pytest.mark.parametrize("option", ["dropout", "by distance"])
def test_a_crowded_step_does_not_spill(option: str) -> None:
    """Two of the worst options alone; each alone, and every two, in `compile_options.py`, part of `make torture`."""
    variant, target = by_name("gluon_bwd_sm90"), Target.named("h100")
    dropout = AttentionSpec(op="attention_bwd", dtype="bf16", head_dim=128, head_dim_v=128, causal=True, dropout=True)
    spec = dropout if option == "dropout" else with_table(True, 128)
    facts = inspect(render(spec, variant), target, variant.default(spec, target))
    assert facts.loop_macs > 0
    assert (facts.loop_spill_ops, facts.serialised, facts.undefined_registers) == (0, False, 0)
