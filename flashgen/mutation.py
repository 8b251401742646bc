"""Would anybody notice? Broken copies of a Gluon kernel against problems that between them run every line of it.

A mutant is found when the simulator reports a defect, when a result leaves the error budget, or when a launch does other
work than the original's: key blocks that nobody sees cost time and change no result, and sums in another order, or in one
that the schedule chooses, change only bits.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, replace
from functools import lru_cache
from types import FrameType
from typing import Any

from flashgen import accuracy
from flashgen.config import KernelConfig, Tunable
from flashgen.errors import AccuracyError
from flashgen.problem import Problem
from flashgen.render import render
from flashgen.simulator import Mutant, Schedule, SimulationError, SimulationReport, mutants, simulate
from flashgen.spec import AttentionSpec
from flashgen.target import Target
from flashgen.variants import Variant

Work = list[tuple[int, int, int, str]]
_MAX_STEPS = 100_000
_SMEM_BYTES = 1 << 20  # more than a card has: the cases' tiles are chosen for what they run, not for what fits

# A launch leaves its ticket counter at 0 for the next one: here two launches share one, and it is looked at.
_TWICE = """

def launch_twice(**args):
    launch(**args)
    launch(**args)
"""
_ONE_COUNTER = """
    ticket_counter(None)


_counter = torch.zeros(1, dtype=torch.int32)


def ticket_counter(device):
    if _counter.item():
        raise RuntimeError(f"the ticket counter was left at {_counter.item()}")
    return _counter
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One problem of a study.

    Attributes:
        problem: sizes and options.
        config: the knobs it runs with.
        values: of the inputs, as in `accuracy.make_buffers`.
    """

    problem: Problem
    config: KernelConfig
    values: accuracy.Values = "normal"

    @property
    def size(self) -> int:
        """Scores, masked ones included: what a run costs."""
        p = self.problem
        return p.batch * p.num_heads_q * p.seqlen_q * p.seqlen_k


# What to run, and with which knobs where the variant has them; three CTAs share the tiles.
_CASES: tuple[tuple[dict[str, Any], dict[str, Tunable], accuracy.Values], ...] = (
    # Many tiles, ragged rows and keys, grouped heads, sections that do not divide the heads.
    ({"seqlen_q": 200, "seqlen_k": 333, "num_heads_q": 6, "num_heads_kv": 3, "batch": 2}, {"SECTION": 4}, "normal"),
    # The output leaves through q's memory; sums at once; whole blocks.
    (
        {"seqlen_q": 200, "seqlen_k": 224, "num_heads_q": 3},
        {"BLOCK_N": 32, "OWN_STAGING": False, "LAZY_SUM": False},
        "normal",
    ),
    # Three warpgroups, the last of them without a query, and a stage more.
    (
        {"seqlen_q": 128, "seqlen_k": 256, "num_heads_q": 4, "num_heads_kv": 2},
        {"BLOCK_M": 192, "STAGES": 3, "CONSUMER_REGS": 160, "PRODUCER_REGS": 32, "TAKE_TURNS": True},
        "normal",
    ),
    # Fewer key blocks than stages: nothing but their own barriers orders tickets and queries.
    ({"seqlen_q": 300, "seqlen_k": 40, "num_heads_q": 5}, {"STAGES": 3}, "normal"),
    # Heads of a group packed into a tile.
    ({"seqlen_q": 5, "seqlen_k": 193, "num_heads_q": 8, "num_heads_kv": 2}, {}, "normal"),
    # Logits that overflow an exponential without the running maximum.
    ({"seqlen_q": 64, "seqlen_k": 193}, {}, "large"),
    # Rows of many blocks, in both ways of summing them.
    ({"seqlen_q": 64, "seqlen_k": 460}, {"BLOCK_N": 32}, "normal"),
    ({"seqlen_q": 64, "seqlen_k": 460}, {"BLOCK_N": 32, "LAZY_SUM": False}, "normal"),
)
_CAUSAL_CASES: tuple[tuple[dict[str, Any], dict[str, Tunable], accuracy.Values], ...] = (
    # The last key is the first of its block.
    ({"seqlen_q": 193, "seqlen_k": 193}, {"BLOCK_N": 32, "LAZY_SUM": False}, "normal"),
    # Rows that see no key; warpgroups that see none.
    ({"seqlen_q": 300, "seqlen_k": 90}, {"BLOCK_N": 32}, "normal"),
    # More blocks above the diagonal of the first warpgroup than stages: it releases them unread.
    (
        {"seqlen_q": 384, "seqlen_k": 384, "num_heads_q": 2},
        {"BLOCK_M": 192, "BLOCK_N": 32, "CONSUMER_REGS": 160, "PRODUCER_REGS": 32, "TAKE_TURNS": True},
        "normal",
    ),
    # Top-left: keys that no row sees, and rows beyond the last key.
    ({"seqlen_q": 90, "seqlen_k": 300, "causal_alignment": "top-left"}, {"BLOCK_N": 32}, "normal"),
    ({"seqlen_q": 300, "seqlen_k": 90, "causal_alignment": "top-left"}, {}, "normal"),
    ({"seqlen_q": 300, "seqlen_k": 90}, {"BLOCK_N": 32, "LAZY_SUM": False}, "normal"),
)
_SMALL: dict[str, Tunable] = {
    "BLOCK_M": 128, "BLOCK_N": 64, "STAGES": 2, "CONSUMER_REGS": 240, "PRODUCER_REGS": 24, "SECTION": 2,
    "OWN_STAGING": True, "LAZY_SUM": True, "TAKE_TURNS": False,
}  # fmt: skip


def cases(spec: AttentionSpec, variant: Variant, target: Target) -> tuple[Case, ...]:
    """The problems of a study, each with the knobs that suit it, of those that the variant has."""
    base = Problem(
        dtype=spec.dtype, batch=1, seqlen_q=1, seqlen_k=1, num_heads_q=1, num_heads_kv=1, head_dim=spec.head_dim,
        head_dim_v=spec.head_dim_v, causal=spec.causal, return_lse=spec.has_lse,
    )  # fmt: skip
    default, found = dict(variant.default(spec, target)), []
    for sizes, knobs, values in (*_CASES, *(_CAUSAL_CASES if spec.causal else ())):
        wanted = {name: value for name, value in {**_SMALL, **knobs}.items() if name in default}
        # Registers and memory of a card do not bind a simulation; a knob that the spec has no form for does.
        if spec.head_dim != spec.head_dim_v and not wanted.get("OWN_STAGING", True):
            wanted["OWN_STAGING"] = True
        found.append(
            Case(problem=replace(base, **sizes), config=variant.config(**{**default, **wanted}), values=values)
        )
    return tuple(found)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Original:
    """What the original does in one case: the lines of its text that run, and its work."""

    lines: set[int]
    work: Work


@lru_cache(maxsize=16)
def _known(text: str, variant: str, target: str) -> dict[int, _Original]:
    """What is known of a text, by case, for all studies of it in this process."""
    return {}


class Study:
    """Judges copies of one rendered kernel.

    Args:
        spec: what the kernel computes.
        variant: which recipe renders it; a Gluon one.
        target: for which the configs are legal.

    Attributes:
        text: the original.
        mutants: its broken copies.
    """

    def __init__(self, spec: AttentionSpec, variant: Variant, target: Target) -> None:
        self.spec = spec
        self.text = render(spec, variant).text
        self.mutants: tuple[Mutant, ...] = mutants(self.text)
        self._cases = self._choose(variant, target)
        self._references: dict[int, tuple[accuracy.Pair, accuracy.Pair]] = {}
        self._known = _known(self.text, variant.name, target.name)

    def _choose(self, variant: Variant, target: Target) -> tuple[Case, ...]:
        """The problems to run."""
        return cases(self.spec, variant, target)

    def verdict(self, text: str, *, schedule: Schedule = "random", seed: int = 1) -> str | None:
        """How a copy is found: a kind of defect, "numbers", "work", or None where it survives every case.

        Raises:
            AccuracyError: the original itself fails.
        """
        for number in self._order(text):
            try:
                right, work = self._run(text, number, schedule, seed)
            except SimulationError as error:
                return error.kind
            if not right:
                return "numbers"
            if work != self._work(number):
                return "work"
        return None

    def reaches(self, mutant: Mutant) -> bool:
        """Whether any case runs the mutant's line: an arm that is compiled out for this spec breaks nothing."""
        return any(mutant.line in self._original(number).lines for number in range(len(self._cases)))

    def _order(self, text: str) -> list[int]:
        """All cases: those that run a line which differs from the original's first, and of these the smallest.

        Nearly every broken copy is found by a case that runs the break, and the rest need not run then.
        """
        numbers = list(range(len(self._cases)))
        old, new = self.text.splitlines(), text.splitlines()
        if len(old) != len(new) or old == new:
            return numbers
        broken = {line for line, pair in enumerate(zip(old, new, strict=True), 1) if pair[0] != pair[1]}
        return sorted(numbers, key=lambda number: (not broken & self._original(number).lines, self._cases[number].size))

    def _work(self, number: int) -> Work:
        """The work of the original, the same under every schedule."""
        return self._original(number).work

    def _original(self, number: int) -> _Original:
        """What the original does in a case: found by one run, for all that ask."""
        if number not in self._known:
            lines: set[int] = set()

            def trace(frame: FrameType, event: str, argument: Any) -> Any:
                if not frame.f_code.co_filename.startswith("<flashgen simulation"):
                    return None
                if event == "line":
                    lines.add(frame.f_lineno)
                return trace

            before = threading.gettrace()
            threading.settrace(trace)
            try:
                right, work = self._run(self.text, number, "eager", 0)
            finally:
                threading.settrace(before)  # type: ignore[arg-type]
            if not right:
                raise AccuracyError(
                    f"{self.spec.key} itself is outside the error budget: {self._cases[number].problem}"
                )
            self._known[number] = _Original(lines=lines, work=work)
        return self._known[number]

    def _run(self, text: str, number: int, schedule: Schedule, seed: int) -> tuple[bool, Work]:
        """Whether a copy's result is right, and the work it did."""
        case = self._cases[number]
        buffers = accuracy.make_buffers(case.problem, seed=number, values=case.values)
        args = {name: getattr(buffers, name) for name in ("q", "k", "v", "o", "lse")}
        counter = _ONE_COUNTER if "\ndef ticket_counter(" in text else ""
        report = simulate(
            text + _TWICE + counter, {**args, **buffers.scalars, **dict(case.config)}, entry="launch_twice",
            schedule=schedule, seed=seed, max_steps=_MAX_STEPS, smem_bytes=_SMEM_BYTES,
        )  # fmt: skip
        if number not in self._references:
            self._references[number] = buffers.references()
        result = accuracy.check(buffers.o, buffers.lse, *self._references[number], case.problem.dtype)
        return result.ok and not buffers.trespasses(), work_of(report)


def work_of(report: SimulationReport) -> Work:
    """Products and bytes of each launch, and the order of sums that must have one: what no schedule changes."""
    return [(one.products, one.tma_load_bytes, one.tma_store_bytes, one.sum_order) for one in report.launches]
