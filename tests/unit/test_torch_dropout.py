"""Dropout's definition: Philox's published vectors, the words of one call beside the accumulators of tensor cores, statistics."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from flashgen import ops
from flashgen.torch_blocked.philox import keep_block, keep_mask, philox4x32, threshold

SEED = torch.tensor([0x1234_5678_9ABC_DEF0, 7])


def test_philox_of_pi_is_the_published_one() -> None:
    """The third known answer of Random123 1.09, whose words all differ: it sees an exchanged counter or key."""
    counter = (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344)
    key = (0xA4093822, 0x299F31D0)
    words = philox4x32(tuple(map(torch.tensor, counter)), tuple(map(torch.tensor, key)))  # type: ignore[arg-type]
    assert tuple(int(word) for word in words) == (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1)


@pytest.mark.parametrize(
    ("rows", "columns"),
    [((0, 16), (0, 16)), ((0, 1), (0, 1)), ((3, 40), (5, 77)), ((8, 24), (31, 33)), ((256, 300), (511, 520))],
)
def test_a_rectangle_is_its_elements(rows: tuple[int, int], columns: tuple[int, int]) -> None:
    heads = torch.tensor([[0, 1], [2, 2**32 - 1]]).view(2, 2, 1, 1)
    got = keep_block(SEED, 0.3, heads, slice(*rows), slice(*columns))
    i, j = torch.arange(*rows).view(-1, 1), torch.arange(*columns)
    assert torch.equal(got, keep_mask(SEED, 0.3, heads, i, j))


def mma_accumulator(lane: int) -> list[tuple[int, int]]:
    """(row, column) of the four accumulators of one thread: PTX ISA, section "Matrix Fragments for mma.m16n8k16", C and D."""
    group, inside = lane >> 2, lane % 4
    return [(group if c < 2 else group + 8, inside * 2 + (c & 1)) for c in range(4)]


def test_one_call_covers_what_one_thread_holds() -> None:
    """Over two neighbouring m16n8 tiles a thread holds {i, i + 8} x {j, j + 8} twice, each pair from one call of its own."""
    calls: dict[tuple[int, int], tuple[int, set[int]]] = {}
    for lane in range(32):
        held = [(i, j + 8 * tile) for tile in range(2) for i, j in mma_accumulator(lane)]
        for i, j in held:
            counter = ((j // 16) * 8 + j % 8, (i // 16) * 8 + i % 8)
            word = 2 * (i // 8 % 2) + j // 8 % 2
            owner, words = calls.setdefault(counter, (lane, set()))
            assert owner == lane, "two threads need one call"
            words.add(word)
    assert len(calls) == 64 and all(words == {0, 1, 2, 3} for _, words in calls.values())


def test_the_documented_counter_gives_the_mask() -> None:
    """Element by element, from the text of the module alone, with heads beyond 2^31."""
    seed, offset, head = 0x0FED_CBA9_8765_4321, 2**40 + 99, 2**31 + 5
    got = keep_mask(
        torch.tensor([seed, offset]), 0.5, torch.tensor(head), torch.arange(40).view(-1, 1), torch.arange(40)
    )
    for i, j in ((0, 0), (7, 8), (8, 7), (15, 16), (17, 39), (39, 31)):
        counter = ((j // 16) * 8 + j % 8, (i // 16) * 8 + i % 8, head, offset % 2**32)
        words = philox4x32(tuple(map(torch.tensor, counter)), (torch.tensor(seed % 2**32), torch.tensor(seed >> 32)))  # type: ignore[arg-type]
        assert bool(got[i, j]) == (int(words[2 * (i // 8 % 2) + j // 8 % 2]) >= 2**31)


def mask(p: float, seed: Tensor = SEED, size: int = 512) -> Tensor:
    return keep_block(seed, p, torch.zeros(1, 1, 1, 1, dtype=torch.int64), slice(0, size), slice(0, size))[0, 0]


@pytest.mark.parametrize("p", [0.001, 0.1, 0.5, 0.9, 0.999])
def test_how_many_are_kept(p: float) -> None:
    """Overall, per row, per column and per word of a call, within five standard deviations of a binomial."""
    kept = mask(p).double()
    parts = [kept.flatten(), kept.view(32, 2, 8, 512)[:, 1].flatten(), kept.view(512, 32, 2, 8)[:, :, 0].flatten()]
    for part in parts:
        assert abs(float(part.mean()) - (1 - p)) < 5 * math.sqrt(p * (1 - p) / part.numel())
    for sums in (kept.sum(0), kept.sum(1)):
        assert float((sums - 512 * (1 - p)).abs().max()) < 6 * math.sqrt(512 * p * (1 - p)) + 1
    # Neighbours are independent: their product has the mean of independent draws.
    for a, b in (
        (kept[:, 1:], kept[:, :-1]),
        (kept[1:], kept[:-1]),
        (kept[:, 8:], kept[:, :-8]),
        (kept[8:], kept[:-8]),
    ):
        assert abs(float((a * b).mean()) - (1 - p) ** 2) < 5 * math.sqrt(p / a.numel()) * 1.5


def test_the_ends_of_p() -> None:
    assert mask(0.0).all() and threshold(0.0) == 0
    largest = math.nextafter(1.0, 0.0)
    assert threshold(largest) == 2**32 and not mask(largest, size=64).any()
    assert threshold(1 - 2**-32) == 2**32 - 1


def test_only_the_low_half_of_the_offset_counts() -> None:
    seed, offset = (int(x) for x in SEED)
    same, other = torch.tensor([seed, offset + 2**32]), torch.tensor([seed, offset + 1])
    assert torch.equal(mask(0.5), mask(0.5, same)) and not torch.equal(mask(0.5), mask(0.5, other))
    assert not torch.equal(mask(0.5), mask(0.5, torch.tensor([seed ^ 2**40, offset])))


def test_a_seed_is_drawn_on_the_device_and_nobody_reads_it() -> None:
    """So a CUDA graph replays the draw with its generator: fake tensors have no values, and raise where one is asked for."""
    with FakeTensorMode():
        q = torch.empty(1, 8, 2, 16, device="cuda:0")
        seed = ops.draw_philox(q, 0.5, None)
        assert seed is not None and seed.device == q.device and seed.dtype == torch.int64 and seed.shape == (2,)
        with pytest.raises(RuntimeError):
            seed.tolist()
