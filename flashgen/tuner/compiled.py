"""One problem's candidates as a measured search compiles them: all of them first where the time allows it, else each when it is proposed.

Compiling is the bill of a search. What the compiler says also decides what is tried last: the cost model does not choose here, but what it
advises against waits until everything else was measured.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from statistics import median
from typing import Protocol

from flashgen import costmodel
from flashgen.compile_pool import STOPPED, Result
from flashgen.config import KernelConfig, Tunable
from flashgen.errors import BuildError
from flashgen.facts import CompiledFacts, Strides, cached
from flashgen.render import KernelSource
from flashgen.target import Target
from flashgen.tuner import condemned, policy
from flashgen.tuner.context import Context, launch_strides

_Binary = tuple[Tunable, ...]


class Compiler(Protocol):
    """`CompilePool`, or what stands in for it."""

    def map(
        self, source: KernelSource, target: Target, configs: Sequence[KernelConfig], strides: Strides | None = None
    ) -> Iterator[tuple[KernelConfig, Result | None]]:
        """Facts or the reason why there are none; None where nothing is compiled."""


class NoCompiler:
    """For the CPU provider, whose kernels are plain Python."""

    def map(
        self, source: KernelSource, target: Target, configs: Sequence[KernelConfig], strides: Strides | None = None
    ) -> Iterator[tuple[KernelConfig, Result | None]]:
        for config in configs:
            yield config, None


class Compiled:
    """What the compiler said of the candidates so far.

    Attributes:
        vetoed: what the model advised against and the strategy put off -> why.
    """

    def __init__(self, context: Context, compiler: Compiler) -> None:
        self._context, self._compiler = context, compiler
        self._strides = launch_strides(context.problem)
        self._facts: dict[KernelConfig, CompiledFacts | None] = {}
        self._results: dict[_Binary, Result | None] = {}
        self._refused: set[KernelConfig] = set()
        self.vetoed: dict[KernelConfig, str] = {}

    def __contains__(self, config: KernelConfig) -> bool:
        return config in self._facts or config in self._refused

    def runs(self, config: KernelConfig) -> bool:
        """Whether a compiled candidate can be launched."""
        return config not in self._refused

    def facts(self, config: KernelConfig) -> CompiledFacts | None:
        """The compiler's facts, where it made any."""
        return self._facts.get(config)

    def add(self, configs: Sequence[KernelConfig]) -> None:
        """Compile what is not done, condemned or compiled, until the time is up; what cannot run is recorded and excluded.

        Raises:
            KeyboardInterrupt: the compiler was stopped.
        """
        context = self._context
        known = (context.earlier, context.condemned, self)
        todo = [config for config in configs if not any(config in place for place in known)]
        twins: dict[_Binary, list[KernelConfig]] = {}
        for config in todo:
            binary = self._binary(config)
            if binary in self._results:
                self._take(config, self._results[binary])
            else:
                twins.setdefault(binary, []).append(config)
        firsts = [same[0] for same in twins.values()]
        results = self._compiler.map(context.source, context.target, firsts, self._strides)
        for done, (config, result) in enumerate(results, start=1):
            binary = self._binary(config)
            self._results[binary] = result
            for twin in twins[binary]:
                self._take(twin, result)
            if len(firsts) > 1:
                context.tell(done, len(firsts), "", "compiling")
                if context.expired():
                    break
        for config in todo:
            self._advise(config)

    def affordable(self, configs: Sequence[KernelConfig], trial_s: float, kept_s: float) -> bool:
        """Whether compiling and measuring all of them is expected to fit into the time that is left.

        Args:
            configs: what is left of the list.
            trial_s: seconds that measuring a candidate takes.
            kept_s: seconds of what is left that are not for this.
        """
        left = self._context.left_s()
        if left is None:
            return True
        source, target = self._context.source, self._context.target
        seconds = [result.compile_s for result in self._results.values() if isinstance(result, CompiledFacts)]
        binaries = {self._binary(c): c for c in configs}
        fresh = [
            c for binary, c in binaries.items()
            if binary not in self._results and cached(source, target, c, self._strides) is None
        ]  # fmt: skip
        compile_s = len(fresh) * median(seconds) / processes(self._context.workers) if seconds else 0.0
        return compile_s + len(configs) * trial_s + kept_s <= left

    def _binary(self, config: KernelConfig) -> _Binary:
        """What is compiled in: configurations that differ elsewhere run the same code."""
        return tuple(config[knob.name] for knob in self._context.variant.knobs if knob.compiled)

    def _take(self, config: KernelConfig, result: Result | None) -> None:
        context = self._context
        reason, status, facts = None, "compile_error", None
        if isinstance(result, BuildError):
            reason, status = str(result), condemned.compile_status(result)
            if reason == STOPPED:
                raise KeyboardInterrupt
        elif result is not None:
            facts, status = result, "out_of_resources"
            reason = context.variant.illegal(context.problem.spec, context.target, config, result)
        if reason is None:
            self._facts[config] = facts
            return
        self._refused.add(config)
        context.result.excluded[config.label] = reason
        protocol = condemned.PROTOCOL_COMPILE
        context.finish([context.record(config, status, protocol=protocol, facts=facts, message=reason[:500])])

    def _advise(self, config: KernelConfig) -> None:
        """Put off what the model vetoes; a winner of before is measured in any case, since others must beat it."""
        context, facts = self._context, self._facts.get(config)
        if facts is None or config in context.favourites:
            return
        # The same tile with three stages counts where it is known: it is not compiled for this question alone.
        deeper = policy.deeper_of(config) if context.variant.modelled else None
        other = None
        if deeper is not None:
            other = self._facts.get(deeper) or cached(context.source, context.target, deeper, self._strides)
        reason = costmodel.veto(config, facts, context.problem.spec, context.target, other)
        if reason is not None and context.strategy.defer(config):
            self.vetoed[config] = reason


def processes(workers: int | None) -> int:
    """How many candidates are compiled side by side."""
    return max(1, workers or os.cpu_count() or 1)
