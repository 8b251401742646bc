"""How well prediction chooses: the cost model and the policy without a GPU, against times measured on one H200.

    python benchmarks/model_quality.py [--json] [--recompile]

The times are another plain kernel's of the same tiles (`data/README.md`), so this judges the choice of a tile, not this kernel's speed. The
facts are of this project's kernel, committed; `--recompile` makes them anew (needs Triton, no GPU). "Held out" is meant: constants are
refitted, and tables and lists made again, from the other head dim's problems, or from the seven other problems.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from statistics import mean
from typing import Any

import surfaces
from surfaces import H200, TRITON_FWD, Facts, Surface

from flashgen import Problem, costmodel
from flashgen.config import KernelConfig
from flashgen.costmodel import Constants
from flashgen.facts import CompiledFacts
from flashgen.tuner import policy
from flashgen.variants import KnownGood, MeasuredTile

GRID = {"spill_cycles": (8.0, 16.0, 24.0), "two_stages": (0.05, 0.1, 0.15, 0.2), "exposed": (0.2, 0.3, 0.5, 0.7)}
# Of FlexAttention in PyTorch 2.13 for bf16 on sm_90, by head dim (torch/_inductor/template_heuristics/triton.py).
FLEX = {64: (128, 128, 4, 3), 128: (128, 64, 8, 3)}
BOUND_GEO, BOUND_WORST = 1.05, 1.10  # what the policy must keep, held out

Row = dict[str, float]


class Judge:
    """The surfaces with the facts of every tile that fits."""

    def __init__(self, times: Mapping[Problem, Surface], facts: Facts) -> None:
        self.times: dict[Problem, Surface] = {}
        self.facts: dict[Problem, dict[KernelConfig, CompiledFacts]] = {}
        for problem, surface in times.items():
            known = {
                tile: fact
                for tile, fact in facts.get(problem.spec.key, {}).items()
                if tile in surface and TRITON_FWD.illegal(problem.spec, H200, tile, fact) is None
            }
            self.facts[problem] = known
            self.times[problem] = {tile: surface[tile] for tile in known}

    def slowdown(self, problem: Problem, tile: KernelConfig) -> float:
        """Measured time of a tile over the problem's best."""
        return self.times[problem][tile] / min(self.times[problem].values())

    def order(self, problem: Problem, constants: Constants) -> list[tuple[KernelConfig, float]]:
        """Tiles and predicted costs, best first."""
        predicted = [
            (tile, costmodel.predict(facts, problem, H200, tile, constants=constants))
            for tile, facts in self.facts[problem].items()
        ]
        return [(tile, prediction.cost) for tile, prediction in costmodel.rank(predicted)]

    def model(self, problem: Problem, constants: Constants) -> Row:
        """Rank correlation, and slowdowns of the model's pick and of the best of its first 4 and 8."""
        ranked = self.order(problem, constants)
        slow = [self.slowdown(problem, tile) for tile, _ in ranked]
        rho = spearman([cost for _, cost in ranked], [self.times[problem][tile] for tile, _ in ranked])
        return {"spearman": rho, "pick": slow[0], "of4": min(slow[:4]), "of8": min(slow[:8])}

    def fit(self, problems: Sequence[Problem]) -> Constants:
        """The grid's constants with the best mean rank correlation over some problems; the first of equals."""
        best = max(
            itertools.product(*GRID.values()),
            key=lambda point: mean(
                self.model(problem, Constants(**dict(zip(GRID, point, strict=True))))["spearman"]
                for problem in problems
            ),
        )
        return Constants(**dict(zip(GRID, best, strict=True)))

    def winners(self, problems: Iterable[Problem]) -> list[MeasuredTile]:
        """The measured table that some problems give."""
        return [
            MeasuredTile(
                config=min(self.times[p], key=lambda tile: self.times[p][tile]),
                seqlen=p.seqlen_k,
                causal=p.causal,
                source=f"winner of {surfaces.name(p)}",
            )
            for p in problems
        ]

    def one_for(self, problems: Sequence[Problem]) -> KernelConfig:
        """The one tile with the least geometric mean slowdown over some problems."""
        tiles = set.intersection(*(set(self.times[problem]) for problem in problems))
        return min(
            sorted(tiles, key=lambda tile: tile.label),
            key=lambda tile: sum(math.log(self.slowdown(problem, tile)) for problem in problems),
        )

    def policy(
        self, problem: Problem, table: list[MeasuredTile], listed: list[MeasuredTile], constants: Constants
    ) -> Row:
        """What the policy picks with a table and a known-good list made of winners."""
        decision = policy.decide(
            problem,
            H200,
            self.facts[problem],
            measured=policy.nearest(problem, table),
            known_good=[KnownGood(config=row.config, source=row.source) for row in listed],
            constants=constants,
        )
        return {"pick": self.slowdown(problem, decision.choices[0].config)}


def spearman(a: Sequence[float], b: Sequence[float]) -> float:
    """Rank correlation; equal values share their mean rank."""
    x, y = _ranks(a), _ranks(b)
    middle = (len(a) - 1) / 2
    spread = math.sqrt(sum((i - middle) ** 2 for i in x) * sum((i - middle) ** 2 for i in y))
    return sum((i - middle) * (j - middle) for i, j in zip(x, y, strict=True)) / spread if spread else 0.0


def _ranks(values: Sequence[float]) -> list[float]:
    places: dict[float, list[int]] = {}
    for place, value in enumerate(sorted(values)):
        places.setdefault(value, []).append(place)
    return [mean(places[value]) for value in values]


def expected_best(slowdowns: Iterable[float], draws: int) -> float:
    """Geometric expectation of the best of so many tiles drawn without replacement."""
    ordered = sorted(slowdowns)
    total = math.comb(len(ordered), draws)
    return math.exp(
        sum(math.log(s) * math.comb(len(ordered) - 1 - i, draws - 1) / total for i, s in enumerate(ordered))
    )


def judge_plain(judge: Judge, fitted: Mapping[int, Constants]) -> dict[str, dict[str, Row]]:
    """Method -> problem -> figures, on the plain surfaces.

    Args:
        judge: with times and facts.
        fitted: head dim -> the constants fitted on its problems.
    """
    problems = list(judge.times)
    rows: dict[str, dict[str, Row]] = {}
    for problem in problems:
        others = [p for p in problems if p != problem]
        same = [p for p in others if p.head_dim == problem.head_dim]
        away = [p for p in problems if p.head_dim != problem.head_dim]
        slow = [judge.slowdown(problem, tile) for tile in judge.times[problem]]
        elsewhere = fitted[away[0].head_dim]
        for method, row in {
            "model, shipped constants (in sample)": judge.model(problem, costmodel.FITTED),
            "model, other head dim's constants": judge.model(problem, elsewhere),
            "policy as shipped (in sample)": judge.policy(
                problem,
                list(policy.measured_tiles(TRITON_FWD, problem, H200)),
                [
                    MeasuredTile(config=row.config, seqlen=0, causal=False, source=row.source)
                    for row in TRITON_FWD.known_good(problem.spec, H200)
                    if row.config in judge.facts[problem]
                ],
                costmodel.FITTED,
            ),
            "policy, this problem held out": judge.policy(
                problem, judge.winners(same), judge.winners(others), costmodel.FITTED
            ),
            "policy, this head dim held out": judge.policy(problem, [], judge.winners(away), elsewhere),
            "fixed tile 128x64, 8 warps, 3 stages": {"pick": judge.slowdown(problem, _tile(128, 64, 8, 3))},
            "FlexAttention's default tile": {"pick": judge.slowdown(problem, _tile(*FLEX[problem.head_dim]))},
            "winner of the other length": _of(judge, problem, same, lambda p, q: p.causal == q.causal),
            "winner of the other mask": _of(judge, problem, same, lambda p, q: p.seqlen_k == q.seqlen_k),
            "winner of the other head dim": _of(
                judge, problem, away, lambda p, q: (p.causal, p.seqlen_k) == (q.causal, q.seqlen_k)
            ),
            "best single tile of the other head dim": {"pick": judge.slowdown(problem, judge.one_for(away))},
            "random (expectation)": {
                "pick": expected_best(slow, 1),
                "of4": expected_best(slow, 4),
                "of8": expected_best(slow, 8),
            },
        }.items():
            rows.setdefault(method, {})[surfaces.name(problem)] = row
    return rows


def judge_gluon() -> dict[str, dict[str, Row]]:
    """The same on the Gluon surfaces: the model's form with instruction counts worked out from the tile, and tables."""
    times = surfaces.gluon()
    rows: dict[str, dict[str, Row]] = {}
    for problem, surface in times.items():
        best = min(surface.values())
        costs = {tile: costmodel.predict(_by_hand(tile), problem, H200, _as_plain(tile)).cost for tile in surface}
        slow = [surface[tile] / best for tile in sorted(costs, key=lambda tile: (costs[tile], tile.label))]
        near = {
            "winner of the other length": [
                p for p in times if (p.head_dim, p.causal) == (problem.head_dim, problem.causal)
            ],
            "winner of the other mask": [
                p for p in times if (p.head_dim, p.seqlen_k) == (problem.head_dim, problem.seqlen_k)
            ],
        }
        figures: dict[str, Row] = {
            "model's form, counts by hand": {
                "spearman": spearman([costs[tile] for tile in surface], list(surface.values())),
                "pick": slow[0],
                "of4": min(slow[:4]),
                "of8": min(slow[:8]),
            },
            "random (expectation)": {f: expected_best(slow, n) for f, n in (("pick", 1), ("of4", 4), ("of8", 8))},
        }
        for method, found in near.items():
            (other,) = (p for p in found if p != problem)
            figures[method] = {"pick": surface[min(times[other], key=lambda tile: times[other][tile])] / best}
        for method, row in figures.items():
            rows.setdefault(method, {})[surfaces.name(problem)] = row
    return rows


def _by_hand(tile: KernelConfig) -> CompiledFacts:
    """Counts per score element of a forward's softmax; the binaries of that kernel are not here."""
    warps = 4 * tile.NUM_WG
    scores = tile.BLOCK_M * tile.BLOCK_N // (32 * warps)
    loop = {"hgmma": 1, "mufu": scores, "fp32": 3 * scores, "alu": 2 * scores, "shuffle": 8}
    return CompiledFacts(
        arch="sm_90", triton_version="none", n_regs=168, spill_store_bytes=0, spill_load_bytes=0, stack_bytes=0, smem_bytes=200_000,
        num_warps=warps + 4, serialised=False, undefined_registers=0, loop=loop, compile_s=0.0,
    )  # fmt: skip


def _as_plain(tile: KernelConfig) -> KernelConfig:
    return TRITON_FWD.config(
        BLOCK_M=tile.BLOCK_M, BLOCK_N=tile.BLOCK_N, num_warps=4 * tile.NUM_WG, num_stages=tile.STAGES
    )


def _tile(block_m: int, block_n: int, num_warps: int, num_stages: int) -> KernelConfig:
    return TRITON_FWD.config(BLOCK_M=block_m, BLOCK_N=block_n, num_warps=num_warps, num_stages=num_stages)


def _of(judge: Judge, problem: Problem, pool: list[Problem], like: Callable[[Problem, Problem], bool]) -> Row:
    (other,) = (p for p in pool if like(p, problem))
    (row,) = judge.winners([other])
    return {"pick": judge.slowdown(problem, row.config)}


def summary(rows: Mapping[str, Mapping[str, Row]]) -> dict[str, Row]:
    """Per method: mean rank correlation, geometric mean and worst of each slowdown."""
    found: dict[str, Row] = {}
    for method, by_problem in rows.items():
        row = found[method] = {}
        for figure in ("spearman", "pick", "of4", "of8"):
            values = [figures[figure] for figures in by_problem.values() if figure in figures]
            if not values:
                continue
            if figure == "spearman":
                row["spearman"] = mean(values)
            else:
                row[f"{figure}_geo"] = math.exp(mean(map(math.log, values)))
                row[f"{figure}_worst"] = max(values)
    return found


def verdict(plain: Mapping[str, Row]) -> dict[str, bool]:
    """Whether the policy keeps its bounds, held out."""
    return {
        method: row["pick_geo"] <= BOUND_GEO and row["pick_worst"] <= BOUND_WORST
        for method, row in plain.items()
        if method.startswith("policy") and "held out" in method
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the tables; 1 where the policy leaves its bounds."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--json", action="store_true", help="one JSON document instead of tables")
    parser.add_argument("--recompile", action="store_true", help="compile the facts anew and write them to data/")
    options = parser.parse_args(arguments)
    if options.recompile:
        for line in surfaces.compile_all():
            print(line, file=sys.stderr)
    facts, remarks = surfaces.load_facts({problem.spec.key for problem in surfaces.plain()})
    judge = Judge(surfaces.plain(), facts)
    problems = list(judge.times)
    fitted = {d: judge.fit([p for p in problems if p.head_dim == d]) for d in (64, 128)}
    constants = {f"fitted on d{d}": found for d, found in fitted.items()}
    constants |= {"fitted on all": judge.fit(problems), "shipped": costmodel.FITTED}
    plain, gluon = judge_plain(judge, fitted), judge_gluon()
    kept = verdict(summary(plain))
    document = {
        "remarks": remarks,
        "model": costmodel.MODEL,
        "constants": {who: {name: getattr(c, name) for name in GRID} for who, c in constants.items()},
        "bounds": {"geometric": BOUND_GEO, "worst": BOUND_WORST, "kept": kept},
        "plain": {"summary": summary(plain), "problems": plain},
        "gluon": {"summary": summary(gluon), "problems": gluon},
    }
    if options.json:
        print(json.dumps(_rounded(document), indent=1))
    else:
        _print(document)
    return 0 if all(kept.values()) else 1


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return round(value, 4)
    if isinstance(value, Mapping):
        return {key: _rounded(item) for key, item in value.items()}
    return value


def _print(document: dict[str, Any]) -> None:
    for remark in document["remarks"]:
        print(remark)
    print(f"model {document['model']}; constants, fitted for rank correlation over a grid:")
    for who, values in document["constants"].items():
        print(f"  {who:18} " + ", ".join(f"{name} {value:g}" for name, value in values.items()))
    for kind in ("plain", "gluon"):
        found = document[kind]
        print(f"\n{kind} surfaces, slowdown = measured time of the pick / measured best; geometric mean (worst)")
        print(f"{'':38} {'Spearman':>8} {'pick':>15} {'best of 4':>15} {'best of 8':>15}")
        for method, row in found["summary"].items():
            cells = "".join(
                f" {row[f'{f}_geo']:7.3f} ({row[f'{f}_worst']:5.3f})" if f"{f}_geo" in row else " " * 16
                for f in ("pick", "of4", "of8")
            )
            rho = f"{row['spearman']:8.2f}" if "spearman" in row else " " * 8
            print(f"{method:38} {rho}{cells}")
        names = list(next(iter(found["problems"].values())))
        print(
            f"\n{'pick per problem':38} "
            + " ".join(f"{name.replace(' causal', 'c').replace(' full', 'f'):>11}" for name in names)
        )
        for method, by_problem in found["problems"].items():
            print(f"{method:38} " + " ".join(f"{by_problem[name]['pick']:11.3f}" for name in names))
            if "spearman" in by_problem[names[0]]:
                print(
                    f"{'  its rank correlation':38} "
                    + " ".join(f"{by_problem[name]['spearman']:11.2f}" for name in names)
                )
    bounds = document["bounds"]
    print(f"\nbounds {bounds['geometric']} geometric, {bounds['worst']} worst:")
    for method, kept in bounds["kept"].items():
        print(f"  {method}: {'kept' if kept else 'BROKEN'}")
    by_model, at_random = (
        document["gluon"]["summary"][m]["of8_geo"] for m in ("model's form, counts by hand", "random (expectation)")
    )
    print(
        f"The model does not rank the Gluon kernel's configurations: the best of its first 8 is {by_model:.3f}, of 8 drawn at "
        f"random {at_random:.3f}. No rule uses it there."
    )


if __name__ == "__main__":
    sys.exit(main())
