"""The error budget of a kernel, and poisoned problems to hold it against.

The unit is never a hand-picked tolerance: it is the error of an honest low-precision run (`flashgen.reference`) against the
fp64 oracle on the same inputs. With (f, g) of the dtype,

    every element:  |out - oracle| <= f * max|low - oracle| + eps/2 * |oracle|
    on average:     mean|out - oracle| <= g * mean|low - oracle|      (fp32: + 1e-7)

and f and g double under 4,096 elements, too few for a ratio of statistics. A looser unit lets "one key too many at
seqlen 2048" pass in bf16; this one does not.
"""

from __future__ import annotations

from flashgen.accuracy.budget import AccuracyReport, Pair, check, unit_of
from flashgen.accuracy.poisoned import (
    POISON,
    TORCH_DTYPES,
    Buffers,
    Strides,
    Values,
    check_launch,
    make_buffers,
    place,
    poison_all,
    small_problems,
)

__all__ = [
    "POISON",
    "TORCH_DTYPES",
    "AccuracyReport",
    "Buffers",
    "Pair",
    "Strides",
    "Values",
    "check",
    "check_launch",
    "make_buffers",
    "place",
    "poison_all",
    "small_problems",
    "unit_of",
]
