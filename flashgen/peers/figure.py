"""Comparisons as a figure: grouped bars of TFLOP/s, one group per problem and operation."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from flashgen import plot
from flashgen.bench.environment import Environment
from flashgen.peers.compare import TWIN, Comparison, Contestant

_GROUP_INCHES = 0.3


def draw(comparisons: Sequence[Comparison], environment: Environment, path: Path) -> None:
    """Draw every contestant that was timed: the median, from the 90th to the 10th percentile of its time.

    Args:
        comparisons: at least one.
        environment: named below the bars.
        path: .png, .svg or .pdf.

    Raises:
        InvalidProblemError, MissingExtraError: as `plot.save`.
    """
    timed = (entry.name for one in comparisons for entry in one.contestants if entry.time is not None)
    names = [name for name in dict.fromkeys(timed) if name != TWIN]
    inches = max(6.4, 1.5 + _GROUP_INCHES * len(comparisons) * (len(names) + 1))
    made, (axes,) = plot.figure(size=(inches, 4.6))
    width = 0.8 / max(1, len(names))
    for number, name in enumerate(names):
        there = [(group, one, _of(one, name)) for group, one in enumerate(comparisons)]
        bars = [(group, *_tflops(one, entry)) for group, one, entry in there if entry is not None]
        axes.bar(
            [group + (number - (len(names) - 1) / 2) * width for group, *_ in bars],
            [value for _, value, _, _ in bars],
            width,
            label=name,
            yerr=[[value - low for _, value, low, _ in bars], [high - value for _, value, _, high in bars]],
            error_kw={"elinewidth": 0.8, "capsize": 2},
        )
    axes.set_xticks(range(len(comparisons)), [_label(one) for one in comparisons], fontsize=8)
    axes.set_ylabel("TFLOP/s (median; p10 to p90)")
    if names:
        axes.legend(fontsize=8)
    where = environment.gpu or f"CPU, {environment.cpu}, {environment.threads} threads"
    torch = environment.versions.get("torch", "unknown")
    made.supxlabel(f"{where}; torch {torch}; {comparisons[0].protocol}; {environment.date}", fontsize=7)
    plot.save(made, path)


def _of(one: Comparison, name: str) -> Contestant | None:
    return next((entry for entry in one.contestants if entry.name == name and entry.time is not None), None)


def _tflops(one: Comparison, entry: Contestant) -> tuple[float, float, float]:
    """At the median, the 90th and the 10th percentile of the time: the slow end is the low one."""
    assert entry.time is not None  # `_of` takes no other
    times = (entry.time.latency_ms, entry.time.latency_p90_ms, entry.time.latency_p10_ms)
    value, low, high = (one.flops / milliseconds / 1e9 for milliseconds in times)
    return value, low, high


def _label(one: Comparison) -> str:
    p = one.problem
    heads = f"{p.num_heads_q}" if p.num_heads_q == p.num_heads_kv else f"{p.num_heads_q}/{p.num_heads_kv}"
    length = f"{p.seqlen_q}" if p.seqlen_q == p.seqlen_k else f"{p.seqlen_q}x{p.seqlen_k}"
    way = "backward" if one.op == "attention_bwd" else "forward"
    return f"{way} {'causal' if p.causal else 'full'}\n{p.dtype} d{p.head_dim}\nb{p.batch} s{length} h{heads}"
