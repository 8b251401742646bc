"""How good each search strategy is, replayed on recorded surfaces: no GPU needed.

    python benchmarks/search_quality.py [--seeds 50] [--json FILE]

Every strategy searches each recorded space (see data/README.md) with 3 % noise on every reading. Printed is the geometric mean, over problems and
seeds, of the true slowdown of what it would choose after 5, 10 and 20 trials; the three best readings are re-timed four times each, which
is not counted. `auto` takes its seeds and its expectation from the *other* problems alone; `auto, cold` knows nothing.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

from flashgen.tuner import strategies
from flashgen.tuner.replay import Surface, lessons_for, load_surfaces, replay

DATA = Path(__file__).parent / "data"
FAMILIES = {
    "plain": ("h200_triton_attention_fwd.jsonl", "triton_fwd"),
    "gluon": ("h200_gluon_attention_fwd.jsonl", "gluon_fwd_sm90"),
}
CHECKPOINTS = (5, 10, 20)
WANTED = {
    ("plain", "auto"): (1.02, 1.005, 1.003),
    ("gluon", "auto"): (1.04, 1.02, 1.01),
    ("plain", "auto, cold"): (math.inf, math.inf, 1.02),
    ("gluon", "auto, cold"): (math.inf, math.inf, 1.02),
}


def judge(surfaces: list[Surface], name: str, seeds: int) -> dict[str, Any]:
    """Geometric and worst mean slowdowns of one strategy over all surfaces."""
    slowdowns: dict[int, list[float]] = defaultdict(list)
    started, trials = time.perf_counter(), 0
    for surface in surfaces:
        lessons = lessons_for(surface, surfaces) if name == "auto" else []
        for seed in range(seeds):
            strategy = strategies.make(name.split(",")[0], list(surface.times_ms), lessons=lessons, seed=seed)
            points = (*CHECKPOINTS, len(surface.times_ms)) if name == "exhaustive" else CHECKPOINTS
            found = replay(surface, strategy, checkpoints=points, seed=seed)
            trials += max(points)
            for index, point in enumerate(points):
                slowdowns[index].append(found[point])
    seconds = time.perf_counter() - started
    means = [math.exp(sum(map(math.log, values)) / len(values)) for values in slowdowns.values()]
    return {
        "strategy": name,
        "geometric_mean": [round(mean, 4) for mean in means],
        "p90": [round(sorted(values)[int(0.9 * len(values))], 4) for values in slowdowns.values()],
        "worst": [round(max(values), 4) for values in slowdowns.values()],
        "trials_per_minute": round(60 * trials / seconds),
    }


def main() -> int:
    """Print a row per family and strategy; 1 when a wanted figure is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=50, help="replays of each problem")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    parser.add_argument(
        "--strategies", default="auto;auto, cold;gp;walk;tpe;random;exhaustive", help="which, separated by semicolons"
    )
    arguments = parser.parse_args()
    document: dict[str, Any] = {"seeds": arguments.seeds, "noise": 0.03, "checkpoints": CHECKPOINTS, "families": {}}
    missed = 0
    for family, (file, variant) in FAMILIES.items():
        surfaces = load_surfaces(DATA / file, variant)
        print(f"{family}: {len(surfaces)} problems, {min(len(s.times_ms) for s in surfaces)} to "
              f"{max(len(s.times_ms) for s in surfaces)} configurations; geometric mean (p90) of the slowdown after 5, 10, 20 trials")  # fmt: skip
        rows = document["families"][family] = []
        for name in arguments.strategies.split(";"):
            row = judge(surfaces, name, arguments.seeds)
            rows.append(row)
            wanted = WANTED.get((family, name))
            verdict = ""
            if wanted is not None:
                misses = [w for mean, w in zip(row["geometric_mean"], wanted, strict=True) if mean > w]
                missed += len(misses)
                verdict = "  missed" if misses else "  as wanted"
            cells = "  ".join(
                f"{mean:.4f} ({p90:.3f})" for mean, p90 in zip(row["geometric_mean"], row["p90"], strict=True)
            )
            print(f"  {name:12} {cells}  {row['trials_per_minute']:7} trials/min{verdict}", flush=True)
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(document, indent=1) + "\n")
    return 1 if missed else 0


if __name__ == "__main__":
    raise SystemExit(main())
