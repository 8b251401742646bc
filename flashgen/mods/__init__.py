"""score_mod and mask_mod: traced once to a graph, emitted into kernels, differentiated, judged by the tile.

`program` is the door. Importing this package imports torch; it is only imported where a mod is given.
"""

from __future__ import annotations

from flashgen.mods.block_masks import key_ranges_of
from flashgen.mods.captures import Capture
from flashgen.mods.classes import arrays_of, key_ranges, query_ranges
from flashgen.mods.derivative import Contribution, Derivative
from flashgen.mods.emit import GLUON, TRITON, DerivativeEmission, Dialect, Emission, GradientText, Names, parameters
from flashgen.mods.fingerprint import fingerprint
from flashgen.mods.programs import Program, bound, program
from flashgen.mods.ranges import KeyRanges

__all__ = [
    "GLUON",
    "TRITON",
    "Capture",
    "Contribution",
    "Derivative",
    "DerivativeEmission",
    "Dialect",
    "Emission",
    "GradientText",
    "KeyRanges",
    "Names",
    "Program",
    "arrays_of",
    "bound",
    "fingerprint",
    "key_ranges",
    "key_ranges_of",
    "parameters",
    "program",
    "query_ranges",
]
