"""Portfolios from trials: the smallest set of configurations that is nearly best on every problem that was seen.

A measured problem is covered by every configuration within 5 % of its best measured time. A predicted problem has no times: only the
configuration that the policy chose covers it, and what covers predicted problems alone is labelled predicted. Finding the
smallest set is set cover: solved exactly where that is cheap (few configurations ever win, so it nearly always is), greedily
(Chvatal, *A greedy heuristic for the set-covering problem*, 1979) beyond.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from statistics import median

from flashgen.config import KernelConfig
from flashgen.coverage import options_of
from flashgen.spec import AttentionSpec
from flashgen.store import Record
from flashgen.store.portfolios import MOST, Member, find
from flashgen.store.select import best_predicted, usable_measurement, usable_prediction
from flashgen.target import Target
from flashgen.variants import Variant

BOUND = 1.05
_EXACT = 200_000  # sets that the exact search looks at, at most

_Key = tuple[str, str, str, str, int, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """One problem that was seen on one GPU.

    Attributes:
        gpu: where.
        slowdowns: configuration -> its time over the best one; predicted: the chosen one at 1.0, which says nothing of time.
        measured: whether these are times.
        sessions: of the trials.
    """

    gpu: str
    slowdowns: Mapping[KernelConfig, float]
    measured: bool
    sessions: frozenset[str]

    def covered_by(self, config: KernelConfig) -> bool:
        """Whether a configuration is good enough here."""
        return self.slowdowns.get(config, math.inf) <= BOUND


def derive(records: Iterable[Record], *, most: int = MOST) -> list[Member]:
    """The portfolios that trials give, for every architecture, kernel, dtype and padded head dim among them.

    Args:
        records: of any GPU, kernel and age, those of calls with options left out: what was good with an older text of a template is still worth a try.
        most: members of one portfolio at most; where no so small set covers all problems, the one that covers most.

    Returns:
        Whole portfolios, best member first: measured ones before predicted ones, then by the problems each is taken for.
    """
    groups: dict[_Key, list[Record]] = {}
    for row in records:
        if (usable_measurement(row) or usable_prediction(row)) and _is_plain(row):
            groups.setdefault(_key(row), []).append(row)
    return [member for key, rows in sorted(groups.items()) for member in _portfolio(key, problems_seen(rows), most)]


def folder_beside(seeds_folder: str | Path) -> Path:
    """Where portfolios go with a folder of seeds: beside a folder that is called `seeds`, else inside."""
    folder = Path(seeds_folder)
    return (folder.parent if folder.name == "seeds" else folder) / "portfolios"


def configs(variant: Variant, spec: AttentionSpec, target: Target) -> list[KernelConfig]:
    """The shipped portfolio of a kernel on a target: what is legal of it, best first."""
    rows = find(
        arch=target.arch,
        op=spec.op,
        variant=variant.name,
        dtype=spec.dtype,
        head_dim=spec.block_head_dim,
        head_dim_v=spec.block_head_dim_v,
    )
    found = [KernelConfig(variant=variant.name, **row.config) for row in rows]
    names = {knob.name for knob in variant.knobs}
    return [config for config in found if set(config) == names and variant.illegal(spec, target, config) is None]


def problems_seen(rows: Iterable[Record]) -> list[Seen]:
    """The problems of one portfolio's rows: measured where anything was timed, else predicted."""
    problems: dict[tuple[str, str, tuple[tuple[str, int], ...]], list[Record]] = {}
    for row in rows:
        problems.setdefault((row.gpu, row.spec_key, tuple(sorted(row.shape.items()))), []).append(row)
    return [one for key, found in sorted(problems.items()) if (one := _seen(key[0], found)) is not None]


def _seen(gpu: str, rows: list[Record]) -> Seen | None:
    timed = [row for row in rows if usable_measurement(row)]
    if timed:
        slowdowns = _slowdowns(timed)
    else:
        chosen = best_predicted(rows, rows[0].shape)
        if chosen is None:
            return None
        timed = [chosen]
        slowdowns = {_config(chosen): 1.0}
    return Seen(
        gpu=gpu,
        slowdowns=slowdowns,
        measured=timed[0].status == "ok",
        sessions=frozenset(row.session for row in timed),
    )


def _slowdowns(rows: Sequence[Record]) -> dict[KernelConfig, float]:
    """Time over the best one, by configuration.

    Ratios are formed within one run and protocol, since a card drifts between them. What was timed side by side counts so alone: a
    lucky reading of the search must not beat the finalists.
    """
    # A run whose final rounds were too noisy counts only where no better one is; the search's readings are rough anyway.
    if any(row.quality == "high" and _side_by_side(row.protocol) for row in rows):
        rows = [row for row in rows if row.quality == "high" or not _side_by_side(row.protocol)]
    runs: dict[tuple[str, str], dict[KernelConfig, float]] = {}
    for row in rows:
        run = runs.setdefault((row.session, row.protocol), {})
        run[_config(row)] = min(row.latency_ms or math.inf, run.get(_config(row), math.inf))
    ratios: dict[bool, dict[KernelConfig, list[float]]] = {True: {}, False: {}}
    for (_, protocol), run in runs.items():
        for config, time in run.items():
            ratios[_side_by_side(protocol)].setdefault(config, []).append(time / min(run.values()))
    return {config: median(found) for config, found in {**ratios[False], **ratios[True]}.items()}


def _side_by_side(protocol: str) -> bool:
    return protocol.startswith("shootout") or "interleaved" in protocol


def _config(row: Record) -> KernelConfig:
    return KernelConfig(variant=row.variant, **row.config)


def _is_plain(row: Record) -> bool:
    """Whether a row is of plain attention: what a mask leaves out, or a bias costs, is no lesson for every call of that size."""
    return not options_of(AttentionSpec.from_key(row.spec_key))


def _key(row: Record) -> _Key:
    spec = AttentionSpec.from_key(row.spec_key)
    return (row.arch, row.op, row.variant, spec.dtype, spec.block_head_dim, spec.block_head_dim_v)


def _portfolio(key: _Key, problems: Sequence[Seen], most: int) -> list[Member]:
    chosen = smallest_cover(problems, most=most)
    taken: dict[KernelConfig, list[Seen]] = {config: [] for config in chosen}
    for one in problems:
        within = [config for config in chosen if one.covered_by(config)]
        if within:
            taken[min(within, key=lambda config: (one.slowdowns[config], config.label))].append(one)
    # On measured problems a set may be smallest with a member that is nowhere the best of it: it is taken for none, and left out.
    used = {config: rows for config, rows in taken.items() if rows}

    def order(config: KernelConfig) -> tuple[bool, int, float, str]:
        rows = used[config]
        measured = [one.slowdowns[config] for one in rows if one.measured]
        return (not measured, -len(rows), sum(measured), config.label)

    arch, op, variant, dtype, head_dim, head_dim_v = key
    members = []
    for place, config in enumerate(sorted(used, key=order), start=1):
        rows = used[config]
        timed = [one for one in rows if one.measured]
        members.append(
            Member(
                arch=arch, op=op, variant=variant, dtype=dtype, head_dim=head_dim, head_dim_v=head_dim_v, place=place,
                config=config.to_dict(), basis="measured" if timed else "predicted",
                problems=len(rows), measured=len(timed), of=len(problems),
                slowdown=round(max(one.slowdowns[config] for one in timed), 4) if timed else None,
                gpus=tuple(sorted({one.gpu for one in timed or rows})),
                sessions=tuple(sorted({name for one in timed or rows for name in one.sessions})),
            )
        )  # fmt: skip
    return members


def smallest_cover(problems: Sequence[Seen], *, most: int = MOST) -> list[KernelConfig]:
    """The smallest set of configurations within the bound on every problem; among equally small ones the least slowdown.

    Args:
        problems: what is to be covered.
        most: how many at most; where no so small set covers all, the greedy one that covers most.
    """
    covers = _undominated(problems)
    greedy = _greedy(problems, covers, most)
    reached = _union(covers, greedy)
    looked = 0
    for size in range(1, len(greedy) + 1):
        looked += math.comb(len(covers), size)
        if looked > _EXACT:
            return greedy
        full = [group for group in combinations(covers, size) if reached <= _union(covers, group)]
        if full:
            return list(min(full, key=lambda group: (_loss(problems, group), [config.label for config in group])))
    return greedy


def _undominated(problems: Sequence[Seen]) -> dict[KernelConfig, frozenset[int]]:
    """Configuration -> problems it covers, without those that cover a part of what another does (or the same, slower)."""
    everyone = sorted({config for one in problems for config in one.slowdowns}, key=lambda config: config.label)
    covers = {config: frozenset(i for i, one in enumerate(problems) if one.covered_by(config)) for config in everyone}
    best: dict[frozenset[int], KernelConfig] = {}
    for config in sorted(everyone, key=lambda config: (_loss(problems, [config]), config.label)):
        best.setdefault(covers[config], config)
    return {config: reach for reach, config in best.items() if not any(reach < other for other in best)}


def _union(covers: Mapping[KernelConfig, frozenset[int]], group: Iterable[KernelConfig]) -> frozenset[int]:
    return frozenset().union(*(covers[config] for config in group))


def _greedy(problems: Sequence[Seen], covers: Mapping[KernelConfig, frozenset[int]], most: int) -> list[KernelConfig]:
    chosen: list[KernelConfig] = []
    left = set(range(len(problems)))
    while left and len(chosen) < most:
        best = min(covers, key=lambda config: (-len(covers[config] & left), _loss(problems, [config]), config.label))
        if not covers[best] & left:
            break
        chosen.append(best)
        left -= covers[best]
    return chosen


def _loss(problems: Sequence[Seen], group: Iterable[KernelConfig]) -> float:
    """Log slowdown of the best of a group, added up over the problems; what was never tried counts as e times slower."""
    return round(sum(min(math.log(one.slowdowns.get(config, math.e)) for config in group) for one in problems), 9)
