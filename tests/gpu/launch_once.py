"""One call of one kernel on a CUDA device, held against the torch backend: what compute-sanitizer looks at.

    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck --error-exitcode 9 python tests/gpu/launch_once.py gluon bwd 128 mods

BACKEND is gluon or triton, PASS is fwd, bwd or ordered (gradients that repeat), HEAD_DIM any, then one of OPTIONS below (plain where nothing is said).
Without PyTorch's caching each tensor is an allocation of its own, so that whatever is read or written beside it is seen. Exit code 0 where the
result is right.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import flashgen

BATCH, QUERIES, KEYS, HEADS, KV_HEADS = 2, 150, 333, 4, 2


def _plain() -> dict[str, Any]:
    return {"causal": True}


def _window() -> dict[str, Any]:
    slopes = torch.exp2(-torch.arange(1.0, HEADS + 1, device="cuda"))
    return {"causal": True, "window_size": (100, 0), "softcap": 20.0, "alibi_slopes": slopes}


def _mods() -> dict[str, Any]:
    """A mask that reads a tensor, and a score that reads one."""
    documents = (torch.arange(KEYS, device="cuda") // 70).to(torch.int32)
    table = torch.linspace(-1, 1, HEADS * KEYS, device="cuda").view(HEADS, KEYS)
    return {
        "mask_mod": lambda b, h, i, j: (documents[i] == documents[j]) | (j < 20),
        "score_mod": lambda s, b, h, i, j: s + table[h, j],
    }


def _bias() -> dict[str, Any]:
    generator = torch.Generator("cuda").manual_seed(1)
    bias = torch.randn(HEADS, QUERIES, KEYS, generator=generator, device="cuda", dtype=torch.bfloat16)
    return {"bias": bias, "attn_mask": bias < 1.0, "dropout_p": 0.1}


OPTIONS: dict[str, Callable[[], dict[str, Any]]] = {"plain": _plain, "window": _window, "mods": _mods, "bias": _bias}


def call(leaves: list[Tensor], backend: str, which: str, options: str) -> tuple[Tensor, Tensor]:
    """Out and lse of (batch, length, heads, head_dim); `packed`: the two batches as sequences of one packed call."""
    q, k, v = leaves
    common: dict[str, Any] = {"return_lse": True, "backend": backend, "deterministic": which == "ordered"}
    if options == "packed":
        ends = [torch.tensor([0, n - 40, 2 * n], device="cuda", dtype=torch.int32) for n in (QUERIES, KEYS)]
        queries, keys, values = (x.flatten(0, 1) for x in (q, k, v))
        lengths = (QUERIES + 40, KEYS + 40)
        return flashgen.varlen_attention(queries, keys, values, *ends, *lengths, causal=True, **common)
    if options == "bias":  # the same seed for both backends
        common["generator"] = torch.Generator("cuda").manual_seed(2)
    return flashgen.attention(q, k, v, **OPTIONS[options](), **common)  # type: ignore[return-value]


def main(backend: str, which: str, head_dim: int, options: str = "plain") -> int:
    """Run it: 2 batches of 150 rows and 333 keys, 4 query heads on 2, with lse."""
    generator = torch.Generator("cuda").manual_seed(0)
    shapes = ((BATCH, QUERIES, HEADS, head_dim), *((BATCH, KEYS, KV_HEADS, head_dim),) * 2)
    leaves = [
        torch.randn(s, generator=generator, device="cuda", dtype=torch.bfloat16).requires_grad_(which != "fwd")
        for s in shapes
    ]
    results = []
    for name in (backend, "torch"):
        out, lse = call(leaves, name, which, options)
        found = [out, lse]
        if which != "fwd":
            found += torch.autograd.grad([out, lse], leaves, [torch.ones_like(out), torch.ones_like(lse)])
        torch.cuda.synchronize()
        results.append([x.detach().float() for x in found])
    worst = 0.0
    for mine, theirs in zip(*results, strict=True):
        seen = theirs.isfinite()  # a row that sees no key has an lse of -inf
        assert torch.equal(mine[~seen], theirs[~seen])
        worst = max(worst, ((mine - theirs)[seen].abs().max() / theirs[seen].abs().max()).item())
    print(
        f"{backend} {which} {head_dim} {options}: largest difference from the torch backend {worst:.2e} of the largest value"
    )
    return 0 if worst < 3e-2 else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2], int(sys.argv[3]), *sys.argv[4:]))
