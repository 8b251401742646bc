"""The options that name a problem or a spec, shared by several commands."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import click

from flashgen.config import Tunable
from flashgen.errors import InvalidProblemError, UnsupportedProblemError
from flashgen.presets import find
from flashgen.problem import ALIGNMENTS, Problem
from flashgen.spec import DTYPES, AttentionSpec
from flashgen.target import Target
from flashgen.variants import REGISTRY, Variant, by_name, candidates

_F = TypeVar("_F", bound=Callable[..., Any])

_OPTIONS = (
    click.option("--preset", "presets", multiple=True, metavar="NAME[/KIND]", help="Attention of a named model, or of one kind of its layers; may be repeated."),
    click.option("--dtype", type=click.Choice(DTYPES), help="fp16, bf16 or fp32."),
    click.option("--head-dim", type=int, help="Of q and k."),
    click.option("--head-dim-v", type=int, help="Of v and the output; as --head-dim where not given."),
    click.option("--heads-q", type=int, default=None, help="Query heads [32]."),
    click.option("--heads-kv", type=int, default=None, help="Key/value heads; as --heads-q where not given."),
    click.option("--seqlen", type=int, help="Both lengths."),
    click.option("--seqlen-q", type=int, help="Length of q [4096]."),
    click.option("--seqlen-k", type=int, help="Length of k and v; as --seqlen-q where not given."),
    click.option("--batch", type=int, help="Batch size [1]."),
    click.option("--causal", is_flag=True, default=None, help="Causal mask."),
    click.option("--causal-alignment", type=click.Choice(ALIGNMENTS), default=None, help="Where the diagonal ends [bottom-right]."),
    click.option("--window-size", metavar="LEFT,RIGHT", help="Sliding window, e.g. 1023,0; -1 for no limit."),
    click.option("--softcap", type=float, help="Scores pass through softcap * tanh(s / softcap)."),
    click.option("--softmax-scale", type=float, help="[1/sqrt(head dim)]"),
    click.option("--dropout-p", type=float, help="Dropout of the probabilities."),
    click.option("--alibi", is_flag=True, default=None, help="With ALiBi slopes."),
    click.option("--sinks", is_flag=True, default=None, help="With sink logits."),
    click.option("--bias", is_flag=True, default=None, help="With an additive bias."),
    click.option("--attn-mask", is_flag=True, default=None, help="With a boolean mask."),
    click.option("--return-lse", is_flag=True, default=None, help="The kernel also writes the log-sum-exp."),
)  # fmt: skip


_OP = click.option("--op", type=click.Choice(["attention_fwd", "attention_bwd", "attention_decode"]), default="attention_fwd", show_default=True)  # fmt: skip


def shape_options(function: _F) -> _F:
    """`--preset`, or `--dtype --head-dim ...`; a command with an `--op` of its own takes these alone."""
    for option in reversed(_OPTIONS):
        function = option(function)
    return function


def problem_options(function: _F) -> _F:
    """`shape_options` and `--op`."""
    return shape_options(_OP(function))


# What changes the call beyond its sizes: option -> field of `Problem`, left at the field's default where not given.
_EXTRAS = {
    "softcap": "softcap", "softmax_scale": "softmax_scale", "dropout_p": "dropout_p", "alibi": "has_alibi", "sinks": "has_sinks",
    "bias": "has_bias", "attn_mask": "has_attn_mask",
}  # fmt: skip

OPTION_NAMES = (
    "presets", "op", "dtype", "head_dim", "head_dim_v", "heads_q", "heads_kv", "seqlen", "seqlen_q", "seqlen_k", "batch", "causal",
    "causal_alignment", "return_lse", "window_size", "softcap", "softmax_scale", "dropout_p", "alibi", "sinks", "bias", "attn_mask",
)  # fmt: skip


def take(values: dict[str, Any]) -> dict[str, Any]:
    """Cut the problem's options out of a command's arguments."""
    return {name: values.pop(name) for name in OPTION_NAMES}


def problems_of(given: dict[str, Any], *, all_kinds: bool = False) -> list[Problem]:
    """The problems that the options name.

    Args:
        given: the problem's options.
        all_kinds: a preset without a kind means every kind of its layers, not the main one alone.

    Raises:
        InvalidProblemError: an unknown preset, or neither a preset nor dtype and head dim.
        UnsupportedProblemError: an operation that nothing tunes yet.
    """
    if given["op"] not in ("attention_fwd", "attention_bwd"):
        from flashgen.problem import not_built

        raise not_built(f"--op {given['op']}")
    if given["presets"]:
        return [problem for name in given["presets"] for problem in _of_preset(name, given, all_kinds=all_kinds)]
    if given["dtype"] is None or given["head_dim"] is None:
        raise InvalidProblemError(
            "name a problem: --preset NAME, or at least --dtype and --head-dim. See `flashgen show presets`."
        )
    heads_q = given["heads_q"] if given["heads_q"] is not None else 32
    seqlen_q = next((given[name] for name in ("seqlen_q", "seqlen") if given[name] is not None), 4096)
    seqlen_k = next((given[name] for name in ("seqlen_k", "seqlen") if given[name] is not None), seqlen_q)
    return [
        Problem(
            dtype=given["dtype"],
            batch=1 if given["batch"] is None else given["batch"],
            seqlen_q=seqlen_q,
            seqlen_k=seqlen_k,
            num_heads_q=heads_q,
            num_heads_kv=heads_q if given["heads_kv"] is None else given["heads_kv"],
            head_dim=given["head_dim"],
            head_dim_v=given["head_dim"] if given["head_dim_v"] is None else given["head_dim_v"],
            causal=bool(given["causal"]),
            causal_alignment=given["causal_alignment"] or "bottom-right",
            return_lse=bool(given["return_lse"]),
            op=given["op"],
            **_extras(given),
        )
    ]


def _extras(given: dict[str, Any]) -> dict[str, Any]:
    extras = {field: given[option] for option, field in _EXTRAS.items() if given[option] is not None}
    if given["window_size"] is not None:
        extras["window_size"] = _window(given["window_size"])
    return extras


def _window(text: str) -> tuple[int, int]:
    try:
        left, right = map(int, text.split(","))
    except ValueError:
        raise InvalidProblemError(
            f"--window-size {text!r} is not LEFT,RIGHT: two integers, each -1 (no limit) or 0 and more keys, e.g. 1023,0."
        ) from None
    return left, right


def _of_preset(name: str, given: dict[str, Any], *, all_kinds: bool) -> list[Problem]:
    fields = {
        "dtype": "dtype",
        "head_dim": "head_dim",
        "head_dim_v": "head_dim_v",
        "heads_q": "num_heads_q",
        "heads_kv": "num_heads_kv",
    }
    fields |= {field: field for field in ("seqlen_q", "seqlen_k", "causal", "causal_alignment", "return_lse")}
    overrides = {field: given[option] for option, field in fields.items() if given[option] is not None}
    overrides |= {**_extras(given), "op": given["op"]}
    if "seqlen_q" in overrides and given["seqlen"] is None:
        overrides.setdefault("seqlen_k", overrides["seqlen_q"])
    if "head_dim" in overrides:
        overrides.setdefault("head_dim_v", overrides["head_dim"])
    model, kinds = find(name)
    return [
        Problem.preset(model.name, layer=row.kind, seqlen=given["seqlen"], batch=given["batch"], **overrides)
        for row in (kinds if all_kinds else kinds[:1])
    ]


def problem_of(given: dict[str, Any]) -> Problem:
    """The one problem that the options name.

    Raises:
        InvalidProblemError: several presets, or as `problems_of`.
    """
    if len(given["presets"]) > 1:
        raise InvalidProblemError(f"--preset {', '.join(given['presets'])}: this command takes one preset.")
    return problems_of(given)[0]


def spec_of(key: str | None, given: dict[str, Any]) -> AttentionSpec:
    """The spec that an argument or the options name.

    Raises:
        InvalidProblemError: the key is none, or options stand beside it.
    """
    if key is None:
        return problem_of(given).spec
    spec = AttentionSpec.from_key(key)
    beside = named(given)
    if beside:
        raise InvalidProblemError(f"{key} says it all: {', '.join(beside)} cannot stand beside it.")
    return spec


def named(given: dict[str, Any]) -> list[str]:
    """The problem's options that were given, as they are written."""
    spelled = {"presets": "--preset", "op": None if given["op"] == "attention_fwd" else "--op"}
    return [
        option
        for name, value in given.items()
        if value not in (None, (), False) and (option := spelled.get(name, f"--{name.replace('_', '-')}")) is not None
    ]


def generated_variant(
    spec: AttentionSpec, target: Target, name: str | None = None, config: Mapping[str, Tunable] | None = None
) -> Variant:
    """The variant of a name, or else the first with a template that supports the spec, one with the tunables of `config` before others.

    Raises:
        InvalidProblemError: no variant has the name, or it is no generated kernel.
        UnsupportedProblemError: none supports the spec; lists the reasons.
    """
    generated = [variant for variant in candidates(spec) if variant.template is not None]
    if target.backend == "cpu":
        # The portable kernel first: every GPU runs it.
        generated.sort(key=lambda variant: variant.backend != "triton")
    if config is not None:
        generated.sort(key=lambda variant: {knob.name for knob in variant.knobs} != set(config))
    if name is not None:
        generated = [by_name(name)]
        if generated[0].template is None:
            allowed = ", ".join(variant.name for variant in REGISTRY if variant.template is not None)
            raise InvalidProblemError(f"--variant {name} is no generated kernel: allowed are {allowed}.")
    reasons = {}
    for variant in generated:
        reason = variant.supports(spec, target)
        if reason is None:
            return variant
        reasons[variant.name] = reason
    raise UnsupportedProblemError(f"{spec.key} cannot be generated for {target.name}:", reasons)


def target_of(name: str | None) -> Target | None:
    """A target by name; None stays None (the installed GPU)."""
    return None if name is None else Target.named(name)


def config_of(text: str | None) -> dict[str, Tunable] | None:
    """`BLOCK_M=128,BLOCK_N=64,...` as tunables.

    Raises:
        InvalidProblemError: it does not read so.
    """
    if text is None:
        return None
    tunables: dict[str, Tunable] = {}
    for item in text.replace(",", " ").split():
        name, found, value = item.partition("=")
        if not found or not value.lstrip("-").isdigit():
            raise InvalidProblemError(
                f"--config {text!r}: {item!r} is not NAME=INTEGER; e.g. BLOCK_M=128,BLOCK_N=64,num_warps=8,num_stages=3."
            )
        tunables[name] = int(value)
    return tunables
