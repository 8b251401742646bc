"""What is known about good tiles of the portable forward: measured winners, and lists that others ship. Data, no rules.

The rules that choose among them are in `flashgen.tuner.policy`; `benchmarks/model_quality.py` judges them.
"""

from __future__ import annotations

from flashgen.target import Target

# (BLOCK_M, BLOCK_N, num_warps, num_stages)
Tile = tuple[int, int, int, int]
# (family of architecture, 16-bit?, padded head dim)
Key = tuple[str, bool, int]

# torch/_inductor/template_heuristics/triton.py
_FLEX = "default tile of FlexAttention in PyTorch 2.13"
_FLEX_FP32 = "default of FlexAttention in PyTorch 2.13 for fp32 and head dims over 256"
_FLEX_LARGE = "default of FlexAttention in PyTorch 2.13 for fp32 and head dims over 256 on ROCm"
_FLEX_120 = "default of FlexAttention in PyTorch 2.13 for sm_120, which has as little shared memory"
_FLEX_SPILLS = (
    "default of FlexAttention in PyTorch 2.13 for head dim 128; the one for 64 spills in the loop when compiled"
)
_FLEX_192 = "default of FlexAttention in PyTorch 2.13 for head dim 192; the one for 128 spills when padded"
_FLEX_AMD = "default of FlexAttention in PyTorch 2.13 for gfx950; the one for gfx942 computes products thrice"
_H100 = "best of what was measured on one H100 (benchmarks/results/h100_tune.jsonl)"
_SURFACE = "among the three best of 54 measured on one H200, bf16, S 2048 and 8192 (h200_triton_attention_fwd.jsonl)"

# Best first.
KNOWN_GOOD: dict[Key, tuple[tuple[Tile, str], ...]] = {
    ("sm_90", True, 64): (
        ((64, 64, 4, 3), _SURFACE),
        ((128, 64, 8, 3), _SURFACE),
        ((128, 128, 8, 3), _SURFACE),
        ((128, 128, 4, 3), _FLEX),
    ),
    ("sm_90", True, 128): (((128, 128, 8, 3), _H100), ((128, 64, 8, 3), _SURFACE), ((64, 64, 4, 3), _SURFACE)),
    ("sm_90", True, 256): (((64, 32, 4, 3), _FLEX),),
    # fp32 is multiplied on the CUDA cores in full precision: the larger tiles spill, the smallest never does.
    ("sm_90", False, 32): (((64, 64, 4, 2), _H100), ((128, 32, 4, 3), _FLEX), ((32, 16, 4, 3), _FLEX_FP32)),
    ("sm_90", False, 64): (((32, 16, 4, 3), _FLEX_FP32), ((128, 32, 4, 3), _FLEX)),
    ("sm_90", False, 128): (((32, 16, 4, 3), _FLEX_FP32), ((32, 64, 4, 3), _FLEX)),
    ("sm_90", False, 256): (((32, 16, 4, 3), _FLEX_FP32), ((32, 32, 4, 3), _FLEX)),
    ("sm_100", True, 64): (((128, 64, 8, 3), _FLEX_SPILLS),),
    ("sm_100", True, 128): (((128, 64, 8, 3), _FLEX),),
    ("sm_100", True, 256): (((64, 32, 4, 3), _FLEX),),
    ("sm_100", False, 32): (((128, 32, 4, 3), _FLEX), ((32, 16, 4, 3), _FLEX_FP32)),
    ("sm_100", False, 64): (((32, 16, 4, 3), _FLEX_FP32), ((128, 32, 4, 3), _FLEX)),
    ("sm_100", False, 128): (((32, 16, 4, 3), _FLEX_FP32), ((32, 64, 4, 3), _FLEX)),
    ("sm_100", False, 256): (((32, 16, 4, 3), _FLEX_FP32), ((32, 32, 4, 3), _FLEX)),
    ("sm_120", True, 64): (((128, 64, 4, 2), _FLEX),),
    ("sm_120", True, 128): (((128, 64, 8, 2), _FLEX),),
    ("sm_120", True, 256): (((32, 64, 4, 2), _FLEX),),
    ("sm_120", False, 32): (((128, 32, 4, 2), _FLEX), ((32, 16, 4, 3), _FLEX_FP32)),
    ("sm_120", False, 64): (((32, 16, 4, 3), _FLEX_FP32), ((128, 32, 4, 2), _FLEX)),
    ("sm_120", False, 128): (((32, 16, 4, 3), _FLEX_FP32), ((128, 32, 4, 2), _FLEX)),
    ("sm_120", False, 256): (((32, 16, 4, 3), _FLEX_FP32), ((64, 16, 4, 2), _FLEX)),
    ("sm_80", True, 64): (((128, 64, 4, 3), _FLEX),),
    ("sm_80", True, 128): (((128, 64, 8, 3), _FLEX),),
    ("sm_80", True, 256): (((32, 64, 4, 3), _FLEX), ((32, 64, 4, 2), _FLEX_120)),
    ("sm_80", False, 32): (((128, 32, 4, 3), _FLEX), ((32, 16, 4, 3), _FLEX_FP32)),
    ("sm_80", False, 64): (((32, 16, 4, 3), _FLEX_FP32), ((128, 32, 4, 3), _FLEX)),
    ("sm_80", False, 128): (((32, 16, 4, 3), _FLEX_FP32), ((128, 32, 4, 3), _FLEX)),
    ("sm_80", False, 256): (((32, 16, 4, 3), _FLEX_FP32), ((64, 16, 4, 3), _FLEX)),
    ("gfx942", True, 64): (((128, 64, 4, 2), _FLEX_AMD),),
    ("gfx942", True, 128): (((128, 64, 4, 2), _FLEX_AMD),),
    ("gfx942", True, 256): (((32, 64, 4, 2), _FLEX_AMD),),
    ("gfx942", False, 32): (((128, 32, 4, 1), _FLEX), ((32, 16, 4, 1), _FLEX_LARGE)),
    ("gfx942", False, 64): (((128, 32, 4, 1), _FLEX), ((32, 16, 4, 1), _FLEX_LARGE)),
    ("gfx942", False, 128): (((128, 32, 4, 1), _FLEX), ((32, 16, 4, 1), _FLEX_LARGE)),
    ("gfx942", False, 256): (((64, 16, 4, 1), _FLEX), ((32, 16, 4, 1), _FLEX_LARGE)),
}

# Go first where a head dim is no power of two: masked loads need more registers.
PADDED: dict[Key, tuple[tuple[Tile, str], ...]] = {
    ("sm_80", True, 128): (((128, 32, 8, 2), _FLEX_192),),
}

# Go before everything where a block has 99 KB of shared memory (sm_86, sm_89): the compiler stages query and probabilities there too,
# which only compiling shows; with three stages head dims 192 and 128 need 118,784 bytes.
SMALL_SMEM_BYTES = 100 * 1024
SMALL_SMEM: dict[Key, tuple[tuple[Tile, str], ...]] = {
    ("sm_80", True, 256): (((32, 64, 4, 2), _FLEX_120),),
}

# Go before everything where an option keeps values beside every score (a bias, a mask, dropout's bits): with the tiles above such kernels
# spill in the main loop or need more shared memory than there is. Not measured: the largest that compiles without, for sm_80, sm_90 and
# sm_100, under Triton 3.6 and 3.9 (tests/compile_goldens.py).
_COMPILED = "the largest tile that compiles without spills with this option; not measured"
BESIDE_SCORES: dict[tuple[bool, int], tuple[tuple[Tile, str], ...]] = {
    (True, 64): (((128, 32, 8, 2), _COMPILED),),
    (True, 128): (((128, 32, 8, 2), _COMPILED),),
    (True, 256): (((64, 32, 8, 2), _COMPILED), ((32, 32, 4, 2), _COMPILED)),
    (False, 32): (((32, 16, 4, 2), _COMPILED),),  # and so on: fp32 products already fill the registers
    (False, 64): (((32, 16, 4, 2), _COMPILED),),
    (False, 128): (((32, 16, 4, 2), _COMPILED),),
    (False, 256): (((32, 16, 4, 2), _COMPILED),),
}

# Go before everything where a mask_mod or a BlockMask may hide keys: with the plain kernel's tile the loop of unmasked tiles spills (128 x 128 on
# sm_90: 14 to 32 instructions under Triton 3.6), or has not a register left (head dim 64 in four warps on sm_80 and sm_120: up to 6 spilled, up to 25
# instructions more than the plain loop), with this one it does not. Compiled, not timed.
FREE_MASK: dict[Key, tuple[tuple[Tile, str], ...]] = {
    ("sm_90", True, 128): (((128, 64, 8, 3), _SURFACE),),
    ("sm_80", True, 64): (((128, 64, 8, 3), _FLEX_SPILLS),),
    ("sm_120", True, 64): (((128, 64, 8, 3), _FLEX_SPILLS),),
}

# The same where products are mma of one warp (sm_80 and its kind): the tile above spills beside a bias and a mask at once.
BESIDE_SCORES_MMA: dict[tuple[bool, int], tuple[tuple[Tile, str], ...]] = {
    (True, 64): (((64, 32, 8, 2), _COMPILED),),
    (True, 128): (((64, 32, 8, 2), _COMPILED),),
}

MEASURED_SOURCE = (
    "best of 54 tiles of a plain kernel measured on one H200 (benchmarks/data/h200_triton_attention_fwd.jsonl)"
)

# Winners of the measured surfaces, by key: (seqlen, causal, tile). `tests/unit/test_policy.py` holds them against
# the data. What this project's own kernel measured is in tuning_db/seeds.
MEASURED: dict[Key, tuple[tuple[int, bool, Tile], ...]] = {
    ("sm_90", True, 64): (
        (2048, False, (128, 64, 8, 3)),
        (2048, True, (64, 64, 4, 3)),
        (8192, False, (128, 64, 8, 3)),
        (8192, True, (64, 64, 4, 3)),
    ),
    ("sm_90", True, 128): (
        (2048, False, (128, 128, 8, 3)),
        (2048, True, (64, 64, 4, 3)),
        (8192, False, (128, 128, 8, 3)),
        (8192, True, (128, 64, 8, 3)),
    ),
}


def family(target: Target) -> str:
    """The architectures whose good tiles are taken for one another, by its oldest member; `sm_90` for the interpreter.

    Consumer cards of sm_86 and sm_89 stand with sm_80: the same instructions, less shared memory (which legality knows).
    """
    if target.backend == "hip":
        return "gfx942"
    if target.backend == "cpu":
        return "sm_90"
    for floor in (120, 100, 90):
        if target.capability >= floor:
            return f"sm_{floor}"
    return "sm_80"


def key(target: Target, itemsize: int, head_dim: int) -> Key:
    """Where the tables are looked up; the smallest entry is 64 wide (32 in fp32, where 64 already spills what 32 holds).

    Args:
        target: where it runs.
        itemsize: bytes of an element.
        head_dim: the wider of the two padded head dims.
    """
    return (family(target), itemsize == 2, min(256, max(64 if itemsize == 2 else 32, head_dim)))
