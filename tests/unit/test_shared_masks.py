"""All masks without captured tensors run one kernel: its tables say what each of them says, in its loops and where it computes a tile anew."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch

import flashgen
from flashgen import block_ranges, dispatch, mask_words, mods, shared_masks, warm
from flashgen.render import render
from flashgen.spec import AttentionSpec
from flashgen.target import Target
from flashgen.variants import by_name

CPU = torch.device("cpu")
MASKS: dict[str, Callable[..., Any]] = {
    "window": lambda b, h, i, j: (i >= j) & (i - j < 150),
    "prefix": lambda b, h, i, j: (j < 70) | (i >= j),
    "heads": lambda b, h, i, j: (i + 40 * h >= j) & (j % 200 != 3 * b),
    "scattered": lambda b, h, i, j: (i // 32) % 5 == (j // 32) % 5,
    "nothing": lambda b, h, i, j: i < j - 100000,
    "all": lambda b, h, i, j: j >= 0,
}


@pytest.mark.parametrize("tile", [(128, 128), (192, 96), (64, 64)])
@pytest.mark.parametrize("name", MASKS)
def test_slots_and_words_say_what_the_mask_says(name: str, tile: tuple[int, int]) -> None:
    """The program that all share, evaluated pair by pair on the tables of a mask."""
    sizes = (2, 3, 300, 410)
    program, _ = mods.program(None, {"mask_mod": MASKS[name]}, CPU)
    problem = flashgen.Problem(
        dtype="bf16", batch=2, seqlen_q=300, seqlen_k=410, num_heads_q=3, num_heads_kv=3, head_dim=64, head_dim_v=64,
        has_mask_mod=True,
    )  # fmt: skip
    indices = np.meshgrid(*map(np.arange, sizes), indexing="ij")
    b, h, i, j = (torch.from_numpy(x) for x in indices)
    want = MASKS[name](b, h, i, j) & torch.ones(sizes, dtype=torch.bool)
    found = block_ranges.looked_up(program, (), problem, tile)
    assert found["mask_slots"] is not None and found["mask_words"] is not None
    slots = found["mask_slots"].expand(2, 3, -1, -1)
    assert slots.stride(2) % 16 == 0 and slots.shape[3] % 16 == 0, "one kernel for all lengths"
    seen = shared_masks._looked_up(tile[1], slots, found["mask_words"])(b, h, i, j)
    assert torch.equal(seen, want)
    assert (found["mask_lists"] is not None) == (name == "scattered" and tile[0] == 64) or name == "scattered"


def test_a_new_mask_has_the_kernel_of_another() -> None:
    variant = by_name("gluon_fwd_sm90")
    texts = set()
    for mask in (MASKS["window"], MASKS["prefix"]):
        spec = spec_of(mask)
        texts.add(render(shared_masks.shared(spec, 128), variant).text)
        assert render(spec, variant).text not in texts, "a mask's own says what it computes"
    assert len(texts) == 1
    assert "def statistics" not in next(iter(texts)), "its tables are never of another content"


def spec_of(mask: Callable[..., Any], **mods_of: Any) -> AttentionSpec:
    problem = flashgen.Problem(
        dtype="bf16", batch=1, seqlen_q=512, seqlen_k=512, num_heads_q=4, num_heads_kv=2, head_dim=128, head_dim_v=128
    )
    return problem.modified(mask_mod=mask, **mods_of).spec


def test_what_tables_cannot_say_has_its_own() -> None:
    ids = torch.arange(512, dtype=torch.int32) // 100
    assert shared_masks.may_share(spec_of(MASKS["window"]))
    assert not shared_masks.may_share(spec_of(lambda b, h, i, j: ids[i] == ids[j]))
    assert not shared_masks.may_share(spec_of(MASKS["window"], score_mod=lambda s, b, h, i, j: s * 2))
    assert not shared_masks.may_share(AttentionSpec(dtype="bf16", head_dim=64, head_dim_v=64, causal=True))


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> Iterator[list[tuple[str, dict[str, Any]]]]:
    """CPU tensors count as on an h100; what would be launched: which file, with which values."""
    from flashgen import build

    made: list[tuple[str, dict[str, Any]]] = []
    real = build.build

    def built(source: Any) -> Any:
        return replace(real(source), launch=lambda *_, **values: made.append((source.name, values)))

    monkeypatch.setenv("FLASHGEN_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(Target, "detect", classmethod(lambda cls, device=None: Target.named("h100")))
    monkeypatch.setattr("flashgen.execution.build", built)
    monkeypatch.setattr("flashgen.warm.build", built)
    dispatch.forget()
    yield made
    dispatch.forget()


def test_calls_of_new_masks_launch_one_file_with_their_own_tables(launches: list[tuple[str, dict[str, Any]]]) -> None:
    q, k = (torch.zeros(1, 512, heads, 64, dtype=torch.bfloat16) for heads in (4, 2))
    for width in (100, 100, 101, 101):
        flashgen.attention(
            q, k, k, mask_mod=lambda b, h, i, j, width=width: (i >= j) & (i - j < width), backend="gluon"
        )
    assert len(launches) == 4 and len({name for name, _ in launches}) == 1
    assert len(warm.table()) == 2, "each mask's second call is a warm one"
    (first, again, other, _) = (values for _, values in launches)
    for name in ("captured_tile_slots", "captured_tile_words", "mask_words", "mask_ranges"):
        assert first[name] is not None and torch.equal(first[name], again[name])
    assert first["captured_tile_words"] is first["mask_words"]
    assert not torch.equal(first["mask_words"], other["mask_words"])


def test_too_many_tiles_have_their_own(launches: list[tuple[str, dict[str, Any]]]) -> None:
    q, k = (torch.zeros(1, 512, heads, 64, dtype=torch.bfloat16) for heads in (4, 2))
    with mock.patch.object(mask_words, "_MOST_SLOTS", 0):
        flashgen.attention(q, k, k, mask_mod=lambda b, h, i, j: i - j < 123, backend="gluon")
    block_ranges.forget()
    assert "captured_tile_slots" not in launches[-1][1]


def test_tables_without_words_have_their_own(
    launches: list[tuple[str, dict[str, Any]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Slots that were left behind, as the fuzz once left them, name words that are not there: a launch would look for their sizes."""
    tables = block_ranges._analysed
    monkeypatch.setattr(block_ranges, "_analysed", lambda *given: replace(tables(*given), words=None))
    q, k = (torch.zeros(1, 512, heads, 64, dtype=torch.bfloat16) for heads in (4, 2))
    block_ranges.forget()
    flashgen.attention(q, k, k, mask_mod=lambda b, h, i, j: i // 8 == j // 8, causal=True, backend="gluon")
    block_ranges.forget()
    assert "captured_tile_slots" not in launches[-1][1] and launches[-1][1]["mask_words"] is None


def test_a_measured_configuration_keeps_the_kernel_that_was_measured(
    launches: list[tuple[str, dict[str, Any]]],
) -> None:
    spec = spec_of(MASKS["window"])
    q, k = (torch.zeros(1, 512, heads, 128, dtype=torch.bfloat16) for heads in (4, 2))
    flashgen.attention(q, k, k, mask_mod=MASKS["window"], backend="gluon")
    plan = next(plan for plan in dispatch._memo.values() if plan.problem.spec == spec)
    assert shared_masks.kernel_spec(plan) != spec
    for source in ("database", "seed"):
        assert shared_masks.kernel_spec(replace(plan, config_source=source)) == spec  # type: ignore[arg-type]
