"""What an exported kernel's options add to the file: parameters, their checks, mods as functions of PyTorch, and sizes of its tests."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from flashgen.coverage import has_options, undrawn
from flashgen.errors import UnsupportedProblemError
from flashgen.problem import Problem
from flashgen.spec import AttentionSpec
from flashgen.variants.features import captured

# batch, seqlen_q, seqlen_k, num_heads_q, num_heads_kv, softmax_scale, causal_alignment, layout; why
_TESTS: tuple[tuple[tuple[Any, ...], str], ...] = (
    ((1, 130, 130, 2, 1, None, "bottom-right", "bshd"), "several blocks, a ragged end, grouped heads"),
    ((2, 1, 77, 2, 2, None, "bottom-right", "bhsd"), "one query, as in decoding"),
    ((1, 65, 33, 1, 1, 0.3, "bottom-right", "bshd"), "more queries than keys"),
    ((1, 20, 90, 1, 1, None, "top-left", "bshd"), ""),
    ((1, 3, 0, 1, 1, None, "bottom-right", "bshd"), "no key at all"),
)


def refuse(spec: AttentionSpec, problem: Problem | None) -> None:
    """Refuse options that an exported file cannot have.

    Raises:
        UnsupportedProblemError: says which and why.
    """
    reason = undrawn(spec if problem is None else problem.spec)
    if spec.dropout:
        reason = "dropout_p belongs to training, and the file has no backward"
    if reason is not None:
        raise UnsupportedProblemError(f"{spec.key} cannot be exported: {reason}.")


def of(spec: AttentionSpec, problem: Problem | None) -> dict[str, Any] | None:
    """What the template needs of a spec with options, else None.

    Keys: `parameters` (name, default or None, documentation), `tensors` (name, dtype or None, dimensions or None), `launch` (names handed on), `mods`
    (text), `captured` (name, shape, dtype), `depends` (whether the mask depends on b and on h), `tests`.
    """
    if not has_options(spec):
        return None
    program = None if spec.mods is None else spec.mods.program
    rows = [] if program is None else list(program.captures)
    return {
        "parameters": list(_parameters(spec, rows)),
        "tensors": list(_tensors(spec, rows)),
        "captured": [(captured(row.name), tuple(row.shape), f"torch.{row.dtype}") for row in rows],
        "mods": "" if program is None else _mods(program),
        "depends": () if program is None or program.mask is None else tuple(x in program.mask.depends for x in "bh"),
        "fixed_mask": program is not None and program.mask is not None and not program.mask_reads,
        "tests": _tests(problem),
    }


def _parameters(spec: AttentionSpec, rows: list[Any]) -> Iterator[tuple[str, str | None, str]]:
    if spec.window:
        side = "" if spec.causal else " and after"
        yield (
            "window_size",
            "(-1, -1)",
            f"(left, right): how many keys before{side} its own position a query sees; -1 for no limit.",
        )
    if spec.softcap:
        yield "softcap", None, "s <- softcap * tanh(s / softcap); a positive number."
    if spec.has_alibi:
        yield (
            "alibi_slopes",
            None,
            "(num_heads_q,) or (batch, num_heads_q) fp32: adds -slope * |i + seqlen_k - seqlen_q - j|.",
        )
    if spec.has_sinks:
        yield "sinks", None, "(num_heads_q,) logits that join the softmax denominator only."
    if spec.has_bias:
        yield "bias", None, "additive, floating, broadcastable to (batch, num_heads_q, seqlen_q, seqlen_k)."
    if spec.has_attn_mask:
        yield "attn_mask", None, "bool, True = may attend, broadcastable likewise."
    for row in rows:
        yield (
            captured(row.name),
            None,
            f"what the mods read as `{row.name}`: {row.dtype} of {len(row.shape)} dimensions.",
        )
    if spec.has_mask_mod:
        yield (
            "mask_ranges",
            "None",
            "of `ranges_of`: where mask_mod leaves whole blocks out. None: as the mask is, see below.",
        )


def _tensors(spec: AttentionSpec, rows: list[Any]) -> Iterator[tuple[str, str | None, int | None]]:
    for name, given, dtype, dims in (
        ("alibi_slopes", spec.has_alibi, "torch.float32", None),
        ("sinks", spec.has_sinks, None, 1),
        ("bias", spec.has_bias, None, None),
        ("attn_mask", spec.has_attn_mask, "torch.bool", None),
    ):
        if given:
            yield name, dtype, dims
    for row in rows:
        yield captured(row.name), f"torch.{row.dtype}", len(row.shape)


def _mods(program: Any) -> str:
    """The mods as functions of PyTorch: the self-test's reference, and what `ranges_of` asks."""
    from flashgen.mods import in_torch

    parts = [in_torch.READ.strip()] if program.captures else []
    parts += (
        [in_torch.source(program.score, program.captures, "score_mod").strip()] if program.score is not None else []
    )
    parts += [in_torch.source(program.mask, program.captures, "mask_mod").strip()] if program.mask is not None else []
    return "\n\n\n".join(parts)


def _tests(problem: Problem | None) -> list[tuple[tuple[Any, ...], str]]:
    """The tests; those of mods stay inside of what they read."""
    if problem is None or problem.mods is None:
        return list(_TESTS)
    from flashgen import samples

    kept = []
    for (batch, seqlen_q, seqlen_k, heads_q, heads_kv, *rest), why in _TESTS:
        sizes: dict[str, Any] = {"batch": batch, "seqlen_q": seqlen_q, "seqlen_k": seqlen_k}
        one = replace(problem, num_heads_q=heads_q, num_heads_kv=heads_kv, **sizes)
        for fits in samples.within([one], problem):
            small = (fits.batch, fits.seqlen_q, fits.seqlen_k, fits.num_heads_q, fits.num_heads_kv)
            kept.append(((*small, *rest), why))
    return kept
