"""The Hopper backward with options on a Hopper GPU: the table that the simulator runs, larger sizes, and bits that repeat."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "simulate"))

from free_backward import Free, judged, make
from free_cases import BIASES, CASES, LEARNED, bands_of_heads, chunks, prefix

from flashgen.build import build
from flashgen.gradients import GradientBuffers

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        torch.cuda.is_available() and torch.cuda.get_device_capability() != (9, 0), reason="needs a Hopper GPU"
    ),
]


def on_gpu(buffers: GradientBuffers, values: dict[str, Any]) -> tuple[GradientBuffers, dict[str, Any]]:
    """The same bytes on the GPU, what lies around the tensors included."""
    allocations = {name: x.cuda() for name, x in buffers.allocations.items()}

    def moved(name: str, x: Tensor | None) -> Tensor | None:
        if x is None:
            return None
        return allocations[name].view(x.dtype).as_strided(x.shape, x.stride(), x.storage_offset())

    inputs = {name: moved(name, x) for name, x in buffers.inputs.items()}
    outputs: dict[str, Tensor] = {name: moved(name, x) for name, x in buffers.outputs.items()}  # type: ignore[misc]
    before = {name: x.cuda() for name, x in buffers.before.items()}
    there = {name: x.cuda() if isinstance(x, Tensor) else x for name, x in values.items()}
    return replace(buffers, inputs=inputs, outputs=outputs, before=before, allocations=allocations), there


def launch(case: Free, seed: int, deterministic: bool) -> GradientBuffers:
    buffers, values = on_gpu(*make(case, seed))
    kernel = build(case.source)
    kernel.launch(
        *buffers.inputs.values(),
        **buffers.outputs,
        **buffers.scalars,
        **values,
        **case.config,
        deterministic=deterministic,
    )
    torch.cuda.synchronize()
    return buffers


@pytest.mark.parametrize("deterministic", [False, True], ids=["fast", "ordered"])
@pytest.mark.parametrize("index", range(len(CASES)), ids=[case.why.replace(" ", "-") for case in CASES])
def test_case(index: int, deterministic: bool) -> None:
    launch(CASES[index], index, deterministic).check().require(CASES[index].why)


SUMS = (*BIASES, *LEARNED)


@pytest.mark.parametrize("deterministic", [False, True], ids=["fast", "ordered"])
@pytest.mark.parametrize("index", range(len(SUMS)), ids=[case.why.replace(" ", "-") for case in SUMS])
def test_gradients_of_a_bias_and_of_captured_tensors(index: int, deterministic: bool) -> None:
    found = launch(SUMS[index], index, deterministic)
    judged(found).require(SUMS[index].why)
    if deterministic:
        again = launch(SUMS[index], index, deterministic)
        for name, gradient in found.outputs.items():
            assert torch.equal(gradient, again.outputs[name]), name


SIZES = {"seqlen_q": 1500, "seqlen_k": 1500, "num_heads_q": 4, "num_heads_kv": 2, "batch": 2}
LARGER = tuple(
    Free(why=f"{why} {head_dim}", sizes=SIZES, head_dim=head_dim, **options)
    for head_dim in (64, 128)
    for why, options in (
        ("window", {"window": (300, 100)}),
        ("chunks", {"mask_mod": chunks}),
        ("prefix", {"mask_mod": prefix}),
        ("heads", {"mask_mod": bands_of_heads}),
        ("alibi", {"alibi": "h", "causal": "bottom-right"}),
    )
)


@pytest.mark.parametrize("case", LARGER, ids=lambda case: case.why)
def test_larger_and_the_same_bits_again(case: Free) -> None:
    """More thread blocks than run at a time; in order, twice."""
    first, second = (launch(case, 3, deterministic=True) for _ in range(2))
    for name, gradient in first.outputs.items():
        assert torch.equal(gradient, second.outputs[name]), name
    first.check().require(case.why)
