"""A program as a function of PyTorch, and sent to another process: the same values, the same text."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from mods_running import CPU
from mods_running import in_torch as by_pytorch
from test_mods_operations import EXACT
from torch import Tensor

from flashgen import mods
from flashgen.mods import in_torch, transport
from flashgen.problem import Problem

APPROXIMATE: dict[str, Callable[..., Any]] = {
    "exponentials": lambda s, b, h, q, k: torch.exp(-s.abs()) + torch.exp2(-s.abs()),
    "logarithms": lambda s, b, h, q, k: torch.log(s.abs() + 1) + torch.log2(s.abs() + 1) + torch.rsqrt(s.abs() + 1),
    "curves": lambda s, b, h, q, k: torch.tanh(s) + torch.sigmoid(s) + torch.sin(s) + torch.cos(s) + torch.erf(s),
    "power": lambda s, b, h, q, k: (s.abs() + 1) ** 1.5,
}


def block() -> tuple[Tensor, ...]:
    score = torch.randn(16, 16, generator=torch.Generator().manual_seed(0)) * 3
    index = torch.arange(16, dtype=torch.int32)
    return score, torch.tensor(1, dtype=torch.int32), torch.tensor(2, dtype=torch.int32), index[:, None], index[None]


@pytest.mark.parametrize("name", [*EXACT, *APPROXIMATE])
def test_a_score_mod_is_what_it_was(name: str) -> None:
    mod = {**EXACT, **APPROXIMATE}[name]
    arguments = block()
    expected = by_pytorch("score_mod", mod, block()[0], 1, 2)
    program, tensors = mods.program(mod, {}, CPU)
    sent, samples = transport.from_json(json.loads(json.dumps(transport.to_json(program, tensors))))
    assert sent.digest == program.digest
    assert sent.emit_score(like="score") == program.emit_score(like="score")
    for one, captured in ((program, tensors), (sent, samples)):
        assert one.score is not None
        made = in_torch.function(one.score, one.captures)(*arguments, *captured).expand(16, 16)
        torch.testing.assert_close(made, expected, rtol=1e-6, atol=1e-6, equal_nan=True)
    for one_sample, tensor in zip(samples, tensors, strict=True):
        assert torch.equal(one_sample, tensor) and one_sample.dtype == tensor.dtype


def test_a_mask_is_what_it_was_and_reads_zero_beyond_a_tensor() -> None:
    ids = torch.tensor([3, 3, 4, 4, 0, 0], dtype=torch.int32)
    flags = torch.tensor([True, False, True])

    def mask(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return (ids[q] == ids[k]) | flags[k - 1]

    program, tensors = mods.program(None, {"mask_mod": mask}, CPU)
    assert program.mask is not None
    _, b, h, _, _ = block()
    index = torch.arange(10, dtype=torch.int32)
    made = in_torch.function(program.mask, program.captures)(b, h, index[:, None], index[None], *tensors)
    long_ids, long_flags = torch.zeros(10, dtype=torch.int32), torch.zeros(10, dtype=torch.bool)
    long_ids[:6], long_flags[:3] = ids, flags
    shifted = torch.cat([flags[-1:], long_flags[:9]])  # an index of -1 is the last element
    assert made.dtype == torch.bool
    assert torch.equal(made, (long_ids[:, None] == long_ids[None]) | shifted[None])


def test_a_program_that_changed_on_the_way_is_refused() -> None:
    program, tensors = mods.program(lambda s, b, h, q, k: s * 2.0 + k, {}, CPU)
    data = transport.to_json(program, tensors)
    data["nodes"] = [
        [op, dtype, {"float": (3.0).hex()} if value == {"float": (2.0).hex()} else value, args]
        for op, dtype, value, args in data["nodes"]
    ]
    with pytest.raises(ValueError, match="digest"):
        transport.from_json(data)


def test_the_gradient_flows_through() -> None:
    table = torch.randn(3, 20, dtype=torch.float32)
    program, (captured,) = mods.program(lambda s, b, h, q, k: torch.tanh(s) * table[h, k], {}, CPU)
    assert program.score is not None
    score, *rest = block()
    wide = score.double().requires_grad_()
    weights = captured.double().requires_grad_()
    in_torch.function(program.score, program.captures)(wide, *rest, weights).sum().backward()
    assert wide.grad is not None and wide.grad.dtype == torch.float64 and weights.grad is not None
    torch.testing.assert_close(wide.grad, (1 - torch.tanh(score.double()) ** 2) * table[2, :16].double())


def test_a_problem_carries_its_mods_and_samples_of_what_they_read() -> None:
    ids = torch.arange(64) // 10
    plain = Problem(
        dtype="fp16", batch=1, seqlen_q=64, seqlen_k=64, num_heads_q=2, num_heads_kv=2, head_dim=16, head_dim_v=16
    )
    problem = plain.modified(mask_mod=lambda b, h, i, j: ids[i] == ids[j])
    assert problem.has_mask_mod and not problem.has_score_mod and problem.mods is not None
    (sample,) = problem.mods.samples
    ids.zero_()
    assert sample.tolist() == (torch.arange(64) // 10).tolist(), "a copy"
    assert "mods_" in problem.spec.key and problem.backward.mods is problem.mods
    # Equal meaning is an equal problem, whatever it reads.
    assert problem == plain.modified(mask_mod=lambda b, h, i, j: ids[i] == ids[j])
    assert plain.modified() == plain
