"""How well the cost model orders candidates: compiled here, without a GPU, against times measured on an H200.

    python benchmarks/model_quality.py

The times are another plain kernel's of the same space (see README.md in this folder), so this judges the ranking of tiles, not of
this kernel. Compiling the 300-odd candidates takes about four minutes on 2 cores, nothing afterwards (the facts are cached).
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from pathlib import Path
from typing import Any

from flashgen import Problem, Target, costmodel
from flashgen.compile_pool import CompilePool
from flashgen.config import KernelConfig
from flashgen.facts import CompiledFacts
from flashgen.render import render
from flashgen.variants import by_name

DATA = Path(__file__).parent / "data" / "h200_triton_attention_fwd.jsonl"
H200 = Target.named("h200")
TRITON_FWD = by_name("triton_fwd")


def surfaces() -> dict[Problem, dict[KernelConfig, float]]:
    """Measured milliseconds by problem and configuration."""
    found: dict[Problem, dict[KernelConfig, float]] = defaultdict(dict)
    for line in DATA.read_text().splitlines():
        row: dict[str, Any] = json.loads(line)
        problem = Problem(
            dtype="bf16",
            batch=row["batch"],
            seqlen_q=row["seqlen"],
            seqlen_k=row["seqlen"],
            num_heads_q=row["num_heads"],
            num_heads_kv=row["num_heads"],
            head_dim=row["head_dim"],
            head_dim_v=row["head_dim"],
            causal=row["causal"],
        )
        if row.get("ms"):
            found[problem][TRITON_FWD.config(**row["config"])] = row["ms"]
    return found


def spearman(a: list[float], b: list[float]) -> float:
    """Rank correlation."""
    ranks = [{index: place for place, index in enumerate(sorted(range(len(x)), key=x.__getitem__))} for x in (a, b)]
    middle = (len(a) - 1) / 2
    covariance = sum((ranks[0][i] - middle) * (ranks[1][i] - middle) for i in range(len(a)))
    return covariance / sum((i - middle) ** 2 for i in range(len(a)))


def main() -> None:
    """Print a row per problem and the geometric means."""
    slowdowns: dict[str, list[float]] = defaultdict(list)
    print(f"{'problem':58} {'n':>3} {'Spearman':>8} {'pick':>6} {'of 4':>6} {'of 8':>6} {'known-good pick':>16}")
    for problem, times in surfaces().items():
        facts: dict[KernelConfig, CompiledFacts] = {}
        with CompilePool() as pool:
            for config, result in pool.map(render(problem.spec, TRITON_FWD), H200, list(times)):
                if isinstance(result, CompiledFacts) and TRITON_FWD.illegal(problem.spec, H200, config, result) is None:
                    facts[config] = result
        ranked = costmodel.rank([(c, costmodel.predict(f, problem, H200, c)) for c, f in facts.items()])
        order = [config for config, _ in ranked]
        best = min(times[config] for config in order)
        known = {row.config for row in TRITON_FWD.known_good(problem.spec, H200)}
        picks = {
            "pick": times[order[0]],
            "of 4": min(times[c] for c in order[:4]),
            "of 8": min(times[c] for c in order[:8]),
            "known good": next(times[c] for c in order if c in known and not facts[c].loop_spill_ops),
        }
        for name, value in picks.items():
            slowdowns[name].append(value / best)
        rho = spearman([p.cost for _, p in ranked], [times[c] for c in order])
        cells = " ".join(f"{slowdowns[name][-1]:6.3f}" for name in ("pick", "of 4", "of 8"))
        print(f"{problem!s:58} {len(order):3} {rho:8.2f} {cells} {slowdowns['known good'][-1]:16.3f}")
    for name, values in slowdowns.items():
        print(
            f"{name:>12}: geometric mean {math.exp(sum(map(math.log, values)) / len(values)):.3f}, worst {max(values):.3f}"
        )


if __name__ == "__main__":
    main()
