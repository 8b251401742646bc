"""One call of one kernel on a CUDA device, held against the torch backend: what compute-sanitizer looks at.

    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck --error-exitcode 9 python tests/gpu/launch_once.py gluon bwd 128 mods

BACKEND is gluon or triton, PASS is fwd, bwd or ordered (gradients that repeat), HEAD_DIM any, then one of OPTIONS below or `packed` (plain where nothing is
said). Without PyTorch's caching each tensor is an allocation of its own, so that whatever is read or written beside it is seen. Exit code 0 where the
result is right.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import flashgen


@dataclass(frozen=True, slots=True)
class Sizes:
    """Of q and k: two batches, grouped heads."""

    queries: int = 150
    keys: int = 333
    heads: int = 4
    kv_heads: int = 2
    batch: int = 2

    def leaves(self, head_dim: int, requires_grad: bool) -> list[Tensor]:
        """Q, k and v as (batch, length, heads, head_dim), bf16."""
        generator = torch.Generator("cuda").manual_seed(0)
        lengths = ((self.queries, self.heads), *((self.keys, self.kv_heads),) * 2)
        return [
            torch.randn(self.batch, n, h, head_dim, generator=generator, device="cuda", dtype=torch.bfloat16).requires_grad_(
                requires_grad
            )
            for n, h in lengths
        ]  # fmt: skip


def _plain(sizes: Sizes) -> dict[str, Any]:
    return {"causal": True}


def _window(sizes: Sizes) -> dict[str, Any]:
    slopes = torch.exp2(-torch.arange(1.0, sizes.heads + 1, device="cuda"))
    return {"causal": True, "window_size": (100, 0), "softcap": 20.0, "alibi_slopes": slopes}


def _mods(sizes: Sizes) -> dict[str, Any]:
    """A mask that reads a tensor, and a score that reads one."""
    documents = (torch.arange(sizes.keys, device="cuda") // 70).to(torch.int32)
    table = torch.linspace(-1, 1, sizes.heads * sizes.keys, device="cuda").view(sizes.heads, sizes.keys)
    return {
        "mask_mod": lambda b, h, i, j: (documents[i] == documents[j]) | (j < 20),
        "score_mod": lambda s, b, h, i, j: s + table[h, j],
    }


def _bias(sizes: Sizes) -> dict[str, Any]:
    generator = torch.Generator("cuda").manual_seed(1)
    shape = (sizes.heads, sizes.queries, sizes.keys)
    bias = torch.randn(shape, generator=generator, device="cuda", dtype=torch.bfloat16)
    return {"bias": bias, "attn_mask": bias < 1.0}


OPTIONS: dict[str, Callable[[Sizes], dict[str, Any]]] = {
    "plain": _plain,
    "window": _window,
    "mods": _mods,
    "bias": _bias,
}


def call(leaves: list[Tensor], options: dict[str, Any], **common: Any) -> tuple[Tensor, Tensor]:
    """Out and lse; of `packed` options the batches as two sequences of one call."""
    q, k, v = leaves
    common |= {"return_lse": True}
    if "packed" not in options:
        return flashgen.attention(q, k, v, **options, **common)  # type: ignore[return-value]
    ends, longest = options["packed"]
    queries, keys, values = (x.flatten(0, 1) for x in (q, k, v))
    return flashgen.varlen_attention(queries, keys, values, *ends, *longest, causal=True, **common)


def packed(sizes: Sizes) -> dict[str, Any]:
    """Two sequences, of which the second is the longer one."""
    lengths = (sizes.queries, sizes.keys)
    ends = [torch.tensor([0, n - 40, 2 * n], device="cuda", dtype=torch.int32) for n in lengths]
    return {"packed": (ends, [n + 40 for n in lengths])}


def main(backend: str, which: str, head_dim: int, name: str = "plain") -> int:
    """Run it: 150 rows and 333 keys, 4 query heads on 2, with lse."""
    sizes, trained = Sizes(), which != "fwd"
    leaves, results = sizes.leaves(head_dim, trained), []
    options = {**OPTIONS, "packed": packed}[name](sizes)
    if name == "bias":
        options["dropout_p"] = 0.1
    for one in (backend, "torch"):
        seeded = {"generator": torch.Generator("cuda").manual_seed(2)} if name == "bias" else {}
        out, lse = call(leaves, options, backend=one, deterministic=which == "ordered", **seeded)
        found = [out, lse]
        if trained:
            found += torch.autograd.grad([out, lse], leaves, [torch.ones_like(out), torch.ones_like(lse)])
        torch.cuda.synchronize()
        results.append([x.detach().float() for x in found])
    worst = 0.0
    for mine, theirs in zip(*results, strict=True):
        seen = theirs.isfinite()  # a row that sees no key has an lse of -inf
        assert torch.equal(mine[~seen], theirs[~seen])
        worst = max(worst, ((mine - theirs)[seen].abs().max() / theirs[seen].abs().max()).item())
    print(f"{backend} {which} {head_dim} {name}: largest difference from torch's {worst:.2e} of the largest value")
    return 0 if worst < 3e-2 else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2], int(sys.argv[3]), *sys.argv[4:]))
