"""Which configuration to take for a shape that nobody measured, judged by leaving recorded shapes out.

    python benchmarks/unseen_shapes.py [--json FILE]

Each recorded problem (see data/README.md) is left out in turn and answered from the others, three ways: the winner of the nearest shape in
log space with equal features and head dim (what dispatch does, `flashgen.store.select`); the first entry of the portfolio of the other
problems of that head dim (what it does where no such shape is known); and a wave fit, `t = waves * (a + b * trips)` per
configuration, fitted on the other problems of the head dim. Printed is the recorded time of the answer over the best.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

import numpy as np

from flashgen import KernelConfig, Problem, Target
from flashgen.store.select import distance
from flashgen.tuner.experience import portfolio
from flashgen.tuner.replay import Surface, lessons_for, load_surfaces

DATA = Path(__file__).parent / "data"
FAMILIES = {
    "plain": ("h200_triton_attention_fwd.jsonl", "triton_fwd"),
    "gluon": ("h200_gluon_attention_fwd.jsonl", "gluon_fwd_sm90"),
}
H200 = Target.named("h200")


def nearest_winner(surface: Surface, others: list[Surface]) -> KernelConfig | None:
    """The winner of the nearest shape of the same spec."""
    same = [other for other in others if other.problem.spec == surface.problem.spec]
    if not same:
        return None
    near = min(same, key=lambda other: distance(surface.problem.shape, other.problem.shape))
    return min((c for c, ms in near.times_ms.items() if ms is not None), key=lambda c: near.times_ms[c] or math.inf)


def first_of_portfolio(surface: Surface, others: list[Surface]) -> KernelConfig | None:
    """What covers the other problems of the head dim best, the same mask and size unknown."""
    same = [
        o for o in others if o.problem.head_dim == surface.problem.head_dim and o.problem.spec != surface.problem.spec
    ]
    chosen = portfolio(list(surface.times_ms), lessons_for(surface, same), 1)
    return chosen[0] if chosen else None


def waves_and_trips(problem: Problem, config: KernelConfig) -> tuple[float, float]:
    """Thread blocks per SM, and the mean number of key blocks that one walks."""
    rows = -(-problem.seqlen_q // int(config.BLOCK_M)) * problem.batch * problem.num_heads_q
    pairs = problem.visible_pairs * problem.batch * problem.num_heads_q
    return math.ceil(rows / H200.num_sms), pairs / (rows * int(config.BLOCK_M) * int(config.BLOCK_N))


def wave_fit(surface: Surface, others: list[Surface]) -> KernelConfig | None:
    """The least predicted time, each configuration fitted on the other problems of the head dim by weighted least squares."""
    same = [other for other in others if other.problem.head_dim == surface.problem.head_dim]
    predicted: dict[KernelConfig, float] = {}
    for config in surface.times_ms:
        seen = [(other, ms) for other in same if (ms := other.times_ms.get(config)) is not None]
        if len(seen) < 2:
            continue
        terms = [waves_and_trips(other.problem, config) for other, _ in seen]
        # Divided by the time, so that every problem's relative error counts the same.
        design = np.array(
            [[waves / ms, waves * trips / ms] for (waves, trips), (_, ms) in zip(terms, seen, strict=True)]
        )
        (a, b), *_ = np.linalg.lstsq(design, np.ones(len(seen)), rcond=None)
        waves, trips = waves_and_trips(surface.problem, config)
        predicted[config] = waves * (a + b * trips)
    return min(predicted, key=predicted.__getitem__, default=None)


METHODS = {"nearest shape": nearest_winner, "portfolio": first_of_portfolio, "wave fit": wave_fit}


def judge(surfaces: list[Surface]) -> dict[str, list[float]]:
    """Slowdown per method and problem, each left out in turn."""
    found: dict[str, list[float]] = {name: [] for name in METHODS}
    for surface in surfaces:
        others = [other for other in surfaces if other is not surface]
        for name, method in METHODS.items():
            config = method(surface, others)
            legal = config is not None and config in surface.times_ms
            found[name].append(surface.slowdown(config) if legal and config is not None else math.inf)
    return found


def main() -> None:
    """Print a row per problem and the means."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="also write the figures here")
    arguments = parser.parse_args()
    document = {}
    for family, (file, variant) in FAMILIES.items():
        surfaces = load_surfaces(DATA / file, variant)
        found = judge(surfaces)
        print(f"{family:40} " + " ".join(f"{name:>14}" for name in found))
        for index, surface in enumerate(surfaces):
            print(
                f"  {surface.problem!s:60}"[:42].ljust(40)
                + f" S {surface.problem.seqlen_q:5} "
                + " ".join(f"{v[index]:12.3f}" for v in found.values())
            )
        rows = {
            name: {"geometric_mean": round(math.exp(sum(map(math.log, v)) / len(v)), 4), "worst": round(max(v), 4)}
            for name, v in found.items()
        }
        for name, row in rows.items():
            print(f"  {name:14} geometric mean {row['geometric_mean']:.4f}, worst {row['worst']:.4f}")
        document[family] = rows
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
