"""The Hopper backward beside its peers on a Hopper GPU: bf16, 16k tokens, hidden size 2048; sums of dq in any and in a fixed order.

    python benchmarks/hopper_backward.py --csv benchmarks/results/h100_backward.csv

Every contestant computes dq, dk and dv of one output; peers through autograd, this kernel without it. All take turns, call by call, in an
order shuffled every round; a ratio is the median of its rounds' ratios. The kernel runs with its default configuration.
"""

from __future__ import annotations

import csv
import itertools
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from flashgen.build import build
from flashgen.render import render
from flashgen.spec import AttentionSpec
from flashgen.target import Target
from flashgen.variants import by_name

BACKWARD, FORWARD, H100 = by_name("gluon_bwd_sm90"), by_name("gluon_fwd_sm90"), Target.named("h100")
TOKENS, HIDDEN = 16384, 2048
WIDTHS = ((128, 128), (64, 64), (256, 256), (192, 128))
COLUMNS = [
    "step",
    "head_dim",
    "seqlen",
    "causal",
    "contestant",
    "median_ms",
    "p10_ms",
    "p90_ms",
    "tflops",
    "cudnn_time_over_this",
    "rounds",
]
Call = Callable[[], Any]
Inputs = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def sdpa(backend: SDPBackend, inputs: Inputs, causal: bool) -> Call:
    """PyTorch's backward with one backend."""
    q, k, v, dout = (x.transpose(1, 2) for x in inputs)
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    with sdpa_kernel(backend):
        out = torch.nn.functional.scaled_dot_product_attention(*leaves, is_causal=causal)
    return lambda: torch.autograd.grad(out, leaves, dout, retain_graph=True)


def fa4(inputs: Inputs, causal: bool) -> Call:
    """FlashAttention 4's, where it is installed."""
    from flash_attn.cute import flash_attn_func

    *qkv, dout = inputs
    leaves = [x.detach().requires_grad_() for x in qkv]
    out = flash_attn_func(*leaves, causal=causal)
    out = out[0] if isinstance(out, tuple) else out
    return lambda: torch.autograd.grad(out, leaves, dout, retain_graph=True)


def ours(inputs: Inputs, causal: bool, deterministic: bool) -> Call:
    """The rendered kernel; out and lse are the Hopper forward's."""
    q, k, v, dout = inputs
    shape = {"dtype": "bf16", "head_dim": q.shape[3], "head_dim_v": v.shape[3], "causal": causal}
    spec = AttentionSpec(op="attention_bwd", **shape)  # type: ignore[arg-type]
    forward = AttentionSpec(has_lse=True, **shape)  # type: ignore[arg-type]
    scalars = {"sm_scale": q.shape[3] ** -0.5, "causal_offset": 0}
    out, lse = torch.empty_like(dout), torch.empty(q.shape[0], q.shape[2], q.shape[1], device=q.device)
    build(render(forward, FORWARD)).launch(q, k, v, out, lse, **scalars, **FORWARD.default(forward, H100))
    launch, config = build(render(spec, BACKWARD)).launch, BACKWARD.default(spec, H100)
    gradients = [torch.empty_like(x) for x in (q, k, v)]
    return lambda: launch(dout, None, q, k, v, out, lse, *gradients, **scalars, **config, deterministic=deterministic)


def contestants(inputs: Inputs, causal: bool) -> dict[str, Call]:
    """Those that run these inputs, each called once."""
    makers: dict[str, Callable[[], Call]] = {
        "cudnn": lambda: sdpa(SDPBackend.CUDNN_ATTENTION, inputs, causal),
        "flash": lambda: sdpa(SDPBackend.FLASH_ATTENTION, inputs, causal),
        "fa4": lambda: fa4(inputs, causal),
        "fast": lambda: ours(inputs, causal, False),
        "ordered": lambda: ours(inputs, causal, True),
    }
    found = {}
    for name, make in makers.items():
        try:
            found[name] = make()
            found[name]()
            torch.cuda.synchronize()
        except (ImportError, RuntimeError) as error:
            click.echo(f"  {name} does not run: {error}", err=True)
            found.pop(name, None)
    return found


def times_of(calls: dict[str, Call], rounds: int) -> dict[str, list[float]]:
    """Milliseconds of each call, round by round; two rounds warm up."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    names, generator = list(calls), torch.Generator().manual_seed(1)
    for number in range(rounds + 2):
        marks = []
        for index in torch.randperm(len(names), generator=generator).tolist():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            calls[names[index]]()
            end.record()
            marks.append((names[index], start, end))
        torch.cuda.synchronize()
        for name, start, end in marks:
            if number >= 2:
                times[name].append(start.elapsed_time(end))
    return times


@click.command()
@click.option("--csv", "path", type=click.Path(path_type=Path), required=True, help="Written anew.")
@click.option("--lengths", default="8192,2048", show_default=True)
@click.option("--rounds", type=click.IntRange(min=3), default=21, show_default=True)
def main(path: Path, lengths: str, rounds: int) -> None:
    """Time the backward of some cells beside cuDNN, FlashAttention 2 and, where installed, 4."""
    if not torch.cuda.is_available():
        raise click.ClickException("no GPU here.")
    with path.open("w", newline="") as file:
        file.write(
            f"# {torch.cuda.get_device_name()}, torch {torch.__version__}; bf16, {TOKENS} tokens, hidden {HIDDEN}\n"
        )
        writer = csv.writer(file)
        writer.writerow(COLUMNS)
        for (d, dv), seqlen, causal in itertools.product(WIDTHS, map(int, lengths.split(",")), (True, False)):
            batch, heads = TOKENS // seqlen, HIDDEN // min(d, dv)
            q, k, v, dout = (
                torch.randn(batch, seqlen, heads, width, device="cuda", dtype=torch.bfloat16)
                for width in (d, d, dv, dv)
            )
            times = times_of(contestants((q, k, v, dout), causal), rounds)
            flops = 2 * batch * heads * seqlen**2 * (3 * d + 2 * dv) / (2 if causal else 1)
            for name, taken in times.items():
                low, middle, high = (sorted(taken)[i] for i in (rounds // 10, rounds // 2, rounds - 1 - rounds // 10))
                peer = times.get("cudnn", [float("nan")] * rounds)
                ratio = statistics.median(theirs / mine for theirs, mine in zip(peer, taken, strict=True))
                figures = (f"{middle:.4f}", f"{low:.4f}", f"{high:.4f}", f"{flops / middle / 1e9:.1f}", f"{ratio:.4f}")
                writer.writerow(["speed", d, seqlen, int(causal), name, *figures, rounds])
                click.echo(
                    f"D{d} S{seqlen} {'causal' if causal else 'full'} {name}: {figures[0]} ms, {figures[3]} TFLOP/s"
                )
            file.flush()


if __name__ == "__main__":
    main()
