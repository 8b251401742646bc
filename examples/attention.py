"""Attention as one call: the same lines on a CPU and on a GPU, with gradients, and an account of what ran.

python examples/attention.py
"""

from __future__ import annotations

import torch
from torch.nn.functional import scaled_dot_product_attention

import flashgen


def main() -> None:
    """Compute, compare with PyTorch, and ask why this kernel ran."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    q = torch.randn(2, 256, 8, 64, device=device, requires_grad=True)  # (batch, seqlen, heads, head_dim)
    k = torch.randn(2, 256, 2, 64, device=device, requires_grad=True)  # 2 heads of keys and values serve 8 of queries
    v = torch.randn(2, 256, 2, 64, device=device, requires_grad=True)

    out = flashgen.attention(q, k, v, causal=True)
    assert isinstance(out, torch.Tensor)
    gradients = torch.autograd.grad(out.square().sum(), (q, k, v))

    # PyTorch wants (batch, heads, seqlen, head_dim).
    query, key, value = (x.transpose(1, 2) for x in (q, k, v))
    expected = scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True).transpose(1, 2)
    torch.testing.assert_close(out, expected, atol=2e-3, rtol=2e-3)  # fp32 on a GPU: either may multiply in TF32
    torch.testing.assert_close(gradients, torch.autograd.grad(expected.square().sum(), (q, k, v)), atol=2e-2, rtol=2e-2)
    print("out and the gradients of q, k and v agree with PyTorch")

    print(flashgen.explain(q, k, v, causal=True))


if __name__ == "__main__":
    main()
