"""Mods that are right for single values alone, as FlexAttention calls them: every backend means the same by them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask

import flashgen
from flashgen import mods

BATCH, HEADS, SIZE = 2, 2, 12
_random = torch.Generator().manual_seed(4)
TABLE = torch.randn(BATCH, SIZE, generator=_random).requires_grad_()
PLACES = torch.randn(SIZE, 3, generator=_random).requires_grad_()
COLUMN = torch.randn(
    BATCH, 1, generator=_random
).requires_grad_()  # of one element, which would broadcast without an error
INTERVALS = torch.tensor([[0, 5], [3, 12]])
IMAGE = torch.arange(SIZE) // 6

SCORES: dict[str, tuple[Callable[..., Any], Tensor]] = {
    "index after index": (lambda s, b, h, q, k: s + TABLE[b][q] * k, TABLE),
    "dot": (lambda s, b, h, q, k: s + torch.dot(PLACES[q], PLACES[k]), PLACES),
    "sum": (lambda s, b, h, q, k: s + (PLACES[q] * PLACES[k]).sum(), PLACES),
    "first of a row": (lambda s, b, h, q, k: s + COLUMN[b][0] * k, COLUMN),
}
ON_BLOCKS: dict[str, Callable[..., Any]] = {
    "index after index": lambda s, b, h, q, k: s + TABLE[b, q] * k,
    "dot": lambda s, b, h, q, k: s + (PLACES[q] * PLACES[k]).sum(-1),
    "sum": lambda s, b, h, q, k: s + (PLACES[q] * PLACES[k]).sum(-1),
    "first of a row": lambda s, b, h, q, k: s + COLUMN[b, 0] * k,
}


def inputs() -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(BATCH, SIZE, HEADS, 16, requires_grad=True) for _ in range(3)]


def direct(leaves: list[Tensor], mod: Callable[..., Any]) -> Tensor:
    """Attention by its formula, with a mod of whole blocks."""
    q, k, v = (x.transpose(1, 2) for x in leaves)
    index = (
        torch.arange(n).view([-1 if at == place else 1 for at in range(4)])
        for place, n in enumerate((BATCH, HEADS, SIZE, SIZE))
    )
    return (mod(q @ k.mT / 4, *index).softmax(-1) @ v).transpose(1, 2)


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("name", SCORES)
def test_a_score_mod_of_single_values_is_the_same_everywhere(name: str, backend: Any) -> None:
    mod, table = SCORES[name]
    leaves = inputs()
    out = flashgen.attention(*leaves, score_mod=mod, backend=backend)
    wanted = direct(leaves, ON_BLOCKS[name])
    torch.testing.assert_close(out, wanted, atol=1e-5, rtol=1e-5)
    found, expected = (torch.autograd.grad(x.square().sum(), (*leaves, table)) for x in (out, wanted))  # type: ignore[union-attr]
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("as_block_mask", [False, True])
def test_a_mask_mod_of_single_values_is_the_same_everywhere(backend: Any, as_block_mask: bool) -> None:
    def vision(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        interval = INTERVALS[IMAGE[k]]
        return (q >= interval[0]) & (q < interval[1])

    i, j = torch.arange(SIZE)[:, None], torch.arange(SIZE)
    dense = (i >= INTERVALS[IMAGE[j], 0]) & (i < INTERVALS[IMAGE[j], 1])
    option: dict[str, Any] = {"mask_mod": vision}
    if as_block_mask:
        option = {"block_mask": create_block_mask(vision, None, None, SIZE, SIZE, device="cpu", BLOCK_SIZE=4)}
    q, k, v = (x.detach() for x in inputs())
    out = flashgen.attention(q, k, v, backend=backend, **option)
    torch.testing.assert_close(out, flashgen.attention(q, k, v, attn_mask=dense), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "size",
    [
        lambda x: x.shape[0],
        lambda x: len(x),
        lambda x: x.size(0),
        lambda x: x.numel(),
        lambda x: SIZE * x.dim(),
        lambda x: SIZE * x.ndim,
    ],
    ids=["shape", "len", "size", "numel", "dim", "ndim"],
)
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_sizes_are_those_of_single_values(size: Callable[[Tensor], int], backend: Any) -> None:
    """A row of a table: on whole blocks the dimensions of the block stand before its own."""
    q, k, v = (x.detach() for x in inputs())
    out = flashgen.attention(q, k, v, mask_mod=lambda b, h, i, j: j < size(TABLE[b]) - 7, backend=backend)
    dense = (torch.arange(SIZE) < SIZE - 7).expand(SIZE, SIZE)
    torch.testing.assert_close(out, flashgen.attention(q, k, v, attn_mask=dense), atol=1e-5, rtol=1e-5)


UNTRACED: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "largest of a row": (lambda s, b, h, q, k: s * TABLE[b].amax(), lambda s, b, h, q, k: s * TABLE.amax(1)[b]),
    "one of a sorted row": (lambda s, b, h, q, k: s + TABLE[b].sort().values[k], lambda s, b, h, q, k: s + TABLE.sort(1).values[b, k]),
    "an index before": (lambda s, b, h, q, k: s + torch.erfinv(TABLE[b][k] / 9), lambda s, b, h, q, k: s + torch.erfinv(TABLE[b, k] / 9)),
}  # fmt: skip


@pytest.mark.parametrize("name", UNTRACED)
def test_what_has_no_trace_means_the_same(name: str) -> None:
    """On a block the largest of a row was that of all batches: a trial with indices of 0 alone tells nothing."""
    mod, on_blocks = UNTRACED[name]
    q, k, v = (x.detach() for x in inputs())
    table = TABLE.detach()
    out = flashgen.attention(q, k, v, score_mod=mod, mask_mod=lambda b, h, i, j: j < len(table[b]) - 5)
    dense = (torch.arange(SIZE) < SIZE - 5).expand(SIZE, SIZE)
    want = flashgen.attention(q, k, v, score_mod=on_blocks, attn_mask=dense)
    torch.testing.assert_close(out, want, atol=1e-5, rtol=1e-5)


BEHIND: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "largest index": (lambda s, b, h, q, k: s * (1 + torch.erfinv(k * 0.0) + 0.1 * (k.amax() - k)), lambda s, b, h, q, k: s),
    "mean of what rows read": (lambda s, b, h, q, k: s * torch.erfinv(TABLE[b, q] / 9).mean(), lambda s, b, h, q, k: s * torch.erfinv(TABLE[b, q] / 9)),
}  # fmt: skip


@pytest.mark.parametrize("name", BEHIND)
def test_a_reduction_behind_what_has_no_trace_is_of_one_value(name: str) -> None:
    """A trace ends where an operation is not known: on a block they were of all indices of the block."""
    mod, want = BEHIND[name]
    q, k, v = (x.detach() for x in inputs())
    got = flashgen.attention(q, k, v, score_mod=mod)
    torch.testing.assert_close(got, flashgen.attention(q, k, v, score_mod=want), atol=1e-5, rtol=1e-5)


class Doubled(torch.autograd.Function):
    """Which vmap cannot map."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return 2 * x


def test_what_cannot_be_mapped_is_tried_with_indices_of_the_call() -> None:
    q, k, v = (x.detach() for x in inputs())
    with pytest.raises(flashgen.InvalidProblemError, match="reduces over them"):
        flashgen.attention(q, k, v, score_mod=lambda s, b, h, q, k: s + Doubled.apply(k.amax() - k))


ASKED: dict[str, Callable[..., Any]] = {
    "elements": lambda s, b, h, q, k: s * s.numel(),
    "dimensions": lambda s, b, h, q, k: s * (1 + q.dim()),
    "elements that are chosen": lambda s, b, h, q, k: s * q[q > SIZE // 2].numel(),
    "the whole compared": lambda s, b, h, q, k: s + torch.equal(q, k),
    "the largest by NumPy": lambda s, b, h, q, k: s + q.numpy().max(),
}


@pytest.mark.parametrize("name", ASKED)
def test_what_blocks_say_otherwise_than_one_score_is_refused(name: str) -> None:
    """The torch backend gave each block's own number, so that results hung on the size of its blocks."""
    q, k, v = (x.detach() for x in inputs())
    with pytest.raises(flashgen.InvalidProblemError, match=r"than for one|when fewer are computed"):
        flashgen.attention(q, k, v, score_mod=ASKED[name])
    mask = lambda b, h, q, k: ASKED[name](q * 0.0 + 1.0, b, h, q, k) > 1  # noqa: E731
    with pytest.raises(flashgen.InvalidProblemError, match=r"than for one|when fewer are computed"):
        flashgen.attention(q, k, v, mask_mod=mask)


def test_who_asks_for_dimensions_and_means_the_same_is_not_refused() -> None:
    q, k, v = (x.detach() for x in inputs())
    numbers = lambda x: torch.from_numpy(np.abs(x.numpy()))  # noqa: E731
    got = flashgen.attention(
        q, k, v, score_mod=lambda s, b, h, q, k: s.view(s.shape) + torch.zeros(s.shape) + numbers(q - k)
    )
    want = flashgen.attention(q, k, v, score_mod=lambda s, b, h, q, k: s + (q - k).abs())
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


def test_what_runs_on_blocks_is_not_mapped() -> None:
    cpu = torch.device("cpu")
    for mod in (
        ON_BLOCKS["index after index"],
        lambda s, b, h, q, k: s + (TABLE * 2)[0][q] + TABLE.T[q, b] + TABLE.sum(),
        lambda s, b, h, q, k: s * TABLE.shape[0] + len(TABLE) + torch.zeros_like(q),
    ):
        assert not mods.program(mod, {}, cpu)[0].per_score
    for mod, _ in SCORES.values():
        assert mods.program(mod, {}, cpu)[0].per_score == {"score_mod"}
    assert not mods.program(None, {"mask_mod": lambda b, h, q, k: torch.isin(k, IMAGE)}, cpu)[0].per_score
