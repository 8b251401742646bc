"""Which specs have a golden render, and where it lies."""

from __future__ import annotations

from pathlib import Path

from flashgen.spec import AttentionSpec
from flashgen.target import Target
from flashgen.variants import REGISTRY, Variant

GOLDEN = Path(__file__).resolve().parent

# Each key is here for one branch of the template that no other key takes in that combination.
KEYS = (
    "attention_fwd-bf16-d128",  # nothing optional, nothing padded
    "attention_fwd-bf16-d128-causal-lse",  # everything optional: what training compiles
    "attention_fwd-fp16-d64-causal",  # causal without lse
    "attention_fwd-fp16-d64-lse",  # lse without causal
    "attention_fwd-fp32-d64-causal-lse",  # fp32
    "attention_fwd-bf16-d192-dv128-causal-lse",  # D differs from Dv, D is padded and Dv is not
    "attention_fwd-fp32-d33-dv17-lse",  # both odd, both padded
    "attention_fwd-fp16-d80-causal-lse",  # a padded even head dim
    "attention_fwd-fp32-d256-lse",  # scores summed in parts
    "attention_fwd-bf16-d1",  # the least
    "attention_fwd-bf16-d256-causal-lse",  # the largest
    "attention_fwd-bf16-d128-causal-window-lse",  # a range with two ends
    "attention_fwd-fp16-d64-window-sinks",  # both sides, and a sink without lse
    "attention_fwd-fp32-d64-softcap-alibi-sinks-lse",  # changed scores and a sink in fp32
    "attention_fwd-bf16-d128-bias-attn_mask-lse",  # operands of every score; keys hidden anywhere
    "attention_fwd-bf16-d128-causal-dropout-lse",  # dropout alone
    "attention_fwd-bf16-d128-causal-varlen-lse",  # packed sequences alone
    "attention_fwd-fp16-d64-causal-window-softcap-alibi-sinks-bias-attn_mask-dropout-varlen-lse",  # all at once
    "attention_bwd-bf16-d128-causal",  # nothing padded: what training compiles
    "attention_bwd-fp16-d64",  # not causal
    "attention_bwd-fp16-d80-causal",  # a padded even head dim
    "attention_bwd-bf16-d192-dv128-causal",  # D differs from Dv, D is padded and Dv is not
    "attention_bwd-fp32-d33-dv17",  # fp32, both odd, both padded
    "attention_bwd-bf16-d1",  # the least
    "attention_bwd-bf16-d256-causal",  # the largest
    "attention_bwd-bf16-d128-causal-window-softcap-alibi-sinks",  # ranges with two ends, changed scores
    "attention_bwd-fp16-d64-attn_mask-dropout",  # keys hidden anywhere, dropout replayed on transposed tiles
    "attention_bwd-bf16-d128-causal-bias",  # a gradient that is summed over tiles
    "attention_bwd-bf16-d128-causal-varlen",  # packed sequences alone
    "attention_bwd-fp16-d64-causal-window-softcap-alibi-sinks-bias-attn_mask-dropout-varlen",  # all at once
)
# What one variant alone has branches for.
OWN_KEYS = {
    "gluon_fwd_sm90": (
        "attention_fwd-bf16-d64-causal-softcap-lse",  # scores that are changed before they are scaled
        "attention_fwd-bf16-d128-causal-softcap-lse",  # the same in the exponents
        "attention_fwd-bf16-d128-causal-alibi-lse",
        "attention_fwd-bf16-d192-dv128-causal-window-lse",  # hidden keys go through memory of the output's width in pieces
        "attention_fwd-bf16-d64-dv128-attn_mask-lse",  # and through a part of it
    ),
    "gluon_bwd_sm90": (
        "attention_bwd-bf16-d128",  # the loops that must not spill, with the three above that are narrow
        "attention_bwd-bf16-d64-causal",
        "attention_bwd-fp16-d64-dv256",  # wide values: one panel of dq, two of dv
    ),
}


def generated_variants() -> tuple[Variant, ...]:
    """The variants that render a template."""
    return tuple(variant for variant in REGISTRY if variant.template is not None)


def goldens(variant: Variant) -> tuple[AttentionSpec, ...]:
    """The specs of `KEYS`, and of its own, that a variant supports on a Hopper GPU."""
    specs = (AttentionSpec.from_key(key) for key in (*KEYS, *OWN_KEYS.get(variant.name, ())))
    target = Target.named("h100")
    return tuple(spec for spec in specs if spec.op == variant.op and variant.supports(spec, target) is None)


def golden_path(spec: AttentionSpec, variant: Variant) -> Path:
    """`tests/golden/<op>/<variant>/<spec.key>.py`."""
    return GOLDEN / spec.op / variant.name / f"{spec.key}.py"
