"""Which options of a call no generated kernel covers yet: asked of the variants, one option at a time."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from flashgen.errors import UnsupportedProblemError
from flashgen.problem import Problem
from flashgen.spec import AttentionSpec, flag_names
from flashgen.target import Target
from flashgen.variants import Variant, candidates

# Masks and outputs that belong to plain attention: no options that a kernel could lack on their own.
_PLAIN = ("causal", "has_lse")


def generated(spec: AttentionSpec, target: Target) -> list[Variant]:
    """The variants with a template that support a spec on a target, in the dispatcher's order."""
    return [v for v in candidates(spec) if v.template is not None and v.supports(spec, target) is None]


def options_of(spec: AttentionSpec) -> list[str]:
    """The flags of a spec beyond plain attention."""
    return [flag for flag in spec.flags if flag not in _PLAIN]


def uncovered(spec: AttentionSpec, target: Target) -> dict[str, list[str]]:
    """Generated variants of a spec's operation -> the options of the spec that they do not cover on a target.

    An option counts where the variant takes the spec without options, but refuses it with this one alone. Options are
    spelled as in `attention()`.
    """
    options = options_of(spec)
    plain = _with(spec, **dict.fromkeys(options, False))
    found = {
        variant.name: [spelled(o) for o in options if variant.supports(_with(plain, **{o: True}), target) is not None]
        for variant in generated(plain, target)
    }
    return {name: missing for name, missing in found.items() if missing}


def options_of_a_call() -> list[str]:
    """The flags of every option that `attention()` and `varlen_attention()` have beyond plain attention."""
    return [flag for flag in flag_names() if flag not in (*_PLAIN, "paged")]


def covered(variant: Variant, target: Target) -> list[str]:
    """The options, as spelled in `attention()`, that a variant takes one at a time on a target, on bf16 of head dim 64."""
    plain = AttentionSpec(op=variant.op, dtype="bf16", head_dim=64, head_dim_v=64)
    return [
        spelled(flag) for flag in options_of_a_call() if variant.supports(_with(plain, **{flag: True}), target) is None
    ]


def require_plain(spec: AttentionSpec, what: str) -> None:
    """Refuse options where something takes q, k and v alone.

    Args:
        spec: of the call.
        what: in a user's words what cannot take them, e.g. "tuning".

    Raises:
        UnsupportedProblemError: names the options.
    """
    named = ", ".join(map(spelled, options_of(spec)))
    if named:
        raise UnsupportedProblemError(f"{what} does not take {named} yet: leave them out, or call flashgen.attention.")


def untuned(spec: AttentionSpec) -> str | None:
    """Why no command tunes a kernel that runs: some options are data or code, which no word of a command names."""
    if spec.varlen or spec.has_block_mask:
        named = ", ".join(
            flag
            for flag in ("varlen", "block_mask")
            if getattr(spec, flag, False) or getattr(spec, f"has_{flag}", False)
        )
        return f"{named}: kernels with these options run, but are not tuned yet"
    if spec.has_score_mod or spec.has_mask_mod:
        return "in Python, flashgen.tune(flashgen.Problem(...).modified(score_mod=..., mask_mod=...))"
    return None


def has_options(spec: AttentionSpec) -> bool:
    """Whether a kernel takes more than q, k, v and a causal mask: then it is judged with its options drawn (`flashgen.samples`)."""
    return bool(options_of(spec))


def undrawn(spec: AttentionSpec) -> str | None:
    """Why nothing can be drawn for a spec's options, or None: some are data or code that no problem names."""
    if spec.varlen:
        return "packed sequences are not drawn: their lengths are the user's"
    if spec.has_block_mask:
        return "a BlockMask is not drawn: give its mask_mod instead"
    if (spec.has_score_mod or spec.has_mask_mod) and spec.mods is None:
        return "score_mod and mask_mod are code: give a problem that has them, Problem.modified(score_mod=..., mask_mod=...)"
    if spec.mods is not None and (
        spec.mods.program is None or len(spec.mods.samples) != len(spec.mods.program.captures)
    ):
        return "what score_mod and mask_mod read is not known: give a problem made by Problem.modified()"
    return None


def spelled(flag: str) -> str:
    """What a spec's flag is called in `attention()`."""
    names = {"window": "window_size", "has_alibi": "alibi_slopes", "dropout": "dropout_p"}
    return names.get(flag, flag.removeprefix("has_"))


def _with(spec: AttentionSpec, **flags: Any) -> AttentionSpec:
    return replace(spec, **flags)


# -- what a variant that takes an option does not take with it --


def limits(variant: Variant, target: Target) -> dict[str, str]:
    """Situations in which a variant refuses what `covered` says that it takes -> its reason, as it gives it in a call.

    Asked of `supports` and `refuses`: other dtypes, odd head dims, head dims padded differently with each option, gradients in a fixed order and
    of captured tensors.
    """
    plain = AttentionSpec(op=variant.op, dtype="bf16", head_dim=64, head_dim_v=64)
    found: dict[str, str] = {}

    def ask(what: str, reason: str | None) -> None:
        if reason is not None:
            found[what] = reason

    ask("fp32", variant.supports(replace(plain, dtype="fp32"), target))
    ask("a head dim of 100", variant.supports(replace(plain, head_dim=100, head_dim_v=100), target))
    apart = replace(plain, head_dim=192, head_dim_v=128)
    if variant.supports(apart, target) is None:
        for flag in options_of_a_call():
            reason = variant.supports(_with(apart, **{flag: True}), target)
            ask(f"{spelled(flag)} with head dims 192/128", reason)
    for what, problem in _gradients().items() if variant.op == "attention_bwd" else ():
        ask(what, variant.supports(problem.spec, target) or variant.refuses(problem))
    return found


def _gradients() -> dict[str, Problem]:
    """Backwards that some kernels leave to another."""
    import torch  # the mods are traced

    base = Problem(
        dtype="bf16", batch=1, seqlen_q=128, seqlen_k=128, num_heads_q=2, num_heads_kv=2, head_dim=64, head_dim_v=64, requires_grad=True,
    )  # fmt: skip
    table = torch.zeros(2, requires_grad=True)
    bias = replace(base, has_bias=True, bias_grad=True)
    learned = base.modified(score_mod=lambda s, b, h, i, j: s + table[h])
    return {
        "the gradient of bias": bias.backward,
        "the gradient of bias in a fixed order": replace(bias, deterministic=True).backward,
        "gradients of tensors that score_mod reads": learned.backward,
        "gradients of tensors that score_mod reads in a fixed order": replace(learned, deterministic=True).backward,
    }
