"""A case with options run again and again, each time by another text of one of its kernels: what the study of options is made of."""

from __future__ import annotations

import collections
import contextlib
import json
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol
from unittest import mock

import free_backward
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "fuzz"))

import judge
from cases import Case, make

from flashgen import interpret
from flashgen.errors import BuildError, FlashgenError
from flashgen.mutation import work_of
from flashgen.reference import exact, same_precision
from flashgen.render import KernelSource
from flashgen.simulator import Schedule, SimulationError
from flashgen.simulator.jit import JitFunction

_MAX_STEPS = 60_000
_SECONDS = 40  # in which a launch has to end

# What an interpreted launch did, and that it ends: the text knows no other way to say so. Written where the study looks.
_COUNTED = '''

_plain_launch = launch


def launch(*args, **kwargs):
    """Count what a launch does in Triton's interpreter, and end one that does not."""
    import collections, json, signal
    from unittest import mock
    from triton.runtime.interpreter import InterpreterBuilder as builder

    counts = collections.Counter()

    def counted(name):
        real = getattr(builder, name)

        def call(self, *args, **kwargs):
            counts[name] += 1
            return real(self, *args, **kwargs)

        return mock.patch.object(builder, name, call)

    def late(*_):
        raise TimeoutError("this launch does not end")

    signal.signal(signal.SIGALRM, late)
    signal.alarm(SECONDS)
    try:
        with counted("create_dot"), counted("create_masked_load"), counted("create_masked_store"), counted("create_atomic_rmw"), counted("create_select"):
            _plain_launch(*args, **kwargs)
    finally:
        signal.alarm(0)
    with open(PATH, "w") as file:
        json.dump(counts, file)
'''


@contextlib.contextmanager
def counting() -> Iterator[collections.Counter[Any]]:
    """Calls of the device functions of a simulated text, with their switches: whether a block is masked changes no result, but work."""
    counts: collections.Counter[Any] = collections.Counter()
    real = JitFunction.__call__

    def call(self: JitFunction, *args: Any, **kwargs: Any) -> Any:
        counts[self.fn.__name__, tuple(x for x in (*args, *kwargs.values()) if isinstance(x, bool))] += 1
        return real(self, *args, **kwargs)

    with mock.patch.object(JitFunction, "__call__", call):
        yield counts


class Run(Protocol):
    """A case that runs with any text of the kernel in question."""

    text: str  # the original
    ordered: bool  # whether a schedule means anything to it

    def verdict(self, text: str | None, schedule: Schedule, seed: int) -> tuple[str | None, Any]:
        """How it is noticed, None where it is not; and what was done."""


class Public:
    """A call of `attention()` or `varlen_attention()`, judged as the fuzz judges it; references are computed once.

    Args:
        case: the call.
        op: whose text is exchanged; the forward before a backward runs once.
    """

    def __init__(self, case: Case, op: str) -> None:
        self.case, self.op, self.ordered = case, op, case.backend == "gluon"
        self._forward: dict[str, Tensor] = {}
        self._source: KernelSource | None = None
        self._report: Any = None
        self._counts = Path(tempfile.gettempdir()) / f"flashgen-study-{id(self)}.json"

    @cached_property
    def _prepared(self) -> tuple[Any, dict[str, Tensor], Any, Any]:
        tensors = make(self.case)
        calls = judge.reference_calls(self.case, tensors)
        judge.poison(self.case, tensors, calls)
        before = {name: x.clone() for name, x in tensors.allocations.items()}
        want = judge.joined(self.case, calls, [exact(call) for call in calls])
        runs = zip(*(same_precision(call, runs=judge.HONEST_RUNS) for call in calls), strict=True)
        return tensors, before, want, [judge.joined(self.case, calls, list(run)) for run in runs]

    @cached_property
    def text(self) -> str:
        said, _ = self.verdict(None, "eager", 0)
        if said is not None or self._source is None:
            raise AssertionError(f"the original itself fails: {said}: {self.case.dumps()}")
        return self._source.text

    def verdict(self, text: str | None, schedule: Schedule, seed: int) -> tuple[str | None, Any]:
        tensors, before, want, units = self._prepared
        self._report = None
        for name, old in before.items():
            tensors.allocations[name].copy_(old)
        try:
            with self._exchanged(text, schedule, seed):
                got = judge.run(self.case, tensors)
        except SimulationError as error:
            return error.kind, None
        except BuildError as error:
            return _kind(str(error)), None
        except FlashgenError as error:
            return f"refused: {type(error).__name__}", None
        except (RuntimeError, TypeError, ValueError, IndexError, AttributeError):  # host code between the kernels
            return "raised", None
        if any(not torch.equal(x, before[name]) for name, x in tensors.allocations.items()):
            return "out-of-bounds", None
        said = judge._compare(self.case, got, want, units)
        return ("numbers" if said else None), self._report

    @contextlib.contextmanager
    def _exchanged(self, text: str | None, schedule: Schedule, seed: int) -> Iterator[None]:
        real, simulated = interpret._run, interpret.simulate

        def run(source: KernelSource, tensors: Any, outputs: tuple[str, ...], values: dict[str, Any]) -> None:
            if source.spec.op == self.op:
                self._source = source
                counted = _COUNTED.replace("SECONDS", str(_SECONDS)).replace("PATH", repr(str(self._counts)))
                changed = (text or source.text) + ("" if self.ordered else counted)
                real(replace(source, text=changed), tensors, outputs, values)
                if not self.ordered:
                    self._report = json.loads(self._counts.read_text())
                return
            every = {**tensors, **values}
            if not self._forward:
                real(source, tensors, outputs, values)
                self._forward.update({name: every[name].clone() for name in outputs if every[name] is not None})
            for name, x in self._forward.items():
                every[name].copy_(x)

        def simulated_so(source: KernelSource, args: Any) -> Any:
            ordered = self.case.deterministic and self.op == "attention_bwd"
            given = {
                "schedule": schedule,
                "seed": seed,
                "max_steps": _MAX_STEPS,
                "timeout_s": _SECONDS,
                "ordered_sums": ordered,
            }
            with counting() as counts:
                report = simulated(source, args, **given)
            if source.spec.op == self.op:
                self._report = work_of(report), counts
            return report

        with mock.patch.object(interpret, "_run", run), mock.patch.object(interpret, "simulate", simulated_so):
            yield


def _kind(message: str) -> str:
    """A word for how the interpreter's worker noticed."""
    for word, kind in (
        ("outside", "out-of-bounds"),
        ("wrote into its input", "out-of-bounds"),
        ("does not end", "endless"),
        ("died", "died"),
    ):
        if word in message:
            return kind
    return "raised"


class Direct:
    """A launch of the Hopper backward, in one mode; see `free_backward`."""

    ordered = True

    def __init__(self, case: free_backward.Free, deterministic: bool, seed: int = 2) -> None:
        self.case, self.deterministic = case, deterministic
        self.text = case.source.text
        self._seed = seed

    @cached_property
    def _prepared(self) -> tuple[Any, Any, dict[str, Tensor], Any]:
        buffers, values = free_backward.make(self.case, self._seed)
        oracle, honest = buffers.references()
        for name in buffers.outputs:
            if name.startswith("dcaptured_"):
                for result in (oracle, *honest):
                    result.gradients[name[1:]] = result.gradients["captured0"]
        whole = {name: x.clone() for name, x in buffers.allocations.items()}
        return buffers, values, whole, (oracle, honest)

    def verdict(self, text: str | None, schedule: Schedule, seed: int) -> tuple[str | None, Any]:
        buffers, values, whole, references = self._prepared
        for name, old in whole.items():
            buffers.allocations[name].copy_(old)
        try:
            with counting() as counts:
                report = free_backward.launch(
                    self.case, buffers, values, text=text, deterministic=self.deterministic, schedule=schedule, seed=seed,
                    max_steps=_MAX_STEPS, timeout_s=_SECONDS,
                )  # fmt: skip
        except SimulationError as error:
            return error.kind, None
        return (None if buffers.check(references).ok else "numbers"), (work_of(report), counts)
