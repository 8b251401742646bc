"""What a fused multiply-add of scale and maximum costs, emulated here: only a GPU fuses, neither the interpreter nor NumPy."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import pytest
import torch
from problems import TABLE, Row

from flashgen.accuracy import make_buffers

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "gpu"))

from last_bit import is_extreme, require_last_bit

EXTREME = [case for case in TABLE if is_extreme(case.problem.dtype, case.values)]


@pytest.mark.parametrize("off", [0.0, 2.0])
@pytest.mark.parametrize("case", EXTREME, ids=lambda case: case.id)
def test_large_logits_are_off_by_their_last_bit_at_most_and_more_is_noticed(case: Row, off: float) -> None:
    p = case.problem
    buffers = make_buffers(p, seed=1, strides=case.strides, values=case.values)
    q, k, v = (x.transpose(1, 2) for x in (buffers.q, buffers.k, buffers.v))
    scores = (q.double() @ k.double().transpose(-1, -2)).float().double()  # exact products, one rounding
    if p.causal:
        rows, keys = torch.arange(p.seqlen_q)[:, None], torch.arange(p.seqlen_k)
        scores = scores.masked_fill(keys > rows + p.causal_offset, -math.copysign(math.inf, p.scale))
    factor = torch.tensor(p.scale / math.log(2.0), dtype=torch.float32)
    highest = (scores.float() * factor).amax(-1, keepdim=True)  # rounded, as a kernel keeps it
    weights = torch.exp2((scores * factor.double() - highest.double()).float()).nan_to_num()  # one rounding: fused
    total = weights.sum(-1, keepdim=True)
    out = (weights.to(v.dtype).float() @ v.float()) / total
    buffers.o.copy_(out.transpose(1, 2) * (1.0 + off * torch.finfo(buffers.o.dtype).eps))
    assert buffers.lse is not None
    buffers.lse.copy_(((highest + total.log2()) * math.log(2.0)).squeeze(-1))
    if off:
        with pytest.raises(AssertionError):
            require_last_bit(buffers)
    else:
        require_last_bit(buffers)


def test_there_are_such_rows() -> None:
    assert {case.problem.dtype for case in EXTREME} == {"fp16", "bf16"}
