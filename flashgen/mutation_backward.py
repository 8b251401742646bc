"""Broken copies of a Gluon backward: the problems that run every line of it, and how its gradients are judged."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from flashgen import accuracy
from flashgen.config import KernelConfig, Tunable
from flashgen.gradients import GradientBuffers, make_gradient_buffers
from flashgen.mutation import Case, Study, Work, work_of
from flashgen.problem import Problem
from flashgen.reference import Result
from flashgen.render import render
from flashgen.simulator import Schedule, simulate
from flashgen.target import Target
from flashgen.variants import Variant, by_name

_FORWARD = "gluon_fwd_sm90"
_NARROW = 128  # head dim up to which tiles may be chosen
_MAX_STEPS = 30_000  # sixteen thread blocks whose writers ask for their turns take up to 25,000 where one partition goes before all others
_SMEM_BYTES = 1 << 20  # more than a card has: the cases' tiles are chosen for what they run, not for what fits


@dataclass(frozen=True, slots=True, kw_only=True)
class BackwardCase(Case):
    """One problem of a backward's study.

    Attributes:
        deterministic: whether sums of dq are ordered, and must be.
        dlse: whether lse has a gradient.
        processors: of the simulated device: how many heads make a section follows from them.
    """

    deterministic: bool
    dlse: bool
    processors: int = 3


_SMALL: dict[str, Tunable] = {
    "BLOCK_M": 64, "BLOCK_N": 64, "STAGES": 2, "DS_STAGES": 2, "DQ_STAGES": 2, "PRODUCER_REGS": 24, "SCORES_AHEAD": True,
    "DV_FIRST": True, "PEELED": True,
}  # fmt: skip
_OTHER_ARMS: dict[str, Tunable] = {
    "BLOCK_N": 128, "STAGES": 3, "DS_STAGES": 1, "DQ_STAGES": 1, "SCORES_AHEAD": False, "DV_FIRST": False,
}  # fmt: skip

# No knobs of their own, but a device of five processors: two heads of two blocks run at a time.
_SECTIONS: dict[str, Tunable] = {}
_FIVE = 5

# Sizes, knobs, values of the inputs, whether sums are ordered, whether lse has a gradient.
_CASES: tuple[tuple[dict[str, Any], dict[str, Tunable], accuracy.Values, bool, bool], ...] = (
    # Ragged rows and keys, grouped heads, both batches, rows that see no key where it is causal.
    ({"seqlen_q": 230, "seqlen_k": 200, "num_heads_q": 4, "num_heads_kv": 2, "batch": 2}, {}, "normal", True, True),
    # The other arm of most knobs, two blocks of rows on a diagonal; sums as they come.
    ({"seqlen_q": 130, "seqlen_k": 150, "num_heads_q": 2}, _OTHER_ARMS, "normal", False, False),
    # The last block of rows reaches beyond the last key; three blocks of keys wait for their turn.
    ({"seqlen_q": 100, "seqlen_k": 128}, {"BLOCK_M": 128, "PEELED": False}, "normal", True, False),
    # A key that does not exist has an exponential that overflows; two warpgroups, of which one may run ahead.
    ({"seqlen_q": 200, "seqlen_k": 90}, {"BLOCK_N": 128}, "low", False, True),
    # Sections of two heads, and one head that is left.
    ({"seqlen_q": 64, "seqlen_k": 128, "num_heads_q": 3}, _SECTIONS, "normal", False, False),
    ({"seqlen_q": 64, "seqlen_k": 128, "num_heads_q": 3}, _SECTIONS, "normal", True, False),
)
_CAUSAL_CASES: tuple[tuple[dict[str, Any], dict[str, Tunable], accuracy.Values, bool, bool], ...] = (
    # Rows beyond the last key see all keys, and none that does not exist.
    ({"seqlen_q": 300, "seqlen_k": 90, "causal_alignment": "top-left"}, {}, "low", True, True),
)


class BackwardStudy(Study):
    """Judges copies of one rendered backward; see `Study`."""

    _cases: tuple[BackwardCase, ...]

    def _choose(self, variant: Variant, target: Target) -> tuple[BackwardCase, ...]:
        spec, found = self.spec, []
        self._gradients: dict[int, tuple[Result, tuple[Result, ...]]] = {}
        self._forwards: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self._target = target
        base = Problem(
            dtype=spec.dtype, batch=1, seqlen_q=1, seqlen_k=1, num_heads_q=1, num_heads_kv=1, head_dim=spec.head_dim,
            head_dim_v=spec.head_dim_v, causal=spec.causal, return_lse=True,
        )  # fmt: skip
        for sizes, knobs, values, deterministic, dlse in (*_CASES, *(_CAUSAL_CASES if spec.causal else ())):
            heads = {"num_heads_kv": sizes.get("num_heads_q", 1), **sizes}
            # The tile is the only one of wide head dims; registers and memory of a card do not bind a simulation.
            only: dict[str, Tunable] = {}
            if max(spec.head_dim, spec.head_dim_v) > _NARROW:
                only = {"BLOCK_M": 64, "BLOCK_N": 64, "DQ_STAGES": 3 if knobs.get("DQ_STAGES") == 1 else 2}
            config = KernelConfig(
                variant=variant.name, **{**variant.default(spec, target).to_dict(), **_SMALL, **knobs, **only}
            )
            found.append(
                BackwardCase(
                    problem=replace(base, **heads),
                    config=config,
                    values=values,
                    deterministic=deterministic,
                    dlse=dlse,
                    processors=_FIVE if knobs is _SECTIONS else 3,
                )
            )
        return tuple(found)

    def _run(self, text: str, number: int, schedule: Schedule, seed: int) -> tuple[bool, Work]:
        case = self._cases[number]
        buffers = make_gradient_buffers(case.problem, seed=number, values=case.values, dlse=case.dlse)
        if case.values != "normal":
            buffers.take(*self._forward(number, buffers))
        args = {**buffers.inputs, **buffers.outputs, **buffers.scalars, **dict(case.config)}
        report = simulate(
            text, {**args, "deterministic": case.deterministic}, schedule=schedule, seed=seed, max_steps=_MAX_STEPS,
            smem_bytes=_SMEM_BYTES, ordered_sums=case.deterministic, processors=case.processors,
        )  # fmt: skip
        return self._right(number, buffers), work_of(report)

    def _forward(self, number: int, buffers: GradientBuffers) -> tuple[torch.Tensor, torch.Tensor]:
        """Out and lse of the Hopper forward: with large logits only a pair that rounds alike is exact."""
        if number not in self._forwards:
            spec, forward = buffers.problem.spec, by_name(_FORWARD)
            q, k, v, out, lse = (buffers.inputs[name] for name in ("q", "k", "v", "out", "lse"))
            if out is None or lse is None:
                raise TypeError("a backward takes the forward's out and lse")
            found = torch.empty(out.shape, dtype=out.dtype), torch.empty_like(lse)
            args = {"q": q, "k": k, "v": v, "o": found[0], "lse": found[1], **buffers.scalars}
            simulate(render(spec, forward), {**args, **forward.default(spec, self._target)})
            self._forwards[number] = found
        return self._forwards[number]

    def _right(self, number: int, buffers: GradientBuffers) -> bool:
        if number not in self._gradients:
            self._gradients[number] = buffers.references()
        return buffers.check(self._gradients[number]).ok
