"""Kernels with options as subjects of a mutation study: which cases judge them, which of their mutants count, what was reviewed."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from free_backward import Free
from free_cases import BIASES, CASES, GROUPS, LEARNED
from option_reviewed import REVIEWED
from option_runs import Direct, Public, Run

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "mutation"))

import gluon_option_mutants
import option_mutants

from flashgen.render import render
from flashgen.simulator import SCHEDULES, Mutant, Schedule, mutants
from flashgen.spec import AttentionSpec
from flashgen.variants import by_name

KERNELS = ("gluon_fwd_sm90", "gluon_bwd_sm90", "triton_fwd", "triton_bwd")
SEED = 1


@dataclass(frozen=True)
class Subject:
    """One option of one kernel: cases that share a text or differ in it; mutants are those of every text."""

    kernel: str
    option: str
    make: Callable[[], tuple[Run, ...]]

    @property
    def name(self) -> str:
        return f"{self.kernel}: {self.option}"

    @functools.cached_property
    def runs(self) -> tuple[Run, ...]:
        return self.make()


def _public(kernel: str, option: str, *cases: object) -> Subject:
    op = "attention_bwd" if kernel.endswith("bwd") or "_bwd_" in kernel else "attention_fwd"
    return Subject(kernel, option, lambda: tuple(Public(case, op) for case in cases))  # type: ignore[arg-type]


_HOPPER, _PORTABLE = gluon_option_mutants.CASES, option_mutants.CASES
_FREE = {case.why: case for case in (*CASES, *BIASES, *LEARNED)}
_SMALL = {"BLOCK_M": 64, "BLOCK_N": 64}


def small(case: Free) -> Free:
    """The same in a quarter of the scores, or less: groups of heads in one block or two of 64, of 16 columns where tiles may be chosen."""
    sizes = {**case.sizes, "seqlen_q": 70, "seqlen_k": 90} if case.sizes == GROUPS else case.sizes
    if max(case.head_dim, case.head_dim_v) > 128:
        return replace(case, sizes=sizes)
    return replace(case, sizes=sizes, head_dim=16, head_dim_v=0, knobs={**_SMALL, **case.knobs})


def _direct(option: str, *cases: Free | str) -> Subject:
    """In order, where the kernel has an order for all of its sums, then as they come."""

    def made() -> tuple[Run, ...]:
        found = []
        for number, case in enumerate(cases):
            free = small(_FREE[case]) if isinstance(case, str) else case
            loose = free.dbias or free.learned is not None
            found.append(Direct(free, deterministic=not loose and number % 2 == 0))
        return tuple(found)

    return Subject("gluon_bwd_sm90", option, made)


# Each option -> cases of the Hopper forward, of the portable one.
_FORWARD_OPTIONS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "window on both sides": (
        ("window", "narrow window", "causal window", "one-sided window", "window, more queries", "window at a boundary", "window at the other boundary", "window over one block of keys"),
        ("window", "narrow window", "causal window", "one-sided window", "window, more queries", "window, odd head dims"),
    ),
    "softcap": (("softcap",), ("softcap", "softcap, fp32", "strong softcap, fp32")),
    "alibi": (("alibi", "spread, alibi"), ("alibi", "spread, alibi")),
    "sinks": (("sinks", "causal sinks at a boundary", "causal sinks at the other boundary", "causal sinks, top-left", "sinks above low scores"), ("sinks", "sinks, fp32")),
    "bias": (("bias", "spread, bias"), ("bias", "bias of -inf", "softcap, then bias", "spread, bias")),
    "attn_mask": (("attn_mask", "attn_mask of columns", "spread, attn_mask"), ("attn_mask", "attn_mask of columns", "spread, attn_mask")),
    "dropout": (("dropout", "dropout of batches"), ("dropout",)),
    "mask_mod": (
        ("mask_mod", "mask_mod of columns", "mask_mod of bands", "mask_mod of wide bands, none", "mask_mod of columns, none", "mask_mod, rows without a key", "mask_mod of a band, none",
            "mask_mod of scattered blocks, ", "mask_mod of scattered blocks, none"), ("mask_mod", "mask_mod of columns", "mask_mod of bands")),
    "mask_mod that captures": (
        ("mask_mod of sequences", "mask_mod of pages", "spread, sequences", "spread, pages", "mask_mod of sequences, none", "mask_mod of sequences, stale", "mask_mod of pages, stale",
            "mask_mod of read blocks, ", "mask_mod of read blocks, stale"),
        ("mask_mod of sequences", "mask_mod of pages", "spread, sequences", "spread, pages"),
    ),
    "score_mod that captures": (("score_mod", "relative", "spread, captured"), ("score_mod", "relative", "spread, captured")),
    "block_mask": (
        ("block_mask", "block_mask of large blocks", "block_mask as given", "block_mask as given, odd blocks", "block_mask as given, hidden values",
            "block_mask as given, whole tiles", "block_mask as given, wide blocks", "block_mask as given, hidden values in narrow tiles"),
        ("block_mask as given, odd blocks", "block_mask as given, of each head"),
    ),
    "packed sequences": (("packed", "packed, mask_mod that reads", "packed, top-left, heads", "packed, heads"), ("packed", "packed, top-left", "packed, everything")),
}  # fmt: skip
_PORTABLE_BACKWARD: dict[str, tuple[str, ...]] = {
    "window on both sides": ("gradients, narrow window", "gradients, window, more queries", "gradients, window", "window, odd head dims"),
    "attn_mask": ("gradients, attn_mask", "gradients, rows of a mask", "gradients, spread operands"),
    "dropout, sinks and dsinks": ("gradients, dropout",),
    "mask_mod": ("gradients, mask_mod", "gradients, mask_mod of a band", "gradients, mask_mod of bands"),
    "mask_mod that captures": ("gradients, mask_mod of sequences", "gradients, spread table"),
    "score_mod, gradients of what it captures": ("gradients, score_mod", "gradients, squared", "gradients, captured and hidden"),
    "gradients in order": ("gradients, ordered",),
    "bias and its gradient": (
        "gradients, bias of keys", "gradients, bias of rows", "gradients, bias of heads", "gradients, bias and softcap", "gradients, spread bias",
    ),
    "block_mask": ("block_mask as given, of each head", "block_mask as given, odd blocks"),
    "packed sequences": ("gradients, packed",),
}  # fmt: skip
_BIASED = "a bias of every pair, under a score"

SUBJECTS: tuple[Subject, ...] = (
    *(
        _public("gluon_fwd_sm90", option, *(_HOPPER[name] for name in names))
        for option, (names, _) in _FORWARD_OPTIONS.items()
    ),
    _direct(
        "window on both sides",
        Free(why="", sizes={"seqlen_q": 300, "seqlen_k": 260}, window=(70, 90), knobs=_SMALL, head_dim=16),
        "rows beyond the last key, keys before the first row", "a causal window", "nobody sees the first keys, in whole blocks",
    ),
    _direct("softcap, sinks and dsinks", "a strong softcap, causal, with sinks", "softcap"),
    _direct("alibi", "ALiBi, causal, rows without a key", "ALiBi of each batch", "ALiBi, causal from the top left, more rows than keys: distances of both signs"),
    _direct("dropout", "dropout", "wide: dropout"),
    _direct("attn_mask", "attn_mask of rows and keys", "operands with gaps", small(Free(why="", sizes=GROUPS, attn_mask="1h1j"))),
    _direct("bias and its gradient", "a bias of keys", _BIASED, "a bias of rows", "a bias that heads share", "a bias with -inf", "a bias with gaps", "one number"),
    _direct("mask_mod", "later keys are seen by fewer rows", "a mask of heads alone, of all batches", "chunks, with ranges by keys", "a mask of later keys, grouped", "keys hidden everywhere in a block hold NaN"),
    _direct("mask_mod that captures", "documents of a captured tensor"),
    _direct("score_mod", "a score with a derivative, of heads and batches", "a score of positions", "a score that reads a tensor", "a score that is infinite where no row is"),
    _direct("gradients of what score_mod captures", "a table of distances", "a table of rows, beside a mask", "a table of as many keys as there are"),
    _direct(
        "block_mask",
        Free(why="", sizes={"seqlen_q": 300, "seqlen_k": 260}, block_mask="11", block_size=(64, 64), knobs=_SMALL, head_dim=16),
        "a BlockMask of each head, whose keys are shared", "a BlockMask of each batch, causal, beside a mask",
    ),
    _direct("head dims above 128, with a mask", Free(why="", sizes={"seqlen_q": 130, "seqlen_k": 100}, mask_mod=CASES[9].mask_mod, head_dim=136, head_dim_v=16)),
    _public("gluon_bwd_sm90", "packed sequences", *(_HOPPER[name] for name in ("gradients, packed", "gradients, packed window", "gradients, packed to the left"))),
    *(
        _public("triton_fwd", option, *(_PORTABLE[name] for name in names))
        for option, (_, names) in _FORWARD_OPTIONS.items()
    ),
    *(_public("triton_bwd", option, *(_PORTABLE[name] for name in names)) for option, names in _PORTABLE_BACKWARD.items()),
)  # fmt: skip

# Texts without options: their lines are another study's, of the 16 plain subjects.
_PLAIN: dict[str, tuple[str, ...]] = {
    "gluon_fwd_sm90": ("fp16-d16", "fp16-d16-lse", "fp16-d16-causal", "fp16-d16-causal-lse"),
    "gluon_bwd_sm90": tuple(
        f"{dtype}-{dims}{causal}"
        for dtype in ("bf16", "fp16")
        for dims in ("d16", "d64", "d128", "d256", "d192-dv128", "d72-dv136", "d136-dv16")
        for causal in ("", "-causal")
    ),
    "triton_fwd": tuple(
        f"{dtype}-d16{rest}" for dtype in ("fp16", "fp32") for rest in ("", "-lse", "-causal", "-causal-lse")
    ),
    "triton_bwd": ("fp16-d16", "fp16-d16-causal"),
}


@functools.cache
def plain_lines(kernel: str) -> frozenset[str]:
    op = "attention_bwd" if "bwd" in kernel else "attention_fwd"
    texts = (render(AttentionSpec.from_key(f"{op}-{key}"), by_name(kernel)).text for key in _PLAIN[kernel])
    return frozenset(line.strip() for text in texts for line in text.splitlines())


@dataclass(frozen=True)
class Broken:
    """A mutant of a subject, and how the same break is made in every text that has the same line."""

    mutant: Mutant
    subject: Subject
    line: str
    texts: tuple[tuple[Run, str], ...]  # runs whose text has the line, each with its broken copy

    @property
    def key(self) -> tuple[str, str]:
        return self.mutant.key, self.line


@functools.cache
def _options_of(kernel: str, text: str) -> dict[tuple[str, str, int], Mutant]:
    """(key, line, how often before) -> the mutant, of lines that no plain kernel has."""
    plain, lines = plain_lines(kernel), text.splitlines()
    found: dict[tuple[str, str, int], Mutant] = {}
    for mutant in mutants(text, arithmetic=True):
        line = lines[mutant.line - 1].strip()
        if line in plain:
            continue
        number = 0
        while (mutant.key, line, number) in found:
            number += 1
        found[mutant.key, line, number] = mutant
    return found


@functools.cache
def considered(subject: Subject) -> tuple[Broken, ...]:
    """The mutants of a subject that no subject before it has, of lines that options add."""
    before: set[tuple[str, str, int]] = set()
    same = [one for one in SUBJECTS if one.kernel == subject.kernel]
    for other in same[: same.index(subject)]:
        for run in other.runs:
            before |= set(_options_of(subject.kernel, run.text))
    found: dict[tuple[str, str, int], Broken] = {}
    for run in subject.runs:
        for key, mutant in _options_of(subject.kernel, run.text).items():
            if key in before or key in found:
                continue
            others = [one for other in same for one in other.runs if one not in subject.runs]
            texts = [(one, _options_of(subject.kernel, one.text).get(key)) for one in (*subject.runs, *others)]
            found[key] = Broken(mutant, subject, key[1], tuple((one, m.text) for one, m in texts if m is not None))
    return tuple(sorted(found.values(), key=lambda one: one.mutant.line))


@functools.cache
def _work(run: Run) -> Any:
    said, work = run.verdict(run.text, "eager", 0)
    if said is not None:
        raise AssertionError(f"the original itself fails: {said}")
    return work


def _calls(run: Run, function: str) -> bool:
    """Whether a device function runs in a case; yes where nobody counts, and of a kernel itself."""
    if not run.ordered:
        return True
    _, counts = _work(run)
    return any(name == function for name, _ in counts) or function.startswith("attention")


def verdict(broken: Broken, schedules: tuple[Schedule, ...]) -> str | None:
    """How a mutant is noticed: by the cases of its subject that run its function first, under the schedules in turn; None where it survives.

    Cases of other subjects whose text has the line, too, run under the first schedule alone.
    """
    own = [pair for pair in broken.texts if pair[0] in broken.subject.runs]
    own.sort(key=lambda pair: not _calls(pair[0], broken.mutant.function))
    others = [pair for pair in broken.texts if pair not in own]
    for schedule in schedules:
        for run, text in (*own, *others) if schedule == schedules[0] else own:
            if schedule != schedules[0] and not run.ordered:
                continue
            said, work = run.verdict(text, schedule, SEED)
            if said is not None:
                return said
            if work != _work(run):
                return "work"
    return None


def all_schedules(number: int) -> tuple[Schedule, ...]:
    """Every schedule, which one first taken in turn."""
    first = number % len(SCHEDULES)
    return (*SCHEDULES[first:], *SCHEDULES[:first])


def reviewed(kernel: str, key: str) -> str | None:
    """Why a survivor is no defect."""
    return REVIEWED[kernel].get(key)
