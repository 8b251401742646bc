"""flashgen as a contestant of its own bench, once per backend that is asked for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from torch import Tensor

from flashgen import settings, stand_ins
from flashgen.api import attention
from flashgen.bench.environment import own_version
from flashgen.coverage import options_of_a_call
from flashgen.dispatch import Plan, resolve
from flashgen.errors import UnsupportedProblemError
from flashgen.peers import options as given_options
from flashgen.peers.base import BenchOp, Peer
from flashgen.problem import Problem

INTERPRETED = "CPU tensors would run in Triton's interpreter, which is for checking: its time says nothing about speed"


class Flashgen(Peer):
    """`flashgen.attention`, as a user calls it.

    Args:
        backend: of the call.
        deterministic: gradients must repeat bit for bit; the name then ends in `-ordered`, after its fixed order of sums.
    """

    takes = frozenset(options_of_a_call())

    def __init__(self, backend: str = "auto", *, deterministic: bool = False) -> None:
        self.backend, self.deterministic = backend, deterministic
        self.name = "flashgen" if backend == "auto" else f"flashgen-{backend}"
        if deterministic:
            self.name += "-ordered"

    def available(self, device: str) -> str | None:
        return None

    def version(self) -> str:
        return f"flashgen {own_version()}"

    def supports(self, problem: Problem, op: BenchOp) -> str | None:
        asked = settings.read().backend if self.backend == "auto" else self.backend
        if not problem.device.startswith("cuda") and asked not in ("auto", "torch"):
            return INTERPRETED
        try:
            self._plan(problem, op)
        except UnsupportedProblemError as error:
            return str(error)
        return None

    def _plan(self, problem: Problem, op: BenchOp) -> Plan:
        asked = replace(problem, requires_grad=op == "attention_bwd", deterministic=self.deterministic)
        return resolve(asked, backend=self.backend)

    def detail(self, problem: Problem, op: BenchOp) -> str:
        plan = self._plan(problem, op)
        inside = f"{plan.variant} {plan.config.label} ({plan.config_source})" if plan.config.label else plan.variant
        return (
            f"{inside}, backward {plan.backward.variant} {plan.backward.config.label}".rstrip()
            if plan.backward is not None and plan.backend != "torch"
            else inside
        )

    def forward(self, problem: Problem) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
        options: dict[str, Any] = {
            "causal": problem.causal,
            "causal_alignment": problem.causal_alignment,
            "softmax_scale": problem.softmax_scale,
            "deterministic": self.deterministic or None,  # None: as torch is told
            "backend": self.backend,
        }

        generator = None
        if given_options.has_options(problem):
            options |= given_options.keywords(problem)
            options["generator"] = generator = given_options.generator(problem)
        seed = None if generator is None else generator.initial_seed()

        settled = False

        def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            nonlocal settled
            if generator is not None and seed is not None:
                generator.manual_seed(seed)
            out: Tensor = attention(q, k, v, **options)  # type: ignore[assignment]  # no lse is asked for
            if not settled:  # what follows is timed: the kernel that stays, not what stands in for it
                stand_ins.settle()
                settled = True
            return out

        return run
