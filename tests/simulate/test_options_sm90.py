"""Options of the Hopper forward in the simulator: every one at the bar of the portable kernel, with NaN in all that nobody may see."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import flashgen
from flashgen.mods import arrays_of, key_ranges, program
from flashgen.simulator import SCHEDULES
from flashgen.target import Target
from flashgen.variants import by_name

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "fuzz"))

from cases import Case
from judge import judge

VARIANT, H100 = by_name("gluon_fwd_sm90"), Target.named("h100")
_WIDE: dict[str, Any] = {
    "backend": "gluon", "dtype": "bf16", "batch": 1, "seqlen_q": 150, "seqlen_k": 333, "heads_kv": 1, "group": 2,
    "head_dim": 64, "head_dim_v": 64, "lse": True, "tile": (192, 64), "seed": 3,
}  # fmt: skip
_NARROW = {**_WIDE, "tile": (128, 64), "head_dim": 128, "head_dim_v": 128, "dtype": "fp16"}
_PACKED = {
    **_WIDE, "batch": 1, "lengths": ((130, 300, 170), (0, 5, 5), (40, 3, 0), (201, 190, 66)), "seqused": True, "causal": True,
}  # fmt: skip

CASES: dict[str, Case] = {
    "window": Case(**{**_WIDE, "window": (100, 40)}),
    "window, small blocks": Case(**{**_NARROW, "window": (100, 40)}),
    "causal window": Case(**{**_WIDE, "window": (70, 5), "causal": True, "seqlen_q": 400}),
    "narrow window, top-left": Case(**{**_NARROW, "window": (3, 2), "top_left": True, "seqlen_q": 300}),
    "a window on one side": Case(**{**_WIDE, "window": (-1, 4), "lse": False}),
    "a window on the other side": Case(**{**_NARROW, "window": (4, -1)}),
    "a window beyond every key": Case(**{**_WIDE, "window": (5, 5), "seqlen_q": 333, "seqlen_k": 60}),
    "heads that share a tile in a window": Case(**{**_WIDE, "window": (30, 0), "seqlen_q": 9, "group": 4}),
    "softcap": Case(**{**_WIDE, "softcap": 2.0}),
    "a cap far above most scores": Case(**{**_WIDE, "softcap": 30.0, "causal": True}),
    "a cap far above most scores, wide": Case(**{**_NARROW, "softcap": 30.0, "causal": True}),
    "a cap in a window": Case(**{**_NARROW, "softcap": 2.0, "window": (60, 3), "sinks": True}),
    "a cap and a scale of 0": Case(**{**_WIDE, "softcap": 30.0, "scale": 0.0}),
    "softcap, causal": Case(**{**_NARROW, "softcap": 0.5, "causal": True}),
    "alibi": Case(**{**_WIDE, "alibi": "bh"}),
    "alibi, causal, linear": Case(**{**_WIDE, "alibi": "bh", "causal": True, "seqlen_q": 333}),
    "alibi, causal, a negative scale": Case(**{**_NARROW, "alibi": "h", "causal": True, "scale": -0.1}),
    "alibi, causal": Case(**{**_NARROW, "alibi": "h", "causal": True, "top_left": True}),
    "sinks": Case(**{**_WIDE, "sinks": True, "causal": True, "seqlen_q": 400}),
    "sinks of heads that share a tile": Case(**{**_NARROW, "sinks": True, "seqlen_q": 5, "group": 8, "lse": False}),
    "sinks and no keys": Case(**{**_WIDE, "sinks": True, "seqlen_k": 0}),
    "bias": Case(**{**_WIDE, "bias": "bhij"}),
    "bias of -inf, broadcast": Case(**{**_NARROW, "bias": "1hi1", "bias_inf": True}),
    "bias of keys, after a cap": Case(**{**_WIDE, "bias": "j", "softcap": 0.5, "causal": True}),
    "attn_mask": Case(**{**_WIDE, "attn_mask": "bhij"}),
    "bias and attn_mask of whole blocks": Case(**{**_NARROW, "bias": "b1ij", "attn_mask": "1hij", "seqlen_k": 320, "causal": True}),
    "attn_mask of columns": Case(**{**_NARROW, "attn_mask": "111j", "causal": True}),
    "mask_mod": Case(**{**_WIDE, "mask_mod": "document", "seqlen_q": 333}),
    "mask_mod of columns": Case(**{**_NARROW, "mask_mod": "columns"}),
    "mask_mod of nothing": Case(**{**_WIDE, "mask_mod": "nothing"}),
    "mask_mod by heads": Case(**{**_NARROW, "mask_mod": "thirds", "causal": True, "group": 3, "seqlen_q": 20}),
    "block_mask": Case(**{**_WIDE, "block_mask": "document", "causal": True}),
    "block_mask and mask_mod": Case(**{**_NARROW, "block_mask": "columns", "mask_mod": "rows", "tile": (128, 32), "group": 3}),
    "block_mask and attn_mask": Case(**{**_WIDE, "block_mask": "columns", "attn_mask": "1h11", "mask_mod": "thirds", "causal": True}),
    "mask_mod in a window": Case(**{**_WIDE, "mask_mod": "rows", "window": (60, 10), "sinks": True}),
    "mask_mod, evaluated": Case(**{**_WIDE, "mask_mod": "document", "seqlen_q": 333, "words": "none"}),
    "mask_mod of heads, evaluated": Case(**{**_NARROW, "mask_mod": "thirds", "causal": True, "group": 3, "seqlen_q": 20, "words": "none"}),
    "mask_mod that reads": Case(**{**_WIDE, "mask_mod": "sequences", "heads_kv": 2}),
    "mask_mod that reads, evaluated": Case(**{**_NARROW, "mask_mod": "pages", "words": "none"}),
    "mask_mod of scattered blocks": Case(**{**_WIDE, "mask_mod": "scattered", "batch": 2, "seqlen_q": 333}),
    "mask_mod of scattered blocks, evaluated": Case(**{**_NARROW, "mask_mod": "scattered", "seqlen_q": 300, "words": "none"}),
    "mask_mod of blocks that it reads": Case(**{**_WIDE, "mask_mod": "read blocks", "batch": 2, "heads_kv": 2, "spread": True}),
    "lists of another content": Case(**{**_NARROW, "mask_mod": "read blocks", "batch": 2, "seqlen_q": 300, "words": "stale"}),
    "words of another content": Case(**{**_WIDE, "mask_mod": "sequences", "batch": 2, "words": "stale"}),
    "words of another content, linear": Case(**{**_NARROW, "mask_mod": "pages", "alibi": "h", "sinks": True, "words": "stale"}),
    "score_mod": Case(**{**_WIDE, "score_mod": "relative", "causal": True}),
    "score_mod with a table": Case(**{**_NARROW, "score_mod": "gated", "group": 3}),
    "score_mod and softcap": Case(**{**_WIDE, "score_mod": "squared", "softcap": 0.5, "seqlen_q": 20, "group": 4}),
    "dropout": Case(**{**_WIDE, "dropout_p": 0.3, "causal": True}),
    "dropout in a window": Case(**{**_NARROW, "dropout_p": 0.6, "window": (40, 10)}),
    "packed": Case(**_PACKED),
    "packed, top-left": Case(**{**_PACKED, "top_left": True, "seqused": False, "tile": (128, 64)}),
    "packed, not causal": Case(**{**_PACKED, "causal": False, "lse": False}),
    "packed, everything": Case(**{
        **_PACKED, "alibi": "bh", "bias": "b1ij", "sinks": True, "dropout_p": 0.4, "window": (90, 2), "softcap": 2.0,
        "mask_mod": "thirds", "score_mod": "table", "attn_mask": "1hij", "group": 1,
    }),
    "everything": Case(**{
        **_WIDE, "window": (120, 20), "softcap": 2.0, "alibi": "bh", "sinks": True, "bias": "1h1j", "attn_mask": "b1ij", "score_mod": "table",
        "mask_mod": "thirds",
    }),
    "a padded head dim": Case(**{**_WIDE, "head_dim": 40, "head_dim_v": 56, "window": (50, 50), "alibi": "h", "strides": "padded"}),
    "a negative scale": Case(**{**_NARROW, "scale": -0.2, "window": (50, 50), "layout": "bhsd"}),
    "large logits": Case(**{**_WIDE, "values": "large", "alibi": "h", "window": (90, -1), "causal": True}),
    "logits near -600": Case(**{**_NARROW, "values": "low", "sinks": True, "mask_mod": "columns"}),
}  # fmt: skip


@pytest.mark.sampled(every=2)
@pytest.mark.parametrize("name", CASES)
def test_option(name: str) -> None:
    said = judge(CASES[name], again=False)  # the same schedule again gives the same bits
    assert said is None, said


@pytest.mark.long
def test_more_sequences_than_one_look_holds() -> None:
    """The list of blocks of keys is made 128 sequences at a time."""
    lengths = tuple((1 + n % 3, 1 + n % 2, 1) for n in range(131))
    case = Case(
        **{
            **_PACKED,
            "lengths": lengths,
            "seqused": False,
            "grad": True,
            "head_dim": 16,
            "head_dim_v": 16,
            "tile": (64, 64),
        }
    )
    said = judge(case, again=False)
    assert said is None, said


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_every_schedule(schedule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks that other warpgroups see on either side, in every interleaving."""
    real = flashgen.interpret.simulate
    monkeypatch.setattr(flashgen.interpret, "simulate", lambda *a, **k: real(*a, **k, schedule=schedule, seed=5))
    for case in (
        Case(**{**_WIDE, "window": (40, 30), "seqlen_q": 333, "tile": (192, 32)}),
        Case(**{**_NARROW, "mask_mod": "document", "seqlen_q": 333, "tile": (128, 32)}),
    ):
        said = judge(case, again=False)
        assert said is None, said


def test_ranges_are_those_of_a_warpgroup() -> None:
    """64 rows whatever the tile: what the template divides by."""
    config = VARIANT.default(flashgen.AttentionSpec.from_key("attention_fwd-bf16-d64-mask_mod"), H100)
    tile = (config.BLOCK_M, config.BLOCK_N)
    assert VARIANT.mask_tiles(config) == {"words": tile, "lists": tile}
    assert flashgen.mask_words.ROWS == 64
    mask, tensors = program(None, {"mask_mod": lambda b, h, i, j: j <= i}, torch.device("cpu"))
    found = key_ranges(
        mask.mask, arrays_of(tensors), batch=1, num_heads=1, seqlen_q=200, seqlen_k=200, block_m=64, block_n=64
    )
    assert found.last.tolist() == [[[1, 2, 3, 4]]]


@pytest.mark.parametrize("lazy", [False, True])
def test_words_of_another_content_count_for_nothing(lazy: bool) -> None:
    """Ids that a writer changed whom PyTorch does not count: rows are summed anew, pair by pair."""
    flashgen.block_ranges.forget()
    ids = (torch.arange(200) // 70).to(torch.int32)
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 200, 2, 64, generator=generator).half() for _ in range(3))
    config = VARIANT.config(
        BLOCK_M=128, BLOCK_N=64, STAGES=2, CONSUMER_REGS=240, PRODUCER_REGS=24, SECTION=4, OWN_STAGING=True, LAZY_SUM=lazy,
        TAKE_TURNS=False,
    )  # fmt: skip

    def run(**how: Any) -> tuple[torch.Tensor, ...]:
        found: Any = flashgen.attention(q, k, v, mask_mod=lambda b, h, i, j: ids[i] == ids[j], return_lse=True, **how)
        return found

    for write in (0, 1):
        if write:
            np.asarray(ids)[:] = np.arange(200) // 90 * (np.arange(200) < 180) + 9 * (np.arange(200) >= 190)
            k[:, 180:190], v[:, 180:190] = 0.0, 0.0
        found, want = run(backend="gluon", config=config), run(backend="torch")
        for x, y in zip(found, want, strict=True):
            assert (x.float() - y.float()).abs().max() < 4e-3, write


@pytest.mark.parametrize("beside", [False, True])
@pytest.mark.parametrize("write", [False, True])
def test_lists_of_scattered_blocks(beside: bool, write: bool) -> None:
    """Gaps, rows that see nothing, NaN where nobody looks; and a number that a writer changed whom PyTorch does not count."""
    flashgen.block_ranges.forget()
    phase = torch.tensor(0, dtype=torch.int32)
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, n, 2, 64, generator=generator).half() for n in (600, 580, 580))
    k[:, 512:576], v[:, 512:576] = torch.nan, torch.nan
    config = VARIANT.config(
        BLOCK_M=128, BLOCK_N=64, STAGES=2, CONSUMER_REGS=240, PRODUCER_REGS=24, SECTION=4, OWN_STAGING=True, LAZY_SUM=True,
        TAKE_TURNS=not write,
    )  # fmt: skip

    def run(**how: Any) -> tuple[torch.Tensor, ...]:
        def mask(b: Any, h: Any, i: Any, j: Any) -> Any:
            return ((i // 64 - j // 64) % 5 == phase) & (i > 9) & (j // 64 != 8)

        other = {"attn_mask": torch.arange(580) % 7 != 2} if beside else {}
        found: Any = flashgen.attention(q, k, v, mask_mod=mask, return_lse=True, **other, **how)
        return found

    listed: list[bool] = []
    real = flashgen.block_ranges.looked_up

    def spied(*given: Any, **more: Any) -> Any:
        made = real(*given, **more)
        listed.append(made["mask_lists"] is not None)
        return made

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(flashgen.block_ranges, "looked_up", spied)
        if write:
            run(backend="gluon", config=config)
            np.asarray(phase)[...] = 3
        found = run(backend="gluon", config=config)
    assert listed and all(listed)
    # The torch backend multiplies what is hidden, too.
    k[:, 512:576], v[:, 512:576] = 0.0, 0.0
    for x, y in zip(found, run(backend="torch"), strict=True):
        finite = y.isfinite()
        assert torch.equal(finite, x.isfinite()) and (x.float() - y.float())[finite].abs().max() < 4e-3
