"""Which configuration is chosen where nothing can be measured, and why. Used by predicted tuning, never during a call.

1. The *measured table*: winners measured on the same family of architecture with the same dtype width and padded head dim, the nearest
   mask and length first. A winner of the neighbouring length is nearly as good as the problem's own; one of another head dim is not.
2. Without such an entry, the *known-good* tiles of the architecture: in the model's order where that was judged, else as listed.
3. Where none of those fits, the *model's* first tile among those with 16 query rows a warp.

The model vetoes throughout (`costmodel.veto`), except a tile that was measured on this very kernel. `benchmarks/model_quality.py` judges
these rules with the data of the judged problem held out.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from flashgen import costmodel
from flashgen.config import KernelConfig
from flashgen.costmodel import Constants
from flashgen.facts import CompiledFacts
from flashgen.problem import Problem
from flashgen.spec import AttentionSpec
from flashgen.store import seeds
from flashgen.target import TARGETS, Target
from flashgen.variants import KnownGood, MeasuredTile, Variant, by_name
from flashgen.variants.triton_fwd_tiles import family

_ROWS_PER_WARP = 16
_UNRANKED = 2  # configurations of a variant that is not modelled: the choice, and one in reserve
# (family of architecture, bytes of an element) where the model's order was judged on measurements; elsewhere a list's own order stands.
_JUDGED = {("sm_90", 2)}


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """A configuration the policy would take, and the rule in words."""

    config: KernelConfig
    rule: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """What the policy says of one problem.

    Attributes:
        choices: best first; empty where nothing known fits.
        vetoed: label of a considered configuration -> why the model refuses it.
    """

    choices: tuple[Choice, ...]
    vetoed: dict[str, str]


def measured_tiles(variant: Variant, problem: Problem, target: Target) -> tuple[MeasuredTile, ...]:
    """The measured table of a problem: shipped rows of this kernel, and what the variant knows of others, nearest first."""
    spec = problem.spec
    same = (family(target), _head_dim(spec), spec.itemsize)
    own = []
    for gpu in seeds.gpus():
        other = TARGETS.get(gpu)
        for row in seeds.load(gpu, spec.op) if other is not None else ():
            if row.status != "ok" or row.variant != variant.name:
                continue
            there = AttentionSpec.from_key(row.spec_key)
            if other is None or (family(other), _head_dim(there), there.itemsize) != same:
                continue
            own.append(
                MeasuredTile(
                    config=KernelConfig(variant=variant.name, **row.config),
                    seqlen=row.shape["seqlen_k"],
                    causal=there.causal,
                    source=f"winner of this kernel on {gpu} (tuning_db/seeds)",
                    own=True,
                )
            )
    return nearest(problem, (*own, *variant.measured_tiles(spec, target)))


def nearest(problem: Problem, rows: Sequence[MeasuredTile]) -> tuple[MeasuredTile, ...]:
    """Rows by likeness: the same mask, then the nearest length in doublings, then this very kernel, then the longer."""

    def order(row: MeasuredTile) -> tuple[bool, float, bool, int]:
        apart = abs(math.log2(max(1, row.seqlen) / max(1, problem.seqlen_k)))
        return (row.causal != problem.causal, round(apart, 9), not row.own, -row.seqlen)

    return tuple(sorted(rows, key=order))


def considered(
    variant: Variant,
    spec: AttentionSpec,
    target: Target,
    measured: Sequence[MeasuredTile],
    known_good: Sequence[KnownGood],
) -> list[KernelConfig]:
    """What must be compiled to decide: measured and known-good tiles, and for those of two stages the same with three.

    Of a variant whose configurations the model cannot order, only the first few: nothing would move a later one up.
    """
    tiles = list(dict.fromkeys([*(row.config for row in measured), *(row.config for row in known_good)]))
    if not variant.modelled:
        tiles = [tile for tile in tiles if variant.illegal(spec, target, tile) is None][:_UNRANKED]
    deeper = [deepened for tile in tiles if (deepened := deeper_of(tile)) is not None]
    return [config for config in dict.fromkeys([*tiles, *deeper]) if variant.illegal(spec, target, config) is None]


def searched(
    variant: Variant, legal: Sequence[KernelConfig], considered: Sequence[KernelConfig], mode: str
) -> list[KernelConfig]:
    """What a run compiles at most: of a kernel that the model cannot rank nothing but what is considered would be chosen unmeasured."""
    if mode == "predicted" and not variant.modelled:
        return list(considered)
    return list(dict.fromkeys([*legal, *considered]))


def shortlist(configs: Sequence[KernelConfig]) -> list[KernelConfig]:
    """Where no known tile fits: those with 16 query rows a warp, one row of the tensor core's tile for each."""
    return [
        config
        for config in configs
        if "num_stages" in config
        and config.num_stages <= 3
        and config.get("BLOCK_M", 0) == _ROWS_PER_WARP * config.num_warps
    ]


def deeper_of(config: KernelConfig) -> KernelConfig | None:
    """The same tile with three stages, where it has two; of a kernel for which that was measured to be better."""
    if config.get("num_stages") != 2 or not by_name(config.variant).modelled:
        return None
    return KernelConfig(variant=config.variant, **{**config.to_dict(), "num_stages": 3})


def decide(
    problem: Problem,
    target: Target,
    facts: Mapping[KernelConfig, CompiledFacts],
    *,
    measured: Sequence[MeasuredTile],
    known_good: Sequence[KnownGood],
    constants: Constants = costmodel.FITTED,
) -> Decision:
    """Order what was compiled by the rules.

    Args:
        problem: with its sizes.
        target: for which `facts` were compiled.
        facts: of the configurations that fit; others are never chosen.
        measured: the measured table, nearest first.
        known_good: tiles with a source.
        constants: of the model.
    """
    spec, vetoed, choices = problem.spec, dict[str, str](), dict[KernelConfig, Choice]()

    def survives(config: KernelConfig) -> bool:
        deeper = deeper_of(config)
        reason = costmodel.veto(config, facts[config], spec, target, None if deeper is None else facts.get(deeper))
        if reason is not None:
            vetoed[config.label] = reason
        return reason is None

    for row in measured:
        if row.config in facts and row.config not in choices and (row.own or survives(row.config)):
            mask = "causal" if row.causal else "full"
            choices[row.config] = Choice(
                config=row.config, rule=f"measured table: {row.source}, S {row.seqlen}, {mask}"
            )
    sources = {row.config: row.source for row in known_good}
    rest = [config for config in sources if config in facts and config not in choices and survives(config)]
    for config in tuple(sources):
        deeper = deeper_of(config)
        # A tile that is refused for its two stages is known good but for them.
        if config.label not in vetoed or deeper is None or deeper not in facts or deeper in (*choices, *rest):
            continue
        if survives(deeper):
            rest.append(deeper)
            sources = {**sources, deeper: f"{sources[config]}, with three stages instead of two"}
    modelled = all(by_name(config.variant).modelled for config in rest)
    judged = modelled and (family(target), spec.itemsize) in _JUDGED
    ordered = _ranked(problem, target, facts, rest, constants) if judged else rest
    for place, config in enumerate(ordered, start=1):
        order = "by the model" if judged else "as listed"
        words = f", number {place} of {len(rest)} {order}" if len(rest) > 1 else ""
        choices[config] = Choice(config=config, rule=f"known good{words}: {sources[config]}")
    if not choices:
        rest = [config for config in shortlist(list(facts)) if survives(config)]
        for config in _ranked(problem, target, facts, rest, constants):
            choices[config] = Choice(
                config=config,
                rule=f"model: no measured or known-good tile fits; first of {len(rest)} tiles with "
                f"{_ROWS_PER_WARP} rows a warp",
            )
    return Decision(choices=tuple(choices.values()), vetoed=vetoed)


def _ranked(
    problem: Problem,
    target: Target,
    facts: Mapping[KernelConfig, CompiledFacts],
    configs: Sequence[KernelConfig],
    constants: Constants,
) -> list[KernelConfig]:
    if len(configs) < 2:
        return list(configs)
    return [
        config
        for config, _ in costmodel.rank(
            [
                (config, costmodel.predict(facts[config], problem, target, config, constants=constants))
                for config in configs
            ]
        )
    ]


def _head_dim(spec: AttentionSpec) -> int:
    return max(spec.block_head_dim, spec.block_head_dim_v)
