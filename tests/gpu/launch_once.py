"""One call of one kernel on a CUDA device, held against the torch backend: what compute-sanitizer looks at.

    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck --error-exitcode 9 python tests/gpu/launch_once.py gluon bwd 128

BACKEND is gluon or triton, PASS is fwd, bwd or ordered (gradients that repeat), HEAD_DIM any. Without PyTorch's caching each tensor is an allocation of its own,
so that whatever is read or written beside it is seen. Exit code 0 where the result is right.
"""

from __future__ import annotations

import sys

import torch

import flashgen


def main(backend: str, which: str, head_dim: int) -> int:
    """Run it: 2 batches of 150 rows and 333 keys, 4 query heads on 2, causal, with lse."""
    generator = torch.Generator("cuda").manual_seed(0)
    shapes = ((2, 150, 4, head_dim), (2, 333, 2, head_dim), (2, 333, 2, head_dim))
    leaves = [
        torch.randn(s, generator=generator, device="cuda", dtype=torch.bfloat16).requires_grad_(which != "fwd")
        for s in shapes
    ]
    results = []
    for name in (backend, "torch"):
        out, lse = flashgen.attention(
            *leaves, causal=True, return_lse=True, backend=name, deterministic=which == "ordered"
        )  # type: ignore[misc, arg-type]
        found = [out, lse]
        if which != "fwd":
            found += torch.autograd.grad([out, lse], leaves, [torch.ones_like(out), torch.ones_like(lse)])
        torch.cuda.synchronize()
        results.append([x.detach().float() for x in found])
    worst = max(((a - b).abs().max() / b.abs().max()).item() for a, b in zip(*results, strict=True))
    print(f"{backend} {which} {head_dim}: largest difference from the torch backend {worst:.2e} of the largest value")
    return 0 if worst < 3e-2 else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2], int(sys.argv[3])))
