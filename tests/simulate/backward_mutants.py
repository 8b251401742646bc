"""Every automatic mutant of the rendered Hopper backward, under each schedule alone: which are caught, by what.

    python tests/simulate/backward_mutants.py [--schedules eager lazy random priority] [--jobs 2]

A mutant is caught by a defect that the simulator names, by gradients outside their budget, or by ordered sums that are not
bit for bit those of the kernel as it is. Exit code 1 when one survives a schedule that `REVIEWED` does not explain.
"""

from __future__ import annotations

import argparse
import functools
import sys
import time
from concurrent.futures import ProcessPoolExecutor

import torch
from problems import BR, row

from flashgen.config import KernelConfig
from flashgen.gradients import GradientBuffers, make_gradient_buffers
from flashgen.render import KernelSource, render
from flashgen.simulator import SCHEDULES, Mutant, Schedule, SimulationError, mutants, simulate
from flashgen.spec import AttentionSpec
from flashgen.variants import by_name

VARIANT = by_name("gluon_bwd_sm90")
SPEC = AttentionSpec(op="attention_bwd", dtype="bf16", head_dim=64, head_dim_v=64, causal=True)

# Small, and between them every statement: masked and unmasked blocks, both orders of products, one buffer and several,
# rows that do not exist, keys that do not exist, a group of heads, both batches, rows that see no key.
SUBJECTS = (
    (
        row("", "bf16", 64, 230, 200, causal=BR, heads=(4, 2), batch=2).problem,
        dict(BLOCK_M=64, BLOCK_N=64, STAGES=2, DS_STAGES=2, DQ_STAGES=2, SCORES_AHEAD=True, DV_FIRST=True, PEELED=True),
        True,
    ),
    (
        row("", "bf16", 64, 130, 150, causal=BR, heads=(2, 1)).problem,
        dict(
            BLOCK_M=64, BLOCK_N=128, STAGES=3, DS_STAGES=1, DQ_STAGES=1, SCORES_AHEAD=False, DV_FIRST=False, PEELED=True
        ),
        False,
    ),
)

# Mutants that change nothing that may be relied on, by `Mutant.key`, with the reason.
REVIEWED: dict[str, str] = {}


@functools.cache
def source() -> KernelSource:
    return render(SPEC, VARIANT)


@functools.cache
def all_mutants() -> tuple[Mutant, ...]:
    return mutants(source())


def _launch(text: str, buffers: GradientBuffers, subject: int, schedule: Schedule, seed: int) -> torch.Tensor:
    """Run one subject; dq in fp32 comes back, and is rounded into the buffers."""
    _, knobs, deterministic = SUBJECTS[subject]
    config = KernelConfig(variant=VARIANT.name, PRODUCER_REGS=24, **knobs)  # type: ignore[arg-type]
    dq = torch.full(buffers.outputs["dq"].shape, torch.nan)
    arguments = {**buffers.inputs, **buffers.outputs, **buffers.scalars, **config, "dq": dq}
    simulate(
        text,
        {**arguments, "deterministic": deterministic},
        schedule=schedule,
        seed=seed,
        max_steps=20_000,
        timeout_s=20,
    )
    buffers.outputs["dq"].copy_(dq)
    return dq


@functools.cache
def _references(subject: int) -> tuple[object, object, torch.Tensor]:
    buffers = make_gradient_buffers(SUBJECTS[subject][0], seed=subject)
    dq = _launch(source().text, buffers, subject, "eager", 0)
    return (*buffers.references(), dq)


def verdict(text: str, schedule: Schedule, seed: int = 0) -> str | None:
    """How a mutant is caught: a kind of defect, "numbers", "order", or None where it survives."""
    for subject, (problem, _, deterministic) in enumerate(SUBJECTS):
        oracle, unit, first = _references(subject)
        buffers = _Judged(make_gradient_buffers(problem, seed=subject), (oracle, unit))
        try:
            dq = _launch(text, buffers.buffers, subject, schedule, seed)
        except SimulationError as error:
            return error.kind
        if not buffers.good():
            return "numbers"
        if deterministic and not torch.equal(dq, first):
            return "order"
    return None


class _Judged:
    """Buffers with references that were computed once."""

    def __init__(self, buffers: GradientBuffers, references: tuple[object, object]) -> None:
        self.buffers, self.pair = buffers, references

    def good(self) -> bool:
        from unittest import mock

        with mock.patch.object(GradientBuffers, "references", lambda _: self.pair):
            return self.buffers.check().ok


def _job(index: int, schedules: tuple[Schedule, ...]) -> dict[str, str | None]:
    torch.set_num_threads(1)
    return {schedule: verdict(all_mutants()[index].text, schedule) for schedule in schedules}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--schedules", nargs="+", default=SCHEDULES, choices=SCHEDULES)
    parser.add_argument("--jobs", type=int, default=2)
    arguments = parser.parse_args()
    schedules, start = tuple(arguments.schedules), time.monotonic()
    with ProcessPoolExecutor(arguments.jobs) as pool:
        results = list(pool.map(functools.partial(_job, schedules=schedules), range(len(all_mutants())), chunksize=4))
    unexplained = 0
    for mutant, found in zip(all_mutants(), results, strict=True):
        missed = [schedule for schedule, how in found.items() if how is None]
        if missed:
            reason = REVIEWED.get(mutant.key)
            unexplained += reason is None
            print(
                f"{'reviewed' if reason else 'SURVIVES'} {', '.join(missed)}: {mutant}"
                + (f"\n    {reason}" if reason else "")
            )
    for schedule in schedules:
        caught = sum(found[schedule] is not None for found in results)
        print(f"{schedule}: {caught} of {len(results)} caught ({100 * caught / len(results):.1f} %)")
    print(f"{time.monotonic() - start:.0f} s")
    return 1 if unexplained else 0


if __name__ == "__main__":
    sys.exit(main())
