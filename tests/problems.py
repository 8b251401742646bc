"""The one table of attention problems: the interpreter, the GPU and whatever comes later all run it.

A row is a problem, a tile, a memory layout and a kind of values; `why` says what would go unnoticed without it. Sizes
are small: the interpreter runs every row, and what a tile size changes is the structure (how many unmasked and masked
blocks there are), not the scale. `blocks` are (BLOCK_M, BLOCK_N).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from flashgen.accuracy import Buffers, Strides, Values, make_buffers
from flashgen.gradients import GradientBuffers, make_gradient_buffers
from flashgen.problem import Problem


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One problem and how to run it."""

    why: str
    problem: Problem
    blocks: tuple[int, int]
    strides: Strides
    values: Values

    @property
    def id(self) -> str:
        """The spec's key, then whatever else tells rows apart."""
        p = self.problem
        parts = [p.spec.key, f"b{p.batch}", f"q{p.seqlen_q}k{p.seqlen_k}", f"h{p.num_heads_q}x{p.num_heads_kv}"]
        parts.append(f"t{self.blocks[0]}x{self.blocks[1]}")
        parts += [p.causal_alignment] if p.causal and p.causal_alignment == "top-left" else []
        parts += [p.layout] if p.layout != "bshd" else []
        parts += [f"scale{p.softmax_scale:g}"] if p.softmax_scale is not None else []
        parts += [word for word, usual in ((self.strides, "padded"), (self.values, "normal")) if word != usual]
        return "-".join(parts)


def row(
    why: str,
    dtype: str,
    head_dim: int,
    seqlen_q: int,
    seqlen_k: int,
    *,
    dv: int | None = None,
    causal: Literal["bottom-right", "top-left"] | None = None,
    lse: bool = True,
    heads: tuple[int, int] = (1, 1),
    batch: int = 1,
    blocks: tuple[int, int] = (16, 16),
    scale: float | None = None,
    layout: str = "bshd",
    strides: Strides = "padded",
    values: Values = "normal",
) -> Row:
    """A row in few words."""
    options: dict[str, Any] = {"causal_alignment": causal} if causal else {}
    problem = Problem(
        dtype=dtype,  # type: ignore[arg-type]
        batch=batch,
        seqlen_q=seqlen_q,
        seqlen_k=seqlen_k,
        num_heads_q=heads[0],
        num_heads_kv=heads[1],
        head_dim=head_dim,
        head_dim_v=dv or head_dim,
        causal=causal is not None,
        softmax_scale=scale,
        return_lse=lse,
        layout=layout,  # type: ignore[arg-type]
        **options,
    )
    return Row(why=why, problem=problem, blocks=blocks, strides=strides, values=values)


BR: Literal["bottom-right"] = "bottom-right"
TL: Literal["top-left"] = "top-left"

TABLE: tuple[Row, ...] = (
    # -- head dims: every way of padding to a tile --
    row("the least head dim: 15 of 16 columns are padding", "bf16", 1, 19, 37),
    row("an even head dim far below a tile", "fp16", 2, 23, 41, causal=BR),
    row("an odd head dim far below a tile, fp32", "fp32", 3, 17, 33),
    row("exactly the least tile: no column is masked", "fp16", 16, 33, 47, causal=BR),
    row("one column beyond a tile, rows at odd addresses", "bf16", 17, 35, 37, causal=BR, strides="misaligned"),
    row("one column short of a tile", "fp16", 31, 29, 31, lse=False),
    row("a power of two in fp32", "fp32", 32, 40, 50, causal=BR),
    row("one column beyond 32", "bf16", 33, 21, 43),
    row("the common small head", "bf16", 64, 48, 64, causal=BR, blocks=(32, 32)),
    row("the common small head, fp16, without lse", "fp16", 64, 64, 80, lse=False, blocks=(32, 32)),
    row("the common small head, fp32", "fp32", 64, 33, 65, causal=BR, blocks=(32, 32)),
    row("Phi's head dim", "fp16", 80, 37, 61, causal=BR),
    row("Stable Diffusion's and Phi-3's head dim", "bf16", 96, 33, 49, lse=False),
    row("a prime below a power of two", "bf16", 127, 19, 35, causal=BR),
    row("the common large head: several blocks of each kind", "bf16", 128, 70, 150, causal=BR, blocks=(32, 32)),
    row(
        "the common large head, fp16, no mask at all", "fp16", 128, 64, 128, lse=False, blocks=(32, 32), strides="dense"
    ),
    row("one short of the largest", "fp16", 255, 17, 33, causal=BR),
    row("the largest", "bf16", 256, 18, 34, causal=BR),
    row("the largest in fp32: the widest sums", "fp32", 256, 16, 40),
    # -- D differs from Dv --
    row("DeepSeek's 192/128", "bf16", 192, 33, 47, dv=128, causal=BR),
    row("values wider than keys", "fp16", 16, 20, 40, dv=64),
    row("values narrower than keys, both odd", "fp32", 33, 21, 35, dv=17, causal=BR),
    row("one column of values: 15 of 16 are padding", "bf16", 128, 17, 35, dv=1, lse=False),
    row("padded keys beside unpadded values", "fp16", 3, 19, 34, dv=32),
    # -- lengths --
    row("no query", "bf16", 32, 0, 17),
    row("no key: out 0, lse -inf", "bf16", 32, 17, 0),
    row("no key and causal: every row is fully masked", "fp16", 32, 5, 0, causal=BR),
    row("no query and no key", "fp32", 16, 0, 0),
    row("an empty batch", "fp16", 32, 7, 9, batch=0),
    row("one query, one key: out is v, lse the logit", "fp16", 64, 1, 1, causal=BR),
    row("one query, many keys: a decode step", "bf16", 64, 1, 127, causal=BR, heads=(8, 1)),
    row("many queries, one key", "fp32", 16, 53, 1),
    row("one query at the top left: it sees one key", "bf16", 32, 1, 67, causal=TL),
    row("primes on both sides", "fp16", 32, 71, 101, causal=BR, blocks=(32, 16)),
    row("a tile less one, keys a tile and one", "bf16", 16, 31, 33, blocks=(32, 32)),
    row("a tile and one, keys a tile less one", "fp16", 16, 33, 31, blocks=(32, 32)),
    row("exact tiles: the masked loop never runs", "fp32", 16, 32, 64, blocks=(32, 32)),
    row("exact tiles, causal: only the diagonal is masked", "bf16", 16, 64, 64, causal=BR, blocks=(32, 32)),
    row("a tile less one, causal", "fp32", 16, 31, 31, causal=BR, blocks=(32, 32)),
    row("a tile and one, causal", "fp16", 16, 33, 33, causal=BR, blocks=(32, 32)),
    row("keys shorter than one block: the unmasked loop never runs", "fp16", 32, 20, 5, blocks=(16, 64)),
    row(
        "many unmasked blocks and a ragged tail: the running maximum moves often", "bf16", 32, 16, 500, blocks=(16, 16)
    ),
    row("the same in fp32, where a lost rescale cannot hide", "fp32", 32, 16, 330, blocks=(16, 32)),
    # -- tiles: how rows and keys of a block meet the diagonal --
    row("tall tiles: several masked blocks a tile", "bf16", 32, 130, 130, causal=BR, blocks=(64, 16)),
    row("wide tiles: one masked block for several tiles", "fp16", 32, 75, 75, causal=BR, blocks=(16, 64)),
    row(
        "tall tiles, offset diagonal: full_end must be rounded to a block",
        "fp32",
        16,
        64,
        103,
        causal=BR,
        blocks=(64, 32),
    ),
    row("the largest tile", "fp16", 16, 200, 300, causal=BR, blocks=(128, 128)),
    # -- Sq differs from Sk, both alignments, rows and keys that see nothing --
    row("bottom-right, more keys: the diagonal is shifted right", "bf16", 32, 20, 75, causal=BR),
    row("bottom-right, more queries: the first rows see no key", "bf16", 32, 75, 20, causal=BR),
    row("the same in fp32: whole tiles see no key", "fp32", 16, 100, 3, causal=BR),
    row("top-left, more keys: nobody sees the last ones, which are NaN", "bf16", 32, 20, 75, causal=TL),
    row(
        "top-left, more keys, wide blocks: unseen keys share a block with seen ones",
        "fp16",
        16,
        20,
        75,
        causal=TL,
        blocks=(16, 64),
    ),
    row("top-left, more queries: the last rows see every key", "fp16", 32, 75, 20, causal=TL),
    row("top-left in fp32 with values of another width", "fp32", 16, 37, 53, causal=TL, dv=33),
    # -- heads --
    row("a group of 2", "bf16", 32, 20, 40, heads=(4, 2), batch=2, causal=BR),
    row("a group of 3: no power of two", "fp16", 16, 20, 35, heads=(6, 2), batch=2),
    row("a group of 8 on one head: multi-query", "fp32", 16, 17, 33, heads=(8, 1), causal=BR),
    row("three heads of their own", "bf16", 16, 18, 34, heads=(3, 3), batch=3, lse=False),
    # -- memory --
    row("heads before rows", "bf16", 32, 20, 40, heads=(4, 2), batch=2, layout="bhsd", causal=BR),
    row(
        "heads before rows, contiguous",
        "fp16",
        64,
        33,
        47,
        heads=(2, 2),
        batch=2,
        layout="bhsd",
        strides="dense",
        lse=False,
    ),
    row(
        "contiguous: the neighbour's rows follow at once",
        "fp16",
        17,
        33,
        47,
        heads=(4, 2),
        batch=2,
        strides="dense",
        causal=BR,
    ),
    row("sequence before batch", "bf16", 32, 20, 40, heads=(4, 2), batch=3, strides="sbhd", causal=BR),
    row("one slice of a fused projection", "fp16", 32, 35, 35, heads=(2, 2), batch=2, strides="packed", causal=BR),
    row(
        "k and v broadcast over the batch, q over its heads",
        "fp32",
        16,
        20,
        35,
        heads=(4, 2),
        batch=3,
        strides="expanded",
    ),
    row(
        "an odd address and odd row lengths", "fp32", 33, 20, 35, heads=(2, 1), batch=2, strides="misaligned", causal=BR
    ),
    row("strides of size-1 dimensions point nowhere: batch, heads", "bf16", 32, 20, 35, strides="corrupt", causal=BR),
    row("strides of size-1 dimensions point nowhere: rows", "fp16", 16, 1, 1, heads=(2, 2), batch=2, strides="corrupt"),
    # -- the scale --
    row("a negative scale: the least product has the largest score", "bf16", 32, 20, 75, scale=-0.25),
    row("a negative scale, causal", "fp16", 32, 40, 40, scale=-0.3, causal=BR, heads=(4, 2), layout="bhsd"),
    row(
        "a negative scale and large logits: the maximum must be that of the scores",
        "fp16",
        32,
        20,
        75,
        scale=-0.25,
        values="large",
    ),
    row("a scale of 0: every visible key counts alike, hidden ones not at all", "fp32", 16, 20, 35, scale=0.0),
    row("a scale of 0, causal: 0 times -inf is NaN", "bf16", 32, 75, 20, scale=0.0, causal=BR),
    row("a large scale: one key takes all", "fp16", 32, 33, 70, scale=4.0, causal=BR),
    # -- the range of the logits --
    row("lse near -600: a plain exp would underflow to no key at all", "bf16", 64, 20, 75, values="low"),
    row("lse near -600, causal, fp16", "fp16", 64, 40, 70, values="low", causal=BR),
    row("lse near -600, fp32: -inf only for rows without a key", "fp32", 64, 70, 40, values="low", causal=BR),
    row("logits near fp16's maximum: scores must stay fp32", "fp16", 64, 20, 75, values="large"),
    row("logits near fp16's maximum, causal, bf16", "bf16", 64, 40, 70, values="large", causal=BR),
    row("large logits in fp32", "fp32", 64, 20, 75, values="large"),
)


# -- offsets beyond 2^31 elements --

# name -> (dim, stride, batch, seqlen, heads, blocks): the one offset that passes 2^31 elements.
FAR: dict[str, tuple[int, int, int, int, tuple[int, int], tuple[int, int]]] = {
    "batch": (0, 1 << 30, 4, 3, (1, 1), (16, 16)),  # the third sequence
    "head": (2, 1 << 30, 1, 3, (4, 4), (16, 16)),  # the third head
    "row": (1, 1 << 26, 1, 33, (1, 1), (64, 64)),  # the 33rd row of a tile
    "block": (1, 1 << 26, 1, 33, (1, 1), (16, 16)),  # the third tile: offsets within one stay below
}


def far_tensors(where: str, tensor: str, dtype: str, device: str = "cpu") -> tuple[Buffers, dict[str, Tensor]]:
    """A small problem of which one tensor is spread over gigabytes of address space, few pages of it ever touched.

    Args:
        where: a key of `FAR`.
        tensor: `q`, `k`, `v` or `o`.
        dtype: of all.
        device: where.

    Returns:
        The buffers (for scalars, lse and references) and the tensors to launch with instead of theirs.
    """
    buffers = make_buffers(_far_problem(where, dtype), seed=7, device=device)
    tensors = {name: getattr(buffers, name) for name in "qkvo"}
    tensors[tensor] = _spread(tensors[tensor], where)
    return buffers, tensors


def far_gradients(
    where: str, tensor: str, dtype: str, device: str = "cpu"
) -> tuple[GradientBuffers, dict[str, Tensor | None]]:
    """As `far_tensors`, of a backward: `tensor` is an argument of its launch."""
    buffers = make_gradient_buffers(_far_problem(where, dtype), seed=7, device=device)
    tensors = {**buffers.inputs, **buffers.outputs}
    near = tensors[tensor]
    assert near is not None
    tensors[tensor] = _spread(near, where)
    return buffers, tensors


def _far_problem(where: str, dtype: str) -> Problem:
    _, _, batch, seqlen, heads, blocks = FAR[where]
    return row("", dtype, 16, seqlen, seqlen, heads=heads, batch=batch, blocks=blocks).problem


def _spread(near: Tensor, where: str) -> Tensor:
    dim, step = FAR[where][:2]
    strides = [1 << 12, 1 << 9, 16, 1]
    strides[dim] = step
    storage = torch.empty((near.shape[dim] - 1) * step + (1 << 16), dtype=near.dtype, device=near.device)
    far = storage.as_strided(near.shape, strides)
    far.copy_(near)
    return far
