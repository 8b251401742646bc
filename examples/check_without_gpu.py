"""Trust a kernel before a GPU sees it: run the generated file in Triton's interpreter and hold it to the fp64 oracle.

python examples/check_without_gpu.py
"""

from __future__ import annotations

import torch

import flashgen
from flashgen.accuracy import check
from flashgen.reference import attention_low_precision, attention_oracle


def main() -> None:
    """Check one problem with odd sizes, then show that the check can fail."""
    torch.manual_seed(0)
    q = torch.randn(1, 37, 4, 40, dtype=torch.bfloat16)
    k, v = (torch.randn(1, 53, 2, 40, dtype=torch.bfloat16) for _ in range(2))

    # backend="triton" on CPU tensors is the interpreter: slow, and bit for bit the text that a GPU would compile.
    out, lse = flashgen.attention(q, k, v, causal=True, return_lse=True, backend="triton")

    options = {"causal": True, "causal_offset": 53 - 37, "sm_scale": 40**-0.5}
    oracle, honest = attention_oracle(q, k, v, **options), attention_low_precision(q, k, v, **options)
    report = check(out, lse, oracle, honest, "bf16")
    report.require("the generated kernel")
    print(f"inside the budget: largest error {report.max_error:.1e}, {report.ratio:.2f} of what is allowed")

    wrong, _ = attention_oracle(q, k, v, **{**options, "causal_offset": 53 - 37 + 1})  # one key too many
    assert not check(wrong.to(q.dtype), None, oracle, honest, "bf16").ok
    print("a mask that is off by one key is not")


if __name__ == "__main__":
    main()
