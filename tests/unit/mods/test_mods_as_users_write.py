"""What users of FlexAttention write, beside FlexAttention's own eager mode: whatever holds a mod's values, and whatever changes between calls."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, and_masks, create_block_mask, flex_attention, or_masks

import flashgen

pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
BATCH, HEADS, SIZE, DIM = 2, 4, 40, 16
BACKENDS = ("torch", "triton")


def inputs(seqlen: int = SIZE, *, heads_kv: int = HEADS, seqlen_k: int | None = None) -> list[Tensor]:
    torch.manual_seed(seqlen)
    keys = seqlen_k or seqlen
    return [torch.randn(BATCH, n, h, DIM) for n, h in ((seqlen, HEADS), (keys, heads_kv), (keys, heads_kv))]


def by_flex(leaves: list[Tensor], score_mod: Any = None, mask: Any = None) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in leaves)
    block = mask
    if mask is not None and not isinstance(mask, BlockMask):
        block = create_block_mask(mask, BATCH, HEADS, q.shape[2], k.shape[2], device="cpu")
    out: Any = flex_attention(q, k, v, score_mod=score_mod, block_mask=block, enable_gqa=q.shape[1] != k.shape[1])
    found: Tensor = out.transpose(1, 2)
    return found


def require_same(leaves: list[Tensor], score_mod: Any = None, mask: Any = None) -> None:
    wanted = by_flex(leaves, score_mod, mask)
    option: dict[str, Any] = {"block_mask" if isinstance(mask, BlockMask) else "mask_mod": mask}
    for backend in BACKENDS:
        out = flashgen.attention(*leaves, score_mod=score_mod, backend=backend, **option)  # type: ignore[arg-type]
        torch.testing.assert_close(out, wanted, atol=2e-5, rtol=2e-5)


def near(b: Any, h: Any, i: Any, j: Any, *, width: int, unused: Tensor | None = None) -> Any:
    return (i - j).abs() < width


class Masks:
    """Masks as a class keeps them."""

    def __init__(self, width: int) -> None:
        self.width, self.table = width, torch.zeros(SIZE)

    def __call__(self, b: Any, h: Any, i: Any, j: Any) -> Any:
        return (i - j).abs() <= self.width

    @staticmethod
    def causal(b: Any, h: Any, i: Any, j: Any) -> Any:
        return i >= j

    def score(self, s: Any, b: Any, h: Any, i: Any, j: Any) -> Any:
        return s + self.table[j] * self.width


@pytest.mark.parametrize(
    "mask",
    [
        functools.partial(near, width=5),
        functools.partial(near, width=7, unused=torch.ones(1)),
        Masks.causal,
        Masks(3).causal,
        Masks(3),
        and_masks(Masks.causal, functools.partial(near, width=6)),
        or_masks(Masks.causal, Masks(4)),
    ],
    ids=["partial", "partial of a tensor", "static", "static of an instance", "callable", "and_masks", "or_masks"],
)
def test_whatever_is_called(mask: Callable[..., Any]) -> None:
    leaves = inputs()
    wanted = by_flex(leaves, mask=lambda b, h, i, j: mask(b, h, i, j))
    for backend in BACKENDS:
        out = flashgen.attention(*leaves, mask_mod=mask, backend=backend)  # type: ignore[arg-type]
        torch.testing.assert_close(out, wanted, atol=2e-5, rtol=2e-5)


def test_attributes_that_change_between_calls() -> None:
    leaves, kept = inputs(), Masks(1)
    for width in (1, 4, 9):
        kept.width = width
        kept.table.normal_() if width < 9 else setattr(kept, "table", torch.randn(SIZE))
        require_same(leaves, kept.score, lambda b, h, i, j: kept(b, h, i, j))


def test_lengths_that_change_between_calls() -> None:
    ids = torch.zeros(0)

    def document(b: Any, h: Any, i: Any, j: Any) -> Any:
        return ids[i] == ids[j]

    for size in (7, 33, 64, 19):
        ids = torch.arange(size) // 5
        require_same(inputs(size), mask=document)


def test_an_offset_that_moves_as_tokens_are_decoded() -> None:
    offset = torch.tensor(0)
    for position in (10, 20, 39):
        offset.fill_(position)
        require_same(inputs(1, seqlen_k=SIZE), mask=lambda b, h, i, j: i + offset >= j)


def test_grouped_heads_index_by_query_head() -> None:
    slopes = torch.rand(HEADS)
    require_same(inputs(heads_kv=2), lambda s, b, h, i, j: s - slopes[h] * (i - j).abs(), Masks.causal)


def test_a_mask_of_each_head_as_a_table() -> None:
    table = torch.rand(HEADS, SIZE, SIZE) < 0.5
    table[..., 0] = True
    require_same(inputs(), mask=lambda b, h, i, j: table[h, i, j])


@pytest.mark.parametrize("batch", [None, BATCH])
@pytest.mark.parametrize("heads", [None, HEADS])
def test_block_masks_that_broadcast(batch: int | None, heads: int | None) -> None:
    def mask(b: Any, h: Any, i: Any, j: Any) -> Any:
        shift = (b * 5 if batch else 0) + (h * 3 if heads else 0)
        return (i - j + shift).abs() < 12

    require_same(inputs(), mask=create_block_mask(mask, batch, heads, SIZE, SIZE, device="cpu", BLOCK_SIZE=16))


@pytest.mark.parametrize(
    "mod",
    [
        lambda s, b, h, i, j: torch.where(i >= j, s, torch.tensor(-1e4)),
        lambda s, b, h, i, j: torch.where((i - j) % 2 == 0, 1.0, 0.5) * s,
        lambda s, b, h, i, j: torch.where(i >= j, 0, -10) + s,
        lambda s, b, h, i, j: s + (i >= j),
        lambda s, b, h, i, j: s.masked_fill(i < j, float("-inf")),
    ],
    ids=["0-d tensor", "two fractions", "two integers", "a condition added", "masked_fill"],
)
def test_choices_between_numbers(mod: Callable[..., Any]) -> None:
    require_same(inputs(), mod)


def test_modes_of_autograd() -> None:
    leaves, table = inputs(), torch.randn(SIZE, requires_grad=True)
    wanted = by_flex(leaves, lambda s, b, h, i, j: s + table.detach()[j])
    for backend in BACKENDS:
        for mode in (torch.no_grad, torch.inference_mode):
            with mode():
                out = flashgen.attention(*leaves, score_mod=lambda s, b, h, i, j: s + table[j], backend=backend)  # type: ignore[arg-type]
            assert not out.requires_grad  # type: ignore[union-attr]
            torch.testing.assert_close(out.clone(), wanted, atol=2e-5, rtol=2e-5)  # type: ignore[union-attr]
        with torch.inference_mode():  # tensors without a count of writes
            inside = torch.ones(SIZE)
            again = inputs()
            flashgen.attention(*again, mask_mod=lambda b, h, i, j, x=inside: x[j] > 0, backend=backend)  # type: ignore[arg-type]


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_a_score_reads_gets_gradients_beside_masks(backend: Any) -> None:
    table = torch.randn(HEADS, 2 * SIZE, requires_grad=True)
    leaves = [x.requires_grad_() for x in inputs()]
    out = flashgen.attention(
        *leaves, causal=True, window_size=(9, -1), backend=backend,
        score_mod=lambda s, b, h, i, j: s + table[h, i - j + SIZE], mask_mod=lambda b, h, i, j: j % 5 != 2,
    )  # fmt: skip
    i, j = torch.arange(SIZE)[:, None], torch.arange(SIZE)
    hidden = (j > i) | (j < i - 9) | (j % 5 == 2)
    q, k, v = (x.transpose(1, 2) for x in leaves)
    scores = q @ k.mT / 4 + table[:, i - j + SIZE]
    seen = ~hidden.all(-1)[:, None]
    p = torch.where(seen, scores.masked_fill(hidden & seen, -torch.inf).softmax(-1), 0.0)
    wanted = (p @ v).transpose(1, 2)
    torch.testing.assert_close(out, wanted, atol=2e-5, rtol=2e-5)
    for found, expected in zip(
        *(torch.autograd.grad(x.square().sum(), (*leaves, table)) for x in (out, wanted)),
        strict=True,  # type: ignore[union-attr]
    ):
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
