"""Small kernels written by hand, to test the worker itself."""

from __future__ import annotations

from flashgen.render import KernelSource
from flashgen.spec import AttentionSpec

SPEC = AttentionSpec(dtype="fp32", head_dim=16, head_dim_v=16)

_HEADER = "import triton\nimport triton.language as tl\n\n\n@triton.jit\n"


def kernel(body: str, call: str = "kernel[(1,)](q, k, v, o, N=q.numel())") -> KernelSource:
    """A kernel file whose kernel has pointers q, k, v, o and the number N of elements of q.

    Args:
        body: lines of the kernel.
        call: what `launch` does.
    """
    lines = "".join(f"    {line}\n" for line in body.strip().splitlines())
    text = (
        f"{_HEADER}def kernel(q, k, v, o, N: tl.constexpr):\n{lines}\n\n"
        f"def launch(q, k, v, o, lse, *, sm_scale, causal_offset):\n    {call}\n"
    )
    return KernelSource(text=text, spec=SPEC, variant="handwritten")


COPY = kernel("i = tl.arange(0, N)\ntl.store(o + i, tl.load(q + i))")
