"""Calls in CUDA graphs and over and over: the bits of an eager call, with options, on every backend that takes them.

    python tests/gpu/test_graphs_gpu.py WHAT STATE NAME HEAD_DIM BACKEND

captures one call in a process of its own, which is what the tests of first captures run: WHAT is forward or step; STATE is cold (nothing
was called before the capture), once (one eager call on the same stream), side (three on a side stream, as PyTorch's manual has it), recorded
(one eager forward whose backward nobody asked for, so that it may still be compiling) or, to tell PyTorch's own limits from ours, kept
(an eager step whose autograd graph lives on: PyTorch refuses to capture the next one).
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from launch_once import OPTIONS, Sizes, call, packed
from torch import Tensor

pytestmark = pytest.mark.gpu
SIZES = Sizes(queries=700, keys=900)
CASES = {**OPTIONS, "packed": packed}
BACKENDS = ("auto", "triton")


def step(leaves: list[Tensor], options: dict[str, Any], backend: str) -> list[Tensor]:
    """Out, lse and the three gradients."""
    out, lse = call(leaves, options, backend=backend, deterministic=True)
    return [out, lse, *torch.autograd.grad([out, lse], leaves, [torch.ones_like(out), torch.ones_like(lse)])]


def inputs(name: str, head_dim: int) -> tuple[list[Tensor], dict[str, Any]]:
    return SIZES.leaves(head_dim, requires_grad=True), CASES[name](SIZES)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("name", CASES)
def test_a_captured_step_replays_the_bits_of_an_eager_one(name: str, head_dim: int, backend: str) -> None:
    leaves, options = inputs(name, head_dim)
    step(leaves, options, backend)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        # Detached: autograd's nodes would live on with the capturing stream, and PyTorch warns, once a process, of eager steps on another.
        captured = [x.detach() for x in step(leaves, options, backend)]
    for turn in range(3):
        with torch.no_grad():
            for x in leaves:
                x.mul_(-0.5 if turn else 1.0)  # what the graph reads changes between replays
        for x in captured:
            x.fill_(torch.nan)
        graph.replay()
        torch.cuda.synchronize()
        for which, got, want in zip(
            ("out", "lse", "dq", "dk", "dv"), captured, step(leaves, options, backend), strict=True
        ):
            assert torch.equal(got, want), (turn, which)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", [name for name in CASES if name != "plain"])  # plain: test_gluon_backward_gpu.py
def test_a_hundred_steps_have_the_same_bits(name: str, backend: str) -> None:
    leaves, options = inputs(name, 64)
    first = step(leaves, options, backend)
    for _ in range(99):
        for which, got, want in zip(
            ("out", "lse", "dq", "dk", "dv"), step(leaves, options, backend), first, strict=True
        ):
            assert torch.equal(got, want), which


@pytest.mark.parametrize("backend", BACKENDS)
def test_dropout_is_drawn_anew_in_each_replay_as_eager_steps_draw_it(backend: str) -> None:
    leaves, options = inputs("plain", 64)
    options["dropout_p"] = 0.3
    eager = []
    for seed in (5, 6):
        torch.cuda.manual_seed(seed)
        # Detached: what holds the graph of a step holds its stream, and capture refuses to wait for that.
        eager.append([x.detach() for x in step(leaves, options, backend)])
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = [x.detach() for x in step(leaves, options, backend)]
    for seed, wanted in zip((5, 6, 5), (*eager, eager[0]), strict=True):
        torch.cuda.manual_seed(seed)
        graph.replay()
        torch.cuda.synchronize()
        for which, got, want in zip(("out", "lse", "dq", "dk", "dv"), captured, wanted, strict=True):
            assert torch.equal(got, want), (seed, which)
    first = captured[0].clone()
    graph.replay()  # goes on from where the generator is
    torch.cuda.synchronize()
    assert not torch.equal(captured[0], first)


# -- the first capture of a kernel in a process --


def forward(leaves: list[Tensor], options: dict[str, Any], backend: str) -> list[Tensor]:
    """Out and lse, without gradients."""
    return [*call([x.detach() for x in leaves], options, backend=backend)]


def before_capture(state: str, run: Any, *arguments: Any) -> Any:
    """What a user has called before; returns what has to live on."""
    if state in ("once", "kept"):
        run(*arguments)
    if state == "side":
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                run(*arguments)
        torch.cuda.current_stream().wait_stream(stream)
    if state in ("recorded", "kept"):
        leaves, options, backend = arguments
        return call(leaves, options, backend=backend, deterministic=True)
    return None


def first_capture(what: str, state: str, name: str, head_dim: int, backend: str) -> None:
    """Capture, replay with other inputs, and hold it against an eager call."""
    run = {"forward": forward, "step": step}[what]
    leaves, options = inputs(name, head_dim)
    kept = before_capture(state, run, leaves, options, backend)
    if state == "recorded":
        kept = None  # and with it the leaves' accumulators
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = [x.detach() for x in run(leaves, options, backend)]
    del kept
    # A mask that reads tensors and is first met under capture is known nowhere: every block is masked, and what is masked is added in
    # another order than in an eager call.
    rounds = state == "cold" and name == "mods"
    for turn in range(2):
        with torch.no_grad():
            for x in leaves:
                x.mul_(-0.5 if turn else 1.0)
        for x in captured:
            x.fill_(torch.nan)
        graph.replay()
        torch.cuda.synchronize()
        for number, (got, want) in enumerate(zip(captured, run(leaves, options, backend), strict=True)):
            apart = (got.double() - want.double()).abs().max() / want.double().abs().max()
            allowed = 2 * torch.finfo(torch.bfloat16).eps if rounds else 0.0
            assert apart <= allowed, f"replay {turn}: result {number} differs by {apart:.2e} of the largest"
            assert rounds or torch.equal(got, want), f"replay {turn}: result {number} differs"
    print(
        f"{what} {state} {name} {head_dim} {backend}: {'within rounding' if rounds else 'the bits'} of an eager call",
        flush=True,
    )


FIRST = [("forward", "cold"), ("step", "cold"), ("step", "once"), ("step", "side"), ("step", "recorded")]


@pytest.mark.parametrize("name", ["plain", "window", "mods", "packed"])
@pytest.mark.parametrize(("what", "state"), FIRST)
def test_the_first_capture_of_a_process(what: str, state: str, name: str, tmp_path: Path) -> None:
    words = [sys.executable, __file__, what, state, name, "64", "auto"]
    root = str(Path(__file__).resolve().parents[2])
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))}
    if name == "plain":  # compiled during the capture, too; the others may be in the caches
        environment |= {"FLASHGEN_CACHE_DIR": str(tmp_path / "flashgen"), "TRITON_CACHE_DIR": str(tmp_path / "triton")}
    done = subprocess.run(
        words, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stdout[-4000:]


if __name__ == "__main__":
    what, state, name, head_dim, backend = sys.argv[1:]
    first_capture(what, state, name, int(head_dim), backend)
