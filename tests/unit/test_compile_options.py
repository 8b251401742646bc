"""Kernels with options, compiled ahead: under the key that a launch with drawn operands asks for."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch
from test_compile_pool import TILE, asked

from flashgen import KernelConfig, Problem, accuracy, gradients, samples
from flashgen.build import load_module, write_source
from flashgen.facts.compiler import signature_of
from flashgen.render import render
from flashgen.tuner.context import launch_strides
from flashgen.variants import by_name

BASE = Problem(
    dtype="bf16", batch=2, seqlen_q=48, seqlen_k=80, num_heads_q=4, num_heads_kv=2, head_dim=64, head_dim_v=64
)
BACKWARD = KernelConfig(
    variant="triton_bwd", BLOCK_M=64, BLOCK_N=64, BLOCK_M_DQ=64, BLOCK_N_DQ=64, num_warps=4, num_stages=3
)
IDS, TABLE = torch.arange(96, dtype=torch.int32) // 7, torch.randn(4, 200)
FLAGS, WIDE = torch.zeros(96, dtype=torch.bool), torch.zeros(3, 96, dtype=torch.int64)

BIAS = replace(BASE, has_bias=True, bias_grad=True)
PROBLEMS = {
    "a bias that learns": BIAS,
    "of one sequence": replace(BIAS, batch=1),
    "of one head": replace(BIAS, num_heads_q=1, num_heads_kv=1),
    "in a fixed order": replace(BIAS, deterministic=True),
    "closed": replace(
        BASE,
        causal=True,
        window_size=(30, 0),
        softcap=3.0,
        has_alibi=True,
        has_sinks=True,
        has_bias=True,
        has_attn_mask=True,
        dropout_p=0.1,
    ),
    "odd bias": replace(BASE, seqlen_k=77, has_bias=True, num_heads_q=3, num_heads_kv=3),
    "mods": BASE.modified(
        mask_mod=lambda b, h, i, j: (IDS[i] == IDS[j]) | FLAGS[j] | (WIDE[1, i] > j),
        score_mod=lambda s, b, h, i, j: s + TABLE[h, i - j + 90],
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("name", PROBLEMS)
def test_what_is_compiled_ahead_is_what_a_launch_asks_for(
    name: str, backward: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    problem, config = PROBLEMS[name], TILE
    if backward:
        problem, config = problem.backward, BACKWARD
    spec, variant = problem.spec, by_name(config.variant)
    module = load_module(write_source(render(spec, variant)))
    given = samples.operands(problem)
    values = samples.launch_values(problem, given, config)
    values = {key: value for key, value in values.items() if key not in ("sm_scale", "causal_offset")}
    if backward:
        buffers = gradients.make_gradient_buffers(problem, strides="dense", dlse=False, drawn=samples._drawn)
        arguments, values = buffers.arguments, {**values, **samples.sums(problem, given)}
    else:
        plain = accuracy.make_buffers(problem, strides="dense", with_options=True)
        arguments = (plain.q, plain.k, plain.v, plain.o, plain.lse)
    kernels = variant.kernels(spec, config)
    strides = launch_strides(problem)
    for other in kernels:  # of several, each launches nothing while another is looked at
        if len(kernels) > 1:
            monkeypatch.setattr(getattr(module, other), "run", lambda *_, **__: None)
    for one, constants in kernels.items():
        kernel = getattr(module, one)
        wanted = asked(partial(module.launch, **values), kernel, arguments, config, monkeypatch)
        found = signature_of(kernel, spec, constants, strides)
        names = [parameter.name for parameter in kernel.params]
        for ours, theirs in zip(found, wanted, strict=True):
            keys = {key for key in (*ours, *theirs) if ours.get(key, "absent") != theirs.get(key, "absent")}
            apart = {key if isinstance(key, str) else names[key[0]]: (ours.get(key), theirs.get(key)) for key in keys}
            assert not apart, f"{one}: compiled ahead, asked for: {apart}"
        monkeypatch.setattr(kernel, "run", lambda *_, **__: None)
