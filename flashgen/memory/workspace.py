"""What the torch backend holds while attention runs, beyond operands and results: the constant beside O(N)."""

from __future__ import annotations

from flashgen.memory.strategy import Shape, Strategy, Workspace

# Arrays of one step's scores that `torch_blocked.blocked.backward` holds at once, in fp32: raw, scores, p, dp, the difference that ds is made
# from, and ds; and the last step's ds, where there was one.
_ARRAYS = 6
# Beside them, where one step takes all: q, dout, dq, k of the step in fp32, and what a product copies.
_OPERANDS = 5
_FP32 = 4
_KEYS, _ROWS = 512, 256  # of a step, at most


def torch_backend(shape: Shape, strategy: Strategy) -> Workspace:
    """Workspace of the torch backend on a CPU, without options (full or causal, lengths equal).

    The forward is PyTorch's fused kernel, whose result and lse are copied; the buffers of its threads are not counted. So is the backward in
    fp32, from copies of q, k and v by head; in 16 bit it is the blocked one, with sums of dk and dv in fp32.
    """
    from flashgen.torch_blocked import SCORE_BUDGET

    q = shape.rows * shape.attention_width
    kv = shape.rows * 2 * shape.heads_kv * shape.head_dim
    size = strategy.compute_size
    forward = size * q + _FP32 * shape.batch * shape.heads_q * shape.seqlen
    if size == _FP32:
        return Workspace(forward=forward, backward=size * (q + kv))
    scores = _FP32 * min(SCORE_BUDGET, shape.pairs)
    sums = (_FP32 - size) * kv
    if shape.seqlen <= _ROWS and shape.pairs <= SCORE_BUDGET:
        return Workspace(forward=forward, backward=_ARRAYS * scores + sums + _OPERANDS * _FP32 * q)
    rows = min(shape.seqlen, _ROWS) + 2 * min(shape.seqlen, _KEYS)
    operands = _FP32 * shape.heads_q * shape.head_dim * rows
    return Workspace(forward=forward, backward=(_ARRAYS + 1) * scores + sums + operands)


def fused_kernels(shape: Shape) -> Workspace:
    """Workspace of a fused backward: dq summed in fp32, delta and lse in base 2, both fp32, one a row and head."""
    rows = shape.rows * shape.heads_q
    return Workspace(backward=_FP32 * rows * shape.head_dim + 2 * _FP32 * rows)
