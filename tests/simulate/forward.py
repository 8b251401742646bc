"""The rendered Hopper forward as a subject of the mutation study, and its reviewed survivors."""

from __future__ import annotations

import functools

from flashgen.mutation import Study
from flashgen.simulator import Mutant
from flashgen.spec import AttentionSpec
from flashgen.target import Target
from flashgen.variants import by_name

# Every text that the template has: full and causal, with lse and without, one panel of head dims and two; and every width.
SPECS = (
    "attention_fwd-bf16-d64-lse",
    "attention_fwd-bf16-d64-causal-lse",
    "attention_fwd-fp16-d128",
    "attention_fwd-bf16-d128-causal-lse",
    "attention_fwd-fp16-d256-causal",
    "attention_fwd-bf16-d256-lse",
    "attention_fwd-bf16-d192-dv128-causal-lse",
    "attention_fwd-bf16-d192-dv128",
)
SAMPLED = SPECS[:2]  # in CI, a fixed sample of these; `make torture` studies all

# Survivors, with the reason why they are no defects.
_ALWAYS = {
    "attend: early arrive: mbarrier.arrive(k_empty.index(k_stage), count=1)": (
        "this stage's keys are loaded anew only after a wait for v_empty of a later step, which is released after the products"
    ),
}
_MASKED_ARM = "every row of a full kernel sees a key: its calls compile this arm out"
_FULL = {
    'online_softmax: choices swapped: gl.where(m_new == -float("inf"), 0.0, m_new)': _MASKED_ARM,
    'online_softmax: comparison inverted: m_new == -float("inf")': _MASKED_ARM,
}
_SETTLING = (
    "blocks more or fewer go through the loop that compares numbers, whose results are the same bits: only slower"
)
_FULL |= {
    "is_settled: comparison off by one: gl.min(gl.min(m_i, 1), 0) >= -8.0": _SETTLING + "; -8 is right in either loop",
    "is_settled: comparison off by one: gl.min(m_i, 0) >= 0.0": _SETTLING + "; a maximum of 0 is right in either loop",
    "consume: comparison off by one: n_full >= 12": _SETTLING,
    "consume: choices swapped: gl.where(is_long, gl.minimum(left, gl.where(left == n_full, 1, 8)), left)": _SETTLING,
    "consume: choices swapped: gl.where(left == n_full, 1, 8)": _SETTLING,
    "consume: comparison inverted: left == n_full": _SETTLING,
    "consume: minimum and maximum swapped: gl.minimum(left, gl.where(left == n_full, 1, 8))": (
        "the first pass then takes all blocks that are left: " + _SETTLING
    ),
    "consume: comparison off by one: left > 0": (
        "it never ends where a row's maximum stays negative, which no case of the study has: "
        "test_maxima_of_negative_logits_are_no_integers does"
    ),
}
_CAUSAL = {
    "consume: ± 1 dropped: start_m + causal_offset + 1": (
        "a block that every row sees is masked as well where it ends at the diagonal; the mask changes nothing there"
    ),
}
_NO_ROWS = {
    "consume: stage + 1: row % ROWS": "a full kernel that stores no lse asks no row where it stands: TMA clips what it reads and writes"
}
REVIEWED: dict[str, dict[str, str]] = {
    key: {
        **_ALWAYS,
        **(_CAUSAL if "causal" in key else _FULL),
        **(_NO_ROWS if "causal" not in key and "lse" not in key else {}),
    }
    for key in SPECS
}


def considered(key: str) -> tuple[Mutant, ...]:
    """The mutants of a spec: all, but for those of lines that are compiled out where q and the output have different widths.

    The output then never leaves through q's memory, whatever the configuration. A full kernel's line for rows without a key is
    left out there, too.
    """
    study = study_of(key)
    if study.spec.head_dim == study.spec.head_dim_v:
        return study.mutants
    found = tuple(mutant for mutant in study.mutants if study.reaches(mutant))
    left_out = {mutant.line for mutant in study.mutants} - {mutant.line for mutant in found}
    if len(left_out) > (2 if study.spec.causal else 3):
        raise AssertionError(
            f"{key}: lines {sorted(left_out)} are not run by any case: expected are two of the arm without OWN_STAGING, and one "
            "of rows without a key where the kernel is not causal"
        )
    return found


@functools.cache
def study_of(key: str) -> Study:
    return Study(AttentionSpec.from_key(key), by_name("gluon_fwd_sm90"), Target.named("h100"))
