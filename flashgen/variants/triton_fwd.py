"""The portable forward: one `tl.dot` kernel for every architecture that Triton compiles for."""

from __future__ import annotations

from typing import Any

from flashgen.config import KernelConfig, Tunable
from flashgen.spec import AttentionSpec
from flashgen.target import Target
from flashgen.variants.base import Knob, KnownGood, ResourceFacts, Variant

_BLOCK_LIMITS = (16, 256)
_WARPS = (1, 2, 4, 8, 16)
_STAGES = (1, 8)

# Features the template does not know yet, in the words of the spec's flags.
_COVERED_FLAGS = frozenset({"causal", "has_lse"})

_FLEX = "default tile of FlexAttention in PyTorch 2.13 (torch/_inductor/template_heuristics/triton.py)"
_FLEX_FP32 = "default of FlexAttention in PyTorch 2.13 for fp32 where its table has no entry (same file)"
_FLEX_120 = "default of FlexAttention in PyTorch 2.13 for sm_120, which has as little shared memory (same file)"
_FLEX_SPILLS = "default of FlexAttention for head dim 128 (same file); the one for 64 spills in the loop when compiled"
_FLEX_192 = "default of FlexAttention in PyTorch 2.13 for head dim 192 (same file); the one for 128 spills when padded"
_FLEX_AMD = (
    "default of FlexAttention in PyTorch 2.13 for gfx950 (same file); the one for gfx942 computes products thrice"
)
_H100 = "best of what was measured on one H100 (benchmarks/results/h100_tune.jsonl)"
_SURFACE = "among the three best of 54 measured on one H200, bf16, S 2048 and 8192 (h200_triton_attention_fwd.jsonl)"

# (BLOCK_M, BLOCK_N, num_warps, num_stages), best first, by (family of architecture, 16-bit?, padded head dim).
_Tile = tuple[int, int, int, int]
_KNOWN_GOOD: dict[tuple[str, bool, int], tuple[tuple[_Tile, str], ...]] = {
    ("sm_90", True, 64): (
        ((64, 64, 4, 3), _SURFACE),
        ((128, 64, 8, 3), _SURFACE),
        ((128, 128, 8, 3), _SURFACE),
        ((128, 128, 4, 3), _FLEX),
    ),
    ("sm_90", True, 128): (((128, 128, 8, 3), _H100), ((128, 64, 8, 3), _SURFACE), ((64, 64, 4, 3), _SURFACE)),
    ("sm_90", True, 256): (((64, 32, 4, 3), _FLEX),),
    # fp32 is multiplied on the CUDA cores in full precision: the larger tiles spill, the first one never does.
    ("sm_90", False, 32): (((64, 64, 4, 2), _H100), ((128, 32, 4, 3), _FLEX), ((32, 16, 4, 3), _FLEX_FP32)),
    ("sm_90", False, 64): (((32, 16, 4, 3), _FLEX_FP32), ((128, 32, 4, 3), _FLEX)),
    ("sm_90", False, 128): (((32, 16, 4, 3), _FLEX_FP32), ((32, 64, 4, 3), _FLEX)),
    ("sm_90", False, 256): (((32, 16, 4, 3), _FLEX_FP32), ((32, 32, 4, 3), _FLEX)),
    ("sm_80", True, 64): (((128, 64, 4, 3), _FLEX),),
    ("sm_80", True, 128): (((128, 64, 8, 3), _FLEX),),
    ("sm_80", True, 256): (((32, 64, 4, 3), _FLEX),),
    ("sm_80", False, 32): (((128, 32, 4, 3), _FLEX), ((32, 16, 4, 3), _FLEX_FP32)),
    ("sm_80", False, 64): (((32, 16, 4, 3), _FLEX_FP32), ((128, 32, 4, 3), _FLEX)),
    ("sm_80", False, 128): (((32, 16, 4, 3), _FLEX_FP32), ((128, 32, 4, 3), _FLEX)),
    ("sm_80", False, 256): (((32, 16, 4, 3), _FLEX_FP32), ((64, 16, 4, 3), _FLEX)),
    # The families below lack rows; `_PARENT` says whose they take.
    ("sm_86", True, 256): (((32, 64, 4, 2), _FLEX_120),),
    ("sm_100", True, 64): (((128, 64, 8, 3), _FLEX_SPILLS),),
    ("sm_100", True, 128): (((128, 64, 8, 3), _FLEX),),
    ("sm_100", True, 256): (((64, 32, 4, 3), _FLEX),),
    ("sm_120", True, 64): (((128, 64, 4, 2), _FLEX),),
    ("sm_120", True, 128): (((128, 64, 8, 2), _FLEX),),
    ("sm_120", True, 256): (((32, 64, 4, 2), _FLEX),),
    ("gfx942", True, 64): (((128, 64, 4, 2), _FLEX_AMD),),
    ("gfx942", True, 128): (((128, 64, 4, 2), _FLEX_AMD),),
    ("gfx942", True, 256): (((32, 64, 4, 2), _FLEX_AMD),),
}
# Go first where a head dim is no power of two: masked loads need more registers.
_PADDED: dict[tuple[str, bool, int], tuple[tuple[_Tile, str], ...]] = {
    ("sm_80", True, 128): (((128, 32, 8, 2), _FLEX_192),),
    ("sm_86", True, 128): (((128, 32, 8, 2), _FLEX_192),),
}
_PARENT = {"sm_86": "sm_80", "sm_100": "sm_90", "sm_120": "sm_90", "gfx942": "sm_90"}


def _family(target: Target) -> str:
    """Whose tiles a target takes: the newest family that is not newer than it."""
    if target.backend == "hip":
        return "gfx942"
    # The interpreter knows no architecture: any tile will do.
    if target.backend == "cpu":
        return "sm_90"
    return next((f"sm_{oldest}" for oldest in (120, 100, 90, 86) if target.capability >= oldest), "sm_80")


class TritonForward(Variant):
    """`templates/triton/attention_fwd.py.jinja`: pointer loads, masked blocks peeled, any head dim, any strides."""

    name = "triton_fwd"
    op = "attention_fwd"
    backend = "triton"
    template = "triton/attention_fwd.py.jinja"
    knobs = (
        Knob(name="BLOCK_M", values=(32, 64, 128, 256), meaning="query rows of one program"),
        Knob(name="BLOCK_N", values=(16, 32, 64, 128), meaning="keys of one step of the inner loop"),
        Knob(name="num_warps", values=(4, 8), meaning="warps of one program"),
        Knob(name="num_stages", values=(2, 3, 4), meaning="depth of the software pipeline over keys"),
    )

    def supports(self, spec: AttentionSpec, target: Target) -> str | None:
        if spec.op != self.op:
            return f"computes {self.op}, not {spec.op}"
        missing = [flag for flag in spec.flags if flag not in _COVERED_FLAGS]
        if missing:
            return f"{', '.join(missing)}: not covered by this kernel yet"
        if target.backend == "cuda" and target.capability < 80:
            return (
                f"needs compute capability 8.0 or newer (bf16 and asynchronous copies); {target.name} is {target.arch}"
            )
        return None

    def illegal(
        self, spec: AttentionSpec, target: Target, config: KernelConfig, facts: ResourceFacts | None = None
    ) -> str | None:
        low, high = _BLOCK_LIMITS
        for name in ("BLOCK_M", "BLOCK_N"):
            value: Any = config[name]
            # tl.arange wants powers of two, tl.dot at least 16 on each side.
            if not _is_int(value) or not low <= value <= high or value & (value - 1):
                return f"{name}={value!r} must be a power of two from {low} to {high}"
        # Triton takes powers of two only; 32 warps are the hardware's limit of a block, 16 is where registers run out.
        if not _is_int(config.num_warps) or config.num_warps not in _WARPS:
            return f"num_warps={config.num_warps!r} must be one of {', '.join(map(str, _WARPS))}"
        if not _is_int(config.num_stages) or not _STAGES[0] <= config.num_stages <= _STAGES[1]:
            return f"num_stages={config.num_stages!r} must be from {_STAGES[0]} to {_STAGES[1]}"
        # Fewer than 8 rows a warp leaves warps computing the same products twice: never the best on any surface read.
        if 8 * config.num_warps > config.BLOCK_M and config.num_warps > 4:
            return (
                f"BLOCK_M={config.BLOCK_M} is too small for num_warps={config.num_warps}: at least 8 query rows a warp"
            )
        # fp32 accumulators alone beyond 255 registers a thread cannot be held: the compiler would live in spills.
        accumulator = config.BLOCK_M * (spec.block_head_dim_v + config.BLOCK_N) // (config.num_warps * target.warp_size)
        if accumulator > 512:
            return f"accumulators need {accumulator} registers a thread (output and score tiles), twice what exists"
        operands = _fp32_operands(spec, config, target.warp_size)
        if operands > 1024:
            # Compiled for sm_80 and sm_90: from 768 on such a tile spills, beyond 1024 thousands of times, a minute to compile.
            return f"fp32 operands of one thread's products are {operands} values, four times the registers that exist"
        if facts is not None and facts.undefined_registers:
            return f"ptxas miscompiled it: {facts.undefined_registers} instructions read registers that nothing wrote"
        if facts is not None and facts.smem_bytes > target.smem_bytes:
            return f"needs {facts.smem_bytes} bytes of shared memory, {target.name} has {target.smem_bytes} a block"
        if facts is None and self._least_smem(spec, config) > target.smem_bytes:
            return (
                f"needs at least {self._least_smem(spec, config)} bytes of shared memory for the key and value stages, "
                f"{target.name} has {target.smem_bytes} a block"
            )
        return None

    def default(self, spec: AttentionSpec, target: Target) -> KernelConfig:
        for known in self.known_good(spec, target):
            if self.illegal(spec, target, known.config) is None:
                return known.config
        return self.config(BLOCK_M=32, BLOCK_N=32, num_warps=4, num_stages=2)

    def known_good(self, spec: AttentionSpec, target: Target) -> tuple[KnownGood, ...]:
        # The tables' smallest head dim is 64 (32 in fp32, where 64 already spills what 32 holds).
        head_dim = min(256, max(64 if spec.itemsize == 2 else 32, spec.block_head_dim, spec.block_head_dim_v))
        family, half = _family(target), spec.itemsize == 2
        rows = _KNOWN_GOOD.get((family, half, head_dim)) or _KNOWN_GOOD[(_PARENT[family], half, head_dim)]
        if (spec.head_dim, spec.head_dim_v) != (spec.block_head_dim, spec.block_head_dim_v):
            rows = (*_PADDED.get((family, half, head_dim), ()), *rows)
        return tuple(KnownGood(config=self._tile(tile), source=source) for tile, source in rows)

    def _tile(self, tile: _Tile) -> KernelConfig:
        block_m, block_n, num_warps, num_stages = tile
        return self.config(BLOCK_M=block_m, BLOCK_N=block_n, num_warps=num_warps, num_stages=num_stages)

    @staticmethod
    def _least_smem(spec: AttentionSpec, config: KernelConfig) -> int:
        # Two loops (unmasked, masked) never overlap, so one set of stages; the last stage may live in registers.
        stages = max(1, config.num_stages - 1)
        return int(stages * config.BLOCK_N * (spec.block_head_dim + spec.block_head_dim_v) * spec.itemsize)


def _fp32_operands(spec: AttentionSpec, config: KernelConfig, warp_size: int) -> int:
    """Values of q and k that one thread multiplies for its scores on the CUDA cores; 0 where tensor cores do it."""
    if spec.itemsize == 2:
        return 0
    scores = max(1, config.BLOCK_M * config.BLOCK_N // (config.num_warps * warp_size))
    rows = 1 << ((scores.bit_length() - 1) // 2)
    return int((rows + scores // rows) * max(spec.block_head_dim, spec.block_head_dim_v))


def _is_int(value: Tunable) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
