"""Bytes counted: by hand, against a walk that loads element by element, and against what eager torch allocates."""

from __future__ import annotations

import dataclasses
import random
from typing import Any

import pytest
import torch

from flashgen import Problem, Target
from flashgen.errors import InvalidProblemError
from flashgen.memory import Tile, account, of_model, walk
from flashgen.presets import PRESETS

H100 = Target.named("h100")


def problem(**changes: Any) -> Problem:
    sizes = {
        "batch": 1,
        "seqlen_q": 4,
        "seqlen_k": 6,
        "num_heads_q": 2,
        "num_heads_kv": 1,
        "head_dim": 8,
        "head_dim_v": 16,
    }
    return Problem(dtype="fp16", **{**sizes, **changes})


# -- by hand --


def test_a_small_case_by_hand() -> None:
    one = account(problem(), tile=Tile(block_m=2, block_n=2), target=H100, train=True)
    flash, other = one.flash, one.materialised
    # 2 heads x 4 rows x 8 columns x 2 bytes; 2 heads x 2 blocks x 6 keys, 8 and 16 columns.
    assert (flash.q_read, flash.k_read, flash.v_read) == (128, 2 * 2 * 6 * 8 * 2, 2 * 2 * 6 * 16 * 2)
    assert (flash.o_written, flash.lse_written) == (256, 2 * 4 * 4)
    # One key/value head, once: 6 x 24 x 2 bytes; both heads and blocks run together and fit L2.
    assert flash.hbm_least == flash.hbm_estimate == 128 + 256 + 32 + 288
    assert flash.hbm_most == flash.issued == 128 + 256 + 32 + 4 * 288
    assert flash.live == flash.saved == 128 + 288 + 256 + 32 and flash.workspace == 0
    # S and P: 2 heads x 4 x 6 x 2 bytes = 96.
    assert [(p.read, p.written) for p in other.passes] == [(128 + 96, 96), (96, 96), (96 + 192, 256)]
    assert other.hbm == 224 + 96 + 96 + 96 + 288 + 256
    assert other.live == 128 + 288 + max(2 * 96, 96 + 256) and other.saved == 128 + 288 + 96


def test_options_of_materialised_attention_by_hand() -> None:
    other = account(
        problem(dropout_p=0.1, softcap=5.0), tile=Tile(block_m=2, block_n=2), target=H100, train=True
    ).materialised
    assert [(p.read, p.written) for p in other.passes[1:-1]] == [(96, 96), (96, 96), (96, 96 + 48)]
    # tanh's result, softmax's, the dropped probabilities and a byte a mask.
    assert other.saved == 128 + 288 + 3 * 96 + 48


def test_forward_alone_saves_nothing_and_writes_no_lse() -> None:
    one = account(problem(), tile=Tile(block_m=2, block_n=2), target=H100)
    assert one.flash.lse_written == one.flash.saved == one.materialised.saved == 0
    assert account(problem(return_lse=True), tile=Tile(block_m=2, block_n=2), target=H100).flash.lse_written == 32


def test_the_tiled_traffic_is_the_papers() -> None:
    """N^2 (d + d_v) / BLOCK_M elements of keys and values: theorem 2 with BLOCK_M (d + d_v) as M."""
    n, block = 4096, 128
    plain = problem(seqlen_q=n, seqlen_k=n, num_heads_q=1, head_dim=64, head_dim_v=64)
    flash = account(plain, tile=Tile(block_m=block, block_n=64), target=H100).flash
    assert flash.k_read + flash.v_read == 2 * n * n * 128 // block


def test_what_does_not_fit_l2_is_read_once_a_wave() -> None:
    n = 4096
    big = problem(seqlen_q=n, seqlen_k=n, num_heads_q=2, num_heads_kv=2, head_dim=64, head_dim_v=64)
    kv, passing = 2 * n * 128, 2 * 2 * n * 128  # of one head; q and out of both
    for l2, resident, estimate in [
        (2 * kv, 64, passing + 2 * kv),  # everything fits
        (kv, 16, passing + 2 * kv),  # one head at a time fits: read once, whatever the number of waves
        (kv - 1, 16, passing + 4 * kv),  # it does not: 32 blocks a head are two waves of 16
        (kv - 1, 64, passing + 2 * kv),  # one wave of all programs
    ]:
        target = dataclasses.replace(H100, l2_bytes=l2)
        flash = account(big, tile=Tile(block_m=128, block_n=64), target=target, resident=resident).flash
        assert flash.hbm_estimate == estimate, (l2, resident)


# -- against the walk --


def random_problem(rng: random.Random) -> Problem:
    heads_kv = rng.choice([1, 2])
    return Problem(
        dtype=rng.choice(["fp16", "fp32"]),
        batch=rng.randint(1, 2),
        seqlen_q=rng.randint(0, 40),
        seqlen_k=rng.randint(0, 40),
        num_heads_q=heads_kv * rng.choice([1, 3]),
        num_heads_kv=heads_kv,
        head_dim=rng.randint(1, 5),
        head_dim_v=rng.randint(1, 5),
        causal=rng.random() < 0.5,
        causal_alignment=rng.choice(["bottom-right", "top-left"]),
        window_size=(rng.choice([-1, 0, 3, 17]), rng.choice([-1, 0, 5])),
    )


def visible(p: Problem) -> torch.Tensor:
    """Which pairs the masks leave, from their definition."""
    i, j = torch.arange(p.seqlen_q)[:, None] + p.causal_offset, torch.arange(p.seqlen_k)[None, :]
    left, right = p.window_size
    seen = torch.ones(p.seqlen_q, p.seqlen_k, dtype=torch.bool)
    if p.causal:
        seen &= j <= i
    if left >= 0:
        seen &= j >= i - left
    if right >= 0:
        seen &= j <= i + right
    return seen


def walk_blocks(p: Problem, block_m: int, block_n: int) -> list[torch.Tensor]:
    """The keys that each query block loads, found from the mask: whole steps from the first visible key, none past the last."""
    seen, loads = visible(p), []
    for first in range(0, p.seqlen_q, block_m):
        columns = seen[first : first + block_m].any(dim=0).nonzero().flatten().tolist()
        loaded = torch.zeros(p.seqlen_k, dtype=torch.int64)
        if columns:
            for step in range(columns[0] // block_n * block_n, columns[-1] + 1, block_n):
                for key in range(step, min(step + block_n, columns[-1] + 1)):
                    loaded[key] += 1
        loads.append(loaded)
    return loads


@pytest.mark.parametrize("seed", range(60))
def test_counts_equal_a_walk_key_by_key(seed: int) -> None:
    rng = random.Random(seed)
    p, block_m, block_n = random_problem(rng), rng.choice([1, 4, 16]), rng.choice([1, 4, 16])
    loads = walk_blocks(p, block_m, block_n)
    size, group, blocks = p.spec.itemsize, p.num_heads_q // p.num_heads_kv, len(loads)
    resident = rng.choice([1, 3, 7, 1000])
    target = H100
    flash = account(p, tile=Tile(block_m=block_m, block_n=block_n), target=target, resident=resident).flash

    issued = torch.zeros(p.batch, p.num_heads_kv, p.seqlen_k, dtype=torch.int64)
    by_wave, order = [], list(reversed(loads)) if p.causal else loads
    for pid in range(p.batch * p.num_heads_q * blocks):
        if pid % resident == 0:
            by_wave.append(torch.zeros_like(issued))
        batch, head = divmod(pid // blocks, p.num_heads_q)
        for counts in (issued, by_wave[-1]):
            counts[batch, head // group] += order[pid % blocks]
    q_rows = p.batch * p.num_heads_q * p.seqlen_q
    per_key, passing = size * (p.head_dim + p.head_dim_v), size * q_rows * (p.head_dim + p.head_dim_v)
    assert flash.k_read == size * p.head_dim * int(issued.sum()) and flash.v_read == size * p.head_dim_v * int(
        issued.sum()
    )
    assert flash.hbm_least == passing + per_key * int((issued > 0).sum())
    assert flash.hbm_most == passing + per_key * int(issued.sum())
    cold = account(
        p, tile=Tile(block_m=block_m, block_n=block_n), target=Target.named("cpu"), resident=resident
    ).flash  # L2: 0
    each_wave = passing + per_key * sum(int((wave > 0).sum()) for wave in by_wave)
    assert cold.hbm_estimate == each_wave and flash.hbm_estimate == flash.hbm_least
    assert flash.hbm_least <= cold.hbm_estimate <= flash.hbm_most


def test_the_walk_is_the_templates() -> None:
    """The ranges of the loops in templates/triton/attention_fwd.py.jinja, written out: [0, kv_end) of each block."""
    p = problem(seqlen_q=10, seqlen_k=7, causal=True, causal_alignment="bottom-right")
    ends = []
    for start_m in range(0, 10, 4):
        last_m = min(start_m + 4, 10) - 1
        ends.append(min(7, max(last_m + p.causal_offset + 1, 0)))
    assert walk.key_ranges(p, 4, 16) == [(0, end) for end in ends] and ends == [1, 5, 7]


# -- against torch --


def test_materialised_is_what_eager_torch_keeps_and_allocates() -> None:
    from torch.profiler import ProfilerActivity, profile

    p = Problem(
        dtype="fp32", batch=2, seqlen_q=64, seqlen_k=96, num_heads_q=3, num_heads_kv=3, head_dim=32, head_dim_v=16
    )
    shapes = ((2 * 3, 64, 32), (2 * 3, 96, 32), (2 * 3, 96, 16))
    q, k, v = (torch.randn(shape, requires_grad=True) for shape in shapes)
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with (
        profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen,
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
    ):
        scores = torch.bmm(q, k.transpose(1, 2))
        probabilities = torch.softmax(scores, dim=-1)
        out = torch.bmm(probabilities, v)
    other = account(p, tile=Tile(block_m=64, block_n=64), target=H100, train=True).materialised
    assert sum(kept.values()) == other.saved
    made = sum(e.self_cpu_memory_usage for e in seen.key_averages() if e.self_cpu_memory_usage > 0)
    assert made == sum(one.written for one in other.passes)
    assert out.untyped_storage().nbytes() == other.passes[-1].written
    # The least that must be there in softmax: q, k, v, S and P.
    alive = sum(t.untyped_storage().nbytes() for t in (q, k, v, scores, probabilities))
    assert other.live == alive


# -- models --


@pytest.mark.parametrize("name", sorted(PRESETS))
@pytest.mark.parametrize("train", [False, True])
def test_every_model_is_counted(name: str, train: bool) -> None:
    row = of_model(name, target=H100, train=train)
    assert [layer.kind for layer in row.layers] == [layer.kind for layer in PRESETS[name].layers]
    assert sum(layer.count for layer in row.layers) == PRESETS[name].num_layers
    for layer in row.layers:
        flash, other = layer.account.flash, layer.account.materialised
        assert flash.hbm_least <= flash.hbm_estimate <= flash.hbm_most <= flash.issued
        assert flash.live < other.live and flash.hbm_estimate < other.hbm
    assert row.total(lambda one: one.flash.issued) == sum(x.count * x.account.flash.issued for x in row.layers)
    assert row.flash_memory < row.materialised_memory


def test_a_window_moves_less_than_the_whole() -> None:
    tile = Tile(block_m=128, block_n=64)  # the same for both: shipped tiles differ
    local, full = (
        account(Problem.preset("gemma3-12b", layer=kind), tile=tile, target=H100).flash for kind in ("local", "global")
    )
    assert local.issued < full.issued / 2


def test_training_memory_grows_with_layers_and_inference_does_not() -> None:
    forward, train = of_model("llama3-8b", target=H100), of_model("llama3-8b", target=H100, train=True)
    one = train.layers[0].account
    assert forward.materialised_memory == forward.layers[0].account.materialised.live
    assert train.flash_memory == 32 * one.flash.saved
    assert train.materialised_memory == 32 * one.materialised.saved + one.materialised.live - one.materialised.saved


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"preset": "gpt-9"}, "not known"),
        ({"preset": "sdxl/x"}, "no layers of kind"),
        ({"preset": "sdxl", "seqlen": 0}, "seqlen=0"),
        ({"preset": "sdxl", "batch": 0}, "batch=0"),
        ({"preset": "sdxl", "target": Target.named("cpu")}, "'cpu' has no memory hierarchy"),
    ],
)
def test_bad_input_is_refused(arguments: dict[str, Any], said: str) -> None:
    with pytest.raises(InvalidProblemError, match=said):
        of_model(**{"target": H100, **arguments})
    with pytest.raises(InvalidProblemError, match="resident=0"):
        account(problem(), tile=Tile(block_m=1, block_n=1), target=H100, resident=0)
    with pytest.raises(InvalidProblemError, match="block_m=0"):
        Tile(block_m=0, block_n=1)
