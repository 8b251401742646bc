"""FlashAttention 3, which has a wheel for JAX (`flash-attn3-jax`) and none for this torch, beside flashgen on a Hopper GPU.

    python benchmarks/fa3_jax.py --csv benchmarks/results/h200_fa3.csv --budget-s 120

Head dims 64 and 128 (the published wheel may hold 128 alone; what it lacks is a row that says so), the sizes of `hopper_forward.py` and
`hopper_backward.py`. The two live in two frameworks on two streams, so the harness of `flashgen bench` cannot interleave their calls. Protocol `loop-1`
instead: a loop of calls inside one compiled `fori_loop`, and as many calls of flashgen in one CUDA graph, each loop long enough (20 ms) that what starts it
vanishes; the two take turns, 7 times, and a ratio is formed in each turn. Forward: each call's q is the output of the call before (both contestants), so
that nothing is hoisted out of the loop. Backward: the same inputs each time, held back by an `optimization_barrier`. Both are judged against fp64 first.
Rows are those of `flashgen bench --csv`. Exit code 0 done, 1 something is wrong or cells are left.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

# JAX takes three quarters of a GPU's memory when it starts, unless told not to.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import click
import side_by_side
import torch
from torch import Tensor

from flashgen.bench.environment import Environment, gpu_state, version
from flashgen.bench.rounds import noise_floor, pairwise_ratio, verdict
from flashgen.bench.timing import summarise
from flashgen.peers import OPS, BenchOp, Flashgen
from flashgen.peers.base import BACKWARD_FLOPS
from flashgen.peers.compare import Comparison, Contestant
from flashgen.peers.inputs import Inputs
from flashgen.peers.judge import PEER_SLACK, Judge
from flashgen.peers.output import append_csv, check_csv, read_csv
from flashgen.problem import Problem

PROTOCOL = "loop-1"
TOKENS, HIDDEN = 16384, 2048
HEAD_DIMS, LENGTHS = (128, 64), (4096, 8192, 2048, 16384)
TURNS, LOOP_S, SETTLE_S = 7, 0.02, 0.2
Loop = Callable[[int], float]  # so many calls -> seconds of all


def cells(device: str) -> Iterator[tuple[BenchOp, Problem]]:
    """Every head dim, the most telling length first."""
    for head_dim in HEAD_DIMS:
        for length in LENGTHS:
            for op in OPS:
                for causal in (True, False):
                    yield op, Problem(
                        dtype="bf16", batch=TOKENS // length, seqlen_q=length, seqlen_k=length, num_heads_q=HIDDEN // head_dim,
                        num_heads_kv=HIDDEN // head_dim, head_dim=head_dim, head_dim_v=head_dim, causal=causal, device=device,
                    )  # fmt: skip


def to_jax(x: Tensor) -> Any:
    """The same memory as a JAX array."""
    import jax

    return jax.dlpack.from_dlpack(x.detach().contiguous())


def fa3(problem: Problem, op: BenchOp, tensors: list[Tensor]) -> tuple[list[Tensor], Loop]:
    """FlashAttention 3's first result, and its loop.

    Raises:
        Exception: whatever the library says where it does not take the problem.
    """
    import jax
    from flash_attn3_jax import flash_mha
    from flash_attn3_jax.flash import _flash_mha_bwd, _flash_mha_fwd

    options = {"softmax_scale": problem.scale, "is_causal": problem.causal}
    q, k, v, *rest = map(to_jax, tensors)
    if op == "attention_fwd":
        results = [flash_mha(q, k, v, **options)]

        def many(count: Any, q: Any, k: Any, v: Any) -> Any:
            return jax.lax.fori_loop(0, count, lambda _, x: flash_mha(x, k, v, **options), q)

        arguments: tuple[Any, ...] = (q, k, v)
    else:
        out, lse = _flash_mha_fwd(q, k, v, problem.scale, problem.causal, (-1, -1))

        def gradients(*inputs: Any) -> Any:
            return tuple(_flash_mha_bwd(*inputs, problem.scale, problem.causal, (-1, -1)))

        arguments = (rest[0], q, k, v, out, lse)
        results = list(jax.jit(gradients)(*arguments))

        def many(count: Any, *inputs: Any) -> Any:
            def body(_: Any, carry: Any) -> Any:
                dout, _before = carry
                return jax.lax.optimization_barrier((dout, gradients(dout, *inputs[1:])))

            start = tuple(jax.numpy.zeros_like(x) for x in inputs[1:4])
            return jax.lax.fori_loop(0, count, body, (inputs[0], start))

    compiled = jax.jit(many)

    def loop(count: int) -> float:
        start = time.perf_counter()
        jax.block_until_ready(compiled(count, *arguments))
        return time.perf_counter() - start

    jax.block_until_ready(results)
    return [torch.from_dlpack(x) for x in results], loop


def own(problem: Problem, op: BenchOp, tensors: list[Tensor]) -> tuple[list[Tensor], Loop]:
    """Flashgen's first result, and its loop: CUDA graphs of 8 calls."""
    import flashgen

    q, k, v, *rest = tensors
    unit = 8
    if op == "attention_fwd":

        def call(x: Tensor) -> Tensor:
            with torch.no_grad():
                return flashgen.attention(x, k, v, causal=problem.causal)  # type: ignore[return-value]

        results = [call(q)]

        def some() -> None:
            x = q
            for _ in range(unit):
                x = call(x)
    else:
        leaves = [x.detach().requires_grad_() for x in (q, k, v)]
        out = flashgen.attention(*leaves, causal=problem.causal)

        def back() -> tuple[Tensor, ...]:
            return torch.autograd.grad(out, leaves, rest[0], retain_graph=True)  # type: ignore[arg-type]

        results = list(back())

        def some() -> None:
            for _ in range(unit):
                back()

    if problem.device == "cpu":
        return results, lambda count: _timed(some, count, unit, lambda: None)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        some()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        some()
    return results, lambda count: _timed(graph.replay, count, unit, torch.cuda.synchronize)


def _timed(some: Callable[[], Any], count: int, unit: int, wait: Callable[[], Any]) -> float:
    """Seconds of `count` calls, of which `some` makes `unit`: scaled where it is no multiple."""
    times = -(-count // unit)
    wait()
    start = time.perf_counter()
    for _ in range(times):
        some()
    wait()
    return (time.perf_counter() - start) * count / (times * unit)


def turns(loops: dict[str, Loop]) -> dict[str, list[float]]:
    """Milliseconds of a call, by contestant: loops of equal length in turns, after a warm-up."""
    counts = {}
    for name, loop in loops.items():
        loop(2)
        single = loop(8) / 8
        counts[name] = max(8, int(LOOP_S / max(single, 1e-7)))
        began = time.perf_counter()
        while time.perf_counter() - began < SETTLE_S:
            loop(counts[name])
    found: dict[str, list[float]] = {name: [] for name in loops}
    for turn in range(TURNS):
        names = list(loops) if turn % 2 == 0 else list(loops)[::-1]
        for name in names:
            found[name].append(loops[name](counts[name]) / counts[name] * 1e3)
    return found


def compare(problem: Problem, op: BenchOp, peer: Callable[..., tuple[list[Tensor], Loop]] = fa3) -> Comparison:
    """One cell: flashgen, its twin, FlashAttention 3."""
    one = Comparison(problem=problem, op=op, protocol=PROTOCOL)
    inputs = Inputs(problem, op, cache=0, memory=0)
    tensors = inputs.of("bshd")[0]
    plain = [x for x in (tensors.q, tensors.k, tensors.v, tensors.dout) if x is not None]
    judge, loops = Judge(problem, op, tensors), {}
    one.copies, one.overflows = 1, inputs.bytes_each > 2 * inputs_cache(problem)
    detail = Flashgen().detail(problem, op)
    for name, make, slack in (("flashgen", own, 1.0), ("fa3-jax", peer, PEER_SLACK)):
        entry = Contestant(name=name, version=_version(name), detail=detail if name == "flashgen" else "")
        one.contestants.append(entry)
        start = time.perf_counter()
        try:
            results, loop = make(problem, op, plain)
        except Exception as error:  # of a library that does not take the problem: its row says so
            entry.status = "failed"
            entry.message = f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"[:300]
            continue
        entry.prepare_s = time.perf_counter() - start
        result = results[0] if op == "attention_fwd" else results
        entry.status, entry.budget_used, entry.message = judge.judge(result, "bshd", slack=slack)
        if entry.status != "wrong":
            loops[name] = loop
    if "flashgen" in loops:
        loops["flashgen (A/A)"] = loops["flashgen"]
        one.contestants.append(Contestant(name="flashgen (A/A)", detail="the baseline once more"))
    one.gpu_before = gpu_state()
    times = turns(loops)
    one.gpu_after = gpu_state()
    flops = problem.flops * (1.0 if op == "attention_fwd" else BACKWARD_FLOPS)
    for entry in one.contestants:
        if entry.name not in times:
            continue
        entry.samples = times[entry.name]
        entry.time = summarise(entry.samples, PROTOCOL)
        entry.tflops = flops / entry.time.latency_ms / 1e9
        entry.gbps = one.moved_bytes / entry.time.latency_ms / 1e6
        if entry.name != "flashgen" and "flashgen" in times:
            entry.ratio = pairwise_ratio(entry.samples, times["flashgen"])
    twin = next((e.ratio for e in one.contestants if e.name == "flashgen (A/A)"), None)
    one.floor = noise_floor(twin)
    for entry in one.contestants:
        if entry.name == "fa3-jax" and entry.ratio is not None:
            entry.verdict = verdict(entry.ratio, one.floor)
    one.settled = True
    return one


def inputs_cache(problem: Problem) -> int:
    """Bytes of the cache that inputs have to exceed."""
    return Inputs(problem, "attention_fwd", memory=0).cache_bytes


def _version(name: str) -> str:
    return (
        Flashgen().version()
        if name == "flashgen"
        else f"flash-attn3-jax {version('flash-attn3-jax')}, jax {version('jax')}"
    )


@click.command()
@click.option(
    "--csv", "path", type=click.Path(path_type=Path), help="Append to this file; its cells are not run again."
)
@click.option("--budget-s", type=click.FloatRange(min=1), default=120.0, show_default=True, help="Wall-clock seconds.")
@click.option("--head-dim", type=click.Choice([str(dim) for dim in HEAD_DIMS]), help="Cells of this one alone.")
def main(path: Path | None, budget_s: float, head_dim: str | None) -> int:
    """Time FlashAttention 3 under JAX beside flashgen."""
    start, failed = time.monotonic(), 0
    if path is not None:
        check_csv(path)
    done = {op: side_by_side.measured(read_csv(path), op) if path is not None else set() for op in OPS}
    side_by_side.need_gpu()
    environment = Environment.read("cuda")
    todo = [(op, p) for op, p in cells("cuda") if side_by_side.key_of(p) not in done[op]]
    todo = [(op, p) for op, p in todo if head_dim in (None, str(p.head_dim))]
    longest = 0.0
    for number, (op, problem) in enumerate(todo, start=1):
        began = time.monotonic()
        if began - start + longest > budget_s:
            click.echo(f"{len(todo) - number + 1} cells left: the budget of {budget_s:g} s is spent", err=True)
            return 1
        one = compare(replace(problem), op)
        if path is not None:
            append_csv(path, one, environment)
        longest = max(longest, time.monotonic() - began)
        failed += one.baseline.status != "ok"
        click.echo(f"[{number}/{len(todo)}, {time.monotonic() - start:.0f} s] {op} {side_by_side.line(one)}")
        for entry in one.contestants:
            if entry.status not in ("ok", "loose"):
                click.echo(f"  {entry.name}: {entry.status}: {entry.message}")
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(side_by_side.exit_code(main))
