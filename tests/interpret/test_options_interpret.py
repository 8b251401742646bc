"""What options promise beyond a tolerance, on the portable forward: dropout's bits, packing that changes nothing, far operands."""

from __future__ import annotations

from itertools import pairwise
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

import flashgen
from flashgen import ops
from flashgen.torch_blocked.philox import keep_block

SEED = torch.tensor([0x1234_5678_9ABC_DEF0, 2**40 + 7])


def tile(block_m: int = 16, block_n: int = 16) -> dict[str, int]:
    return {"BLOCK_M": block_m, "BLOCK_N": block_n, "num_warps": 4, "num_stages": 2}


def drawn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float16) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def dropped(q: Tensor, k: Tensor, v: Tensor, p: float, **options: Any) -> Tensor:
    with mock.patch.object(ops, "draw_philox", lambda q, p, generator: SEED if p else None):
        return flashgen.attention(q, k, v, dropout_p=p, backend="triton", **options)  # type: ignore[return-value]


@pytest.mark.parametrize("blocks", [(16, 16), (64, 32), (16, 64)])
def test_dropout_keeps_the_torch_backends_elements(blocks: tuple[int, int]) -> None:
    """Values of one key each show which probabilities were kept: exactly those of the definition, whatever the tile."""
    seqlen_q, seqlen_k, p = 45, 77, 0.4
    q = torch.zeros(2, seqlen_q, 2, 16)
    k, v = drawn(2, seqlen_k, 1, 16, dtype=torch.float32), torch.eye(seqlen_k).expand(2, seqlen_k, seqlen_k)
    out = dropped(q, k, v[:, :, None], p, config=tile(*blocks))
    heads = torch.arange(4).view(2, 2, 1, 1)
    kept = keep_block(SEED, p, heads, slice(0, seqlen_q), slice(0, seqlen_k))
    assert torch.equal(out.transpose(1, 2) != 0, kept)
    assert torch.allclose(out[out != 0], torch.tensor(1 / (seqlen_k * (1 - p))), rtol=1e-5)


def test_dropout_at_its_ends() -> None:
    q, k = drawn(1, 20, 1, 16), drawn(1, 33, 1, 16, seed=1)
    whole = flashgen.attention(q, k, k, backend="triton", config=tile())
    assert torch.equal(dropped(q, k, k, 1e-12, config=tile()), whole)  # type: ignore[arg-type]
    assert torch.equal(dropped(q, k, k, 1 - 2**-40, config=tile()), torch.zeros_like(q))


def test_a_packed_sequence_is_what_it_is_alone() -> None:
    """Bit for bit, at one tile, with options that look at positions and sequences of no rows between."""
    lengths_q, lengths_k = (13, 0, 40, 1), (30, 5, 0, 19)
    ends_q, ends_k = (torch.tensor([0, *torch.tensor(x).cumsum(0)], dtype=torch.int32) for x in (lengths_q, lengths_k))
    q, k, v = drawn(54, 4, 16), drawn(54, 2, 16, seed=1), drawn(54, 2, 16, seed=2)
    bias = drawn(4, 4, 40, 30, seed=3)
    options: dict[str, Any] = {"causal": True, "window_size": (9, 0), "sinks": drawn(4, seed=4), "return_lse": True}
    options |= {"backend": "triton", "config": tile(), "softcap": 5.0}
    out, lse = flashgen.varlen_attention(q, k, v, ends_q, ends_k, 40, 30, bias=bias, **options)
    for b, ((q0, q1), (k0, k1)) in enumerate(zip(pairwise(ends_q.tolist()), pairwise(ends_k.tolist()), strict=True)):
        alone = flashgen.attention(
            q[None, q0:q1], k[None, k0:k1], v[None, k0:k1], bias=bias[b : b + 1, :, : q1 - q0, : k1 - k0], **options
        )
        assert torch.equal(out[q0:q1], alone[0][0]) and torch.equal(lse[:, q0:q1], alone[1][0])


@pytest.mark.parametrize("name", ["bias", "attn_mask"])
def test_operands_beyond_2_to_the_31_elements(name: str) -> None:
    q, k = drawn(1, 33, 1, 16), drawn(1, 20, 1, 16, seed=1)
    near = drawn(33, 20, seed=2) if name == "bias" else drawn(33, 20, seed=2) > 0
    far = torch.empty(33 << 26, dtype=near.dtype).as_strided((33, 20), (1 << 26, 1))
    far.copy_(near)
    results = [flashgen.attention(q, k, k, backend="triton", config=tile(64, 32), **{name: x}) for x in (near, far)]
    assert torch.equal(*results)  # type: ignore[arg-type]


def test_widths_and_caps_share_one_kernel() -> None:
    """Numbers of options are run-time values: no text, no compilation depends on them."""
    q = drawn(1, 4, 1, 16)
    one, other = (
        flashgen.explain(q, q, q, window_size=(w, w), softcap=float(w), dropout_p=w / 10, backend="triton").problem.spec
        for w in (3, 7)
    )
    assert one == other
