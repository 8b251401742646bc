"""What the portable templates ask of a spec's mods: their text in the inner loops, and where gradients of what they capture go."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Any

from flashgen.errors import RenderError
from flashgen.problem import Problem
from flashgen.spec import AttentionSpec
from flashgen.variants.features import capped_too_high, captured


@dataclass(frozen=True, slots=True, kw_only=True)
class Added:
    """One contribution to a captured tensor's gradient, as text of a tile of queries x keys.

    Attributes:
        name: of the captured tensor.
        number: of its gradient among those that are summed.
        value: of each pair.
        part: `part`, the value of each pair, summed over what the element does not depend on.
        places: where it goes, in elements.
        inside: whether it goes anywhere.
    """

    name: str
    number: int
    value: str
    part: str
    places: str
    inside: str


class WithMods:
    """A mixin for variants whose templates hold mods."""

    def refuses(self, problem: Problem) -> str | None:
        """None, or why mods or a cap keep a call from the kernel."""
        if problem.untraced:
            return problem.untraced
        if (problem.has_score_mod or problem.has_mask_mod or problem.has_block_mask) and problem.mods is None:
            # On CPU tensors, and of a problem that is only named, there is nothing to trace for.
            return "score_mod, mask_mod and block_mask are traced where a call may run a kernel, and this one does not"
        return capped_too_high(problem)

    def mod(self, spec: AttentionSpec, kind: str) -> Any:
        """The text of a spec's `score`, `mask` or `block` in the inner loop, a `mods.Emission`."""
        program, names, dialect = _of(spec)
        emit = {"score": program.emit_score, "mask": program.emit_mask, "block": program.emit_block}[kind]
        return emit(dialect=dialect, names=names, like="qk")

    def derivative(self, spec: AttentionSpec, of_captures: bool) -> Any:
        """The text of score_mod's derivative, of the raw score `raw` and the gradient `ds`: a `mods.DerivativeEmission`."""
        program, names, dialect = _of(spec)
        names = replace(names, score="raw", grad="ds")
        return program.emit_derivative(dialect=dialect, names=names, like="qk", of_captures=of_captures)

    def reads_raw(self, spec: AttentionSpec, of_captures: bool) -> bool:
        """Whether that derivative needs the raw score."""
        slope = self.derivative(spec, of_captures)
        texts = (*slope.statements, slope.score, *(one.value for one in slope.gradients))
        return any(re.search(r"\braw\b", text) for text in texts)

    def mod_helpers(self, spec: AttentionSpec) -> tuple[str, ...]:
        """The jit functions that a spec's mods call, each once."""
        given = {"score": spec.has_score_mod, "mask": spec.has_mask_mod, "block": spec.has_block_mask}
        texts = [self.mod(spec, kind) for kind, there in given.items() if there]
        if spec.has_score_mod and spec.op == "attention_bwd":
            texts.append(self.derivative(spec, of_captures=True))
        return tuple(dict.fromkeys(helper for text in texts for helper in text.helpers))

    # -- sums of gradients, beside dQ --

    def gradient_sums(self, spec: AttentionSpec) -> tuple[str, ...]:
        """The operands of a launch whose gradients are sums over tiles: the bias, and captured tensors that want one."""
        if spec.op != "attention_bwd":
            return ()
        bias = ("bias",) if spec.has_bias else ()
        return (*bias, *map(captured, self._captures(spec)))

    def _captures(self, spec: AttentionSpec) -> tuple[str, ...]:
        """Names of the captured tensors that score_mod's derivative reaches."""
        if not spec.has_score_mod:
            return ()
        program = _of(spec)[0]
        reached = {one.capture for one in program.derivative.contributions}
        return tuple(row.name for number, row in enumerate(program.captures) if number in reached)

    def sum_pointers(self, spec: AttentionSpec) -> dict[str, str]:
        """Parameters of dQ for the sums -> what `launch` passes."""
        names = (["dbias_ptr"] if spec.has_bias else []) + [f"sum_of_{name}_ptr" for name in self._captures(spec)]
        found = {name: f"sums[{number}]" for number, name in enumerate(names)}
        return {**found, "largest_ptr": "largest"} if found else {}

    def sum_arguments(self, spec: AttentionSpec) -> tuple[str, ...]:
        """What dQ's inner loop takes for the sums."""
        steps = ("stride_dbias_m", "stride_dbias_n") if spec.has_bias else ()
        pointers = tuple(self.sum_pointers(spec))
        return (*pointers, *steps, "term_bits") if pointers else ()

    def sum_constants(self, spec: AttentionSpec) -> dict[str, str]:
        """Compile-time parameters of dQ for the sums -> what `launch` passes."""
        bias = {
            "BIAS_ROWS": "bias_steps[2] != 0",
            "BIAS_KEYS": "bias_steps[3] != 0",
            "SUM_BIAS": "0 if sums[0] is None else sum_bias",
        }
        found = bias if spec.has_bias and spec.op == "attention_bwd" else {}
        if self._captures(spec):
            found |= {"SUMS": "mode"}
        return {**found, "WRITES_DQ": "sums is gradients"} if found else {}

    def most_terms(self, spec: AttentionSpec) -> int:
        """Contributions of one pair to one gradient, at most."""
        return max(1, len(_of(spec)[0].derivative.contributions) if self._captures(spec) else 1)

    def contributions(self, slope: Any, spec: AttentionSpec) -> tuple[Added, ...]:
        """Where a derivative's contributions go, for dQ's loop."""
        names = [row.name for row in _of(spec)[0].captures]
        order = [*(["bias"] if spec.has_bias else []), *self._captures(spec)]
        return tuple(_added(one, names[one.capture], order.index(names[one.capture])) for one in slope.gradients)


def _of(spec: AttentionSpec) -> tuple[Any, Any, Any]:
    from flashgen import mods  # imports torch: only where a mod was given, which needed it already

    if spec.mods is None:
        raise RenderError(f"{spec.key} has mods that were not traced: nothing can be rendered for them.")
    names = mods.Names(score="qk", b="b", h="h", q_idx="q_idx", kv_idx="kv_idx")
    return spec.mods.program, names, mods.TRITON


def _added(one: Any, name: str, number: int) -> Added:
    rows, keys = "q_idx" in one.depends, "kv_idx" in one.depends
    part = {
        (True, True): "part",
        (True, False): "tl.sum(part, 1, keep_dims=True)",
        (False, True): "tl.sum(part, 0, keep_dims=True)",
        (False, False): "tl.sum(tl.sum(part, 1), 0)",
    }[rows, keys]
    places = "0"
    for dim, place in enumerate(one.places):
        wide = place if place.isdigit() else f"{place}.to(tl.int64)"
        places = wide if not dim else f"({places}) * {name}_size{dim} + {wide}"
    conditions = [f"({one.inside})"] if one.inside and one.inside != "True" else []
    conditions += ["(offs_m < seqlen_q)[:, None]"] if rows else []
    conditions += ["(keys < kv_end)[None, :]"] if keys else []
    value = f"({one.value}).to(tl.float32)"
    inside = " & ".join(conditions) or "tl.full([], True, tl.int1)"
    return Added(name=name, number=number, value=value, part=part, places=places, inside=inside)
