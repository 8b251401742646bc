"""The walk of our tiles over the keys: how many each program loads, and what programs that run together share.

The programs are those of `templates/triton/attention_fwd.py.jinja`: one per (batch, query head, block of BLOCK_M query rows),
neighbours in the same head; causal kernels start with the last block. A program loads the keys of its range, each once and
none beyond the range's end. With a window the range starts at the block of BLOCK_N keys that holds the first visible key.
"""

from __future__ import annotations

from collections.abc import Iterator

from flashgen.problem import Problem


def key_ranges(problem: Problem, block_m: int, block_n: int) -> list[tuple[int, int]]:
    """[start, stop) of the keys that each query block loads, by block; empty ranges are (0, 0)."""
    left, right = problem.window_size
    if problem.causal:
        right = 0
    shift = problem.causal_offset  # of the window too
    ranges = []
    for first in range(0, problem.seqlen_q, block_m):
        last = min(first + block_m, problem.seqlen_q) - 1
        stop = problem.seqlen_k if right < 0 else min(problem.seqlen_k, max(last + shift + right + 1, 0))
        start = 0 if left < 0 else max(first + shift - left, 0)
        ranges.append((start // block_n * block_n, stop) if start < stop else (0, 0))
    return ranges


def keys_loaded(ranges: list[tuple[int, int]]) -> int:
    """Keys that all programs of one query head load, re-reads counted."""
    return sum(stop - start for start, stop in ranges)


def keys_touched(ranges: list[tuple[int, int]]) -> int:
    """Different keys that the programs of one head load: the ranges' union (they move monotonically and overlap or touch)."""
    touched, reached = 0, 0
    for start, stop in sorted(ranges):
        touched += max(0, stop - max(start, reached))
        reached = max(reached, stop)
    return touched


def waves(problem: Problem, ranges: list[tuple[int, int]], resident: int) -> Iterator[dict[tuple[int, int], int]]:
    """Programs that run together, `resident` at a time in launch order.

    Yields:
        For each wave: (batch, key/value head) -> different keys that its programs load.
    """
    blocks, group = len(ranges), problem.num_heads_q // problem.num_heads_kv
    order = list(reversed(ranges)) if problem.causal else ranges
    programs = problem.batch * problem.num_heads_q * blocks
    for first in range(0, programs, resident):
        stop = min(first + resident, programs)
        spans: dict[tuple[int, int], list[tuple[int, int]]] = {}
        for head in range(first // blocks, (stop - 1) // blocks + 1):
            inside = order[max(first - head * blocks, 0) : min(stop - head * blocks, blocks)]
            batch, query_head = divmod(head, problem.num_heads_q)
            spans.setdefault((batch, query_head // group), []).extend(inside)
        yield {head: keys_touched(spans[head]) for head in spans}
