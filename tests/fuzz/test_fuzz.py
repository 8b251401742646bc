"""Random problems over every option at once; a fixed set of seeds.

FLASHGEN_FUZZ=1000:200 pytest tests/interpret/test_fuzz.py      (200 seeds from 1000 on)
"""

from __future__ import annotations

import os
import random

import pytest
from problems import BR, TL, Row, row
from test_attention_interpret import launch

from flashgen.accuracy import make_buffers

# Read while pytest collects, before conftest hides the user's settings.
FIRST, COUNT = map(int, os.environ.get("FLASHGEN_FUZZ", "0:60").split(":"))
HEAD_DIMS = (1, 2, 3, 5, 8, 13, 16, 17, 24, 31, 32, 33, 40, 64, 71, 80, 96, 128)
LENGTHS = (0, 1, 2, 7, 15, 16, 17, 31, 32, 33, 47, 53, 63, 64, 65, 97, 128, 131)
SCALES = (None, None, None, 0.0, -0.2, 0.01, 1.0)


def draw(seed: int) -> Row:
    """One random row."""
    r = random.Random(seed)
    heads_kv, group = r.choice((1, 1, 2, 3)), r.choice((1, 1, 2, 3, 4))
    head_dim = r.choice(HEAD_DIMS)
    return row(
        f"fuzz seed {seed}; repeat: FLASHGEN_FUZZ={seed}:1 pytest tests/interpret/test_fuzz.py",
        r.choice(("fp16", "bf16", "fp32")),
        head_dim,
        r.choice(LENGTHS),
        r.choice(LENGTHS),
        dv=r.choice((head_dim, head_dim, r.choice(HEAD_DIMS))),
        causal=r.choice((None, BR, TL)),
        lse=r.random() < 0.7,
        heads=(heads_kv * group, heads_kv) if r.random() < 0.5 else (1, 1),
        batch=r.choice((1, 1, 2)),
        blocks=(r.choice((16, 32, 64)), r.choice((16, 32, 64))),
        scale=r.choice(SCALES),
        layout=r.choice(("bshd", "bhsd")),
        strides=r.choice(("dense", "padded", "misaligned", "sbhd", "expanded", "packed", "corrupt")),
        values=r.choice(("normal", "normal", "normal", "low", "large")),
    )


@pytest.mark.parametrize("seed", range(FIRST, FIRST + COUNT))
def test_random_problem(seed: int) -> None:
    case = draw(seed)
    # With a scale of 0 there are no logits whose range could be set.
    values = "normal" if case.problem.scale == 0.0 else case.values
    buffers = make_buffers(case.problem, seed=seed, strides=case.strides, values=values)
    launch(buffers, case.blocks)
    buffers.check().require(f"{case.id}: {case.why}")
