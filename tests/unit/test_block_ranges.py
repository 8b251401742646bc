"""Ranges of masks that read tensors: right for what the tensors hold now, or every block is masked; nothing is ever stale."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from dataclasses import replace
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from torch import Tensor

from flashgen import block_ranges, mods
from flashgen.problem import Problem
from flashgen.variants import by_name

CPU = torch.device("cpu")
SIZE = 256
PROBLEM = Problem(
    dtype="bf16", batch=2, seqlen_q=SIZE, seqlen_k=SIZE, num_heads_q=3, num_heads_kv=3, head_dim=16, head_dim_v=16,
    has_mask_mod=True,
)  # fmt: skip
CONFIG = by_name("triton_fwd").config(BLOCK_M=32, BLOCK_N=16, num_warps=4, num_stages=1)
EVERYTHING = [0, SIZE // 16, SIZE // 16, SIZE // 16]


@pytest.fixture(autouse=True)
def nothing_known() -> Iterator[None]:
    block_ranges.forget()
    yield
    block_ranges.forget()


def documents(ids: Tensor) -> Any:
    return mods.program(None, {"mask_mod": lambda b, h, i, j: (ids[i] == ids[j]) & (i >= j)}, CPU)


def found(program: Any, tensors: tuple[Tensor, ...], problem: Problem = PROBLEM) -> Tensor:
    made = block_ranges.mask_ranges(program, tensors, problem, CONFIG)
    assert made is not None
    return made


def analysed(program: Any, tensors: tuple[Tensor, ...], problem: Problem = PROBLEM) -> Tensor:
    one = mods.key_ranges(
        program.mask, mods.arrays_of(tensors), batch=problem.batch, num_heads=problem.num_heads_q, seqlen_q=problem.seqlen_q,
        seqlen_k=problem.seqlen_k, block_m=32, block_n=16,
    )  # fmt: skip
    return torch.stack([torch.as_tensor(x) for x in (one.first, one.full_first, one.full_last, one.last)], -1)


def ids_of(length: int, dtype: torch.dtype = torch.int32) -> Tensor:
    return (torch.arange(SIZE) // length).to(dtype)


def test_what_is_remembered_is_what_is_analysed_and_analysed_once() -> None:
    program, tensors = documents(ids_of(50))
    with mock.patch.object(block_ranges, "_analysed", wraps=block_ranges._analysed) as analyse:
        first, again = found(program, tensors), found(program, tensors)
    assert analyse.call_count == 1
    assert torch.equal(first, analysed(program, tensors)) and torch.equal(first, again)
    assert first[0, 0, 4].tolist() != EVERYTHING, "else the test would not see the difference"
    # A dimension of one counts for all batches and heads.
    assert first.stride()[:2] == (0, 0) and first.dtype == torch.int32


def test_an_in_place_write_is_analysed_anew() -> None:
    program, tensors = documents(ids_of(50))
    before = found(program, tensors)
    tensors[0].copy_(ids_of(20))
    assert torch.equal(found(program, tensors), analysed(program, tensors))
    assert not torch.equal(found(program, tensors), before)


@pytest.mark.parametrize("inference", [False, True])
def test_a_write_that_nobody_counts_masks_every_block(inference: bool) -> None:
    with torch.inference_mode(inference):
        program, tensors = documents(ids_of(50))
        before = found(program, tensors)
        assert torch.equal(before, analysed(program, tensors))
        tensors[0].numpy()[7] = 3  # no version counter sees this: as another library's kernel, or a graph's replay
        after = found(program, tensors)
    assert after.shape == before.shape and after.stride() == before.stride()
    assert after[0, 0].tolist() == [EVERYTHING] * 8
    tensors[0].numpy()[7] = 0
    assert torch.equal(found(program, tensors), before), "what holds the old content again has the old ranges"


def test_another_tensor_at_the_same_address_is_another_content() -> None:
    memory = np.zeros(SIZE, np.int32)
    memory[:] = ids_of(50).numpy()
    program, tensors = documents(torch.from_numpy(memory))
    found(program, tensors)
    version = tensors[0]._version
    del tensors
    gc.collect()
    memory[:] = ids_of(20).numpy()
    again, others = documents(torch.from_numpy(memory))
    assert again.digest == program.digest and others[0]._version == version
    assert torch.equal(found(again, others), analysed(again, others))


def test_views_of_one_memory_differ_by_place_and_stride() -> None:
    both = torch.stack([ids_of(50), ids_of(20)])
    mixed = torch.stack([ids_of(50), ids_of(20)], 1).flatten()
    for view in (both[0], both[1], mixed[:SIZE], mixed[::2], mixed[1::2]):
        program, tensors = documents(view)
        assert torch.equal(found(program, tensors), analysed(program, tensors))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_floats_with_nan_are_compared_by_their_bits(dtype: torch.dtype) -> None:
    table = torch.zeros(SIZE, dtype=dtype)
    table[3] = torch.nan
    program, tensors = mods.program(
        None, {"mask_mod": lambda b, h, i, j: (i - j < 40) & (i >= j) & (table[j] < 1)}, CPU
    )
    assert found(program, tensors)[0, 0, 5].tolist() != EVERYTHING


def test_under_capture_nothing_is_copied_to_the_host() -> None:
    program, tensors = documents(ids_of(50))
    with mock.patch.object(block_ranges, "capturing", lambda device: True):
        with mock.patch.object(block_ranges, "_analysed", side_effect=AssertionError("synchronises")):
            assert block_ranges.mask_ranges(program, tensors, PROBLEM, CONFIG) is None
        with mock.patch.object(block_ranges, "capturing", lambda device: False):
            known = found(program, tensors)
        with mock.patch.object(block_ranges, "_analysed", side_effect=AssertionError("synchronises")):
            assert torch.equal(found(program, tensors), known)
            tensors[0].copy_(ids_of(20))  # counted, but there is no way to look: the comparison on the device says no
            assert found(program, tensors)[0, 0].tolist() == [EVERYTHING] * 8


def test_a_table_counts_for_all_batches_and_heads_even_where_nothing_is_left_out() -> None:
    program, tensors = documents(torch.zeros(SIZE, dtype=torch.int32))
    for turned in (False, True):
        made = block_ranges.ranges(program, tensors, PROBLEM, (SIZE, SIZE), turned=turned)
        assert made is not None and made.stride()[:2] == (0, 0)


def test_large_tensors_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(block_ranges, "_MOST_BYTES", 4 * SIZE - 1)
    program, tensors = documents(ids_of(50))
    assert block_ranges.mask_ranges(program, tensors, PROBLEM, CONFIG) is None


def test_what_only_a_score_reads_is_not_looked_at() -> None:
    table, ids = torch.randn(3, 600), ids_of(50)
    program, tensors = mods.program(
        lambda s, b, h, i, j: s + table[h, i - j + 300], {"mask_mod": lambda b, h, i, j: ids[i] == ids[j]}, CPU
    )
    numbers = [number for number, row in enumerate(program.captures) if row.name == "ids"]
    assert list(program.mask_reads) == numbers and len(tensors) == 2
    before = found(program, tensors)
    table.add_(1)
    with mock.patch.object(block_ranges, "_analysed", side_effect=AssertionError("the mask did not change")):
        assert torch.equal(found(program, tensors), before)


def test_ranges_that_leave_nothing_out_need_no_comparison() -> None:
    scattered = torch.arange(SIZE, dtype=torch.int32) % 3
    program, tensors = mods.program(None, {"mask_mod": lambda b, h, i, j: scattered[j] != scattered[i]}, CPU)
    made = found(program, tensors)
    assert made[0, 0].tolist() == [EVERYTHING] * 8 and made.stride()[:2] == (0, 0)
    (known,) = block_ranges._contents.values()
    assert known.copies == ()


def test_the_other_side_counts_queries_of_each_block_of_keys() -> None:
    program, tensors = documents(ids_of(50))
    made = block_ranges.ranges(program, tensors, PROBLEM, (32, 16), turned=True)
    one = mods.query_ranges(
        program.mask,
        mods.arrays_of(tensors),
        batch=2,
        num_heads=3,
        seqlen_q=SIZE,
        seqlen_k=SIZE,
        block_m=32,
        block_n=16,
    )
    expected = torch.stack([torch.as_tensor(x) for x in (one.first, one.full_first, one.full_last, one.last)], -1)
    assert made is not None and torch.equal(made, expected) and made.shape[2] == SIZE // 16
    # By pairs: queries outside of a block's range see none of its keys, those of the full range see all.
    ids, index = ids_of(50), torch.arange(SIZE)
    seen = (ids[:, None] == ids[None]) & (index[:, None] >= index[None])
    for block, (first, full_first, full_last, last) in enumerate(made[0, 0].tolist()):
        keys = seen[:, 16 * block : 16 * block + 16]
        assert not keys[: 32 * first].any() and not keys[32 * last :].any()
        assert keys[32 * full_first : 32 * full_last].all()
    tensors[0].numpy()[7] = 3
    changed = block_ranges.ranges(program, tensors, PROBLEM, (32, 16), turned=True)
    assert changed is not None and changed[0, 0].tolist() == [[0, 8, 8, 8]] * 16


def test_numbers_from_the_cpu_keep_one_address() -> None:
    limit = torch.tensor(40)
    program, (here,) = mods.program(None, {"mask_mod": lambda b, h, i, j: i - j < limit}, CPU)
    elsewhere = torch.device("meta")
    moved = mods.bound(program, (limit,), elsewhere)
    assert moved[0] is mods.bound(program, (limit.clone(),), elsewhere)[0]
    limit.fill_(50)
    assert moved[0] is not mods.bound(program, (limit,), elsewhere)[0] and here is limit


def test_packed_sequences_and_empty_calls_have_none() -> None:
    program, tensors = documents(ids_of(50))
    for problem in (replace(PROBLEM, varlen=True), replace(PROBLEM, seqlen_q=0), replace(PROBLEM, batch=0)):
        assert block_ranges.mask_ranges(program, tensors, problem, CONFIG) is None
